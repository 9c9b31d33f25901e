"""Figures of a run: what each is of, and what is null because it cannot be said."""

from typing import Any

import pytest

from orchestrator.cli.cluster_file import FOLDER, read_cluster
from orchestrator.core.config import CachePolicy, ClusterConfig, RouterPolicy
from orchestrator.core.types import PoolName
from orchestrator.profiles.catalog import Catalog
from orchestrator.profiles.resolve import PoolHardware, Resolved, resolve
from orchestrator.sim.outcome import Distribution, Outcome, PoolSample, PoolUse, Served
from orchestrator.sim.runs import CacheRule, figures, percentiles, simulate
from orchestrator.traces import TracedTurn

POOL = PoolName("p")
CLUSTER: dict[str, Any] = {
    "pools": [
        {
            "name": "p",
            "kind": "aggregated",
            "nodes": 2,
            "engine": {"name": "profiled", "blocks": 64, "block_tokens": 64},
            "profile": {"step_s": 0.01, "prefill_token_s": 0.0001},
        }
    ]
}
HARDWARE = {POOL: PoolHardware({"chip": 2.0}, 2.0, usd_per_hour=9.0, kw=3.0, block_bytes=1, assumptions=("b.x", "a.y"))}


def turn(number: int = 1, **changes: Any) -> TracedTurn:
    """Return a first turn of 130 prompt tokens (2 full blocks) and 3 generated ones."""
    fields: dict[str, Any] = {
        "id": number, "session": "s", "agent": "main", "arrival_s": 0.0, "after": (), "gap_s": 0.0, "input_tokens": 130,
        "output_tokens": 3, "block_tokens": 64, "block_runs": ((1, 2),),
    }  # fmt: skip
    return TracedTurn(**{**fields, **changes})


def outcome(*served: Served) -> Outcome:
    gaps = Distribution()
    gaps.add(0.5, 4)
    use = PoolUse(nodes=2, blocks=10, busy_s=20.0)
    use.samples = [PoolSample(0.0, 1, 0, 2, 3, 5), PoolSample(1.0, 3, 4, 4, 5, 1)]
    return Outcome(list(served), {POOL: use}, gaps, duration_s=20.0)


ENDED = Served(turn(1), 0.0, first_token_s=1.0, ended_s=2.0, cached_tokens=64, output_tokens=3)
FAILED = Served(turn(2), 4.0, ended_s=5.0, failure="503 full: 12 waiting")


def test_figures_count_what_completed_and_name_why_the_rest_did_not() -> None:
    found = figures(outcome(ENDED, FAILED), HARDWARE)
    assert (found["requests"], found["completed"], found["failures"]) == (2, 1, {"503 full": 1})
    assert (found["input_tokens"], found["cached_tokens"], found["hit_rate"]) == (130, 64, 64 / 130)
    # Two tokens after the first in one second.
    assert found["tokens_per_s_per_user"] == {"p50": 2.0, "p10": 2.0}
    # The session did not complete wholly, so how long it took is unknown.
    assert found["session_s"] == {"p50": None, "p90": None, "mean": None}
    assert found["assumptions"] == ["a.y", "b.x"]


def test_prices_and_energy_are_of_all_nodes_for_all_of_the_time() -> None:
    found = figures(outcome(ENDED), HARDWARE)
    hours = 20.0 / 3600
    assert found["tokens_per_s_per_gpu"] == 3 / (20.0 * 4)
    assert found["usd_per_million_output_tokens"] == pytest.approx(2 * 9.0 * hours / 3 * 1e6)
    assert found["usd_per_million_tokens"] == pytest.approx(2 * 9.0 * hours / 133 * 1e6)
    assert found["kwh_per_million_tokens"] == pytest.approx(2 * 3.0 * hours / 133 * 1e6)


def test_a_pool_is_told_by_its_share_of_time_and_its_samples() -> None:
    pool = figures(outcome(ENDED), {})["pools"]["p"]
    assert (pool["nodes"], pool["utilisation"]) == (2, 0.5)
    assert (pool["queue"], pool["running"]) == ({"mean": 2, "max": 4}, {"mean": 2, "max": 3})
    assert pool["kv"] == {"blocks": 10, "used": 0.3, "cached": 0.4}


def test_what_cannot_be_said_is_null() -> None:
    found = figures(Outcome([], {POOL: PoolUse(1, 1)}, Distribution()), {})
    unknown = (
        "hit_rate",
        "tokens_per_s_per_gpu",
        "usd_per_million_output_tokens",
        "usd_per_million_tokens",
        "kwh_per_million_tokens",
    )
    assert [found[name] for name in unknown] == [None] * 5
    assert found["itl_s"] == {"p50": None, "p90": None, "p99": None}
    assert found["pools"]["p"]["utilisation"] is None


def test_a_session_takes_from_its_first_arrival_to_its_last_end() -> None:
    first = Served(turn(1), 1.0, first_token_s=2.0, ended_s=3.0)
    second = Served(turn(2), 8.0, first_token_s=9.0, ended_s=11.0)
    alone = Served(turn(3, session="t"), 0.0, first_token_s=1.0, ended_s=2.0)
    assert figures(outcome(first, second, alone), {})["session_s"] == {"p50": 6.0, "p90": pytest.approx(9.2), "mean": 6.0}


def test_percentiles_lie_between_their_neighbours() -> None:
    assert percentiles([4.0, 1.0, 2.0, 3.0], 0, 50, 100) == {"p0": 1.0, "p50": 2.5, "p100": 4.0}
    assert percentiles([], 50) == {"p50": None}


@pytest.mark.parametrize("cache", [CacheRule.OPTIMAL, CacheRule.LFU, CachePolicy.LRU])
def test_a_trace_is_simulated_under_the_policy_that_was_asked_for(cache: CacheRule | CachePolicy) -> None:
    resolved = Resolved(ClusterConfig.from_mapping(CLUSTER), {})
    second = turn(2, arrival_s=1.0, after=(1,), input_tokens=200, block_runs=((1, 3),))
    told: list[float] = []
    run = simulate(resolved, [turn(1), second], RouterPolicy.LEAST_LOADED, cache, seed=1, progress=told.append)
    assert (run.figures["policy"], run.figures["cache"], run.figures["completed"]) == ("least-loaded", str(cache), 2)
    assert run.figures["requests"] == len(run.outcome.served)
    assert told[-1] == 1.0


def test_a_split_pool_tells_how_busy_its_halves_are_and_what_is_hidden() -> None:
    resolved = resolve(read_cluster(FOLDER / "sim" / "vr-nvl72-lpx.toml"), Catalog.load())
    run = simulate(resolved, [turn(1), turn(2)], RouterPolicy.PREDICTED_TIME, CachePolicy.LRU, 0)
    pools = run.figures["pools"]
    split = pools["decode"]["split"]
    assert pools["prefill"]["split"] is None
    # One after the other: nothing is hidden, and both halves and their hops are all of the time but for the output head's.
    assert (split["microbatches"], split["hidden"]) == (1, 0.0)
    assert 0 < split["ffn_busy"] < split["attention_busy"] < pools["decode"]["utilisation"]
    assert split["balance"] == pytest.approx(split["attention_busy"] / split["ffn_busy"])
