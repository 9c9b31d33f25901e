"""A node's driver: a real core, a scripted engine, gateways as queues."""

import asyncio
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import grpc.aio
import pytest

from orchestrator.core.blocks import extend_hashes, hash_root
from orchestrator.core.commands import Slice
from orchestrator.core.config import SchedulerConfig
from orchestrator.core.types import (
    BlockId,
    CostProfile,
    GatewayId,
    KvBatch,
    Load,
    ModelName,
    NodeId,
    NodeSpec,
    PoolKind,
    PoolName,
    RequestId,
    Sampling,
    request_id,
)
from orchestrator.wire import codec, node_pb2
from tests.builders import TRUST
from workers.driver import DriverLimits, NodeDriver
from workers.engines.base import BeatCounts, EngineDescription, EngineLost, SliceOutput, TokenLogprobs
from workers.memory import PeerMemory
from workers.outbox import Outbox
from workers.transfer import Channels

BLOCKS, BLOCK_TOKENS, VOCABULARY = 32, 4, 100
ROOT = hash_root(b"secret", "weights", "")
GATEWAY, OTHER = GatewayId(1), GatewayId(2)
LOGPROBS = node_pb2.Sampling(logprobs=1)


class ScriptedEngine:
    """Each request's n-th token is n; waits for `go` before each step if it computes."""

    def __init__(self, computes: bool) -> None:
        self.description = EngineDescription(BLOCKS, BLOCK_TOKENS, 64, 64, "plain", VOCABULARY, 64, "weights", "cpu", computes)
        self.pool = None
        self.routing = None
        self.halves = None
        self.drafts = None
        self.beats: BeatCounts | None = None
        self.counts: dict[RequestId, int] = {}
        self.sampling: dict[RequestId, Sampling] = {}
        self.failing: str | None = None
        self.lost = False
        self.stop_after = 1000
        #: How many tokens come in place of a request's n-th.
        self.tokens_at: dict[int, int] = {}
        self.closed = False

    def add(self, request: RequestId, tokens: "array[int]", sampling: Sampling, generated: int = 0) -> None:
        assert request not in self.counts
        self.counts[request] = generated
        self.sampling[request] = sampling

    def forget(self, request: RequestId) -> None:
        del self.counts[request]

    def step(self, slices: Sequence[Slice]) -> list[SliceOutput]:
        if self.lost:
            raise EngineLost("its process has ended")
        if self.failing is not None:
            raise RuntimeError(self.failing)
        return [self._output(part) for part in slices]

    def _output(self, part: Slice) -> SliceOutput:
        if not part.sample:
            return SliceOutput()
        self.counts[part.request] += 1
        count = self.counts[part.request]
        wanted = self.sampling[part.request].logprobs
        logprobs = (TokenLogprobs(-0.5, ((count, -0.5),)),) if wanted is not None else ()
        return SliceOutput((count,) * self.tokens_at.get(count, 1), logprobs, stopped=count >= self.stop_after)

    def pause_s(self, slices: Sequence[Slice], decoding: int) -> float:
        return 0.0

    def read_blocks(self, blocks: Sequence[BlockId], into: memoryview) -> None:
        raise AssertionError

    def write_blocks(self, blocks: Sequence[BlockId], data: memoryview) -> None:
        raise AssertionError

    def close(self) -> None:
        self.closed = True


