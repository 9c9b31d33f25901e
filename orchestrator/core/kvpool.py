"""One node's KV blocks: which are free, which are in use, which hold content worth keeping, and what to tell gateways.

    free      no content                     -> allocate() hands these out first
    used      referenced at least once       -> never handed out
    cached    registered under a block hash; when nobody references it, it idles until allocate() evicts it

Rules for editors.

Rule 1: the cached set is closed under prefix: a cached block's parent is cached. Gateways bisect over it.
Rule 2: whoever references a cached block references all cached blocks before it in its chain, for at least as long. So chains
are taken front to back (`acquire`), given back last block first (`release`), and whoever computes a block that is already
cached (a duplicate) references the cached twin too. It follows that a suffix idles before its prefix does, and that evicting
the block that idled longest is suffix-first and keeps rule 1.
Rule 3: a hash is announced as stored after its parent, and as removed before its parent.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

from orchestrator.core.types import BlockHash, BlockId, KvBatch, StoredRun


class BlockPool:
    """Reference-counted blocks with a prefix cache in those that nobody uses."""

    __slots__ = (
        "_above", "_block_of", "_caching", "_child_of", "_children", "_free", "_hash_of", "_idle", "_references", "_removed",
        "_stored",
    )  # fmt: skip

    def __init__(self, blocks: int, caching: bool = True) -> None:
        self._caching = caching
        #: Blocks without content; the last is handed out first.
        self._free: list[BlockId] = [BlockId(number) for number in range(blocks - 1, -1, -1)]
        self._references: list[int] = [0] * blocks
        #: Hash a block is registered under, and the block it follows on, which stays as long as it does (rule 1).
        self._hash_of: list[BlockHash | None] = [None] * blocks
        self._above: list[BlockId | None] = [None] * blocks
        #: Cached blocks that follow directly on a cached block.
        self._children: list[int] = [0] * blocks
        #: The last that was registered of them; it may be gone.
        self._child_of: list[BlockHash | None] = [None] * blocks
        #: Inverse of `_hash_of`; in order of registration, so parents stand before children.
        self._block_of: dict[BlockHash, BlockId] = {}
        #: Registered blocks without a reference, the one that idled longest first.
        self._idle: OrderedDict[BlockId, None] = OrderedDict()
        #: Changes since `take_changes`: hash to parent, in order of registration; hashes in order of eviction.
        self._stored: dict[BlockHash, BlockHash | None] = {}
        self._removed: dict[BlockHash, None] = {}

    @property
    def blocks(self) -> int:
        return len(self._references)

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def idle_blocks(self) -> int:
        return len(self._idle)

    @property
    def available_blocks(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._free) + len(self._idle)

    def match(self, hashes: Sequence[BlockHash], blocks_max: int) -> int:
        """Return how many of a chain's first blocks are cached, `blocks_max` at most, by bisection (rule 1)."""
        known = self._block_of
        low, high = 0, min(blocks_max, len(hashes))
        while low < high:
            middle = (low + high + 1) // 2
            if hashes[middle - 1] in known:
                low = middle
            else:
                high = middle - 1
        return low

    def idle_of(self, hashes: Sequence[BlockHash], matched: int) -> int:
        """Return how many of a chain's first `matched` blocks nobody references; the referenced ones come first (rule 2)."""
        low, high = 0, matched
        while low < high:
            middle = (low + high + 1) // 2
            if self._references[self._block_of[hashes[middle - 1]]] > 0:
                low = middle
            else:
                high = middle - 1
        return matched - low

    def acquire(self, hashes: Sequence[BlockHash], matched: int) -> list[BlockId]:
        """Reference a chain's first `matched` blocks, which must be cached, and return them."""
        block_of = self._block_of
        blocks = [block_of[name] for name in hashes[:matched]]
        self.retain(blocks)
        return blocks

    def retain(self, blocks: Iterable[BlockId]) -> None:
        """Add a reference to blocks that are cached or in use, front to back."""
        references, idle = self._references, self._idle
        for block in blocks:
            if references[block] == 0:
                del idle[block]
            references[block] += 1

    def allocate(self, count: int) -> list[BlockId]:
        """Return `count` blocks with one reference each; contents that idled longest are forgotten when none is free.

        At least that many must be available.
        """
        assert count <= self.available_blocks, f"{count} blocks wanted, free {len(self._free)} + idle {len(self._idle)}"
        free = self._free
        blocks = free[: -count - 1 : -1] if count else []
        del free[len(free) - len(blocks) :]
        if len(blocks) < count:
            blocks += self._evict(count - len(blocks))
        references = self._references
        for block in blocks:
            references[block] = 1
        return blocks

    def release(self, blocks: Iterable[BlockId]) -> None:
        """Take one reference from each block; the caller gives a chain back last block first."""
        references = self._references
        for block in blocks:
            assert references[block] > 0, f"block {block} is released but has {references[block]} references"
            references[block] -= 1
            if references[block] == 0:
                if self._hash_of[block] is None:
                    self._free.append(block)
                else:
                    self._idle[block] = None

    def register(self, blocks: Sequence[BlockId], names: Sequence[BlockHash], parent: BlockHash | None) -> dict[int, BlockId]:
        """Cache used blocks that are now complete: a run of a chain that follows on `parent`.

        Returns the twins by place in the run: other blocks that are cached under these hashes already. Then that block of the
        run stays unregistered and the twin has got a reference, which the caller gives back right after the one on the block.
        """
        if not self._caching:
            return {}
        block_of, stored = self._block_of, self._stored
        hash_of, above_of, children, child_of = self._hash_of, self._above, self._children, self._child_of
        assert parent is None or parent in block_of, f"block {blocks[0]}: parent {parent!r} is not cached"
        above = block_of[parent] if parent is not None else None
        references = self._references
        assert 0 not in [references[block] for block in blocks], f"one of the blocks {blocks} is registered but not in use"
        twins: dict[int, BlockId] = {}
        for place, (block, name) in enumerate(zip(blocks, names, strict=True)):
            cached = block_of.setdefault(name, block)
            if cached == block:
                hash_of[block], above_of[block] = name, above
                stored[name] = parent
                if above is not None:
                    children[above] += 1
                    child_of[above] = name
            else:
                self.retain((cached,))
                twins[place] = cached
            parent, above = name, cached
        return twins

    def retire(self, last: BlockHash, successor: Sequence[BlockHash]) -> None:
        """Let the end of a dead chain be forgotten before anything else: blocks that only it has, from `last` backwards.

        Generated blocks may follow on `last`, in one line. What `successor` goes on from stays, and so does what another chain
        continues or somebody uses.
        """
        staying = set(successor)
        dead: list[BlockId] = []
        name: BlockHash | None = self._end_of_line(last)
        while name is not None and name not in staying and name in self._block_of:
            block = self._block_of[name]
            if block not in self._idle or self._children[block] != (1 if dead else 0):
                break
            dead.append(block)
            name = self._parent(block)
        for block in reversed(dead):
            self._idle.move_to_end(block, last=False)

    def _parent(self, block: BlockId) -> BlockHash | None:
        """Return the hash of the block that a cached one follows on; None at the start of a prompt."""
        above = self._above[block]
        return self._hash_of[above] if above is not None else None

    def _end_of_line(self, name: BlockHash) -> BlockHash:
        """Return the last block that follows on a block as long as there is only one that does."""
        block = self._block_of.get(name)
        while block is not None and self._children[block] == 1:
            child = self._child_of[block]
            below = self._block_of.get(child) if child is not None else None
            if child is None or below is None or self._above[below] != block:
                break
            name, block = child, below
        return name

    def _evict(self, count: int) -> list[BlockId]:
        """Forget the content of unused blocks and return the blocks."""
        block_of, stored, removed = self._block_of, self._stored, self._removed
        hash_of, above_of, children = self._hash_of, self._above, self._children
        victims = self._victims(count)
        for block in victims:
            name, above = hash_of[block], above_of[block]
            assert name is not None, f"block {block} idles without a hash"
            del block_of[name]
            hash_of[block] = None
            if above is not None:
                children[above] -= 1
            if stored and name in stored:  # nobody was told of it yet
                del stored[name]
            else:
                removed[name] = None
        return victims

    def _victims(self, count: int) -> list[BlockId]:
        """Take the blocks that idled longest out of the unused ones; each before the one it follows on."""
        take = self._idle.popitem
        return [take(last=False)[0] for _ in range(count)]

    # --- what gateways are told -------------------------------------------------------------------------------------------

    @property
    def untold(self) -> bool:
        """Whether anything was stored or forgotten since `take_changes`."""
        return bool(self._stored or self._removed)

    @property
    def stored(self) -> bool:
        """Whether anything was stored since `take_changes`."""
        return bool(self._stored)

    def take_changes(self) -> tuple[tuple[StoredRun, ...], tuple[BlockHash, ...]] | None:
        """Return what was stored and removed since the last call, or None if nothing changed."""
        if not self._stored and not self._removed:
            return None
        changes = merged_runs(self._stored), tuple(self._removed)
        self._stored, self._removed = {}, {}
        return changes

    def snapshot(self) -> tuple[StoredRun, ...]:
        """Return everything that is cached, parents before children."""
        return merged_runs({name: self._parent(block) for name, block in self._block_of.items()})

    # --- invariants -------------------------------------------------------------------------------------------------------

    def validate(self, holders: Iterable[BlockId]) -> None:
        """Check every invariant; `holders` are all references there should be, a block as often as it is referenced."""
        expected = [0] * self.blocks
        for block in holders:
            expected[block] += 1
        for block, (found, wanted) in enumerate(zip(self._references, expected, strict=True)):
            assert found == wanted, f"block {block} has {found} references, its holders are {wanted}"
        used = sum(1 for count in self._references if count > 0)
        free, idle = len(self._free), len(self._idle)
        assert free + idle + used == self.blocks, f"free {free} + idle {idle} + used {used} != total {self.blocks}"
        assert len(dict.fromkeys((*self._free, *self._idle))) == free + idle, f"a block is twice among free {free}, idle {idle}"
        for block in self._free:
            assert self._references[block] == 0, f"free block {block} has {self._references[block]} references"
            assert self._hash_of[block] is None, f"free block {block} is cached as {self._hash_of[block]!r}"
        self._validate_cached()

    def _validate_cached(self) -> None:
        named = sum(1 for name in self._hash_of if name is not None)
        assert named == len(self._block_of), f"{named} blocks have a hash, {len(self._block_of)} hashes have a block"
        assert self._caching or named == 0, f"{named} blocks are cached though caching is off"
        place = {block: index for index, block in enumerate(self._idle)}
        children = [0] * self.blocks
        for name, block in self._block_of.items():
            assert self._hash_of[block] == name, f"{name!r} is said to be in block {block}, which holds {self._hash_of[block]!r}"
            count = self._references[block]
            assert (count == 0) == (block in place), f"cached block {block} has {count} references, idles: {block in place}"
            above = self._above[block]
            if above is None:
                continue
            parent = self._hash_of[above]
            assert parent in self._block_of, f"block {block} is cached, its parent {above} is not"
            assert count == 0 or self._references[above] > 0, f"block {block} has {count} references, its parent {above} none"
            children[above] += 1
            if above in place:
                assert place[block] < place[above], f"block {block} would be evicted after its parent {above}"
        assert children == self._children, f"cached blocks have {sum(children)} children, {sum(self._children)} are counted"


