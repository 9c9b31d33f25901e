"""What becomes of thoughts and calls of earlier turns is what their family's template does with them."""

from collections.abc import Sequence
from typing import Any

import pytest

from orchestrator.live.text.conversations import shown_call, shown_message
from orchestrator.live.text.splitting import one_by_one
from orchestrator.live.text.templates import ChatTemplate

#: Small templates that treat earlier turns as those of each family do.
QWEN3 = """{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}<{{ m.role }}>
    {%- if m.reasoning_content and loop.index0 > ns.last %}<think>{{ m.reasoning_content }}</think>{% endif %}
    {{- m.content }}
    {%- for call in m.tool_calls or [] %}{% set f = call.function %}
        {{- '<tool_call>{"name": "' + f.name + '", "arguments": ' }}{{ f.arguments | tojson }}{{ '}</tool_call>' }}
    {%- endfor %}
{%- endfor %}"""
QWEN3_CODER = """{%- for m in messages %}<{{ m.role }}>{{ m.content }}
    {%- for call in m.tool_calls or [] %}<function={{ call.function.name }}>
        {%- for name, value in call.function.arguments | items %}<parameter={{ name }}>
            {{- value if value is string else value | tojson }}</parameter>
        {%- endfor %}</function>
    {%- endfor %}
{%- endfor %}"""
DEEPSEEK = """{%- for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}
    {%- for call in m.tool_calls or [] %}
        {{- '<call>' + call.function.name + '<sep>' + call.function.arguments + '<end>' }}
    {%- endfor %}
{%- endfor %}"""
GPT_OSS = """{%- set ns = namespace(call='') %}
{%- for m in messages %}
    {%- if m.tool_calls %}
        {%- if m.content and m.thinking %}{{ raise_exception('one of both') }}{% endif %}
        {%- if m.thinking or m.content %}<|channel|>analysis<|message|>{{ m.thinking or m.content }}<|end|>{% endif %}
        {%- set ns.call = m.tool_calls[0].function.name %}
        {{- '<|channel|>commentary to=functions.' + ns.call + '<|message|>' }}
        {{- m.tool_calls[0].function.arguments | tojson }}<|call|>
    {%- elif m.role == 'tool' %}
        {%- if not ns.call %}{{ raise_exception('no call') }}{% endif %}<functions.{{ ns.call }}>{{ m.content }}
    {%- else %}<{{ m.role }}>{{ m.content }}{% endif %}
{%- endfor %}"""

WRITTEN = '{"a":1,  "b": "é\\u00e9"}'
CALL = shown_call("f", WRITTEN, "1", "function")
MEANT = '{"a": 1, "b": "éé"}'
CALLED = f'<tool_call>{{"name": "f", "arguments": {MEANT}}}</tool_call>'
ANALYSIS, COMMENTARY = "<|channel|>analysis<|message|>", "<|end|><|channel|>commentary to=functions."
OTHER = shown_call("g", {"x": 2}, "2", "function")
USER, FIRST, SECOND = (
    shown_message("user", "?"),
    shown_message("tool", "one", tool_call_id="1"),
    shown_message("tool", "two", tool_call_id="2"),
)
THOUGHT = shown_message("assistant", "Well.", tool_calls=[CALL], thoughts="Hm.")
BOTH = shown_message("assistant", "", tool_calls=[CALL, OTHER], thoughts="Hm.")


def rendered(source: str, messages: Sequence[Any]) -> str:
    return ChatTemplate({"default": source}, {}).render(messages, None)


@pytest.mark.parametrize(
    ("source", "messages", "text"),
    [
        # Thoughts are kept within a turn's tool calls, and dropped once the user has asked again.
        (
            QWEN3,
            [USER, THOUGHT],
            "<user>?<assistant><think>Hm.</think>Well." + CALLED,
        ),
        (QWEN3, [THOUGHT, USER], f"<assistant>Well.{CALLED}<user>?"),
        (QWEN3_CODER, [THOUGHT], "<assistant>Well.<function=f><parameter=a>1</parameter><parameter=b>éé</parameter></function>"),
        # A template that takes arguments for a text shows it as it was written.
        (DEEPSEEK, [THOUGHT], f"<assistant>Well.<call>f<sep>{WRITTEN}<end>"),
        (DEEPSEEK, [BOTH], f'<assistant><call>f<sep>{WRITTEN}<end><call>g<sep>{{"x": 2}}<end>'),
        (DEEPSEEK, [shown_message("assistant", "<think>Hm.</think>Well.")], "<assistant>Well."),
    ],
)
def test_templates_are_given_earlier_turns_in_a_form_that_they_know(source: str, messages: Sequence[Any], text: str) -> None:
    assert rendered(source, messages) == text


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (
            [USER, THOUGHT, FIRST],
            f"<user>?{ANALYSIS}Hm.\n\nWell.{COMMENTARY}f<|message|>{MEANT}<|call|><functions.f>one",
        ),
        (
            [BOTH, SECOND, FIRST, USER],
            f"{ANALYSIS}Hm.{COMMENTARY}f<|message|>{MEANT}<|call|><functions.f>one"
            '<|channel|>commentary to=functions.g<|message|>{"x": 2}<|call|><functions.g>two<user>?',
        ),
        ([shown_message("assistant", "Well.", thoughts="Hm."), USER], "<assistant>Well.<user>?"),
    ],
)
def test_templates_with_channels_are_shown_one_call_after_another(messages: Sequence[Any], text: str) -> None:
    assert rendered(GPT_OSS, messages) == text


def test_results_of_no_call_are_not_lost() -> None:
    stray = shown_message("tool", "three", tool_call_id="3")
    assert one_by_one([BOTH, stray, USER])[-2:] == [stray, USER]
    assert one_by_one([stray, USER, THOUGHT | {"content": ""}]) == [stray, USER, THOUGHT | {"content": ""}]
