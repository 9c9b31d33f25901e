"""Answers that must be something: asked by the official client, kept to by the engine that computes, read by what was asked."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openai import AsyncOpenAI
from tokenizers import Tokenizer

from orchestrator.core.config import ClusterConfig, ModelConfig
from orchestrator.core.types import GatewayId, ModelName
from orchestrator.live.http.gateway import Gateway
from orchestrator.live.intake import Intake
from orchestrator.live.metrics import Metrics
from orchestrator.live.text.models import ModelText
from tests.live.serving import Cluster, cluster, together
from workers.engines.checkpoint import create_checkpoint

MODEL = "default"
USER = [{"role": "user", "content": "Say something."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "pattern": "^[a-z]{2,8}$"},
        "degrees": {"type": "integer", "minimum": -50, "maximum": 50},
        "tags": {"type": "array", "items": {"enum": ["dry", "windy", None]}, "maxItems": 3},
    },
    "required": ["city", "degrees", "tags"],
    "additionalProperties": False,
}


def schema_format(schema: object, **more: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "weather", "strict": True, "schema": schema, **more}}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    create_checkpoint(
        directory, "qwen3", seed=3, layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128,
        context_tokens_max=2048, dtype="float32",
    )  # fmt: skip
    return directory


@asynccontextmanager
async def answering(config: ClusterConfig, model_dir: Path, model: ModelConfig) -> AsyncIterator[tuple[AsyncOpenAI, Cluster]]:
    """Serve a cluster behind a gateway, for the official client."""
    config = replace(config, models={ModelName(MODEL): model})
    async with cluster(config, model_dir) as served:
        metrics = Metrics(GatewayId(0), 1, {})
        texts = {ModelName(MODEL): ModelText.load(model_dir, "random", model)}
        intake = Intake(config, texts, b"secret")
        gateway = Gateway(config, GatewayId(0), intake, served.driver, metrics, metrics.render, lambda: {"nodes": []})
        port = await gateway.start("127.0.0.1", 0)
        try:
            async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0) as client:
                yield client, served
            await served.idle()
        finally:
            await gateway.stop()


def play(
    model_dir: Path,
    talk: Callable[[AsyncOpenAI], Awaitable[None]],
    config: ClusterConfig | None = None,
    model: ModelConfig | None = None,
) -> None:
    async def run() -> None:
        async with answering(config or together("eager"), model_dir, model or ModelConfig()) as (client, _):
            await talk(client)

    asyncio.run(asyncio.wait_for(run(), 60))


async def content(client: AsyncOpenAI, **asked: Any) -> str:
    """Return an answer that ended by itself."""
    answer = await client.chat.completions.create(model=MODEL, messages=USER, max_tokens=600, **asked)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content is not None
    return answer.choices[0].message.content


@pytest.mark.slow
def test_answers_are_what_the_schema_says(model_dir: Path) -> None:
    async def talk(client: AsyncOpenAI) -> None:
        for temperature in (0.0, 1.0):
            text = await content(client, response_format=schema_format(SCHEMA), temperature=temperature, seed=1)
            jsonschema.validate(json.loads(text), SCHEMA)

    play(model_dir, talk)


KINDS: dict[str, tuple[dict[str, Any], Callable[[str], object]]] = {
    "regex": ({"regex": "[a-z]{3}-[0-9]{2,4}"}, lambda text: re.fullmatch("[a-z]{3}-[0-9]{2,4}", text)),
    "choice": ({"choice": ["yes", "no", 'say "when"']}, lambda text: text in ("yes", "no", 'say "when"')),
    "grammar-ebnf": (
        {"grammar": 'root ::= "SELECT " [a-z]{1,9} (", " [a-z]{1,9}){0,2}'},
        lambda text: text.startswith("SELECT "),
    ),
    "grammar-lark": ({"grammar": 'start: "a" ("b" | /[0-9]{1,5}/) "c"'}, lambda text: re.fullmatch(r"a(b|\d{1,5})c", text)),
    "json": ({"json": SCHEMA}, lambda text: jsonschema.validate(json.loads(text), SCHEMA) is None),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_of_every_kind_that_can_be_asked_for(model_dir: Path, kind: str) -> None:
    structured, right = KINDS[kind]
    [(name, value)] = structured.items()

    async def talk(client: AsyncOpenAI) -> None:
        texts = [
            await content(client, extra_body={"structured_outputs": structured}, seed=1),
            await content(client, extra_body={f"guided_{name}": value}, seed=1),
        ]
        completion = await client.completions.create(
            model=MODEL, prompt="One:", max_tokens=600, seed=1, extra_body={"structured_outputs": structured}
        )
        assert completion.choices[0].finish_reason == "stop"
        assert texts[0] == texts[1]
        assert all(right(text) for text in (*texts, completion.choices[0].text))

    play(model_dir, talk)


LONG = {"type": "array", "items": {"enum": ["again and again", "once more"]}, "minItems": 12, "maxItems": 12}


@pytest.mark.slow
def test_answers_that_lose_their_blocks_to_others_are_what_they_are_alone(model_dir: Path) -> None:
    roomy = together("eager")
    [both] = roomy.pools
    cramped = replace(roomy, pools=(replace(both, engine=replace(both.engine, blocks=24)),))

    async def ask(config: ClusterConfig, at_once: bool) -> tuple[list[str], int]:
        async with answering(config, model_dir, ModelConfig()) as (client, served):
            asked = [content(client, response_format=schema_format(LONG), temperature=1.0, seed=seed) for seed in range(4)]
            texts = await asyncio.gather(*asked) if at_once else [await one for one in asked]
            await served.idle()
            return texts, sum(load.preemptions for load in served.observed.loads.values())

    alone, _ = asyncio.run(asyncio.wait_for(ask(roomy, at_once=False), 60))
    crowded, preemptions = asyncio.run(asyncio.wait_for(ask(cramped, at_once=True), 60))
    assert preemptions > 0
    assert crowded == alone
    for text in alone:
        jsonschema.validate(json.loads(text), LONG)


TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "now"}},
]
CHOICES: list[Any] = ["required", {"type": "function", "function": {"name": "weather"}}]


@pytest.mark.slow
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("choice", CHOICES, ids=["required", "named"])
def test_calls_that_are_forced_are_made(model_dir: Path, choice: Any, streams: bool) -> None:
    async def talk(client: AsyncOpenAI) -> None:
        asked: dict[str, Any] = {
            "model": MODEL,
            "messages": USER,
            "tools": TOOLS,
            "tool_choice": choice,
            "seed": 2,
            "max_tokens": 900,
        }
        if streams:
            async with client.chat.completions.stream(**asked, parallel_tool_calls=False) as stream:
                answer = await stream.get_final_completion()
        else:
            answer = await client.chat.completions.create(**asked, parallel_tool_calls=False)
        calls = answer.choices[0].message.tool_calls
        assert answer.choices[0].finish_reason == "tool_calls"
        assert not answer.choices[0].message.content
        assert calls is not None
        assert len(calls) == 1
        assert calls[0].type == "function"
        wanted = {"weather": SCHEMA, "now": {"const": {}}} if choice == "required" else {"weather": SCHEMA}
        jsonschema.validate(json.loads(calls[0].function.arguments), wanted[calls[0].function.name])

    play(model_dir, talk)


@pytest.mark.slow
def test_an_answer_in_a_form_may_call_tools_instead(model_dir: Path) -> None:
    [tag] = Tokenizer.from_file(str(model_dir / "tokenizer.json")).encode("<").ids

    async def talk(client: AsyncOpenAI) -> None:
        for bias, end in ((-100, "stop"), (100, "tool_calls")):
            answer = await client.chat.completions.create(
                model=MODEL, messages=USER, tools=TOOLS, response_format=schema_format(SCHEMA), max_tokens=900, seed=3,
                parallel_tool_calls=False, logit_bias={str(tag): bias},
            )  # fmt: skip
            message = answer.choices[0].message
            assert answer.choices[0].finish_reason == end
            if end == "stop":
                jsonschema.validate(json.loads(message.content or ""), SCHEMA)
            else:
                assert message.tool_calls
                assert not message.content

    play(model_dir, talk)
