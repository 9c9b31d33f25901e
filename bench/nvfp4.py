"""NVFP4 and FP8 beside bfloat16, for weights and for KV, in one run: error, memory, speed, and what a model makes of it.

    python -m bench.nvfp4 [--json FILE] [--model DIR] [--steps N] [--seconds S]

Four tables. *Weights*: a normally distributed matrix in each format, its error, its bytes, and how long a product takes with it,
its weights not in any cache, as a share of bfloat16's in the same rounds. *KV*: a block's bytes, its error, and how fast it is
encoded and decoded, as a share of memcpy. *Text*: perplexity of a fixed text, and how far next tokens' probabilities are from
those of the unrounded weights; with `--model` of that checkpoint, else of a small one that is trained here first (seeded, under
a minute) on the repository's own sources, of which others are kept for measuring. *Decoding*: a step of a 0.44B model.

Ratios on an idle machine mean something; seconds do not. What rounding does to large models, whose weights have outliers, a small
one does not tell: take `--model`.
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

from bench.engine import MODELS
from bench.kv_formats import ROOT, Subject
from orchestrator.core.commands import Slice
from orchestrator.core.config import EngineConfig, KvFormat, WeightFormat
from orchestrator.core.types import BlockId, RequestId, Sampling
from workers.engines.checkpoint import create_checkpoint
from workers.engines.eager import EagerEngine
from workers.engines.kvformats import KvCodec
from workers.engines.linear import make_linear
from workers.engines.quantised import QuantisedMatrix, encode
from workers.engines.stored import Slab, form_of

CPU = torch.device("cpu")
FORMATS = (WeightFormat.FP8, WeightFormat.NVFP4)
#: Of the measured weight; rows of activations it is multiplied with.
WEIGHT = (4096, 4096)
ROWS = (1, 4, 8, 16, 64, 256)
#: Written between two products, so that no weight is in a cache.
EVICTED_BYTES = 64 << 20
ROUNDS_MIN = 3
#: Of the model that is trained: enough to know words and indentation.
TRAINED = {"layers": 4, "hidden": 192, "heads": 6, "kv_heads": 2, "head_dim": 32, "intermediate": 512, "vocabulary": 512}
WINDOW_TOKENS, WINDOWS_A_STEP = 128, 16
#: Windows that are measured: tokens that are read, and those after them that are guessed.
READ, GUESSED, MEASURED = 64, 96, 8
BATCHES = (1, 8)
PROMPT_TOKENS = 100
SLAB = Slab(layers=8, kv_heads=4, block_tokens=64, head_dim=128, dtype="bfloat16")
SLABS = 16


@dataclass(slots=True)
class WeightResult:
    """One format of weights."""

    name: str
    bits: float
    #: Root mean square of the error over that of the weights.
    error: float
    #: The same of a product with normally distributed rows.
    product_error: float
    #: By rows: seconds over bfloat16's.
    time_shares: dict[int, float] = field(default_factory=dict[int, float])


@dataclass(slots=True)
class KvResult:
    """One stored form of KV."""

    name: str
    bytes_share: float
    error: float
    encode_share: float
    decode_share: float


@dataclass(slots=True)
class TextResult:
    """What a model with weights in one format makes of a text."""

    name: str
    perplexity: float
    #: Nats, from the probabilities of unrounded weights to these; the mean over all places.
    divergence: float
    equal_share: float


@dataclass(slots=True)
class StepResult:
    """Decode steps of one format."""

    name: str
    step_ms: dict[int, float]


def relative(found: Tensor, meant: Tensor) -> float:
    """Return the root mean square of an error over that of what it is an error of."""
    return float((found.double() - meant.double()).square().mean().sqrt() / meant.double().square().mean().sqrt())


def best_of(ways: Sequence[Callable[[], object]], seconds: float, before: Callable[[], object] = lambda: None) -> list[float]:
    """Return the shortest time of each way, all in turn for so many seconds."""
    best = [math.inf] * len(ways)
    began, rounds = time.perf_counter(), 0
    while rounds < ROUNDS_MIN or time.perf_counter() - began < seconds:
        for number, way in enumerate(ways):
            before()
            start = time.perf_counter()
            way()
            best[number] = min(best[number], time.perf_counter() - start)
        rounds += 1
    return best


def weights(seconds: float) -> list[WeightResult]:
    source = torch.Generator().manual_seed(1)
    weight = torch.randn(*WEIGHT, generator=source) / WEIGHT[1] ** 0.5
    quantised: list[QuantisedMatrix] = [encode(weight, one) for one in FORMATS]
    meant = [weight.bfloat16().float(), *(one.decode() for one in quantised)]
    bits = [16.0, *(8 * one.bytes / weight.numel() for one in quantised)]
    rows = torch.randn(max(ROWS), WEIGHT[1], generator=source)
    results = [
        WeightResult(
            name, width, relative(one, weight), relative(rows.double() @ one.double().t(), rows.double() @ weight.double().t())
        )
        for name, width, one in zip(("bfloat16", *FORMATS), bits, meant, strict=True)
    ]
    layers = [make_linear(one, None, torch.bfloat16, CPU) for one in (weight, *quantised)]
    evicted = torch.zeros(EVICTED_BYTES, dtype=torch.uint8)
    for count in ROWS:
        given = rows[:count].bfloat16()
        times = best_of([lambda layer=layer, given=given: layer(given) for layer in layers], seconds, lambda: evicted.add_(1))
        for result, one in zip(results, times, strict=True):
            result.time_shares[count] = one / times[0]
    return results


def kv(seconds: float) -> list[KvResult]:
    source = torch.Generator().manual_seed(2)
    slabs = torch.randn(SLABS, SLAB.rows, SLAB.row_values, generator=source).bfloat16()
    into, blocks = torch.empty_like(slabs), [BlockId(block) for block in range(SLABS)]
    results = [KvResult("plain", 1.0, 0.0, 1.0, 1.0)]
    for stored in (KvFormat.FP8, KvFormat.NVFP4):
        codec, size = KvCodec(stored, SLAB), form_of(stored, SLAB).block_bytes
        data = torch.empty(SLABS, size, dtype=torch.uint8)
        copied, encoded, decoded = best_of(
            [
                lambda: into.copy_(slabs),
                lambda codec=codec, data=data: codec.encode(slabs, blocks, data),
                lambda codec=codec, data=data: codec.decode(data, into, blocks),
            ],
            seconds,
        )
        results.append(KvResult(stored, size / SLAB.bytes, relative(into, slabs), copied / encoded, copied / decoded))
    return results


def corpus(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return tokens to train with and tokens to measure with, out of different files of the repository."""
    files = sorted((ROOT / "orchestrator" / "core").rglob("*.py"))
    split = [tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False).ids for path in files]
    train = [token for number, ids in enumerate(split) if number % 8 for token in ids]
    return train, [token for ids in split[::8] for token in ids]


