"""A pass taken apart: nothing is lost, and the longest part is named."""

from dataclasses import replace
from math import isclose

import pytest

from orchestrator.core.cost.parts import parts_of
from tests.core.cost.test_roofline import MACHINES


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize(("sequences", "context"), [(1, 400_000), (16, 50_000)])
def test_parts_add_up_to_the_pass_where_nothing_overlaps(name: str, sequences: int, context: int) -> None:
    machine = MACHINES[name]
    machine = replace(machine, hardware=replace(machine.hardware, microbatches=1))
    parts = parts_of(machine, sequences, context)
    assert isclose(sum(parts.named.values()), parts.pass_s, rel_tol=1e-9)
    assert min(parts.named.values()) >= 0


def test_what_overlaps_makes_the_pass_shorter_than_its_parts() -> None:
    machine = replace(MACHINES["ping-pong"], hardware=replace(MACHINES["ping-pong"].hardware, chips=2))
    parts = parts_of(machine, 256, 10_000_000)
    assert parts.pass_s < sum(parts.named.values())


def test_long_contexts_are_bound_by_reading_them() -> None:
    assert parts_of(MACHINES["serial"], 1, 100_000_000).longest == "KV read"
    assert parts_of(MACHINES["serial"], 1, 1).longest != "KV read"
