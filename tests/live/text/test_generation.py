"""Why an answer ended, and what is then said of calls that it was writing."""

import json
from collections.abc import Sequence

import pytest

from orchestrator.core.types import FinishReason
from orchestrator.live.text.generation import AnswerEnd, Generation
from orchestrator.live.text.styles import ToolStyle, make_parser
from orchestrator.live.text.tools import calls_in
from orchestrator.live.turns import Delta

WHOLE = '<tool_call>{"name": "f", "arguments": {"x": "ab"}}</tool_call>'


class Characters:
    """Tokens are characters."""

    kept_chars = 0

    def add(self, token: int) -> str:
        return chr(token)

    def finish(self) -> str:
        return ""


def end_of(text: str, finish: FinishReason, stops: Sequence[str] = ()) -> tuple[AnswerEnd | None, str | None, list[str]]:
    """Return why an answer ended, what its model waits for, and the arguments of its calls."""
    generation = Generation(Characters(), stops, frozenset(), make_parser(ToolStyle.HERMES, {"f": {}}), scored=False)
    pieces = generation.take(Delta([*map(ord, text)], [], finish))
    return generation.finish_reason, generation.wanted, [call.arguments for call in calls_in(pieces)]


@pytest.mark.parametrize("text", [WHOLE, WHOLE[:-20], WHOLE[: WHOLE.index("b")], WHOLE[: WHOLE.index("ab") - 1]])
def test_where_the_model_ended_it_arguments_are_json(text: str) -> None:
    end, wanted, [arguments] = end_of(text, FinishReason.STOP)
    assert (end, wanted) == (AnswerEnd.TOOL_CALLS, "f")
    assert isinstance(json.loads(arguments), dict)


def test_where_there_are_no_more_tokens_they_are_as_far_as_they_came() -> None:
    assert end_of(WHOLE[: WHOLE.index("b")], FinishReason.LENGTH) == (AnswerEnd.LENGTH, None, ['{"x": "a'])
    assert end_of(WHOLE, FinishReason.LENGTH) == (AnswerEnd.LENGTH, None, ['{"x": "ab"}'])


def test_a_stop_string_ends_an_answer_that_calls_only_if_the_call_is_whole() -> None:
    assert end_of(WHOLE, FinishReason.STOP, ["b"]) == (AnswerEnd.STOP, None, ['{"x": "a'])
    assert end_of(WHOLE, FinishReason.STOP, ["</tool_call>"]) == (AnswerEnd.TOOL_CALLS, None, ['{"x": "ab"}'])
