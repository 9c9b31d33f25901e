"""A block pool that forgets what was used least often first (LFU), the longest unused of those: a rule to compare others with."""

from collections.abc import Sequence

from orchestrator.core.kvpool import BlockPool, Claim, Run
from orchestrator.core.types import BlockHash, BlockId

#: More turns than any run of a simulation releases: what was used once more comes after all that was used less.
TURNS_MAX = 1 << 40


class FrequencyPool(BlockPool):
    """A `BlockPool` that evicts by the number of prompts that found a run; everything else is the same."""

    __slots__ = ("_uses",)

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        #: Prompts that found each run; absent if none did since it was computed.
        self._uses: dict[Run, int] = {}

    def acquire(self, hashes: Sequence[BlockHash], matched: int) -> tuple[Claim, list[BlockId]]:
        claim, blocks = super().acquire(hashes, matched)
        run = claim.run
        while run.parent is not None:
            self._uses[run] = self._uses.get(run, 0) + 1
            run = run.parent
        return claim, blocks

    def _split(self, run: Run, depth: int) -> Run:
        upper = super()._split(run, depth)
        if run in self._uses:
            self._uses[upper] = self._uses[run]
        return upper

    def _remove(self, run: Run, first: BlockHash) -> None:
        self._uses.pop(run, None)
        super()._remove(run, first)

    def _urgency(self, run: Run) -> int:
        return self._uses.get(run, 0) * TURNS_MAX + run.idled
