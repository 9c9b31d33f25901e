"""The report of a simulation: one page that needs nothing else, a section for every question, tables beside charts."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.cases import Case
from orchestrator.cli.cluster_file import AGENT_SESSION, UnusableInput
from orchestrator.cli.main import main
from orchestrator.cli.report.charts import Series, Swing, by_width, cache_chart, context_chart, longest_sessions, pareto_chart
from orchestrator.cli.report.page import Badge, Section, Table, Tone, page
from orchestrator.cli.report.runs import gap_curve
from orchestrator.cli.sweeps import HEAVIEST_REQUESTS_MAX, copies, load_factors, swings, swung_cases
from orchestrator.core.config import ClusterConfig, RouterPolicy
from orchestrator.profiles.catalog import Catalog
from orchestrator.profiles.resolve import resolve
from orchestrator.sim.outcome import Distribution, Outcome, Served
from orchestrator.sim.runs import CacheRule, Run
from orchestrator.traces import TracedTurn
from tests.builders import some

CLUSTER = """
[cluster]
name = "small"

[models.default]
shape = "gpt-oss-120b"

[[pools]]
name = "workers"
kind = "aggregated"
nodes = 2

[pools.engine]
block_tokens = 16

[pools.hardware]
chip = "gb200"
weights = "fp8"
activations = "fp8"
kv = "fp8"
"""


def turn(number: int, **changes: Any) -> TracedTurn:
    fields: dict[str, Any] = {
        "id": number, "session": "s", "agent": "main", "arrival_s": 60.0 * number, "after": (), "gap_s": 0.0,
        "input_tokens": 100, "output_tokens": 3, "block_tokens": 16, "block_runs": ((10 * number, 6),),
    }  # fmt: skip
    return TracedTurn(**{**fields, **changes})


def served(number: int, cached: int = 0, **changes: Any) -> Served:
    made = turn(number, **changes)
    return Served(made, made.arrival_s, made.arrival_s + 1, made.arrival_s + 2, cached, output_tokens=3)


def test_a_chart_tells_cached_tokens_by_tier_where_stores_brought_some() -> None:
    without, plain = served(1, 64), served(2, 0)
    assert [trace["name"] for trace in cache_chart([without, plain]).data] == ["from cache", "computed"]
    loaded = served(2, 64)
    loaded.cpu_tokens, loaded.cmx_tokens = 16, 32
    data = {trace["name"]: trace["y"] for trace in cache_chart([without, loaded]).data}
    assert data == {"from hbm": [64, 16], "from cpu": [0, 16], "from cmx": [0, 32], "computed": [36, 36]}


@pytest.mark.slow
def test_the_report_shows_tiers_where_there_are_stores(tmp_path: Path) -> None:
    path, report = tmp_path / "cluster.toml", tmp_path / "report"
    path.write_text(CLUSTER)
    sets = ["pools[0].engine.blocks=2000", "store.cpu_bytes=100000000000", "store.cmx=file:///any"]
    arguments = ["--cluster", path, "--trace", AGENT_SESSION, "--limit", "8", "--no-bounds", "--report", report]
    assert main(["simulate", *map(str, arguments), *(part for one in sets for part in ("--set", one))]) == 0
    text = (report / "index.html").read_text()
    assert "Tier occupancy: stores" in re.findall(r"<h2>(.*?)</h2>", text)
    assert {"hit rate, cpu", "from hosts' memory (cpu)", "from shared storage (cmx)"} <= {
        cell.replace("&#x27;", "'") for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", text)
    }


@pytest.mark.slow
def test_the_report_answers_every_question_and_needs_no_network(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("orchestrator.cli.sweeps.HEAVIEST_REQUESTS_MAX", 16)
    path, report = tmp_path / "cluster.toml", tmp_path / "report"
    path.write_text(CLUSTER)
    arguments = ["--cluster", path, "--trace", AGENT_SESSION, "--limit", "8", "--policy", "random", "sglang", "--report", report]
    assert main(["simulate", *map(str, arguments)]) == 0
    text = (report / "index.html").read_text()
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    for wanted in (
        "All figures", "Context growth by agent", "Cached and uncached tokens", "Throughput against interactivity",
        "Cost against interactivity", "Pool utilisation", "Requests running and waiting", "Tier occupancy: workers",
        "Time to first token", "Time between tokens", "Which assumptions mattered: USD per million tokens", "Assumptions",
    ):  # fmt: skip
        assert wanted in headings
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="', text)
    assert "wrote" in capsys.readouterr().err


def test_a_page_is_the_same_for_the_same_arguments_and_escapes_what_it_is_told() -> None:
    chart = pareto_chart([Series("a", [1, 2], [3, 4])], "x", "y")
    sections = [Section("One <two>", ["three & four"], chart, Table(["", "five"], [["six", "<seven>"]]))]
    text = page("<title>", ["made & done"], sections)
    assert text == page("<title>", ["made & done"], sections)
    assert [escaped in text for escaped in ("One &lt;two&gt;", "three &amp; four", "&lt;seven&gt;", "&lt;title&gt;")] == [
        True
    ] * 4


def test_words_stand_at_the_left_and_figures_at_the_right() -> None:
    table = Table(["what", "figure", "words"], [["a", "1.5 to 2", "fits"], ["b", "-", "x" * 40], ["c", "<0.1 ms", "<b>"]])
    text = page("t", [], [Section("s", table=table)])
    assert '<th scope="col" class="text">what</th><th scope="col">figure</th><th scope="col" class="text">words</th>' in text
    assert '<td>1.5 to 2</td><td class="text">fits</td>' in text
    assert "&lt;0.1 ms" in text


def test_a_badge_has_a_word_and_a_colour() -> None:
    text = page("t", [], [Section("s", table=Table(["what", "verdict"], [["a", Badge("holds & more", Tone.GOOD)]]))])
    assert '<span class="badge good">holds &amp; more</span>' in text


def test_a_folded_section_is_opened_by_its_reader_or_by_a_link_to_it() -> None:
    text = page("t", [], [Section("seen"), Section("detail", ["small print"], folded=True)])
    assert '<section id="s0">' in text
    assert '<details id="s1"><summary><h2>detail</h2></summary><p>small print</p></details>' in text
    assert 'href="#s1"' in text


def test_charts_without_plotly_are_one_clear_error_and_pages_without_charts_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert "Plotly" not in page("t", [], [Section("s", ["text"])])
    with pytest.raises(UnusableInput, match=r"pip install 'weft\[plan\]'"):
        page("t", [], [Section("s", figure=pareto_chart([Series("a", [1], [2])], "x", "y"))])


def test_what_a_chart_names_cannot_end_its_script() -> None:
    text = page("t", [], [Section("s", figure=pareto_chart([Series("</script><b>", [1], [2])], "x", "y"))])
    assert "</script><b>" not in text


def test_contexts_are_drawn_an_agent_a_line_with_the_main_agent_on_top() -> None:
    requests = [served(1), served(2, agent="explore"), served(3)]
    lines = context_chart(requests).data
    assert [(line["name"], line["x"]) for line in lines] == [("sub-agents", [2.0]), ("main agent", [1.0, 3.0])]


def test_only_whole_sessions_are_drawn_the_longest_first_and_at_least_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.cli.report.charts.POINTS_MAX", 3)
    requests = [served(1), served(2, session="t"), served(3), served(4, session="t"), served(5)]
    assert [request.turn.id for request in longest_sessions(requests)] == [1, 3, 5]
    monkeypatch.setattr("orchestrator.cli.report.charts.POINTS_MAX", 1)
    assert [request.turn.id for request in longest_sessions(requests)] == [1, 3, 5]


def test_cached_and_computed_tokens_are_joined_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [served(1, 10), served(2, 20), served(3, 30)]
    assert [bar["y"] for bar in cache_chart(requests).data] == [[10, 20, 30], [90, 80, 70]]
    monkeypatch.setattr("orchestrator.cli.report.charts.BARS_MAX", 2)
    assert [bar["y"] for bar in cache_chart(requests).data] == [[30, 30], [170, 70]]


def test_copies_share_nothing_and_keep_what_depends_on_what() -> None:
    turns = [turn(1), turn(2, after=(1,), gap_s=1.0)]
    doubled = copies(turns, 2, seed=5)
    assert doubled == copies(turns, 2, seed=5)
    assert len({one.id for one in doubled}) == 4
    first, second = (one for one in doubled if one.session == "s+1")
    assert second.after == (first.id,)
    assert second.arrival_s - first.arrival_s == 60.0
    assert not {block for one in (first, second) for block in one.blocks} & {block for one in turns for block in one.blocks}


def test_load_is_doubled_while_it_is_affordable() -> None:
    assert load_factors(HEAVIEST_REQUESTS_MAX // 4) == [1, 2, 4]
    assert load_factors(HEAVIEST_REQUESTS_MAX + 1) == [1]


def test_each_assumption_that_a_cluster_rests_on_is_run_at_both_ends() -> None:
    hardware = {"chip": "gb200", "weights": "fp8", "activations": "fp8", "kv": "fp8"}
    pool = {"name": "a", "kind": "aggregated", "hardware": hardware}
    config = ClusterConfig.from_mapping({"models": {"default": {"shape": "gpt-oss-120b"}}, "pools": [pool]})
    catalog = Catalog.load()
    pick = Case(resolve(config, catalog), RouterPolicy.RANDOM, CacheRule.VALUE, [turn(1)], seed=0)
    cases = swung_cases(pick, config, catalog)
    used = set(next(iter(pick.resolved.hardware.values())).assumptions)
    assert {one.assumption.name for one in cases} <= used
    assert cases
    assert all(one.low.resolved != one.high.resolved for one in some(cases))
    # Runs come back low and high in turn; a figure that a run does not have draws nothing.
    runs = [run(float(number)) for number in range(2 * len(cases))]
    assert [(swing.low, swing.high) for swing in swings(cases, runs, ("cost",))][:2] == [(0.0, 1.0), (2.0, 3.0)]
    assert swings(cases, runs, ("absent",)) == []


def run(cost: float) -> Run:
    return Run({"cost": cost}, Outcome([], {}, Distribution()))


def test_the_widest_swing_is_on_top() -> None:
    narrow, wide = Swing("a", 1.0, 1.1), Swing("b", 3.0, 1.0)
    assert by_width([narrow, wide]) == [wide, narrow]


def test_gaps_become_a_curve_that_ends_at_all() -> None:
    gaps = Distribution()
    gaps.add(0.01, 3)
    gaps.add(0.02, 1)
    assert [share for _, share in gap_curve(gaps)] == [0.75, 1.0]
    assert gap_curve(Distribution()) == []


def test_canary_an_address_in_the_page_would_be_noticed() -> None:
    assert re.search(r'<(script|link|img)[^>]+(src|href)="', '<script defer src="https://example.org/plotly.js">')
