"""Fitting a profile to steps: it finds the costs that made them, and a journal's steps are what the node ran."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.fit import Step, fit, nonnegative_least_squares, steps_of
from orchestrator.core.config import SchedulerConfig
from orchestrator.core.events import Assigned, SliceResult, StepFinished
from orchestrator.core.node.node import Node
from orchestrator.core.types import CostProfile, RequestId, StepId
from orchestrator.wire.journal import JournalWriter, NodeHeader, read_journal
from tests.builders import assignment, node_spec

TRUE = CostProfile(
    prefill_token_context_s=2e-8,
    sequence_s=3e-5,
    context_token_s=4e-7,
    batch_tokens=(1, 8, 64, 512),
    batch_s=(0.001, 0.002, 0.006, 0.04),
)


def steps() -> list[Step]:
    """Return steps of all sorts, each a tick of a coarse clock longer than its engine takes, on average."""
    chance = random.Random(3)
    made: list[Step] = []
    for tokens in (0, 8, 64, 512):
        for sequences in (0, 1, 2, 4, 8):
            for context in (100, 1000, 8000):
                if tokens + sequences:
                    prefills = ((tokens, context),) if tokens else ()
                    step = Step(prefills, sequences, sequences * context, 1.0, 1.0)
                    made += [step] * 5
    return [replace(step, engine_s=(took := step.predicted_s(TRUE)), seconds=took + chance.choice((0.0, 0.001))) for step in made]


def test_the_costs_that_made_the_steps_are_found() -> None:
    made = steps()
    found = fit(made)
    handled_s = sum(step.seconds - step.engine_s for step in made) / len(made)
    for step in made[::5]:
        assert step.predicted_s(found.profile) == pytest.approx(step.engine_s + handled_s, rel=0.1, abs=3e-4)
    assert 0.95 < found.ratio_p10 <= found.ratio_p90 < 1.05


def test_no_coefficient_is_negative_though_the_least_squares_would_be() -> None:
    rows = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    found = nonnegative_least_squares(rows, np.array([1.0, 3.0, 5.0]))
    assert found[0] == 0.0
    assert found[1] == pytest.approx(22 / 14)


def test_steps_are_read_from_a_nodes_journal(tmp_path: Path) -> None:
    header = NodeHeader(node_spec(), SchedulerConfig(step_tokens_max=64, sequences_max=8))
    core, writer = Node(header.spec, header.scheduler), JournalWriter(tmp_path / "one", header)
    token = SliceResult(RequestId(1), 1)
    for now, event in (
        (1.0, Assigned(assignment(prompt="ab", tail=1, output_tokens_max=2))),
        (1.5, StepFinished(StepId(1), (token,), 0.4)),
        (1.75, StepFinished(StepId(2), (token,), 0.2)),
    ):
        writer.record(now, event, core.handle(event, now))
    writer.close()
    assert steps_of(read_journal(tmp_path / "one").entries) == [Step(((9, 0),), 0, 0, 0.4, 0.5), Step((), 1, 9, 0.2, 0.25)]
