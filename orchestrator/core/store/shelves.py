"""One model's part of a store: its slots, what is in them, what of it is on its way, and what gateways are told of it.

A *recall* brings a chain into the arena, block by block from its front, for a read or because somebody advised it. It waits for
*moves*, one a segment; several recalls may wait for one.
"""

from collections.abc import Iterable, Sequence

from orchestrator.core.config import StoreConfig
from orchestrator.core.events import ReadOpened
from orchestrator.core.kvpool import BlockPool, Claim, KvJournal
from orchestrator.core.store.segments import Segments
from orchestrator.core.types import BlockHash, BlockId, KvBatch, MoveId, StoreCounts, StoredModel

#: What a measurement weighs when the next one comes.
FADING = 0.95


class Throughput:
    """Bytes a second while anything was under way, newer ones counting more."""

    __slots__ = ("_busy_s", "_bytes", "_since", "_under_way")

    def __init__(self) -> None:
        self._bytes = 0.0
        self._busy_s = 0.0
        self._under_way = 0
        #: Up to when the time is counted.
        self._since = 0.0

    @property
    def bytes_per_s(self) -> float:
        """0 until measured."""
        return self._bytes / self._busy_s if self._busy_s > 0 else 0.0

    def begin(self, now: float, transfers: int = 1) -> None:
        """Note that transfers began."""
        if not self._under_way:
            self._since = now
        self._under_way += transfers

    def end(self, now: float, moved_bytes: int, transfers: int = 1) -> None:
        """Note that some ended, and what they moved."""
        assert self._under_way >= transfers, f"{transfers} transfers ended, {self._under_way} are under way"
        self._under_way -= transfers
        self._bytes = self._bytes * FADING + moved_bytes
        self._busy_s = self._busy_s * FADING + max(0.0, now - self._since)
        self._since = now


class Move:
    """One segment on its way to or from cmx."""

    __slots__ = ("arrived", "cancelled", "claim", "direct", "id", "parent", "recalls", "segment", "shelf", "slots")

    def __init__(self, identity: MoveId, shelf: "Shelf", segment: BlockHash, parent: BlockHash | None) -> None:
        self.id = identity
        self.shelf = shelf
        self.segment = segment
        #: The segment before it in its chain, None for the first.
        self.parent = parent
        #: Where it goes, if it comes from cmx; they are nobody else's.
        self.slots: list[BlockId] = []
        #: Keeps what is written, if it goes to cmx.
        self.claim: Claim | None = None
        #: True if a node reads it by itself: it has no slots then, and one recall.
        self.direct = False
        #: Who waits for it.
        self.recalls: dict[Recall, None] = {}
        #: True once its slots are filled; it then waits for what comes before it.
        self.arrived = False
        #: True once nobody wants it; its slots may be written to until it has ended.
        self.cancelled = False


class Recall:
    """A chain that is brought into the arena, or from behind it straight to its reader."""

    __slots__ = (
        "asked",
        "came",
        "claim",
        "direct",
        "end",
        "final",
        "hashes",
        "in_flight",
        "moves",
        "read",
        "served",
        "shelf",
        "wanted",
    )

    def __init__(self, shelf: "Shelf", hashes: Sequence[BlockHash], end: int, claim: Claim, read: ReadOpened | None) -> None:
        self.shelf = shelf
        self.hashes = hashes
        #: Blocks that are wanted, and that can still be had; counted from the start of the chain.
        self.wanted = end
        self.end = end
        #: On what of the chain is in the arena.
        self.claim = claim
        #: Whether what is in cmx alone goes straight to the reader, which then has all up to the block `came`.
        self.direct = False
        self.came = 0
        #: Segments up to here have been asked for, or are not needed.
        self.asked = 0
        #: The moves it waits for, by segment; the number counts from the start of the chain.
        self.moves: dict[int, Move] = {}
        #: Who reads it; None if nobody does yet.
        self.read = read
        #: For a read: the block after the last one served, slots served and not copied yet, whether nothing more is to come.
        self.served = read.first_block if read is not None else 0
        self.in_flight = 0
        self.final = False

    @property
    def background(self) -> bool:
        """Whether no request waits for it."""
        return self.read is None or self.read.background

    @property
    def depth(self) -> int:
        """Blocks of the chain that are in the arena, or that need not get there: its reader has them."""
        return max(self.claim.depth, self.came)

    @property
    def over(self) -> bool:
        """Whether all that can be had is there."""
        return self.depth >= self.end


