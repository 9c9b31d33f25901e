"""Measures what a node's steps cost on this machine and prints the `[pools.profile]` to paste into a cluster file.

    python -m bench.profile [--model DIR] [--threads 1] [--journal FILE] [--json FILE]

Serves the model on one node, sends it prompts and batches of many lengths over HTTP, and reads the node's own journal: what
counts is how long the node says that its steps took, from order to answer. Then two nodes show how fast blocks go from one to
the other (`bench/fetches.py`). Also printed: the time that a request spends outside its node before its first token, by its
prompt's length. With --journal FILE nothing is started: the steps' part of a profile is fitted to that journal, of any node on
any hardware. Without --model a random model of 3.3 million parameters is made. Takes about a minute and a half.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.fetches import measure_fetches
from bench.fit import Fitted, Step, fit, rounded, steps_of
from bench.servers import weft_server
from orchestrator.cli.reenact import Harness, Reenactment, ScaledTurn, TurnResult
from orchestrator.core.commands import ReportFirstToken
from orchestrator.core.events import Assigned
from orchestrator.core.types import CostProfile, RequestId
from orchestrator.sim.hints import HintProgram
from orchestrator.wire.journal import SUFFIX, Entry, read_journal
from workers.engines.checkpoint import create_checkpoint

BLOCK_TOKENS = 16
STEP_TOKENS_MAX = 512
#: Sequences that run together, as many as the largest batch that is measured.
SEQUENCES_MAX = 8
#: The model unless another is given: steps of some milliseconds, so that they and not the process switches are measured.
MODEL = {"layers": 8, "hidden": 192, "heads": 6, "kv_heads": 2, "head_dim": 32, "intermediate": 512, "vocabulary": 512}
#: Token ids from here on are ordinary tokens of that model.
TOKEN_FIRST, TOKEN_COUNT = 64, 384
#: Prompts that are computed alone, with so many tokens; each length several times.
LENGTHS = (24, 100, 260, 500, 1000, 2200)
ROUNDS = 3
#: Batches: prompts that decode together, each after another long context, of which they have parts spread evenly up to so many
#: tokens. One context for all would be read from the processor's cache, which no traffic does; equal lengths hide what an engine
#: loses by padding to the longest.
CONTEXTS = (64, 1000, 4000, 8700)
BATCHES = (1, 2, 4, 8)
TAIL_TOKENS = (17, 70)
OUTPUT_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Overhead:
    """Seconds that a request spends outside its node before its first token: on the wire, in the gateway and in its client."""

    base_s: float
    prompt_token_s: float

    def of(self, prompt_tokens: float) -> float:
        return self.base_s + self.prompt_token_s * prompt_tokens


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found out about one kind of node on this machine."""

    fitted: Fitted
    overhead: Overhead


def make_model(folder: Path) -> Path:
    """Write the model that is measured unless another is given."""
    create_checkpoint(folder, "qwen3", seed=1, dtype="float32", context_tokens_max=16384, **MODEL)
    return folder


def cluster_text(journal: Path | None, blocks: int, threads: int, profile: CostProfile | None = None, nodes: int = 1) -> str:
    """Return a cluster file with nodes that prefill and decode, and that write journals if there is a folder for them."""
    engine = f"engine = {{ threads = {threads}, block_tokens = {BLOCK_TOKENS}, blocks = {blocks} }}"
    scheduler = f"scheduler = {{ step_tokens_max = {STEP_TOKENS_MAX}, sequences_max = {SEQUENCES_MAX} }}"
    pool = f'[[pools]]\nname = "node"\nkind = "aggregated"\nnodes = {nodes}\n{engine}\n{scheduler}\n'
    shown = profile_text(profile) if profile is not None else ""
    journals = f'[cluster]\njournal = "{journal}"\n\n' if journal is not None else ""
    return f"{journals}[models.default]\n\n{pool}\n{shown}"


def profile_text(profile: CostProfile) -> str:
    """Return a profile as the table of a cluster file; what is as by default is left out."""
    plain = CostProfile()
    lines = ["[pools.profile]"]
    for item in fields(CostProfile):
        value = getattr(profile, item.name)
        if value != getattr(plain, item.name):
            lines.append(f"{item.name} = {list(value) if isinstance(value, tuple) else value}")
    return "\n".join(lines) + "\n"


# --- the load ---------------------------------------------------------------------------------------------------------


