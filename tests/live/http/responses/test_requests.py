"""What bodies of /v1/responses ask for, in no API's words."""

import json
from typing import Any

import pytest

from orchestrator.core.types import GatewayId, ServiceClass
from orchestrator.live.asked import Asked, Conversation, Effort, ToolUse
from orchestrator.live.http.responses.ids import gateway_of, new_id
from orchestrator.live.http.responses.requests import parse
from orchestrator.live.refusals import Invalid

FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object"}}
OTHER = {**FUNCTION, "name": "g", "strict": True, "description": "G."}


def asked(**fields: Any) -> Asked:
    return parse(json.dumps({"model": "m", "input": "x", **fields}).encode())


def conversation(**fields: Any) -> Conversation:
    prompt = asked(**fields).prompt
    assert isinstance(prompt, Conversation)
    return prompt


def test_fields_that_say_how_tokens_are_chosen_are_those_of_chat() -> None:
    one = asked(temperature=0.5, top_p=0.9, top_k=5, seed=7, stop=["a"], presence_penalty=1, max_output_tokens=9)
    assert (one.sampling.temperature, one.sampling.top_p, one.sampling.top_k, one.sampling.seed) == (0.5, 0.9, 5, 7)
    assert (one.sampling.presence_penalty, one.limits.stop_strings, one.limits.output_tokens_max) == (1, ["a"], 9)
    assert one.sampling.logprobs is None
    assert asked(include=["message.output_text.logprobs"]).sampling.logprobs == 0
    assert asked(top_logprobs=3).sampling.logprobs == 3


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({}, 0.0),
        ({"prompt_cache_options": {"mode": "implicit"}}, 0.0),
        ({"prompt_cache_options": {"ttl": "30m"}}, 1800.0),
        ({"prompt_cache_options": {"ttl": "30m"}, "prompt_cache_retention": "24h"}, 86_400.0),
        ({"prompt_cache_retention": "in_memory"}, 0.0),
    ],
)
def test_how_long_to_keep_the_prompt(fields: dict[str, Any], seconds: float) -> None:
    assert asked(**fields).hints.retention_s == seconds


def test_when_and_where_it_is_served() -> None:
    assert asked(service_tier="flex").hints.service_class is ServiceClass.BATCH
    assert asked(prompt_cache_key="k").hints.session == "k"
    kept = new_id("resp", GatewayId(5))
    assert asked(previous_response_id=kept).hints.gateway == gateway_of(kept) == 5
    assert asked(input=[{"type": "item_reference", "id": new_id("msg", GatewayId(1023))}]).hints.gateway == 1023
    assert asked(previous_response_id="resp_another_servers").hints.gateway is None
    assert asked().hints.gateway is None


def test_effort_and_verbosity_are_told_to_the_template() -> None:
    one = conversation(reasoning={"effort": "high"}, text={"verbosity": "low"}, chat_template_kwargs={"a": 1})
    assert one.thinking.effort is Effort.HIGH
    assert one.variables == {"verbosity": "low", "a": 1}
    with pytest.raises(Invalid) as caught:
        asked(reasoning={"effort": "enormous"})
    assert caught.value.field == "reasoning.effort"


def test_functions_are_shown_as_chat_has_them() -> None:
    assert conversation(tools=[OTHER, {**FUNCTION, "strict": False}]).tools == [
        {"type": "function", "function": {"name": "g", "description": "G.", "parameters": {"type": "object"}, "strict": True}},
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
    ]
    group = {"type": "namespace", "name": "n", "description": "Of n.", "tools": [OTHER, {"type": "function", "name": "h"}]}
    shown = conversation(tools=[group]).tools or []
    assert [(tool["function"]["name"], tool["function"].get("description")) for tool in shown] == [
        ("n__g", "Of n.\n\nG."),
        ("n__h", None),
    ]


def test_without_tools_nothing_is_said_of_them() -> None:
    use = conversation(parallel_tool_calls=False, tool_choice="auto").tool_use
    assert (use.forced, use.name, use.parallel) == (False, "", True)


@pytest.mark.parametrize(
    ("choice", "shown", "use"),
    [
        (None, ["f", "g"], ToolUse()),
        ("auto", ["f", "g"], ToolUse()),
        ("none", [], ToolUse()),
        ("required", ["f", "g"], ToolUse(forced=True)),
        ({"type": "function", "name": "g"}, ["f", "g"], ToolUse(forced=True, name="g")),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]}, ["g"], ToolUse()),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]},
            ["f"],
            ToolUse(forced=True),
        ),
    ],
)
def test_what_is_to_be_done_with_tools(choice: Any, shown: list[str], use: ToolUse) -> None:
    one = conversation(tools=[FUNCTION, OTHER], tool_choice=choice)
    assert [tool["function"]["name"] for tool in one.tools or ()] == shown
    assert (one.tool_use.forced, one.tool_use.name) == (use.forced, use.name)
