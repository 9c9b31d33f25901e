"""A template is told how much to think in its own words, and nothing that it does not read."""

from typing import Any

import pytest

from orchestrator.live.asked import Effort, Thinking
from orchestrator.live.text.templates import ChatTemplate
from orchestrator.live.text.thinking import thinking_variables

#: How the templates of each family use what they are told.
QWEN = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>{% endif %}"
DEEPSEEK = "{% if thinking is not defined %}{% set thinking = false %}{% endif %}{{ '<think>' if thinking else '</think>' }}"
GPT_OSS = """{% macro system() %}{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}
Reasoning: {{ reasoning_effort }}{% endmacro %}{{ system() }}<|channel|>"""
WORDS = "{{ reasoning_effort }}"
SEED = "{{ thinking_budget }}"
#: Its variable is its own, and a message's thoughts are no switch.
OTHER = "{% set reasoning_effort = 'all' %}{{ reasoning_effort }}{{ messages[0].thinking }}"
OFF, LOW, MOST = Thinking(effort=Effort.NONE), Thinking(effort=Effort.LOW), Thinking(effort=Effort.MAX)


@pytest.mark.parametrize(
    ("thinking", "source", "told"),
    [
        (Thinking(), QWEN, {}),
        (OFF, QWEN, {"enable_thinking": False}),
        (Thinking(False), QWEN, {"enable_thinking": False}),
        (Thinking(False, Effort.LOW), QWEN, {"enable_thinking": False}),
        (LOW, QWEN, {"enable_thinking": True}),
        (Thinking(True), DEEPSEEK, {"thinking": True}),
        (LOW, DEEPSEEK, {"thinking": True}),
        (OFF, DEEPSEEK, {"thinking": False}),
        (Thinking(), GPT_OSS, {}),
        (OFF, GPT_OSS, {"reasoning_effort": "low"}),
        (LOW, GPT_OSS, {"reasoning_effort": "low"}),
        (MOST, GPT_OSS, {"reasoning_effort": "high"}),
        (OFF, WORDS, {"reasoning_effort": "none"}),
        (MOST, WORDS, {"reasoning_effort": "max"}),
        (Thinking(True), WORDS, {}),
        (Thinking(budget_tokens=512), SEED, {"thinking_budget": 512}),
        (Thinking(True, Effort.HIGH, 512), OTHER, {}),
    ],
)
def test_templates_are_told_what_they_read(thinking: Thinking, source: str, told: dict[str, Any]) -> None:
    assert thinking_variables(thinking, ChatTemplate({"default": source}, {})) == told


def test_on_and_off_at_once_is_nothing() -> None:
    with pytest.raises(ValueError, match="switched on"):
        Thinking(True, Effort.NONE)
