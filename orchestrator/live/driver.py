"""Drives one gateway's cluster in real time: one core, a link to each node, a stream of tokens for each turn.

The live twin of the simulator's world. Events go into the core and its commands are executed at once, on one event loop; tokens
pass by the core and go from a node's frame straight into their turn's stream. Tokens of a frame are in their streams before the
core hears of the frame, so an end never overtakes them.
"""

import asyncio
import logging
import random
import time
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, assert_never

from orchestrator.core.blocks import TOKEN_BYTES, extend_hashes
from orchestrator.core.cluster.cluster import Cluster
from orchestrator.core.cluster.hints import Hints
from orchestrator.core.cluster.sessions import ReprefillReason
from orchestrator.core.commands import (
    Abort,
    AnswerHint,
    Assign,
    Cancel,
    CancelPrefetch,
    ClearTimer,
    ClusterCommand,
    Complete,
    EndLease,
    EvictBlocks,
    EvictStored,
    Expect,
    PlaceLease,
    PrefetchBlocks,
    PrefetchStored,
    Refuse,
    ReportSourceLost,
    RequestResync,
    RequestStoreResync,
    Restart,
    Resume,
    RetainBlocks,
    SetTimer,
)
from orchestrator.core.config import ClusterConfig
from orchestrator.core.events import (
    Answered,
    BlocksRetained,
    BlocksRetired,
    ClusterEvent,
    DrainRequested,
    EvictAsked,
    GatewaysChanged,
    HintAsked,
    LeaseEnded,
    LeasesTold,
    NodeDraining,
    NodeJoined,
    NodeLost,
    PrefetchAsked,
    RequestAbandoned,
    RequestArrived,
    Resumed,
    StoreJoined,
    StoreLost,
    StoreReported,
)
from orchestrator.core.hints import Hint, Receipt
from orchestrator.core.timers import ClusterTimer
from orchestrator.core.types import (
    FinishReason,
    GatewayId,
    KvBatch,
    ModelName,
    NodeId,
    NodeSpec,
    Request,
    RequestId,
    Role,
    Sampling,
    StoreId,
    StoreLoad,
    StoreSpec,
    request_id,
    request_of,
)
from orchestrator.live.links import NodeLink
from orchestrator.live.stores import StoreLink
from orchestrator.live.turns import Delta, PromptScores, TokenLogprob, Turn, TurnFailed
from orchestrator.wire import codec, node_pb2, store_codec, store_pb2
from orchestrator.wire.clock import Timers
from orchestrator.wire.journal import ClusterJournalWriter, recorded
from orchestrator.wire.leases import LeaseMessage
from orchestrator.wire.logs import REQUEST
from orchestrator.wire.trust import Trust

log = logging.getLogger("weft.driver")

#: Tokens a client may leave unread before its turn is cancelled.
UNREAD_TOKENS_MAX = 65_536


class Observer(Protocol):
    """Who counts and measures; see `metrics.py`."""

    def observe(self, now: float, event: ClusterEvent, commands: Sequence[ClusterCommand]) -> None:
        """An event was handled and gave these commands."""
        ...

    def routed(self, seconds: float) -> None:
        """A routing decision took this long."""
        ...

    def moved(self, node: NodeId, source: str, target: str, size_bytes: int, seconds: float) -> None:
        """A node, or the store of that name, copied KV from one tier to another."""
        ...

    def follows(self, request: RequestId) -> bool:
        """Return whether to be told when nodes began what they do for a request."""
        ...

    def computed(self, node: NodeId, request: RequestId, began_s_ago: float) -> None:
        """A node has just computed its part of a prompt that is followed."""
        ...

    def fetched(self, node: NodeId, request: RequestId, began_s_ago: float) -> None:
        """A node has just got blocks of a prompt from another, followed or not, the first of them so many seconds ago."""
        ...

    def refused(self, node: NodeId, calls: int) -> None:
        """A node has refused so many calls since its start."""
        ...

    def malformed(self, node: NodeId) -> None:
        """A node sent what means nothing; the link to it starts anew."""
        ...


