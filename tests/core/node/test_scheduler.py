"""Batch formation: who is admitted, in what order, how long prompts are cut, who gives way."""

import pytest

from orchestrator.core.commands import Slice
from orchestrator.core.config import SchedulerConfig
from orchestrator.core.cost.costs import step_seconds
from orchestrator.core.events import SliceResult
from orchestrator.core.kvpool import BlockPool
from orchestrator.core.node.scheduler import Scheduler
from orchestrator.core.node.sequences import Phase, Sequence
from orchestrator.core.types import DEFAULT_TENANT, CostProfile, RequestId, Role, TenantId, TenantLoad
from tests.builders import assignment, node_spec, prompt_hashes


class Bench:
    """A scheduler with its pool, stepped by hand."""

    def __init__(self, config: SchedulerConfig | None = None, **spec) -> None:
        self.spec = node_spec(**spec)
        self.pool = BlockPool(self.spec.blocks)
        self.scheduler = Scheduler(self.spec, config or SchedulerConfig(), self.pool)
        self.sequences: list[Sequence] = []

    def enqueue(self, *args, **changes) -> Sequence:
        self.sequences.append(self.scheduler.enqueue(assignment(*args, **changes)))
        return self.sequences[-1]

    def admit(self) -> list[int]:
        return [sequence.request for sequence in self.scheduler.admit()]

    def step(self) -> list[tuple[int, int, int]]:
        """Run one step; returns (request, start, count) of its slices."""
        plan = self.scheduler.plan_step()
        if plan is None:
            return []
        claims = [sequence.claim for sequence in self.sequences if sequence.claim is not None]
        self.pool.validate(claims, [block for sequence in self.sequences for block in sequence.private(0, len(sequence.table))])
        self.scheduler.finish_step(tuple(SliceResult(part.request, int(part.sample)) for part in plan.slices), 0.0)
        return [(part.request, part.start, part.count) for part in plan.slices]


def test_a_step_decodes_first_and_gives_the_rest_of_its_tokens_to_prompts_in_order() -> None:
    bench = Bench(step_tokens_max=8, blocks=64, sequences_max=4)
    bench.enqueue(1, "", tail=3)
    assert bench.admit() == [1]
    assert bench.step() == [(1, 0, 3)]
    bench.enqueue(2, "bb", tail=2)
    bench.enqueue(3, "cc", tail=2)
    assert bench.admit() == [2]  # 10 tokens wait before the third: more than a step
    assert bench.step() == [(1, 3, 1), (2, 0, 7)]
    assert bench.admit() == [3]
    assert bench.step() == [(1, 4, 1), (2, 7, 3), (3, 0, 4)]


def test_slices_tell_all_blocks_once_and_then_each_new_one() -> None:
    bench = Bench()
    bench.enqueue(1, "a", tail=3)
    bench.admit()
    plan = bench.scheduler.plan_step()
    assert plan is not None
    assert plan.slices == (Slice(RequestId(1), 0, 7, 0, (0, 1), True),)
    bench.scheduler.finish_step((SliceResult(RequestId(1), 1),), 0.0)
    plan = bench.scheduler.plan_step()
    assert plan is not None
    assert plan.slices == (Slice(RequestId(1), 7, 1, 2, (), True),)  # the eighth token fills the second block
    bench.scheduler.finish_step((SliceResult(RequestId(1), 1),), 0.0)
    plan = bench.scheduler.plan_step()
    assert plan is not None
    assert plan.slices == (Slice(RequestId(1), 8, 1, 2, (2,), True),)


def test_higher_priority_goes_first_then_earlier_arrival() -> None:
    bench = Bench(sequences_max=3)
    for request, priority in ((1, 0), (2, 5), (3, 0), (4, 5)):
        bench.enqueue(request, "", tail=3, priority=priority)
    assert bench.admit() == [2, 4, 1]
    assert bench.scheduler.waiting == 1


def test_the_first_that_finds_no_room_holds_up_those_behind_it() -> None:
    bench = Bench(blocks=6)
    bench.enqueue(1, "aaa", tail=1)
    bench.enqueue(2, "bbbb", tail=1)
    bench.enqueue(3, "", tail=1)
    assert bench.admit() == [1]
    assert bench.step() == [(1, 0, 13)]
    assert bench.admit() == []  # 2 blocks are left; the third, which would fit, does not pass the second
    bench.scheduler.remove(bench.sequences[0])
    assert bench.admit() == [2]


