"""Remembers which blocks a node forgot lately, so that it can tell which prompt tokens it computes only because it did."""

from collections.abc import Iterable, Sequence

from orchestrator.core.types import BlockHash


class Regret:
    """The names that were forgotten last: about as many as the node has blocks, twice as many at most.

    None is dropped by itself: with so many new ones all that were there before them go at once.
    """

    __slots__ = ("_forgotten_max", "_newer", "_older")

    def __init__(self, forgotten_max: int) -> None:
        self._forgotten_max = forgotten_max
        self._newer: set[BlockHash] = set()
        self._older: set[BlockHash] = set()

    def forgot(self, names: Sequence[BlockHash]) -> None:
        """Remember blocks that are not held any longer."""
        if len(self._newer) + len(names) > self._forgotten_max:
            self._newer, self._older = set(), self._newer
        self._newer.update(names)

    def computed(self, names: Iterable[BlockHash]) -> int:
        """Return how many of these blocks of a chain, which were just computed, had been held and were forgotten.

        They are held again. A chain is forgotten from its end, so that behind one that was not forgotten lately none was.
        """
        newer, older = self._newer, self._older
        count = 0
        for name in names:
            if name in newer:
                newer.remove(name)
            elif name not in older:
                break
            older.discard(name)
            count += 1
        return count
