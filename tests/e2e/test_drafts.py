"""Drafts by a pool of their own, in Ray: users see the model's tokens, and the process that drafts may come and go."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random

import httpx
import pytest
import torch
from tokenizers import Tokenizer

from tests.e2e.served import NotServing, Served, descendants
from tests.oracle import oracle
from workers.engines.checkpoint import create_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TOKENS = 96
#: Seconds within which a process that drafts must be back.
BACK_S = 60
CLUSTER = """
[gateway]
http_port = 0
grpc_port = 0
[models.default]
path = "FOLDER/model"
[[pools]]
name = "both"
kind = "aggregated"
nodes = 2
[pools.engine]
dtype = "float32"
block_tokens = 16
blocks = 512
threads = 1
[pools.engine.speculation]
method = "draft_model"
draft_pool = "drafts"
[[pools]]
name = "drafts"
kind = "lpx"
[pools.engine]
block_tokens = 16
threads = 1
[pools.drafter]
model = "FOLDER/DRAFT"
sequences_max = 4
"""


def cluster_file(folder: Path, draft: str) -> Path:
    path = folder / "cluster.toml"
    path.write_text(CLUSTER.replace("FOLDER", str(folder)).replace("DRAFT", draft))
    return path


def prompts_of(seed: int, count: int) -> list[list[int]]:
    """Return token ids that are ordinary text."""
    random = Random(seed)
    return [[random.randrange(64, 464) for _ in range(random.randint(3, 150))] for _ in range(count)]


def ask(served: Served, prompt: list[int]) -> str:
    body = {"model": "default", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{served.url}/v1/completions", json=body, trust_env=False, timeout=60).raise_for_status().json()
    return answer["choices"][0]["text"]


def metric(served: Served, name: str, label: str) -> float:
    """Return a metric's sum over nodes, 0 while there is none."""
    page = httpx.get(f"{served.url}/metrics", trust_env=False, timeout=20).text
    return sum(float(value) for value in re.findall(rf"^{name}{{[^}}]*{label}[^}}]*}} (\S+)$", page, re.MULTILINE))


def drafters(served: Served) -> list[int]:
    """Return the processes that draft."""
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(served.process.pid)}
    return [pid for pid, line in lines.items() if b"workers.engines.drafts.process" in line]


def asked_until(served: Served, done: Callable[[], bool], prompt: list[int], expected: str) -> None:
    """Ask the same again and again, with the same answer, until something has come about."""
    asked = 0
    while not done():
        assert ask(served, prompt) == expected
        asked += 1
        assert asked < 200, "it did not come about"


def test_drafts_come_from_a_pool_go_with_its_process_and_come_back(serve: Callable[..., Served], tmp_path: Path) -> None:
    create_checkpoint(tmp_path / "model", "llama", 21, layers=3)
    served = serve(cluster_file(tmp_path, "model"))
    served.until(lambda status: status["ready"] and all(node["up"] for node in status["nodes"]), within_s=60)
    torch.set_num_threads(1)
    generate = oracle(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    texts = {tuple(prompt): tokenizer.decode(found) for prompt in prompts_of(1, 12) if (found := generate(prompt, TOKENS))}
    for prompt, text in texts.items():
        assert ask(served, list(prompt)) == text
    prompt, text = next(iter(texts.items()))
    accepted = "weft_speculation_tokens_total", 'outcome="accepted"'
    asked_until(served, lambda: metric(served, *accepted) > 0, list(prompt), text)
    assert metric(served, "weft_draft_steps_total", 'outcome="answered"') > 0
    [lost] = drafters(served)
    os.kill(lost, signal.SIGKILL)
    asked_until(served, lambda: metric(served, "weft_draft_steps_total", 'outcome="unreached"') > 0, list(prompt), text)
    served.until(lambda _: bool(set(drafters(served)) - {lost}), BACK_S)
    before = metric(served, *accepted)
    asked_until(served, lambda: metric(served, *accepted) > before, list(prompt), text)
    assert all(node["up"] for node in served.status()["nodes"]) is True
    assert served.stop() == 0


def test_a_draft_model_of_another_vocabulary_is_one_line_and_no_cluster(serve: Callable[..., Served], tmp_path: Path) -> None:
    create_checkpoint(tmp_path / "model", "llama", 21, layers=1)
    create_checkpoint(tmp_path / "other", "llama", 21, layers=1, vocabulary=320)
    with pytest.raises(NotServing) as raised:
        serve(cluster_file(tmp_path, "other"))
    assert raised.value.code == 1
    assert "drafter-drafts-0: pools.drafts.drafter.model: " in raised.value.errors
    assert "has a vocabulary of 320 tokens" in raised.value.errors
