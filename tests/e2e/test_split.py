"""Attention and FFN of a decode pool in different Ray actors: users see the model's tokens, and a group comes back whole."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random

import httpx
import pytest
import torch
from tokenizers import Tokenizer

from tests.builders import some
from tests.e2e.served import Served, descendants
from tests.oracle import oracle
from workers.engines.checkpoint import create_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TOKENS = 16
#: Seconds within which a group must serve again.
HEALED_S = 60
CLUSTER = """
[gateway]
http_port = 0
grpc_port = 0
[models.default]
path = "FOLDER/model"
[[pools]]
name = "prefill"
kind = "prefill"
[pools.engine]
dtype = "float32"
block_tokens = 16
blocks = 512
threads = 1
[[pools]]
name = "halves"
kind = "decode"
nodes = ATTENTION
[pools.engine]
dtype = "float32"
block_tokens = 16
blocks = 512
threads = 1
[pools.split]
attention = ATTENTION
ffn = FFN
spare_slots = SPARE
balance_s = 0.5
imbalance_max = 0.01
"""


def prompts_of(seed: int, count: int) -> list[list[int]]:
    """Return token ids that are ordinary text."""
    random = Random(seed)
    return [[random.randrange(64, 464) for _ in range(random.randint(3, 150))] for _ in range(count)]


def ask(served: Served, prompt: list[int]) -> str:
    body = {"model": "default", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{served.url}/v1/completions", json=body, trust_env=False, timeout=60).raise_for_status().json()
    return answer["choices"][0]["text"]


def started(serve: Callable[..., Served], folder: Path, family: str, attention: int, ffn: int, spare: int) -> Served:
    create_checkpoint(folder / "model", family, 21, layers=2)
    text = CLUSTER.replace("FOLDER", str(folder)).replace("ATTENTION", str(attention)).replace("FFN", str(ffn))
    (folder / "cluster.toml").write_text(text.replace("SPARE", str(spare)))
    served = serve(folder / "cluster.toml")
    served.until(lambda status: status["ready"] and all(node["up"] for node in status["nodes"]), within_s=60)
    return served


def ranks_of(served: Served) -> list[int]:
    """Return the processes that are FFN ranks."""
    found: list[int] = []
    for pid in descendants(served.process.pid):
        name = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        if name.startswith("ray::FfnProcess"):
            found.append(pid)
    return found


@pytest.mark.parametrize(
    ("family", "attention", "ffn", "spare"), [pytest.param("qwen3_moe", 2, 2, 1, marks=pytest.mark.ray), ("llama", 1, 1, 0)]
)
def test_a_split_pool_writes_the_models_tokens(
    serve: Callable[..., Served], tmp_path: Path, family: str, attention: int, ffn: int, spare: int
) -> None:
    served = started(serve, tmp_path, family, attention, ffn, spare)
    torch.set_num_threads(1)
    generate = oracle(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    for prompt in prompts_of(1, 12):
        expected = generate(prompt, TOKENS)
        if expected is not None:  # else two tokens are as likely
            assert ask(served, prompt) == tokenizer.decode(expected)
    assert len(ranks_of(served)) == ffn
    page = httpx.get(f"{served.url}/metrics", trust_env=False).text
    for part in ("attention", "ffn"):
        seconds = [one for one in page.splitlines() if one.startswith("weft_afd_seconds_total") and f'part="{part}"' in one]
        assert len(seconds) == attention
        assert all(float(one.rpartition(" ")[2]) > 0 for one in some(seconds))
    assert served.stop() == 0


def test_a_group_that_loses_a_rank_starts_anew_as_a_whole(serve: Callable[..., Served], tmp_path: Path) -> None:
    served = started(serve, tmp_path, "qwen3_moe", 2, 2, 0)
    [prompt] = prompts_of(2, 1)
    before = ask(served, prompt)
    lost = ranks_of(served)
    os.kill(lost[0], signal.SIGKILL)
    served.until(lambda status: not any(node["up"] for node in status["nodes"] if node["pool"] == "halves"), HEALED_S)
    served.until(lambda status: all(node["up"] for node in status["nodes"]), HEALED_S)
    assert ask(served, prompt) == before
    assert not set(ranks_of(served)) & set(lost)
    assert served.stop() == 0