class Gateway:
    """The far end of a Connect call, and what it has been told."""

    def __init__(self, driver: NodeDriver, id: GatewayId, incarnation: int = 1) -> None:
        self.id = id
        self.hello = node_pb2.Hello(gateway=id, incarnation=incarnation)
        self.driver = driver
        self.incoming: asyncio.Queue[object] = asyncio.Queue()
        self.frames: asyncio.Queue[node_pb2.NodeFrame] = asyncio.Queue()
        self.reading = asyncio.Event()
        self.reading.set()
        self.tokens: dict[int, list[int]] = {}
        self.ended: dict[int, node_pb2.Ended] = {}
        self.first: dict[int, int] = {}
        self.stored: list[bytes] = []
        self.logprobs = 0
        self.load = Load()
        self.loads = 0
        self.draining = False

    async def read(self) -> object:
        return await self.incoming.get()

    async def write(self, message: node_pb2.NodeFrame) -> None:
        await self.reading.wait()
        self.frames.put_nowait(node_pb2.NodeFrame.FromString(message.SerializeToString()))

    async def open(self) -> node_pb2.Welcome:
        self.task = asyncio.ensure_future(self.driver.serve_gateway(self))
        self.incoming.put_nowait(node_pb2.GatewayFrame(hello=self.hello))
        return (await self.next()).welcome

    async def hang_up(self) -> None:
        self.incoming.put_nowait(grpc.aio.EOF)
        await asyncio.wait_for(self.task, 5)

    async def next(self) -> node_pb2.NodeFrame:
        frame = await asyncio.wait_for(self.frames.get(), 5)
        self.hello.frames_received += not frame.HasField("welcome")
        end = 0
        for request, count in zip(frame.requests, frame.counts, strict=True):
            start, end = end, end + count
            self.tokens.setdefault(request, []).extend(frame.tokens[start:end])
        for ended in frame.ended:
            self.ended[ended.request] = ended
        for first in frame.first_tokens:
            self.first[first.request] = first.computed_tokens
        for batch in frame.kv:
            self.stored += [hash for run in batch.stored for hash in codec.hashes_from(run.hashes)]
        self.logprobs += len(frame.logprobs)
        self.loads += frame.HasField("load")
        if frame.HasField("load"):
            self.load = codec.load_from(frame.load)
        self.draining = frame.draining
        # From who is behind with reading, a node holds further frames back.
        self.incoming.put_nowait(node_pb2.GatewayFrame(frames_received=self.hello.frames_received))
        return frame

    async def until(self, done: Callable[[], bool]) -> None:
        while not done():
            await self.next()

    def send(self, *submits: node_pb2.Submit, cancels: Sequence[int] = ()) -> None:
        self.hello.frames_sent += 1
        read = self.hello.frames_received
        self.incoming.put_nowait(node_pb2.GatewayFrame(submits=submits, cancels=cancels, frames_received=read))

    def submit(self, serial: int, prompt: Sequence[int], output_tokens: int, **more: object) -> node_pb2.Submit:
        tokens = array("I", prompt).tobytes()
        return node_pb2.Submit(
            request=request_id(self.id, serial),
            tokens=tokens,
            hashes=b"".join(extend_hashes(ROOT, tokens, BLOCK_TOKENS)),
            hash_root=ROOT,
            output_tokens_max=output_tokens,
            **{"role": node_pb2.ROLE_GENERATE, **more},  # type: ignore[arg-type]
        )


def spec() -> NodeSpec:
    return NodeSpec(
        id=NodeId("n"),
        model=ModelName("m"),
        pool=PoolName("p"),
        kind=PoolKind.AGGREGATED,
        incarnation=1,
        blocks=BLOCKS,
        block_tokens=BLOCK_TOKENS,
        block_bytes=64,
        sequences_max=8,
        step_tokens_max=64,
        context_tokens_max=64,
        profile=CostProfile(),
    )


@asynccontextmanager
async def node(
    computes: bool = False, limits: DriverLimits | None = None, fatal: Callable[[BaseException], None] | None = None
) -> AsyncIterator[tuple[NodeDriver, ScriptedEngine]]:
    engine = ScriptedEngine(computes)

    def broke(error: BaseException) -> None:
        raise AssertionError("the driver broke") from error

    driver = NodeDriver(
        spec(),
        SchedulerConfig(step_tokens_max=64, sequences_max=8, waiting_max=16),
        engine,
        {},
        lambda host: [],
        Channels(2, TRUST),
        PeerMemory(2),
        fatal or broke,
        limits or DriverLimits(load_s=0.01),
    )
    try:
        yield driver, engine
    finally:
        await driver.close()
    assert engine.closed


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))  # type: ignore[arg-type]


