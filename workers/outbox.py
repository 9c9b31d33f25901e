"""Messages of one node that wait for one gateway: all that gathered between two frames go out as one.

A gateway that is behind so gets fewer, larger frames, up to a size, and a queue only of such; past a bound it counts as lost.
Counting frames on both ends tells after a broken stream whether anything was lost with it.
"""

import asyncio
from collections import deque
from collections.abc import Sequence

from orchestrator.core.blocks import HASH_BYTES
from orchestrator.core.types import GatewayId, KvBatch, Load, RequestId
from orchestrator.wire import codec, node_pb2
from orchestrator.wire.leases import LeaseMessage, LeaseNews
from workers.engines.base import PromptScores, TokenLogprobs

#: Seconds between two heartbeats at least, whatever a gateway asks for.
HEARTBEAT_S_MIN = 0.005
#: Bytes of a frame that a token takes with its request at most, and that a token's log probabilities take, and each of them.
TOKEN_BYTES, LOGPROBS_BYTES, LOGPROB_BYTES = 20, 24, 9
#: Tokens of a prompt whose log probabilities go into one message at most.
SCORES_MAX = 4096


class Outbox:
    """One gateway's pending frame and the state of its stream."""

    __slots__ = (
        "_beat", "_bytes", "_ended", "_first_tokens", "_frames_at_beat", "_kv", "_leases", "_logprobs", "_moves", "_pages",
        "_prefetches",
        "_scored", "_scores", "_sealed", "_sealed_tokens", "_wake", "_weight", "counts", "due", "frames_read", "frames_received",
        "frames_sent", "gateway", "grace", "hear_at", "heartbeat_s", "incarnation", "news_told", "requests", "stream", "timer",
        "tokens",
    )  # fmt: skip

    def __init__(self, gateway: GatewayId, incarnation: int) -> None:
        self.gateway = gateway
        self.incarnation = incarnation
        #: Frames after Hello and Welcome, over all streams.
        self.frames_sent = 0
        self.frames_received = 0
        #: Of the sent ones, those that the gateway is known to have read.
        self.frames_read = 0
        #: The task that serves the stream; None while there is none.
        self.stream: asyncio.Task[None] | None = None
        #: Fires when the gateway has been away too long.
        self.grace: asyncio.TimerHandle | None = None
        #: When the next frame may go out that is not urgent, and what wakes the writer then.
        self.due = 0.0
        self.timer: asyncio.TimerHandle | None = None
        #: Seconds between two signs of life, of either end; 0: none are given. And when the core may hear of the gateway's next.
        self.heartbeat_s = 0.0
        self.hear_at = 0.0
        #: Sees that a frame goes out at least every other time it fires; and the frames that had gone when it last did.
        self._beat: asyncio.TimerHandle | None = None
        self._frames_at_beat = 0
        #: The core's news when the gateway was last told of the load.
        self.news_told = -1
        #: Sequence i has counts[i] of tokens, in order; the driver appends to these three itself, once a token.
        self.requests: list[int] = []
        self.counts: list[int] = []
        self.tokens: list[int] = []
        self._logprobs: list[node_pb2.TokenLogprobs] = []
        self._scores: list[node_pb2.PromptScores] = []
        #: Tokens of prompts that they are of.
        self._scored = 0
        self._first_tokens: list[node_pb2.FirstToken] = []
        self._ended: list[node_pb2.Ended] = []
        self._prefetches: list[node_pb2.PrefetchEnded] = []
        #: Pages of the one snapshot under way, before all else; no messages yet, so that they share their hashes with the pool.
        self._pages: deque[KvBatch] = deque()
        self._kv: list[node_pb2.KvBatch] = []
        self._moves: list[node_pb2.Move] = []
        self._leases = LeaseNews()
        #: Hashes pending, those of a snapshot apart.
        self._weight = 0
        #: Bytes of log probabilities and ends that are pending, about.
        self._bytes = 0
        #: Frames that were full before they could go, and the tokens in them.
        self._sealed: deque[node_pb2.NodeFrame] = deque()
        self._sealed_tokens = 0
        self._wake = asyncio.Event()

    @property
    def pending(self) -> bool:
        """True while there is something that must go out now."""
        told = self.requests or self._ended or self._kv or self._pages or self._first_tokens or self._moves or self._leases
        told = told or self._scores or self._prefetches
        return bool(told or self._sealed)

    @property
    def telling(self) -> bool:
        """True while there is something for the gateway's core, which then wants the load with it."""
        return bool(self._first_tokens or self._ended or self._kv or self._pages or self._prefetches)

    @property
    def urgent(self) -> bool:
        """True while somebody waits for a first token or an end."""
        return bool(self._first_tokens or self._ended)

    @property
    def unsent(self) -> int:
        """Tokens, block hashes and ends of prefetches that wait.

        A snapshot does not count: there is one at a time, of what the node holds.
        """
        return len(self.tokens) + self._scored + self._sealed_tokens + self._weight + len(self._prefetches)

    @property
    def full(self) -> bool:
        """True once what is pending is as much as a frame should bring."""
        return self._bytes + TOKEN_BYTES * len(self.tokens) > codec.FRAME_BYTES_MAX

    def add_logprobs(self, request: RequestId, entries: Sequence[TokenLogprobs]) -> None:
        """Add one entry a token."""
        for entry in entries:
            self._bytes += LOGPROBS_BYTES + LOGPROB_BYTES * len(entry.top)
            self._logprobs.append(
                node_pb2.TokenLogprobs(
                    request=request,
                    logprob=entry.logprob,
                    top_tokens=[token for token, _ in entry.top],
                    top_logprobs=[logprob for _, logprob in entry.top],
                )
            )

    def add_scores(self, request: RequestId, scores: PromptScores) -> None:
        """Add log probabilities of a prompt's tokens, of `SCORES_MAX` at most."""
        self._bytes += LOGPROBS_BYTES + LOGPROB_BYTES * (len(scores) + len(scores.top_tokens))
        self._scored += len(scores)
        self._scores.append(
            node_pb2.PromptScores(
                request=request,
                first=scores.first,
                logprobs=scores.logprobs,
                ranks=scores.ranks,
                top_tokens=scores.top_tokens,
                top_logprobs=scores.top_logprobs,
            )
        )

    def add_first_token(self, message: node_pb2.FirstToken) -> None:
        self._first_tokens.append(message)

    def add_ended(self, message: node_pb2.Ended) -> None:
        self._ended.append(message)
        self._bytes += message.ByteSize()

    def add_prefetch_ended(self, message: node_pb2.PrefetchEnded) -> None:
        """Add what became of a prefetch."""
        self._prefetches.append(message)

    def start_over(self, pages: Sequence[KvBatch]) -> None:
        """Tell all that the node holds, in pages, in place of changes and of another snapshot that wait."""
        self._pages = deque(pages)
        self._kv.clear()
        self._weight = 0

    def add_kv(self, messages: Sequence[node_pb2.KvBatch]) -> None:
        """Add changes of holdings; the messages may be shared with other outboxes."""
        self._kv.extend(messages)
        for message in messages:
            self._weight += _weight(message)

    def add_move(self, message: node_pb2.Move) -> None:
        self._moves.append(message)

    def add_lease(self, message: LeaseMessage) -> None:
        """Add what has become of a lease."""
        self._leases.add(message)

    def wake(self) -> None:
        """Have a frame sent as soon as the stream is free."""
        self.cancel_timer()
        self._wake.set()

    def cancel_timer(self) -> None:
        """Let no timer wake the writer."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def start_beating(self, heartbeat_s: float) -> None:
        """Have a frame sent whenever none has been for so long; 0 for never."""
        self.stop_beating()
        if heartbeat_s > 0:
            self.heartbeat_s = max(heartbeat_s, HEARTBEAT_S_MIN)
            self._beat = asyncio.get_running_loop().call_later(self.heartbeat_s, self._on_beat)

    def stop_beating(self) -> None:
        if self._beat is not None:
            self._beat.cancel()
            self._beat = None

    def _on_beat(self) -> None:
        if self.frames_sent == self._frames_at_beat:
            self.wake()
        self._frames_at_beat = self.frames_sent
        self.start_beating(self.heartbeat_s)

    async def awake(self) -> None:
        """Wait for `wake`."""
        await self._wake.wait()
        self._wake.clear()

    def seal(self, frame: node_pb2.NodeFrame) -> None:
        """Keep a frame made of all that was pending: it is full, and what comes up next goes into another."""
        self._sealed.append(frame)
        self._sealed_tokens += _tokens(frame)

    def next_sealed(self) -> node_pb2.NodeFrame | None:
        """Take the oldest full frame out, to be sent; None if there is none."""
        if not self._sealed:
            return None
        frame = self._sealed.popleft()
        self._sealed_tokens -= _tokens(frame)
        self._wake.set()
        return frame

    def take(self, load: Load | None, draining: bool, refused_calls: int = 0) -> node_pb2.NodeFrame:
        """Return what is pending as one frame, in the order in which it must be applied; of changed holdings what it can hold."""
        frame = node_pb2.NodeFrame(
            requests=self.requests,
            counts=self.counts,
            tokens=self.tokens,
            load=codec.load_message(load) if load is not None else None,
            draining=draining,
            refused_calls=refused_calls if load is not None else 0,
        )
        self.requests, self.counts, self.tokens = [], [], []
        self._bytes = 0
        if self._first_tokens:
            frame.first_tokens.extend(self._first_tokens)
            self._first_tokens.clear()
        if self._logprobs:
            frame.logprobs.extend(self._logprobs)
            self._logprobs.clear()
        if self._scores:
            frame.prompt_scores.extend(self._scores)
            self._scores.clear()
            self._scored = 0
        if self._ended:
            frame.ended.extend(self._ended)
            self._ended.clear()
        if self._prefetches:
            frame.ended_prefetches.extend(self._prefetches)
            self._prefetches.clear()
        if self._pages:
            frame.kv.append(codec.kv_message(self._pages.popleft()))
        if self._pages:
            self._wake.set()
        elif self._kv:
            self._take_kv(frame)
        if self._moves:
            frame.moves.extend(self._moves)
            self._moves.clear()
        if self._leases:
            self._leases.add_to(frame, 0)
            if self._leases:
                self._wake.set()
        return frame

    def _take_kv(self, frame: node_pb2.NodeFrame) -> None:
        """Put the oldest changes of holdings into a frame, one at least; a next frame brings what is left."""
        taken = size = 0
        for message in self._kv:
            size += message.ByteSize()
            if taken and size > codec.FRAME_BYTES_MAX:
                break
            taken += 1
            self._weight -= _weight(message)
        frame.kv.extend(self._kv[:taken])
        del self._kv[:taken]
        if self._kv:
            self._wake.set()


def _tokens(frame: node_pb2.NodeFrame) -> int:
    """Return the tokens that a frame brings, and those of prompts that it tells of."""
    return len(frame.tokens) + sum([len(scores.logprobs) for scores in frame.prompt_scores])


def _weight(message: node_pb2.KvBatch) -> int:
    """Return the hashes in a change of holdings."""
    return (len(message.removed) + sum([len(run.hashes) for run in message.stored[:]])) // HASH_BYTES
