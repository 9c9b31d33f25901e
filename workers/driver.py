"""Drives one node in real time: one core, one engine, the gateways that use it and the peers it trades blocks with.

Everything runs on one event loop but the engine's steps and large copies. Events go into the core, its commands are executed at
once; a command's outcome always comes back as a later event, so the core is never entered twice. Token payloads stay here: the
core is told how many tokens came and which blocks they completed.
"""

import asyncio
import logging
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, assert_never

import numpy as np

from orchestrator.core.blocks import HASH_BYTES, extend_hashes
from orchestrator.core.commands import (
    ClearTimer,
    DropGateway,
    Fetch,
    Forget,
    LoadBlocks,
    NodeCommand,
    Offer,
    PublishKv,
    ReportEnded,
    ReportFirstToken,
    ReportPrefetchEnded,
    RunStep,
    SendBlocks,
    SetTimer,
    StopFetch,
    StopOffer,
    TellLeases,
)
from orchestrator.core.config import GATEWAYS_MAX, SchedulerConfig
from orchestrator.core.events import (
    Assigned,
    BlocksWanted,
    Cancelled,
    DrainRequested,
    Ended,
    Expected,
    GatewayHeard,
    GatewayLost,
    LeasePlaced,
    NodeEvent,
    PrefetchCancelled,
    ResyncRequested,
    SliceResult,
    SourceLost,
    StepFailed,
    StepFinished,
)
from orchestrator.core.experts import ExpertBalance
from orchestrator.core.node.node import Node
from orchestrator.core.silence import HEARTBEATS
from orchestrator.core.timers import NodeTimer
from orchestrator.core.types import (
    Assignment,
    BlockHash,
    FinishReason,
    GatewayId,
    KvBatch,
    Load,
    NodeId,
    NodeSpec,
    PrefetchId,
    RequestId,
    Sampling,
    Tier,
    gateway_of,
    is_prefetch,
    request_of,
)
from orchestrator.wire import codec, node_pb2
from orchestrator.wire.clock import Timers
from orchestrator.wire.journal import NodeJournalWriter, recorded
from orchestrator.wire.logs import REQUEST
from orchestrator.wire.trust import Refused
from workers.beginnings import Beginnings
from workers.engines.base import Engine, EngineDescription, PromptScores, SliceOutput, broken_promise
from workers.memory import Copier, PeerMemory, TransferFailed, TransferLimits
from workers.outbox import SCORES_MAX, Outbox
from workers.runner import open_runner
from workers.tiers import Moved, StorePlace, Tiers
from workers.transfer import Channels, Exports, Fetches, Stream, WholeWrites
from workers.transports import Transport

#: Seconds between two lines in the log about calls that were refused.
REFUSAL_LOG_S = 1.0
#: Tokens of which the highest is found sooner without numpy, which takes its time to begin.
FEW_TOKENS = 512
_TOKEN = np.dtype(np.uint32)
log = logging.getLogger("weft.node")


@dataclass(frozen=True, slots=True)
class DriverLimits:
    """Bounds of a node's dealings with gateways."""

    #: Seconds a gateway may be away before its requests are dropped.
    gateway_lost_s: float = 3.0
    #: Tokens and block hashes that may wait for a gateway which does not read.
    unsent_max: int = 1_000_000
    #: Seconds after which a gateway that gets no tokens hears of a changed load.
    load_s: float = 0.1
    #: Seconds between two frames to one gateway at least, unless one has a first token or an end: shorter steps share one.
    frame_s_min: float = 0.001
    transfer: TransferLimits = field(default_factory=TransferLimits)


class GatewayStream(Protocol):
    """The node's end of a Connect call."""

    async def read(self) -> object: ...

    async def write(self, message: node_pb2.NodeFrame) -> None: ...


@dataclass(slots=True)
class _Sequence:
    """What the driver keeps of a request."""

    name: str

    outbox: Outbox
    #: Hash of the last full block, or the root; the next block's parent.
    hash: BlockHash
    #: Tokens after that block, the newest one (which has no KV yet) included.
    tail: "array[int]"
    #: The result of a step that brought one token and nothing else: nearly all of them.
    one_token: SliceResult
    source_address: str
    source_host: str


