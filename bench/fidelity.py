"""Holds the simulator against the live system: one trace, one cluster file, served for real and simulated.

    python -m bench.fidelity [--sessions 16] [--model DIR] [--json FILE]

First this machine is measured (`bench/profile.py`): what the node's steps cost, and what a request takes outside its node. Then a
recorded mix of coding-agent sessions, lengths scaled to 1/16, is reenacted closed loop over HTTP on `weft serve` with one eager
node, whose cache holds less than all sessions together; and once more in virtual time, with the measured profile. Nothing is
adjusted in between. One node with one engine thread, one gateway and one client are what two cores run side by side; more would
take turns, which no profile tells. The journals of the live run are replayed through fresh cores besides.
"""

import argparse
import json
import sys
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

from rich.console import Console
from rich.table import Table

from bench.agent_mix import NODE_SHARE, SCALE, TRACE, distinct_blocks, kept, traced
from bench.fit import Step, steps_of
from bench.profile import Measured, cluster_text, make_model, measure, node_journals, profile_text, reenacted
from orchestrator.cli.block_bytes import block_bytes_of
from orchestrator.cli.cluster_file import with_model
from orchestrator.cli.reenact import ScaledTurn, TurnResult, scaled_turns
from orchestrator.core.config import ClusterConfig
from orchestrator.profiles.catalog import Catalog
from orchestrator.profiles.resolve import resolve
from orchestrator.sim.hints import HintProgram
from orchestrator.sim.outcome import Served
from orchestrator.sim.world import World, WorldOptions
from orchestrator.traces import TracedTurn
from orchestrator.wire.journal import SUFFIX, read_journal
from orchestrator.wire.replay import replay

#: What predictions should keep to: ratio of the medians, difference of the hit rates.
RATIO_OFF_MAX = 0.15
HIT_RATE_OFF_MAX = 0.01


@dataclass(frozen=True, slots=True)
class Figures:
    """One run, live or simulated."""

    requests: int
    ttft_p50_s: float
    ttft_mean_s: float
    #: Of each request's mean time between two tokens.
    itl_p50_s: float
    hit_rate: float
    #: Prompt and output tokens over the run's length.
    tokens_per_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Fidelity:
    """A live run, what was predicted of it, and how it was predicted."""

    measured: Measured
    live: Figures
    predicted: Figures
    #: Predicted over measured length of the live run's steps, all together: the profile's share of the error.
    step_ratio: float
    #: Journals of the live run, and where fresh cores decided otherwise; empty if nowhere.
    journals: int
    differences: tuple[str, ...]


def predict(
    cluster: str, model: Path, turns: Sequence[TracedTurn], measured: Measured, program: HintProgram = HintProgram.NONE
) -> list[Served]:
    """Reenact the turns in virtual time, with what their agents tell."""
    config = with_model(ClusterConfig.from_mapping(tomllib.loads(cluster)), model, "the measurement's cluster")
    request_s = measured.overhead.of(fmean(turn.input_tokens for turn in turns))
    # The measured time outside the node holds all messages: none of them takes any besides.
    options = WorldOptions(hop_s=0.0, request_s=request_s, answers_return=False, hints=program)
    return World(resolve(config, Catalog.load(), block_bytes_of(config)), turns, options).run().served


def of_live(results: Sequence[TurnResult]) -> Figures:
    """Return the figures of a live run."""
    seconds = max(result.ended_s for result in results)
    inputs = sum(len(result.turn.prompt) for result in results)
    gaps = [result.itl_s for result in results if result.itl_s is not None]
    cached, outputs = sum(result.cached_tokens for result in results), sum(result.output_tokens for result in results)
    return _figures([result.ttft_s for result in results], gaps, cached, inputs, outputs, seconds)


def of_simulated(served: Sequence[Served]) -> Figures:
    """Return the figures of a simulated run, counted as those of a live one."""
    failed = [f"turn {one.turn.id}: {one.failure}" for one in served if not one.completed]
    if failed:
        raise RuntimeError(failed[0])
    seconds = max(one.ended_s or 0.0 for one in served)
    gaps = [1 / one.tokens_per_s for one in served if one.tokens_per_s is not None]
    inputs, outputs = sum(one.turn.input_tokens for one in served), sum(one.output_tokens for one in served)
    waits = [one.ttft_s for one in served if one.ttft_s is not None]
    return _figures(waits, gaps, sum(one.cached_tokens for one in served), inputs, outputs, seconds)