def test_admission_leaves_a_block_for_each_that_decodes() -> None:
    bench = Bench(blocks=8, sequences_max=4)
    for request in (1, 2):
        bench.enqueue(request, "", tail=3)
    bench.admit()
    bench.step()
    bench.enqueue(3, "ccccc", tail=0)
    assert bench.admit() == []  # 6 blocks are free: 5 for it would leave 1 for two that decode
    bench.enqueue(4, "cccc", tail=0, priority=1)
    assert bench.admit() == [4]


def test_preemption_takes_the_last_in_rank_and_it_starts_over_with_what_is_cached() -> None:
    bench = Bench(blocks=4)
    bench.enqueue(1, "a", tail=3, output_tokens_max=9)
    bench.enqueue(2, "b", tail=0, output_tokens_max=9)
    assert bench.admit() == [1, 2]
    assert bench.step() == [(1, 0, 7), (2, 0, 4)]
    assert bench.step() == [(1, 7, 1), (2, 4, 1)]  # the second took the last block
    assert bench.step() == [(1, 8, 1)]  # the first needs one: the second gives way
    assert (bench.scheduler.preemptions, bench.sequences[1].phase, bench.sequences[1].table) == (1, Phase.WAITING, [])
    assert bench.admit() == []  # it needs two blocks and leaves one to the other
    bench.scheduler.remove(bench.sequences[0])
    assert bench.admit() == [2]
    assert bench.step() == [(2, 4, 2)]  # its first block is still cached; it goes on after 4 tokens of prompt and 2 of output


def test_a_prompt_that_is_scored_is_computed_whole_and_then_found_by_others() -> None:
    bench = Bench(blocks=16)
    bench.enqueue(1, "ab", tail=1, output_tokens_max=1)
    assert bench.admit() == [1]
    bench.step()
    bench.scheduler.remove(bench.sequences[0])
    bench.enqueue(2, "abc", tail=1, scored=True)
    assert bench.admit() == [2]
    assert bench.step() == [(2, 0, 13)]  # its first two blocks are cached, and computed again
    assert bench.sequences[1].computed_tokens == 13
    bench.enqueue(3, "abc", tail=1)
    assert bench.admit() == [3]
    assert bench.step() == [(2, 13, 1), (3, 12, 1)]  # of the third block there is only what the second has computed


def test_a_prompt_that_is_scored_waits_for_nobody_and_is_waited_for() -> None:
    bench = Bench(step_tokens_max=8, blocks=16)
    bench.enqueue(1, "ab", tail=1)
    assert bench.admit() == [1]
    bench.enqueue(2, "ab", tail=1, scored=True)
    assert bench.step() == [(1, 0, 8)]
    assert bench.admit() == [2]
    assert bench.step() == [(1, 8, 1), (2, 0, 7)]


def test_a_scored_prompt_that_gave_way_goes_on_with_what_it_has_computed_itself() -> None:
    bench = Bench(blocks=4, step_tokens_max=8)
    bench.enqueue(1, "a", tail=3, output_tokens_max=9)
    bench.enqueue(2, "b", tail=0, output_tokens_max=9, scored=True)
    assert bench.admit() == [1, 2]
    assert bench.step() == [(1, 0, 7), (2, 0, 1)]  # of its only block one token is there
    assert bench.step() == [(1, 7, 1), (2, 1, 3)]
    assert bench.step() == [(1, 8, 1)]  # the first needs a block: the second gives way
    bench.scheduler.remove(bench.sequences[0])
    assert bench.admit() == [2]
    assert bench.step() == [(2, 4, 1)]  # all of its prompt has been scored, and is found again


def test_a_sequence_never_preempts_one_that_ranks_before_it() -> None:
    bench = Bench(blocks=4)
    bench.enqueue(1, "", tail=4, hashes=(b"a",), output_tokens_max=9)
    bench.enqueue(2, "bb", tail=0, priority=1, output_tokens_max=3)
    assert bench.admit() == [2, 1]
    bench.step()
    bench.step()  # the first in rank gets the last block
    assert [sequence.phase for sequence in bench.sequences] == [Phase.WAITING, Phase.DECODING]