class NodeDriver:
    """One node.

    Args:
        spec: what the node tells gateways of itself.
        scheduler: the core's settings.
        engine: closed by `close`.
        transports: ways of moving blocks, by name.
        choose: names of transports to offer a source on the given host, best first.
        channels, peers: connections and memory maps, shared by the nodes of a process.
        fatal: told of an error that leaves the node in an unknown state; the process should end.
        journal: takes down every event and what came of it; closed by `close`.
        copier: makes the copies to and from this host's store; None if the host is to have none.

    Made on a running loop.
    """

    def __init__(
        self,
        spec: NodeSpec,
        scheduler: SchedulerConfig,
        engine: Engine,
        transports: dict[str, Transport],
        choose: Callable[[str], list[str]],
        channels: Channels,
        peers: PeerMemory,
        fatal: Callable[[BaseException], None],
        limits: DriverLimits,
        journal: NodeJournalWriter | None = None,
        copier: Copier | None = None,
    ) -> None:
        self.spec = spec
        self._journal = journal
        self._core = Node(spec, scheduler)
        self._engine = engine
        #: How evenly the experts of this node's group are spread, if it speaks for that.
        self.experts: ExpertBalance | None = None
        self._description = engine.description
        self._runner = open_runner(engine, self._on_step_finished, self._on_step_failed, fatal)
        size = self._description.block_bytes
        tokens = spec.block_tokens
        self._exports = Exports(transports, size, tokens, self.handle, limits.transfer)
        self._fetches = Fetches(transports, choose, size, tokens, channels, peers, self.handle, self._moved)
        trust = channels.trust
        paced = None if self._description.computes else spec.profile
        self._tiers = (
            Tiers(spec, engine, paced, copier, trust, limits.transfer, self.handle, self._copied) if copier is not None else None
        )
        self._fatal = fatal
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._timers: Timers[NodeTimer] = Timers(self.handle)
        self._outboxes: dict[GatewayId, Outbox] = {}
        self._sequences: dict[RequestId, _Sequence] = {}
        #: Address and host of the sources of prefetches, as many as the core has taken on.
        self._prefetched_from: dict[RequestId, tuple[str, str]] = {}
        self._beginnings = Beginnings()
        self._draining = False
        self._closed = False
        self._idle = asyncio.Event()
        self._load_timer: asyncio.TimerHandle | None = None
        self._refused_calls = 0
        #: When the log was last told of one: whoever knocks all the time must not fill it.
        self._refusal_told_s = 0.0

    # --- the core -----------------------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Seconds on the node's clock."""
        return self._timers.now

    def handle(self, event: NodeEvent) -> None:
        """Take an event to the core, execute what it orders and see that gateways hear of it."""
        if not self._closed:
            self._take(event)
            self._flush()

    def _take(self, event: NodeEvent) -> None:
        """Take an event to the core and execute what it orders; gateways hear of it with the next flush."""
        try:
            for command in recorded(self._journal, self._core.handle, event, self._timers.now):
                self._execute(command)
        except Exception as error:  # A core or driver that broke its own rules cannot go on: better a dead node than a wrong one.
            if self._journal is not None:
                self._journal.close()
            self._fatal(error)
            raise

    def _execute(self, command: NodeCommand) -> None:
        match command:
            case RunStep():
                self._beginnings.stepped(command)
                self._runner.run(command)
            case ReportFirstToken(report):
                outbox = self._outboxes.get(gateway_of(report.request))
                if outbox is not None:
                    outbox.add_first_token(codec.first_token_message(report, self._beginnings.told(report.request)))
            case ReportEnded(report):
                if log.isEnabledFor(logging.DEBUG):
                    self._log_end(report)
                self._report_ended(report)
                self._sequences.pop(report.request, None)
            case Forget(request):  # always followed by its end, which still needs to know its name
                if request in self._sequences:
                    self._runner.forget(request)
            case PublishKv(batches, gateway):
                self._publish(batches, gateway)
            case ReportPrefetchEnded(report):
                self._prefetched_from.pop(report.prefetch, None)
                outbox = self._outboxes.get(gateway_of(report.prefetch))
                if outbox is not None:
                    outbox.add_prefetch_ended(codec.prefetch_ended_message(report))
            case TellLeases():
                self._tell_leases(command)
            case Fetch():
                self._fetches.start(command, *self._source_of(command.request))
            case StopFetch(request):
                if self._tiers is None or not self._tiers.stop(request):
                    self._fetches.stop(request)
            case LoadBlocks():
                self._tiers_for(command).load(command)
            case Offer():
                self._tiers_for(command).offer(command)
            case StopOffer(offer):
                self._tiers_for(command).stop_offer(offer)
            case SendBlocks():
                self._exports.send(command)
            case DropGateway(gateway):
                outbox = self._outboxes.get(gateway)
                if outbox is not None:
                    log.warning("node %s has heard nothing of gateway %d for too long", self.spec.id, gateway)
                    self._loop.call_soon(self._drop, outbox)
            case SetTimer(key, at):
                self._timers.set(key, at)
            case ClearTimer(key):
                self._timers.clear(key)
            case _:
                assert_never(command)

    def _source_of(self, request: RequestId) -> tuple[str, str]:
        """Return the address and the host of the node that a request, or a prefetch, fetches from."""
        if is_prefetch(request):
            return self._prefetched_from[request]
        sequence = self._sequences[request]
        return sequence.source_address, sequence.source_host

    def _log_end(self, report: Ended) -> None:
        sequence = self._sequences.get(report.request)
        fields = {
            REQUEST: sequence.name if sequence is not None else "",
            "number": request_of(report.request),
            "node": self.spec.id,
        }
        counts = {"output_tokens": report.output_tokens, "computed_tokens": report.computed_tokens}
        log.debug("ended: %s", report.reason.value, extra={**fields, **counts})

    # --- steps --------------------------------------------------------------------------------------------------------

    def _on_step_finished(self, command: RunStep, outputs: Sequence[SliceOutput], seconds: float) -> None:
        for outbox in self._outboxes.values():
            if outbox.full:
                outbox.seal(self._pending_frame(outbox))
        sequences = self._sequences
        block_tokens = self.spec.block_tokens
        results: list[SliceResult] = []
        for part, output in zip(command.slices, outputs, strict=True):
            request = part.request
            sequence = sequences.get(request)
            tokens, drafted, drafting_s = output.tokens, output.drafted, output.drafting_s
            count = len(tokens)
            if count != part.sample or drafted:
                failure = output.failure or broken_promise(self._engine, part, output)
                if failure is not None:
                    results.append(SliceResult(request, 0, (), False, failure))
                    continue
            if sequence is None:
                results.append(SliceResult(request, count, (), output.stopped, output.failure, drafted, drafting_s))
                continue
            if output.scores is not None:
                self._tell_scores(sequence.outbox, request, output.scores)
            if tokens:
                outbox = sequence.outbox
                outbox.requests.append(request)
                outbox.counts.append(count)
                outbox.tokens.extend(tokens)
                if output.logprobs:
                    outbox.add_logprobs(request, output.logprobs)
                tail = sequence.tail
                tail.extend(tokens)
                if count == 1 and len(tail) <= block_tokens and not output.stopped and not drafted and drafting_s is None:
                    results.append(sequence.one_token)
                    continue
            completed = self._completed(sequence)
            results.append(SliceResult(request, count, completed, output.stopped, output.failure, drafted, drafting_s))
        self.handle(StepFinished(command.step, tuple(results), seconds))

    def _tell_scores(self, outbox: Outbox, request: RequestId, scores: PromptScores) -> None:
        """Let the gateway know how likely a prompt's tokens were, in as many frames as that takes."""
        for start in range(0, len(scores), SCORES_MAX):
            outbox.add_scores(request, scores.part(start, start + SCORES_MAX))
            if outbox.full:
                outbox.seal(self._pending_frame(outbox))

    def _completed(self, sequence: _Sequence) -> tuple[BlockHash, ...]:
        """Hash the blocks whose KV is complete now, and cut them off the tail; the newest token's KV comes with the next step."""
        block_tokens = self.spec.block_tokens
        full = (len(sequence.tail) - 1) // block_tokens * block_tokens
        if full <= 0:
            return ()
        hashes = extend_hashes(sequence.hash, sequence.tail[:full].tobytes(), block_tokens)
        sequence.hash = hashes[-1]
        del sequence.tail[:full]
        return tuple(hashes)

    def _on_step_failed(self, command: RunStep, reason: str) -> None:
        self.handle(StepFailed(command.step, reason))

    # --- gateways -----------------------------------------------------------------------------------------------------

    def refuse(self, reason: Refused, problem: str, peer: str) -> None:
        """Count a call that was not served; gateways hear of it with the next load."""
        self._refused_calls += 1
        if self._loop.time() - self._refusal_told_s >= REFUSAL_LOG_S:
            self._refusal_told_s = self._loop.time()
            log.warning("node %s refused a call of %s (%s): %s", self.spec.id, peer, reason, problem)
        for outbox in self._outboxes.values():
            outbox.news_told = -1
        if self._load_timer is None and not self._closed:
            self._load_timer = self._loop.call_later(self._limits.load_s, self._send_loads)

    async def serve_gateway(self, stream: GatewayStream) -> None:
        """Serve one Connect call from its first frame on. Raises `MalformedMessage`, which ends this call alone."""
        first = await stream.read()
        if not isinstance(first, node_pb2.GatewayFrame) or not first.HasField("hello"):
            raise codec.MalformedMessage("a stream must begin with Hello")
        if first.hello.gateway >= GATEWAYS_MAX:
            raise codec.MalformedMessage(f"gateway {first.hello.gateway} is beyond the {GATEWAYS_MAX} that there may be")
        outbox, resumed = self._attach(first.hello)
        welcome = codec.welcome_message(self.spec, self._description.fingerprint, resumed)
        writer: asyncio.Task[None] | None = None
        try:
            # Nothing is read before this is out: a call whose first write is cancelled by what comes next would never end.
            await stream.write(node_pb2.NodeFrame(welcome=welcome, load=codec.load_message(self.load), draining=self._draining))
            writer = asyncio.ensure_future(self._write_frames(outbox, stream))
            while isinstance(frame := await stream.read(), node_pb2.GatewayFrame):
                outbox.frames_received += _says_something(frame)
                self._on_frame(outbox, frame)
        finally:
            if writer is not None:
                writer.cancel()
                await asyncio.wait((writer,))
            self._detach(outbox)

    def _attach(self, hello: node_pb2.Hello) -> tuple[Outbox, bool]:
        """Return the gateway's outbox, and whether its requests go on."""
        gateway = GatewayId(hello.gateway)
        outbox = self._outboxes.get(gateway)
        resumed = (
            outbox is not None
            and outbox.incarnation == hello.incarnation
            and outbox.frames_sent == hello.frames_received
            and outbox.frames_received == hello.frames_sent
        )
        if outbox is not None and not resumed:
            self._lose(outbox)
        if outbox is None or not resumed:
            outbox = self._outboxes[gateway] = Outbox(gateway, hello.incarnation)
        outbox.frames_read = outbox.frames_sent
        if outbox.stream is not None:
            outbox.stream.cancel()
        if outbox.grace is not None:
            outbox.grace.cancel()
            outbox.grace = None
        outbox.stream = asyncio.current_task()
        outbox.start_beating(hello.heartbeat_s)
        self._hear(outbox)
        return outbox, resumed

    def _hear(self, outbox: Outbox) -> None:
        """Let the core know of a gateway's sign of life, if it promised any; not of each frame."""
        if outbox.heartbeat_s > 0.0 and self._loop.time() >= outbox.hear_at:
            outbox.hear_at = self._loop.time() + outbox.heartbeat_s / 2
            self.handle(GatewayHeard(outbox.gateway, HEARTBEATS * outbox.heartbeat_s))

    def _detach(self, outbox: Outbox) -> None:
        """A stream ended: unless another took its place, the gateway has a while to come back."""
        if outbox.stream is not asyncio.current_task():
            return
        outbox.stream = None
        outbox.stop_beating()
        if self._outboxes.get(outbox.gateway) is outbox and not self._closed:
            outbox.grace = self._loop.call_later(self._limits.gateway_lost_s, self._lose, outbox)

    def _lose(self, outbox: Outbox) -> None:
        """Give a gateway up: drop what waits for it and end its requests."""
        outbox.cancel_timer()
        outbox.stop_beating()
        if outbox.grace is not None:
            outbox.grace.cancel()
        if outbox.stream is not None:
            outbox.stream.cancel()
        del self._outboxes[outbox.gateway]
        self.handle(GatewayLost(outbox.gateway))

    async def _write_frames(self, outbox: Outbox, stream: GatewayStream) -> None:
        while True:
            await outbox.awake()
            outbox.due = self._loop.time() + self._limits.frame_s_min
            await stream.write(self._frame(outbox))

    def _frame(self, outbox: Outbox) -> node_pb2.NodeFrame:
        """Return what goes to a gateway next."""
        outbox.frames_sent += 1
        sealed = outbox.next_sealed()
        return sealed if sealed is not None else self._pending_frame(outbox)

    def _pending_frame(self, outbox: Outbox) -> node_pb2.NodeFrame:
        """Return what waits for a gateway; the load goes along only where something besides tokens has changed it."""
        news = self._core.news
        tells = outbox.telling or outbox.news_told != news
        outbox.news_told = news
        return outbox.take(self.load if tells else None, self._draining, self._refused_calls)

    def _on_frame(self, outbox: Outbox, frame: node_pb2.GatewayFrame) -> None:
        if self._closed:
            return
        self._hear(outbox)
        outbox.frames_read = frame.frames_received
        try:
            self._take_frame(outbox, frame)
        finally:  # once for all that it brings; and since it was read, what waited for that may go
            self._flush()

    def _take_frame(self, outbox: Outbox, frame: node_pb2.GatewayFrame) -> None:
        # Slices: going through a message's list itself ends with an error inside, which is dear even where there is nothing.
        # Cancels first: a request that is cancelled and given anew in one frame is the older one cancelled.
        for request in frame.cancels[:]:
            self._take(Cancelled(RequestId(request)))
        # What is given in this frame has a source that was there when it was decided.
        for lost in frame.lost_sources[:]:
            self._take(SourceLost(RequestId(lost.request), NodeId(lost.source)))
        for outlook in frame.outlooks[:]:
            self._take(Expected(codec.outlook_from(outlook)))
        for submit in frame.submits[:]:
            self._on_submit(outbox, submit)
        for lease in frame.leases[:]:
            self._take(LeasePlaced(codec.lease_from(lease)))
        for ended in frame.ended_leases[:]:
            self._take(codec.ended_lease_from(ended))
        for prefetch in frame.prefetches[:]:
            self._on_prefetch(outbox, prefetch)
        for number in frame.cancelled_prefetches[:]:
            self._take(PrefetchCancelled(PrefetchId(RequestId(number))))
        for advice in frame.advice[:]:
            self._take(codec.advice_from(advice))
        if frame.HasField("resync"):
            after = frame.resync.after if frame.resync.HasField("after") else None
            self._take(ResyncRequested(outbox.gateway, after))

    def _on_submit(self, outbox: Outbox, submit: node_pb2.Submit) -> None:
        request = RequestId(submit.request)
        try:
            assignment, sampling = codec.assignment_from(submit), codec.sampling_from(submit.sampling)
            tokens = array("I", submit.tokens)
            self._check(outbox, assignment, submit.hash_root)
            check_vocabulary(self._description, tokens, sampling)
        except codec.MalformedMessage as error:
            self._report_ended(Ended(request, FinishReason.FAILED, 0, 0, str(error)))
            return
        block_tokens = self.spec.block_tokens
        self._sequences[request] = _Sequence(
            name=assignment.name,
            outbox=outbox,
            hash=assignment.hashes[-1] if assignment.hashes else BlockHash(submit.hash_root),
            tail=tokens[len(assignment.hashes) * block_tokens :],
            one_token=SliceResult(request, 1),
            source_address=submit.source_address,
            source_host=submit.source_host,
        )
        if log.isEnabledFor(logging.DEBUG):
            fields = {
                REQUEST: assignment.name,
                "number": request_of(request),
                "node": self.spec.id,
                "tokens": assignment.given_tokens,
            }
            log.debug("%s taken", assignment.role.value, extra=fields)
        if submit.timed:
            self._beginnings.watch(request)
        self._runner.add(request, tokens, sampling, assignment.generated_tokens)
        self._take(Assigned(assignment))

    def _on_prefetch(self, outbox: Outbox, message: node_pb2.Prefetch) -> None:
        prefetch = codec.prefetch_from(message)
        if gateway_of(prefetch.id) != outbox.gateway:
            raise codec.MalformedMessage(f"prefetch {prefetch.id} is not gateway {outbox.gateway}'s")
        self._prefetched_from.setdefault(prefetch.id, (message.source_address, message.source_host))
        self._take(BlocksWanted(prefetch))

    def _check(self, outbox: Outbox, assignment: Assignment, hash_root: bytes) -> None:
        """Raise `MalformedMessage` for what cannot be a request of this gateway's to this node."""
        request, blocks = assignment.request, assignment.given_tokens // self.spec.block_tokens
        if gateway_of(request) != outbox.gateway:
            raise codec.MalformedMessage(f"request {request} is not gateway {outbox.gateway}'s")
        if request in self._sequences:
            raise codec.MalformedMessage(f"request {request} is here already")
        if len(hash_root) != HASH_BYTES:
            raise codec.MalformedMessage(f"the hash root must have {HASH_BYTES} bytes, has {len(hash_root)}")
        if len(assignment.hashes) != blocks:
            raise codec.MalformedMessage(f"{assignment.given_tokens} tokens fill {blocks} blocks, not {len(assignment.hashes)}")

    def _report_ended(self, report: Ended) -> None:
        outbox, began_s_ago = self._outboxes.get(gateway_of(report.request)), self._beginnings.ended(report.request)
        if outbox is not None:
            outbox.add_ended(codec.ended_message(report, began_s_ago))

    def _publish(self, batches: Sequence[KvBatch], gateway: GatewayId | None) -> None:
        if gateway is None:
            messages = [codec.kv_message(batch) for batch in batches]
            for outbox in self._outboxes.values():
                outbox.add_kv(messages)
        elif (asking := self._outboxes.get(gateway)) is not None:
            if batches[0].cleared:
                asking.start_over(batches)
            else:
                asking.add_kv([codec.kv_message(batch) for batch in batches])

    def use_store(self, place: StorePlace | None) -> None:
        """Take another store of this host from now on, or none."""
        assert self._tiers is not None, f"node {self.spec.id} is not to use stores"
        self._tiers.use(place)

    async def wait_attached(self, seconds: float) -> bool:
        """Wait until the node has its store, for so long at most. Returns whether it has."""
        return self._tiers is not None and await self._tiers.wait_attached(seconds)

    def _tiers_for(self, command: LoadBlocks | Offer | StopOffer) -> Tiers:
        assert self._tiers is not None, f"node {self.spec.id} has no store and asks for {command}"
        return self._tiers

    def _tell_leases(self, command: TellLeases) -> None:
        told = (*map(codec.lease_message, command.placed), *map(codec.ended_lease_message, command.ended))
        for outbox in self._outboxes.values():
            if command.gateway in (None, outbox.gateway):
                for message in told:
                    outbox.add_lease(message)

    def _moved(self, request: RequestId, size: int, seconds: float, began_s_ago: float) -> None:
        self._copied(Moved(Tier.HBM, Tier.HBM, size, seconds, request, began_s_ago))

    def _copied(self, moved: Moved) -> None:
        move = node_pb2.Move(
            source=moved.source,
            target=moved.target,
            bytes=moved.bytes,
            seconds=moved.seconds,
            request=0 if moved.request is None or is_prefetch(moved.request) else moved.request,
            began_s_ago=moved.began_s_ago,
        )
        for outbox in self._outboxes.values():
            outbox.add_move(move)

    def _flush(self) -> None:
        """Wake the streams that have something to say; a changed load alone may wait a little."""
        stale, news = False, self._core.news
        for outbox in self._outboxes.values():
            if outbox.unsent > self._limits.unsent_max:
                self._loop.call_soon(self._drop, outbox)
            elif outbox.pending:
                self._wake_in_time(outbox)
            elif outbox.news_told != news:
                stale = True
        if stale and self._load_timer is None:
            self._load_timer = self._loop.call_later(self._limits.load_s, self._send_loads)
        if self._draining and self._quiet:
            self._idle.set()

    def _wake_in_time(self, outbox: Outbox) -> None:
        """Have a frame sent: at once if it is urgent, else not too soon after the last one.

        A gateway that has not read the last ones yet would only get more to do by another: it gets all at once, later.
        """
        if outbox.frames_sent - outbox.frames_read >= codec.FRAMES_UNREAD_MAX:
            return
        wait_s = outbox.due - self._loop.time()
        if wait_s <= 0.0 or outbox.urgent:
            outbox.wake()
        elif outbox.timer is None:
            outbox.timer = self._loop.call_later(wait_s, outbox.wake)

    def _drop(self, outbox: Outbox) -> None:
        if self._outboxes.get(outbox.gateway) is outbox:
            self._lose(outbox)

    def _send_loads(self) -> None:
        self._load_timer = None
        for outbox in self._outboxes.values():
            if outbox.news_told != self._core.news:
                outbox.wake()

    # --- peers --------------------------------------------------------------------------------------------------------

    async def serve_peer(self, stream: Stream) -> None:
        """Serve one Fetch call from its first frame on."""
        whole = WholeWrites(stream)
        try:
            await self._exports.serve(whole)
        except (TransferFailed, codec.MalformedMessage) as error:
            await whole.write(node_pb2.BlocksFrame(final=True, failure=str(error)))
        finally:
            await whole.settle()

    # --- the end ------------------------------------------------------------------------------------------------------

    @property
    def load(self) -> Load:
        """The node's state now."""
        load, beats, halves = self._core.load(), self._engine.beats, self._engine.halves
        if beats is not None:
            load = replace(load, beats=beats.beats, beats_missed=beats.missed, beat_late_s=beats.late_s)
        if halves is not None:
            load = replace(load, split=replace(halves, experts=self.experts))
        if self._engine.drafts is not None:
            load = replace(load, pooled_drafts=self._engine.drafts.load)
        return load

    @property
    def _quiet(self) -> bool:
        load = self._core.load()
        return not load.running and not load.waiting and not self._sequences

    async def drain(self) -> None:
        """Take nothing new, tell the gateways, and wait until all that runs has ended."""
        self._draining = True
        self.handle(DrainRequested())
        self._send_loads()
        await self._idle.wait()

    async def close(self) -> None:
        """Stop at once; what runs is lost."""
        self._closed = True
        self._timers.close()
        for timer in (self._load_timer, *(outbox.grace for outbox in self._outboxes.values())):
            if timer is not None:
                timer.cancel()
        for outbox in self._outboxes.values():
            outbox.cancel_timer()
            outbox.stop_beating()
            if outbox.stream is not None:
                outbox.stream.cancel()
        self._exports.close()
        await self._fetches.close()
        if self._tiers is not None:
            await self._tiers.close()
        # Waiting for the engine's thread must not stop the loop, which the thread's last call needs.
        await self._loop.run_in_executor(None, self._runner.close)
        self._engine.close()
        if self._journal is not None:
            await self._loop.run_in_executor(None, self._journal.close)


def _says_something(frame: node_pb2.GatewayFrame) -> bool:
    """Return whether a gateway counts a frame: one that only tells of frames read may get lost."""
    waits = (
        frame.submits
        or frame.cancels
        or frame.lost_sources
        or frame.outlooks
        or frame.leases
        or frame.ended_leases
        or frame.advice
        or frame.prefetches
        or frame.cancelled_prefetches
    )
    return bool(waits or frame.HasField("resync"))


def check_vocabulary(description: EngineDescription, tokens: "array[int]", sampling: Sampling) -> None:
    """Raise `MalformedMessage` if the id of a token, or of one that sampling names, is beyond the engine's vocabulary."""
    highest = max(tokens) if len(tokens) < FEW_TOKENS else int(np.maximum.reduce(np.frombuffer(tokens, _TOKEN)))
    for named in (sampling.logit_bias, sampling.stop_token_ids, sampling.allowed_token_ids, *sampling.forbidden_runs):
        if named:
            highest = max(highest, *named)
    if highest >= description.vocabulary:
        raise codec.MalformedMessage(f"token {highest} is beyond the vocabulary of {description.vocabulary}")
