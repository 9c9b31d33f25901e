"""A block pool that forgets first what is worth least: what keeping a block saves in a second, as contexts' outlooks have it.

An outlook (`outlook.py`) stands where its context ends:

    [ system prompt .......... ]--+--[ agent A's context .......... ]*     A's outlook
                                  +--[ agent B's ]--+--[ before ]          B has gone on from here: nobody expects this end
                                                    +--[ after it ]*       B's outlook

As the end of a context is forgotten its outlook moves on to what stands before, so that a shared beginning is worth what all
who would come back to it are. A prompt that waits for its admission is expected at once. Deep blocks cost more to compute than
shallow ones, and are worth no more here: weighed by that, long contexts keep room that short ones would have used sooner, and
where returns are guesses that loses as much as it wins (`bench/README.md`).

Rule 1: where nothing is expected the longest unused goes first, and before everything else; a pool that knows no outlook at
    all is an LRU cache.
Rule 2: the order of what is expected is made anew once it is older than `RERANK_S`, and than a part of the age at which contexts
    are forgotten, as its values change with time alone: the less the older they are.
Rule 3: nothing expected is worth a look until something of it must go: what comes into its order waits unranked for that.
Rule 4: what did not come by its outlook's last age is expected no more, and goes as what was never expected.
"""

from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from math import inf

from orchestrator.core.kvpool import STALE_MAX, BlockPool, Claim, Run
from orchestrator.core.outlook import ContextId, Outlook
from orchestrator.core.types import BlockHash, BlockId, RequestId

#: What is expected: (whether a prompt waits, that request or the context).
_Key = tuple[bool, RequestId | ContextId]
#: Seconds for which an order of eviction is good enough.
RERANK_S = 1.0
#: The same as a part of the age of what was forgotten last.
RERANK_SHARE = 1 / 32
#: Outlooks that stand at the end of one run at most; of more the oldest is dropped.
OUTLOOKS_MAX = 16
#: What a second brings if a prompt waits for admission: more than any outlook says.
AWAITED_PER_S = 1e3


class _Expected:
    """An outlook and since when; without outlook: somebody waits."""

    __slots__ = ("outlook", "since_s")

    def __init__(self, outlook: Outlook | None, since_s: float) -> None:
        self.outlook = outlook
        self.since_s = since_s

    @property
    def lapses_s(self) -> float:
        """When it is expected no more."""
        return inf if self.outlook is None else self.since_s + self.outlook.ages_s[-1]

    def per_second(self, now: float) -> float:
        """Return what a second of keeping it brings: of prompts that wait the one that came first is admitted first."""
        age_s = now - self.since_s
        return AWAITED_PER_S + age_s if self.outlook is None else self.outlook.per_second(age_s)


