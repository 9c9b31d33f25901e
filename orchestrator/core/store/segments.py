"""What a store knows to be in cmx: segments of all its models, how much they take, and which goes first when that is too much.

Segments of one chain follow on each other, as far as that is known: one that was found at start is linked once its chain is used.

Rule 1: only what nothing known follows on and nobody pins is evicted, the one used longest ago first. So a suffix goes before its
prefix, without which it is of no use.
"""

from collections.abc import Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush

from orchestrator.core.types import BlockHash, ModelName

#: Stale entries of the eviction order that are put up with before it is cleaned.
STALE_MAX = 256


class Segment:
    """One segment in cmx."""

    __slots__ = ("children", "model", "name", "parent", "used")

    def __init__(self, model: ModelName, name: BlockHash) -> None:
        self.model = model
        self.name = name
        #: The one before it in its chain, if that is known.
        self.parent: Segment | None = None
        #: Known ones that follow on it.
        self.children = 0
        #: When it was used last, as a running number.
        self.used = 0


class Segments:
    """All segments of one store, in an order of eviction."""

    def __init__(self, sizes: Mapping[ModelName, int]) -> None:
        """Know of none yet; `sizes` are the bytes of each model's segments."""
        self.bytes = 0
        self._sizes = sizes
        self._known: dict[ModelName, dict[BlockHash, Segment]] = {model: {} for model in sizes}
        #: Those that may be evicted, the one used longest ago first: (when it was, a tie-break, the segment). Some are stale.
        self._order: list[tuple[int, int, Segment]] = []
        self._serial = 0
        #: How many want a segment to stay, whether it is known or not, by model.
        self._pins: dict[ModelName, dict[BlockHash, int]] = {model: {} for model in sizes}
        #: Names that came and went since `take_changes`, by model.
        self._stored: dict[ModelName, dict[BlockHash, None]] = {model: {} for model in sizes}
        self._removed: dict[ModelName, dict[BlockHash, None]] = {model: {} for model in sizes}

    def holds(self, model: ModelName, name: BlockHash) -> bool:
        """Tell whether a segment is known."""
        return name in self._known[model]

    def count(self, model: ModelName) -> int:
        """Return how many of a model are known."""
        return len(self._known[model])

    def names(self, model: ModelName) -> Iterator[BlockHash]:
        """Go through those of a model."""
        return iter(self._known[model])

    def add(self, model: ModelName, name: BlockHash, parent: BlockHash | None) -> None:
        """Know of a segment, which follows on another if that is known too; harmless if both were known."""
        known = self._known[model]
        segment = known.get(name)
        if segment is None:
            segment = known[name] = Segment(model, name)
            self.bytes += self._sizes[model]
            self._stored[model][name] = None
        self._link(segment, parent)
        self._use(segment)

    def use(self, model: ModelName, names: Sequence[BlockHash]) -> None:
        """Note that a chain is used: its segments, first one first, known or not.

        The last known one stands for all before it: these go after it, and take its place in the order then.
        """
        known = self._known[model]
        last: Segment | None = None
        for place in range(len(names) - 1, -1, -1):
            segment = known.get(names[place])
            if segment is None:
                continue
            if last is None:
                last = segment
                self._use(segment)
            before = known.get(names[place - 1]) if place else None
            if before is segment.parent:
                return
            self._link(segment, names[place - 1])

    def remove(self, model: ModelName, name: BlockHash) -> None:
        """Know of a segment no more. It is told of as removed even if it was not known: somebody else may believe in it."""
        segment = self._known[model].pop(name, None)
        self._stored[model].pop(name, None)
        self._removed[model][name] = None
        if segment is None:
            return
        self.bytes -= self._sizes[model]
        parent = segment.parent
        if parent is not None:
            parent.children -= 1
            parent.used = max(parent.used, segment.used)
            self._rank(parent)

    def discard(self, model: ModelName, names: Sequence[BlockHash]) -> list[BlockHash]:
        """Know of the end of a chain no more, as far as nothing else follows on it and nobody pins it; return what is gone.

        `names` are its segments, first one first.
        """
        gone: list[BlockHash] = []
        for name in reversed(names):
            segment = self._known[model].get(name)
            if segment is not None and not self._evictable(segment):
                break
            if segment is not None:
                self.remove(model, name)
                gone.append(name)
        return gone

    @property
    def full_of_pins(self) -> bool:
        """Whether nothing may be evicted."""
        return not any(self._fresh(entry) for entry in self._order)

    def pin(self, model: ModelName, name: BlockHash) -> None:
        """Keep a segment from eviction, from now on or from when it is known."""
        pins = self._pins[model]
        pins[name] = pins.get(name, 0) + 1

    def unpin(self, model: ModelName, name: BlockHash) -> None:
        """Take a pin back."""
        pins = self._pins[model]
        pins[name] -= 1
        if not pins[name]:
            del pins[name]
            segment = self._known[model].get(name)
            if segment is not None:
                self._rank(segment)

    def evict(self) -> Segment | None:
        """Know of the segment no more that is to go first, and return it; None if none may go."""
        while self._order:
            entry = heappop(self._order)
            if self._fresh(entry):
                segment = entry[2]
                self.remove(segment.model, segment.name)
                return segment
        return None

    def take_changes(self, model: ModelName) -> tuple[list[BlockHash], list[BlockHash]]:
        """Return what of a model came and what went since the last call."""
        stored, removed = self._stored[model], self._removed[model]
        if not stored and not removed:
            return [], []
        self._stored[model], self._removed[model] = {}, {}
        return list(stored), list(removed)

    def _link(self, segment: Segment, parent: BlockHash | None) -> None:
        before = self._known[segment.model].get(parent) if parent is not None else None
        if before is None or before is segment.parent:
            return
        if segment.parent is not None:
            segment.parent.children -= 1
        segment.parent = before
        before.children += 1

    def _use(self, segment: Segment) -> None:
        self._serial += 1
        segment.used = self._serial
        self._rank(segment)

    def _rank(self, segment: Segment) -> None:
        """Put a segment that may be evicted into the order."""
        self._serial += 1
        entry = (segment.used, self._serial, segment)
        if not self._fresh(entry):
            return
        heappush(self._order, entry)
        total = sum(map(len, self._known.values()))
        if len(self._order) > 2 * total + STALE_MAX:
            everything = [one for known in self._known.values() for one in known.values()]
            order = [(one.used, number, one) for number, one in enumerate(everything)]
            self._order = [entry for entry in order if self._fresh(entry)]
            heapify(self._order)

    def _fresh(self, entry: tuple[int, int, Segment]) -> bool:
        used, _, segment = entry
        known = self._known[segment.model].get(segment.name) is segment
        return known and used == segment.used and self._evictable(segment)

    def _evictable(self, segment: Segment) -> bool:
        return not segment.children and segment.name not in self._pins[segment.model]

    def validate(self) -> None:
        """Check every invariant; raises AssertionError with the numbers."""
        everything = [segment for known in self._known.values() for segment in known.values()]
        size = sum(self._sizes[segment.model] for segment in everything)
        assert size == self.bytes, f"segments of {size} bytes are known, {self.bytes} are counted"
        children: dict[int, int] = {}
        for segment in everything:
            if segment.parent is not None:
                children[id(segment.parent)] = children.get(id(segment.parent), 0) + 1
        ranked = {id(entry[2]) for entry in self._order if self._fresh(entry)}
        for segment in everything:
            found, there = segment.children, children.get(id(segment), 0)
            assert found == there, f"segment {segment.name!r} counts {found} that follow on it, there are {there}"
            assert not self._evictable(segment) or id(segment) in ranked, f"segment {segment.name!r} may go and is in no order"
