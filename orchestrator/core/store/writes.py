"""Writes segments to cmx behind everything else, keeps what is there within its bound, and lets blocks leave the arena for it.

A segment is written once it is complete in the arena, and slowly while anything is to come from cmx. Of a chain the first one is
written first, so that what is there is of use. A segment that is evicted from the arena before its turn is not written.
"""

from collections.abc import Mapping, Sequence

from orchestrator.core.commands import DeleteCmx, StoreCommand
from orchestrator.core.config import StoreConfig
from orchestrator.core.kvpool import Claim
from orchestrator.core.store.moves import Moves
from orchestrator.core.store.segments import Segments
from orchestrator.core.store.shelves import Move, Shelf
from orchestrator.core.types import BlockHash, ModelName, MoveFailure

#: Demotions that wait for segments to be written, of a store; those beyond leave what they are about where it is.
DEMOTIONS_MAX = 256


class Demotion:
    """Blocks that are to leave the arena once they are in cmx."""

    __slots__ = ("end", "first", "hashes", "shelf", "waits")

    def __init__(self, shelf: Shelf, hashes: Sequence[BlockHash], first: int, end: int, waits: dict[BlockHash, None]) -> None:
        self.shelf = shelf
        self.hashes = hashes
        self.first = first
        self.end = end
        #: Segments that are not in cmx yet.
        self.waits = waits


