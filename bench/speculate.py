"""Speculation on against off, in one run: tokens a pass, and how much sooner or later they come, by text, batch and model.

    python -m bench.speculate [--json FILE] [--rounds N] [--tokens N] [--batch N ...] [--model NAME ...] [--pool]

A node's core and the eager engine, step by step, as a node's driver runs them, but without gateways. The model quotes
(`quoting.py`): a Llama of the given size with two layers written by hand, which computes what any of that size computes. Texts:

    quotes            greedy: a tool's output of 1,500 tokens is said back
    quotes, changed   sampled: the same, and every twentieth token or so is another one, from which it goes on elsewhere
    does not repeat   sampled, so hot that every token is as likely as any other: nothing is found, so nothing is drafted
    finds by chance   sampled from eight tokens that are equally likely: something is always found, and seldom right

and with a draft model, a following one of one layer, beside a following one of the given size:

    follows           greedy: nothing can be looked up, and the draft model is right
    follows, changed  sampled: the same, and every twentieth token or so is another one
    follows another   greedy: the draft model follows another order, and is never right

With `--pool` these three again, with the draft model in a process of its own, as a pool of kind lpx has it, on one thread.

Runs with and without speculation alternate; a ratio is the median of the rounds', of tokens a second (the best round's are told)
and of tokens a second of processor time, which is what counts on a busy machine. Seeds are fixed, so that both must bring the
same tokens: those that differ are counted. Steps with prompts in them are left out; a draft model reads in those that follow. One
node serves all rounds, as it lives longer than an answer.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.quoting import create_following_checkpoint, create_quoting_checkpoint, cut_checkpoint
from orchestrator.core.commands import RunStep
from orchestrator.core.config import (
    DrafterConfig,
    EngineConfig,
    PoolConfig,
    SchedulerConfig,
    SpeculationConfig,
    SpeculationMethod,
)
from orchestrator.core.events import Assigned, NodeEvent, SliceResult, StepFinished
from orchestrator.core.node.node import Node
from orchestrator.core.types import (
    Assignment,
    BlockHash,
    CostProfile,
    ModelName,
    NodeId,
    NodeSpec,
    PoolKind,
    PoolName,
    RequestId,
    Role,
    Sampling,
)
from orchestrator.wire.trust import Trust
from workers.drafting import DraftProcessServer
from workers.engines.base import NetworkPlace
from workers.engines.eager import EagerEngine

BLOCK_TOKENS = 64
VOCABULARY = 2048
QUOTED_TOKENS = 1500
DRAFT_TOKENS_MAX = 8
TRUST = Trust(b"bench")
#: Seconds in which a process that drafts must take a connection.
REACH_S = 10.0
#: Layers, hidden size, intermediate size.
MODELS = {"3M float32": (4, 256, 512), "40M float32": (6, 768, 2048), "0.2B float32": (12, 1280, 3456)}
FEW = (11, 222, 333, 444, 555, 666, 777, 888)
TEXTS = {
    "quotes": Sampling(),
    "quotes, changed": Sampling(temperature=1.0),
    "does not repeat": Sampling(temperature=1000.0),
    "finds by chance": Sampling(temperature=1000.0, logit_bias=dict.fromkeys(FEW, 100_000.0)),
}
#: With a draft model, and the order that it follows: the model's own is 0.
FOLLOWING = {
    "follows": (Sampling(), 0),
    "follows, changed": (Sampling(temperature=1.0), 0),
    "follows another": (Sampling(), 1),
}


@dataclass(frozen=True, slots=True)
class Run:
    """What steps that only decode brought."""

    tokens: list[list[int]]
    counted: int
    #: Steps, counted once for each sequence in them.
    passes: int
    drafted: int
    accepted: int
    seconds: float
    #: Of all processors.
    cpu_s: float

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.counted / self.seconds

    @property
    def cpu_rate(self) -> float:
        """Tokens a second of processor time."""
        return self.counted / self.cpu_s


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    model: str
    batch: int
    text: str
    tokens_a_pass: float
    #: Drafts that were right.
    right: float
    off_tokens_per_s: float
    on_tokens_per_s: float
    #: On over off: median, least and most of the rounds.
    speedup: float
    least: float
    most: float
    #: The same of processor time: median.
    cpu_speedup: float
    differing_tokens: int


class Loop:
    """An engine, and nodes of it driven without an event loop."""

    def __init__(self, engine: EagerEngine, batch: int) -> None:
        self._engine = engine
        self._batch = batch
        self._requests = 0

    def node(self, draft_tokens_max: int, draft_model: bool = False) -> Node:
        """Return a node that drafts so much."""
        return Node(self._spec(draft_tokens_max, draft_model), SchedulerConfig(prefix_caching=False))

    def run(self, node: Node, prompts: Sequence[list[int]], samplings: Sequence[Sampling], count: int) -> Run:
        """Generate `count` tokens for each prompt, all of them together."""
        before = node.load()
        events: deque[NodeEvent] = deque()
        tokens: dict[RequestId, list[int]] = {}
        for prompt, sampling in zip(prompts, samplings, strict=True):
            self._requests += 1
            request = RequestId(self._requests)
            tokens[request] = []
            self._engine.add(request, array("I", prompt), sampling)
            names = tuple(BlockHash(b"%08d%08d" % (request, place)) for place in range(len(prompt) // BLOCK_TOKENS))
            events.append(Assigned(Assignment(request, Role.GENERATE, len(prompt), names, count)))
        counted = passes = 0
        seconds = cpu_s = 0.0
        while events:
            for command in node.handle(events.popleft(), 0.0):
                if isinstance(command, RunStep):
                    began_s = time.process_time()
                    event, brought = self._step(command, tokens)
                    events.append(event)
                    if command.decoding == len(command.slices):
                        counted, passes = counted + brought, passes + command.decoding
                        seconds, cpu_s = seconds + event.seconds, cpu_s + time.process_time() - began_s
        for request in tokens:
            self._engine.forget(request)
        load = node.load()
        drafted, accepted = load.drafted_tokens - before.drafted_tokens, load.accepted_tokens - before.accepted_tokens
        return Run(list(tokens.values()), counted, passes, drafted, accepted, seconds, cpu_s)

    def _step(self, command: RunStep, tokens: dict[RequestId, list[int]]) -> tuple[StepFinished, int]:
        began = time.perf_counter()
        outputs = self._engine.step(command.slices)
        seconds = time.perf_counter() - began
        results: list[SliceResult] = []
        for part, output in zip(command.slices, outputs, strict=True):
            tokens[part.request] += output.tokens
            drafted = {"drafted_tokens": output.drafted, "drafting_s": output.drafting_s}
            results.append(SliceResult(part.request, len(output.tokens), **drafted))
        return StepFinished(command.step, tuple(results), seconds), sum(len(output.tokens) for output in outputs)

    def _spec(self, draft_tokens_max: int, draft_model: bool) -> NodeSpec:
        known = self._engine.description
        return NodeSpec(
            id=NodeId("bench"),
            model=ModelName("quoting"),
            pool=PoolName("bench"),
            kind=PoolKind.AGGREGATED,
            incarnation=1,
            blocks=known.blocks,
            block_tokens=known.block_tokens,
            block_bytes=known.block_bytes,
            sequences_max=self._batch,
            step_tokens_max=4096,
            context_tokens_max=known.context_tokens_max,
            profile=CostProfile(),
            draft_tokens_max=draft_tokens_max,
            draft_model=draft_model,
        )


def prompts_of(batch: int) -> list[list[int]]:
    """Return prompts with a tool's output in them, and the beginning of it said again."""
    source = random.Random(batch)

    def text(count: int) -> list[int]:
        return [source.randrange(1000, VOCABULARY) for _ in range(count)]

    prompts: list[list[int]] = []
    for _ in range(batch):
        quoted = text(QUOTED_TOKENS)
        prompts.append(text(40) + quoted + text(20) + quoted[100:104])
    return prompts


