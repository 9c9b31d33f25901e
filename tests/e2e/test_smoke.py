"""The default cluster as a newcomer starts it: it answers OpenAI's client, shows itself, and leaves nothing behind."""

import os
from collections.abc import Callable

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.cli.cluster_file import LOCAL_CLUSTER
from tests.e2e.served import Served, descendants


@pytest.mark.timeout(240)
def test_the_default_cluster_serves_a_chat_and_ends_cleanly(serve: Callable[..., Served]) -> None:
    served = serve(LOCAL_CLUSTER)
    processes = descendants(served.process.pid)
    served.until(lambda status: status["ready"], within_s=30)
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False)) as client:
        messages = [{"role": "user", "content": "Tell me about weaving, from the loom to the cloth. " * 8}]
        whole = client.chat.completions.create(model="default", messages=messages, max_tokens=16, temperature=0)
        chunks = client.chat.completions.create(model="default", messages=messages, max_tokens=16, temperature=0, stream=True)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert whole.choices[0].message.content == streamed
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 16
    with grpc.insecure_channel(served.status()["grpc_address"]) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    served.until_idle()
    page = httpx.get(f"{served.url}/metrics", trust_env=False).text
    samples = {sample.name: sample.value for family in text_string_to_metric_families(page) for sample in family.samples}
    assert samples["weft_output_tokens_total"] == samples["vllm:generation_tokens_total"] == 32
    assert samples["weft_cached_tokens_total"] > 0
    assert served.stop() == 0
    assert [pid for pid in processes if os.path.exists(f"/proc/{pid}")] == []
    assert served.log.read_text() == ""
