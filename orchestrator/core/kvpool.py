"""KV blocks of one node: which are free, which are in use, which hold content worth keeping, and what to tell gateways.

    free      no content                     -> allocate() hands these out first
    private   in use by one sequence, perhaps lent to readers; not complete yet, or a second copy of a cached block
    cached    complete and named by its block hash; in use while somebody holds a chain through it, else it idles until evicted

Cached blocks form a tree of runs, because chains do: a run is a stretch of blocks that nothing branches off from.

    [ system prompt .......... ]--+--[ agent A's context ............ ]        a Claim on a run holds everything from the
                                  +--[ agent B's ]--+--[ before compaction ]   start of the prompt to the run's end
                                                    +--[ after it ]

What a turn costs here grows with the runs it goes through and with its new blocks, not with its context.

Rules for editors.

Rule 1: the cached set is closed under prefix: a cached block's parent is cached. Gateways bisect over it.
Rule 2: only the end of a run that nothing continues and nobody holds is evicted, the one that idled longest first. So a suffix
goes before its prefix, which keeps rule 1.
Rule 3: a hash is announced as stored after its parent, and as removed before its parent.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import chain
from typing import cast

from orchestrator.core.idling import Idling
from orchestrator.core.outlook import Outlook
from orchestrator.core.types import BlockHash, BlockId, KvBatch, RequestId, StoredRun

#: Stale entries of the eviction order that are put up with before it is cleaned.
STALE_MAX = 256
#: Hashes in one batch at most: 256 KiB as a message, and a few milliseconds of a gateway that takes it in.
BATCH_HASHES_MAX = 16_384
#: What a run costs a batch beside its own hashes: its parent, and as many bytes around it.
RUN_HASHES = 2


class Run:
    """Cached blocks that follow on each other and that nothing branches off from but at their end."""

    __slots__ = ("blocks", "children", "claims", "idled", "names", "offered", "parent", "sealed", "start", "told")

    def __init__(self, parent: "Run | None", start: int) -> None:
        self.parent = parent
        #: Blocks of the chain before it.
        self.start = start
        self.names: list[BlockHash] = []
        self.blocks: list[BlockId] = []
        #: Its first blocks that gateways have been told of.
        self.told = 0
        #: Its first blocks that a tier below was offered, or gave.
        self.offered = 0
        #: True if what follows on its end is a run of its own, because somebody claims this one for long.
        self.sealed = False
        #: Runs that follow on its last block, by their first name.
        self.children: dict[BlockHash, Run] = {}
        #: Claims on it and on everything that follows on it.
        self.claims = 0
        #: When it idled last, as a running number; 0 for what is dead.
        self.idled = 0

    @property
    def end(self) -> int:
        """Blocks of the chain up to its end."""
        return self.start + len(self.names)

    @property
    def evictable(self) -> bool:
        """Whether its end may be forgotten (rule 2)."""
        return not self.claims and not self.children and bool(self.names)


class Claim:
    """A claim on a chain of cached blocks: none of them is evicted while it lasts."""

    __slots__ = ("depth", "run")

    def __init__(self, run: Run, depth: int) -> None:
        self.run = run
        #: Blocks of the chain that are claimed; the run may have grown past them.
        self.depth = depth


class BlockPool:
    """Blocks of one node, with a prefix cache in those that nobody uses."""

    __slots__ = (
        "_caching",
        "_free",
        "_idle_runs",
        "_lent",
        "_place",
        "_removed",
        "_root",
        "_serial",
        "_untold",
        "_unused",
        "blocks",
        "idle_blocks",
        "idling",
        "now",
    )

    def __init__(self, blocks: int, caching: bool = True) -> None:
        self.blocks = blocks
        #: The time, in seconds; whoever owns the pool sets it.
        self.now = 0.0
        #: Cached blocks that nobody holds.
        self.idle_blocks = 0
        #: What was forgotten for want of room.
        self.idling = Idling()
        self._caching = caching
        #: Blocks that were in use and have no content; the last is handed out first.
        self._free: list[BlockId] = []
        #: Blocks from this one on were never in use; they are handed out when no other is free.
        self._unused = 0
        #: Private blocks that readers use beside their owner, and how many do.
        self._lent: dict[BlockId, int] = {}
        #: Stands before the first block of every prompt; held for ever.
        self._root = Run(None, 0)
        self._root.claims = 1
        #: The run that each cached block is in.
        self._place: dict[BlockHash, Run] = {}
        #: Runs that can be evicted, the one that idled longest first: (when it did, a tie-break, the run). Some are stale.
        self._idle_runs: list[tuple[int, int, Run]] = []
        self._serial = 0
        #: Changes since `take_changes`: runs with blocks that were not told of, hashes of those told of and gone.
        self._untold: dict[Run, None] = {}
        self._removed: list[BlockHash] = []

    @property
    def free_blocks(self) -> int:
        return len(self._free) + self.blocks - self._unused

    @property
    def available_blocks(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return self.free_blocks + self.idle_blocks

    # --- looking things up ------------------------------------------------------------------------------------------------

    def match(self, hashes: Sequence[BlockHash], blocks_max: int) -> int:
        """Return how many of a chain's first blocks are cached, `blocks_max` at most, by bisection (rule 1)."""
        known = self._place
        low, high = 0, min(blocks_max, len(hashes))
        while low < high:
            middle = (low + high + 1) // 2
            if hashes[middle - 1] in known:
                low = middle
            else:
                high = middle - 1
        return low

    def holds(self, name: BlockHash) -> bool:
        """Tell whether a block is cached."""
        return name in self._place

    def ends(self, last: BlockHash, depth: int) -> bool:
        """Tell whether a chain of `depth` blocks ends with a cached block."""
        run = self._place[last]
        return run.start < depth <= run.end and run.names[depth - run.start - 1] == last

    def idle_of(self, hashes: Sequence[BlockHash], matched: int) -> int:
        """Return how many of a chain's first `matched` blocks nobody holds."""
        idle, end = 0, matched
        run = self._place[hashes[matched - 1]] if matched else self._root
        while not run.claims:
            idle += end - run.start
            end = run.start
            assert run.parent is not None, "the root is not held"
            run = run.parent
        return idle

    def kept_by(self, claims: Iterable[Claim]) -> int:
        """Return how many blocks would idle if these claims, and no others, were given up."""
        return sum(len(run.names) for run, count in self._counted(claims).items() if count == run.claims)

    def claimed_by(self, claims: Iterable[Claim]) -> int:
        """Return how many blocks these claims are on, each counted once."""
        return sum(len(run.names) for run in self._counted(claims))

    def shared_depth(self, claims: Iterable[Claim], hashes: Sequence[BlockHash], matched: int) -> int:
        """Return how many of a chain's first `matched` blocks, which must be cached, these claims are on."""
        counted = self._counted(claims)
        run = self._place[hashes[matched - 1]] if matched else self._root
        while run not in counted and run.parent is not None:
            run = run.parent
        return min(run.end, matched)

    def seal(self, claim: Claim) -> None:
        """Let nothing become part of the run that a claim ends on: it may last for long, and is on these blocks alone."""
        claim.run.sealed = True

    @staticmethod
    def _counted(claims: Iterable[Claim]) -> dict[Run, int]:
        """Return the runs that claims are on, each with how many of them."""
        counts: dict[Run, int] = {}
        for claim in claims:
            run: Run | None = claim.run
            while run is not None:
                counts[run] = counts.get(run, 0) + 1
                run = run.parent
        return counts

    def offered(self, hashes: Sequence[BlockHash], matched: int) -> int:
        """Return how many of a chain's first `matched` blocks, which must be cached, a tier below was offered or gave."""
        run = self._place[hashes[matched - 1]] if matched else self._root
        while not run.offered and run.parent is not None:
            run = run.parent
        return min(run.start + run.offered, matched)

    def mark_offered(self, hashes: Sequence[BlockHash], matched: int, offered: bool = True) -> None:
        """Note that a tier below was offered, or gave, a chain's first `matched` blocks, or that it has not got all of them."""
        run = self._place[hashes[matched - 1]] if matched else self._root
        while run.parent is not None:
            run.offered = max(run.offered, min(matched - run.start, len(run.names))) if offered else 0
            run = run.parent

    # --- chains of cached blocks ------------------------------------------------------------------------------------------

    def acquire(self, hashes: Sequence[BlockHash], matched: int) -> tuple[Claim, list[BlockId]]:
        """Claim a chain's first `matched` blocks, which must be cached, and return the claim and the blocks."""
        tip = self._place[hashes[matched - 1]] if matched else self._root
        if tip.end > matched:
            tip = self._split(tip, matched)
        self._pin(tip)
        parts: list[list[BlockId]] = []
        run: Run | None = tip
        while run is not None:
            parts.append(run.blocks)
            run = run.parent
        return Claim(tip, matched), list(chain.from_iterable(reversed(parts)))

    def claim(self, last: BlockHash | None) -> Claim | None:
        """Claim the chain that ends with a block, or nothing yet for None; None if that block is not cached."""
        if last is None:
            self._pin(self._root)
            return Claim(self._root, 0)
        run = self._place.get(last)
        if run is None:
            return None
        depth = run.end if run.names[-1] == last else run.start + run.names.index(last) + 1
        if run.end > depth:
            run = self._split(run, depth)
        self._pin(run)
        return Claim(run, depth)

    def keep(self, last: BlockHash, depth: int) -> Claim | None:
        """Claim a chain of `depth` blocks, and what follows in the run that it ends in, which is not cut. None if not cached.

        For a short while, and for reading alone: nothing is to be registered behind it.
        """
        run = self._place.get(last)
        if run is None:
            return None
        assert self.ends(last, depth), f"{last!r} does not end a chain of {depth} blocks"
        self._pin(run)
        return Claim(run, depth)

    def extend(self, claim: Claim, last: BlockHash, depth: int) -> None:
        """Let a claim cover the `depth` cached blocks of its chain that end with `last`."""
        assert depth > claim.depth, f"a claim on {claim.depth} blocks is extended to {depth}"
        tip = self._place[last]
        if tip.end > depth:
            tip = self._split(tip, depth)
        self._move(claim, tip)
        claim.depth = depth

    def tail(self, claim: Claim, count: int) -> tuple[list[BlockHash], list[BlockId]]:
        """Return the last `count` blocks of a claimed chain, first block first: their names and where they are."""
        assert count <= claim.depth, f"{count} blocks are wanted of a chain of {claim.depth}"
        run: Run | None = claim.run
        end = claim.depth
        names: list[list[BlockHash]] = []
        blocks: list[list[BlockId]] = []
        while count:
            assert run is not None, f"{count} blocks are missing before block {end}"
            start = max(end - count, run.start)
            if start < end:
                names.append(run.names[start - run.start : end - run.start])
                blocks.append(run.blocks[start - run.start : end - run.start])
                count, end = count - (end - start), start
            run = run.parent
        return list(chain.from_iterable(reversed(names))), list(chain.from_iterable(reversed(blocks)))

    def share(self, claim: Claim) -> Claim:
        """Return another claim on the same chain."""
        self._pin(claim.run)
        return Claim(claim.run, claim.depth)

    def release(self, claim: Claim) -> None:
        """Give a claim up; its blocks idle unless others hold them."""
        self._unpin(claim.run)
        claim.run = self._root

    def register(self, claim: Claim, blocks: Sequence[BlockId], names: Sequence[BlockHash]) -> int:
        """Cache private blocks that are now complete and follow on what is held; the claim then covers them too.

        Returns how many of them, the first ones, are cached in other blocks already. Those stay private, and the chain goes
        through the others.
        """
        if not self._caching:
            return len(blocks)
        run, depth, place = claim.run, claim.depth, self._place
        while run.start >= depth and run.parent is not None:  # others grew the run and split it
            run = run.parent
        if run.end > depth:
            run = self._split(run, depth)
        copies = 0
        while copies < len(names) and names[copies] in place:  # what follows on an unknown block is unknown (rule 1)
            run = place[names[copies]]
            copies += 1
        claim.depth = depth + len(names)
        if copies == len(names):
            self._move(claim, run)
            return copies
        if run.end > depth + copies:
            run = self._split(run, depth + copies)
        if run is self._root or run.children or run.sealed:
            parent, run = run, Run(run, run.end)
            parent.children[names[copies]] = run
        self._move(claim, run)
        new = names[copies:] if copies else names
        run.names += new
        run.blocks += blocks[copies:] if copies else blocks
        place.update(dict.fromkeys(new, run))
        self._untold[run] = None
        return copies

    def retire(self, last: BlockHash, successor: Sequence[BlockHash]) -> None:
        """Let the end of a dead chain be forgotten before anything else: blocks that only it has, from `last` on and backwards.

        Generated blocks may follow on `last`, in one line. What `successor` goes on from stays, and so does what another chain
        continues or somebody holds.
        """
        run = self._place.get(last)
        while run is not None and len(run.children) == 1:
            run = next(iter(run.children.values()))
        below: Run | None = None
        while run is not None and not run.claims and len(run.children) == (below is not None):
            kept = self._shared(run, successor)
            if kept == len(run.names):
                return
            if kept:
                self._split(run, run.start + kept)
            run.idled = 0
            if below is None:
                self._rank(run)
            if kept:
                return
            below, run = run, run.parent

    def drop(self, hashes: Sequence[BlockHash], first: int, end: int) -> int:
        """Forget blocks [first, end) of a chain, and return how many were forgotten.

        Backwards, so that what somebody holds or another chain continues stays, and all before it. What follows on the last one
        in one line goes too.
        """
        matched = self.match(hashes, end)
        if matched <= first:
            return 0
        run, dropped = self._place[hashes[matched - 1]], 0
        while len(run.children) == 1:
            run = next(iter(run.children.values()))
        while not run.claims and not run.children and run.end > first:
            parent, count = run.parent, min(len(run.names), run.end - first)
            self._free += self._cut(run, count)
            dropped += count
            assert parent is not None, "the root cannot be dropped"
            run = parent
        return dropped

    @staticmethod
    def _shared(run: Run, other: Sequence[BlockHash]) -> int:
        """Return how many of a run's first blocks another chain has at the same place."""
        low, high = 0, max(0, min(len(run.names), len(other) - run.start))
        while low < high:
            middle = (low + high + 1) // 2
            if run.names[middle - 1] == other[run.start + middle - 1]:
                low = middle
            else:
                high = middle - 1
        return low

    def _split(self, run: Run, depth: int) -> Run:
        """Cut a run in two; return the new, upper one, which ends at `depth`. The old one keeps what follows and its claims."""
        count, parent = depth - run.start, run.parent
        assert parent is not None, "the root has nothing to split"
        assert 0 < count < len(run.names), f"a run of {len(run.names)} blocks cannot be split after {count}"
        upper = Run(parent, run.start)
        upper.names, run.names = run.names[:count], run.names[count:]
        upper.blocks, run.blocks = run.blocks[:count], run.blocks[count:]
        upper.claims, upper.idled = run.claims, run.idled
        upper.told, run.told = min(run.told, count), max(0, run.told - count)
        upper.offered, run.offered = min(run.offered, count), max(0, run.offered - count)
        if upper.told < count:
            self._untold[upper] = None
        upper.children[run.names[0]] = run
        parent.children[upper.names[0]] = upper
        run.parent, run.start = upper, depth
        self._place.update(dict.fromkeys(upper.names, upper))
        return upper

    def _move(self, claim: Claim, run: Run) -> None:
        if run is not claim.run:
            self._pin(run)
            self._unpin(claim.run)
            claim.run = run

    def _pin(self, tip: Run) -> None:
        run: Run | None = tip
        while run is not None:
            if not run.claims:
                self.idle_blocks -= len(run.names)
            run.claims += 1
            run = run.parent

    def _unpin(self, tip: Run) -> None:
        self._serial += 1
        self.idling.note(self._serial, self.now)
        run: Run | None = tip
        while run is not None:
            assert run.claims > 0, f"a run of {len(run.names)} blocks from block {run.start} on is released but not held"
            run.claims -= 1
            if not run.claims:
                self.idle_blocks += len(run.names)
                run.idled = self._serial
            run = run.parent
        if not tip.claims and not tip.children:
            self._rank(tip)

    # --- blocks one by one ------------------------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[BlockId]:
        """Return `count` private blocks; contents that idled longest are forgotten when none is free.

        At least that many must be available.
        """
        assert count <= self.available_blocks, f"{count} blocks wanted, free {self.free_blocks} + idle {self.idle_blocks}"
        free = self._free
        blocks = free[: -count - 1 : -1] if count else []
        del free[len(free) - len(blocks) :]
        first, self._unused = self._unused, min(self._unused + count - len(blocks), self.blocks)
        blocks += cast(Iterable[BlockId], range(first, self._unused))
        while len(blocks) < count:
            blocks += self._evict(count - len(blocks))
        return blocks

    def lend(self, blocks: Iterable[BlockId]) -> None:
        """Let a reader use private blocks beside their owner; each gives them back once."""
        for block in blocks:
            self._lent[block] = self._lent.get(block, 0) + 1

    def give_back(self, blocks: Sequence[BlockId]) -> None:
        """Take private blocks back; the last who does sets them free."""
        if not self._lent:
            self._free += blocks
            return
        for block in blocks:
            readers = self._lent.get(block, 0)
            if not readers:
                self._free.append(block)
            elif readers == 1:
                del self._lent[block]
            else:
                self._lent[block] = readers - 1

    def _evict(self, count: int) -> list[BlockId]:
        """Forget up to `count` blocks at the end of the run that idled longest, and return them, last block first."""
        run = self._next_idle()
        assert run is not None, f"{self.idle_blocks} blocks idle and none is in the order"
        count = min(count, self._evictable(run))
        self.idling.forgotten(count, run.idled, self.now)
        return self._cut(run, count)

    def _cut(self, run: Run, count: int) -> list[BlockId]:
        """Forget the last `count` blocks of a run that nobody holds and nothing continues, and return them, last block first."""
        names = run.names[: -count - 1 : -1]
        blocks = run.blocks[: -count - 1 : -1]
        del run.names[-count:], run.blocks[-count:]
        self.idle_blocks -= count
        deque(map(self._place.pop, names), maxlen=0)
        untold = max(0, len(run.names) + count - run.told)
        self._removed += names[untold:]
        run.told, run.offered = min(run.told, len(run.names)), min(run.offered, len(run.names))
        run.sealed = False
        if run.names:
            self._rank(run)
        else:
            self._remove(run, names[-1])
        return blocks

    def _remove(self, run: Run, first: BlockHash) -> None:
        """Take an empty run out of the tree; the one before it may be next."""
        parent = run.parent
        assert parent is not None, "the root cannot be evicted"
        del parent.children[first]
        run.parent = None
        if not parent.claims and not parent.children:
            self._rank(parent)

    def _rank(self, run: Run) -> None:
        """Put a run that nobody holds and nothing continues into the order of eviction."""
        self._serial += 1
        heappush(self._idle_runs, (self._urgency(run), self._serial, run))
        if len(self._idle_runs) > 2 * len(self._place) + STALE_MAX:
            idle = [run for run in self._runs() if not run.claims and not run.children]
            self._idle_runs = [(self._urgency(run), number, run) for number, run in enumerate(idle)]
            heapify(self._idle_runs)

    def _next_idle(self) -> Run | None:
        """Take the run to evict from next out of the order; None if it is empty."""
        while self._idle_runs:
            entry = heappop(self._idle_runs)
            if self._fresh(entry):
                return entry[2]
        return None

    def _fresh(self, entry: tuple[int, int, Run]) -> bool:
        urgency, _, run = entry
        return run.evictable and urgency == self._urgency(run)

    def _urgency(self, run: Run) -> int:
        """Return what orders eviction: lower goes first."""
        return run.idled

    def _evictable(self, run: Run) -> int:
        """Return how many blocks at a run's end go before the next run's."""
        return len(run.names)

    # --- what is expected: nothing, by the order of use alone; `eviction.py` goes by it -------------------------------------

    def leave(self, claim: Claim, outlook: Outlook) -> None:
        """Take note of what is expected where a claim ends, which is about to be given up."""

    def expect(self, outlook: Outlook) -> None:
        """Take note that something else is expected of a context than before."""

    def expect_chain(self, hashes: Sequence[BlockHash], outlook: Outlook) -> None:
        """Take note of what is expected where the cached beginning of a chain ends."""

    def await_chain(self, request: RequestId, hashes: Sequence[BlockHash], matched: int) -> None:
        """Take note that a prompt waits for its admission, which will find its first `matched` blocks."""

    def stop_awaiting(self, request: RequestId) -> None:
        """Take note that a prompt waits no longer."""

    # --- what gateways are told -------------------------------------------------------------------------------------------

    @property
    def stored(self) -> bool:
        """Whether anything was stored since `take_changes`."""
        return bool(self._untold)

    @property
    def untold(self) -> bool:
        """Whether anything was stored or forgotten since `take_changes`."""
        return bool(self._untold or self._removed)

    def take_changes(self) -> tuple[tuple[StoredRun, ...], tuple[BlockHash, ...]] | None:
        """Return what was stored and removed since the last call, or None if nothing changed."""
        if not self.untold:
            return None
        stored: list[StoredRun] = []
        untold = self._untold
        for run in untold if len(untold) == 1 else sorted(untold, key=lambda run: run.start):  # parents before children
            if run.told < len(run.names):
                stored.append(StoredRun(self._name_before(run, run.told), tuple(run.names[run.told :])))
                run.told = len(run.names)
        removed = tuple(self._removed)
        self._untold, self._removed = {}, []
        return (tuple(stored), removed) if stored or removed else None

    def snapshot(self) -> tuple[StoredRun, ...]:
        """Return everything that is cached, parents before children."""
        return tuple(StoredRun(self._name_before(run, 0), tuple(run.names)) for run in self._runs())

    @staticmethod
    def _name_before(run: Run, place: int) -> BlockHash | None:
        """Return the name of the block before a place in a run; None at the start of a prompt."""
        if place:
            return run.names[place - 1]
        return run.parent.names[-1] if run.parent is not None and run.parent.names else None

    def _runs(self) -> list[Run]:
        """Return all runs, each after the one it follows on."""
        runs = list(self._root.children.values())
        for run in runs:
            runs += run.children.values()
        return runs

    # --- invariants -------------------------------------------------------------------------------------------------------

    def validate(self, claims: Iterable[Claim], private: Iterable[BlockId]) -> None:
        """Check every invariant, given all claims there are and all private blocks, one as often as it has users."""
        runs = self._runs()
        expected = {id(run): 0 for run in runs}
        for claim in claims:
            assert claim.depth <= claim.run.end, f"a claim on {claim.depth} blocks is on a run that ends at {claim.run.end}"
            run: Run | None = claim.run
            while run is not None and run is not self._root:
                expected[id(run)] += 1
                run = run.parent
        for run in runs:
            found, wanted = run.claims, expected[id(run)]
            assert found == wanted, f"the run from block {run.start} on has {found} claims, there are {wanted}"
            self._validate_run(run)
        users: dict[BlockId, int] = {}
        for block in private:
            users[block] = users.get(block, 0) + 1
        for block, count in users.items():
            lent = self._lent.get(block, 0)
            assert count == lent + 1, f"private block {block} has {count} users, it is lent to {lent}"
        idle = sum(len(run.names) for run in runs if not run.claims)
        assert idle == self.idle_blocks, f"{idle} blocks idle, {self.idle_blocks} are counted"
        cached = [block for run in runs for block in run.blocks]
        everything = sorted([*self._free, *range(self._unused, self.blocks), *cached, *users])
        total = f"free {self.free_blocks} + cached {len(cached)} + private {len(users)}"
        assert everything == list(range(self.blocks)), f"{total} are not the {self.blocks} blocks"
        assert len(cached) == len(self._place), f"{len(cached)} blocks are cached, {len(self._place)} hashes have a place"
        assert self._caching or not cached, f"{len(cached)} blocks are cached though caching is off"

    def _validate_run(self, run: Run) -> None:
        where = f"the run from block {run.start} on"
        parent = run.parent
        assert parent is not None, f"{where} follows on nothing"
        assert run.names, f"{where} is empty"
        assert parent.end == run.start, f"{where} follows on one that ends at {parent.end}"
        assert parent.claims >= run.claims, f"{where} has {run.claims} claims, what it follows on {parent.claims}"
        told = run.told == len(run.names) or run in self._untold
        assert told, f"{where} has {len(run.names)} blocks, {run.told} are told of and the others will not be"
        assert len(run.names) == len(run.blocks), f"{where} has {len(run.names)} names for {len(run.blocks)} blocks"
        assert run.offered <= len(run.names), f"{where} has {len(run.names)} blocks, {run.offered} were offered"
        for name in run.names:
            assert self._place.get(name) is run, f"{name!r} is in {where}, and said to be elsewhere"
        if not run.claims and not run.children:
            assert self._is_ranked(run), f"{where} idles and will never be evicted"

    def _is_ranked(self, run: Run) -> bool:
        return any(entry[2] is run and self._fresh(entry) for entry in self._idle_runs)