class TurnStream:
    """The output of one turn, as it comes."""

    __slots__ = (
        "_driver",
        "_failure",
        "_finish",
        "_read",
        "attempt",
        "cached_tokens",
        "logprobs",
        "node",
        "output_tokens",
        "request",
        "scorer",
        "scores",
        "seed",
        "tokens",
        "turn",
        "waiter",
    )

    def __init__(self, driver: "ClusterDriver", request: RequestId, turn: Turn) -> None:
        self.request = request
        self.turn = turn
        #: That which was asked, or one all the same, so that another node goes on with the same numbers; None if none are drawn.
        self.seed = _seed_of(turn.sampling)
        #: What nodes call it in the attempt whose tokens count; None while none does.
        self.attempt: RequestId | None = None
        #: The node whose tokens count; others' are late ones of an assignment that was given up.
        self.node: NodeId | None = None
        #: What has come of its prompt's log probabilities, if they are wanted, until the reader has got them; and the node that
        #: still brings some, None while there is none.
        self.scores = _scores_of(turn)
        self.scorer: NodeId | None = None
        #: Not yet read; the driver appends to both.
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        #: Tokens that came, read or not; those that were read.
        self.output_tokens = 0
        self._read = array("I")
        self._driver = driver
        self._finish: FinishReason | None = None
        #: Prompt tokens that were not computed; known from the first token on.
        self.cached_tokens = 0
        self._failure: TurnFailed | None = None
        #: Whoever waits in `read`; the driver ends the wait.
        self.waiter: asyncio.Future[None] | None = None

    async def read(self) -> Delta:
        """Wait for more and return all there is. Raises `TurnFailed`. Not to be called after a delta with `finish`."""
        while self._waits:
            self.waiter = waiter = self._driver.loop.create_future()
            await waiter
        if self._failure is not None and (not self.tokens or self._lacks_scores):
            raise self._failure
        if self._lacks_scores:
            self.cancel()
            raise TurnFailed(502, "scores_lost", "the node that computed the prompt is lost, with some of its log probabilities")
        delta = Delta(self.tokens, self.logprobs, self._finish, self.cached_tokens, self.scores)
        self.scores = None
        self._read.extend(self.tokens)
        self.tokens, self.logprobs = [], []
        return delta

    @property
    def _waits(self) -> bool:
        """Whether there is nothing to read yet."""
        if self._failure is not None:
            return False
        nothing = not self.tokens and self._finish is None
        # Another node than the one that generates may have computed the prompt: then what it tells of it may come later.
        return nothing or (self._lacks_scores and self.scorer is not None)

    @property
    def _lacks_scores(self) -> bool:
        return self.scores is not None and not self.scores.complete

    def answered(self, tool: str) -> None:
        """Let the core know what the session waits for now."""
        self._driver.answered(self, tool)

    def cancel(self) -> None:
        """Nobody wants more: free what the turn holds. Harmless after the end."""
        self._driver.abandon(self)

    def wake(self) -> None:
        """Let the reader see what came."""
        waiter = self.waiter
        if waiter is not None:
            self.waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def restart(self) -> None:
        """Forget what came of an attempt of which nothing was delivered."""
        self.output_tokens = 0
        self.tokens.clear()
        self.logprobs.clear()

    @property
    def generated(self) -> "array[int]":
        """All tokens that came, in order."""
        return self._read + array("I", self.tokens)

    def finish(self, reason: FinishReason, cached_tokens: int) -> None:
        """End well."""
        self._finish = reason
        self.cached_tokens = cached_tokens
        self.wake()

    def fail(self, failure: TurnFailed) -> None:
        """End with an error, behind the tokens that came."""
        self._failure = failure
        self.wake()


@dataclass(frozen=True, slots=True)
class _KnownNode:
    """A node that has joined."""

    spec: NodeSpec
    fingerprint: str


