"""What a node brings into its pool before a request asks for it: chains that gateways expect prompts to begin with.

    BlocksWanted   what is here is claimed, and what is lacking waits for its turn; or there is no room: it ends at once
                   .. LoadBlocks, Fetch: a portion at a time, while no request waits, loads or fetches
                   .. FetchEnded: what came is cached and claimed
                   .. all that can be had is here: it is kept
    its end        a request is admitted that goes on from all of it; its time is over; it is cancelled; requests need the blocks

    wanted chain   |--- claimed ---|--- under way (private) ---|--- still to come ---|

Everything else goes first: a portion leaves the blocks that an admission would leave, and claims are given up, those that came
last first, as soon as a request that waits or decodes lacks blocks.
"""

from collections.abc import Collection, Iterable, Sequence

from orchestrator.core.commands import (
    ClearTimer,
    Fetch,
    LoadBlocks,
    NodeCommand,
    ReportPrefetchEnded,
    SetTimer,
    StopFetch,
)
from orchestrator.core.events import FetchEnded, FetchProgressed, PrefetchEnded
from orchestrator.core.kvpool import BlockPool, Claim
from orchestrator.core.node.offers import Offers
from orchestrator.core.timers import PrefetchTimer
from orchestrator.core.types import BlockHash, BlockId, GatewayId, NodeSpec, Prefetch, PrefetchEnd, RequestId, gateway_of

#: Prefetches at once; one more is refused.
PREFETCHES_MAX = 64
#: Bytes of a portion, and portions of a prefetch, about: a request waits for one at most, and each names the whole chain.
PORTION_BYTES, PORTIONS = 32 << 20, 16


class Held:
    """One prefetch, and how far it has come."""

    __slots__ = ("claim", "end", "ending", "fetched", "first", "loaded", "prefetch", "table")

    def __init__(self, prefetch: Prefetch, claim: Claim, end: int, loaded: bool, fetched: bool) -> None:
        self.prefetch = prefetch
        #: On what is here of the chain.
        self.claim = claim
        #: Blocks that were here at first; blocks that are to be here, of which others had no room.
        self.first = claim.depth
        self.end = end
        #: Blocks that the portion under way is written to; they follow on the claim.
        self.table: list[BlockId] = []
        #: Whether the store, and the source, need not be asked any more.
        self.loaded = loaded
        self.fetched = fetched
        #: Why it will end as soon as nothing is written to its blocks.
        self.ending: PrefetchEnd | None = None

    @property
    def brought(self) -> bool:
        """Whether nothing more is to come."""
        return self.loaded and self.fetched

    @property
    def reach(self) -> int:
        """Blocks of the chain that whoever is asked next has, as far as they are wanted."""
        return min(self.end, self.prefetch.source_blocks if self.loaded else self.prefetch.stored_blocks)


