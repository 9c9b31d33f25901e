"""Tests of the article's figures: every number has a row, the files agree with themselves, verdicts follow the numbers."""

import json
from pathlib import Path
from typing import Any

import pytest

from deploy.figures import write_figures
from deploy.figures.caching import PLAIN, WITH_WRITES
from deploy.figures.claims import Verdict, judged
from deploy.figures.fronts import (
    AFD,
    AGENTIC,
    BATCH,
    CODING,
    RUBIN,
    Point,
    best_at,
    by_price,
    by_throughput,
    cluster,
    front,
    layouts,
    point_at,
)
from deploy.figures.hardware_claims import fastest, speed_claim
from deploy.figures.sensitivity import crossing
from deploy.figures.session import hit_rate, input_tokens, read_session, run_session
from deploy.figures.session_claims import session_claims
from deploy.figures.sources import MIX_CACHED_TOKENS, MIX_INPUT_TOKENS
from deploy.figures.tiers import restoring
from orchestrator.profiles.catalog import Catalog, CatalogError
from orchestrator.profiles.resolve import resolve
from orchestrator.sim.bounds import infinite_cache
from orchestrator.wire.traces import read_trace

MIX = Path(__file__).parents[2] / "bench" / "data" / "agent_mix.jsonl.gz"
#: What the article states: each has a row.
STATED = {"283", "33 min", "156K", "3.5M", "1M", "95 to 98%", "85%", "6x", "15x", "400+", "1/10"}


def point(speed: float, throughput: float) -> Point:
    return Point("system", "work", f"{speed:g}", 1, speed, throughput, throughput, 1e3 / throughput)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("figures") / "new"
    write_figures(directory, {})
    return directory


def test_a_front_keeps_what_nothing_beats_in_both_speed_and_throughput() -> None:
    slow, beaten, even, fast = point(10, 100), point(20, 40), point(20, 50), point(30, 5)
    assert front([beaten, fast, slow, even], by_throughput) == [slow, even, fast]
    assert front([beaten, fast, slow, even], by_price) == [slow, even, fast]


def test_the_best_point_for_a_speed_is_at_least_as_fast_and_missing_when_none_is() -> None:
    points = [point(10, 100), point(20, 50), point(30, 5)]
    assert best_at(points, 15, by_throughput) == points[1]
    assert best_at(points, 31, by_throughput) is None


def test_a_crossing_is_found_on_rising_and_falling_results_and_refused_outside() -> None:
    assert crossing(lambda x: x * x, 0.1, 10, 4) == pytest.approx(2)
    assert crossing(lambda x: 1 / x, 0.1, 10, 4) == pytest.approx(0.25)
    assert crossing(lambda x: x, 0.1, 10, 11) is None
    assert crossing(lambda _: None, 0.1, 10, 1) is None


def test_caching_prices_invert_and_a_write_premium_costs() -> None:
    assert PLAIN.share(0.0) == 1.0  # nothing found: the plain bill
    assert PLAIN.hit_rate_for(PLAIN.multiple(0.9)) == pytest.approx(0.9)
    assert WITH_WRITES.hit_rate_for(WITH_WRITES.multiple(0.9)) == pytest.approx(0.9)
    assert WITH_WRITES.saving(0.9) < PLAIN.saving(0.9)


def test_canary_a_verdict_can_be_bad_and_says_by_what_factor() -> None:
    assert judged(0.96, 0.95, 0.98, "rate")[0] is Verdict.REPRODUCED
    assert judged(2.0, 5.0, 6.0, "ratio") == (
        Verdict.NOT_SUPPORTED,
        "The ratio lies below the stated range by a factor of 2.50",
    )


def test_the_numbers_quoted_of_the_real_sessions_are_what_the_bundled_file_gives() -> None:
    bound = infinite_cache(list(read_trace(MIX)))
    assert (bound.input_tokens, bound.cached_tokens) == (MIX_INPUT_TOKENS, MIX_CACHED_TOKENS)


def test_a_longer_context_takes_longer_to_bring_back_and_longer_still_to_compute() -> None:
    short, long = restoring(Catalog.load(), (100_000, 400_000))
    assert short.cpu_s < short.cmx_s < short.recompute_s
    assert long.cmx_gain > short.cmx_gain
    assert long.cmx_bytes_per_s_least < short.cmx_bytes_per_s_least


