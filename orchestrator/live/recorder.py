"""Writes down what a live gateway served, as a trace that `weft simulate` reads: lengths, times and prefixes, no text.

One line a generation that brought tokens (fields: `orchestrator/traces/schema.py`), in order of arrival. The gateway only
takes the times; naming blocks, sorting and writing are done by a thread, and serving never waits for it:

    watch() .. delivered() .. ended()  ->  queue  ->  thread: names its blocks, holds it until all that arrived before have ended

A turn waits for the latest of its session that had ended when it came. The gateway sees no more of what agents wait for.
"""

import logging
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import BinaryIO

import msgspec

from orchestrator.core.config import ClusterConfig
from orchestrator.core.types import DEFAULT_TENANT, BlockHash, FinishReason, GatewayId, ModelName, RequestId, SessionId, TenantId
from orchestrator.live.choices import TurnWatch
from orchestrator.live.turns import Turn
from orchestrator.traces.schema import END_TURN, TOOL_USE
from orchestrator.traces.turns import Runs, cut, merged

log = logging.getLogger("weft.recorder")

#: Generations that ended and that the thread has not got to yet; more are left out.
QUEUED_MAX = 4096
#: Lines that wait for an earlier request to end; with one more, that request is left out.
KEPT_MAX = 65_536
#: Sessions whose latest turn is known.
SESSIONS_MAX = 65_536
#: Sessions whose chain of names is kept, and blocks that are known by name; older ones get new names when they come again.
CHAINS_MAX = 4096
NAMES_MAX = 1 << 19
#: Starts of one gateway that find a name for their file.
STARTS_MAX = 1000

SessionKey = tuple[TenantId, SessionId]


def record_path(file: Path, gateway: GatewayId) -> Path:
    """Return the file of a gateway: the first has the given name, the others add their numbers."""
    return file if gateway == 0 else file.with_name(f"{file.name}.{gateway}")


def open_recorder(config: ClusterConfig, gateway: GatewayId) -> "Recorder | None":
    """Start a gateway's recording where the configuration says; None if it does not. Raises `OSError`.

    A gateway that was started again after a failure writes a file of its own, ending in `.again1` and so on.
    """
    if not config.cluster.record:
        return None
    first = record_path(Path(config.cluster.record), gateway)
    sizes = {ModelName(name): config.pools_of(name)[0].engine.block_tokens for name in config.models}
    for again in range(STARTS_MAX):
        path = first if not again else first.with_name(f"{first.name}.again{again}")
        try:
            return Recorder(path, sizes)
        except FileExistsError:
            continue
    raise FileExistsError(f"{first}: is there already, and so are {STARTS_MAX - 1} more")


@dataclass(frozen=True, slots=True)
class _Ended:
    """One generation, for the thread."""

    number: int
    turn: Turn
    arrived_s: float
    first_token_s: float
    ended_s: float
    output_tokens: int
    #: Why it ended, or what the model waits for now.
    stop: str
    #: Number and end of the turn before in the session.
    before: tuple[int, float] | None


class _Watch:
    """Takes one generation's times and passes everything on."""

    __slots__ = ("_arrived_s", "_before", "_first_token_s", "_inner", "_number", "_recorder", "_tokens", "_turn")

    def __init__(self, recorder: "Recorder", number: int, turn: Turn, before: tuple[int, float] | None, inner: TurnWatch) -> None:
        self._recorder = recorder
        self._number = number
        self._turn = turn
        self._before = before
        self._inner = inner
        self._tokens = 0
        self._arrived_s = self._first_token_s = recorder.now

    def assigned(self, request: RequestId) -> None:
        self._inner.assigned(request)

    def delivered(self, tokens: int) -> None:
        self._inner.delivered(tokens)
        if tokens and not self._tokens:
            self._first_token_s = self._recorder.now
        self._tokens += tokens

    def ended(self, reason: FinishReason, wanted: str | None = None) -> None:
        self._inner.ended(reason, wanted)
        if not self._tokens:
            self._recorder.skip(self._number)
            return
        stop = reason if wanted is None else TOOL_USE if wanted else END_TURN
        times = self._arrived_s, self._first_token_s, self._recorder.now
        self._recorder.take(_Ended(self._number, self._turn, *times, self._tokens, stop, self._before))


