"""LoRA adapters in decode steps and in prompts, in one run: what they cost beside the same model without any.

    python -m bench.lora [--json FILE] [--rounds N] [--batch N] [--model NAME ...]

The eager engine alone, random checkpoints, adapters of rank 16 of all products. A decode step of a batch at a context of 256, and
a step that computes 64 tokens of each of 8 prompts:

    none                 an engine without adapters: what the others are compared with
    8 loaded, unused     an engine with 8 adapters, none of them asked for
    1                    all rows have the same one
    8                    an eighth of the rows has each
    8, half the rows     an eighth of every other row has each, the others have none

One thread, and its processor time, which is what counts on a busy machine. Rounds of all of them alternate, and a ratio is the
median of the rounds'.
"""

import argparse
import json
import statistics
import tempfile
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.core.commands import Slice
from orchestrator.core.config import AdapterConfig, EngineConfig, ModelConfig
from orchestrator.core.types import AdapterName, BlockId, RequestId, Sampling
from workers.engines.checkpoint import create_checkpoint
from workers.engines.eager import EagerEngine
from workers.engines.peft import create_adapter

RANK, ADAPTERS = 16, 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONTEXT, PROMPTS, PROMPT_TOKENS = 256, 8, 64
BLOCK_TOKENS = 64
#: Decode steps of a round, after one that is not counted.
STEPS = 8
MODELS: dict[str, dict[str, Any]] = {
    "llama 0.67M float32": {"layers": 4, "hidden": 128, "intermediate": 256},
    "llama 40M float32": {"layers": 6, "hidden": 768, "heads": 12, "kv_heads": 4, "intermediate": 2048},
    "llama 0.2B bfloat16": {"layers": 12, "hidden": 1280, "heads": 20, "kv_heads": 4, "intermediate": 3456, "dtype": "bfloat16"},
}
#: The adapter of each row, by its number; None: it has none.
WAYS: dict[str, tuple[bool, Sequence[int | None]]] = {
    "none": (False, (None,)),
    "8 loaded, unused": (True, (None,)),
    "1": (True, (0,)),
    "8": (True, tuple(range(ADAPTERS))),
    "8, half the rows": (True, tuple(place // 2 if place % 2 else None for place in range(2 * ADAPTERS))),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One way's cost, in milliseconds of its best round, and beside the first way's: the median of the rounds' ratios."""

    model: str
    batch: int
    way: str
    step_ms: float
    step_ratio: float
    prompt_ms: float
    prompt_ratio: float


def measure(model: str, directory: Path, batch: int, rounds: int) -> list[Row]:
    """Measure all ways of one model."""
    create_checkpoint(directory / "model", "llama", 3, vocabulary=512, **MODELS[model])
    adapters: dict[str, AdapterConfig] = {}
    for number in range(ADAPTERS):
        path = directory / str(number)
        create_adapter(path, directory / "model", number, TARGETS, RANK)
        adapters[str(number)] = AdapterConfig(str(path))
    engines = {loaded: _engine(directory / "model", batch, adapters if loaded else {}) for loaded in (False, True)}
    steps: dict[str, list[float]] = {way: [] for way in WAYS}
    prompts: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, (loaded, rows) in WAYS.items():
            steps[way].append(_step_s(engines[loaded], batch, rows))
            prompts[way].append(_prompt_s(engines[loaded], rows))
    return [
        Row(model, batch, way, 1e3 * min(steps[way]), _ratio(steps, way), 1e3 * min(prompts[way]), _ratio(prompts, way))
        for way in WAYS
    ]


def _ratio(seconds: dict[str, list[float]], way: str) -> float:
    return statistics.median(one / plain for one, plain in zip(seconds[way], seconds["none"], strict=True))


def _engine(path: Path, batch: int, adapters: dict[str, AdapterConfig]) -> EagerEngine:
    blocks = batch * -(-(CONTEXT + STEPS + 1) // BLOCK_TOKENS)
    config = EngineConfig(device="cpu", block_tokens=BLOCK_TOKENS, blocks=max(blocks, PROMPTS), threads=1)
    return EagerEngine(path, config, batch, PROMPTS * PROMPT_TOKENS, model=ModelConfig(adapters=adapters))


def _add(engine: EagerEngine, count: int, tokens: int, rows: Sequence[int | None]) -> list[RequestId]:
    requests = [RequestId(number) for number in range(count)]
    for request in requests:
        adapter = rows[request % len(rows)]
        sampling = Sampling(adapter=AdapterName(str(adapter)) if adapter is not None else None)
        engine.add(request, array("I", [(7 * request + place) % 256 for place in range(tokens)]), sampling)
    return requests


def _step_s(engine: EagerEngine, batch: int, rows: Sequence[int | None]) -> float:
    """Return the seconds of a decode step; what is in the contexts' blocks does not matter."""
    requests = _add(engine, batch, CONTEXT, rows)
    each = -(-(CONTEXT + STEPS + 1) // BLOCK_TOKENS)
    began = 0.0
    for step in range(STEPS + 1):
        if step == 1:
            began = time.thread_time()
        tables = [tuple(BlockId(block) for block in range(request * each, (request + 1) * each)) for request in requests]
        engine.step([Slice(request, CONTEXT - 1 + step, 1, 0, () if step else tables[request], True) for request in requests])
    took = time.thread_time() - began
    for request in requests:
        engine.forget(request)
    return took / STEPS


def _prompt_s(engine: EagerEngine, rows: Sequence[int | None]) -> float:
    """Return the seconds of a step that computes prompts alone."""
    requests = _add(engine, PROMPTS, PROMPT_TOKENS, rows)
    began = time.thread_time()
    engine.step([Slice(request, 0, PROMPT_TOKENS, 0, (BlockId(request),), True) for request in requests])
    took = time.thread_time() - began
    for request in requests:
        engine.forget(request)
    return took


def table_of(rows: Sequence[Row]) -> Table:
    """Return the rows as a table."""
    table = Table("model", "batch", "adapters", "ms a step", "to none", f"ms for {PROMPTS * PROMPT_TOKENS} tokens", "to none")
    for row in rows:
        table.add_row(
            row.model, str(row.batch), row.way,
            f"{row.step_ms:.2f}", f"{row.step_ratio:.2f}", f"{row.prompt_ms:.1f}", f"{row.prompt_ratio:.2f}",
        )  # fmt: skip
    return table


def main() -> None:
    """Measure what is asked for and print it."""
    parser = argparse.ArgumentParser(description="What LoRA adapters cost a decode step and a prompt.")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--model", choices=list(MODELS), nargs="+", default=list(MODELS))
    given = parser.parse_args()
    rows: list[Row] = []
    for model in given.model:
        with tempfile.TemporaryDirectory() as directory:
            rows += measure(model, Path(directory), given.batch, given.rounds)
    Console(width=130).print(table_of(rows))
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
