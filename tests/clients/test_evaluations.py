"""EleutherAI's lm-eval scores a model served here as it scores it in `transformers`: log probabilities and texts of every sample.

It needs an environment of its own, which has PyTorch and transformers as well; where there is none the test is skipped:

    python3 -m venv .venv-evals && .venv-evals/bin/pip install "lm_eval[api]==0.4.13" torch transformers accelerate
"""

import asyncio
import json
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from orchestrator.core.types import GatewayId, ModelName
from orchestrator.live.http.gateway import Gateway
from orchestrator.live.intake import Intake
from orchestrator.live.metrics import Metrics
from orchestrator.live.text.models import ModelText
from tests.live.serving import cluster, split
from workers.engines.checkpoint import create_checkpoint

PROGRAM = Path(__file__).parents[2] / ".venv-evals" / "bin" / "lm_eval"
TASKS = Path(__file__).parent / "tasks"
MODEL = ModelName("default")
SAMPLES = 24
#: Of natural logarithms: sums of a few float32 numbers, computed in other pieces.
NEAR = 2e-3
WORDS = (
    "the", "agent", "reads", "a", "file", "and", "writes", "what", "it", "found", "into", "list", "of", "things", "to", "do",
)  # fmt: skip

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not PROGRAM.exists(), reason="lm-eval is not installed: see the top of tests/clients/test_evaluations.py"),
]


def words(source: random.Random, least: int, most: int) -> str:
    return " ".join(source.choice(WORDS) for _ in range(source.randint(least, most)))


def write_tasks(folder: Path, model_dir: Path) -> None:
    """Write samples: of half of the continuations the model's own are what is expected."""
    source = random.Random(5)
    choices = [
        {"text": words(source, 3, 40), "choices": [f" {words(source, 1, 4)}" for _ in range(4)], "target": source.randrange(4)}
        for _ in range(SAMPLES)
    ]
    texts = [words(source, 3, 40) for _ in range(SAMPLES)]
    targets = [own if place % 2 else "something else" for place, own in enumerate(written(model_dir, texts))]
    continuations = [{"text": text, "target": target} for text, target in zip(texts, targets, strict=True)]
    for name, samples in (("choices", choices), ("continuations", continuations)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))


def written(model_dir: Path, texts: list[str]) -> list[str]:
    """Return what the model writes after each text, greedily."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    found: list[str] = []
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.inference_mode():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        found.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).split("\n\n")[0])
    return found


async def evaluate(folder: Path, name: str, arguments: list[str]) -> dict[str, Any]:
    """Run lm-eval over both tasks; return scores by task, and samples by task and number."""
    home = {name: value for name in ("PATH", "LANG") if (value := os.environ.get(name))}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "HOME": str(folder)}
    output = folder / name
    program = await asyncio.create_subprocess_exec(
        str(PROGRAM),
        *("run", *arguments, "--include_path", str(TASKS), "--tasks", "weft_choices,weft_continuations"),
        *("--output_path", str(output), "--log_samples", "--device", "cpu"),
        cwd=folder,
        env={**home, **offline, "OPENAI_API_KEY": "any", "NO_PROXY": "127.0.0.1", "TOKENIZERS_PARALLELISM": "false"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        told, _ = await asyncio.wait_for(program.communicate(), 500)
    finally:
        if program.returncode is None:
            program.kill()
    assert program.returncode == 0, told.decode()[-4000:]
    [results] = output.rglob("results_*.json")
    samples = {path.name.split("_20")[0]: path for path in output.rglob("samples_*.jsonl")}
    assert sorted(samples) == ["samples_weft_choices", "samples_weft_continuations"]
    read = {task: [json.loads(line) for line in path.read_text().splitlines()] for task, path in samples.items()}
    for found in read.values():
        found.sort(key=lambda sample: sample["doc_id"])
    return {"scores": json.loads(results.read_text())["results"], **read}


def scores_of(result: dict[str, Any]) -> dict[str, float]:
    """Return the scores of a run by task and metric."""
    return {
        f"{task} {metric.split(',')[0]}": value
        for task, metrics in result["scores"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    }


@pytest.mark.timeout(1200)
def test_scores_are_those_of_transformers(tmp_path: Path) -> None:
    model_dir = tmp_path / "model"
    create_checkpoint(model_dir, "llama", 5, layers=2, hidden=64, intermediate=96, dtype="float32")
    write_tasks(tmp_path, model_dir)

    async def scenario(url: str) -> None:
        arguments = f"model={MODEL},base_url={url}/v1/completions,tokenizer={model_dir},num_concurrent=4,max_length=1024"
        ours = await evaluate(tmp_path, "ours", ["--model", "local-completions", "--model_args", arguments, "--batch_size", "4"])
        local = f"pretrained={model_dir},dtype=float32,max_length=1024"
        theirs = await evaluate(tmp_path, "theirs", ["--model", "hf", "--model_args", local, "--batch_size", "1"])
        assert scores_of(ours) == scores_of(theirs)
        assert scores_of(ours)["weft_continuations exact_match"] == 0.5
        for one, other in zip(ours["samples_weft_choices"], theirs["samples_weft_choices"], strict=True):
            for mine, hers in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
                assert float(mine[0]) == pytest.approx(float(hers[0]), abs=NEAR)
                assert mine[1] == hers[1]  # whether each token was the likeliest
        texts = [[sample["filtered_resps"] for sample in run["samples_weft_continuations"]] for run in (ours, theirs)]
        assert texts[0] == texts[1]

    asyncio.run(serving(model_dir, scenario))


async def serving(model_dir: Path, talk: Callable[[str], Awaitable[None]]) -> None:
    """Serve a model by a node that computes prompts and one that goes on with them."""
    config = split("eager")
    async with cluster(config, model_dir) as served:
        text = ModelText.load(model_dir, "served")
        intake, metrics = Intake(config, {MODEL: text}, b"secret"), Metrics(GatewayId(0), 1, {})
        gateway = Gateway(config, GatewayId(0), intake, served.driver, metrics, metrics.render, lambda: {})
        port = await gateway.start("127.0.0.1", 0)
        try:
            await talk(f"http://127.0.0.1:{port}")
        finally:
            await gateway.stop()
