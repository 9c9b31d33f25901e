"""Sessions reenacted against a real gateway: order, and what their agents tell."""

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.cli.reenact import Harness, Reenactment, ScaledTurn, TurnResult
from orchestrator.sim.hints import HintProgram
from tests.builders import some
from tests.live.serving import run
from tests.live.test_hints import config_of, gateways

pytestmark = pytest.mark.slow


def turn(number: int, agent: str, after: tuple[int, ...], tokens: int) -> ScaledTurn:
    return ScaledTurn(number, f"s/{agent}", agent, after, 0.01, tuple(range(100, 100 + tokens)), 2)


TURNS = (turn(1, "main", (), 20), replace(turn(2, "sub", (1,), 30), service_tier="batch"), turn(3, "main", (1, 2), 40))


def reenact(harness: Harness | None) -> tuple[list[TurnResult], str]:
    """Reenact the turns; return their results and the gateway's metrics."""
    results: list[TurnResult] = []
    pages: list[str] = []

    async def scenario() -> None:
        async with gateways(config=replace(config_of(), tenants=())) as (_, (gateway,)):
            address = gateway.front.status()["grpc_address"]
            told = Harness(harness.address or address, harness.program) if harness is not None else None
            results.extend(await Reenactment(str(gateway.http.base_url), "default", TURNS, lambda _: None, told).run())
            pages.append((await gateway.http.get("/metrics")).text)

    run(scenario)
    return results, pages[0]


def answers(page: str) -> dict[str, int]:
    """Return how many answers a page of metrics counts, by class."""
    samples = [one for family in text_string_to_metric_families(page) for one in family.samples]
    counts = [(one.labels["class"], int(one.value)) for one in samples if one.name == "weft_request_seconds_count"]
    return {name: sum(count for other, count in counts if other == name) for name, _ in counts}


def actions(page: str) -> list[str]:
    """Return which actions on the cache a page of metrics counts."""
    return sorted(line.split('"')[1] for line in page.splitlines() if line.startswith("weft_hint_actions_total{"))


def test_turns_come_after_those_they_wait_for_and_agents_tell_of_pauses_and_ends() -> None:
    results, page = reenact(Harness("", HintProgram.ORACLE))
    assert [result.failure for result in results] == ["", "", ""]
    ends = [result.ended_s for result in results]
    assert results[1].started_s > ends[0]
    assert results[2].started_s > ends[1]
    assert actions(page) == ["end_session", "tool_started"]
    assert answers(page) == {"standard": 2, "batch": 1}
    assert all(0.0 <= sum(result.gaps_s) <= result.ended_s - result.started_s - result.ttft_s for result in some(results))
    assert any(result.gaps_s for result in results)


def test_agents_without_a_harness_tell_nothing() -> None:
    results, page = reenact(None)
    assert [result.failure for result in results] == ["", "", ""]
    assert actions(page) == []


def test_what_could_not_be_told_is_a_failure() -> None:
    results, _ = reenact(Harness("127.0.0.1:9", HintProgram.LEARNED))
    assert [result.failure.partition(":")[0] for result in results] == ["what its agent told"] * 3
