"""A link to a node: joining, breaking, coming back with nothing lost, or telling that something was."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from orchestrator.core.events import GatewayHeard, NodeEvent
from orchestrator.core.types import (
    Assignment,
    CostProfile,
    GatewayId,
    NodeId,
    NodeSpec,
    PoolKind,
    Role,
    Sampling,
    request_id,
)
from orchestrator.live.links import NodeLink
from orchestrator.wire import codec, node_pb2
from tests.builders import TRUST
from tests.live.serving import pool, run, turn
from workers.engines.checkpoint import default_model_path
from workers.memory import host_id
from workers.server import NodeServer

NODE = NodeId("both-0")
GATEWAY = GatewayId(4)


class Relay:
    """A TCP relay before a node, so that a test can cut the wire."""

    def __init__(self, address: str) -> None:
        self._host, port = address.rsplit(":", 1)
        self._port = int(port)
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self.refusing = False

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.close()
            return
        far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        self._writers |= {writer, far_writer}
        for source, target in ((reader, far_writer), (far_reader, writer)):
            pump = asyncio.ensure_future(self._pump(source, target))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                target.write(data)
        except ConnectionError:
            pass
        finally:
            target.close()

    def cut(self) -> None:
        """Break every connection."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def close(self) -> None:
        self.cut()
        self._server.close()
        if self._pumps:
            await asyncio.wait(self._pumps)


@dataclass
class Sink:
    """Keeps what a link reports."""

    story: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    fit: bool = True
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, what: str) -> None:
        self.story.append(what)
        self.changed.set()

    def node_joined(self, spec: NodeSpec, fingerprint: str) -> bool:
        self.tell(f"joined {spec.incarnation}" if self.fit else "unfit")
        return self.fit

    def node_lost(self, node: NodeId, reason: str) -> None:
        self.tell("lost")

    def node_draining(self, node: NodeId) -> None:
        self.tell("draining")

    def node_frame(self, node: NodeId, frame: node_pb2.NodeFrame) -> None:
        self.tokens += frame.tokens
        self.ended += [ended.reason for ended in frame.ended]
        self.changed.set()

    async def until(self, *story: str) -> None:
        while self.story != list(story):
            assert len(self.story) <= len(story), self.story
            await self.change()

    async def until_ended(self) -> None:
        while not self.ended:
            await self.change()

    async def until_tokens(self) -> None:
        while not self.tokens:
            await self.change()

    async def change(self) -> None:
        self.changed.clear()
        await asyncio.wait_for(self.changed.wait(), 10)


@dataclass
class Linked:
    link: NodeLink
    sink: Sink
    relay: Relay
    server: NodeServer

    async def away(self) -> None:
        """Wait until the link knows that its stream is gone; nothing announces that."""
        while self.link._away is None:  # noqa: ASYNC110
            await asyncio.sleep(0)

    def submit(self, output_tokens: int, source: NodeSpec | None = None, source_tokens: int = 0) -> codec.Submission:
        prompt = turn(range(20), output_tokens).prompt
        assignment = Assignment(
            request=request_id(GATEWAY, 1),
            role=Role.GENERATE,
            prompt_tokens=prompt.count,
            hashes=prompt.hashes,
            output_tokens_max=output_tokens,
            source=source.id if source is not None else None,
            source_tokens=source_tokens,
            source_pending=source is not None,
        )
        submission = codec.Submission(assignment, prompt.tokens, prompt.hash_root, Sampling(), source=source)
        self.link.submit(submission)
        return submission


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return default_model_path()


@asynccontextmanager
async def linked(model_dir: Path, lost_s: float = 10.0, fit: bool = True, step_s: float = 0.0) -> AsyncIterator[Linked]:
    server = NodeServer(pool("both", PoolKind.AGGREGATED, profile=CostProfile(step_s=step_s)), [NODE], 7, model_dir, TRUST)
    relay = Relay(await server.start())
    sink = Sink(fit=fit)
    link = NodeLink(NODE, await relay.start(), GATEWAY, 1, sink, lost_s, TRUST)
    link.start()
    try:
        yield Linked(link, sink, relay, server)
    finally:
        await link.close()
        await relay.close()
        await server.stop()


def test_a_cut_that_loses_nothing_is_mended_in_silence(model_dir: Path) -> None:
    async def scenario() -> None:
        async with linked(model_dir) as wire:
            await wire.sink.until("joined 7")
            wire.submit(3)
            await wire.sink.until_ended()
            wire.sink.ended.clear()
            wire.relay.cut()
            await wire.away()
            # What is said while the stream is down goes out when it is up again.
            wire.submit(5)
            await wire.sink.until_ended()
            assert wire.sink.story == ["joined 7"]
            assert len(wire.sink.tokens) == 8

    run(scenario)


