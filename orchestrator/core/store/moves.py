"""Transfers to and from cmx: how many bytes of them may be under way, how long each may take, when to try again."""

from collections.abc import Iterable

from orchestrator.core.commands import CancelMove, ClearTimer, ReadCmx, ServeSegment, SetTimer, StoreCommand, WriteCmx
from orchestrator.core.config import StoreConfig
from orchestrator.core.kvpool import Claim
from orchestrator.core.store.shelves import Move, Shelf
from orchestrator.core.timers import CmxTimer, MoveTimer
from orchestrator.core.types import BlockHash, BlockId, ExportId, MoveFailure, MoveId, SlotId

#: Seconds without a new try after storage did not answer or was full, doubled with every failure in a row.
PAUSE_S_MIN, PAUSE_S_MAX = 1.0, 60.0
#: Share of the bytes under way that may be for what no prompt waits for.
BACKGROUND_SHARE = 0.5


class Moves:
    """The transfers under way."""

    __slots__ = ("_bytes", "_config", "_orders", "_pause_s", "_serial", "paused", "running")

    def __init__(self, config: StoreConfig, orders: list[StoreCommand]) -> None:
        self._config = config
        self._orders = orders
        self.running: dict[MoveId, Move] = {}
        self._bytes = 0
        self._serial = 0
        #: Whether cmx is left alone for a while, and for how long.
        self.paused = False
        self._pause_s = 0.0

    def room(self, shelf: Shelf, background: bool) -> bool:
        """Tell whether another transfer may start; one always may when none runs."""
        share = BACKGROUND_SHARE if background else 1.0
        return not self.running or self._bytes + shelf.model.segment_bytes <= self._config.moves_bytes_max * share

    def read(self, shelf: Shelf, segment: BlockHash, parent: BlockHash | None, slots: list[BlockId], now: float) -> Move:
        """Start bringing a segment into slots."""
        move = self._start(shelf, segment, parent, now)
        move.slots = slots
        shelf.cmx.begin(now)
        self._orders.append(ReadCmx(move.id, shelf.model.model, segment, tuple(map(SlotId, slots))))
        return move

    def serve(
        self, shelf: Shelf, read: ExportId, segment: BlockHash, parent: BlockHash | None, number: int, tokens: int, now: float
    ) -> Move:
        """Let a node begin to read a segment by itself."""
        move = self._start(shelf, segment, parent, now)
        move.direct = True
        shelf.cmx.begin(now)
        self._orders.append(ServeSegment(read, segment, number, tokens))
        return move

    def write(
        self, shelf: Shelf, segment: BlockHash, parent: BlockHash | None, claim: Claim, blocks: list[BlockId], now: float
    ) -> Move:
        """Start writing a segment, which the claim keeps in the arena."""
        move = self._start(shelf, segment, parent, now)
        move.claim = claim
        self._orders.append(WriteCmx(move.id, shelf.model.model, segment, tuple(map(SlotId, blocks))))
        return move

    def _start(self, shelf: Shelf, segment: BlockHash, parent: BlockHash | None, now: float) -> Move:
        self._serial += 1
        move = Move(MoveId(self._serial), shelf, segment, parent)
        self.running[move.id] = move
        self._bytes += shelf.model.segment_bytes
        self._orders.append(SetTimer(MoveTimer(move.id), now + self._config.move_s_max))
        shelf.segments.pin(shelf.model.model, segment)
        return move

    def cancel(self, move: Move) -> None:
        """Give a transfer up that runs; one into a node's own memory counts no more, whatever the node still does there."""
        if move.cancelled:
            return
        if move.direct:
            self.end(move.id, MoveFailure.CANCELLED, move.shelf.pool.now)
            move.cancelled = True
            return
        move.cancelled = True
        self._orders.append(ClearTimer(MoveTimer(move.id)))
        self._orders.append(CancelMove(move.id))

    def end(self, identity: MoveId, failure: MoveFailure | None, now: float) -> Move:
        """Note that a transfer is over and return it."""
        move = self.running.pop(identity)
        shelf = move.shelf
        self._bytes -= shelf.model.segment_bytes
        shelf.segments.unpin(shelf.model.model, move.segment)
        if not move.cancelled:
            self._orders.append(ClearTimer(MoveTimer(identity)))
        if move.claim is None:
            shelf.cmx.end(now, shelf.model.segment_bytes if failure is None else 0)
        if failure is None:
            self._pause_s = 0.0
        return move

    def pause(self, now: float) -> None:
        """Leave cmx alone for a while, longer with every time in a row."""
        if not self.paused:
            self.paused = True
            self._pause_s = min(PAUSE_S_MAX, max(PAUSE_S_MIN, 2 * self._pause_s))
            self._orders.append(SetTimer(CmxTimer(), now + self._pause_s))

    def resume(self) -> None:
        """Try again."""
        self.paused = False

    @property
    def claims(self) -> Iterable[tuple[Shelf, Claim]]:
        """On what is being written."""
        return [(move.shelf, move.claim) for move in self.running.values() if move.claim is not None]

    def validate(self) -> None:
        """Check every invariant; raises AssertionError with the numbers."""
        size = sum(move.shelf.model.segment_bytes for move in self.running.values())
        assert size == self._bytes, f"{size} bytes are under way, {self._bytes} are counted"
        for move in self.running.values():
            assert not move.arrived, f"move {move.id} has arrived and still runs"
            assert move.cancelled or move.claim is not None or move.recalls, f"nobody waits for move {move.id}"