@pytest.mark.parametrize("computes", [False, True])
def test_tokens_first_token_and_end_come_in_order(computes: bool) -> None:
    async def scenario() -> None:
        async with node(computes) as (driver, engine):
            gateway = Gateway(driver, GATEWAY)
            welcome = await gateway.open()
            assert codec.spec_from(welcome) == spec()
            assert (welcome.fingerprint, welcome.resumed) == ("weights", False)
            gateway.send(gateway.submit(1, range(6), 5), gateway.submit(2, range(20, 29), 3))
            one, two = request_id(GATEWAY, 1), request_id(GATEWAY, 2)
            await gateway.until(lambda: len(gateway.ended) == 2)
            assert gateway.tokens == {one: [1, 2, 3, 4, 5], two: [1, 2, 3]}
            assert gateway.first == {one: 6, two: 9}
            assert {ended.reason for ended in gateway.ended.values()} == {"length"}
            await gateway.until(lambda: gateway.load.blocks_used == 0)
            await eventually(lambda: not engine.counts)

    run(scenario)


@pytest.mark.parametrize("role", [node_pb2.ROLE_GENERATE, node_pb2.ROLE_PREFILL])
def test_how_long_ago_a_prompt_began_is_told_of_requests_that_are_timed(role: node_pb2.Role) -> None:
    async def scenario() -> None:
        async with node(computes=True) as (driver, _):
            gateway = Gateway(driver, GATEWAY)
            await gateway.open()
            gateway.send(gateway.submit(1, range(6), 2, role=role, timed=True), gateway.submit(2, range(20, 29), 2, role=role))
            began: dict[int, list[float]] = {}
            while len(gateway.ended) < 2:
                frame = await gateway.next()
                for part in (*frame.first_tokens, *frame.ended):
                    began.setdefault(part.request, []).append(part.began_s_ago)
            timed = began[request_id(GATEWAY, 1)]
            assert timed[0] > 0.0
            # Only once, and of the other one never.
            assert [*timed[1:], *began[request_id(GATEWAY, 2)]] == [0.0] * (1 if role == node_pb2.ROLE_PREFILL else 3)
            gateway.send(cancels=[request_id(GATEWAY, 1), request_id(GATEWAY, 2)])

    run(scenario)


def test_a_load_comes_with_news_and_not_with_tokens_alone() -> None:
    async def scenario() -> None:
        async with node(computes=True, limits=DriverLimits(load_s=60.0, frame_s_min=0.0)) as (driver, _):
            gateway = Gateway(driver, GATEWAY)
            await gateway.open()
            gateway.send(gateway.submit(1, range(6), 41))
            frames = 0
            while not gateway.ended:
                frame = await gateway.next()
                frames += 1
                told = bool(frame.first_tokens or frame.ended or frame.kv)
                # One step in four completes a block; the others have nothing to tell a gateway's core.
                assert frame.HasField("load") == told
            assert gateway.loads < frames

    run(scenario)


def test_generated_blocks_continue_the_prompts_chain() -> None:
    async def scenario() -> None:
        async with node() as (driver, _):
            gateway = Gateway(driver, GATEWAY)
            await gateway.open()
            gateway.send(gateway.submit(1, range(10, 16), 9))
            await gateway.until(lambda: bool(gateway.ended))
            # 6 prompt tokens and the generated 1 .. 9, of which the last is never computed: three blocks of four.
            tokens = array("I", [*range(10, 16), *range(1, 9)]).tobytes()
            assert gateway.stored == extend_hashes(ROOT, tokens, BLOCK_TOKENS)

    run(scenario)