def test_a_node_that_stays_away_is_lost_once_and_joins_again(model_dir: Path) -> None:
    async def scenario() -> None:
        async with linked(model_dir, lost_s=0.1) as wire:
            await wire.sink.until("joined 7")
            wire.relay.refusing = True
            wire.relay.cut()
            await wire.sink.until("joined 7", "lost")
            assert wire.link.spec is None
            wire.relay.refusing = False
            await wire.sink.until("joined 7", "lost", "joined 7")
            wire.submit(3)
            await wire.sink.until_ended()

    run(scenario)


def test_frames_lost_with_the_stream_are_noticed(model_dir: Path) -> None:
    async def scenario() -> None:
        async with linked(model_dir, step_s=0.002) as wire:
            await wire.sink.until("joined 7")
            wire.submit(4000)
            await wire.sink.until_tokens()
            # As if a frame had been under way when the wire broke.
            wire.link._hello.frames_received -= 1
            wire.relay.cut()
            await wire.sink.until("joined 7", "lost", "joined 7")
            while wire.server.stats[NODE].blocks_used:
                await wire.sink.change()

    run(scenario)


def test_giving_up_reports_at_once(model_dir: Path) -> None:
    async def scenario() -> None:
        async with linked(model_dir) as wire:
            await wire.sink.until("joined 7")
            wire.link.give_up("its process is dead")
            wire.link.give_up("its process is dead")
            assert wire.sink.story == ["joined 7", "lost"]

    run(scenario)


def test_a_submit_that_has_not_gone_out_is_taken_back(model_dir: Path) -> None:
    async def scenario() -> None:
        async with linked(model_dir) as wire:
            await wire.sink.until("joined 7")
            wire.submit(3)
            wire.link.cancel(request_id(GATEWAY, 1))
            wire.submit(2)
            await wire.sink.until_ended()
            assert wire.sink.ended == ["length"]
            assert len(wire.sink.tokens) == 2

    run(scenario)


def test_a_submit_that_has_not_gone_out_forgets_a_source_that_is_lost(model_dir: Path) -> None:
    async def scenario() -> None:
        async with linked(model_dir) as wire:
            await wire.sink.until("joined 7")
            spec = wire.link.spec
            assert spec is not None
            submission = wire.submit(3, source=replace(spec, id=NodeId("gone"), address="127.0.0.1:1"))
            request = submission.assignment.request
            wire.link.source_lost(request, NodeId("another"))
            assert submission.assignment.source == "gone"
            wire.link.source_lost(request, NodeId("gone"))
            told = node_pb2.Submit()
            codec.write_submit(told, submission)
            assert (told.source, told.source_address, told.source_pending) == ("", "", False)
            await wire.sink.until_ended()
            assert wire.sink.ended == ["length"]

    run(scenario)


def test_a_node_that_reads_from_a_source_which_says_nothing_computes_when_told_that_it_is_lost(model_dir: Path) -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            silent.setblocking(False)
            await tell_reader(model_dir, silent)

    async def tell_reader(model_dir: Path, silent: socket.socket) -> None:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        async with linked(model_dir) as wire:
            await wire.sink.until("joined 7")
            spec = wire.link.spec
            assert spec is not None
            wire.submit(3, replace(spec, id=NodeId("hung"), address=address, host=host_id()), 20)
            connection, _ = await asyncio.get_running_loop().sock_accept(silent)
            with connection:
                assert wire.sink.ended == []
                wire.link.source_lost(request_id(GATEWAY, 1), NodeId("hung"))
                await wire.sink.until_ended()
            assert wire.sink.ended == ["length"]
            assert len(wire.sink.tokens) == 3

    run(scenario)


def test_a_gateway_that_has_nothing_to_say_gives_signs_of_life(model_dir: Path) -> None:
    async def scenario() -> None:
        async with linked(model_dir, lost_s=0.3) as wire:
            await wire.sink.until("joined 7")
            driver = wire.server.drivers[NODE]
            heard: list[GatewayHeard] = []
            handle = driver.handle

            def listen(event: NodeEvent) -> None:
                heard.extend([event] if isinstance(event, GatewayHeard) else [])
                wire.sink.changed.set()
                handle(event)

            driver.handle = listen  # type: ignore[method-assign]
            while len(heard) < 2:
                await wire.sink.change()
            assert {event.gateway for event in heard} == {GATEWAY}
            assert wire.sink.story == ["joined 7"]

    run(scenario)


def test_an_unfit_node_is_not_used(model_dir: Path) -> None:
    async def scenario() -> None:
        async with linked(model_dir, fit=False) as wire:
            await wire.sink.until("unfit", "unfit")
            assert wire.link.spec is None
            assert wire.sink.tokens == []

    run(scenario)


def test_draining_is_told_once(model_dir: Path) -> None:
    async def scenario() -> None:
        async with linked(model_dir) as wire:
            await wire.sink.until("joined 7")
            assert await wire.server.drain(5)
            await wire.sink.until("joined 7", "draining")

    run(scenario)
