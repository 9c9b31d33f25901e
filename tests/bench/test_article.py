"""Tests of the article's figures: every number has a row, the files agree with themselves, verdicts follow the numbers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.article import write_figures
from bench.article.claim import ABOUT, Claim, Reading, Verdict, agreement, judged, put_in
from bench.article.claims.caching import (
    MIX_CACHED_TOKENS,
    MIX_INPUT_TOKENS,
    MIX_REQUESTS,
    MIX_SESSIONS,
    PLAIN,
    WITH_WRITES,
    cache_claims,
)
from bench.article.claims.cost import gain
from bench.article.claims.gpu_afd import FAST_AFD_GAIN, gpu_afd, gpu_afd_claim
from bench.article.claims.measured import Compared, measured_claim
from bench.article.claims.restoring import restoring, spared
from bench.article.claims.session import session_claims
from bench.article.claims.speed import fastest, speed_claim
from bench.article.claims.tiers import tiered
from bench.article.sensitivity import crossing, leading, reach
from bench.article.session import hit_rate, input_tokens, one_shot, read_session, run_session
from orchestrator.cli.fronts import (
    AFD,
    AGENTIC,
    BATCH,
    CODING,
    DRAFTER,
    RUBIN,
    Point,
    System,
    best_at,
    by_price,
    by_throughput,
    cluster,
    front,
    layouts,
    point_at,
    relaid,
)
from orchestrator.profiles.catalog import Catalog, CatalogError
from orchestrator.profiles.resolve import resolve
from orchestrator.sim.bounds import infinite_cache
from orchestrator.traces import read_trace
from tests.builders import some

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
    missed = "The ratio lies below the stated range by a factor of 2.50"
    assert judged(2.0, 5.0, 6.0, "ratio") == (Verdict.NOT_SUPPORTED, missed)


def test_a_claim_with_several_readings_is_judged_by_all_of_them() -> None:
    inside, outside = Reading("one", 0.96, 0.97), Reading("other", 0.94, 0.96)  # the second begins below the band
    assert agreement([inside], 0.95, 0.98)[0] is Verdict.REPRODUCED
    assert agreement([inside, outside], 0.95, 0.98) == (Verdict.ASSUMING, [inside], [outside])
    assert agreement([outside], 0.95, 0.98)[0] is Verdict.NOT_SUPPORTED


def test_canary_what_is_put_in_is_checked_for_being_there() -> None:
    assert put_in((58, 58, 58), (225, 225, 225))[0] is Verdict.GIVEN
    verdict, reason = put_in((58, 58, 58), (224, 225, 225), (None, 1, 2))
    assert verdict is Verdict.NOT_REPRODUCED
    assert reason.endswith("made to have: 224, nothing")


def test_a_gain_is_above_one_for_the_better_system_whichever_way_its_merit_counts() -> None:
    better, baseline = [point(10, 100)], [point(10, 50)]
    assert gain(better, baseline, 10, by_throughput) == gain(better, baseline, 10, by_price) == 2
    assert gain(better, baseline, 11, by_price) is None  # neither is so fast


def test_one_measurement_that_is_missed_spoils_the_comparison_and_is_named() -> None:
    within, about = Compared("a range", 1.4, 3.0, 2.9), Compared("a number", 2.0, 2.0, 2.0 * ABOUT)
    far, never = Compared("another", 2.0, 2.0, 5.0), Compared("beyond", 2.0, 2.0, None)
    assert [row.holds for row in (within, about, far, never)] == [True, True, False, False]
    assert [row.factor for row in (within, far, never)] == [1.0, 2.5, None]
    assert measured_claim([within, about]).verdict is Verdict.REPRODUCED
    missed = measured_claim([within, far, never])
    assert missed.verdict is Verdict.NOT_REPRODUCED
    assert "another: 2.50 times what was measured" in missed.reason


def test_what_a_target_takes_is_found_with_one_assumption_and_with_all() -> None:
    catalog = Catalog.load()
    (tdp,) = (one for one in catalog.assumptions if one.name == "lp30.tdp_w")

    def result(changed: Catalog) -> float | None:
        """Less power is better; there is no result with fewer chips than are used."""
        chips = changed.number("lp30.domain_chips")
        return None if chips < catalog.number("lp30.domain_chips") else tdp.value / changed.number(tdp.name)

    found = reach((tdp.name, "lp30.domain_chips"), catalog, result, 1.1)
    assert found.effects[0].name == "lp30.domain_chips"  # it may make the result vanish, and tells nothing more
    assert found.leading == leading(found.effects) == found.effects[1]
    assert found.deciding_value == pytest.approx(tdp.value / 1.1)
    assert found.within_range
    assert found.at_best == pytest.approx(tdp.value / tdp.low)
    assert not reach((tdp.name,), catalog, result, 1e6).within_range


@pytest.mark.slow
def test_the_numbers_quoted_of_the_real_sessions_are_what_the_bundled_file_gives() -> None:
    turns = list(read_trace(MIX))
    bound, sessions = infinite_cache(turns), {turn.session for turn in turns}
    assert (bound.input_tokens, bound.cached_tokens) == (MIX_INPUT_TOKENS, MIX_CACHED_TOKENS)
    assert (len(sessions), len(turns)) == (MIX_SESSIONS, MIX_SESSIONS * MIX_REQUESTS)


@pytest.mark.slow
def test_agents_of_one_request_each_start_afresh_and_find_only_what_agents_share() -> None:
    turns = read_session()
    single = one_shot(turns)
    before, after = ([turn for turn in some if turn.agent == "main"] for some in (turns, single))
    assert before == after
    delegated = [turn for turn in single if turn.agent != "main"]
    assert len({turn.agent for turn in delegated}) == len(delegated) == len(turns) - len(before)
    assert all(len(turn.blocks) == turn.input_tokens // turn.block_tokens for turn in some(delegated))
    one, other = (set(turn.blocks) for turn in delegated[-2:])
    assert one & other < one  # they share tools and system prompt, and no more
    assert infinite_cache(single).hit_rate < infinite_cache(turns).hit_rate


def test_a_longer_context_takes_longer_to_bring_back_and_longer_still_to_compute() -> None:
    short, long = restoring(Catalog.load(), (100_000, 400_000))
    assert short.cpu_s < short.cmx_s < short.recompute_s
    assert long.cmx_gain > short.cmx_gain
    assert long.cmx_bytes_per_s_least < short.cmx_bytes_per_s_least
    assert 0 < long.cpu_contexts < short.cpu_contexts < short.cmx_contexts


@pytest.mark.slow
def test_sessions_that_do_not_fit_find_in_lower_tiers_what_they_compute_again_without() -> None:
    fits, alone, memory, storage = tiered(Catalog.load(), read_session(), sessions=8)
    assert alone.hbm < fits.hbm == fits.hit_rate
    assert fits.blocks > alone.blocks == memory.blocks == storage.blocks
    assert (alone.cpu, alone.cmx, memory.cmx) == (0, 0, 0)
    assert memory.cpu > 0 < storage.cmx
    assert alone.hit_rate < min(memory.hit_rate, storage.hit_rate)


def test_waiting_for_storage_spares_less_than_loading_for_nothing_and_both_more_than_computing() -> None:
    for one in spared(Catalog.load()):
        assert 1 < one.ours_waiting < one.ours
        assert one.theirs.shape in ("", one.shape)  # ours is of the same model where its shape is known


def test_a_group_may_have_its_part_of_a_drafting_rack_which_costs_less_than_all_of_it() -> None:
    whole, part = DRAFTER.other_half(8)
    assert whole > part >= whole * 8 / DRAFTER.sharing_gpus  # no group gets less than its part
    assert DRAFTER.other_half(DRAFTER.sharing_gpus) == (whole,)
    assert AFD.other_half(8) == (AFD.ffn_chips,)


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
def test_a_drafter_that_does_not_fit_into_a_part_of_a_rack_has_no_layout_there() -> None:
    by_chips = {one.decode.hardware.ffn_chips: one for one in layouts(DRAFTER, Catalog.load())}
    large = Catalog.load({"lpx.draft_parameters": 30e9})
    assert relaid(by_chips[min(by_chips)], large) is None
    assert relaid(by_chips[DRAFTER.ffn_chips], large) is not None


@pytest.mark.slow
def test_the_gpus_own_split_is_judged_by_the_measured_gain() -> None:
    found = gpu_afd(Catalog.load())
    assert found is not None
    assert found.gain < found.ideal  # hops, cut batches and the longer half only cost
    slow = gpu_afd(Catalog.load({"blackwell.expert_efficiency": 0.05}))
    assert slow is not None
    assert slow.gain < found.gain
    assert gpu_afd_claim(slow).verdict is Verdict.NOT_REPRODUCED
    assert gpu_afd_claim(replace(found, gain=FAST_AFD_GAIN)).verdict is Verdict.REPRODUCED


@pytest.mark.slow
@pytest.mark.parametrize(("system", "name", "worse"), [(AFD, "lpx.link_latency_s", 9e-6), (RUBIN, "practice.acceptance", 0.5)])
def test_an_overridden_assumption_changes_the_row_that_names_it(system: System, name: str, worse: float) -> None:
    claims: list[Claim] = []
    for overrides in ({}, {name: worse}):
        catalog = Catalog.load(overrides)
        found = fastest(layouts(system, catalog), catalog)
        assert found is not None
        claims.append(speed_claim({system.name: found}))
    before, after = claims
    assert name in before.assumptions
    assert (after.numbers[system.name] or 0) < (before.numbers[system.name] or 0)
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
    assert all(f"Figure {number}" in page for number in range(3, 8))
    assert "<script src=" not in page  # opens without a network


@pytest.mark.slow
def test_the_json_agrees_with_itself(written: Path) -> None:
    numbers = json.loads((written / "figures.json").read_text())
    session, claims = numbers["session"], {claim["id"]: claim for claim in numbers["claims"]}
    rate = sum(one["cached_tokens"] for one in session) / sum(one["input_tokens"] for one in session)
    assert claims["hit_rate"]["numbers"]["session"] == pytest.approx(rate)
    assert claims["requests"]["numbers"]["requests"] == len(session)
    named = {name for claim in numbers["claims"] for name in claim["assumptions"]}
    assert named <= {one["name"] for one in numbers["assumptions"]}
    for points in numbers["fronts"].values():
        assert {one["workload"] for one in points} == {one["name"] for one in numbers["workloads"]}
    assert all(claim["reason"] and claim["how"] for claim in some(numbers["claims"]))


@pytest.mark.slow
def test_the_session_through_the_simulator_is_the_traced_one_and_hits_no_more_than_is_possible() -> None:
    turns = read_session()
    run, endless = run_session(resolve(cluster(RUBIN.file), Catalog.load()), turns), infinite_cache(turns)
    assert sorted(one.turn.id for one in run.served) == [turn.id for turn in turns]
    assert input_tokens(run.main) + input_tokens(run.delegated) == input_tokens(run.served)
    assert hit_rate(run.served) <= endless.hit_rate
    assert run.critical_s < run.duration_s
    single = infinite_cache(one_shot(turns))
    whole = {claim.id: claim for claim in (*session_claims(run), *cache_claims(run, endless, single))}
    cold = type(run)((*run.main[:2], *run.delegated[:2]))  # first requests find little: the claims must fall
    verdicts = {claim.id: claim.verdict for claim in (*session_claims(cold), *cache_claims(cold, endless, single))}
    assert verdicts["hit_rate"] is verdicts["requests"] is verdicts["contexts"] is Verdict.NOT_REPRODUCED
    assert whole["requests"].verdict is whole["contexts"].verdict is Verdict.GIVEN
    assert Verdict.GIVEN not in {whole[name].verdict for name in ("duration", "hit_rate", "input_bill", "chat")}
    # Real sessions do not agree, so the simulated one alone cannot carry the claim; nor can one of several ways to count.
    assert whole["hit_rate"].verdict is whole["chat"].verdict is Verdict.ASSUMING


@pytest.mark.slow
def test_no_way_to_use_lpx_beats_decoding_for_nothing(written: Path) -> None:
    numbers = json.loads((written / "figures.json").read_text())
    bounds, gains = numbers["free_decode_gains"], numbers["lpx_gains"]
    assert {one["system"] for one in gains} > {AFD.name}
    assert all(0 < value <= bounds[speed] for one in some(gains) for speed, value in one["by_speed"].items())
    (claim,) = (claim for claim in numbers["claims"] if claim["id"] == "lpx_gains")
    beyond = [one for one in gains if one["reach"]["at_best"] < one["quoted"] / ABOUT]  # no assumptions give it
    assert not beyond or claim["verdict"] == Verdict.NOT_SUPPORTED


@pytest.mark.slow
def test_the_simulator_gives_what_the_fronts_say(written: Path) -> None:
    checks = json.loads((written / "figures.json").read_text())["checks"]
    assert checks
    assert all(abs(check["deviation"]) < 0.1 for check in some(checks))
