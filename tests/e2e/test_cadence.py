"""A pool that keeps a beat beside one for throughput: the same tokens, sessions that move between them, a refused beat."""

from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.served import NotServing, Served
from workers.engines.checkpoint import create_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]

#: Long enough for a machine that has other things to do.
BEAT_S = 0.25
OUTPUT_TOKENS = 12
ENGINE = """
[pools.engine]
device = "cpu"
dtype = "float32"
block_tokens = 16
blocks = 512
threads = 1
context_tokens_max = 1024
[pools.scheduler]
sequences_max = 4
step_tokens_max = 256
"""
CLUSTER = f"""
[gateway]
http_port = 0
grpc_port = 0
[models.default]
path = "FOLDER/model"
[[pools]]
name = "prefill"
kind = "prefill"
{ENGINE}
[[pools]]
name = "decode"
kind = "decode"
{ENGINE}
[[pools]]
name = "cadence"
kind = "lpx"
{ENGINE}
[pools.profile]
beat_s = BEAT
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    create_checkpoint(tmp_path / "model", "qwen3", 3, layers=2)
    file = tmp_path / "cluster.toml"
    file.write_text(CLUSTER.replace("FOLDER", str(tmp_path)).replace("BEAT", str(BEAT_S)))
    return file


def turn(served: Served, prompt: list[int], **more: Any) -> dict[str, Any]:
    body = {"model": "default", "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True, "temperature": 0, **more}
    answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=120, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()


def counted(served: Served, name: str, **labels: str) -> float:
    text = httpx.get(f"{served.url}/metrics", trust_env=False).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())


def test_class_cadence_gets_the_same_tokens_on_a_beat_and_sessions_move(serve: Any, cluster: Path) -> None:
    served = serve(cluster)
    prompt = Random(4).choices(range(64, 464), k=200)
    standard = turn(served, prompt)
    assert counted(served, "weft_beats_total") == 0
    beating = turn(served, prompt, service_tier="cadence")
    assert beating["choices"][0]["text"] == standard["choices"][0]["text"]
    assert counted(served, "weft_beats_total", pool="cadence") >= OUTPUT_TOKENS - 1
    # Who wants a quicker beat than there is, is served without one.
    beats = counted(served, "weft_beats_total")
    quicker = turn(served, prompt, service_tier="cadence", nvext={"agent_hints": {"beat_s": BEAT_S / 2}})
    assert quicker["choices"][0]["text"] == standard["choices"][0]["text"]
    assert counted(served, "weft_beats_total") == beats
    # Another session's turns: on the beat, then in the throughput pool with what is cached of the one before, and back.
    first = Random(5).choices(range(64, 464), k=600)
    turn(served, first, service_tier="cadence", prompt_cache_key="session")
    longer = first + Random(6).choices(range(64, 464), k=40)
    moved = turn(served, longer, prompt_cache_key="session")
    assert moved["usage"]["prompt_tokens_details"]["cached_tokens"] >= 592
    beats = counted(served, "weft_beats_total")
    back = turn(served, longer, service_tier="cadence", prompt_cache_key="session")
    assert back["choices"][0]["text"] == moved["choices"][0]["text"]
    assert back["usage"]["prompt_tokens_details"]["cached_tokens"] >= 592
    assert counted(served, "weft_beats_total") > beats
    served.until_idle()


def test_a_beat_that_cannot_be_kept_is_refused_at_start(serve: Any, cluster: Path) -> None:
    cluster.write_text(cluster.read_text().replace(f"beat_s = {BEAT_S}", "beat_s = 0.000001"))
    with pytest.raises(NotServing) as refused:
        serve(cluster)
    assert refused.value.code != 0
    assert "pools.cadence.profile.beat_s: must be at least" in refused.value.errors