def test_a_prompt_shorter_than_a_block_starts_from_the_root() -> None:
    async def scenario() -> None:
        async with node() as (driver, _):
            gateway = Gateway(driver, GATEWAY)
            await gateway.open()
            gateway.send(gateway.submit(1, [7], 5))
            await gateway.until(lambda: bool(gateway.ended))
            assert gateway.stored == extend_hashes(ROOT, array("I", [7, 1, 2, 3]).tobytes(), BLOCK_TOKENS)

    run(scenario)


def test_stop_and_logprobs_travel() -> None:
    async def scenario() -> None:
        async with node() as (driver, engine):
            engine.stop_after = 3
            gateway = Gateway(driver, GATEWAY)
            await gateway.open()
            gateway.send(gateway.submit(1, [7], 9, sampling=node_pb2.Sampling(logprobs=1, top_p=0.5)))
            await gateway.until(lambda: bool(gateway.ended))
            request = request_id(GATEWAY, 1)
            assert gateway.tokens == {request: [1, 2, 3]}
            assert gateway.ended[request].reason == "stop"
            assert gateway.logprobs == 3
            assert (engine.sampling[request].top_p, engine.sampling[request].logprobs) == (0.5, 1)

    run(scenario)


@pytest.mark.parametrize("computes", [False, True])
def test_a_failing_engine_ends_requests_and_not_the_node(computes: bool) -> None:
    async def scenario() -> None:
        async with node(computes) as (driver, engine):
            engine.failing = "out of memory"
            gateway = Gateway(driver, GATEWAY)
            await gateway.open()
            gateway.send(gateway.submit(1, range(6), 5))
            await gateway.until(lambda: bool(gateway.ended))
            ended = gateway.ended[request_id(GATEWAY, 1)]
            assert (ended.reason, ended.message) == ("failed", "RuntimeError: out of memory")
            engine.failing = None
            gateway.send(gateway.submit(2, range(6), 5))
            await gateway.until(lambda: len(gateway.ended) == 2)
            assert len(gateway.tokens[request_id(GATEWAY, 2)]) == 5

    run(scenario)


@pytest.mark.parametrize("count", [0, 3])
def test_an_engine_that_brings_another_number_of_tokens_fails_the_request_and_not_the_node(count: int) -> None:
    async def scenario() -> None:
        async with node(computes=True) as (driver, engine):
            gateway = Gateway(driver, GATEWAY)
            await gateway.open()
            for serial, place in ((1, 1), (2, 3)):  # with the prompt's token, and while it decodes
                request = request_id(GATEWAY, serial)
                engine.tokens_at = {place: count}
                gateway.send(gateway.submit(serial, range(6), 5))
                await gateway.until(lambda request=request: request in gateway.ended)
                ended = gateway.ended[request]
                assert ended.reason == "failed"
                assert ended.message.startswith(f"ScriptedEngine brought {count} tokens for a slice (request {request}, tokens ")
                assert ended.message.endswith("); it must bring 1")
                assert len(gateway.tokens.get(request, ())) == ended.output_tokens == place - 1
            engine.tokens_at = {}
            gateway.send(gateway.submit(3, range(6), 5))
            await gateway.until(lambda: len(gateway.ended) == 3)
            assert len(gateway.tokens[request_id(GATEWAY, 3)]) == 5
            assert driver.load.blocks_used == 0

    run(scenario)


def test_a_cancel_frees_every_block() -> None:
    async def scenario() -> None:
        async with node(computes=True) as (driver, engine):
            gateway = Gateway(driver, GATEWAY)
            await gateway.open()
            gateway.send(*(gateway.submit(serial, range(serial, serial + 8), 40) for serial in range(12)))
            await gateway.until(lambda: len(gateway.tokens) >= 2)
            gateway.send(cancels=[request_id(GATEWAY, serial) for serial in range(12)])
            await gateway.until(lambda: _empty(gateway.load))
            await eventually(lambda: not engine.counts)

    run(scenario)