class Recorder:
    """One gateway's recording. Belongs to the gateway's loop, but for the thread's part.

    Args:
        path: must not be there yet.
        block_tokens: tokens of a block of each model.
        clock: seconds, only ever more.
    """

    def __init__(self, path: Path, block_tokens: Mapping[ModelName, int], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started_s = clock()
        self._number = 0
        #: Number and end of each session's latest turn that is recorded, longest unused first.
        self._latest: OrderedDict[SessionKey, tuple[int, float]] = OrderedDict()
        self._queue: SimpleQueue[_Ended | int | None] = SimpleQueue()
        self._left_out = 0
        self._lines = _Lines(path, path.open("xb"), block_tokens)
        self._thread = Thread(target=self._lines.work, args=(self._queue,), name="recorder", daemon=True)
        self._thread.start()

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started_s

    def watch(self, turn: Turn, inner: TurnWatch) -> TurnWatch:
        """Record a generation that begins now; `inner` is told everything, too."""
        number, self._number = self._number, self._number + 1
        key = _key(turn)
        return _Watch(self, number, turn, self._latest.get(key) if key is not None else None, inner)

    def take(self, ended: _Ended) -> None:
        """Record a generation that has ended; it is left out if the thread is far behind."""
        if self._queue.qsize() >= QUEUED_MAX:
            if not self._left_out:
                log.warning("the recording does not keep up; generations are left out")
            self._left_out += 1
            self.skip(ended.number)
            return
        key = _key(ended.turn)
        if key is not None:
            self._latest[key] = ended.number, ended.ended_s
            self._latest.move_to_end(key)
            if len(self._latest) > SESSIONS_MAX:
                self._latest.popitem(last=False)
        self._queue.put(ended)

    def skip(self, number: int) -> None:
        """Leave a generation out."""
        self._queue.put(number)

    def close(self) -> None:
        """Write what has ended and close the file; waits for the disk. Harmless to repeat."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
            if self._left_out:
                log.warning("%d generations are not in the recording", self._left_out)


def _key(turn: Turn) -> SessionKey | None:
    return (turn.tenant, turn.session) if turn.session is not None else None


# --- the thread's part ------------------------------------------------------------------------------------------------


class _Lines:
    """Makes lines of generations and writes them in order of arrival."""

    def __init__(self, path: Path, file: BinaryIO, block_tokens: Mapping[ModelName, int]) -> None:
        self._path = path
        self._file = file
        self._sizes = block_tokens
        #: All lines of a file have one block size, into which every model's goes.
        self._block_tokens = lcm(*block_tokens.values())
        self._names = BlockNamer()
        self._encoder = msgspec.json.Encoder()
        #: Lines that cannot be written yet; None for a generation that is left out.
        self._kept: dict[int, bytes | None] = {}
        self._next = 0
        #: Requests that took so long that others were written before them; nothing may wait for them.
        self._given_up: set[int] = set()

    def work(self, queue: SimpleQueue[_Ended | int | None]) -> None:
        """Write what comes until there is no more; after a failed write it is dropped, so that nobody waits."""
        item = queue.get()
        try:
            with self._file:
                while item is not None:
                    self._add(item)
                    if queue.empty():
                        self._file.flush()
                    item = queue.get()
                # What never ended is left out.
                for number in sorted(self._kept):
                    self._file.write(self._kept[number] or b"")
        except OSError as error:
            log.warning("recording %s ends early: %s", self._path, error.strerror)
        while item is not None:
            item = queue.get()

    def _add(self, item: _Ended | int) -> None:
        number, line = (item, None) if isinstance(item, int) else (item.number, self._line(item))
        if number in self._given_up:
            return
        self._kept[number] = line
        if len(self._kept) > KEPT_MAX and self._next not in self._kept:
            self._given_up.add(self._next)
            self._kept[self._next] = None
        while self._next in self._kept:
            self._file.write(self._kept.pop(self._next) or b"")
            self._next += 1

    def _line(self, ended: _Ended) -> bytes:
        turn = ended.turn
        before = ended.before if ended.before is not None and ended.before[0] not in self._given_up else None
        fields = {
            "timestamp": round(ended.arrived_s * 1e3, 3),
            "id": ended.number,
            "session": _session_name(turn),
            "agent": "main",
            "input_length": turn.prompt.count,
            "output_length": ended.output_tokens,
            "block_size": self._block_tokens,
            "hash_ranges": self._blocks(turn),
            "deps": [before[0]] if before is not None else [],
            "gap_ms": round((ended.arrived_s - before[1]) * 1e3, 3) if before is not None else 0,
            "ttft_ms": round((ended.first_token_s - ended.arrived_s) * 1e3, 3),
            "api_ms": round((ended.ended_s - ended.arrived_s) * 1e3, 3),
            "model": turn.sampling.adapter or turn.model,
            "tenant": turn.tenant,
            "stop": ended.stop,
        }
        return self._encoder.encode(fields) + b"\n"

    def _blocks(self, turn: Turn) -> Runs:
        """Return the names of a prompt's blocks; a larger block has the hash of its last part, which covers all before it."""
        parts = self._block_tokens // self._sizes[turn.model]
        hashes = turn.prompt.hashes if parts == 1 else turn.prompt.hashes[parts - 1 :: parts]
        return self._names.runs(_key(turn), hashes)


def _session_name(turn: Turn) -> str | None:
    """Return a session's name; those of different tenants are different sessions."""
    return turn.session if turn.session is None or turn.tenant == DEFAULT_TENANT else f"{turn.tenant}/{turn.session}"


class BlockNamer:
    """Numbers blocks as they turn up, so that what follows each other has mostly neighbouring numbers."""

    def __init__(self) -> None:
        #: A block's number and that of the block before it, oldest first.
        self._known: dict[BlockHash, tuple[int, int]] = {}
        self._next = 1
        #: Each session's latest chain with its numbers, longest unused first: what comes next mostly begins alike.
        self._chains: OrderedDict[SessionKey, tuple[Sequence[BlockHash], Runs]] = OrderedDict()

    def runs(self, session: SessionKey | None, hashes: Sequence[BlockHash]) -> Runs:
        """Return the runs of a chain's numbers. Equal chains get equal ones unless they were forgotten in between."""
        former, numbers = self._chains.get(session, ((), ())) if session is not None else ((), ())
        shared = _shared(former, hashes)
        kept = cut(numbers, shared)
        before = kept[-1][0] + kept[-1][1] - 1 if kept else 0
        added: list[tuple[int, int]] = []
        for block in hashes[shared:]:
            before = self._number(block, before)
            added.append((before, 1))
        runs = merged((*kept, *added))
        if session is not None:
            self._chains[session] = hashes, runs
            self._chains.move_to_end(session)
            if len(self._chains) > CHAINS_MAX:
                self._chains.popitem(last=False)
        return runs

    def _number(self, block: BlockHash, before: int) -> int:
        """Return a block's number behind the one numbered `before`; a block whose prefix got a new number gets one, too."""
        found = self._known.get(block)
        if found is not None and found[1] == before:
            return found[0]
        self._known.pop(block, None)
        number, self._next = self._next, self._next + 1
        self._known[block] = number, before
        if len(self._known) > NAMES_MAX:
            del self._known[next(iter(self._known))]
        return number


def _shared(former: Sequence[BlockHash], hashes: Sequence[BlockHash]) -> int:
    """Return how many first blocks two chains have in common; equal hashes have equal hashes before them."""
    return bisect_left(range(min(len(former), len(hashes))), True, key=lambda place: former[place] != hashes[place])
