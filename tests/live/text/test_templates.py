"""Chat templates render to exactly what `transformers` renders, tools and odd features included."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from orchestrator.live.text.files import Fields, read_fields
from orchestrator.live.text.templates import ChatTemplate, TemplateFailed, load_template
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