class ValuePool(BlockPool):
    """A `BlockPool` that evicts by expected value."""

    __slots__ = ("_entries", "_expected", "_lapsing", "_order", "_places", "_ranked_at", "_rerank_s", "_unranked")

    def __init__(self, blocks: int, caching: bool = True) -> None:
        super().__init__(blocks, caching)
        #: What is expected where each run ends, and the run of each: by the context, or by the prompt that waits.
        self._expected: dict[Run, dict[_Key, _Expected]] = {}
        self._places: dict[_Key, Run] = {}
        #: When each is expected no more, soonest first, with those that something else is expected of by now.
        self._lapsing: list[tuple[float, _Key]] = []
        #: The order of what is expected: (value, when it idled, a tie-break, the run), least first. Valid is what `_entries` has
        #: the tie-break of. The rest is in the order of a `BlockPool`.
        self._order: list[tuple[float, int, int, Run]] = []
        self._entries: dict[Run, int] = {}
        #: What is to come into it (rule 3).
        self._unranked: dict[Run, None] = {}
        self._ranked_at = 0.0
        self._rerank_s = RERANK_S

    # --- what is expected -------------------------------------------------------------------------------------------------

    def leave(self, claim: Claim, outlook: Outlook) -> None:
        """Expect the next turn of a context at the end of a claim, which is about to be given up."""
        if claim.depth:
            self._put((False, outlook.context), self._ending_at(claim.run, claim.depth), outlook)
        else:
            self._drop((False, outlook.context))

    def expect(self, outlook: Outlook) -> None:
        """Expect the next turn of a context, if it is here, otherwise than before."""
        key = False, outlook.context
        run = self._places.get(key)
        if run is not None:
            self._put(key, run, outlook)

    def expect_chain(self, hashes: Sequence[BlockHash], outlook: Outlook) -> None:
        """Expect a next turn where the cached beginning of a chain ends."""
        matched = self.match(hashes, len(hashes))
        if matched:
            self._put((False, outlook.context), self._ending_at(self._place[hashes[matched - 1]], matched), outlook)

    def await_chain(self, request: RequestId, hashes: Sequence[BlockHash], matched: int) -> None:
        """Keep a chain's first `matched` blocks, which are cached, for a prompt that waits for its admission."""
        if matched:
            self._put((True, request), self._ending_at(self._place[hashes[matched - 1]], matched), None)
        else:
            self.stop_awaiting(request)

    def stop_awaiting(self, request: RequestId) -> None:
        """Note that a prompt waits no longer."""
        self._drop((True, request))

    def _ending_at(self, run: Run, depth: int) -> Run:
        """Return the run of a chain that ends at a depth; others may have grown and split the given one."""
        while run.start >= depth and run.parent is not None:
            run = run.parent
        return self._split(run, depth) if run.end > depth else run

    def _put(self, key: "_Key", run: Run, outlook: Outlook | None) -> None:
        self._drop(key)
        if run is self._root or (outlook is not None and not outlook.ages_s):
            return
        expected = _Expected(outlook, self.now)
        self._hand_on(run, {key: expected})
        self._rank_idle(run)
        if outlook is not None:
            heappush(self._lapsing, (expected.lapses_s, key))
            if len(self._lapsing) > 2 * len(self._places) + STALE_MAX:
                self._lapsing = [(self._expected[run][key].lapses_s, key) for key, run in self._places.items() if not key[0]]
                heapify(self._lapsing)

    def _let_lapse(self) -> None:
        """Expect no more what did not come in time (rule 4)."""
        while self._lapsing and self._lapsing[0][0] <= self.now:
            _, key = heappop(self._lapsing)
            run = self._places.get(key)
            if run is not None and self._expected[run][key].lapses_s <= self.now:
                self._drop(key)

    def _drop(self, key: "_Key") -> None:
        run = self._places.pop(key, None)
        if run is None:
            return
        expected = self._expected[run]
        del expected[key]
        if not expected:
            del self._expected[run]
        self._rank_idle(run)

    def _hand_on(self, run: Run, further: "dict[_Key, _Expected]") -> None:
        """Let what is expected stand at the end of a run, with what stands there already."""
        expected = self._expected.setdefault(run, {})
        for key, one in further.items():
            expected[key] = one
            self._places[key] = run
        while len(expected) > OUTLOOKS_MAX:
            oldest = next(iter(expected))
            del expected[oldest], self._places[oldest]

    # --- the order --------------------------------------------------------------------------------------------------------

    def _value(self, run: Run) -> float:
        """Return what a second of keeping the end of a run brings, in next turns."""
        per_second = 0.0
        for one in self._expected[run].values():
            per_second += one.per_second(self.now)
        return per_second

    def _rank_idle(self, run: Run) -> None:
        if run.evictable:
            self._rank(run)

    def _awaits(self, run: Run) -> bool:
        """Return whether something is expected of a run; nothing is of what is dead."""
        return run.idled > 0 and run in self._expected

    def _rank(self, run: Run) -> None:
        if self._awaits(run):
            self._serial += 1
            self._entries[run] = self._serial
            self._unranked[run] = None
        else:
            self._take_out(run)
            super()._rank(run)

    def _fresh(self, entry: tuple[int, int, Run]) -> bool:
        return super()._fresh(entry) and not self._awaits(entry[2])

    def _take_out(self, run: Run) -> None:
        """Let a run be in the order of what is expected no longer."""
        self._entries.pop(run, None)
        self._unranked.pop(run, None)

    def _rank_all(self) -> None:
        """Make the order anew (rule 2)."""
        self._ranked_at = self.now
        idle = [run for run in self._entries if run.evictable]
        self._entries = {run: number for number, run in enumerate(idle, self._serial + 1)}
        self._serial += len(idle)
        self._order = [(self._value(run), run.idled, number, run) for run, number in self._entries.items()]
        self._unranked.clear()
        heapify(self._order)

    def _rank_new(self) -> None:
        """Let what waits for it come into the order."""
        for run in [run for run in self._unranked if run.evictable]:
            heappush(self._order, (self._value(run), run.idled, self._entries[run], run))
        self._unranked.clear()

    def _next_idle(self) -> Run | None:
        self._let_lapse()
        return super()._next_idle() or self._least_expected()

    def _least_expected(self) -> Run | None:
        if self.now - self._ranked_at > self._rerank_s or len(self._order) > 2 * len(self._entries) + STALE_MAX:
            self._rank_all()
        else:
            self._rank_new()
        while self._order:
            _, _, serial, run = heappop(self._order)
            if self._entries.get(run) == serial and run.evictable:
                since_s = max(one.since_s for one in self._expected[run].values())
                self._rerank_s = max(RERANK_S, (self.now - since_s) * RERANK_SHARE)
                return run
        return None

    def _remove(self, run: Run, first: BlockHash) -> None:
        self._take_out(run)
        expected = self._expected.pop(run, None)
        if expected is not None:
            assert run.parent is not None, "the root cannot be evicted"
            if run.parent is self._root:
                for key in expected:
                    del self._places[key]
            else:
                self._hand_on(run.parent, expected)
        super()._remove(run, first)

    # --- invariants -------------------------------------------------------------------------------------------------------

    def _is_ranked(self, run: Run) -> bool:
        if not self._awaits(run):
            return super()._is_ranked(run)
        return run in self._unranked or any(entry[3] is run and self._entries.get(run) == entry[2] for entry in self._order)

    def validate(self, claims: Iterable[Claim], private: Iterable[BlockId]) -> None:
        super().validate(claims, private)
        runs = set(map(id, self._runs()))
        for run, expected in self._expected.items():
            assert id(run) in runs, f"something is expected of a run from block {run.start} on that is gone"
            assert 0 < len(expected) <= OUTLOOKS_MAX, f"{len(expected)} outlooks stand in one place"
            for key in expected:
                assert self._places[key] is run, f"{key} is expected in two places"
        total = sum(map(len, self._expected.values()))
        assert total == len(self._places), f"{len(self._places)} places for {total} outlooks"