def calibration() -> list[ScaledTurn]:
    """Return the turns of a calibration: first each prompt alone, then batches, each when all before it have ended."""
    chance = random.Random(5)
    turns: list[ScaledTurn] = []

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(TOKEN_FIRST + chance.randrange(TOKEN_COUNT) for _ in range(count))

    def add(prompts: Sequence[tuple[int, ...]], output_tokens: int) -> None:
        after = tuple(turn.id for turn in turns[-max(BATCHES) :])
        first = len(turns)
        for place, prompt in enumerate(prompts):
            turns.append(ScaledTurn(first + place, f"s{first + place}", "main", after, 0.0, prompt, output_tokens))

    for _ in range(ROUNDS):
        for length in LENGTHS:
            add([tokens(length)], OUTPUT_TOKENS // 2)
    long = [tokens(CONTEXTS[-1]) for _ in range(BATCHES[-1])]
    for prompt in long:
        add([prompt], OUTPUT_TOKENS // 2)
    for context in CONTEXTS:
        for batch in BATCHES:
            parts = [prompt[: context * (place + 1) // batch] for place, prompt in enumerate(long[:batch])]
            for tail in TAIL_TOKENS:
                add([part + tokens(tail) for part in parts], OUTPUT_TOKENS)
    return turns


def alone(turns: Sequence[ScaledTurn]) -> Iterator[int]:
    """Yield the ids of the turns that nothing runs beside."""
    yield from range(min(len(turns), ROUNDS * len(LENGTHS) + BATCHES[-1]))


# --- the measurement --------------------------------------------------------------------------------------------------


def measure(model: Path, threads: int) -> Measured:
    """Serve a model on one node and measure it."""
    turns = calibration()
    with tempfile.TemporaryDirectory() as folder:
        blocks = sum(len(turn.prompt) + turn.output_tokens for turn in turns) // BLOCK_TOKENS + len(turns)
        results = reenacted(cluster_text(Path(folder), blocks, threads), model, turns, "calibrating")
        entries = list(read_journal(node_journals(Path(folder))[0]).entries)
    steps = steps_of(entries)
    # The first ones warm caches, allocators and code paths.
    return Measured(fit(steps[len(steps) // 20 :]), _overhead(results, entries, set(alone(turns))))


def reenacted(
    cluster: str, model: Path, turns: Sequence[ScaledTurn], doing: str, program: HintProgram | None = None
) -> list[TurnResult]:
    """Serve a model on a live cluster and reenact the turns there, with what their agents tell if there is a program for it.

    Raises `RuntimeError` if one of them fails.
    """
    done = 0

    def on_end(result: TurnResult) -> None:
        nonlocal done
        done += 1
        if result.failure:
            raise RuntimeError(f"turn {result.turn.id}: {result.failure}")
        if sys.stderr.isatty():
            print(f"\r{doing}: {done} of {len(turns)} turns", end="", file=sys.stderr, flush=True)

    with weft_server(cluster, model) as server:
        harness = Harness(server.grpc_address, program) if program is not None else None
        return asyncio.run(_run(server.url, turns, on_end, harness))


async def _run(
    url: str, turns: Sequence[ScaledTurn], on_end: Callable[[TurnResult], None], harness: Harness | None
) -> list[TurnResult]:
    return await Reenactment(url, "default", turns, on_end, harness).run()


def node_journals(folder: Path) -> list[Path]:
    """Return the nodes' journals in a folder."""
    return sorted(folder.glob(f"node-*{SUFFIX}"))


def _overhead(results: Sequence[TurnResult], entries: Sequence[Entry], single: set[int]) -> Overhead:
    """Compare the clients' times to the first token with the node's, for turns that ran alone, in order."""
    spans = first_token_spans(entries)
    points = [
        (len(one.turn.prompt), one.ttft_s - span) for one, span in zip(results, spans, strict=True) if one.turn.id in single
    ]
    lengths, seconds = np.array([point[0] for point in points]), np.array([point[1] for point in points])
    medians = [(length, float(np.median(seconds[lengths == length]))) for length in np.unique(lengths)]
    slope, base = np.polyfit([length for length, _ in medians], [value for _, value in medians], 1)
    return Overhead(max(float(base), 0.0), max(float(slope), 0.0))


def first_token_spans(entries: Sequence[Entry]) -> list[float]:
    """Return the seconds from each request's assignment to its first token on a node, in order of assignment."""
    decoder = msgspec.msgpack.Decoder(ReportFirstToken)
    assigned: dict[RequestId, float] = {}
    spans: dict[RequestId, float] = {}
    for entry in entries:
        if isinstance(entry.event, Assigned):
            assigned[entry.event.assignment.request] = entry.now
        for name, command in entry.commands or ():
            if name == ReportFirstToken.__name__:
                request = decoder.decode(command).report.request
                spans[request] = entry.now - assigned[request]
    return [spans[request] for request in assigned]


def shown(fitted: Fitted) -> Table:
    """Return how the profile tells the steps it was made from."""
    table = Table(title=f"{fitted.steps} steps of {fitted.kinds} kinds: predicted over measured time")
    for column in ("p10", "p50", "p90"):
        table.add_column(column, justify="right")
    table.add_row(f"{fitted.ratio_p10:.2f}", f"{fitted.ratio_p50:.2f}", f"{fitted.ratio_p90:.2f}")
    return table


def from_journal(path: Path) -> Fitted:
    """Fit a profile to a node's journal."""
    steps: list[Step] = steps_of(read_journal(path).entries)
    return fit(steps)


def main(arguments: Sequence[str]) -> int:
    """Measure or read, print the profile and its residuals, write JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint directory; default: a small random one")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads of the engine (default 1)")
    parser.add_argument("--journal", type=Path, metavar="FILE", help="fit this node's journal instead of measuring")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    options = parser.parse_args(arguments)
    overhead: Overhead | None = None
    if options.journal is not None:
        fitted = from_journal(options.journal)
    else:
        with tempfile.TemporaryDirectory() as folder:
            model = options.model or make_model(Path(folder) / "model")
            measured = measure(model, options.threads)
            bandwidth, latency_s = measure_fetches(model, BLOCK_TOKENS, options.threads, TOKEN_FIRST, TOKEN_COUNT)
        profile = replace(measured.fitted.profile, fetch_bytes_per_s=rounded(bandwidth), fetch_latency_s=rounded(latency_s))
        fitted, overhead = replace(measured.fitted, profile=profile), measured.overhead
    print(f"\n{profile_text(fitted.profile)}")
    Console(width=100).print(shown(fitted))
    if overhead is not None:
        print(f"outside the node, before the first token: {overhead.base_s * 1e3:.2f} ms and", end=" ")
        print(f"{overhead.prompt_token_s * 1e6:.2f} us a prompt token")
    if options.json:
        found = {"fitted": asdict(fitted), "overhead": asdict(overhead) if overhead is not None else None}
        options.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
