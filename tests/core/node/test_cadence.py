"""A node that keeps a beat: who gets a slot, what it has from the start, and what it hands back."""

from orchestrator.core.commands import Fetch, ReportEnded, RunStep, Slice
from orchestrator.core.config import SchedulerConfig
from orchestrator.core.cost.costs import decode_seconds, keeps_beat, step_seconds
from orchestrator.core.events import Assigned, Cancelled, FetchEnded, SliceResult, StepFinished
from orchestrator.core.kvpool import BlockPool
from orchestrator.core.node.cadence import CadenceScheduler
from orchestrator.core.node.node import Node
from orchestrator.core.types import CostProfile, FinishReason, NodeId, PoolKind, RequestId, Role
from tests.builders import assignment, node_spec

#: A pass takes 1 ms for each sequence and 0.1 ms for each token of context; 10 ms are a beat.
PROFILE = CostProfile(sequence_s=1e-3, context_token_s=1e-4, beat_s=10e-3)
PEER = NodeId("peer")


def beating(**changes: object) -> Node:
    spec = node_spec(**{"kind": PoolKind.LPX, "profile": PROFILE, "blocks": 64, **changes})
    return Node(spec, SchedulerConfig(), BlockPool(spec.blocks))


def handed(request: int, prompt: str = "ab", **changes: object) -> Assigned:
    """Return an assignment whose prompt a peer computes: 9 tokens, and 4 that are generated."""
    return Assigned(assignment(request, prompt, source=PEER, source_pending=True, **changes))


def came(node: Node, request: int, tokens: int, now: float = 0.0) -> list[RunStep]:
    """Let a fetch end and return the step that begins."""
    commands = node.handle(FetchEnded(RequestId(request), tokens), now)
    node.validate()
    return [command for command in commands if isinstance(command, RunStep)]


def test_every_step_takes_the_beat_whatever_is_in_it() -> None:
    assert decode_seconds(PROFILE, 1, 10) == decode_seconds(PROFILE, 3, 50) == 10e-3
    assert decode_seconds(PROFILE, 3, 50, steps=4) == 4 * 10e-3
    assert step_seconds(PROFILE, [(1, 8)], 2, 20) == 10e-3
    # With speculation a pass is a beat, and brings several tokens.
    drafting = CostProfile(beat_s=10e-3, pass_tokens=3, tokens_per_pass=2.0)
    assert decode_seconds(drafting, 1, 10) == 5e-3


def test_a_slot_is_given_if_the_beat_holds_with_everybodys_longest_context() -> None:
    node = beating()
    # 9 + 4 - 1 = 12 tokens at most: 1 ms + 1.2 ms each, so that four fit into 10 ms and a fifth does not.
    assert keeps_beat(PROFILE, 4, 48)
    assert not keeps_beat(PROFILE, 5, 60)
    for request, prompt in enumerate(("aa", "bb", "cc", "dd", "ee"), 1):
        node.handle(handed(request, prompt), 0.0)
        node.validate()
    assert (node.load().running, node.load().waiting) == (4, 1)
    # What gateways are told is what all may come to, the waiting one too.
    assert node.load().context_tokens == 5 * 12
    commands = node.handle(FetchEnded(RequestId(1), 8), 0.0)
    step = next(command for command in commands if isinstance(command, RunStep))
    done = StepFinished(step.step, (SliceResult(RequestId(1), 1, stopped=True),), 10e-3)
    commands = node.handle(done, 0.01)
    # As soon as one ends the next gets its slot.
    assert [command.request for command in commands if isinstance(command, Fetch)] == [5]
    node.validate()


def test_a_sequence_has_all_its_blocks_from_the_start_and_prompts_are_one_token() -> None:
    node = beating()
    node.handle(handed(1, output_tokens_max=20), 0.0)
    (step,) = came(node, 1, tokens=8)
    # 9 + 20 - 1 = 28 tokens are 7 blocks; the ninth token of the prompt is computed here, as any decoded one.
    assert step.slices == (Slice(RequestId(1), 8, 1, 0, tuple(range(7)), True),)
    for number in range(19):
        now = 0.01 * (number + 1)
        commands = node.handle(StepFinished(step.step, (SliceResult(RequestId(1), 1),), 10e-3), now)
        node.validate()
        (step,) = [command for command in commands if isinstance(command, RunStep)]
        assert step.slices == (Slice(RequestId(1), 9 + number, 1, 7, (), True),)
    commands = node.handle(StepFinished(step.step, (SliceResult(RequestId(1), 1),), 10e-3), 1.0)
    (end,) = [command.report for command in commands if isinstance(command, ReportEnded)]
    assert (end.reason, end.output_tokens) == (FinishReason.LENGTH, 20)
    assert node.load().context_tokens == 0


def test_a_prompt_that_did_not_come_is_handed_back() -> None:
    node = beating()
    node.handle(handed(1), 0.0)
    commands = node.handle(FetchEnded(RequestId(1), 4), 0.0)
    node.validate()
    (end,) = [command.report for command in commands if isinstance(command, ReportEnded)]
    assert end.reason is FinishReason.FAILED
    assert "5 tokens of the prompt did not come" in end.message
    assert not [command for command in commands if isinstance(command, RunStep)]
    assert (node.load().running, node.load().blocks_used, node.load().context_tokens) == (0, 0, 0)


def test_who_leaves_while_waiting_frees_what_it_reserved() -> None:
    node = beating(sequences_max=1)
    node.handle(handed(1), 0.0)
    node.handle(handed(2), 0.0)
    assert node.load().context_tokens == 24
    node.handle(Cancelled(RequestId(2)), 0.0)
    node.validate()
    assert node.load().context_tokens == 12


def test_what_can_never_keep_the_beat_is_refused() -> None:
    spec = node_spec(kind=PoolKind.LPX, profile=PROFILE, blocks=64)
    scheduler = CadenceScheduler(spec, SchedulerConfig(), BlockPool(64))
    assert scheduler.refusal(assignment()) is None
    assert scheduler.refusal(assignment(role=Role.PREFILL)) == "this node keeps a beat and computes no prompts"
    refused = scheduler.refusal(assignment(output_tokens_max=100))
    assert refused == "a pass over a context of 108 tokens takes 0.011800 s, the beat is 0.010000 s"
    small = CadenceScheduler(spec, SchedulerConfig(), BlockPool(8))
    refused = small.refusal(assignment(output_tokens_max=30))
    assert refused == "a context of 38 tokens needs 10 blocks, the pool has 8"