class ClusterDriver:
    """One gateway's view of the cluster, at work. Made on a running loop.

    Args:
        gateway: this gateway's number; unique in the cluster.
        trust: what nodes must be shown, and must show.
        fatal: told of an error that leaves the core in an unknown state; the process should end.
        journal: takes down every event and what came of it; closed by `close`.
    """

    def __init__(
        self,
        gateway: GatewayId,
        config: ClusterConfig,
        trust: Trust,
        observer: Observer,
        fatal: Callable[[BaseException], None],
        journal: ClusterJournalWriter | None = None,
    ) -> None:
        self._gateway = gateway
        self._config = config
        self._trust = trust
        self._observer = observer
        self._fatal = fatal
        self._journal = journal
        self._core = Cluster(gateway, config)
        self.loop = asyncio.get_running_loop()
        #: Differs from start to start, so that nodes end what a former gateway of this number left behind.
        self._incarnation = random.getrandbits(63)
        self._serial = 0
        self._streams: dict[RequestId, TurnStream] = {}
        #: Those that nodes generate for, by what nodes call them.
        self._fed: dict[RequestId, TurnStream] = {}
        #: What the core is to be told next of requests that it resumes.
        self._counted: deque[Resumed] = deque()
        self._links: dict[NodeId, NodeLink] = {}
        self._known: dict[NodeId, _KnownNode] = {}
        self._stores: dict[StoreId, StoreLink] = {}
        #: What stores told last of themselves, by model.
        self._store_loads: dict[tuple[StoreId, ModelName], StoreLoad] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._timers: Timers[ClusterTimer] = Timers(self._handle)
        self._idle = asyncio.Event()
        #: The answer to the hint that is being asked.
        self._receipt: Receipt | None = None
        #: Who is told of every event: those who watch what becomes of their blocks.
        self._listeners: list[Callable[[ClusterEvent, Sequence[ClusterCommand]], None]] = []
        #: Whether any request has been followed: without traces none is, and frames are not searched for what nodes tell of them.
        self._follows = False
        #: Whether any request has wanted log probabilities of its prompt.
        self._scores = False

    @property
    def now(self) -> float:
        """Seconds on the gateway's clock."""
        return self._timers.now

    # --- turns --------------------------------------------------------------------------------------------------------

    def start(self, turn: Turn) -> TurnStream:
        """Start a turn; refusals come out of the first `read`."""
        self._serial += 1
        request = request_id(self._gateway, self._serial)
        stream = self._streams[request] = TurnStream(self, request, turn)
        self._scores = self._scores or stream.scores is not None
        self._handle(RequestArrived(self._request_of(turn, request)))
        return stream

    def _request_of(self, turn: Turn, request: RequestId) -> Request:
        """Return the turn as the core sees it."""
        return Request(
            id=request,
            model=turn.model,
            tenant=turn.tenant,
            prompt_tokens=turn.prompt.count,
            hashes=turn.prompt.hashes,
            output_tokens_max=turn.output_tokens_max,
            session=turn.session,
            service_class=turn.service_class,
            priority=turn.priority,
            timeout_s=self._config.limits.request_s_max,
            name=turn.name,
            beat_s_max=turn.beat_s_max,
            scored=turn.sampling.prompt_logprobs is not None,
        )

    def answered(self, stream: TurnStream, tool: str) -> None:
        """Note what a turn's model waits for at its end, empty if for no tool; says nothing of turns without session."""
        turn = stream.turn
        if turn.session is not None:
            self._handle(Answered(stream.request, turn.model, turn.tenant, turn.session, tool))

    def abandon(self, stream: TurnStream) -> None:
        """Cancel a turn that has not ended."""
        self._give_up(stream, TurnFailed(499, "cancelled", "the request was cancelled"))

    def _give_up(self, stream: TurnStream, failure: TurnFailed) -> None:
        if self._streams.pop(stream.request, None) is not None:
            self._stop_feeding(stream)
            output_tokens = stream.output_tokens
            stream.restart()
            stream.fail(failure)
            self._handle(RequestAbandoned(stream.request, output_tokens))

    @property
    def ready(self) -> bool:
        """True while every model has at least one node that generates."""
        return self._core.ready

    @property
    def reprefilled_tokens(self) -> Mapping[ReprefillReason, int]:
        """Prompt tokens computed so far, by why they had to be; changes as turns end."""
        return self._core.sessions.reprefilled_tokens

    # --- hints --------------------------------------------------------------------------------------------------------

    def ask(self, hint: Hint) -> Receipt:
        """Do what a harness asks for, as far as it can be; return what became of it."""
        self._handle(HintAsked(hint))
        receipt, self._receipt = self._receipt, None
        assert receipt is not None, f"a hint to {hint.verb.value} was not answered"
        return receipt

    @property
    def hints(self) -> Hints:
        """What the core knows of leases and holders; to be read only."""
        return self._core.hints

    def listen(self, listener: Callable[[ClusterEvent, Sequence[ClusterCommand]], None]) -> Callable[[], None]:
        """Tell somebody of every event and its commands until the returned function is called."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    # --- membership ---------------------------------------------------------------------------------------------------

    def set_nodes(self, nodes: Sequence[tuple[NodeId, str]]) -> None:
        """Hold links to exactly these nodes; one whose address changed was started anew."""
        wanted = dict(nodes)
        for node, link in tuple(self._links.items()):
            if wanted.get(node) != link.address:
                self.mark_dead(node, "it left the cluster" if node not in wanted else "it was started anew")
        for node, address in wanted.items():
            if node not in self._links:
                lost_s = self._config.cluster.node_lost_s
                link = NodeLink(node, address, self._gateway, self._incarnation, self, lost_s, self._trust)
                self._links[node] = link
                link.start()

    def set_gateways(self, gateways: Sequence[GatewayId]) -> None:
        """Share what tenants may have with these gateways, which take requests; one that does not itself keeps its part."""
        if self._gateway in gateways:
            self._handle(GatewaysChanged(sorted(gateways).index(self._gateway), len(gateways)))

    def mark_dead(self, node: NodeId, reason: str = "its process is dead") -> None:
        """Give a node up at once, without waiting for it to come back."""
        link = self._links.get(node)
        if link is None:
            return
        link.give_up(reason)
        del self._links[node]
        self._close(link)

    def _close(self, link: NodeLink | StoreLink) -> None:
        closing = asyncio.ensure_future(link.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    def node_joined(self, spec: NodeSpec, fingerprint: str) -> bool:
        """Take a node in. Returns False if its weights are not those of the model's other nodes."""
        for known in self._known.values():
            if known.spec.model == spec.model and known.fingerprint != fingerprint:
                log.error("node %s has weights %s; %s has %s", spec.id, fingerprint, known.spec.id, known.fingerprint)
                return False
        self._known[spec.id] = _KnownNode(spec, fingerprint)
        self._handle(NodeJoined(spec))
        return True

    def node_lost(self, node: NodeId, reason: str) -> None:
        """Give a node up."""
        log.warning("node %s is lost: %s", node, reason)
        self._known.pop(node, None)
        bereft = [stream for stream in self._streams.values() if stream.scorer == node]
        for stream in bereft:
            stream.scorer = None
        self._handle(NodeLost(node, reason))
        for stream in bereft:
            stream.wake()

    def node_draining(self, node: NodeId) -> None:
        """Start nothing new on a node."""
        self._handle(NodeDraining(node))

    # --- stores -------------------------------------------------------------------------------------------------------

    def set_stores(self, stores: Sequence[tuple[StoreId, str]]) -> None:
        """Hold links to exactly these stores; one whose address changed was started anew."""
        wanted = dict(stores)
        for store, link in tuple(self._stores.items()):
            if wanted.get(store) != link.address:
                link.give_up("it left the cluster" if store not in wanted else "it was started anew")
                del self._stores[store]
                self._close(link)
        for store, address in wanted.items():
            if store not in self._stores:
                link = StoreLink(store, address, self._gateway, self, self._config.cluster.node_lost_s, self._trust)
                self._stores[store] = link
                link.start()

    def store_joined(self, spec: StoreSpec) -> None:
        """Take a store in."""
        self._handle(StoreJoined(spec))

    def store_lost(self, store: StoreId, reason: str) -> None:
        """Give a store up."""
        log.warning("store %s is lost: %s", store, reason)
        self._store_loads = {key: load for key, load in self._store_loads.items() if key[0] != store}
        self._handle(StoreLost(store, reason))

    def store_frame(self, store: StoreId, frame: store_pb2.FromStore) -> None:
        """Take what a store tells to the core, model by model. Raises `MalformedMessage`."""
        told: dict[ModelName, list[KvBatch]] = {}
        for model, load in map(store_codec.load_from, frame.loads):
            self._store_loads[store, model] = load
            told[model] = []
        for model, batch in map(store_codec.holdings_from, frame.holdings):
            told.setdefault(model, []).append(batch)
        for move in frame.moves:
            self._observer.moved(NodeId(store), move.source, move.target, move.bytes, move.seconds)
        if frame.leases:
            self._handle(LeasesTold(None, tuple(codec.lease_from(lease) for lease in frame.leases), store=store))
        for model, batches in told.items():
            self._handle(StoreReported(store, model, self._store_loads.get((store, model), StoreLoad()), tuple(batches)))

    # --- frames -------------------------------------------------------------------------------------------------------

    def node_malformed(self, node: NodeId) -> None:
        """Count a frame that meant nothing."""
        self._observer.malformed(node)

    def node_frame(self, node: NodeId, frame: node_pb2.NodeFrame) -> None:
        """Hand out a frame's tokens, then take the rest to the core; a frame without a load brings it nothing.

        Raises `MalformedMessage`.
        """
        codec.check_frame(frame)
        slow: list[TurnStream] = []
        for scores in frame.prompt_scores[:]:
            self._deliver_scores(scores)
        if frame.requests:
            self._deliver(node, frame, slow)
        for move in frame.moves[:]:
            self._observer.moved(node, move.source, move.target, move.bytes, move.seconds)
            self._observer.fetched(node, request_of(RequestId(move.request)), move.began_s_ago)
        if self._scores:
            for ended in frame.ended[:]:
                self._expect_no_scores(node, request_of(RequestId(ended.request)))
        if frame.HasField("load"):
            self._observer.refused(node, frame.refused_calls)
            if self._follows:
                self._tell_computed(node, frame)
            self._handle(codec.report_from(node, frame))
        if frame.leases or frame.ended_leases:
            self._handle(codec.leases_from(node, frame))
        for stream in slow:
            named = {REQUEST: stream.turn.name, "number": stream.request}
            log.warning("%d tokens unread, cancelled", len(stream.tokens), extra=named)
            self._give_up(stream, TurnFailed(408, "slow_client", f"more than {UNREAD_TOKENS_MAX} tokens were left unread"))

    def _deliver_scores(self, told: node_pb2.PromptScores) -> None:
        """Take in log probabilities of a prompt, whichever node computed them, and in whichever attempt."""
        stream = self._streams.get(request_of(RequestId(told.request)))
        if stream is None or stream.scores is None:
            return
        try:
            stream.scores.add(told.first, told.logprobs, told.ranks, told.top_tokens, told.top_logprobs)
        except ValueError as error:
            raise codec.MalformedMessage(str(error)) from error
        if stream.scores.complete:
            stream.wake()

    def _expect_no_scores(self, node: NodeId, request: RequestId) -> None:
        """Note that a node has told all that it will of a prompt; another that went on with it tells before its first token."""
        stream = self._streams.get(request)
        if stream is not None and stream.scorer == node:
            stream.scorer = None
            stream.wake()

    def _tell_computed(self, node: NodeId, frame: node_pb2.NodeFrame) -> None:
        for part in (*frame.first_tokens, *frame.ended):
            if part.began_s_ago:
                self._observer.computed(node, request_of(RequestId(part.request)), part.began_s_ago)

    def _deliver(self, node: NodeId, frame: node_pb2.NodeFrame, slow: list[TurnStream]) -> None:
        streams = self._fed
        for entry in frame.logprobs[:]:
            stream = streams.get(RequestId(entry.request))
            if stream is not None and stream.node == node:
                top = list(zip(entry.top_tokens, entry.top_logprobs, strict=True))
                stream.logprobs.append(TokenLogprob(entry.logprob, top))
        for first in frame.first_tokens[:]:
            stream = streams.get(RequestId(first.request))
            if stream is not None and stream.node == node and not stream.output_tokens:
                stream.cached_tokens = max(stream.turn.prompt.count - first.computed_tokens, 0)
        tokens = frame.tokens[:]
        end = 0
        for request, count in zip(frame.requests[:], frame.counts[:], strict=True):
            start, end = end, end + count
            stream = streams.get(RequestId(request))
            # Late tokens of a request that ended or runs elsewhere now are nobody's.
            if stream is None or stream.node != node:
                continue
            unread = stream.tokens
            stream.output_tokens += count
            if count == 1:
                unread.append(tokens[start])
            else:
                unread += tokens[start:end]
            if len(unread) > UNREAD_TOKENS_MAX:
                slow.append(stream)
            if stream.waiter is not None:
                stream.wake()

    # --- the core -----------------------------------------------------------------------------------------------------

    def _handle(self, event: ClusterEvent) -> None:
        """Take an event to the core, and then what it asked for of requests that it resumes."""
        self._take(event)
        while self._counted:
            self._take(self._counted.popleft())

    def _take(self, event: ClusterEvent) -> None:
        now = self._timers.now
        try:
            started = time.perf_counter()
            commands = recorded(self._journal, self._core.handle, event, now)
            if isinstance(event, RequestArrived):
                self._observer.routed(time.perf_counter() - started)
            self._observer.observe(now, event, commands)
            for command in commands:
                self._execute(command)
            for listener in self._listeners:
                listener(event, commands)
        except Exception as error:  # A core or driver that broke its own rules cannot go on: better no gateway than a wrong one.
            if self._journal is not None:
                self._journal.close()
            self._fatal(error)
            raise

    def _execute(self, command: ClusterCommand) -> None:
        match command:  # first what every request needs
            case SetTimer(key, at):
                self._timers.set(key, at)
            case ClearTimer(key):
                self._timers.clear(key)
            case Assign():
                if log.isEnabledFor(logging.DEBUG):
                    part = command.assignment
                    log.debug(
                        "%s assigned to %s",
                        part.role.value,
                        command.node,
                        extra={REQUEST: part.name, "number": request_of(part.request)},
                    )
                self._assign(command)
            case Complete(request, ended, cached_tokens):
                stream = self._end(request)
                if stream is not None:
                    stream.finish(ended.reason, cached_tokens)
            case Cancel(node, request):
                link = self._links.get(node)
                if link is not None:
                    link.cancel(request)
            case Refuse(request, status, code, message, retry_after_s):
                stream = self._end(request)
                if stream is not None:
                    stream.fail(TurnFailed(status, code, message, retry_after_s))
            case Abort(request, status, code, message):
                stream = self._end(request)
                if stream is not None:
                    stream.fail(TurnFailed(status, code, message))
            case Restart(request, _):
                stream = self._streams.get(request)
                if stream is not None:
                    self._stop_feeding(stream)
                    stream.restart()
            case Resume(request, reason):
                stream = self._streams.get(request)
                if stream is not None:
                    self._resume(stream, reason)
            case Expect(node, outlook):
                link = self._links.get(node)
                if link is not None:
                    link.expect(outlook)
            case ReportSourceLost(node, request, source):
                link = self._links.get(node)
                if link is not None:
                    link.source_lost(request, source)
            case RequestResync(node, after):
                link = self._links.get(node)
                if link is not None:
                    link.resync(after)
            case RequestStoreResync(store, model, after):
                store_link = self._stores.get(store)
                if store_link is not None:
                    store_link.resync(model, after)
            case AnswerHint():
                self._receipt = command.receipt
            case PlaceLease(lease, _, nodes, stores):
                self._tell_lease(codec.lease_message(lease), nodes, stores)
            case EndLease(lease, _, nodes, stores):
                self._tell_lease(codec.ended_lease_message(LeaseEnded(lease.id, lease.revision)), nodes, stores)
            case PrefetchStored():
                for store_link in self._stores_at(command.stores):
                    store_link.advise(PrefetchAsked(command.model, command.hashes, command.blocks))
            case PrefetchBlocks():
                self._prefetch(command)
            case CancelPrefetch(node, prefetch):
                for link in self._links_to((node,)):
                    link.cancel_prefetch(prefetch)
            case EvictStored(model, hashes, first, end, tier, demote, stores):
                for store_link in self._stores_at(stores):
                    store_link.advise(EvictAsked(model, hashes, first, end, tier, demote))
            case EvictBlocks(_, hashes, first_block, at_once, nodes):
                for link in self._links_to(nodes):
                    link.advise(codec.advice_message(BlocksRetired(hashes, first_block, at_once)))
            case RetainBlocks(_, hashes, outlook, nodes):
                for link in self._links_to(nodes):
                    link.advise(codec.advice_message(BlocksRetained(hashes, outlook)))
            case _:
                assert_never(command)

    def _tell_lease(self, message: LeaseMessage, nodes: Sequence[NodeId], stores: Sequence[StoreId]) -> None:
        for link in (*self._links_to(nodes), *self._stores_at(stores)):
            link.tell_lease(message)

    def _stores_at(self, stores: Sequence[StoreId]) -> list[StoreLink]:
        return [self._stores[store] for store in stores if store in self._stores]

    def _links_to(self, nodes: Sequence[NodeId]) -> list[NodeLink]:
        return [self._links[node] for node in nodes if node in self._links]

    def _assign(self, command: Assign) -> None:
        assignment = command.assignment
        stream = self._streams[request_of(assignment.request)]
        prompt, tokens = stream.turn.prompt, stream.turn.prompt.tokens
        if assignment.generated_tokens:
            tokens += stream.generated.tobytes()
        submission = codec.Submission(assignment, tokens, prompt.hash_root, stream.turn.sampling, stream.seed)
        if self._observer.follows(stream.request):
            self._follows = submission.timed = True
        source = self._known.get(assignment.source) if assignment.source is not None else None
        if source is not None:
            submission.source = source.spec
        if assignment.scored and not assignment.source_pending:
            stream.scorer = command.node
        if assignment.role is Role.GENERATE:
            stream.node, stream.attempt = command.node, assignment.request
            self._fed[assignment.request] = stream
        self._links[command.node].submit(submission)

    def _prefetch(self, command: PrefetchBlocks) -> None:
        message = codec.prefetch_message(command.prefetch)
        source = self._known.get(command.prefetch.source) if command.prefetch.source is not None else None
        if source is not None:
            message.source_address = source.spec.address
            message.source_host = source.spec.host
        self._links[command.node].prefetch(message)

    def _stop_feeding(self, stream: TurnStream) -> None:
        """Let nothing that still comes of the attempt under way be the turn's."""
        if stream.attempt is not None:
            del self._fed[stream.attempt]
            stream.attempt = stream.node = None

    def _resume(self, stream: TurnStream, reason: str) -> None:
        """Count what a turn has brought, for it to go on elsewhere; its reader only waits."""
        self._stop_feeding(stream)
        turn, generated = stream.turn, stream.generated
        prompt = turn.prompt
        block_tokens = self._config.pools_of(turn.model)[0].engine.block_tokens
        hashed = len(prompt.hashes)
        parent = prompt.hashes[-1] if hashed else prompt.hash_root
        rest = prompt.tokens[hashed * block_tokens * TOKEN_BYTES :] + generated.tobytes()
        hashes = prompt.hashes + tuple(extend_hashes(parent, rest, block_tokens))
        stopped = bool(generated) and generated[-1] in stream.turn.sampling.stop_token_ids
        named = {REQUEST: turn.name, "number": stream.request}
        log.warning("goes on elsewhere after %d tokens: %s", len(generated), reason, extra=named)
        self._counted.append(Resumed(stream.request, len(generated), hashes, stopped))

    def _end(self, request: RequestId) -> TurnStream | None:
        """Take a turn's stream out; None if its reader has given it up before."""
        stream = self._streams.pop(request, None)
        if stream is not None:
            self._stop_feeding(stream)
        if not self._streams:
            self._idle.set()
        return stream

    # --- the end ------------------------------------------------------------------------------------------------------

    async def drain(self, seconds: float) -> bool:
        """Refuse new turns and let those that run end. Returns False if some did not end in time."""
        self._handle(DrainRequested())
        self._idle.clear()
        if not self._streams:
            return True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Fail what runs and leave the nodes."""
        self._timers.close()
        for stream in tuple(self._streams.values()):
            stream.fail(TurnFailed(503, "shutting_down", "the gateway is shutting down"))
        self._streams.clear()
        self._fed.clear()
        closing = [asyncio.ensure_future(link.close()) for link in (*self._links.values(), *self._stores.values())]
        self._links.clear()
        self._stores.clear()
        if closing or self._closing:
            await asyncio.wait((*closing, *self._closing))
        if self._journal is not None:
            await self.loop.run_in_executor(None, self._journal.close)


def _scores_of(turn: Turn) -> PromptScores | None:
    """Return where log probabilities of a turn's prompt gather; None if none are wanted."""
    tops = turn.sampling.prompt_logprobs
    return None if tops is None else PromptScores(turn.prompt.count, tops)


def _seed_of(sampling: Sampling) -> int | None:
    """Return the seed that was asked for, or another if tokens are drawn."""
    return random.getrandbits(64) if sampling.seed is None and sampling.temperature > 0.0 else sampling.seed