def merged_runs(parents: dict[BlockHash, BlockHash | None]) -> tuple[StoredRun, ...]:
    """Return hashes with their parents as runs, parents before children if they stood so; each goes on the run it continues."""
    runs: list[tuple[BlockHash | None, list[BlockHash]]] = []
    run_ending_in: dict[BlockHash, list[BlockHash]] = {}
    run: list[BlockHash] = []
    last: BlockHash | None = None
    for name, parent in parents.items():
        if parent is None or parent != last:  # nearly all follow on the one before
            if last is not None:
                run_ending_in[last] = run
            run = run_ending_in.pop(parent) if parent is not None and parent in run_ending_in else []
            if not run:
                runs.append((parent, run))
        run.append(name)
        last = name
    return tuple(StoredRun(parent, tuple(run)) for parent, run in runs)


class KvJournal:
    """Numbers the batches of what changed in a pool and keeps the newest for whoever missed some."""

    __slots__ = ("_batches", "_pool", "_sequence")

    def __init__(self, pool: BlockPool, batches_max: int) -> None:
        self._pool = pool
        self._sequence = 0
        #: Numbered without gaps; the last one is `_sequence`.
        self._batches: deque[KvBatch] = deque(maxlen=batches_max)

    def record(self) -> KvBatch | None:
        """Return the next batch, or None if nothing changed since the last."""
        changes = self._pool.take_changes()
        if changes is None:
            return None
        self._sequence += 1
        batch = KvBatch(self._sequence, *changes)
        self._batches.append(batch)
        return batch

    def since(self, after: int | None) -> tuple[KvBatch, ...]:
        """Return the batches after number `after`; without it, or when some of them are gone or none follows, all held now.

        Changes must have been recorded before, or a snapshot would hold what a later batch tells again.
        """
        if after is not None and self._sequence - len(self._batches) <= after < self._sequence:
            return tuple(batch for batch in self._batches if batch.sequence > after)
        return (KvBatch(self._sequence, stored=self._pool.snapshot(), cleared=True),)
