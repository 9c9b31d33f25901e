"""Chat templates render to exactly what `transformers` renders, tools and odd features included."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from orchestrator.live.text import templates
from orchestrator.live.text.templates import ChatTemplate, TemplateFailed, load_template
from orchestrator.profiles.fields import Fields, read_fields
from workers.engines.vocabulary import CHAT_TEMPLATE, write_json, write_tokenizer

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "<b>Météo</b> & 'more'",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Zürich", "n": [1, 2.5, None, True]}},
}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be <brief> & 'kind'."}, {"role": "user", "content": "日本\n\n  語 {{ no }}"}],
    [
        {"role": "system", "content": "You help."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": '{"t": 12}', "tool_call_id": "c1"},
        {"role": "assistant", "content": "12 degrees", "reasoning_content": "it said so"},
        {"role": "user", "content": "Thanks"},
    ],
]
#: What real templates use: namespaces, loop controls, slices, generation blocks, tests, filters, special tokens.
FEATURES = """{{- bos_token }}
{%- set ns = namespace(count=0, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and loop.index0 < 3 %}
        {%- set ns.last = loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{% for message in messages if message['role'] != 'tool' %}
    {%- set thought = message.reasoning_content %}
    {%- if thought is defined and thought is string %}<think>{{ thought }}</think>{% endif %}
    {%- if 'tool_calls' in message and message.get('tool_calls') %}
        {%- for call in message.tool_calls %}[{{ call.function.name }}: {{ call.function.arguments | tojson(indent=2) }}]
        {%- continue %}never{% endfor %}
    {%- endif %}
    {%- generation %}
    {{ message.role | upper }}: {{ message.content | trim }}{{ eos_token }}
    {% endgeneration %}
    {%- set ns.count = ns.count + 1 %}
{% endfor %}
{{ ns.count }} {{ ns.last }} {{ messages[0].items() | list | length }} {{ missing is defined }}
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- if add_generation_prompt %}<go>{% endif %}
"""
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, FEATURES], ids=["chatml", "features"])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["plain", "system", "tools"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["alone", "with tools"])
@pytest.mark.parametrize("open_answer", [True, False])
def test_the_text_is_that_of_transformers(source: str, messages: list[dict[str, Any]], tools: Any, open_answer: bool) -> None:
    expected, _ = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=source,
        add_generation_prompt=open_answer,
        return_assistant_tokens_mask=False,
        **SPECIAL,
    )
    assert ChatTemplate({"default": source}, SPECIAL).render(messages, tools, None, open_answer) == expected[0]


def test_a_checkpoint_folder_renders_and_tokenises_as_in_transformers(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, 600, 4096)
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = load_template(tmp_path, read_fields(tmp_path / "tokenizer_config.json"))
    for messages in CONVERSATIONS:
        expected = theirs.apply_chat_template(messages, tools=TOOLS, add_generation_prompt=True, tokenize=False)
        assert ours.render(messages, TOOLS) == expected
        ids = theirs.apply_chat_template(messages, tools=TOOLS, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert tokenizer.encode(expected, add_special_tokens=False).ids == ids


def test_templates_are_found_where_checkpoints_keep_them(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    several = load_template(tmp_path, Fields(tmp_path, {"chat_template": named}))
    assert several.render([], None) == "plain"
    assert several.render([], TOOLS) == "tools"
    (tmp_path / "chat_template.jinja").write_text("from the file {{ bos_token }}{{ cls_token }}")
    tokens = {"bos_token": {"content": "<s>"}, "cls_token": None}
    assert (
        load_template(tmp_path, Fields(tmp_path, {"chat_template": "overridden", **tokens})).render([], None)
        == "from the file <s>"
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages[0].nothing.more }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
    ],
)
def test_a_template_that_refuses_or_breaks_out_fails_cleanly(source: str) -> None:
    with pytest.raises(TemplateFailed, match="cannot render"):
        ChatTemplate({"default": source}, {}).render([{"role": "user"}], None)


def test_a_missing_or_broken_template_is_named() -> None:
    with pytest.raises(TemplateFailed, match="no default chat template"):
        ChatTemplate({}, {}).render([], None)
    with pytest.raises(TemplateFailed, match="line 2"):
        ChatTemplate({"default": "ok\n{% if %}"}, {})


def test_extra_variables_reach_the_template_and_cannot_replace_the_messages() -> None:
    template = ChatTemplate({"default": "{{ enable_thinking }} {{ messages | length }}"}, {})
    assert template.render([], None, {"enable_thinking": False, "messages": [1, 2]}) == "False 0"


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, FEATURES, "{% for m in messages %}[{{ m.content }}]{% endfor %}"])
@pytest.mark.parametrize("content", ["one two", " one two  ", "one\n\n", "", "1"])
@pytest.mark.parametrize("role", ["assistant", "user"])
def test_a_continued_message_ends_where_transformers_ends_it(source: str, content: str, role: str) -> None:
    messages = [{"role": "user", "content": "Count one two"}, {"role": role, "content": content}]
    expected, _ = render_jinja_template(
        [messages],
        chat_template=source,
        add_generation_prompt=False,
        continue_final_message=True,
        return_assistant_tokens_mask=False,
        **SPECIAL,
    )
    text = ChatTemplate({"default": source}, SPECIAL).render(messages, None, continue_final=True)
    assert text == expected[0]
    assert "CONTINUE" not in text


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (CHAT_TEMPLATE, []),
        (CHAT_TEMPLATE, [{"role": "assistant", "content": None}]),
        ("{% for m in messages[:-1] %}{{ m.content }}{% endfor %}", [{"role": "assistant", "content": "gone"}]),
        ("{{ messages[-1].content | upper }}", [{"role": "assistant", "content": "changed"}]),
    ],
)
def test_what_cannot_be_continued_is_said(source: str, messages: list[dict[str, Any]]) -> None:
    with pytest.raises(TemplateFailed, match="continue"):
        ChatTemplate({"default": source}, {}).render(messages, None, continue_final=True)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in messages * 1000000 %}{% for b in messages * 1000000 %}{% endfor %}{% endfor %}",
        "{% for a in range(n) %}{% endfor %}",
        "{{ 'x' * n }}",
        "{{ n * 'x' }}",
        "{{ 10 ** n }}",
        "{{ 1 / (n - n) }}",
        "{% macro again(x) %}{{ again(x) }}{% endmacro %}{{ again(1) }}",
        "{% macro f(x) %}{% if x %}{{ f(x - 1) }}{{ f(x - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in range(49999) %}{{ long }}{% endfor %}",
        "{% for a in messages | map(attribute='role') %}{% for b in range(n) %}{% endfor %}{% endfor %}",
        "{% for a in range(999) | map('string') %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    ],
)
def test_an_endless_or_huge_template_stops(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "ROUNDS_MAX", 100_000)
    extra = {"n": 10**9, "long": "x" * 2000}
    with pytest.raises(TemplateFailed, match="cannot render"):
        ChatTemplate({"default": source}, {}).render([{"role": "user"}], None, extra)


def test_text_after_much_that_is_empty_is_not_lost() -> None:
    template = ChatTemplate({"default": "{% for m in range(9000) %}{{ none_of_it }}{% endfor %}end"}, {})
    assert template.render([], None, {"none_of_it": ""}) == "end"


def test_long_conversations_are_within_the_bounds() -> None:
    messages = [{"role": "user", "content": "x"}] * 20_000
    assert (
        ChatTemplate({"default": "{% for m in messages %}{{ m.content }}{% endfor %}"}, {}).render(messages, None) == "x" * 20_000
    )
