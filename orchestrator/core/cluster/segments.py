"""Believes which segments of KV are in the shared storage (`cmx`), and finds how much of a prompt can be had from there.

A segment is so many consecutive blocks of a chain, aligned in it: [0, 8), [8, 16) and so on. It is one object, named by the hash
of its last block, which names all that is before it too. Segments come and go one by one, in any order, so nothing is bisected
here: a chain's segments are looked up from the first on until one is missing.

    hashes      h0 .. h7   h8 .. h15   h16 .. h23   h24 .. h27
    segment     h7         h15         h23          (not whole)
    there       yes        yes         no                            blocks() == 16

What is there is told by the hosts' stores, by each in numbered batches (`following.py`): what it has put there, found there,
removed, or found missing. The storage is shared: who removes a segment removes it for all, and a store that leaves takes nothing
away. The index is a belief: a segment that is gone is a load that brings less, after which its store tells that it is gone.
"""

from collections import deque
from collections.abc import Sequence
from itertools import compress, islice, repeat

from orchestrator.core.cluster.following import Follower, Trust
from orchestrator.core.types import BlockHash, KvBatch, StoreId

#: Segments believed to be there at most: 270 MB of a gateway; of eight blocks of 64 tokens, a billion tokens.
SEGMENTS_MAX = 1 << 21
#: What part of them is forgotten at once, the longest known first, when there are too many.
FORGOTTEN_SHARE = 8


class _Store(Follower):
    """What is believed of one store."""

    __slots__ = ("number", "told")

    def __init__(self, number: int) -> None:
        super().__init__()
        #: Stands for it among those who told of segments; never given to another, so that what it told outlives it.
        self.number = number
        #: Whether any segment may be known from it.
        self.told = False


class SegmentIndex:
    """Which segments of one model are in the shared storage.

    Bounded: beyond `segments_max` those that were known for longest are forgotten, which costs recomputing them.
    """

    __slots__ = ("_segments_max", "_serial", "_stores", "_teller")

    def __init__(self, segments_max: int = SEGMENTS_MAX) -> None:
        assert segments_max > 0, f"{segments_max} segments at most"
        self._segments_max = segments_max
        self._stores: dict[StoreId, _Store] = {}
        #: Number of the last store.
        self._serial = 0
        #: Number of the store that told of each segment last, the segment known for longest first.
        self._teller: dict[BlockHash, int] = {}

    @property
    def segments(self) -> int:
        """Segments believed to be in the storage."""
        return len(self._teller)

    def trust(self, store: StoreId) -> Trust:
        """Return how far what a store tells is believed now."""
        return self._stores[store].trust

    def sequence(self, store: StoreId) -> int | None:
        """Return the last batch applied of a store, which a resync is to follow; None if all must be told anew."""
        return self._stores[store].sequence

    def add_store(self, store: StoreId) -> None:
        """Start to follow a store; what its former self told of stays."""
        assert store not in self._stores, f"{store} is in the index already"
        self._serial += 1
        self._stores[store] = _Store(self._serial)

    def remove_store(self, store: StoreId) -> None:
        """Follow a store no longer. What it told of stays until another store removes it: it is in the shared storage."""
        del self._stores[store]

    def distrust(self, store: StoreId) -> None:
        """Believe only a batch that starts over of a store; what it told of stays until then."""
        self._stores[store].distrust()

    def apply(self, store: StoreId, batch: KvBatch) -> Trust:
        """Take in what a store tells of the shared storage; anything but EXACT afterwards asks for a resync after `sequence`.

        A batch that starts over replaces what this store told last of, and nothing that others did.
        """
        entry = self._stores[store]
        if entry.follows(batch):
            if batch.cleared and entry.told:
                self._forget_told(entry)
            if batch.segments_removed:
                self._forget(batch.segments_removed)
            if batch.segments_stored:
                self._teller.update(dict.fromkeys(batch.segments_stored, entry.number))
                entry.told = True
                if len(self._teller) > self._segments_max:
                    self._forget_oldest()
            entry.take(batch)
        return entry.trust

    def blocks(self, hashes: Sequence[BlockHash], segment_blocks: int) -> int:
        """Return how many of a chain's first blocks are in the storage, in whole segments of so many blocks."""
        ends = hashes[segment_blocks - 1 :: segment_blocks]
        there = list(map(self._teller.__contains__, ends))
        return segment_blocks * (len(there) if all(there) else there.index(False))

    def validate(self) -> None:
        """Raise `AssertionError` unless all segments are known from a store that there was, and are within the bound."""
        assert len(self._teller) <= self._segments_max, f"{len(self._teller)} segments of {self._segments_max}"
        silent = [store.number for store in self._stores.values() if not store.told]
        for segment, number in self._teller.items():
            assert 0 < number <= self._serial, f"{segment!r} was told of by store number {number} of {self._serial}"
            assert number not in silent, f"{segment!r} is known from store number {number}, which told of none"

    def _forget(self, segments: Sequence[BlockHash]) -> None:
        deque(map(self._teller.pop, segments, repeat(None)), maxlen=0)

    def _forget_told(self, store: _Store) -> None:
        self._forget(list(compress(self._teller, map(store.number.__eq__, self._teller.values()))))
        store.told = False

    def _forget_oldest(self) -> None:
        excess = len(self._teller) - self._segments_max
        self._forget(list(islice(self._teller, excess + self._segments_max // FORGOTTEN_SHARE)))