async def eventually(done: Callable[[], bool]) -> None:
    """Let the loop turn until something holds that nobody announces; the test's own limit bounds it."""
    while not done():  # noqa: ASYNC110
        await asyncio.sleep(0)


def _empty(load: Load) -> bool:
    return load.running == load.waiting == load.blocks_used == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": b"abc"}, "3 bytes of tokens"),
        ({"hashes": b""}, "fill 1 blocks, not 0"),
        ({"hashes": bytes(15)}, "15 bytes"),
        ({"role": node_pb2.ROLE_UNSPECIFIED}, "role 0"),
        ({"tokens": array("I", [1, 2, 3, VOCABULARY]).tobytes()}, "token 100 is beyond the vocabulary of 100"),
        ({"tokens": array("I", [1] * 2000 + [VOCABULARY]).tobytes(), "hashes": bytes(500 * 16)}, "token 100 is beyond"),
        ({"sampling": node_pb2.Sampling(logit_bias={VOCABULARY: 1.0})}, "token 100"),
        ({"sampling": node_pb2.Sampling(stop_token_ids=[500])}, "token 500"),
        ({"sampling": node_pb2.Sampling(allowed_token_ids=[1, 500])}, "token 500"),
        ({"sampling": node_pb2.Sampling(forbidden_runs=[node_pb2.TokenRun(tokens=[1, 500])])}, "token 500"),
        ({"sampling": node_pb2.Sampling(thoughts=node_pb2.ThoughtsLimit(begin=[1], instead=2))}, "thoughts that begin again"),
        ({"request": request_id(OTHER, 1)}, "is not gateway 1's"),
    ],
)
def test_what_the_engine_would_choke_on_is_refused(change: dict[str, object], message: str) -> None:
    async def scenario() -> None:
        async with node() as (driver, engine):
            gateway, other = Gateway(driver, GATEWAY), Gateway(driver, OTHER)
            await gateway.open()
            await other.open()
            submit = gateway.submit(1, range(4), 5)
            for name, value in change.items():
                if isinstance(value, node_pb2.Sampling):
                    submit.sampling.CopyFrom(value)
                else:
                    setattr(submit, name, value)
            gateway.send(submit)
            asked = other if "request" in change else gateway
            await asked.until(lambda: bool(asked.ended))
            ended = asked.ended[submit.request]
            assert ended.reason == "failed"
            assert message in ended.message
            assert engine.counts == {}

    run(scenario)


def test_a_slow_gateway_gets_one_merged_frame() -> None:
    async def scenario() -> None:
        async with node() as (driver, _):
            gateway = Gateway(driver, GATEWAY)
            await gateway.open()
            gateway.reading.clear()
            gateway.send(gateway.submit(1, range(6), 30))
            await eventually(lambda: driver.load.blocks_cached > 0 and _empty(driver.load))
            gateway.reading.set()
            frames = 0
            while not gateway.ended:
                await gateway.next()
                frames += 1
            # One was on its way when the gateway stopped reading; the other has all the rest.
            assert frames == 2
            assert gateway.tokens[request_id(GATEWAY, 1)] == list(range(1, 31))

    run(scenario)


def test_a_gateway_that_never_reads_is_lost() -> None:
    async def scenario() -> None:
        async with node(limits=DriverLimits(unsent_max=10)) as (driver, engine):
            gateway = Gateway(driver, GATEWAY)
            await gateway.open()
            gateway.reading.clear()
            gateway.send(gateway.submit(1, range(6), 50))
            with pytest.raises(asyncio.CancelledError):
                await gateway.task
            assert driver.load.running == driver.load.blocks_used == 0
            assert engine.counts == {}

    run(scenario)


