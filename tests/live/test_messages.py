"""No message reaches gRPC's limit: prompts of megabytes by the dozen, and half a million blocks told to a gateway that is new."""

import asyncio
import json
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.core.cluster.cluster import NodeView
from orchestrator.core.cluster.following import Trust
from orchestrator.core.config import ClusterConfig, LimitsConfig, SchedulerConfig
from orchestrator.core.events import NodeLost
from orchestrator.core.kvpool import BATCH_HASHES_MAX
from orchestrator.core.types import GatewayId, NodeId, PoolKind
from orchestrator.live.driver import ClusterDriver
from orchestrator.live.links import NodeLink
from orchestrator.live.turns import Turn
from orchestrator.wire import codec, node_pb2
from tests.builders import TRUST
from tests.live.serving import BLOCK_TOKENS, Cluster, Observed, cluster, finish, pool, run, turn
from workers.engines.checkpoint import default_model_path
from workers.engines.vocabulary import write_json

NODE = NodeId("both-0")
BLOCKS = 1 << 19
PROMPT_TOKENS = 1 << 20


def large() -> ClusterConfig:
    """Return a cluster of one node with half a million blocks, whose prompts may fill an eighth of them."""
    small = pool("both", PoolKind.AGGREGATED)
    engine = replace(small.engine, blocks=BLOCKS, context_tokens_max=PROMPT_TOKENS + 64)
    scheduler = SchedulerConfig(step_tokens_max=PROMPT_TOKENS, sequences_max=16, waiting_max=64)
    return ClusterConfig(pools=(replace(small, engine=engine, scheduler=scheduler),), limits=LimitsConfig(request_s_max=300.0))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint without weights whose contexts are as long as anything here asks for."""
    for path in default_model_path().glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"max_position_embeddings": 1 << 26})
    return tmp_path


def long_turn(number: int, tokens: int = PROMPT_TOKENS) -> Turn:
    """Return a turn with a prompt like no other's."""
    return turn(array("I", [number, *range(1, 64)]) * (tokens // 64), 2)


class Measuring(ClusterDriver):
    """A gateway that notes how large frames are and how much each tells of a node's blocks."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.frame_bytes: list[int] = []
        self.told: list[int] = []
        self.pages = 0

    def node_frame(self, node: NodeId, frame: node_pb2.NodeFrame) -> None:
        self.frame_bytes.append(frame.ByteSize())
        self.told += [len(run.hashes) // 16 for batch in frame.kv for run in batch.stored]
        self.pages += sum(batch.page > 0 for batch in frame.kv)
        super().node_frame(node, frame)

    @property
    def view(self) -> NodeView | None:
        return next(iter(self._core.nodes), None)


@asynccontextmanager
async def another_gateway(wire: Cluster) -> AsyncIterator[tuple[Measuring, Observed]]:
    observed = Observed()
    driver = Measuring(GatewayId(1), wire.config, TRUST, observed, wire.failures.append)
    driver.set_nodes(list(wire.addresses.items()))
    try:
        yield driver, observed
    finally:
        await driver.close()


@pytest.mark.slow
def test_a_new_gateway_learns_of_half_a_million_blocks_while_more_come_and_go(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(large(), model) as wire:
            for number in range(8):
                await finish(wire.driver.start(long_turn(number)))
            async with another_gateway(wire) as (late, observed):
                # Half of what is there is pushed out and replaced while the pages are under way.
                for number in range(8, 12):
                    await finish(wire.driver.start(long_turn(number)))
                await observed.until(lambda: late.view is not None and late.view.trust is Trust.EXACT)
                for number in (3, 10):
                    delta = await finish(late.start(long_turn(number)))
                    assert (delta.cached_tokens > PROMPT_TOKENS // 2) is (number == 10)
                assert late.view is not None
                assert late.view.believed_blocks > BLOCKS * 9 // 10
                assert max(late.told) <= BATCH_HASHES_MAX
                assert late.pages > BLOCKS // BATCH_HASHES_MAX // 2
                assert max(late.frame_bytes) < 2 * codec.FRAME_BYTES_MAX
            assert not wire.observed.seen(NodeLost)
            assert not observed.seen(NodeLost)

    run(scenario, 120)


@pytest.mark.slow
def test_more_bytes_of_prompts_than_a_message_takes_go_out_at_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames: list[int] = []
    add = NodeLink._add_submits

    def counted(link: NodeLink, frame: node_pb2.GatewayFrame) -> None:
        add(link, frame)
        frames.append(frame.ByteSize())

    monkeypatch.setattr(NodeLink, "_add_submits", counted)

    async def scenario() -> None:
        async with cluster(large(), model) as wire:
            same = long_turn(1, PROMPT_TOKENS // 2)
            streams = [wire.driver.start(same) for _ in range(32)]
            answers = await asyncio.gather(*(finish(stream) for stream in streams))
            assert [len(answer.tokens) for answer in answers] == [2] * 32
            assert sum(frames) > codec.MESSAGE_BYTES_MAX > 8 * max(frames)
            assert not wire.observed.seen(NodeLost)

    run(scenario, 120)


def test_a_prompt_that_no_message_takes_is_beyond_the_context(model: Path) -> None:
    tokens = codec.prompt_tokens_max(BLOCK_TOKENS)
    size = tokens * 4 + tokens // BLOCK_TOKENS * 16
    assert codec.MESSAGE_BYTES_MAX * 0.74 < size <= codec.MESSAGE_BYTES_MAX * 0.75

    async def scenario() -> None:
        small = pool("both", PoolKind.AGGREGATED)
        endless = replace(small, engine=replace(small.engine, context_tokens_max=1 << 26))
        async with cluster(ClusterConfig(pools=(endless,)), model) as wire:
            (view,) = wire.driver._core.nodes
            assert view.spec.context_tokens_max == tokens

    run(scenario)
