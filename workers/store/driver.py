"""Drives one host's store in real time: one core, the memory that nodes map, `cmx` behind it, and gateways that listen.

Everything runs on one event loop but moves to and from `cmx` (`moves.py`); copies between the memory and engines' pools are made
by the nodes (`workers/tiers.py`). Events go into the core, its commands are executed at once; a command's outcome always comes
back as a later event, so the core is never entered twice.

A node that is lost may still be copying: it hung, and wakes up later. So the core hears that it is gone only once nothing of the
call can be touched any more: nothing was granted or served that is not answered, the node has said so by a goodbye or by a new
hello, or its process is gone.
"""

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, assert_never

from orchestrator.core.commands import (
    CancelMove,
    ClearTimer,
    DeleteCmx,
    Grant,
    PublishHoldings,
    ReadCmx,
    ServeSegment,
    ServeSlots,
    SetTimer,
    StoreCommand,
    WriteCmx,
)
from orchestrator.core.config import GATEWAYS_MAX, StoreConfig
from orchestrator.core.events import (
    LeasePlaced,
    NodeAttached,
    NodeDetached,
    Offered,
    OfferWritten,
    ReadClosed,
    ResyncRequested,
    SegmentRead,
    SlotsRead,
    StoreEvent,
)
from orchestrator.core.store.store import Store
from orchestrator.core.timers import StoreTimer
from orchestrator.core.types import (
    ExportId,
    GatewayId,
    ModelName,
    MoveFailure,
    NodeId,
    OfferId,
    SlotId,
    StoredModel,
    StoreLoad,
    StoreSpec,
)
from orchestrator.wire import codec, store_codec, store_pb2
from orchestrator.wire.clock import Timers
from orchestrator.wire.journal import StoreJournalWriter, recorded
from orchestrator.wire.trust import Refused
from workers.memory import host_id
from workers.store.arena import Arena
from workers.store.cmx import FAILURES, Cmx, CmxFailed, Damage
from workers.store.listeners import Listener
from workers.store.moves import Carried, Moves

#: Seconds between two lines in the log about calls that were refused.
REFUSAL_LOG_S = 1.0
#: Nodes that may be attached at once, and offers and reads of one of them under way.
NODES_MAX, CALLS_MAX = 1024, 1 << 16
log = logging.getLogger("weft.store")


class Unlike(Exception):
    """A node's blocks are others than those that this store keeps."""


class Stream(Protocol):
    """The store's end of a call."""

    async def read(self) -> object: ...

    async def write(self, message: object) -> None: ...


@dataclass(frozen=True, slots=True)
class Kept:
    """What a model's blocks are, which a node's must equal."""

    model: StoredModel
    fingerprint: str
    layout: str


@dataclass(slots=True)
class _Read:
    """A node's read, and what was served of it and is not known to be done with: slots, or numbers of segments."""

    attached: "_Attached"
    number: int
    served: deque[tuple[SlotId, ...] | int] = field(default_factory=deque["tuple[SlotId, ...] | int"])
    #: True while the core hears of it.
    opening: bool = True

    @property
    def touched(self) -> bool:
        """Whether the node may be copying out of the memory for it."""
        return any(not isinstance(one, int) for one in self.served)


@dataclass(slots=True)
class _Grant:
    """A node's offer, and how many of its blocks were granted."""

    attached: "_Attached"
    number: int
    blocks: int = 0


class _Attached:
    """A node's call, and what it asked for, by its own numbers."""

    def __init__(self, node: NodeId, model: StoredModel, process: int) -> None:
        self.node = node
        self.model = model
        #: Ends with the node's process.
        self.process = process
        self.offers: dict[int, OfferId] = {}
        self.reads: dict[int, ExportId] = {}
        self.frame = store_pb2.ArenaFrame()
        self.said = asyncio.Event()
        self.serving = asyncio.current_task()
        #: True once the call is over.
        self.over = False

    def close(self) -> None:
        """Forget the process."""
        os.close(self.process)


