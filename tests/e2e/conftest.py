"""Starts clusters for a test and sees that none outlives it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.served import Served


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Starts clusters and ends them all."""
    running: list[Served] = []

    def start(cluster: Path, *arguments: str) -> Served:
        running.append(Served(cluster, arguments, tmp_path / f"serve-{len(running)}.log"))
        return running[-1]

    yield start
    for served in running:
        served.kill()
