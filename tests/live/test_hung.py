"""A node process that hangs keeps its sockets: gateways notice its silence, and what waited for it goes elsewhere."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from orchestrator.core.commands import Assign, ReportSourceLost, Restart, Resume
from orchestrator.core.config import ClusterConfig
from orchestrator.core.events import NodeJoined, NodeLost
from orchestrator.core.types import CostProfile, NodeId, PoolKind, Role
from tests.builders import some
from tests.live.serving import Cluster, cluster, finish, patient, pool, run, split, turn
from workers.engines.checkpoint import default_model_path

LOST_S = 0.6
#: A node process of its own: kind, id and seconds of a step come as arguments; its address goes to standard output.
NODE = """
import asyncio, sys
from orchestrator.core.types import CostProfile, NodeId, PoolKind
from tests.builders import TRUST
from tests.live.serving import pool
from workers.engines.checkpoint import default_model_path
from workers.server import NodeServer

async def serve(kind, node, step_s):
    settings = pool(node.rsplit("-", 1)[0], PoolKind(kind), profile=CostProfile(step_s=float(step_s)))
    server = NodeServer(settings, [NodeId(node)], 1, default_model_path(), TRUST)
    print(await server.start(), flush=True)
    await server.wait()

asyncio.run(serve(*sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return default_model_path()


@asynccontextmanager
async def process(served: Cluster, kind: PoolKind, node: NodeId, step_s: float) -> AsyncIterator[asyncio.subprocess.Process]:
    """Let a node of its own process join a cluster."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", NODE, kind, node, str(step_s), stdout=asyncio.subprocess.PIPE, env=environment
    )
    try:
        assert child.stdout is not None
        served.addresses[node] = (await child.stdout.readline()).decode().strip()
        served.driver.set_nodes([(known, served.addresses[known]) for known in (*served.servers, node)])
        await served.observed.until(lambda: node in served.observed.loads)
        yield child
    finally:
        served.driver.mark_dead(node)
        child.kill()
        await child.wait()


@pytest.mark.slow
def test_requests_of_a_node_that_hangs_go_elsewhere_and_it_may_come_back(model_dir: Path) -> None:
    async def scenario() -> None:
        config = patient(ClusterConfig(pools=(pool("both", PoolKind.AGGREGATED, 1, profile=CostProfile(step_s=0.005)),)), LOST_S)
        async with cluster(config, model_dir) as served:
            observed, hung = served.observed, NodeId("both-1")
            async with process(served, PoolKind.AGGREGATED, hung, step_s=30.0) as child:
                streams = []
                while not any(command.node == hung for command in observed.seen(Assign)):
                    streams.append(served.driver.start(turn([len(streams)] * 40, 5)))
                child.send_signal(signal.SIGSTOP)
                deltas = [await finish(stream) for stream in streams]
                assert all(len(delta.tokens) == 5 for delta in some(deltas))
                lost = observed.seen(NodeLost)
                assert [(event.node, event.reason) for event in lost] == [(hung, f"nothing came from it for {LOST_S:g} s")]
                assert observed.seen(Restart)
                child.send_signal(signal.SIGCONT)
                await observed.until(lambda: [event.node.id for event in observed.seen(NodeJoined)].count(hung) == 2)

    run(scenario)


@pytest.mark.slow
def test_a_turn_that_has_begun_on_a_node_that_hangs_goes_on_elsewhere_whatever_that_still_sends(model_dir: Path) -> None:
    async def scenario() -> None:
        config = patient(ClusterConfig(pools=(pool("both", PoolKind.AGGREGATED, profile=CostProfile(step_s=0.002)),)), LOST_S)
        async with cluster(config, model_dir) as served:
            observed, other, hung = served.observed, NodeId("both-0"), NodeId("both-1")
            expected = await finish(served.driver.start(turn(range(40), 500)))
            served.driver.mark_dead(other)
            await served.kill_node(other)
            async with process(served, PoolKind.AGGREGATED, hung, step_s=0.02) as child:
                stream = served.driver.start(turn(range(40), 500))
                found = (await stream.read()).tokens
                child.send_signal(signal.SIGSTOP)
                await observed.until(lambda: bool(observed.seen(Resume)))
                await served.start_node(other, 2)
                found += (await stream.read()).tokens
                child.send_signal(signal.SIGCONT)  # it wakes, and has tokens of what it was given
                found += (await finish(stream)).tokens
                assert found == expected.tokens
                assert [event.reason for event in observed.seen(NodeLost)][-1] == f"nothing came from it for {LOST_S:g} s"

    run(scenario)


@pytest.mark.slow
def test_a_prefill_node_that_hangs_costs_its_readers_time_only(model_dir: Path) -> None:
    async def scenario() -> None:
        base = split()
        async with cluster(patient(base, LOST_S), model_dir) as served:
            observed, hung = served.observed, NodeId("prefill-1")
            served.driver.mark_dead(NodeId("prefill-0"))
            await served.kill_node(NodeId("prefill-0"))
            async with process(served, PoolKind.PREFILL, hung, step_s=30.0) as child:
                stream = served.driver.start(turn(range(200), 5))
                await observed.until(
                    lambda: any(a.assignment.role is Role.PREFILL and a.node == hung for a in observed.seen(Assign))
                )
                child.send_signal(signal.SIGSTOP)
                assert len((await finish(stream)).tokens) == 5
                assert [told.source for told in observed.seen(ReportSourceLost)] == [hung]
                await served.idle()

    run(scenario)
