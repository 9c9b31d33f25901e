"""`weft simulate --platforms`: what is said of a system that is fast enough, and of one that is not."""

import json
from math import inf
from pathlib import Path

import pytest

from orchestrator.cli.fronts import AGENTIC, Point
from orchestrator.cli.main import main
from orchestrator.cli.platforms import SHOWN, Platform, pareto_table, platform_table, platforms
from orchestrator.core.cost.parts import PassParts
from orchestrator.profiles.catalog import Catalog

PARTS = PassParts(kv_s=0.003, weights_s=0.002, floor_s=0.001, exchange_s=0.0, hop_s=0.0, drafting_s=0.0, pass_s=0.006)


def point(speed: float, usd: float) -> Point:
    return Point("it", "agentic", "a layout", 2, speed, 1.0, 1000.0, usd)


def platform(at_target: Point | None = None, points: int = 20) -> Platform:
    pareto = tuple(point(100.0 + number, 1.0 + number) for number in range(points))
    return Platform("it", "a model", pareto, pareto[-1], PARTS, 1.0, at_target, None)


def test_a_system_that_is_too_slow_says_what_binds_and_what_would_be_without_it() -> None:
    text = platform().why(400.0)
    assert text.startswith("it: 400 tokens/s/user is not reached, at most 119 (a layout); a pass of 6.00 ms")
    assert "KV read 3.00 ms, weights 2.00 ms, floor 1.00 ms; KV read binds, without any of it 333 would be." in text


def test_a_system_that_is_fast_enough_says_for_whom_and_at_what_price() -> None:
    text = platform(at_target=point(410.0, 17.2)).why(400.0)
    assert "400 tokens/s/user is reached, for 2 users a node at USD 17 a million tokens (a layout)" in text


def test_a_pass_of_one_part_would_take_no_time_without_it() -> None:
    parts = PassParts(kv_s=0.001, weights_s=0.0, floor_s=0.0, exchange_s=0.0, hop_s=0.0, drafting_s=0.0, pass_s=0.001)
    alone = Platform("it", "a model", (point(1.0, 1.0),), point(1.0, 1.0), parts, 1.0, None, 0.001)
    assert alone.speed_without("KV read") == inf


def test_fronts_are_shown_from_their_cheapest_to_their_fastest_point() -> None:
    rows = pareto_table([platform(), platform(points=3)]).rows
    assert [rows[0][1], rows[-1][1]] == ["100 at 1", "119 at 20"]
    assert [row[2] for row in rows] == ["100 at 1", "101 at 2", "102 at 3", *[""] * (SHOWN - 3)]


def test_what_is_not_reached_has_no_price() -> None:
    (row,) = [row for row in platform_table([platform()]).rows if row[0] == "USD / M tokens at 400"]
    assert row == ["USD / M tokens at 400", "–"]


@pytest.mark.slow
def test_the_platforms_fit_their_workload_and_lpx_is_what_is_fast(tmp_path: Path) -> None:
    found = {one.name: one for one in platforms(Catalog.load(), AGENTIC)}
    assert len(found) == 6
    fastest = max(found.values(), key=lambda one: one.fastest.tokens_per_s_per_user)
    assert "LPX" in fastest.name
    for one in found.values():
        speeds = [point.tokens_per_s_per_user for point in one.pareto]
        assert speeds == sorted(speeds)
    assert main(["simulate", "--platforms", "--json", str(tmp_path / "found.json")]) == 0
    told = json.loads((tmp_path / "found.json").read_text())
    assert [system["name"] for system in told["systems"]] == list(found)
