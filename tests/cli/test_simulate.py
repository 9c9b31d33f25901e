"""`weft simulate`: what it prints and writes, what can be set, and the one line that says what was wrong."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.cases import Case, run_cases
from orchestrator.cli.cluster_file import AGENT_SESSION, FOLDER, UnusableInput, read_cluster
from orchestrator.cli.main import main
from orchestrator.cli.overrides import field_paths, parse_overrides, set_field
from orchestrator.cli.report.comparison import number, percent, seconds
from orchestrator.cli.simulate import best_of
from orchestrator.cli.workload import read_workload
from orchestrator.core.config import ClusterConfig, RouterPolicy
from orchestrator.profiles.resolve import Resolved
from orchestrator.sim.outcome import Distribution, Outcome
from orchestrator.sim.runs import CacheRule, Run
from tests.builders import some

CLUSTER = """
[[pools]]
name = "workers"
kind = "aggregated"
nodes = 2

[pools.engine]
name = "profiled"
block_tokens = 16
blocks = 512

[pools.profile]
step_s = 0.01
prefill_token_s = 0.0001
"""
TRACE_LINE = {
    "id": 1, "session": "s", "agent": "main", "timestamp": 0, "deps": [], "gap_ms": 0, "input_length": 40, "output_length": 4,
    "block_size": 16, "hash_ranges": [[1, 2]],
}  # fmt: skip


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.toml"
    path.write_text(CLUSTER)
    return path


def weft(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        code = main(["simulate", *map(str, arguments)])
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_table_has_a_column_a_policy_and_two_for_the_bounds(capsys: pytest.CaptureFixture[str], cluster: Path) -> None:
    arguments = ("--cluster", cluster, "--trace", AGENT_SESSION, "--limit", 12, "--policy", "predicted-time", "random")
    code, out, err = weft(capsys, *arguments)
    assert (code, err) == (0, "")
    heading = out.splitlines()[1]
    columns = ("predicted-time", "random", "no eviction", "optimal eviction")
    assert [column in heading for column in columns] == [True] * 4
    assert "first 12 requests" in out
    assert "TTFT p99" in out


def test_stores_beside_pools_of_which_the_profile_alone_is_known(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    # blocks of the profiled engine are 64 bytes
    path.write_text('[store]\ncpu_bytes = 64000\ncmx = "file:///any"\n' + CLUSTER.replace("blocks = 512", "blocks = 64"))
    flags = ("--policy", "predicted-time", "--json", "-", "--no-bounds")
    code, out, err = weft(capsys, "--cluster", path, "--trace", AGENT_SESSION, *flags)
    assert (code, err) == (0, "")
    (run,) = json.loads(out)["runs"]
    assert (run["stores"]["hosts"], run["stores"]["cpu"]["blocks"]) == (1, 1000)
    assert run["hit_rate_by_tier"]["cpu"] > 0


@pytest.mark.slow
def test_a_draft_model_is_simulated_alike_beside_the_model_and_in_a_pool_of_its_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    drafted = CLUSTER.replace("profiled", "eager").replace("step_s = 0.01", "step_s = 0.01\ndraft_step_s = 0.0005")
    drafted = "[store]\ncpu_bytes = 64_000_000\n" + drafted + '[pools.engine.speculation]\nmethod = "draft_model"\n'
    pool = '[[pools]]\nname = "drafts"\nkind = "lpx"\nnodes = 3\n[pools.drafter]\nmodel = "/small"\n'
    found: list[Any] = []
    for place, more in enumerate(('draft_model = "/small"\n', 'draft_pool = "drafts"\n' + pool)):
        path = tmp_path / f"{place}.toml"
        path.write_text(drafted + more)
        flags = ("--limit", 6, "--policy", "predicted-time", "--cache", "lru", "value", "--json", "-", "--seed", 7)
        code, out, err = weft(capsys, "--cluster", path, "--trace", AGENT_SESSION, *flags)
        assert (code, err) == (0, "")
        found.append(json.loads(out))
    beside, apart = found
    for one in found:
        for run in (*one["runs"], one["bounds"]["offline_optimum"]["run"], one["bounds"]["infinite_cache"]["run"]):
            del run["wall_s"]
    assert apart["runs"] == beside["runs"]
    assert apart["bounds"] == beside["bounds"]
    assert apart["runs"][0]["pools"]["workers"]["drafted_tokens"] > 0


def test_json_has_every_run_under_every_cache_and_the_bounds(capsys: pytest.CaptureFixture[str], cluster: Path) -> None:
    flags = ("--limit", 5, "--policy", "dynamo", "sglang", "--cache", "lru", "value", "--json", "-", "--seed", 7)
    code, out, _ = weft(capsys, "--cluster", cluster, "--trace", AGENT_SESSION, *flags)
    found = json.loads(out)
    assert code == 0
    runs = [(run["policy"], run["cache"]) for run in found["runs"]]
    assert runs == [("dynamo", "lru"), ("sglang", "lru"), ("dynamo", "value"), ("sglang", "value")]
    assert all(run["completed"] == run["requests"] == 5 for run in some(found["runs"]))
    assert found["seed"] == 7
    assert found["bounds"]["offline_optimum"]["run"]["cache"] == "optimal"
    assert found["bounds"]["infinite_cache"]["cached_tokens"] >= found["bounds"]["offline_optimum"]["cached_tokens"]


def test_a_field_that_is_set_counts(capsys: pytest.CaptureFixture[str], cluster: Path) -> None:
    flags = ("--limit", 3, "--policy", "random", "--no-bounds", "--json", "-", "--set", "pools[0].nodes=5")
    _, out, _ = weft(capsys, "--cluster", cluster, "--trace", AGENT_SESSION, *flags)
    found = json.loads(out)
    assert (found["runs"][0]["pools"]["workers"]["nodes"], found["bounds"]) == (5, {})


def test_a_store_may_be_set_where_the_file_has_none_and_hits_are_told_by_tier(capsys: pytest.CaptureFixture[str]) -> None:
    pools = [f"pools[{pool}].{field}" for pool in (0, 1) for field in ("nodes=1", "engine.blocks=3500")]
    settings = [*pools, "store.cpu_bytes=300000000000", "store.cmx=file:///any"]
    flags = [flag for setting in settings for flag in ("--set", setting)]
    arguments = ("--cluster", FOLDER / "sim" / "vr-nvl72.toml", "--trace", AGENT_SESSION, "--limit", 3)
    code, out, err = weft(capsys, *arguments, "--policy", "predicted-time", "--no-bounds", *flags)
    assert (code, err) == (0, "")
    assert [tier in out for tier in ("hit rate, hbm", "hit rate, cpu", "hit rate, cmx")] == [True] * 3


def test_bounds_leave_out_what_the_cluster_cannot_serve(
    capsys: pytest.CaptureFixture[str], cluster: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    again = TRACE_LINE | {"id": 2, "deps": [1], "timestamp": 1}
    too_long = TRACE_LINE | {"id": 3, "session": "t", "timestamp": 2, "input_length": 100_000, "hash_ranges": [[10, 6250]]}
    trace.write_text("\n".join(map(json.dumps, (TRACE_LINE, again, too_long))))
    _, out, _ = weft(capsys, "--cluster", cluster, "--trace", trace, "--policy", "predicted-time", "--json", "-")
    found = json.loads(out)
    assert found["runs"][0]["completed"] == 2
    # Of 40 + 40 tokens the second 40 have two full blocks of 16 that the first left behind.
    assert found["bounds"]["infinite_cache"]["hit_rate"] == found["runs"][0]["hit_rate"] == 32 / 80


def test_more_load_is_the_same_sessions_more_often(capsys: pytest.CaptureFixture[str], cluster: Path) -> None:
    start = ("--cluster", cluster, "--trace", AGENT_SESSION, "--limit", 8, "--policy", "random", "--no-bounds", "--json", "-")
    one, three = (json.loads(weft(capsys, *start, "--load", load)[1]) for load in (1, 3))
    assert [run["runs"][0]["completed"] for run in (one, three)] == [8, 24]
    assert three["runs"][0]["input_tokens"] == 3 * one["runs"][0]["input_tokens"]


def test_blocks_that_cannot_be_told_in_the_clusters_are_refused(
    capsys: pytest.CaptureFixture[str], cluster: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(json.dumps(TRACE_LINE | {"block_size": 24, "hash_ranges": [[1, 1]]}))
    code, _, err = weft(capsys, "--cluster", cluster, "--trace", trace, "--no-bounds")
    assert (code, err) == (
        2, f"weft: --trace {trace}: the trace has blocks of 24 tokens, the cluster of 16: one must be a multiple of the other\n"
    )  # fmt: skip


def test_what_goes_wrong_is_slower_and_loses_nothing(capsys: pytest.CaptureFixture[str], cluster: Path) -> None:
    start = ("--cluster", cluster, "--trace", AGENT_SESSION, "--limit", 8, "--policy", "predicted-time", "--no-bounds", "--check")
    found = [
        json.loads(weft(capsys, *start, "--json", "-", *flags)[1])["runs"][0]
        for flags in ((), ("--faults", "until_s=1e6,slow_nodes=2,slowness=4"), ("--faults", "until_s=1e6,abandoned_share=1"))
    ]
    well, slow, abandoned = found
    assert slow["itl_s"]["p50"] == pytest.approx(4 * well["itl_s"]["p50"], rel=0.01)
    assert well["completed"] == slow["completed"] == 8
    assert abandoned["failures"] == {"abandoned by its client": 8 - abandoned["completed"]}
    assert abandoned["completed"] < 8


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--set", "pools[0].node=5"), "--set pools[0].node: no such number of the profiles or field of the cluster; near it: "),
        (("--set", "lp30.tdp=5"), "near it: lp30.tdp_w"),
        (("--set", "lp30.tdp_w=much"), "--set lp30.tdp_w: must be a number, is 'much'"),
        (("--set", "lp30.tdp_w=-1"), "--set lp30.tdp_w: must be"),
        (("--set", "pools[0].nodes"), "--set pools[0].nodes: must be KEY=VALUE"),
        (("--set", "pools[0].nodes=0"), "--set pools[0].nodes: must be 1 to 16384, is 0"),
        (("--set", "pools[0].nodes=16384", "pools[0].engine.blocks=134217728"), "--set pools[0].nodes: all pools' nodes have 2,"),
        (("--set", "router.policy=best"), "--set router.policy: must be one of predicted-time"),
        (("--report", "/dev/null"), "--report /dev/null: is there already and not a folder"),
        (("--limit", "0"), "argument --limit: must be a whole number of 1 or more, is '0'"),
        (("--load", "99999999"), "--load 99999999: would be 99,999,999 requests; at most 10,000,000 can be simulated"),
        (("--faults", "crashes=1"), "argument --faults: until_s is missing"),
        (("--faults", "until_s=9,crash=1"), "argument --faults: 'crash=1' must be KEY=VALUE with a key of until_s, crashes, "),
        (("--faults", "until_s=9,late_share=2"), "argument --faults: late_share: must be a share, 1 at most, is 2"),
        (("--faults", "until_s=9,crashes=1.5"), "argument --faults: crashes: must be a whole number, is '1.5'"),
        (("--faults", "until_s=9,slowness=0.5"), "argument --faults: slowness: must be 1 or more, is 0.5"),
        (("--faults", "until_s=9,crashes=1e8"), "--faults: crashes: must be at most 10000, is 100000000 (see weft simulate"),
        (("--faults", "until_s=9,slow_nodes=1e300"), "argument --faults: slow_nodes: must be at most 10000, is 1"),
        (("--limit", "9" * 30), "argument --limit: must be at most 1000000000, is '9999"),
        (("--faults", "until_s=never"), "argument --faults: until_s: must be a number, is 'never'"),
        (("--policy", "best"), "invalid choice"),
        (("--set", "pools[0].engine.blocks=" + "9" * 5000), "--set pools[0].engine.blocks: a number has more than 4300 digits"),
        (("--set", "pools[0].resources=" + "[" * 100_000), "--set pools[0].resources: lists or tables are nested too deeply"),
        (("--json", "x" * 300), "x: File name too long"),
        (("--json", "/nonexistent/x.json"), "--json /nonexistent/x.json: /nonexistent is no folder"),
        (("--trace", "/nonexistent"), "/nonexistent: cannot be read"),
        (("--trace", "synthetic:session=3"), "weft: --trace synthetic:session=3: session: not a setting; there are"),
        (("--trace", "synthetic:sessions=1000000000"), "sessions: must be at most 1000000, is '1000000000'"),
        (("--trace", "no\nsuch"), "weft: no such: cannot be read"),
        # What was set is told as set, also where an entry of it, or what it names, is wrong.
        (("--set", "models.default.aliases=[1]"), "weft: --set models.default.aliases[0]: must be str, is 1"),
        (("--set", "pools[0].resources={a = 'x'}"), "weft: --set pools[0].resources.a: must be float, is 'x'"),
        (("--set", "pools[0].hardware.chip=b100", "models.default.shape=kimi-k2"), "--set pools[0].hardware.chip: b100: no such"),
        (("--set", "pools[0].hardware.chip=h200", "models.default.shape=k9"), "weft: --set models.default.shape: k9: neither"),
        (("--cluster", "/nonexistent"), "/nonexistent: No such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_ends_with_2_and_says_so(
    capsys: pytest.CaptureFixture[str], cluster: Path, flags: tuple[str, ...], says: str
) -> None:
    start = ("--cluster", cluster, "--trace", AGENT_SESSION, "--limit", 1, "--policy", "random", "--no-bounds")
    code, _, err = weft(capsys, *start, *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert says in err


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b"{", ":1: "),
        (b"", ":"),
        (json.dumps({**TRACE_LINE, "output_length": -1}).encode(), ":1: output_length: "),
        (json.dumps({**TRACE_LINE, "deps": [9]}).encode(), ":1: deps: "),
    ],
)
def test_an_unusable_trace_ends_with_2_and_one_line(
    capsys: pytest.CaptureFixture[str], cluster: Path, tmp_path: Path, content: bytes, where: str
) -> None:
    trace = tmp_path / "bad.jsonl"
    trace.write_bytes(content)
    code, out, err = weft(capsys, "--cluster", cluster, "--trace", trace)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"weft: {trace}{where}")


def test_a_wrong_field_of_the_file_is_named_with_its_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(CLUSTER.replace("step_s", "steps"))
    code, _, err = weft(capsys, "--cluster", path, "--trace", AGENT_SESSION)
    assert (code, err.startswith(f"weft: {path}:13: pools[0].profile.steps: unknown key")) == (2, True)


def test_a_wrong_shape_is_named_where_it_stands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(f"[models.default]\nshape = 'kimi-k9'\n{CLUSTER}[pools.hardware]\nchip = 'h200'\n")
    code, _, err = weft(capsys, "--cluster", path, "--trace", AGENT_SESSION)
    assert (code, err.startswith(f"weft: {path}:2: models.default.shape: kimi-k9: neither a config.json")) == (2, True)


def test_a_trace_whose_name_is_no_utf8_is_reported_on_too(
    capsys: pytest.CaptureFixture[str], cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "\udcff.jsonl"
    trace.write_text(json.dumps(TRACE_LINE))
    monkeypatch.setattr("sys.argv", ["weft", str(trace)])
    flags = ("--policy", "random", "--no-bounds", "--json", tmp_path / "j.json", "--report", tmp_path / "r")
    code, _, err = weft(capsys, "--cluster", cluster, "--trace", trace, *flags)
    assert (code, err) == (0, f"weft: wrote {tmp_path}/r/index.html\n")
    assert "udcff.jsonl" in (tmp_path / "r" / "index.html").read_text()


def test_cluster_or_trace_is_missing(capsys: pytest.CaptureFixture[str], cluster: Path) -> None:
    assert weft(capsys, "--cluster", cluster) == (2, "", "weft: simulate: --trace is needed\n")
    assert weft(capsys, "--trace", AGENT_SESSION) == (2, "", "weft: simulate: --cluster is needed\n")


def test_assumptions_are_listed_with_their_ranges(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = weft(capsys, "--assumptions", "--json", tmp_path / "a.json", "--set", "lp30.tdp_w=444")
    listed = {one["name"]: one for one in json.loads((tmp_path / "a.json").read_text())["assumptions"]}
    assert (code, listed["lp30.tdp_w"]["value"]) == (0, 444)
    assert all(name in out for name in some(listed))
    assert all(one["why"] for one in some(listed.values()))


def test_lengths_alone_and_clocks_of_their_own_are_told(tmp_path: Path) -> None:
    lines = [
        {**TRACE_LINE, "id": number, "session": f"s{number // 2}", "timestamp": number % 2, "block_size": 0, "hash_ranges": []}
        for number in range(4)
    ]
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps(line) for line in lines).encode()))
    workload = read_workload(str(path), None, seed=1)
    assert ["own clock" in note for note in workload.notes] == [True, False]
    assert "lengths only" in workload.notes[1]
    assert len({turn.arrival_s for turn in workload.turns}) == 4


def test_a_file_in_seconds_is_read_as_such_when_told_and_refused_when_not(
    cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"timestamp": number / 4, "input_length": 600, "output_length": 2, "hash_ids": [1, 2]} for number in range(9)]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["simulate", "--cluster", str(cluster), "--trace", str(path), "--policy", "random", "--no-bounds", "--json", "-"]
    assert main(command) == 2
    assert "trace.jsonl:2: timestamp: 0.25 is no whole number" in capsys.readouterr().err
    assert main([*command, "--time-unit", "s"]) == 0
    run = json.loads(capsys.readouterr().out)["runs"][0]
    assert 2.0 < run["duration_s"] < 4.0
    command[4] = "synthetic:sessions=2"
    assert main([*command, "--time-unit", "s"]) == 2
    assert "--time-unit s: synthetic:sessions=2 is made up" in capsys.readouterr().err


def test_a_value_that_is_set_makes_its_tables() -> None:
    config = ClusterConfig.from_mapping({"pools": [{"name": "a", "kind": "decode"}]})
    paths = field_paths(config)
    mapping: dict[str, Any] = {"pools": [{"name": "a", "kind": "decode"}]}
    set_field(mapping, paths["pools[0].engine.blocks"], 7)
    set_field(mapping, paths["router.policy"], "dynamo")
    changed = ClusterConfig.from_mapping(mapping)
    assert (changed.pools[0].engine.blocks, changed.router.policy) == (7, RouterPolicy.DYNAMO)


def test_what_is_set_is_a_number_of_the_profiles_or_a_field() -> None:
    config = ClusterConfig.from_mapping({"pools": [{"name": "a", "kind": "decode"}]})
    overrides = parse_overrides(["x.y=1e3", "pools[0].resources={a = 1}", "cluster.name=some"], ["x.y"], config)
    assert overrides.numbers == {"x.y": 1000.0}
    assert [value for _, value in overrides.cluster.values()] == [{"a": 1}, "some"]
    with pytest.raises(UnusableInput):
        parse_overrides(["pools[0].nodes=1"], ["x.y"], None)


def run(completed: int, session_s: float | None, ttft_s: float) -> Run:
    figures = {"completed": completed, "session_s": {"mean": session_s}, "ttft_s": {"p50": ttft_s}}
    return Run(figures, Outcome([], {}, Distribution()))


def test_the_best_run_completes_most_then_has_the_shortest_sessions_then_the_soonest_tokens() -> None:
    assert best_of([run(9, 1.0, 1.0), run(10, 5.0, 9.0), run(10, 4.0, 3.0), run(10, 4.0, 2.0), run(10, None, 1.0)]) == 3


def test_figures_are_written_with_three_digits_and_their_unit() -> None:
    assert [seconds(value) for value in (0.01234, 12.345, 6040.4, None)] == ["12.3 ms", "12.3 s", "6,040 s", "–"]
    assert [number(value) for value in (0.01234, 12345.6, None)] == ["0.0123", "12,346", "–"]
    assert percent(0.95814) == "95.81 %"


@pytest.mark.slow
def test_runs_side_by_side_are_those_one_after_the_other(cluster: Path) -> None:
    turns = read_workload(str(AGENT_SESSION), 20, seed=0).turns
    resolved = Resolved(read_cluster(cluster), {})
    cases = [Case(resolved, policy, CacheRule.VALUE, turns, seed=3) for policy in (RouterPolicy.RANDOM, RouterPolicy.DYNAMO)]
    told: list[float] = []
    alone, beside = (run_cases(cases, jobs, told.append) for jobs in (1, 2))
    for one in (*alone, *beside):
        del one.figures["wall_s"]
    assert [one.figures for one in alone] == [one.figures for one in beside]
    assert (max(told), told[-1]) == (2, 2)