def _figures(waits: Sequence[float], gaps: Sequence[float], cached: int, inputs: int, outputs: int, seconds: float) -> Figures:
    rate = (inputs + outputs) / seconds
    return Figures(len(waits), median(waits), fmean(waits), median(gaps), cached / inputs, rate, seconds)


def step_ratio(steps: Sequence[Step], measured: Measured) -> float:
    """Return predicted over measured time of all steps together."""
    return sum(step.predicted_s(measured.fitted.profile) for step in steps) / sum(step.seconds for step in steps)


def compare(turns: Sequence[ScaledTurn], model: Path, measured: Measured, blocks: int) -> Fidelity:
    """Serve and simulate the turns on a cluster with the measured profile."""
    with tempfile.TemporaryDirectory() as folder:
        cluster = cluster_text(Path(folder), blocks, 1, measured.fitted.profile)
        live = of_live(reenacted(cluster, model, turns, "live"))
        predicted = of_simulated(predict(cluster, model, traced(turns, SCALE), measured))
        steps = steps_of(read_journal(node_journals(Path(folder))[0]).entries)
        journals = sorted(Path(folder).glob(f"*{SUFFIX}"))
        differences = tuple(f"{path.name}: {found}" for path in journals if (found := replay(read_journal(path))) is not None)
    return Fidelity(measured, live, predicted, step_ratio(steps, measured), len(journals), differences)


def table(found: Fidelity) -> Table:
    """Return predicted beside actual."""
    shown = Table(title=f"{found.live.requests} requests of real agent sessions, lengths / 16")
    for column in ("", "live", "simulated", "simulated / live"):
        shown.add_column(column, justify="right")
    rows: tuple[tuple[str, Callable[[Figures], float], float, str], ...] = (
        ("ttft p50", lambda one: one.ttft_p50_s, 1e3, "ms"),
        ("ttft mean", lambda one: one.ttft_mean_s, 1e3, "ms"),
        ("itl p50", lambda one: one.itl_p50_s, 1e3, "ms"),
        ("hit rate", lambda one: one.hit_rate, 1e2, "%"),
        ("throughput", lambda one: one.tokens_per_s, 1.0, "tokens/s"),
        ("took", lambda one: one.seconds, 1.0, "s"),
    )
    for name, of, scale, unit in rows:
        live, simulated = of(found.live), of(found.predicted)
        shown.add_row(name, f"{live * scale:.2f} {unit}", f"{simulated * scale:.2f} {unit}", f"{simulated / live:.3f}")
    return shown


def misses(found: Fidelity) -> list[str]:
    """Return what is further off than it should be."""
    live, predicted = found.live, found.predicted
    ratios = {"ttft p50": predicted.ttft_p50_s / live.ttft_p50_s, "itl p50": predicted.itl_p50_s / live.itl_p50_s}
    late = [f"{name} is off by {ratio - 1:+.0%}" for name, ratio in ratios.items() if abs(ratio - 1) > RATIO_OFF_MAX]
    off = predicted.hit_rate - live.hit_rate
    return [*late, *([f"hit rate is off by {off:+.2%}"] if abs(off) > HIT_RATE_OFF_MAX else []), *found.differences]


def main(arguments: Sequence[str]) -> int:
    """Measure, serve, simulate, print the table; 1 if a prediction is further off than it should be."""
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sessions", type=int, default=16, help="sessions of the trace to reenact (default 16, all)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint directory; default: a small random one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    options = parser.parse_args(arguments)
    turns = kept(scaled_turns(TRACE, SCALE), options.sessions)
    blocks = int(distinct_blocks(turns) * NODE_SHARE)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or make_model(Path(folder) / "model")
        measured = measure(model, threads=1)
        print(profile_text(measured.fitted.profile), flush=True)
        found = compare(turns, model, measured, blocks)
    Console(width=120).print(table(found))
    print(f"all steps of the live run together: predicted / measured {found.step_ratio:.3f}")
    print(f"{found.journals} journals, {len(found.differences)} decided otherwise when replayed")
    for miss in (problems := misses(found)):
        print(f"further off than it should be: {miss}")
    if options.json:
        options.json.write_text(json.dumps(asdict(found), indent=1))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
