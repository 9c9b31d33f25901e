"""OpenAI's bodies become what is asked, field by field, or are refused with the field's name; no server is needed to see it."""

import json
from operator import attrgetter
from typing import Any

import pytest

from orchestrator.core.types import Sampling, ServiceClass
from orchestrator.live.asked import Asked, Conversation, Effort, Hints, Limits, Report, Texts, Thinking, ToolUse
from orchestrator.live.http.openai.requests import (
    BAD_WORDS_MAX,
    CHOICES_MAX,
    COMPLETION_TOKENS_DEFAULT,
    MESSAGES_MAX,
    PROMPTS_MAX,
    STOP_STRINGS_MAX,
    TOOLS_MAX,
    parse_chat,
    parse_completion,
)
from orchestrator.live.http.openai.unserved import Unserved
from orchestrator.live.refusals import Invalid

USER = {"role": "user", "content": "Hi"}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
HALF = (1 << 31) - 1

NAMED = {"type": "function", "function": {"name": "now"}}


def chat(**changes: Any) -> Asked:
    return parse_chat(json.dumps({"model": "m", "messages": [USER], **changes}).encode())


def completion(**changes: Any) -> Asked:
    return parse_completion(json.dumps({"model": "m", "prompt": "Hi", **changes}).encode())


def conversation(**changes: Any) -> Conversation:
    prompt = chat(**changes).prompt
    assert isinstance(prompt, Conversation)
    return prompt


def shown(**message: Any) -> dict[str, Any]:
    """Return a message as templates are shown it, all of it."""
    [one] = conversation(messages=[message]).messages
    return dict(one)


def refusal(parse: Any, **changes: Any) -> Invalid:
    with pytest.raises(Invalid) as caught:
        parse(**changes)
    return caught.value


def test_a_body_that_says_least() -> None:
    conversation = Conversation([{"role": "user", "content": "Hi"}])
    assert chat() == Asked("m", conversation, Sampling(temperature=1.0), Limits(), Hints(), Report())
    # OpenAI gives completions sixteen tokens where nobody says.
    limits = Limits(output_tokens_max=COMPLETION_TOKENS_DEFAULT)
    assert completion() == Asked("m", Texts(["Hi"]), Sampling(temperature=1.0), limits, Hints(), Report())


def test_a_body_that_says_all() -> None:
    asked = chat(
        n=2,
        stream=True,
        stream_options={"include_usage": True},
        max_completion_tokens=9,
        max_tokens=7,
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        min_p=0.125,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=7,
        stop=["a", "b"],
        stop_token_ids=[5, 6],
        ignore_eos=True,
        logit_bias={"7": 2, "8": -100},
        logprobs=True,
        top_logprobs=4,
        priority=1,
        service_tier="flex",
        prompt_cache_key="key",
        cache_salt="salt",
        tools=[{**NOW, "cache_control": {"type": "ephemeral"}}],
        reasoning_effort="low",
        chat_template_kwargs={"enable_thinking": False},
        include_reasoning=False,
    )
    assert asked == Asked(
        model="m",
        prompt=Conversation([USER], [NOW], {"enable_thinking": False}, thinking=Thinking(effort=Effort.LOW)),
        sampling=Sampling(0.5, 0.25, 3, 0.125, 0.5, -0.5, 7, (5, 6), 4, {7: 2.0, 8: -100.0}),
        limits=Limits(9, ["a", "b"], ignores_ends=True, choices=2),
        hints=Hints(1, ServiceClass.BATCH, "key", "salt", 300.0),
        report=Report(streams=True, usage=True, thoughts=False),
    )


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("one", ["one"]),
        (["one", "two"], ["one", "two"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["one", [3]], ["one", [3]]),
        ([1.0, 2.0], [[1, 2]]),
    ],
)
def test_prompts_are_texts_or_tokens_one_or_many(prompt: Any, texts: list[Any]) -> None:
    asked = completion(prompt=prompt, n=3)
    assert asked.prompt == Texts(texts)
    assert asked.generations == 3 * len(texts)