def test_a_gateway_that_comes_back_in_time_misses_nothing() -> None:
    async def scenario() -> None:
        async with node() as (driver, _):
            gateway = Gateway(driver, GATEWAY)
            await gateway.open()
            gateway.send(gateway.submit(1, range(6), 20))
            await gateway.hang_up()
            await eventually(lambda: _empty(driver.load))
            while not gateway.frames.empty():
                await gateway.next()
            welcome = await gateway.open()
            assert welcome.resumed
            await gateway.until(lambda: bool(gateway.ended))
            assert gateway.tokens[request_id(GATEWAY, 1)] == list(range(1, 21))

    run(scenario)


def test_what_waits_for_a_gateway_goes_out_in_frames_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "FRAME_BYTES_MAX", 400)

    async def scenario() -> None:
        async with node() as (driver, engine):
            gateway = Gateway(driver, GATEWAY)
            await gateway.open()
            gateway.reading.clear()
            gateway.send(*(gateway.submit(number, range(number, number + 6), 50, sampling=LOGPROBS) for number in (1, 2)))
            await eventually(lambda: not engine.counts)
            gateway.reading.set()
            sizes: list[int] = []
            while len(gateway.ended) < 2:
                frame = await gateway.next()
                sizes.append(frame.ByteSize())
                # A token's log probabilities come with it.
                assert len(frame.logprobs) == len(frame.tokens)
            # What one step brings is not cut, nor is a change of holdings.
            assert max(sizes) < 2 * 400
            assert len(sizes) > 5
            assert gateway.tokens == {request_id(GATEWAY, number): list(range(1, 51)) for number in (1, 2)}
            assert sorted(gateway.first.values()) == [6, 6]

    run(scenario)


def test_a_snapshot_goes_page_by_page_before_what_came_after_it() -> None:
    outbox = Outbox(GATEWAY, 1)
    pages = [KvBatch(5, cleared=page == 0, snapshot=1, page=page, more=page < 2) for page in range(3)]
    outbox.add_kv([node_pb2.KvBatch(sequence=5, removed=bytes(16))])
    outbox.start_over(pages)
    outbox.add_kv([node_pb2.KvBatch(sequence=6), node_pb2.KvBatch(sequence=7)])
    frames = [list(outbox.take(None, False).kv) for _ in range(3)]
    told = [[(batch.sequence, batch.page) for batch in frame] for frame in frames]
    # What waited before is in the snapshot.
    assert told == [[(5, 0)], [(5, 1)], [(5, 2), (6, 0), (7, 0)]]
    assert (outbox.pending, outbox.unsent) == (False, 0)


def test_a_snapshot_takes_the_place_of_one_under_way() -> None:
    outbox = Outbox(GATEWAY, 1)
    for snapshot in (1, 2, 3):
        outbox.start_over([KvBatch(5, cleared=page == 0, snapshot=snapshot, page=page, more=page < 1) for page in range(2)])
        outbox.add_kv([node_pb2.KvBatch(sequence=6, removed=bytes(160))])
        (batch,) = outbox.take(None, False).kv
        assert (batch.snapshot, batch.page, outbox.unsent) == (snapshot, 0, 10)
    assert [batch.sequence for batch in outbox.take(None, False).kv] == [5, 6]


@pytest.mark.parametrize("change", ["incarnation", "frames_sent", "frames_received"])
def test_a_gateway_that_lost_something_starts_anew(change: str) -> None:
    async def scenario() -> None:
        async with node(computes=True) as (driver, _):
            gateway = Gateway(driver, GATEWAY)
            await gateway.open()
            gateway.send(gateway.submit(1, range(6), 40))
            await gateway.until(lambda: bool(gateway.tokens))
            await gateway.hang_up()
            while not gateway.frames.empty():  # sent before it hung up: not lost
                await gateway.next()
            again = Gateway(driver, GATEWAY)
            again.hello.CopyFrom(gateway.hello)
            # More than the frames that may have been on their way.
            setattr(again.hello, change, getattr(again.hello, change) + 1000)
            assert not (await again.open()).resumed
            await again.until(lambda: _empty(again.load))
            assert again.tokens == {}

    run(scenario)


