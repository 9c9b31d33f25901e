"""Follows one teller's numbered batches: which comes next, which is of no use, and whether something was missed.

Whoever holds blocks numbers what it tells. After a gap only a replay of what is missing, or all it holds, is of use; the
latter comes in pages: each is believed as it comes, in part, and the whole of it only when the last one came after all others.

See also `kvindex.py` and `segments.py`, which keep what is told.
"""

from enum import Enum

from orchestrator.core.types import KvBatch


class Trust(Enum):
    """How far a teller's holdings are believed."""

    EXACT = "exact"  # every batch was applied
    STALE = "stale"  # a batch was missed, or a page is to come: a resync is needed or under way
    BLIND = "blind"  # nothing is known; everything must be asked for


class Follower:
    """How far one teller's batches were followed."""

    __slots__ = ("applied", "awaited", "heard", "sequence", "trust")

    def __init__(self) -> None:
        #: Number of the last batch applied; None: only a batch that starts over is of use.
        self.sequence: int | None = None
        #: Highest number it was heard of; EXACT is only who is as far.
        self.heard = 0
        #: Snapshot and page that comes next, while one is under way; `sequence` is None then.
        self.awaited: tuple[int, int] | None = None
        #: Batches and pages taken in.
        self.applied = 0
        self.trust = Trust.BLIND

    def follows(self, batch: KvBatch) -> bool:
        """Tell whether a batch is to be taken in next, and note a gap before it.

        Batches seen already are of no use, and neither are those after a gap: the resync brings them again in order. A page
        that is not the next one ends its snapshot, and another must be asked for.
        """
        self.heard = max(self.heard, batch.sequence)
        if batch.cleared:  # of no use to whoever is as far: its first page alone would tell less than is known
            known = -1 if self.sequence is None else self.sequence
            return batch.sequence > known or (batch.sequence == known and self.trust is not Trust.EXACT)
        if batch.page:
            if self.awaited is None or batch.snapshot != self.awaited[0]:
                return False  # of a snapshot that is of no use or was given up
            if batch.page > self.awaited[1]:
                self.awaited = None
            return self.awaited is not None and batch.page == self.awaited[1]
        if self.sequence is None or batch.sequence <= self.sequence:
            return False
        if batch.sequence != self.sequence + 1:
            self.trust = Trust.STALE
            return False
        return True

    def take(self, batch: KvBatch, believable: bool = True) -> None:
        """Note that a batch which follows was taken in; one that cannot be true makes only a batch that starts over of use."""
        complete = believable and not batch.more
        self.sequence = batch.sequence if complete else None
        self.awaited = (batch.snapshot, batch.page + 1) if believable and batch.more else None
        self.applied += 1
        self.trust = Trust.EXACT if self.sequence == self.heard else Trust.STALE

    def distrust(self) -> None:
        """Believe only a batch that starts over from now on."""
        self.sequence = self.awaited = None
        self.trust = Trust.BLIND