def measure(
    model: str, loop: Loop, batch: int, text: str, wish: Sampling, count: int, rounds: int, draft_model: bool = False
) -> Row:
    """Run a text with and without speculation, in turns."""
    prompts = prompts_of(batch)
    samplings = [replace(wish, seed=number) for number in range(batch)]
    plain, drafting = loop.node(0), loop.node(DRAFT_TOKENS_MAX, draft_model)
    loop.run(plain, prompts, samplings, 8)
    loop.run(drafting, prompts, samplings, count if draft_model else 8)
    off: list[Run] = []
    on: list[Run] = []
    for _ in range(rounds):
        off.append(loop.run(plain, prompts, samplings, count))
        on.append(loop.run(drafting, prompts, samplings, count))
    ratios = [one.rate / other.rate for one, other in zip(on, off, strict=True)]
    cpu_ratios = [one.cpu_rate / other.cpu_rate for one, other in zip(on, off, strict=True)]
    pairs = zip(chain.from_iterable(on[0].tokens), chain.from_iterable(off[0].tokens), strict=True)
    differing = sum(one != other for one, other in pairs)
    return Row(
        model, batch, text,
        tokens_a_pass=on[0].counted / on[0].passes,
        right=on[0].accepted / max(1, on[0].drafted),
        off_tokens_per_s=max(run.rate for run in off),
        on_tokens_per_s=max(run.rate for run in on),
        speedup=statistics.median(ratios), least=min(ratios), most=max(ratios),
        cpu_speedup=statistics.median(cpu_ratios), differing_tokens=differing,
    )  # fmt: skip