class KvJournal:
    """Numbers the batches of what changed in a pool and keeps the newest for whoever missed some.

    It keeps no more hashes than the pool has blocks: beyond that, telling all that is held now says more with less.
    """

    __slots__ = ("_batch_hashes_max", "_batches", "_batches_max", "_kept_blocks", "_pool", "_sequence", "_snapshot")

    def __init__(self, pool: BlockPool, batches_max: int, batch_hashes_max: int = BATCH_HASHES_MAX) -> None:
        self._pool = pool
        self._batches_max = batches_max
        self._batch_hashes_max = batch_hashes_max
        self._sequence = 0
        #: Snapshots told so far.
        self._snapshot = 0
        #: Each with the blocks that it tells of; numbered without gaps, the last one is `_sequence`.
        self._batches: deque[tuple[KvBatch, int]] = deque()
        #: Blocks that all of them tell of.
        self._kept_blocks = 0

    def record(
        self, segments_stored: Sequence[BlockHash] = (), segments_removed: Sequence[BlockHash] = ()
    ) -> tuple[KvBatch, ...]:
        """Return the next batches; none if nothing changed since the last. What changed in cmx comes last."""
        new: list[KvBatch] = []
        for runs, gone in self._parts():
            self._sequence += 1
            new.append(KvBatch(self._sequence, runs, gone))
        most = self._batch_hashes_max
        for start in range(0, len(segments_removed), most):
            self._sequence += 1
            new.append(KvBatch(self._sequence, segments_removed=tuple(segments_removed[start : start + most])))
        for start in range(0, len(segments_stored), most):
            self._sequence += 1
            new.append(KvBatch(self._sequence, segments_stored=tuple(segments_stored[start : start + most])))
        self._keep(new)
        return tuple(new)

    def _parts(self) -> list[tuple[tuple[StoredRun, ...], tuple[BlockHash, ...]]]:
        """Return what changed in the pool in portions of a batch."""
        changes = self._pool.take_changes()
        if changes is None:
            return []
        stored, removed = changes
        most = self._batch_hashes_max
        if len(removed) + _hashes(stored) <= most:  # nearly always
            return [changes]
        parts: list[tuple[tuple[StoredRun, ...], tuple[BlockHash, ...]]] = []
        for start in range(0, len(removed), most):
            parts.append(((), removed[start : start + most]))
        for runs in paged(stored, most):
            # What was removed goes before what was stored: nearly always both fit one batch.
            if parts and not parts[-1][0] and len(parts[-1][1]) + _hashes(runs) <= most:
                parts[-1] = (runs, parts[-1][1])
            else:
                parts.append((runs, ()))
        return parts

    def _keep(self, new: Iterable[KvBatch]) -> None:
        batches = self._batches
        for batch in new:
            blocks = batch.blocks
            batches.append((batch, blocks))
            self._kept_blocks += blocks
        while len(batches) > self._batches_max or (self._kept_blocks > self._pool.blocks and len(batches) > 1):
            self._kept_blocks -= batches.popleft()[1]

    def since(self, after: int | None, segments: Iterable[BlockHash] = ()) -> tuple[KvBatch, ...]:
        """Return the batches after number `after`; without it, or when some of them are gone or none follows, all held now.

        `segments` are those in cmx now.

        Changes must have been recorded before, or a snapshot would hold what a later batch tells again.
        """
        if after is not None and self._sequence - len(self._batches) <= after < self._sequence:
            return tuple(batch for batch, _ in self._batches if batch.sequence > after)
        self._snapshot += 1
        most, named = self._batch_hashes_max, tuple(segments)
        pages: list[tuple[tuple[StoredRun, ...], tuple[BlockHash, ...]]] = [
            (runs, ()) for runs in paged(self._pool.snapshot(), most)
        ]
        pages += [((), named[start : start + most]) for start in range(0, len(named), most)]
        last = len(pages) - 1
        return tuple(
            KvBatch(self._sequence, runs, (), page == 0, self._snapshot, page, more=page < last, segments_stored=segments_stored)
            for page, (runs, segments_stored) in enumerate(pages or [((), ())])
        )


def paged(runs: Sequence[StoredRun], hashes_max: int) -> list[tuple[StoredRun, ...]]:
    """Return runs in order, in portions of `hashes_max` hashes at most, what comes with each run counted; long runs are cut."""
    pages: list[tuple[StoredRun, ...]] = []
    page: list[StoredRun] = []
    room = hashes_max
    for run in runs:
        parent, start = run.parent, 0
        while start < len(run.hashes):
            if room <= RUN_HASHES and page:
                pages.append(tuple(page))
                page, room = [], hashes_max
            part = run.hashes[start : start + max(1, room - RUN_HASHES)]
            page.append(StoredRun(parent, part))
            parent, start = part[-1], start + len(part)
            room -= len(part) + RUN_HASHES
    return [*pages, tuple(page)] if page else pages


def _hashes(runs: Sequence[StoredRun]) -> int:
    """Return what runs cost a batch."""
    return sum([len(run.hashes) + RUN_HASHES for run in runs])