@pytest.mark.parametrize(
    ("changes", "where", "expected"),
    [
        # The greatest and the least of every range.
        ({"temperature": 0}, "sampling.temperature", 0),
        ({"temperature": 100}, "sampling.temperature", 100),
        ({"top_p": 1}, "sampling.top_p", 1),
        ({"min_p": 0}, "sampling.min_p", 0),
        ({"min_p": 1}, "sampling.min_p", 1),
        ({"presence_penalty": -2}, "sampling.presence_penalty", -2),
        ({"frequency_penalty": 2}, "sampling.frequency_penalty", 2),
        ({"n": CHOICES_MAX}, "limits.choices", CHOICES_MAX),
        ({"stop": ["x"] * STOP_STRINGS_MAX}, "limits.stop_strings", ["x"] * STOP_STRINGS_MAX),
        ({"stop": "x"}, "limits.stop_strings", ("x",)),
        ({"stop": []}, "limits.stop_strings", ()),
        ({"logprobs": True}, "sampling.logprobs", 0),
        ({"logprobs": True, "top_logprobs": 20}, "sampling.logprobs", 20),
        ({"logprobs": False}, "sampling.logprobs", None),
        # What stands for all tokens, and what is more than any vocabulary has.
        ({"top_k": -1}, "sampling.top_k", 0),
        ({"top_k": 1 << 40}, "sampling.top_k", HALF),
        # Seeds have 64 bits, priorities 32.
        ({"seed": -1}, "sampling.seed", (1 << 64) - 1),
        ({"seed": 0}, "sampling.seed", 0),
        ({"priority": 1 << 40}, "hints.priority", HALF),
        ({"priority": -(1 << 40)}, "hints.priority", -HALF - 1),
        # One name for a thing comes before another.
        ({"max_tokens": 3}, "limits.output_tokens_max", 3),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "limits.output_tokens_max", 4),
        ({"priority": 1, "nvext": {"agent_hints": {"priority": 0}}}, "hints.priority", 0),
        ({"priority": 1, "nvext": {"agent_hints": {}}}, "hints.priority", 1),
        ({"prompt_cache_key": "a", "nvext": {"agent_context": {"session_id": "b"}}}, "hints.session", "b"),
        ({"prompt_cache_key": ""}, "hints.session", None),
        ({"cache_salt": "a", "nvext": {"cache_salt": "b"}}, "hints.cache_salt", "b"),
        ({"service_tier": "priority"}, "hints.service_class", ServiceClass.INTERACTIVE),
        ({"service_tier": "cadence"}, "hints.service_class", ServiceClass.CADENCE),
        ({"service_tier": "auto"}, "hints.service_class", ServiceClass.STANDARD),
        ({"stream_options": {}}, "report.usage", False),
        ({"stream_options": {"include_usage": True, "continuous_usage_stats": True}}, "report.usage_each", True),
        # No usage at all is none with each event.
        ({"stream_options": {"continuous_usage_stats": True}}, "report.usage_each", False),
        ({"stream_options": {"include_obfuscation": True}}, "report.padded", True),
        ({"return_token_ids": True}, "report.token_ids", True),
        ({"return_tokens_as_token_ids": True}, "report.tokens_by_id", True),
        ({"skip_special_tokens": False}, "report.special_tokens", True),
        ({"include_stop_str_in_output": True}, "limits.includes_ends", True),
        ({"bad_words": ["a", "b"]}, "limits.forbidden_words", ["a", "b"]),
        ({"truncate_prompt_tokens": 7}, "limits.prompt_tokens_max", 7),
        ({"truncate_prompt_tokens": -1}, "limits.prompt_tokens_max", 0),
        ({"min_tokens": 3, "max_tokens": 3}, "sampling.output_tokens_min", 3),
        ({"prompt_logprobs": 3}, "sampling.prompt_logprobs", 3),
        ({"repetition_penalty": 1.25}, "sampling.repetition_penalty", 1.25),
        ({"allowed_token_ids": [7, 5]}, "sampling.allowed_token_ids", (7, 5)),
        ({"add_special_tokens": True}, "prompt.prefixed", True),
        ({"documents": [{"text": "a"}]}, "prompt.variables", {"documents": [{"text": "a"}]}),
        # A tool that may not be called is not shown.
        ({"tools": [NOW], "tool_choice": "none"}, "prompt.tools", None),
        ({"tools": []}, "prompt.tools", None),
        ({"tools": [NOW], "tool_choice": "auto"}, "prompt.tools", [NOW]),
        ({"tools": [NOW], "tool_choice": "required"}, "prompt.tool_use", ToolUse(forced=True)),
        ({"tools": [NOW], "tool_choice": NAMED}, "prompt.tool_use", ToolUse(forced=True, name="now")),
        ({"add_generation_prompt": False}, "prompt.opens_answer", False),
        ({"continue_final_message": True}, "prompt.continues", True),
        ({"continue_final_message": True}, "prompt.opens_answer", False),
        # null is as good as absent.
        ({"temperature": None, "n": None, "stop": None, "nvext": None}, "sampling.temperature", 1.0),
        # JSON does not tell 4.0 from 4.
        ({"max_tokens": 4.0}, "limits.output_tokens_max", 4),
        ({"stop_token_ids": [5.0, 6]}, "sampling.stop_token_ids", (5, 6)),
        ({"n": 2.0, "seed": 7.0}, "sampling.seed", 7),
        ({"temperature": 1}, "sampling.temperature", 1.0),
    ],
)
def test_what_a_field_asks_for(changes: dict[str, Any], where: str, expected: Any) -> None:
    assert attrgetter(where)(chat(**changes)) == expected


