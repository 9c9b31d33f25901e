"""Real agent sessions whose working set is four times what a node holds: with tiers below it and hints against without.

For `python -m bench.trace --tiers`. This machine is measured first: what the node's steps cost and what a request takes outside
of it (`profile.py`), how fast blocks come out of `cpu` and `cmx` (`tiers.py`). Then the sessions, lengths scaled to 1/32, are
reenacted closed loop over HTTP on `weft serve` with one eager node: once with nothing below its memory, and once with a store
that holds as much as the working set, files behind it, and agents that tell of their pauses and ends. Both are simulated too,
from the same cluster files and with the same program of hints; nothing is adjusted in between.
"""

import asyncio
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from bench.agent_mix import BLOCK_TOKENS, TRACE, kept, traced
from bench.fidelity import predict
from bench.profile import MODEL, Measured, cluster_text, make_model, measure, reenacted
from bench.tiers import Rates, measure_rates
from orchestrator.cli.reenact import Scale, ScaledTurn, TurnResult, scaled_turns
from orchestrator.sim.bounds import working_set_tokens
from orchestrator.sim.hints import HintProgram
from orchestrator.sim.outcome import Served
from orchestrator.sim.runs import percentiles, session_seconds

#: 64 recorded tokens become 2.
SCALE = Scale(block_tokens=2, output=1 / 32, gap=0.02, token_first=64, token_count=384, gap_s_max=1.0)
#: What the node holds of the working set, and what `cpu` does.
NODE_SHARE, CPU_SHARE = 0.25, 1.0
#: Bytes of a block of the measured model, float32.
BLOCK_BYTES = BLOCK_TOKENS * 2 * MODEL["layers"] * MODEL["kv_heads"] * MODEL["head_dim"] * 4
#: What simulated figures should keep to of live ones.
RATIO_OFF_MAX = 0.15


@dataclass(frozen=True, slots=True)
class Figures:
    """One run, live or simulated. `session_s` is from a session's first request to its last answer, in the mean."""

    input_tokens: int
    computed_tokens: int
    ttft_p50_s: float
    ttft_p99_s: float
    session_s: float
    #: From the first request to the last answer of all.
    seconds: float


@dataclass(frozen=True, slots=True)
class Compared:
    """One way to serve the sessions, served and simulated."""

    name: str
    live: Figures
    simulated: Figures


def store_text(rates: Rates, cpu_bytes: int, folder: Path) -> str:
    """Return the table of a store that is as fast as was measured."""
    lines = (
        "[store]",
        f"cpu_bytes = {cpu_bytes}",
        f'cmx = "file://{folder}"',
        f"cpu_bytes_per_s = {rates.cpu_bytes_per_s:.4g}",
        f"cmx_bytes_per_s = {rates.cmx_bytes_per_s:.4g}",
        f"cmx_latency_s = {rates.cmx_latency_s:.4g}",
    )
    return "\n".join(lines) + "\n\n"


def of_live(results: Sequence[TurnResult]) -> Figures:
    """Return the figures of a live run."""
    sessions: dict[str, list[TurnResult]] = {}
    for result in results:
        sessions.setdefault(result.turn.session.partition("/")[0], []).append(result)
    lengths = [max(one.ended_s for one in turns) - min(one.started_s for one in turns) for turns in sessions.values()]
    counts = [(len(result.turn.prompt), result.cached_tokens) for result in results]
    seconds = max(result.ended_s for result in results) - min(result.started_s for result in results)
    return _figures(counts, [result.ttft_s for result in results], lengths, seconds)


def of_simulated(served: Sequence[Served]) -> Figures:
    """Return the figures of a simulated run."""
    failed = [f"turn {one.turn.id}: {one.failure}" for one in served if not one.completed]
    if failed:
        raise RuntimeError(failed[0])
    counts = [(one.turn.input_tokens, one.cached_tokens) for one in served]
    waits = [one.ttft_s for one in served if one.ttft_s is not None]
    seconds = max(one.ended_s or 0.0 for one in served) - min(one.arrived_s for one in served)
    return _figures(counts, waits, session_seconds(served), seconds)


