"""A node that keeps a beat: who gets a slot, what it has from the start, and what it hands back."""

from collections.abc import Callable
from random import Random

import pytest

from orchestrator.core.commands import Fetch, ReportEnded, RunStep, Slice
from orchestrator.core.config import PoolConfig, SchedulerConfig, SplitConfig
from orchestrator.core.cost.costs import batch_seconds, decode_seconds, keeps_beat, node_profile, step_seconds, work_seconds
from orchestrator.core.events import Assigned, Cancelled, FetchEnded, SliceResult, StepFinished
from orchestrator.core.kvpool import BlockPool
from orchestrator.core.node.cadence import CadenceScheduler
from orchestrator.core.node.node import Node
from orchestrator.core.types import CostProfile, FinishReason, NodeId, NodeSpec, PoolKind, RequestId, Role
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


#: What is behind attention is computed by FFN ranks that two nodes of a group share: 0.25 ms for each row that either sends, so
#: that a pass of n rows, as many at both, takes 0.5 n ms there. 1 ms are hops, and of the two halves three quarters overlap.
HALVES = CostProfile(
    step_s=1e-3, sequence_s=2e-4, context_token_s=5e-5, batch_tokens=(1, 8), batch_s=(5e-4, 4e-3), overlap=0.75, beat_s=10e-3
)
SLOTS, BEATS = 8, 120
SHARED = SplitConfig(attention=2, imbalance_max=0.0)


def half(number: int, split: SplitConfig | None = SHARED) -> NodeSpec:
    """Return an attention rank of a pool that keeps a beat; one that computes all if there is no split."""
    scheduler = SchedulerConfig(sequences_max=SLOTS, step_tokens_max=64)
    pool = PoolConfig("lpx", PoolKind.LPX, nodes=2, split=split, scheduler=scheduler, profile=HALVES)
    node = pool.node_id(number)
    return pool.node_spec(node, 1, node_profile(pool), blocks=4096, block_tokens=4, block_bytes=64, context_tokens_max=1000)


def test_halves_are_counted_as_the_longer_of_them_hops_and_what_does_not_overlap() -> None:
    # 3 sequences of 100 tokens: attention 0.6 + 5 ms, FFNs 8 rows whoever is there, 4 ms.
    profile = half(0).profile
    assert work_seconds(profile, 3, 100) == pytest.approx(1e-3 + 0.75 * 5.6e-3 + 0.25 * (5.6e-3 + 4e-3))
    assert work_seconds(profile, 1, 20) == pytest.approx(1e-3 + 0.75 * 4e-3 + 0.25 * (1.2e-3 + 4e-3))
    # Without FFN ranks nothing is shared, and who is not there costs nothing.
    assert half(0, split=None).profile == HALVES


class Group:
    """Two attention ranks on one beat, whose passes take as long as their contexts and both their rows ask for."""

    def __init__(self, spec: Callable[[int], NodeSpec], seed: int) -> None:
        self.nodes = [Node(spec(number), SchedulerConfig(), BlockPool(4096)) for number in range(2)]
        self.random = Random(seed)
        self.steps: list[RunStep | None] = [None, None]
        self.requests = 0
        self.beats, self.missed = 0, 0

    def run(self) -> None:
        for beat in range(BEATS):
            now = beat * HALVES.beat_s
            for number in range(2):
                if self.random.random() < 0.2:
                    self.ask(number, now)
            self.count()
            for number, step in enumerate(self.steps):
                if step is not None:
                    self.steps[number] = None
                    results = tuple(SliceResult(part.request, 1) for part in step.slices)
                    self.obey(number, self.nodes[number].handle(StepFinished(step.step, results, HALVES.beat_s), now), now)
                self.nodes[number].validate()

    def ask(self, number: int, now: float) -> None:
        """Ask the first node for long answers to short prompts, and the second one for short answers to long ones too.

        The longest prompts leave so little of the beat that they are kept on it only as long as the other node has not many rows.
        """
        self.requests += 1
        blocks = self.random.choice((2, 20, 42)) if number else 2
        prompt, output = blocks * "a", self.random.randrange(2, 60 if blocks == 2 else 5)
        self.obey(number, self.nodes[number].handle(handed(self.requests, prompt, output_tokens_max=output), now), now)

    def obey(self, number: int, commands: list[object], now: float) -> None:
        for command in commands:
            match command:
                case Fetch():
                    came = FetchEnded(command.request, command.tokens)
                    self.obey(number, self.nodes[number].handle(came, now), now)
                case RunStep():
                    self.steps[number] = command
                case _:
                    pass

    def count(self) -> None:
        """See whether each node's pass is done within the beat."""
        rows = [len(step.slices) if step is not None else 0 for step in self.steps]
        for step in self.steps:
            if step is None:
                continue
            attention_s = sum(HALVES.sequence_s + HALVES.context_token_s * part.start for part in step.slices)
            ffn_s = batch_seconds(HALVES, 2) / 4 * sum(rows)
            longer_s, both_s = max(attention_s, ffn_s), attention_s + ffn_s
            self.beats += 1
            self.missed += HALVES.step_s + HALVES.overlap * longer_s + (1 - HALVES.overlap) * both_s > HALVES.beat_s


@pytest.mark.parametrize("seed", range(3))
def test_no_beat_is_missed_over_two_halves_whatever_the_other_nodes_of_the_group_do(seed: int) -> None:
    group = Group(half, seed)
    group.run()
    assert group.beats > BEATS
    assert group.missed == 0


def test_a_node_that_counted_its_own_rows_alone_would_miss_some() -> None:
    group = Group(lambda number: half(number, split=None), 1)
    group.run()
    assert group.missed > 0