@pytest.mark.parametrize("name", ["max_tokens", "n", "seed", "top_k", "priority", "max_completion_tokens", "top_logprobs"])
@pytest.mark.parametrize("value", [4.5, "4", [4], {}, True])
def test_a_whole_number_is_one(name: str, value: Any) -> None:
    error = refusal(chat, **{name: value})
    assert (error.code, error.field) == ("invalid_type", name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("logprobs", 1),
        ("stream", "yes"),
        ("stop", 3),
        ("stop", [3]),
        ("stop_token_ids", [5.5]),
        ("stop_token_ids", 5),
        ("logit_bias", {"1": "x"}),
        ("messages", "Hi"),
        ("messages", [{"content": "Hi"}]),
        ("model", None),
        ("cache_salt", 3),
        ("tools", [3]),
        ("chat_template_kwargs", []),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: Any) -> None:
    error = refusal(chat, **{name: value})
    assert error.code == "invalid_type"
    assert error.field is not None
    assert error.field.startswith(name)
    assert error.field in error.message


@pytest.mark.parametrize(
    ("parse", "changes", "field"),
    [
        (chat, {"n": 0}, "n"),
        (chat, {"n": CHOICES_MAX + 1}, "n"),
        (chat, {"max_tokens": 0}, "max_tokens"),
        (chat, {"max_completion_tokens": 0}, "max_completion_tokens"),
        (chat, {"temperature": -0.1}, "temperature"),
        (chat, {"temperature": 101}, "temperature"),
        (chat, {"top_p": 0}, "top_p"),
        (chat, {"top_p": 1.1}, "top_p"),
        (chat, {"top_k": -2}, "top_k"),
        (chat, {"min_p": 1.1}, "min_p"),
        (chat, {"presence_penalty": 2.1}, "presence_penalty"),
        (chat, {"frequency_penalty": -2.1}, "frequency_penalty"),
        (chat, {"stop": ["x"] * (STOP_STRINGS_MAX + 1)}, "stop"),
        (chat, {"stop": ["x", ""]}, "stop"),
        (chat, {"top_logprobs": 1}, "top_logprobs"),
        (chat, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (chat, {"logit_bias": {"7": 101}}, "logit_bias"),
        (chat, {"logit_bias": {"seven": 1}}, "logit_bias"),
        (chat, {"logit_bias": {"-7": 1}}, "logit_bias"),
        (chat, {"logit_bias": {"": 1}}, "logit_bias"),
        (chat, {"logit_bias": {"٣": 1}}, "logit_bias"),
        # More digits than Python makes a number of.
        (chat, {"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        (chat, {"repetition_penalty": 0}, "repetition_penalty"),
        (chat, {"repetition_penalty": -1}, "repetition_penalty"),
        (chat, {"min_tokens": -1}, "min_tokens"),
        (chat, {"min_tokens": 4, "max_tokens": 3}, "min_tokens"),
        (completion, {"min_tokens": COMPLETION_TOKENS_DEFAULT + 1}, "min_tokens"),
        (chat, {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        (chat, {"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        (chat, {"allowed_token_ids": []}, "allowed_token_ids"),
        (chat, {"bad_words": ["a", ""]}, "bad_words"),
        (chat, {"bad_words": ["a"] * (BAD_WORDS_MAX + 1)}, "bad_words"),
        (chat, {"messages": []}, "messages"),
        (chat, {"messages": [USER] * (MESSAGES_MAX + 1)}, "messages"),
        (chat, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        (chat, {"tools": [NOW] * (TOOLS_MAX + 1)}, "tools"),
        (chat, {"tools": [NOW, {"function": {"name": ""}}]}, "tools[1].function.name"),
        (chat, {"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "then"}}}, "tool_choice"),
        (chat, {"continue_final_message": True, "messages": [{"role": "user"}]}, "continue_final_message"),
        (chat, {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        (completion, {"prompt": ""}, "prompt"),
        (completion, {"prompt": []}, "prompt"),
        (completion, {"prompt": ["one", ""]}, "prompt"),
        (completion, {"prompt": [[1], []]}, "prompt"),
        (completion, {"prompt": [1, "one"]}, "prompt"),
        (completion, {"prompt": ["x"] * (PROMPTS_MAX + 1)}, "prompt"),
        (completion, {"best_of": 2}, "best_of"),
        (completion, {"logprobs": 21}, "logprobs"),
        (completion, {"max_tokens": 0}, "max_tokens"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(parse: Any, changes: dict[str, Any], field: str) -> None:
    error = refusal(parse, **changes)
    assert (error.code, error.field) == ("invalid_value", field)
    assert error.message.startswith(f"{field}: ")


#: What asks for what happens anyway.
HARMLESS: list[dict[str, Any]] = [
    {"parallel_tool_calls": True},
    {"modalities": ["text"]},
    {"repetition_penalty": 1.0},
    {"length_penalty": 1},
    {"use_beam_search": False},
    {"min_tokens": 0},
    {"bad_words": []},
    {"include_stop_str_in_output": False},
    {"skip_special_tokens": True},
    {"spaces_between_special_tokens": True},
    {"echo": False},
    {"suffix": ""},
]


@pytest.mark.parametrize("parse", [chat, completion])
@pytest.mark.parametrize("name", Unserved.__struct_fields__)
def test_a_known_field_that_is_not_served_is_refused_unless_it_asks_for_nothing(parse: Any, name: str) -> None:
    assert refusal(parse, **{name: {"a": 1}}).field == name
    assert parse(**{name: None}) == parse()


@pytest.mark.parametrize("changes", HARMLESS, ids=lambda changes: next(iter(changes)))
def test_what_asks_for_what_happens_anyway_asks_for_nothing(changes: dict[str, Any]) -> None:
    assert (chat(**changes), completion(**changes)) == (chat(), completion())


@pytest.mark.parametrize(("asked", "prefixed"), [(None, True), (True, True), (False, False)])
def test_a_plain_prompt_has_the_models_first_tokens_unless_it_is_to_have_none(asked: bool | None, prefixed: bool) -> None:
    prompt = completion(add_special_tokens=asked).prompt
    assert isinstance(prompt, Texts)
    assert prompt.prefixed == prefixed


def test_what_nobody_knows_is_ignored() -> None:
    assert chat(store=True, metadata={"a": [None]}, user=7, safety_identifier="s", nobody_knows=[[1.5]]) == chat()


# --- messages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
        ({"role": "user"}, {"role": "user", "content": ""}),
        ({"role": "user", "content": "x", "name": "Ann"}, {"role": "user", "content": "x", "name": "Ann"}),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]},
            {"role": "user", "content": "abc"},
        ),
        (
            {
                "role": "assistant",
                "content": [{"type": "thinking"}, {"type": "refusal", "refusal": "no"}, {"type": "output_text"}],
            },
            {"role": "assistant", "content": "no"},
        ),
        (
            {"role": "tool", "tool_call_id": "a", "content": "x", "cache_control": {"type": "ephemeral"}},
            {"role": "tool", "content": "x", "tool_call_id": "a"},
        ),
        (
            {"role": "assistant", "content": "x", "reasoning": "so", "reasoning_content": "thus"},
            {"role": "assistant", "content": "x", "reasoning_content": "thus", "thinking": "thus"},
        ),
        # OpenAI's Responses send an object under this name.
        ({"role": "assistant", "content": "x", "reasoning": {"effort": "low"}}, {"role": "assistant", "content": "x"}),
        # Claude Code's first line differs from turn to turn.
        (
            {"role": "system", "content": "x-anthropic-billing-header: nonce=1\nBe kind."},
            {"role": "system", "content": "Be kind."},
        ),
        (
            {"role": "user", "content": "x-anthropic-billing-header: mine"},
            {"role": "user", "content": "x-anthropic-billing-header: mine"},
        ),
    ],
)
def test_messages_are_shown_as_templates_read_them(message: dict[str, Any], expected: dict[str, Any]) -> None:
    assert shown(**message) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [('{"a": 1}', {"a": 1}), ({"a": 1}, {"a": 1}), ("", {}), (None, {}), ("[1]", [1]), ("no JSON {", "no JSON {")],
)
def test_arguments_of_earlier_calls_are_read(arguments: Any, expected: Any) -> None:
    call = {"id": "c", "function": {"name": "now", "arguments": arguments}}
    function = {"name": "now", "arguments": expected}
    [found] = shown(role="assistant", content=None, tool_calls=[call])["tool_calls"]
    assert found == {"id": "c", "type": "function", "function": function}


# --- bodies that are none -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parse", [parse_chat, parse_completion])
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe", b'{"model": "\xff"}', b"[" * 100_000, b'{"model": "m"} {}', b"nothing"],
    ids=["empty", "open", "no UTF-8", "no UTF-8 within", "deep", "two", "words"],
)
def test_a_body_that_is_no_json_is_refused(parse: Any, body: bytes) -> None:
    with pytest.raises(Invalid) as caught:
        parse(body)
    assert (caught.value.code, caught.value.field) == ("invalid_json", None)


@pytest.mark.parametrize("body", [b"[]", b"3", b"null", b'"text"'])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(Invalid) as caught:
        parse_chat(body)
    assert caught.value.code == "invalid_type"


def test_a_byte_order_mark_is_read_over() -> None:
    body = json.dumps({"model": "m", "messages": [USER]}).encode()
    assert parse_chat(b"\xef\xbb\xbf" + body) == parse_chat(body)


@pytest.mark.parametrize(
    ("fields", "thinking"),
    [
        ({}, Thinking()),
        ({"reasoning_effort": "none"}, Thinking(effort=Effort.NONE)),
        ({"reasoning_effort": "xhigh", "enable_thinking": True}, Thinking(True, Effort.XHIGH, field="enable_thinking")),
        ({"enable_thinking": False}, Thinking(False, field="enable_thinking")),
        ({"thinking": {"type": "disabled"}}, Thinking(False, field="thinking.type")),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, Thinking(True, None, 5, "thinking.type")),
        ({"thinking": {"type": "auto"}}, Thinking()),
        ({"reasoning": {"effort": "low", "max_tokens": 7}}, Thinking(None, Effort.LOW, 7, "reasoning.effort")),
        ({"thinking_token_budget": 0}, Thinking(budget_tokens=0, budget_field="thinking_token_budget")),
        ({"thinking_token_budget": -1, "thinking_budget": 9}, Thinking(budget_tokens=9)),
        ({"reasoning": {"enabled": False}, "enable_thinking": False}, Thinking(False, field="enable_thinking")),
    ],
)
def test_how_much_to_think_is_read_in_every_form(fields: dict[str, Any], thinking: Thinking) -> None:
    assert conversation(**fields).thinking == thinking


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"reasoning_effort": "none", "enable_thinking": True}, "enable_thinking"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort"),
        ({"reasoning": {"enabled": False}, "enable_thinking": True}, "reasoning.enabled"),
        ({"reasoning": {"effort": "low"}, "reasoning_effort": "high"}, "reasoning.effort"),
        ({"thinking_token_budget": -2}, "thinking_token_budget"),
        ({"thinking_token_budget": 5, "reasoning": {"max_tokens": 6}}, "reasoning.max_tokens"),
        ({"thinking_budget": -1}, "thinking_budget"),
        ({"thinking": {"type": "on"}}, "thinking.type"),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "none"}, "thinking.type"),
    ],
)
def test_words_for_thinking_that_mean_nothing_or_two_things_are_refused(fields: dict[str, Any], param: str) -> None:
    assert refusal(chat, **fields).field == param


def test_thoughts_are_left_out_in_either_form() -> None:
    said = ({}, {"reasoning": {"exclude": True}}, {"include_reasoning": False})
    assert [chat(**fields).report.thoughts for fields in said] == [True, False, False]


def test_a_tool_that_takes_a_text_is_refused_and_where_it_is_served_is_told() -> None:
    error = refusal(chat, tools=[{"type": "custom", "custom": {"name": "apply_patch"}}])
    assert error.field == "tools[0]"
    assert "/v1/responses" in str(error)