def test_a_gateway_that_stays_away_is_lost() -> None:
    async def scenario() -> None:
        async with node(limits=DriverLimits(gateway_lost_s=0.0)) as (driver, engine):
            gateway = Gateway(driver, GATEWAY)
            await gateway.open()
            gateway.send(gateway.submit(1, range(6), 40))
            await gateway.next()
            await gateway.hang_up()
            await eventually(lambda: not engine.counts)
            assert _empty(driver.load)

    run(scenario)


def test_a_gateway_that_hangs_is_lost_and_one_that_answers_is_not() -> None:
    async def scenario() -> None:
        async with node() as (driver, _):
            hung, well = Gateway(driver, GATEWAY), Gateway(driver, OTHER)
            for gateway in (hung, well):
                gateway.hello.heartbeat_s = 0.02
                await gateway.open()
                # Held for a decode node for half a minute.
                submit = gateway.submit(1, [gateway.id] * 6, 1)
                submit.role = node_pb2.ROLE_PREFILL
                gateway.send(submit)
                await gateway.until(lambda gateway=gateway: bool(gateway.ended))
            assert driver.load.blocks_used == 4
            while not hung.task.done():
                await well.next()
                well.incoming.put_nowait(node_pb2.GatewayFrame(frames_received=well.hello.frames_received))
            assert driver.load.blocks_used == 2
            assert not well.task.done()

    run(scenario)


def test_draining_refuses_new_requests_and_waits_for_the_others() -> None:
    async def scenario() -> None:
        async with node(computes=True) as (driver, _):
            gateway = Gateway(driver, GATEWAY)
            await gateway.open()
            gateway.send(gateway.submit(1, range(6), 30))
            await gateway.until(lambda: bool(gateway.tokens))
            drain = asyncio.ensure_future(driver.drain())
            await gateway.until(lambda: gateway.draining)
            gateway.send(gateway.submit(2, range(6), 30))
            await gateway.until(lambda: len(gateway.ended) == 2)
            await asyncio.wait_for(drain, 5)
            assert gateway.ended[request_id(GATEWAY, 2)].message == "draining"
            assert len(gateway.tokens[request_id(GATEWAY, 1)]) == 30

    run(scenario)


def test_two_gateways_get_their_own_tokens_and_both_hear_of_holdings() -> None:
    async def scenario() -> None:
        async with node() as (driver, _):
            one, two = Gateway(driver, GATEWAY), Gateway(driver, OTHER)
            await one.open()
            await two.open()
            one.send(one.submit(1, range(8), 4))
            two.send(two.submit(1, range(50, 58), 4))
            await one.until(lambda: len(one.stored) == 4 and bool(one.ended))
            await two.until(lambda: len(two.stored) == 4 and bool(two.ended))
            assert list(one.tokens) == [request_id(GATEWAY, 1)]
            assert list(two.tokens) == [request_id(OTHER, 1)]
            assert one.stored == two.stored

    run(scenario)


def test_a_node_whose_engine_is_lost_ends() -> None:
    async def scenario() -> None:
        ended: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        async with node(computes=True, fatal=ended.set_result) as (driver, engine):
            engine.lost = True
            gateway = Gateway(driver, GATEWAY)
            await gateway.open()
            gateway.send(gateway.submit(1, range(6), 5))
            assert str(await ended) == "its process has ended"

    run(scenario)


def test_how_the_beat_is_kept_goes_along_with_the_load() -> None:
    async def scenario() -> None:
        async with node() as (driver, engine):
            gateway = Gateway(driver, GATEWAY)
            await gateway.open()
            engine.beats = BeatCounts(70, 2, 0.5)
            gateway.send(gateway.submit(1, range(6), 1))
            await gateway.until(lambda: bool(gateway.ended) and gateway.loads > 0)
            load = gateway.load
            assert (load.beats, load.beats_missed, load.beat_late_s) == (70, 2, 0.5)

    run(scenario)