class Prefetches:
    """The prefetches of one node.

    Args:
        pool, offers: the node's.
        blocks_max: blocks that all of them may have.
    """

    def __init__(self, pool: BlockPool, offers: Offers, spec: NodeSpec, blocks_max: int) -> None:
        self._pool = pool
        self._offers = offers
        self._spec = spec
        self._blocks_max = blocks_max
        #: In the order they came. For others to read only; a field, since every step asks whether there is any.
        self.held: dict[RequestId, Held] = {}
        self._moving: Held | None = None
        #: Blocks that prefetches have brought and nobody has found yet, oldest first; as many as the pool has at most.
        self._unused: dict[BlockHash, None] = {}
        #: As in `Load`.
        self.prefetched = 0
        self.used = 0
        self.wasted = 0

    @property
    def claims(self) -> Collection[Claim]:
        return [held.claim for held in self.held.values()]

    @property
    def private(self) -> Sequence[BlockId]:
        """Blocks that a portion may be written to."""
        return self._moving.table if self._moving is not None else ()

    @property
    def moving(self) -> bool:
        """Whether a portion is under way: its blocks come back, or are cached, once it has ended."""
        return self._moving is not None

    @property
    def blocks(self) -> int:
        """Blocks that are kept for prefetches, each counted once, with those under way."""
        return self._pool.claimed_by(self.claims) + len(self.private) if self.held else 0

    def room_blocks(self, reserve: int) -> int:
        """Return how many blocks a further prefetch may bring, beside what was promised to others and a reserve."""
        if not self.held:
            return max(0, min(self._blocks_max, self._pool.available_blocks - reserve))
        return max(0, self._room(reserve, 0, 0))

    def _room(self, reserve: int, claimed: int, idle: int) -> int:
        """Return the same for one that claims `claimed` more blocks, `idle` of them nobody's; under 0 if those are too many."""
        under_way = len(self.private)
        coming = sum(held.end - held.claim.depth for held in self.held.values()) - under_way
        share = self._blocks_max - self.blocks - coming - claimed
        return min(share, self._pool.available_blocks - reserve - coming - idle)

    # --- coming -----------------------------------------------------------------------------------------------------------

    def take(self, prefetch: Prefetch, reserve: int, now: float) -> list[NodeCommand]:
        """Take a prefetch on, as far as there is room for it, or refuse it."""
        hashes, pool = prefetch.hashes, self._pool
        matched = pool.match(hashes, len(hashes))
        claimed = matched - pool.shared_depth(self.claims, hashes, matched)
        room = self._room(reserve, claimed, pool.idle_of(hashes, matched))
        if prefetch.id in self.held:  # of a gateway's former start: its end is this one's too
            return []
        if len(self.held) >= PREFETCHES_MAX or room < 0 or (not room and matched < len(hashes)):
            return [ReportPrefetchEnded(PrefetchEnded(prefetch.id, PrefetchEnd.NO_ROOM))]
        end = min(len(hashes), matched + room)
        loaded = not self._spec.stores or prefetch.stored_blocks <= matched
        fetched = prefetch.source in (None, self._spec.id)
        held = self.held[prefetch.id] = Held(prefetch, pool.acquire(hashes, matched)[0], end, loaded, fetched)
        commands: list[NodeCommand] = [SetTimer(PrefetchTimer(prefetch.id), now + prefetch.keep_s)]
        return commands + self._settle(held)

    def proceed(self, reserve: int) -> list[NodeCommand]:
        """Ask for the next portion of the first one that lacks something, if none is under way and there is room for it."""
        commands: list[NodeCommand] = []
        for held in tuple(self.held.values()) if self._moving is None else ():
            if not held.brought:
                commands += self._settle(held)
            if not held.brought:
                return commands + self._bring(held, reserve)
        return commands

    def _bring(self, held: Held, reserve: int) -> list[NodeCommand]:
        """Ask the store or the source for a portion, as far as there is room."""
        depth = held.claim.depth
        portion = max(1, PORTION_BYTES // max(1, self._spec.block_bytes), (held.end - held.first) // PORTIONS)
        count = min(portion, held.reach - depth, self._pool.available_blocks - reserve)
        if count <= 0:
            return []
        held.table, self._moving = self._pool.allocate(count), held
        asked, tokens, blocks = held.prefetch, (depth + count) * self._spec.block_tokens, tuple(held.table)
        if not held.loaded:
            return [LoadBlocks(asked.id, asked.hashes, depth, blocks, tokens)]
        assert asked.source is not None, f"prefetch {asked.id} fetches from nowhere"
        return [Fetch(asked.id, asked.source, asked.hashes, depth, blocks, tokens, False, asked.source_incarnation)]

    def _climb(self, held: Held) -> None:
        """Claim what others have brought of a chain since, and see whom there is to ask for more."""
        matched, depth = self._pool.match(held.prefetch.hashes, held.end), held.claim.depth
        if matched > depth:
            held.first = matched if depth == held.first else held.first
            self._claim(held, matched)
        depth = held.claim.depth
        if not held.loaded and held.reach <= depth:
            held.loaded = True
        if held.loaded and not held.fetched and held.reach <= depth:
            held.fetched = True

    def _claim(self, held: Held, depth: int) -> None:
        former, (held.claim, _) = held.claim, self._pool.acquire(held.prefetch.hashes, depth)
        self._pool.release(former)

    def progress(self, event: FetchProgressed | FetchEnded) -> None:
        """Cache what has come of a portion, up to a token of the prompt."""
        held = self._moving
        if held is None or held.prefetch.id != event.request:
            return
        depth, hashes = held.claim.depth, held.prefetch.hashes
        count = min(event.tokens // self._spec.block_tokens - depth, len(held.table))
        if count <= 0:
            return
        blocks, held.table = held.table[:count], held.table[count:]
        names = hashes[depth : depth + count]
        copies = self._pool.register(held.claim, blocks, names)
        self._pool.give_back(blocks[:copies])
        self.prefetched += count - copies
        self._unused.update(dict.fromkeys(names[copies:]))
        while len(self._unused) > self._spec.blocks:
            del self._unused[next(iter(self._unused))]
        if not held.loaded and not event.direct:
            self._pool.mark_offered(hashes, depth + count)

    def end_portion(self, event: FetchEnded) -> list[NodeCommand]:
        """Cache what a portion has brought, and give the blocks back that it has not filled."""
        held = self._moving
        if held is None or held.prefetch.id != event.request:
            return []
        if held.ending is not PrefetchEnd.CANCELLED:  # what nobody wants any more need not be cached
            self.progress(event)
        self._moving = None
        if held.table:  # whoever was asked has no more
            self._pool.give_back(held.table[::-1])
            held.table = []
            held.fetched, held.loaded = held.fetched or held.loaded, True
        elif self._spec.stores and held.loaded:
            self._offers.add(held.prefetch.hashes[: held.claim.depth])
        return self._end(held, held.ending) if held.ending is not None else self._settle(held)

    def _settle(self, held: Held) -> list[NodeCommand]:
        """Keep a prefetch that nothing more is to come of; end one of which nothing came."""
        self._climb(held)
        if not held.brought:
            return []
        lacked = held.first < held.end
        held.end = held.claim.depth
        if lacked and held.end == held.first:
            return self._end(held, PrefetchEnd.NOT_FOUND)
        self._claim(held, held.end)  # the run may have grown past it
        self._pool.seal(held.claim)
        return []

    # --- ends -------------------------------------------------------------------------------------------------------------

    def stop(self, prefetch: RequestId, reason: PrefetchEnd) -> list[NodeCommand]:
        """End a prefetch now, or with the portion that may write to its blocks. Unknown ones are ignored."""
        held = self.held.get(prefetch)
        if held is None or held.ending is not None:
            return []
        if held is not self._moving:
            return self._end(held, reason)
        held.ending = reason
        return [StopFetch(prefetch)]

    def _end(self, held: Held, reason: PrefetchEnd) -> list[NodeCommand]:
        identity = held.prefetch.id
        ended = PrefetchEnded(identity, reason, held.first, held.claim.depth)
        del self.held[identity]
        self._pool.release(held.claim)
        return [ClearTimer(PrefetchTimer(identity)), ReportPrefetchEnded(ended)]

    def stop_all(self, gateway: GatewayId | None = None) -> list[NodeCommand]:
        """End all prefetches, or all that a gateway asked for."""
        ending = [one for one in self.held if gateway is None or gateway_of(one) == gateway]
        return [command for one in ending for command in self.stop(one, PrefetchEnd.CANCELLED)]

    def give_way(self, blocks_short: int) -> list[NodeCommand]:
        """End prefetches, the last that came first, until so many blocks more can be used, now or once a portion has ended."""
        enough = self._pool.available_blocks + blocks_short
        commands: list[NodeCommand] = []
        for held in reversed(tuple(self.held.values())):
            if self._pool.available_blocks >= enough:
                break
            if held is self._moving or held.claim.depth:
                commands += self.stop(held.prefetch.id, PrefetchEnd.NO_ROOM)
        return commands

    def admitted(self, hashes: Sequence[BlockHash], hit: int) -> list[NodeCommand]:
        """Note that a request was admitted which has found its first `hit` blocks; end prefetches of all that it goes on from."""
        while hit and hashes[hit - 1] in self._unused:
            hit -= 1
            del self._unused[hashes[hit]]
            self.used += 1
        if not self.held:
            return []
        used = [
            held.prefetch.id
            for held in self.held.values()
            if held.end <= len(hashes) and hashes[held.end - 1] == held.prefetch.hashes[held.end - 1]
        ]
        return [command for one in used for command in self.stop(one, PrefetchEnd.USED)]

    def forgot(self, names: Iterable[BlockHash]) -> None:
        """Note that blocks are held no longer."""
        for name in names if self._unused else ():
            if name in self._unused:
                del self._unused[name]
                self.wasted += 1

    def validate(self) -> None:
        """Check what is counted; raises AssertionError with the numbers."""
        assert len(self.held) <= PREFETCHES_MAX, f"{len(self.held)} prefetches, at most {PREFETCHES_MAX} may be"
        assert len(self._unused) <= self._spec.blocks, f"{len(self._unused)} unused blocks of {self._spec.blocks}"
        for identity, held in self.held.items():
            depth = held.claim.depth
            assert held.first <= depth <= held.end, f"prefetch {identity}: block {depth} of {held.first} to {held.end}"
            assert not held.table or held is self._moving, f"prefetch {identity}: {len(held.table)} blocks that nobody fills"
            assert held.ending is None or held is self._moving, f"prefetch {identity} should have ended"
        moving = self._moving
        assert moving is None or moving.prefetch.id in self.held, "a portion is under way for nobody"
        asked = sum(held.end for held in self.held.values())
        assert self.blocks == 0 or asked, f"{self.blocks} blocks are kept for nothing"
