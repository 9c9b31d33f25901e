"""Tells a chat template how much its model is to think: each has its own words for that, or none.

enable_thinking    a switch: Qwen3, GLM-4.5 and most others          thinking           a switch: DeepSeek-V3.1, Granite
reasoning_effort   gpt-oss (low, medium, high) and others            thinking_budget    tokens: Seed-OSS
"""

from typing import Any

from orchestrator.live.asked import THINKS_AS_EVER, Effort, Thinking
from orchestrator.live.text.reasoning import CHANNEL
from orchestrator.live.text.templates import ChatTemplate

_SWITCHES = ("enable_thinking", "thinking")
_EFFORT, _BUDGET = "reasoning_effort", "thinking_budget"
#: Models whose answers have channels, gpt-oss, know three efforts and always think.
_NEAREST = {Effort.NONE: Effort.LOW, Effort.MINIMAL: Effort.LOW, Effort.XHIGH: Effort.HIGH, Effort.MAX: Effort.HIGH}


def thinking_variables(thinking: Thinking, template: ChatTemplate) -> dict[str, Any]:
    """Return the variables that a template reads of those that say how much to think."""
    told: dict[str, Any] = {}
    if thinking == THINKS_AS_EVER:
        return told
    if thinking.unwanted or thinking.wanted:
        told |= dict.fromkeys(_SWITCHES, thinking.wanted)
    effort = Effort.NONE if thinking.unwanted else thinking.effort
    if effort is not None:
        told[_EFFORT] = str(_NEAREST.get(effort, effort) if template.shows(CHANNEL) else effort)
    if thinking.budget_tokens is not None:
        told[_BUDGET] = thinking.budget_tokens
    return {name: value for name, value in told.items() if name in template.variables}