def test_an_output_that_outgrows_the_pool_ends_early() -> None:
    bench = Bench(blocks=3)
    sequence = bench.enqueue(1, "a", tail=1, output_tokens_max=100)
    assert sequence.output_tokens_max == 8  # 12 places, 5 of them the prompt's; the last token needs none
    bench.admit()
    for _ in range(7):
        assert bench.step() != []
    plan = bench.scheduler.plan_step()
    assert plan is not None
    assert [end[1] for end in bench.scheduler.finish_step((SliceResult(RequestId(1), 1),), 0.0).ended] == ["length"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"prompt": "aaaa", "tail": 0}, "a prompt of 16 tokens needs 5 blocks, the pool has 4"),
        ({"tail": 90}, "98 prompt tokens and 4 of output are over the context limit of 100"),
        ({"prompt": "", "tail": 0}, "a prompt of 0 tokens with at most 4 tokens of output: both must be 1 or more"),
        ({"output_tokens_max": 0}, "a prompt of 9 tokens with at most 0 tokens of output: both must be 1 or more"),
        ({"hashes": ()}, "0 block hashes for 9 tokens in blocks of 4"),
    ],
)
def test_what_can_never_be_served_is_refused(changes, complaint: str) -> None:
    hashes = {} if "hashes" in changes or changes.get("tail", 1) < 4 else {"hashes": tuple(b"%d" % n for n in range(24))}
    bench = Bench(blocks=4, context_tokens_max=100)
    assert bench.scheduler.refusal(assignment(1, **{**changes, **hashes})) == complaint


def test_a_prefill_needs_no_room_for_output() -> None:
    bench = Bench(blocks=4, context_tokens_max=16)
    assert bench.scheduler.refusal(assignment(1, "aaaa", tail=0, role=Role.PREFILL, output_tokens_max=500)) is None


def test_followers_wait_for_the_last_block_they_share_and_not_for_more() -> None:
    bench = Bench(step_tokens_max=8, sequences_max=8, blocks=64)
    bench.enqueue(1, "abcde", tail=1)
    bench.enqueue(2, "abcdxx", tail=1)
    bench.enqueue(3, "zz", tail=1)
    assert bench.admit() == [1]  # the second follows, the third finds a step's worth of prompts before it
    bench.step()
    assert bench.admit() == []
    bench.step()  # blocks a to d are there
    assert bench.admit() == [2]
    assert bench.sequences[1].computed == 16


def test_followers_go_on_when_their_leader_leaves() -> None:
    bench = Bench(step_tokens_max=8, sequences_max=8, blocks=64)
    bench.enqueue(1, "abcd", tail=1)
    bench.enqueue(2, "abcd", tail=2)
    assert bench.admit() == [1]
    bench.step()
    bench.scheduler.remove(bench.sequences[0])
    assert bench.admit() == [2]
    assert bench.sequences[1].computed == 8


def test_the_cost_scale_follows_measured_over_predicted_time() -> None:
    profile = CostProfile(step_s=0.01, prefill_token_s=0.001)
    bench = Bench(profile=profile)
    bench.enqueue(1, "", tail=3)
    bench.admit()
    plan = bench.scheduler.plan_step()
    assert plan is not None
    assert plan.predicted_s == step_seconds(profile, [(3, 0)], 0, 0)
    bench.scheduler.finish_step((SliceResult(RequestId(1), 1),), 2 * plan.predicted_s)
    assert bench.scheduler.cost_scale == pytest.approx(1.05)
    assert bench.scheduler.step_s == 2 * plan.predicted_s


# --- tenants ----------------------------------------------------------------------------------------------------------

FLOOD, OTHER = {"tenant": TenantId("flood")}, {"tenant": TenantId("other")}