def train(directory: Path, steps: int) -> None:
    """Make a small checkpoint and train it on the repository's sources."""
    create_checkpoint(directory, "llama", 1, **TRAINED)
    tokens = torch.tensor(corpus(Tokenizer.from_file(str(directory / "tokenizer.json")))[0])
    torch.manual_seed(1)
    model: Any = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory))
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    pace = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - WINDOW_TOKENS, (WINDOWS_A_STEP,))
        ids = torch.stack([tokens[start : start + WINDOW_TOKENS] for start in starts.tolist()])
        loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        pace.step()
    model.save_pretrained(directory)


def text(directory: Path) -> list[TextResult]:
    held = corpus(Tokenizer.from_file(str(directory / "tokenizer.json")))[1]
    stride = max(1, (len(held) - READ - GUESSED) // MEASURED)
    windows = [held[first : first + READ + GUESSED] for first in range(0, stride * MEASURED, stride)]
    results: list[TextResult] = []
    unrounded = torch.empty(0)
    for weight_format in WeightFormat:
        subject = Subject(directory, KvFormat.PLAIN, "float32", READ + GUESSED, weight_format)
        found = torch.cat([subject.logits(window[:READ], 0, window[READ:]).log_softmax(-1) for window in windows])
        unrounded = found if weight_format is WeightFormat.AUTO else unrounded
        wanted = torch.tensor([token for window in windows for token in window[READ:]]).unsqueeze(1)
        results.append(
            TextResult(
                "as they are" if weight_format is WeightFormat.AUTO else weight_format,
                math.exp(-float(found.gather(1, wanted).mean())),
                float((unrounded.exp() * (unrounded - found)).sum(-1).mean()),
                float((found.argmax(-1) == unrounded.argmax(-1)).float().mean()),
            )
        )
    return results


def decoding(directory: Path, seconds: float) -> list[StepResult]:
    family, shape = MODELS["qwen3 0.44B bfloat16, 8 KV heads"]
    create_checkpoint(directory, family, 1, **shape)
    blocks = max(BATCHES) * 4
    config = {"device": "cpu", "block_tokens": 64, "blocks": blocks, "dtype": "bfloat16"}
    engines = [EagerEngine(directory, EngineConfig(weights=one, **config), max(BATCHES), 4096) for one in WeightFormat]
    results = [StepResult("bfloat16" if one is WeightFormat.AUTO else one, {}) for one in WeightFormat]
    for batch in BATCHES:
        for result, step_s in zip(results, best_of_steps(engines, batch, seconds), strict=True):
            result.step_ms[batch] = 1000 * step_s
    return results


def best_of_steps(engines: Sequence[EagerEngine], batch: int, seconds: float) -> list[float]:
    """Return the shortest decode step of each engine, in turn."""
    source = random.Random(batch)
    prompts = [[source.randrange(256) for _ in range(PROMPT_TOKENS)] for _ in range(batch)]
    requests = [RequestId(number) for number in range(batch)]
    for engine in engines:
        for request, prompt in zip(requests, prompts, strict=True):
            engine.add(request, array("I", prompt), Sampling())
            table = tuple(BlockId(4 * request + place) for place in range(4))
            engine.step([Slice(request, 0, len(prompt), 0, table, True)])
    steps = [
        lambda engine=engine: engine.step([Slice(one, len(prompts[one]), 1, 0, (), True) for one in requests])
        for engine in engines
    ]
    best = best_of(steps, seconds)
    for engine in engines:
        for request in requests:
            engine.forget(request)
    return best


def weights_table(results: Sequence[WeightResult]) -> Table:
    title = f"Weights, {WEIGHT[0]} x {WEIGHT[1]}; times over bfloat16's by rows"
    table = _table(title, "format", "bits", "error", "of products", *map(str, ROWS))
    for one in results:
        shares = [f"{share:.2f}" for share in one.time_shares.values()]
        table.add_row(one.name, f"{one.bits:.2f}", f"{one.error:.3%}", f"{one.product_error:.3%}", *shares)
    return table


def kv_table(results: Sequence[KvResult]) -> Table:
    table = _table("KV; speeds over memcpy's", "form", "bytes", "error", "encoding", "decoding")
    for one in results:
        shares = f"{one.encode_share:.2f}", f"{one.decode_share:.2f}"
        table.add_row(one.name, f"{one.bytes_share:.3f}", f"{one.error:.3%}", *shares)
    return table


def text_table(results: Sequence[TextResult], model: str) -> Table:
    table = _table(f"Text, by {model}", "weights", "perplexity", "change", "KL, nats", "same best token")
    for one in results:
        change = one.perplexity / results[0].perplexity - 1
        table.add_row(one.name, f"{one.perplexity:.3f}", f"{change:+.2%}", f"{one.divergence:.5f}", f"{one.equal_share:.1%}")
    return table


def decoding_table(results: Sequence[StepResult]) -> Table:
    table = _table("Decoding, 0.44B weights; steps over bfloat16's by batch", "weights", *map(str, BATCHES))
    for one in results:
        table.add_row(one.name, *(f"{ms / results[0].step_ms[batch]:.2f}" for batch, ms in one.step_ms.items()))
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="an unquantised checkpoint to read text with (default: a trained one)"
    )
    parser.add_argument("--steps", type=int, default=150, help="of training (default: 150)")
    parser.add_argument("--seconds", type=float, default=2.0, help="that each measurement is repeated for (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    options = parser.parse_args()
    console = Console(width=120 if not sys.stdout.isatty() else None)
    report: dict[str, Any] = {"model": options.model.name if options.model else "a small model trained here"}
    with tempfile.TemporaryDirectory() as folder:
        with torch.inference_mode():
            report["weights"] = weights(options.seconds)
            console.print(weights_table(report["weights"]))
            report["kv"] = kv(options.seconds)
            console.print(kv_table(report["kv"]))
        directory = options.model or Path(folder) / "trained"
        if options.model is None:
            train(directory, options.steps)
        report["text"] = text(directory)
        console.print(text_table(report["text"], report["model"]))
        report["decoding"] = decoding(Path(folder) / "large", options.seconds)
        console.print(decoding_table(report["decoding"]))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2, default=asdict) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
