"""Remembers which blocks a node forgot lately, so that it can tell which prompt tokens it computes only because it did."""

from collections.abc import Iterable, Sequence

from orchestrator.core.types import BlockHash


class Regret:
    """The names that were forgotten last, as many as the node has blocks."""

    __slots__ = ("_forgotten", "_forgotten_max")

    def __init__(self, forgotten_max: int) -> None:
        self._forgotten_max = forgotten_max
        #: Oldest first.
        self._forgotten: dict[BlockHash, None] = {}

    def forgot(self, names: Iterable[BlockHash]) -> None:
        """Remember blocks that are not held any longer."""
        forgotten = self._forgotten
        for name in names:
            forgotten[name] = None
        excess = len(forgotten) - self._forgotten_max
        if excess > 0:
            for name in list(forgotten)[:excess] if excess > 1 else [next(iter(forgotten))]:
                del forgotten[name]

    def computed(self, names: Sequence[BlockHash]) -> int:
        """Return how many of these blocks, which were just computed, had been held and were forgotten; they are held again."""
        forgotten = self._forgotten
        if not forgotten:
            return 0
        again = [name for name in names if name in forgotten]
        for name in again:
            del forgotten[name]
        return len(again)
