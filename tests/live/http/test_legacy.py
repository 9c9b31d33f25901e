"""Clients that know functions and no tools: what they ask is understood, and they are answered in their words."""

import json
from typing import Any

import httpx
import pytest

from orchestrator.live.text.models import ModelText
from tests.live.scripted import MODEL, Script, Served, play

CHAT = "/v1/chat/completions"
WEATHER = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "London"}}\n</tool_call>'
BODY: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi there"}], "functions": [WEATHER]}


def prompt_of(served: Served, place: int) -> str:
    tokens = list(memoryview(served.driver.turns[place].prompt.tokens).cast("I"))
    return served.driver.text.tokenizer.decode(tokens, skip_special_tokens=False)


def test_a_call_is_told_as_a_function_call(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        served.driver.script = lambda turn: Script(["Well. ", CALL, "\n", CALL])  # of several only the first can be told
        [choice] = (await client.post(CHAT, json=BODY)).json()["choices"]
        assert choice["finish_reason"] == "function_call"
        assert "tool_calls" not in choice["message"]
        assert choice["message"]["function_call"]["name"] == "get_weather"
        assert json.loads(choice["message"]["function_call"]["arguments"]) == {"city": "London"}

    play(text, talk)


def test_a_streamed_call_is_told_bit_by_bit(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        served.driver.script = lambda turn: Script([[token] for token in served.driver.tokens(CALL) or ()])
        answer = await client.post(CHAT, json={**BODY, "stream": True})
        choices = [json.loads(line[6:])["choices"][0] for line in answer.text.split("\n\n") if line.startswith("data: {")]
        told = [choice["delta"]["function_call"] for choice in choices if "function_call" in choice["delta"]]
        assert [one["name"] for one in told if "name" in one] == ["get_weather"]
        assert json.loads("".join(one["arguments"] for one in told)) == {"city": "London"}
        assert choices[-1]["finish_reason"] == "function_call"
        assert "tool_calls" not in answer.text

    play(text, talk)


def test_functions_and_earlier_calls_are_shown_as_tools_are(text: ModelText) -> None:
    call = {"name": "get_weather", "arguments": '{"city": "London"}'}
    older = [
        {"role": "user", "content": "Hi there"},
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "get_weather", "content": "rain"},
    ]
    newer = [
        older[0],
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "name": "get_weather", "content": "rain"},
    ]

    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        tools = [{"type": "function", "function": WEATHER}]
        for messages, more in ((older, {"functions": [WEATHER]}), (newer, {"tools": tools})):
            body = {"model": MODEL, "messages": messages, **more}
            assert (await client.post(CHAT, json=body)).status_code == 200
        assert prompt_of(served, 0) == prompt_of(served, 1)
        assert "rain" in prompt_of(served, 0)
        hidden = await client.post(CHAT, json={**BODY, "function_call": "none"})
        assert hidden.status_code == 200
        assert "get_weather" not in prompt_of(served, 2)

    play(text, talk)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"functions": [{}]}, "functions[0].name"),
        ({"functions": [WEATHER, {"name": 3}]}, "functions[1].name"),
        ({"functions": {"a": 1}}, "functions"),
        ({"tools": [{"type": "function", "function": WEATHER}]}, "functions"),
        ({"tool_choice": "auto"}, "functions"),
        ({"function_call": {"name": "other"}}, "function_call"),
        ({"function_call": "required"}, "function_call"),
        ({"functions": [], "function_call": {"name": "get_weather"}}, "function_call"),
        (
            {"messages": [{"role": "assistant", "function_call": {"name": "x"}, "tool_calls": [{"function": {"name": "x"}}]}]},
            "messages",
        ),
    ],
)
def test_what_names_no_function_is_refused_by_name(text: ModelText, changes: dict[str, Any], param: str) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        answer = await client.post(CHAT, json={**BODY, **changes})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert not served.driver.turns

    play(text, talk)