def rows_of(model: str, directory: Path, batches: Sequence[int], count: int, rounds: int, pool: bool) -> list[Row]:
    """Measure all texts with checkpoints of a size, written below a directory."""
    layers, hidden, intermediate = MODELS[model]
    size = {"layers": layers, "hidden": hidden, "intermediate": intermediate, "vocabulary": VOCABULARY}
    create_quoting_checkpoint(directory / "quoting", 3, **size)
    rows: list[Row] = []
    loop = loop_of(directory / "quoting", batches, count)
    for batch in batches:
        rows += [measure(model, loop, batch, text, wish, count, rounds) for text, wish in TEXTS.items()]
    create_following_checkpoint(directory / "following", 3, **size)
    for order in (0, 1):
        create_following_checkpoint(directory / "whole", 3, **size, order=order)
        cut_checkpoint(directory / "whole", directory / f"draft-{order}", 1)
    for text, (wish, order) in FOLLOWING.items():
        loop = loop_of(directory / "following", batches, count, directory / f"draft-{order}")
        rows += [measure(model, loop, batch, text, wish, count, rounds, draft_model=True) for batch in batches]
        if pool:
            with pooled(directory / "following", batches, count, directory / f"draft-{order}") as loop:
                rows += [
                    measure(model, loop, batch, f"{text} (pool)", wish, count, rounds, draft_model=True) for batch in batches
                ]
    return rows


def loop_of(path: Path, batches: Sequence[int], count: int, draft_model: Path | None = None) -> Loop:
    """Return an engine that has room for the largest batch, with a draft model or without."""
    drafts = SpeculationConfig()
    if draft_model is not None:
        drafts = SpeculationConfig(SpeculationMethod.DRAFT_MODEL, DRAFT_TOKENS_MAX, draft_model=str(draft_model))
    return Loop(engine_of(path, batches, count, drafts), max(batches))


@contextmanager
def pooled(path: Path, batches: Sequence[int], count: int, draft_model: Path) -> Iterator[Loop]:
    """The same with the draft model in a process of its own."""
    engine = EngineConfig(device="cpu", dtype="float32", block_tokens=BLOCK_TOKENS, threads=1)
    drafter = DrafterConfig(str(draft_model), sequences_max=max(batches))
    pool = PoolConfig("drafts", PoolKind.LPX, engine=engine, drafter=drafter)
    server = DraftProcessServer(pool, path, NetworkPlace("127.0.0.1", TRUST), REACH_S, lambda _: None)
    asking = engine_of(path, batches, count, SpeculationConfig(SpeculationMethod.DRAFT_MODEL, draft_pool="drafts"))
    try:
        assert asking.drafts is not None, "nobody is asked for drafts"
        asking.drafts.use(server.address)
        assert asking.drafts.reaches(REACH_S), f"{server.address} takes no connection"
        yield Loop(asking, max(batches))
    finally:
        asking.close()
        server.close()


def engine_of(path: Path, batches: Sequence[int], count: int, drafts: SpeculationConfig) -> EagerEngine:
    most = max(batches)
    blocks = most * (-(-(QUOTED_TOKENS + 64 + count) // BLOCK_TOKENS) + 2)
    config = EngineConfig(device="cpu", dtype="float32", block_tokens=BLOCK_TOKENS, blocks=blocks, speculation=drafts)
    return EagerEngine(path, config, most, 4096, trust=TRUST)


def table_of(rows: Sequence[Row]) -> Table:
    table = Table(
        "model",
        "batch",
        "text",
        "tokens a pass",
        "drafts right",
        "off, tokens/s",
        "on, tokens/s",
        "on / off",
        "of CPU time",
        "differ",
    )
    for row in rows:
        table.add_row(
            row.model, str(row.batch), row.text, f"{row.tokens_a_pass:.2f}", f"{row.right:.0%}",
            f"{row.off_tokens_per_s:,.0f}", f"{row.on_tokens_per_s:,.0f}",
            f"{row.speedup:.2f} ({row.least:.2f} to {row.most:.2f})", f"{row.cpu_speedup:.2f}", str(row.differing_tokens),
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Speculation on against off: tokens a pass, and how much sooner they come.")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=192, help="of output for each sequence")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--model", choices=list(MODELS), nargs="+", default=list(MODELS)[:2])
    parser.add_argument("--pool", action="store_true", help="also with the draft model in a process of its own")
    given = parser.parse_args()
    rows: list[Row] = []
    for model in given.model:
        with tempfile.TemporaryDirectory() as directory:
            rows += rows_of(model, Path(directory), given.batch, given.tokens, given.rounds, given.pool)
    Console(width=150).print(table_of(rows))
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
