"""What it costs to keep outputs to a schema: decode steps with all rows bound beside steps with none, and times to compile.

    python -m bench.structured [--batch 32] [--vocabulary 151936] [--hidden 1024] [--layers 4] [--steps 12] [--rounds 5]
                               [--threads 1] [--json FILE]

A random checkpoint with a vocabulary of that size; masks cost by its size, whatever the model. Rounds of both alternate; a step's
time is the best round's, its ratio the median of the rounds'. Bound outputs are long texts in JSON, so that none ends early.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llguidance import LLMatcher
from rich.console import Console
from rich.table import Table

from orchestrator.core.commands import Slice
from orchestrator.core.config import EngineConfig
from orchestrator.core.types import BlockId, RequestId, Sampling
from orchestrator.live.asked import Constraint, ConstraintKind
from orchestrator.live.text.checks import keepable
from orchestrator.live.text.grammars import Thoughts, answer_part, whole
from workers.engines.checkpoint import create_checkpoint
from workers.engines.eager import EagerEngine
from workers.engines.grammars import Lexicon

BLOCK_TOKENS, PROMPT_TOKENS = 64, 16
_FIELD = {"type": ["string", "integer", "null"]}
SCHEMAS: Mapping[str, dict[str, Any]] = {
    "text": {"type": "object", "properties": {"text": {"type": "string", "minLength": 400}}, "required": ["text"]},
    "edit": {
        "type": "object",
        "properties": {
            "path": {"type": "string", "pattern": "^/[a-z/]+$"},
            "line": {"type": "integer", "minimum": 1, "maximum": 100_000},
            "edits": {
                "type": "array",
                "items": {"type": "object", "properties": {"old": {"type": "string", "maxLength": 200}}, "required": ["old"]},
            },
        },
        "required": ["path", "line", "edits"],
        "additionalProperties": False,
    },
    "100 fields": {"type": "object", "properties": {f"field_{one}": _FIELD for one in range(100)}, "additionalProperties": False},
}


def grammar_of(schema: dict[str, Any]) -> str:
    """Return a schema's grammar. Raises `Unkeepable`."""
    part = answer_part(Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema), "schema"))
    found = keepable(whole("@answer", (), (part,), part.field, Thoughts(), {}))
    if not isinstance(found, str):
        raise found
    return found


def compiling_s(lexicon: Lexicon) -> dict[str, tuple[float, float]]:
    """Return for each schema the seconds of a gateway's check and of an engine's first matcher."""
    times: dict[str, tuple[float, float]] = {}
    for name, schema in SCHEMAS.items():
        began = time.perf_counter()
        grammar = grammar_of(schema)
        checked = time.perf_counter()
        LLMatcher(lexicon.tokens, grammar, log_level=0)
        times[name] = checked - began, time.perf_counter() - checked
    return times


def step_s(engine: EagerEngine, batch: int, steps: int, sampling: Sampling) -> float:
    """Return the seconds of a decode step, the first ones left out: a grammar is compiled in these."""
    each = -(-(PROMPT_TOKENS + steps + 3) // BLOCK_TOKENS)
    requests = [RequestId(number) for number in range(batch)]
    for request in requests:
        engine.add(request, array("I", [(7 * request + place) % 256 for place in range(PROMPT_TOKENS)]), sampling)
        table = tuple(BlockId(block) for block in range(request * each, (request + 1) * each))
        engine.step([Slice(request, 0, PROMPT_TOKENS, 0, table, True)])
    began = 0.0
    for step in range(steps + 2):
        if step == 2:
            began = time.perf_counter()
        outputs = engine.step([Slice(request, PROMPT_TOKENS + step, 1, 0, (), True) for request in requests])
        assert all(output.failure is None for output in outputs), outputs
    took = time.perf_counter() - began
    for request in requests:
        engine.forget(request)
    return took / steps


def measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure both ways on a fresh random checkpoint."""
    sizes = {"layers": options.layers, "hidden": options.hidden, "intermediate": 3 * options.hidden}
    create_checkpoint(directory, "qwen3", 3, vocabulary=options.vocabulary, **sizes)
    config = EngineConfig(device="cpu", block_tokens=BLOCK_TOKENS, blocks=options.batch * 2, threads=options.threads)
    engine = EagerEngine(directory, config, options.batch, 512)
    plain = Sampling(stop_token_ids=(options.vocabulary - 1,))
    bound = Sampling(stop_token_ids=(options.vocabulary - 1,), grammar=grammar_of(SCHEMAS["text"]))
    ways = {"unbound": plain, "bound": bound}
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, sampling in ways.items():
            found[way].append(step_s(engine, options.batch, options.steps, sampling))
    ratios = [one / other for one, other in zip(found["bound"], found["unbound"], strict=True)]
    lexicon = Lexicon(directory, options.vocabulary)
    return {
        "step_s": {way: min(seconds) for way, seconds in found.items()},
        "ratio": statistics.median(ratios),
        "compile_s": compiling_s(lexicon),
    }


def table_of(found: Mapping[str, Any], options: argparse.Namespace) -> Table:
    """Return what was measured as people read it."""
    table = Table(title=f"{options.batch} rows, a vocabulary of {options.vocabulary:,} tokens")
    for name in ("what", "ms", "ratio"):
        table.add_column(name, justify="left" if name == "what" else "right")
    table.add_row("decode step, unbound", f"{1e3 * found['step_s']['unbound']:.1f}", "1.00")
    table.add_row("decode step, all rows bound", f"{1e3 * found['step_s']['bound']:.1f}", f"{found['ratio']:.2f}")
    for name, (checked, opened) in found["compile_s"].items():
        table.add_row(
            f"schema '{name}': check at the gateway / matcher at the engine", f"{1e3 * checked:.1f} / {1e3 * opened:.1f}", ""
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.structured", description="What keeping outputs to a schema costs.")
    for name, default in (
        ("batch", 32),
        ("vocabulary", 151_936),
        ("hidden", 1024),
        ("layers", 4),
        ("steps", 12),
        ("rounds", 5),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        found = measure(Path(directory), options)
    Console().print(table_of(found, options))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