class Writes:
    """What is to be written to cmx, and what is to leave."""

    __slots__ = ("_config", "_demotions", "_moves", "_orders", "_segments", "_shelves", "_writing")

    def __init__(
        self,
        shelves: Mapping[ModelName, Shelf],
        segments: Segments,
        config: StoreConfig,
        moves: Moves,
        orders: list[StoreCommand],
    ) -> None:
        self._shelves = shelves
        self._segments = segments
        self._config = config
        self._moves = moves
        self._orders = orders
        #: Bytes that are being written and not yet counted as being in cmx.
        self._writing = 0
        self._demotions: list[Demotion] = []

    def proceed(self, busy: bool, now: float) -> None:
        """Start as many writes as may be under way, the models in turn; one at a time while something is to come from cmx."""
        self._trim(self._config.cmx_bytes)
        for shelf in self._shelves.values():
            if len(shelf.unwritten) > 2 * shelf.model.slots // shelf.model.segment_blocks + 1:
                self._clean(shelf)
        shelves = [shelf for shelf in self._shelves.values() if shelf.unwritten]
        while shelves and not self._moves.paused:
            for shelf in list(shelves):
                if (busy and self._writing) or not self._moves.room(shelf, background=True):
                    return
                if not shelf.unwritten or not self._write_next(shelf, now):
                    shelves.remove(shelf)

    def _write_next(self, shelf: Shelf, now: float) -> bool:
        """Start the next write of a model; False if nothing is left to write."""
        size = shelf.model.segment_blocks
        while shelf.unwritten:
            name, depth = next(iter(shelf.unwritten.items()))
            del shelf.unwritten[name]
            if name in shelf.leaving:
                continue
            claim = None if self._segments.holds(shelf.model.model, name) else shelf.pool.keep(name, depth)
            if claim is None:
                self._settle(shelf, name)
                continue
            names, blocks = shelf.pool.tail(claim, min(claim.depth, size + 1))
            parent = names[0] if len(names) > size else None
            orphan = parent is not None and not self._comes(shelf, parent)
            if not orphan and self._make_room(shelf, 1, parent):
                self._writing += shelf.model.segment_bytes
                shelf.leaving[name] = self._moves.write(shelf, name, parent, claim, blocks[-size:], now)
                return True
            put_first = orphan and self._put_first(shelf, claim)
            shelf.pool.release(claim)
            if not put_first:
                shelf.fail("cmx full")
                self._settle(shelf, name)
        return False

    def _clean(self, shelf: Shelf) -> None:
        """Give up what has left the arena before it was written."""
        for name in [name for name in shelf.unwritten if not shelf.pool.holds(name)]:
            del shelf.unwritten[name]
            if name not in shelf.leaving:
                self._settle(shelf, name)

    def _put_first(self, shelf: Shelf, claim: Claim) -> bool:
        """Let all segments of a chain that are not in cmx be written next, in order; False if they do not fit.

        One is of no use without those before it, which were evicted from cmx or could not be written.
        """
        names = shelf.whole(shelf.pool.tail(claim, claim.depth)[0], claim.depth)
        there = next(place for place, name in enumerate(names) if not self._comes(shelf, name))
        if not self._make_room(shelf, len(names) - there, names[there - 1] if there else None):
            return False
        size = shelf.model.segment_blocks
        missing = {name: (place + 1) * size for place, name in enumerate(names[there:], there)}
        shelf.unwritten = {**missing, **shelf.unwritten}
        return True

    def _comes(self, shelf: Shelf, name: BlockHash) -> bool:
        """Tell whether a segment is in cmx or on its way there."""
        return self._segments.holds(shelf.model.model, name) or name in shelf.leaving

    def _make_room(self, shelf: Shelf, count: int, parent: BlockHash | None) -> bool:
        """Evict from cmx until so many segments more fit, but not what they follow on; False if they never will."""
        if parent is not None:
            self._segments.pin(shelf.model.model, parent)
        fits = self._trim(self._config.cmx_bytes - count * shelf.model.segment_bytes)
        if parent is not None:
            self._segments.unpin(shelf.model.model, parent)
        return fits

    def _trim(self, most: int) -> bool:
        """Evict from cmx until it has so many bytes at most; False if too much is pinned."""
        while most >= 0 and self._segments.bytes + self._writing > most:
            gone = self._segments.evict()
            if gone is None:
                return False
            shelf = self._shelves[gone.model]
            shelf.count("cmx_evicted", shelf.model.segment_blocks)
            self._orders.append(DeleteCmx(gone.model, (gone.name,)))
        return most >= 0

    def found(self, shelf: Shelf, segments: Sequence[BlockHash]) -> None:
        """Know of segments that were in cmx at start."""
        for name in segments:
            self._segments.add(shelf.model.model, name, None)

    def written(self, move: Move, failure: MoveFailure | None, now: float) -> None:
        """Know that a segment is in cmx, or try again later."""
        shelf, claim = move.shelf, move.claim
        assert claim is not None, f"move {move.id} writes nothing"
        depth = claim.depth
        shelf.pool.release(claim)
        del shelf.leaving[move.segment]
        self._writing -= shelf.model.segment_bytes
        if failure is None:
            shelf.count("written", shelf.model.segment_blocks)
            self._segments.add(shelf.model.model, move.segment, move.parent)
            self._settle(shelf, move.segment)
            return
        if not move.cancelled:
            shelf.fail(failure.value)
        shelf.unwritten[move.segment] = depth
        self._moves.pause(now)

    def evict(self, shelf: Shelf, hashes: Sequence[BlockHash], first: int, end: int) -> None:
        """Delete a chain's whole segments in a range from cmx, as far as nobody wants them to stay."""
        size, model = shelf.model.segment_blocks, shelf.model.model
        gone = self._segments.discard(model, shelf.whole(hashes, end)[-(-first // size) :])
        if gone:
            self._orders.append(DeleteCmx(model, tuple(gone)))
            shelf.count("cmx_evicted", len(gone) * size)

    def demote(self, shelf: Shelf, hashes: Sequence[BlockHash], first: int, end: int) -> None:
        """Let blocks leave the arena once their whole segments are in cmx; what is in no whole one just leaves."""
        held = shelf.pool.match(hashes, end)
        names = shelf.whole(hashes, held)[first // shelf.model.segment_blocks :]
        waits: dict[BlockHash, None] = {name: None for name in names if self._to_come(shelf, name)}
        if waits and len(self._demotions) >= DEMOTIONS_MAX:
            shelf.fail("too many demotions")
            return
        demotion = Demotion(shelf, hashes, first, end, waits)
        if waits:
            self._demotions.append(demotion)
        else:
            shelf.pool.drop(hashes, first, end)

    def _to_come(self, shelf: Shelf, name: BlockHash) -> bool:
        return name in shelf.unwritten or name in shelf.leaving

    def _settle(self, shelf: Shelf, segment: BlockHash) -> None:
        """Carry out demotions that waited for nothing but this segment, which will not be written any more."""
        for demotion in [one for one in self._demotions if one.shelf is shelf and segment in one.waits]:
            del demotion.waits[segment]
            if not demotion.waits:
                self._demotions.remove(demotion)
                shelf.pool.drop(demotion.hashes, demotion.first, demotion.end)

    def validate(self) -> None:
        """Check every invariant; raises AssertionError with the numbers."""
        writing = [move for move in self._moves.running.values() if move.claim is not None]
        size = sum(move.shelf.model.segment_bytes for move in writing)
        assert size == self._writing, f"{size} bytes are being written, {self._writing} are counted"
        total, most = self._segments.bytes + size, self._config.cmx_bytes
        assert total <= most or self._segments.full_of_pins, f"{total} bytes are in cmx, at most {most} may be"
        for demotion in self._demotions:
            for name in demotion.waits:
                assert self._to_come(demotion.shelf, name), f"a demotion waits for {name!r}, which nobody will write"