def test_slower_context_storage_is_slower_and_changes_nothing_else() -> None:
    before, after = (restoring(Catalog.load(changed), (200_000,))[0] for changed in ({}, {"cmx.bytes_per_s": 6e9}))
    assert after.cmx_s > before.cmx_s
    assert (after.cpu_s, after.recompute_s) == (before.cpu_s, before.recompute_s)


@pytest.mark.slow
def test_more_users_and_more_context_make_every_user_slower() -> None:
    layout = layouts(RUBIN, Catalog.load())[0]
    speeds = [point_at(layout, CODING, users).tokens_per_s_per_user for users in (1, 2, 4)]
    assert speeds == sorted(speeds, reverse=True)
    by_context = [point_at(layout, workload, 1).tokens_per_s_per_user for workload in (BATCH, CODING, AGENTIC)]
    assert by_context == sorted(by_context, reverse=True)


@pytest.mark.slow
def test_an_overridden_assumption_changes_the_row_that_names_it() -> None:
    claims = []
    for overrides in ({}, {"lpx.link_latency_s": 9e-6}):
        catalog = Catalog.load(overrides)
        found = fastest(layouts(AFD, catalog), catalog)
        assert found is not None
        claims.append(speed_claim({AFD.name: found}))
    before, after = claims
    assert "lpx.link_latency_s" in before.assumptions
    assert (after.numbers[AFD.name] or 0) < (before.numbers[AFD.name] or 0)
    assert after.ours != before.ours


def test_an_unknown_override_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="no such number"):
        write_figures(tmp_path / "figures", {"lp31.tdp_w": 1.0})
    assert not (tmp_path / "figures").exists()


@pytest.mark.slow
def test_every_number_of_the_article_has_a_row_on_the_page(written: Path) -> None:
    claims: list[dict[str, Any]] = json.loads((written / "figures.json").read_text())["claims"]
    page = (written / "index.html").read_text()
    assert {number for number in STATED if not any(number in claim["stated"] for claim in claims)} == set()
    assert len({claim["id"] for claim in claims}) == len(claims)
    for number in ("3", "4", "5", "6", "7"):
        assert f"Figure {number}" in page
    assert "<script src=" not in page  # opens without a network


@pytest.mark.slow
def test_the_json_agrees_with_itself(written: Path) -> None:
    numbers = json.loads((written / "figures.json").read_text())
    session, claims = numbers["session"], {claim["id"]: claim for claim in numbers["claims"]}
    cached, total = (sum(one[kind] for one in session) for kind in ("cached_tokens", "input_tokens"))
    assert claims["hit_rate"]["numbers"]["session"] == pytest.approx(cached / total)
    assert claims["requests"]["numbers"]["requests"] == len(session)
    named = {name for claim in numbers["claims"] for name in claim["assumptions"]}
    assert named <= {one["name"] for one in numbers["assumptions"]}
    for points in numbers["fronts"].values():
        assert {one["workload"] for one in points} == {one["name"] for one in numbers["workloads"]}
    assert all(claim["reason"] and claim["how"] for claim in numbers["claims"])


@pytest.mark.slow
def test_the_session_through_the_simulator_is_the_traced_one_and_hits_no_more_than_is_possible() -> None:
    turns = read_session()
    run, endless = run_session(resolve(cluster(RUBIN.file), Catalog.load()), turns), infinite_cache(turns)
    assert sorted(one.turn.id for one in run.served) == [turn.id for turn in turns]
    assert input_tokens(run.main) + input_tokens(run.delegated) == input_tokens(run.served)
    assert hit_rate(run.served) <= endless.hit_rate
    cold = type(run)((*run.main[:2], *run.delegated[:2]))  # first requests find little: the claim must fall
    verdicts = {claim.id: claim.verdict for claim in session_claims(cold, endless)}
    assert verdicts["hit_rate"] is Verdict.NOT_SUPPORTED


@pytest.mark.slow
def test_the_simulator_gives_what_the_fronts_say(written: Path) -> None:
    checks = json.loads((written / "figures.json").read_text())["checks"]
    assert checks
    assert all(abs(check["deviation"]) < 0.1 for check in checks)
