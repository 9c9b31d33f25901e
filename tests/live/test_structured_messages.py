"""Answers of Anthropic's API that must be something, from the engine that computes, asked and read by the official client."""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anthropic
import jsonschema
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from pydantic import BaseModel, ConfigDict

from tests.live.test_structured import SCHEMA, model_dir, play

pytestmark = pytest.mark.slow

__all__ = ["model_dir"]

USER: Any = [{"role": "user", "content": "Say something."}]


class Weather(BaseModel):
    """What is asked for."""

    model_config = ConfigDict(extra="forbid")
    windy: bool
    dry: bool


def talk_to(model_dir: Path, talk: Callable[[AsyncAnthropic], Awaitable[None]]) -> None:
    async def ask(client: AsyncOpenAI) -> None:
        url = str(client.base_url).removesuffix("/v1/")
        async with AsyncAnthropic(base_url=url, api_key="any", max_retries=0) as asking:
            await talk(asking)

    play(model_dir, ask)


@pytest.mark.parametrize("field", ["output_config", "output_format"])
def test_an_answer_is_what_its_schema_says(model_dir: Path, field: str) -> None:
    async def talk(client: AsyncAnthropic) -> None:
        form = {"type": "json_schema", "schema": SCHEMA}
        asked: Any = {"model": "default", "max_tokens": 500, "messages": USER}
        asked["extra_body"] = {"temperature": 0, field: {"format": form} if field == "output_config" else form}
        whole = await client.messages.create(**asked)
        async with client.messages.stream(**asked) as stream:
            streamed = await stream.get_final_message()
        for message in (whole, streamed):
            assert message.stop_reason == "end_turn"
            [block] = message.content
            assert block.type == "text"
            jsonschema.validate(json.loads(block.text), SCHEMA)

    talk_to(model_dir, talk)


def test_the_client_reads_what_it_asked_for(model_dir: Path) -> None:
    async def talk(client: AsyncAnthropic) -> None:
        asked: Any = {"model": "default", "max_tokens": 500, "messages": USER, "extra_body": {"temperature": 0}}
        parsed = await client.messages.parse(output_format=Weather, **asked)
        assert isinstance(parsed.parsed_output, Weather)

    talk_to(model_dir, talk)


def test_a_schema_that_cannot_be_kept_to_is_refused_by_its_place(model_dir: Path) -> None:
    async def talk(client: AsyncAnthropic) -> None:
        wrong: Any = {"format": {"type": "json_schema", "schema": {"type": "sometimes"}}}
        with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format\.schema"):
            await client.messages.create(model="default", max_tokens=9, messages=USER, output_config=wrong)

    talk_to(model_dir, talk)


TOOLS: Any = [
    {"name": "weather", "description": "Tells the weather.", "input_schema": SCHEMA},
    {"name": "clock", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}},
]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({"type": "tool", "name": "weather"}, {"weather"}),
        ({"type": "any"}, {"weather", "clock"}),
        ({"type": "any", "disable_parallel_tool_use": True}, {"weather", "clock"}),
    ],
)
def test_a_call_that_is_forced_is_made(model_dir: Path, choice: Any, names: set[str]) -> None:
    async def talk(client: AsyncAnthropic) -> None:
        asked: Any = {"model": "default", "max_tokens": 900, "messages": USER, "tools": TOOLS, "tool_choice": choice}
        asked["extra_body"] = {"temperature": 0}
        whole = await client.messages.create(**asked)
        async with client.messages.stream(**asked) as stream:
            streamed = await stream.get_final_message()
        for message in (whole, streamed):
            assert message.stop_reason == "tool_use"
            calls = [block for block in message.content if block.type == "tool_use"]
            assert {call.name for call in calls} <= names
            assert len(calls) == 1 or (len(calls) > 1 and not choice.get("disable_parallel_tool_use"))
            for call in calls:
                jsonschema.validate(call.input, next(tool["input_schema"] for tool in TOOLS if tool["name"] == call.name))
        # A turn with the results goes on from it.
        results: Any = [{"type": "tool_result", "tool_use_id": block.id, "content": "Dry"} for block in whole.content]
        messages = [*USER, {"role": "assistant", "content": whole.content}, {"role": "user", "content": results}]
        after = await client.messages.create(**{**asked, "messages": messages, "tool_choice": {"type": "none"}, "max_tokens": 9})
        assert after.usage.input_tokens + (after.usage.cache_read_input_tokens or 0) > whole.usage.input_tokens

    talk_to(model_dir, talk)