def _figures(counts: Sequence[tuple[int, int]], waits: Sequence[float], sessions: Sequence[float], seconds: float) -> Figures:
    ttft = percentiles(waits, 50, 99)
    inputs = sum(tokens for tokens, _ in counts)
    computed = inputs - sum(cached for _, cached in counts)
    return Figures(inputs, computed, ttft["p50"] or 0.0, ttft["p99"] or 0.0, fmean(sessions), seconds)


def compare(turns: Sequence[ScaledTurn], model: Path, measured: Measured, rates: Rates) -> list[Compared]:
    """Serve and simulate the sessions in both ways."""
    recorded = traced(turns, SCALE)
    working_set = working_set_tokens(recorded)
    blocks = int(NODE_SHARE * working_set / BLOCK_TOKENS)
    cpu_bytes = int(CPU_SHARE * working_set / BLOCK_TOKENS) * BLOCK_BYTES
    print(f"{len(turns)} turns, working set {working_set:,} tokens, the node holds {blocks * BLOCK_TOKENS:,}", flush=True)
    profile = replace(measured.fitted.profile, fetch_latency_s=float(f"{rates.cpu_latency_s:.4g}"))
    found: list[Compared] = []
    for name, program in (("nothing below", HintProgram.NONE), ("tiers and hints", HintProgram.ORACLE)):
        with tempfile.TemporaryDirectory() as folder:
            below = store_text(rates, cpu_bytes, Path(folder) / "cmx") if program is not HintProgram.NONE else ""
            cluster = below + cluster_text(None, blocks, 1, profile)
            live = of_live(reenacted(cluster, model, turns, name, program))
            found.append(Compared(name, live, of_simulated(predict(cluster, model, recorded, measured, program))))
    return found


def table(found: Sequence[Compared]) -> Table:
    """Return live beside simulated, with and without."""
    shown = Table(title="real agent sessions, lengths / 32, working set four times the node's memory")
    shown.add_column("")
    for one in found:
        for column in (f"{one.name}: live", "simulated", "ratio"):
            shown.add_column(column, justify="right")
    rows: Mapping[str, tuple[Callable[[Figures], float], str]] = {
        "prompt tokens computed": (lambda one: one.computed_tokens, ",.0f"),
        "ttft p50, s": (lambda one: one.ttft_p50_s, ".3f"),
        "ttft p99, s": (lambda one: one.ttft_p99_s, ".3f"),
        "session time, mean, s": (lambda one: one.session_s, ".1f"),
        "all took, s": (lambda one: one.seconds, ".1f"),
    }
    for row, (value, form) in rows.items():
        cells: list[str] = []
        for one in found:
            live, simulated = value(one.live), value(one.simulated)
            cells += [format(live, form), format(simulated, form), f"{simulated / live:.2f}"]
        shown.add_row(row, *cells)
    return shown


def run_tiers(sessions: int, path: Path | None) -> int:
    """Measure, serve, simulate, print; return the exit code: 1 if tiers do not pay."""
    turns = kept(scaled_turns(TRACE, SCALE), sessions)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model")
        measured = measure(model, 1)
        blocks = max(len(turn.prompt) for turn in turns) // BLOCK_TOKENS
        rates = asyncio.run(measure_rates(BLOCK_TOKENS, BLOCK_BYTES, blocks, Path(folder) / "cmx"))
        print(f"\ncpu {rates.cpu_bytes_per_s / 1e9:.2f} GB/s after {rates.cpu_latency_s * 1e3:.1f} ms, ", end="")
        print(f"cmx {rates.cmx_bytes_per_s / 1e9:.2f} GB/s after {rates.cmx_latency_s * 1e3:.1f} ms", flush=True)
        found = compare(turns, model, measured, rates)
    Console(width=140).print(table(found))
    without, tiered = (one.live for one in found)
    print(
        f"with tiers and hints: {without.computed_tokens / tiered.computed_tokens:.1f}x less computing, ttft p50 "
        f"{without.ttft_p50_s / tiered.ttft_p50_s:.1f}x and p99 {without.ttft_p99_s / tiered.ttft_p99_s:.1f}x sooner, "
        f"sessions {without.session_s / tiered.session_s:.1f}x shorter"
    )
    if path is not None:
        path.write_text(json.dumps({"rates": asdict(rates), "runs": [asdict(one) for one in found]}, indent=1))
    return 0 if tiered.session_s < without.session_s else 1
