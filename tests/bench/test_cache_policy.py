"""The measure of rules of eviction: what counts as saved, and that a rule is compared on a node too small for the trace."""

from pathlib import Path

import pytest

from bench.agent_mix import TRACE
from bench.cache_policy import PROFILE, STEP_TOKENS_MAX, cluster, compare, measure, saved_seconds
from orchestrator.core.cost.costs import prompt_seconds
from orchestrator.sim.outcome import Served
from orchestrator.sim.runs import CacheRule
from orchestrator.traces import TracedTurn, read_trace


def test_deep_tokens_that_were_not_computed_save_more_and_what_failed_saves_nothing() -> None:
    def served(cached_tokens: int, failure: str | None = None) -> Served:
        turn = TracedTurn(1, "s", "main", 0.0, (), 0.0, 8000, 10, 64, ())
        return Served(turn, 0.0, ended_s=1.0, cached_tokens=cached_tokens, failure=failure)

    whole = prompt_seconds(PROFILE, 8000, 0, STEP_TOKENS_MAX)
    assert saved_seconds([served(8000)]) == pytest.approx(whole)
    assert saved_seconds([served(0), served(8000, "503")]) == 0.0
    assert 0.0 < saved_seconds([served(4000)]) < whole / 2


def test_a_node_that_is_too_small_for_a_context_is_refused_by_name() -> None:
    with pytest.raises(SystemExit, match=r"agent_mix.*longest context"):
        compare(TRACE, 1, None, share=0.01, nodes=1, starts=1)


@pytest.mark.slow
def test_every_rule_serves_all_of_a_trace_and_the_one_that_knows_the_future_saves_most() -> None:
    turns = list(read_trace(Path(TRACE)))
    results = {rule: measure(turns, cluster(1, 220_000), rule) for rule in CacheRule}
    assert [result.failed for result in results.values()] == [0] * len(CacheRule)
    assert max(results, key=lambda rule: results[rule].saved_s) is CacheRule.OPTIMAL
