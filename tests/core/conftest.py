"""Fixtures of the core's tests: whatever a test built is validated when the test is over."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from orchestrator.core.config import SchedulerConfig
from orchestrator.core.node import Node
from tests.builders import node_spec


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
