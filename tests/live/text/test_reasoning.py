"""Thoughts are told from answers however the text is cut; what is none stays text."""

import random

import pytest

from orchestrator.live.text.reasoning import Reasoning, ReasoningStyle, ThinkParser, reasoning_style_of
from orchestrator.live.text.styles import ToolStyle, make_parser
from orchestrator.live.text.tools import ToolCall, ToolParser

CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'


def parse(text: str, seed: int, opened: bool = False, tools: bool = True) -> tuple[str, str, list[str]]:
    """Return the thoughts, the answer and the names of calls."""
    source = random.Random(seed)

    def make() -> ToolParser | None:
        return make_parser(ToolStyle.HERMES, {"f": {}})

    parser = ThinkParser(opened, make(), True, ToolStyle.HERMES.openings, make) if tools else ThinkParser(opened, None)
    parts: list[str | ToolCall | Reasoning] = []
    while text:
        count = source.randint(1, 7)
        parts += parser.add(text[:count])
        text = text[count:]
    parts += parser.finish()
    assert all(parts), "nothing empty comes out"
    return (
        "".join(part.text for part in parts if isinstance(part, Reasoning)),
        "".join(part for part in parts if isinstance(part, str)),
        [part.name for part in parts if isinstance(part, ToolCall)],
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<think>why</think>because", ("why", "because", [])),
        ("\n<think>\nwhy \n so\n</think>\n\nbecause\n", ("why \n so", "because\n", [])),
        (f"<think>I could write {CALL} here</think>The answer", (f"I could write {CALL} here", "The answer", [])),
        (f"<think>now</think>\n{CALL}", ("now", "", ["f"])),
        ("<think>\n\n</think>\n\nplain", ("", "plain", [])),
        ("<think>never ends, 1 < 2 </thin", ("never ends, 1 < 2 </thin", "", [])),
        ("no thoughts, <think>not</think> here", ("", "no thoughts, <think>not</think> here", [])),
        ("<thinking>other</thinking>", ("", "<thinking>other</thinking>", [])),
        ("<thi", ("", "<thi", [])),
        ("<think>", ("", "", [])),
        (f"  {CALL}", ("", "", ["f"])),
        ("a</think>b", ("", "a</think>b", [])),
    ],
)
def test_an_answer_that_begins_its_own_thoughts(text: str, found: tuple[str, str, list[str]], seed: int) -> None:
    assert parse(text, seed) == found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("why</think>because", ("why", "because", [])),
        ("\nwhy\n</think>\n" + CALL, ("why", "", ["f"])),
        ("</think>because", ("", "because", [])),
        ("cut off", ("cut off", "", [])),
        ("\n<think>\nwhy</think>because", ("why", "because", [])),
        ("<thin", ("<thin", "", [])),
        ("a <think> b</think>c", ("a <think> b", "c", [])),
    ],
)
def test_an_answer_whose_prompt_began_its_thoughts(text: str, found: tuple[str, str, list[str]], seed: int) -> None:
    assert parse(text, seed, opened=True) == found


def test_without_tools_the_answer_is_text_throughout() -> None:
    assert parse(f"<think>why</think>{CALL}", 0, tools=False) == ("why", CALL, [])


def test_thoughts_begin_where_the_prompt_or_the_answer_says_so() -> None:
    assert [reasoning_style_of(name, "") for name in ("auto", "think", "qwen3")] == [ReasoningStyle.THINK] * 3
    assert reasoning_style_of("none", "<|channel|>") is ReasoningStyle.NONE
    assert [reasoning_style_of(name, "<|channel|>") for name in ("auto", "openai_gptoss")] == [ReasoningStyle.HARMONY] * 2
    assert ReasoningStyle.THINK.opened_by("<|im_start|>assistant\n<think>\n")
    assert not ReasoningStyle.THINK.opened_by("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not ReasoningStyle.NONE.opened_by("<think>")
    assert ReasoningStyle.THINK.opened_by("...", "<think>so far")
    assert not ReasoningStyle.THINK.opened_by("<think>", "<think>so far</think> it")
    assert not ReasoningStyle.NONE.opened_by("...", "<think>so far")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("text", "thoughts", "answer", "calls"),
    [
        (f"<think>so I ask.\n{CALL}", "so I ask.", "", ["f"]),
        (f"<think>so I ask.\n{CALL}\n{CALL}\n", "so I ask.", "", ["f", "f"]),
        (f"<think>so I ask.\n{CALL[:-13]}", "so I ask.", "", ["f"]),
        # What goes on, or is no call, is thought.
        (f"<think>{CALL} is one\n{CALL}", f"{CALL} is one", "", ["f"]),
        (f"<think>{CALL}</think>\n\nYes", CALL, "Yes", []),
        ("<think>with <tool_call> one calls</think>\n\nYes", "with <tool_call> one calls", "Yes", []),
        ('<think>with \n<tool_call>{"name": "</think>Yes', 'with \n<tool_call>{"name": "', "Yes", []),
        ('<think><tool_call>{"na', '<tool_call>{"na', "", []),
        (f"<think>{'<tool_call> ' * 9}{CALL}", f"{'<tool_call> ' * 9}{CALL}", "", []),
        (f"<think><tool_call>no</tool_call> {CALL}", "<tool_call>no</tool_call>", "", ["f"]),
    ],
)
def test_calls_that_an_answer_ends_with_are_called_though_it_ends_in_thoughts(
    text: str, thoughts: str, answer: str, calls: list[str], seed: int
) -> None:
    assert parse(text, seed) == (thoughts, answer, calls)