def test_who_has_had_nothing_goes_before_a_flood_that_waits() -> None:
    bench = Bench(blocks=64, sequences_max=2)
    for request in (1, 2, 3, 4):
        bench.enqueue(request, "", tail=3, priority=9, **FLOOD)  # urgency is the flood's own affair
    assert bench.admit() == [1, 2]
    bench.step()
    bench.enqueue(5, "", tail=3, **OTHER)
    bench.scheduler.remove(bench.sequences[0])
    assert bench.admit() == [5]


def test_a_prompt_of_another_tenant_is_admitted_beside_a_full_steps_worth_and_computed_first() -> None:
    bench = Bench(step_tokens_max=8, blocks=64, sequences_max=4)
    bench.enqueue(1, "aaaaaaaaaa", tail=1, **FLOOD)
    bench.enqueue(2, "bb", tail=1, **FLOOD)
    assert bench.admit() == [1]  # the second waits behind 41 tokens
    assert bench.step() == [(1, 0, 8)]
    assert bench.step() == [(1, 8, 8)]
    bench.enqueue(3, "cc", tail=3, **OTHER)
    assert bench.admit() == [3]
    assert bench.step() == [(3, 0, 8)]
    assert bench.step() == [(3, 8, 3), (1, 16, 5)]


def test_a_prompt_is_not_interrupted_before_it_has_had_a_steps_worth() -> None:
    bench = Bench(step_tokens_max=8, blocks=64, sequences_max=4)
    bench.enqueue(1, "aaa", tail=1, **FLOOD)
    bench.admit()
    bench.enqueue(2, "bbb", tail=1, **OTHER)
    assert bench.admit() == []  # 13 tokens are before it, in a place that is not its to take
    assert bench.step() == [(1, 0, 8)]
    assert bench.admit() == [2]
    assert bench.step() == [(1, 8, 5), (2, 0, 3)]


def test_long_prompts_of_two_tenants_advance_by_their_shares() -> None:
    bench = Bench(step_tokens_max=8, blocks=256, sequences_max=4)
    bench.enqueue(1, "a" * 100, tail=1, share=1.0, **FLOOD)
    bench.enqueue(2, "b" * 100, tail=1, share=3.0, **OTHER)
    bench.admit()
    done = {1: 0, 2: 0}
    for _ in range(40):
        bench.admit()
        for request, _, count in bench.step():
            done[request] += count
    assert done == {1: 88, 2: 232}  # whole steps, and for each one to begin with


def test_a_load_tells_tenants_apart_unless_there_is_only_the_default_one() -> None:
    bench = Bench(step_tokens_max=8, blocks=64, sequences_max=4)
    bench.enqueue(1, "aaa", tail=1)
    assert bench.scheduler.tenants == ()
    bench.enqueue(2, "bb", tail=1, **OTHER)
    assert bench.scheduler.tenants == (TenantLoad(DEFAULT_TENANT, 1, 13), TenantLoad(TenantId("other"), 1, 9))
    assert bench.admit() == [1]
    bench.step()
    assert bench.scheduler.tenants == (TenantLoad(DEFAULT_TENANT, 0, 5), TenantLoad(TenantId("other"), 1, 9))
    bench.scheduler.remove(bench.sequences[1])
    assert bench.scheduler.tenants == ()


def test_what_several_steps_filled_is_given_before_an_answer_claims_blocks_that_are_cached_already() -> None:
    bench = Bench(blocks=15, sequences_max=2)
    names = prompt_hashes("abcdx")
    claim, _ = bench.pool.acquire(names, 0)
    bench.pool.register(claim, bench.pool.allocate(4), names[:4])
    bench.pool.release(claim)  # four idle blocks: the first one's prompt, and what its answer will be
    for request, prompt in ((1, "a"), (2, "zzzz")):
        bench.enqueue(request, prompt, tail=1, output_tokens_max=40)
    bench.admit()
    bench.step()
    plan = bench.scheduler.plan_step()
    assert plan is not None
    assert bench.pool.available_blocks == 8
    steps = 16  # four further blocks each: all that there are
    assert steps <= plan.steps_max
    named = SliceResult(RequestId(1), steps, names[1:], True)
    outcome = bench.scheduler.finish_step((named, SliceResult(RequestId(2), steps)), 0.0, steps)
    assert [sequence.request for sequence, _, _ in outcome.ended] == [1]