class StoreDriver:
    """One store.

    Args:
        spec: what the store tells gateways of itself.
        config: the core's settings.
        kept: what the blocks of each of its models are.
        arena: the host's memory, parted as the spec says.
        cmx: where the segments of those models are that go there.
        fatal: told of an error that leaves the store in an unknown state; the process should end.
        load_s: seconds between two loads that a gateway is told of.
        journal: takes down every event and what came of it; closed by `close`.

    Made on a running loop.
    """

    def __init__(
        self,
        spec: StoreSpec,
        config: StoreConfig,
        kept: Mapping[ModelName, Kept],
        arena: Arena,
        cmx: Mapping[ModelName, Cmx],
        fatal: Callable[[BaseException], None],
        load_s: float = 0.5,
        journal: StoreJournalWriter | None = None,
    ) -> None:
        self.spec = spec
        self._host = host_id()
        self._kept = kept
        self._core = Store(spec, config)
        self._arena = arena
        #: Of models whose segments are in a folder: where that is.
        self._folders = {model: place for model, one in cmx.items() if (place := one.place()) is not None}
        self._fatal = fatal
        self._journal = journal
        self._load_s = load_s
        self._loop = asyncio.get_running_loop()
        self._timers: Timers[StoreTimer] = Timers(self.handle)
        self._moves = Moves(arena, cmx, self.handle, self._on_carried)
        self._attached: dict[NodeId, _Attached] = {}
        #: Of nodes whose call is over, what may still be touched.
        self._offers: dict[OfferId, _Grant] = {}
        self._reads: dict[ExportId, _Read] = {}
        self._serial = 0
        self._listeners: dict[GatewayId, Listener] = {}
        self._closed = False
        self._load_timer: asyncio.TimerHandle | None = None
        self.refused_calls = 0
        self._refusal_told_s = 0.0
        self._moves.find()

    # --- the core -----------------------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Seconds on the store's clock."""
        return self._timers.now

    def handle(self, event: StoreEvent) -> None:
        """Take an event to the core and execute what it orders."""
        if self._closed:
            return
        try:
            for command in recorded(self._journal, self._core.handle, event, self.now):
                self._execute(command)
        except Exception as error:  # A core or driver that broke its own rules cannot go on: better no store than a wrong one.
            if self._journal is not None:
                self._journal.close()
            self._fatal(error)
            raise

    def _execute(self, command: StoreCommand) -> None:
        match command:
            case Grant():
                self._grant(command)
            case ServeSlots():
                self._serve(command)
            case ServeSegment():
                self._serve_segment(command)
            case ReadCmx():
                self._moves.read(command)
            case WriteCmx():
                self._moves.write(command)
            case CancelMove(move):
                self._moves.cancel(move)
            case DeleteCmx():
                self._moves.delete(command)
            case PublishHoldings(model, batches, gateway):
                found = self._listeners.get(gateway) if gateway is not None else None
                listeners = tuple(self._listeners.values()) if gateway is None else (found,) if found is not None else ()
                for listener in listeners:
                    listener.add_holdings([store_codec.holdings_message(model, batch) for batch in batches])
            case SetTimer(key, at):
                self._timers.set(key, at)
            case ClearTimer(key):
                self._timers.clear(key)
            case _:
                assert_never(command)

    def _grant(self, command: Grant) -> None:
        grant = self._offers[command.offer]
        attached = grant.attached
        grant.blocks = len(command.slots)
        if not command.slots:
            del self._offers[command.offer], attached.offers[grant.number]
        attached.frame.grants.add(offer=grant.number, first=command.first, slots=command.slots, orphan=command.orphan)
        attached.said.set()

    def _serve(self, command: ServeSlots) -> None:
        read = self._reads.get(command.read)
        if read is None or read.attached.over:
            return
        read.served.append(command.slots)
        read.attached.frame.slots.add(
            read=read.number,
            slots=command.slots,
            tokens=command.tokens,
            final=command.final,
            # What is there is served at once; what comes later had to be brought.
            cmx_blocks=0 if read.opening else len(command.slots),
        )
        read.attached.said.set()

    def _serve_segment(self, command: ServeSegment) -> None:
        read = self._reads.get(command.read)
        if read is None or read.attached.over:
            return
        read.served.append(command.number)
        read.attached.frame.slots.add(read=read.number, tokens=command.tokens, segment=command.number)
        read.attached.said.set()

    def _on_carried(self, carried: Carried) -> None:
        for listener in self._listeners.values():
            listener.add_move(carried)

    @property
    def nodes(self) -> set[NodeId]:
        """The nodes that are attached, or may still touch what they were given."""
        return set(self._attached)

    def load(self, model: ModelName) -> StoreLoad:
        """Return the store's state for one model now."""
        return self._core.load(model)

    # --- nodes --------------------------------------------------------------------------------------------------------

    async def serve_node(self, stream: Stream) -> None:
        """Serve one Attach call. Raises `MalformedMessage` or `Unlike`, which end this call alone."""
        first = await stream.read()
        if not isinstance(first, store_pb2.AttachFrame) or not first.HasField("hello"):
            raise codec.MalformedMessage("a stream must begin with NodeHello")
        attached = self._attach(first.hello)
        writer: asyncio.Task[None] | None = None
        clean = False
        try:
            await stream.write(store_pb2.ArenaFrame(arena=self._placed(attached.model.model)))
            writer = asyncio.ensure_future(self._write_frames(attached, stream))
            # A stream that ends says nothing: that of a node that hangs does so too.
            while not clean and isinstance(frame := await stream.read(), store_pb2.AttachFrame):
                self._on_frame(attached, frame)
                clean = frame.goodbye
        finally:
            # First of all: gRPC may break off whatever is awaited in here.
            self._call_over(attached, clean)
            if writer is not None:
                writer.cancel()
                await asyncio.wait((writer,))

    def _attach(self, hello: store_pb2.NodeHello) -> _Attached:
        kept = self._kept.get(ModelName(hello.model))
        if kept is None:
            raise Unlike(f"there is no model {hello.model[: codec.NAME_CHARS_MAX]!r} here")
        ours = (kept.fingerprint, kept.layout, kept.model.block_tokens, kept.model.block_bytes, self._host)
        theirs = (hello.fingerprint, hello.layout, hello.block_tokens, hello.block_bytes, hello.host)
        if ours != theirs:
            raise Unlike(f"blocks of {hello.model} are {ours} here, and {theirs} on node {hello.node[: codec.NAME_CHARS_MAX]}")
        if not hello.node or len(hello.node) > codec.NAME_CHARS_MAX or len(self._attached) >= NODES_MAX:
            raise codec.MalformedMessage(f"a node's name has {len(hello.node)} characters, or {NODES_MAX} are attached")
        try:
            process = os.pidfd_open(hello.process)
        except (OSError, OverflowError) as error:
            raise codec.MalformedMessage(f"there is no process {hello.process}: {error}") from None
        node = NodeId(hello.node)
        former = self._attached.get(node)
        if former is not None:  # whoever says hello touches nothing of what it was granted before
            if former.serving is not None and not former.over:
                former.serving.cancel()
            self._gone(former)
        attached = self._attached[node] = _Attached(node, kept.model, process)
        self.handle(NodeAttached(node, kept.model.model))
        log.info("node %s is attached", node)
        return attached

    def _placed(self, model: ModelName) -> store_pb2.Arena:
        """Return where a model's slots lie, and its folder if it has one."""
        placed = self._arena.place(model)
        if model in self._folders:
            placed.folder.CopyFrom(self._folders[model])
        return placed

    async def _write_frames(self, attached: _Attached, stream: Stream) -> None:
        while True:
            await attached.said.wait()
            attached.said.clear()
            frame, attached.frame = attached.frame, store_pb2.ArenaFrame()
            await stream.write(frame)

    def _on_frame(self, attached: _Attached, frame: store_pb2.AttachFrame) -> None:
        if self._attached.get(attached.node) is not attached:
            return  # a later call of the same node has begun
        for written in frame.written:
            self._on_written(attached, written)
        for copied in frame.copied:
            self._on_copied(attached, copied)
        for number in frame.closed:
            self._on_closed(attached, number)
        for offer in frame.offers:
            self._on_offer(attached, offer)
        for read in frame.reads:
            self._on_read(attached, read)

    def _on_offer(self, attached: _Attached, message: store_pb2.Offer) -> None:
        parent, hashes = store_codec.offer_from(message)
        self._check_fresh(message.offer, attached.offers)
        offer = OfferId(self._number())
        attached.offers[message.offer] = offer
        self._offers[offer] = _Grant(attached, message.offer)
        self.handle(Offered(offer, attached.node, attached.model.model, parent, hashes))

    def _on_written(self, attached: _Attached, message: store_pb2.Written) -> None:
        offer = attached.offers.pop(message.offer, None)
        if offer is None:
            raise codec.MalformedMessage(f"offer {message.offer} is not under way")
        blocks = self._offers.pop(offer).blocks
        if message.blocks > blocks:
            raise codec.MalformedMessage(f"{message.blocks} blocks of an offer were written, {blocks} were granted")
        self.handle(OfferWritten(offer, message.blocks))

    def _on_read(self, attached: _Attached, message: store_pb2.Read) -> None:
        self._check_fresh(message.read, attached.reads)
        read = ExportId(self._number())
        event = store_codec.read_from(message, read, attached.node, attached.model, attached.model.model in self._folders)
        attached.reads[message.read] = read
        opened = self._reads[read] = _Read(attached, message.read)
        self.handle(event)
        opened.opening = False

    def _on_copied(self, attached: _Attached, message: store_pb2.Copied) -> None:
        read = attached.reads.get(message.read)
        if read is None:
            return  # closed meanwhile
        served = self._reads[read].served
        if message.answers > len(served):
            raise codec.MalformedMessage(f"{message.answers} answers to a read were copied, {len(served)} were given")
        failed = self._failure(attached, message, served) if message.failure else None
        for left in range(message.answers, 0, -1):
            one = served.popleft()
            if isinstance(one, int):
                self.handle(SegmentRead(read, one, failed if left == 1 else None))
            else:
                self.handle(SlotsRead(read, one))

    def _failure(self, attached: _Attached, message: store_pb2.Copied, served: deque[tuple[SlotId, ...] | int]) -> MoveFailure:
        """Return why the last answer of these failed, and count it."""
        reason = next((one for one in Damage if one == message.failure), None)
        number = served[message.answers - 1] if message.answers else None
        if reason is None or not isinstance(number, int):
            raise codec.MalformedMessage(f"{message.failure[: codec.NAME_CHARS_MAX]!r} is why no segment failed")
        self._moves.count(CmxFailed(reason, f"node {attached.node} reads segment {number} of a prompt"))
        return FAILURES[reason]

    def _on_closed(self, attached: _Attached, number: int) -> None:
        read = attached.reads.pop(number, None)
        if read is not None:
            del self._reads[read]
            self.handle(ReadClosed(read))

    def _check_fresh(self, number: int, known: Mapping[int, object]) -> None:
        if number in known or len(known) >= CALLS_MAX:
            raise codec.MalformedMessage(f"{number} is under way already, or {CALLS_MAX} others are")

    def _number(self) -> int:
        self._serial += 1
        return self._serial

    def _call_over(self, attached: _Attached, clean: bool) -> None:
        """Go on without a node's call: at once, or when nothing that it was given can be touched any more."""
        attached.over = True
        if self._attached.get(attached.node) is not attached:
            return
        for number, read in tuple(attached.reads.items()):
            if clean or not self._reads[read].touched:
                self._on_closed(attached, number)
        if clean or not (attached.reads or attached.offers):
            self._gone(attached)
            return
        log.warning("node %s is lost with %d copies under way", attached.node, len(attached.reads) + len(attached.offers))
        self._loop.add_reader(attached.process, self._gone, attached)

    def _gone(self, attached: _Attached) -> None:
        """Tell the core that a node is gone: nothing of it goes on."""
        if self._attached.get(attached.node) is not attached:
            return
        del self._attached[attached.node]
        for offer in attached.offers.values():
            del self._offers[offer]
        for read in attached.reads.values():
            del self._reads[read]
        self._loop.remove_reader(attached.process)
        attached.close()
        self.handle(NodeDetached(attached.node))

    # --- gateways -----------------------------------------------------------------------------------------------------

    async def serve_gateway(self, stream: Stream) -> None:
        """Serve one Connect call. Raises `MalformedMessage`, which ends this call alone."""
        first = await stream.read()
        if not isinstance(first, store_pb2.ToStore) or not first.HasField("hello"):
            raise codec.MalformedMessage("a stream must begin with GatewayHello")
        gateway = GatewayId(first.hello.gateway)
        if gateway >= GATEWAYS_MAX:
            raise codec.MalformedMessage(f"gateway {gateway} is beyond the {GATEWAYS_MAX} that there may be")
        former = self._listeners.get(gateway)
        if former is not None:
            former.end()
        listener = self._listeners[gateway] = Listener(gateway)
        writer: asyncio.Task[None] | None = None
        try:
            leases = map(codec.lease_message, self._core.leases(self.now))
            await stream.write(
                store_pb2.FromStore(welcome=store_codec.welcome_message(self.spec), loads=self._loads(), leases=leases)
            )
            if self._load_timer is None:
                self._load_timer = self._loop.call_later(self._load_s, self._send_loads)
            writer = asyncio.ensure_future(listener.write_all(stream))
            while isinstance(frame := await stream.read(), store_pb2.ToStore):
                listener.frames_read = max(listener.frames_read, min(frame.frames_received, listener.frames_sent))
                listener.wake()
                self._on_gateway_frame(gateway, frame)
        finally:
            # First of all: gRPC may break off whatever is awaited in here.
            if self._listeners.get(gateway) is listener:
                del self._listeners[gateway]
            if writer is not None:
                writer.cancel()
                await asyncio.wait((writer,))

    def _on_gateway_frame(self, gateway: GatewayId, frame: store_pb2.ToStore) -> None:
        for resync in frame.resyncs:
            after = resync.after if resync.HasField("after") else None
            self.handle(ResyncRequested(gateway, after, self._model(resync.model)))
        for message in frame.leases:
            lease = codec.lease_from(message)
            self._model(lease.model)
            self.handle(LeasePlaced(lease))
        for end in frame.ended_leases:
            self.handle(codec.ended_lease_from(end))
        for asked in (*map(store_codec.prefetch_from, frame.prefetches), *map(store_codec.evict_from, frame.evictions)):
            self._model(asked.model)
            self.handle(asked)

    def _model(self, name: str) -> ModelName:
        if name not in self._kept:
            raise codec.MalformedMessage(f"there is no model {name[: codec.NAME_CHARS_MAX]!r} here")
        return ModelName(name)

    def _loads(self) -> list[store_pb2.ModelLoad]:
        return [store_codec.load_message(one.model, self._core.load(one.model)) for one in self.spec.models]

    def _send_loads(self) -> None:
        """Tell gateways the load, which is also a sign of life."""
        self._load_timer = self._loop.call_later(self._load_s, self._send_loads) if self._listeners else None
        loads = self._loads()
        for listener in self._listeners.values():
            listener.set_loads(loads, self.refused_calls)

    def refuse(self, reason: Refused, problem: str, peer: str) -> None:
        """Count a call that was not served; gateways hear of it with the next load."""
        self.refused_calls += 1
        if self._loop.time() - self._refusal_told_s >= REFUSAL_LOG_S:
            self._refusal_told_s = self._loop.time()
            log.warning("store %s refused a call of %s (%s): %s", self.spec.id, peer, reason, problem)

    # --- the end ------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Stop at once; what is in the memory is lost."""
        self._closed = True
        self._timers.close()
        if self._load_timer is not None:
            self._load_timer.cancel()
        for attached in tuple(self._attached.values()):
            if attached.serving is not None:
                attached.serving.cancel()
            self._gone(attached)
        for listener in self._listeners.values():
            listener.end()
        await self._moves.close()
        if self._journal is not None:
            await self._loop.run_in_executor(None, self._journal.close)