class Shelf:
    """One model's part of the arena, and its segments in cmx."""

    __slots__ = (
        "arriving",
        "cmx",
        "config",
        "counts",
        "cpu",
        "failures",
        "grown",
        "journal",
        "leaving",
        "model",
        "pool",
        "prefetched",
        "segments",
        "unwritten",
        "users",
    )

    def __init__(self, model: StoredModel, config: StoreConfig, segments: Segments) -> None:
        self.model = model
        self.config = config
        #: Those of all models.
        self.segments = segments
        self.pool = BlockPool(model.slots)
        self.journal = KvJournal(self.pool, config.resync_batches_max)
        #: Segments whose read from cmx somebody waits for, under way or arrived, by name.
        self.arriving: dict[BlockHash, Move] = {}
        #: Segments that are being written to cmx, by name.
        self.leaving: dict[BlockHash, Move] = {}
        #: Segments that were complete in the arena and not in cmx, the first one first, and how many blocks their chains have up
        #: to their ends; some have left the arena since.
        self.unwritten: dict[BlockHash, int] = {}
        #: Blocks that came since leases were last extended.
        self.grown: list[BlockHash] = []
        #: Blocks that were brought on advice and that nobody has read yet, oldest first.
        self.prefetched: dict[BlockHash, None] = {}
        #: Grants and reads that nodes carry out or are to end, and lost nodes' that may go on: each sets slots free one day.
        self.users = 0
        self.counts: dict[str, int] = {}
        self.failures: dict[str, int] = {}
        #: How fast nodes copy out of the arena, and how fast segments come from cmx.
        self.cpu = Throughput()
        self.cmx = Throughput()

    def count(self, what: str, blocks: int) -> None:
        """Add to one of the fields of `StoreCounts`."""
        self.counts[what] = self.counts.get(what, 0) + blocks

    def fail(self, reason: str) -> None:
        """Count something that went wrong."""
        self.failures[reason] = self.failures.get(reason, 0) + 1

    def store(self, claim: Claim, blocks: Sequence[BlockId], names: Sequence[BlockHash]) -> None:
        """Keep blocks that follow on a claimed chain, which then covers them; second copies are set free."""
        depth, size = claim.depth, self.model.segment_blocks
        copies = self.pool.register(claim, blocks, names)
        self.pool.give_back(blocks[:copies])
        self.grown += names[copies:]
        if not self.model.cmx:
            return
        for end in range((depth + copies) // size * size + size, depth + len(names) + 1, size):
            name = names[end - depth - 1]
            if not self.segments.holds(self.model.model, name):
                self.unwritten[name] = end

    def agrees(self, hashes: Sequence[BlockHash], end: int) -> bool:
        """Tell whether what is held of a chain's first `end` blocks lies where it should; of a true chain it does."""
        held = self.pool.match(hashes, end)
        return not held or self.pool.ends(hashes[held - 1], held)

    def new_blocks(self, names: Sequence[BlockHash]) -> int:
        """Return how many blocks, the first ones, are neither held nor named twice: all, where a true chain goes on."""
        seen: set[BlockHash] = set()
        for name in names:
            if name in seen or self.pool.holds(name):
                break
            seen.add(name)
        return len(seen)

    def segment(self, hashes: Sequence[BlockHash], number: int) -> BlockHash | None:
        """Return the name of a chain's segment, counted from 0; None if the chain does not have all of it."""
        last = (number + 1) * self.model.segment_blocks - 1
        return hashes[last] if last < len(hashes) else None

    def whole(self, hashes: Sequence[BlockHash], end: int) -> Sequence[BlockHash]:
        """Return the names of a chain's whole segments within its first `end` blocks."""
        size = self.model.segment_blocks
        return hashes[size - 1 : end : size]

    def record(self, stored: Sequence[BlockHash], removed: Sequence[BlockHash]) -> tuple[KvBatch, ...]:
        """Return what gateways have not been told of; given are segments that came to cmx and that went."""
        if not stored and not removed and not self.pool.untold:
            return ()
        batches = self.journal.record(stored, removed)
        self.count("cpu_evicted", sum(len(batch.removed) for batch in batches))
        for batch in batches:
            self._count_prefetched("prefetch_wasted", batch.removed)
        return batches

    def note_prefetched(self, names: Iterable[BlockHash]) -> None:
        """Note that blocks were brought on advice."""
        self.prefetched.update(dict.fromkeys(names))
        while len(self.prefetched) > self.model.slots:
            del self.prefetched[next(iter(self.prefetched))]

    def note_read(self, names: Iterable[BlockHash]) -> None:
        """Note that blocks are read."""
        self._count_prefetched("prefetch_used", names)

    def _count_prefetched(self, what: str, names: Iterable[BlockHash]) -> None:
        """Count what of these was brought on advice; that is decided with this."""
        if not self.prefetched:
            return
        for name in names:
            if name in self.prefetched:
                del self.prefetched[name]
                self.count(what, 1)

    def since(self, after: int | None) -> tuple[KvBatch, ...]:
        """Return what a gateway missed after a batch, or all that is held now."""
        return self.journal.since(after, self.segments.names(self.model.model))

    def counted(self) -> StoreCounts:
        """Return what was done so far."""
        return StoreCounts(**self.counts, failures=tuple(sorted(self.failures.items())))
