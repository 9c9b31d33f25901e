"""Fixtures of the core's tests: whatever a test built is validated when the test is over."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from orchestrator.core.cluster.cluster import Cluster
from orchestrator.core.config import LimitsConfig, RouterConfig, SchedulerConfig
from orchestrator.core.node.node import Node
from orchestrator.core.types import GatewayId
from tests.builders import node_spec
from tests.core.cluster.cluster_builders import cluster_config, join


@pytest.fixture
def make_node() -> Iterator[Callable[..., Node]]:
    """Return a maker of nodes: `config` sets scheduler settings, everything else the spec."""
    made: list[Node] = []

    def make(config: SchedulerConfig | None = None, **spec: Any) -> Node:
        made.append(Node(node_spec(**spec), config or SchedulerConfig()))
        return made[-1]

    yield make
    for node in made:
        node.validate()


@pytest.fixture
def make_cluster() -> Iterator[Callable[..., Cluster]]:
    """Return a maker of clusters that the named nodes have joined, holding nothing."""
    made: list[Cluster] = []

    def make(*nodes: str, limits: LimitsConfig | None = None, router: RouterConfig | None = None, **spec: Any) -> Cluster:
        made.append(Cluster(GatewayId(0), cluster_config(limits, router)))
        join(made[-1], *nodes, **spec)
        return made[-1]

    yield make
    for cluster in made:
        cluster.validate()
