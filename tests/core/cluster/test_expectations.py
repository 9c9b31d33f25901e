"""What gateways expect of sessions: which context a prompt goes on with, what is learned of pauses, and who has to hear what."""

import sys

import pytest

from orchestrator.core.cluster.contexts import CONTEXTS_MAX, Context, course_of
from orchestrator.core.cluster.expectations import CLASSES_MAX, Expectations, Line
from orchestrator.core.outlook import ContextId, Outlook
from orchestrator.core.types import NodeId, RequestId
from tests.builders import prompt_hashes

A, B = NodeId("a"), NodeId("b")


def turn(expectations: Expectations, line: Line, request: int, prompt: str, now: float, *nodes: NodeId) -> list[NodeId]:
    """Let a turn run for a second; return which nodes had to hear something as it began."""
    context, told = expectations.started(line, RequestId(request), prompt_hashes(prompt), nodes or (A,), False, now)
    expectations.paused(context, now + 1.0)
    return [node for node, _ in told]


def test_a_prompt_goes_on_with_the_context_that_it_extends_and_may_come_back_to_one_that_was_left() -> None:
    contexts: list[Context] = []

    def course(number: int, prompt: str) -> tuple[int, int | None]:
        found = course_of(contexts, ContextId(number), prompt_hashes(prompt))
        found.context.marks = found.context.marks.of(prompt_hashes(prompt))
        return found.context.id, found.left.id if found.left is not None else None

    assert course(1, "abcdef") == (1, None)
    assert course(2, "abcdefgh") == (1, None)
    assert course(3, "abcxyz") == (3, 1)  # another way from c on
    assert course(4, "abcdefghi") == (1, None)  # back
    assert course(5, "abcxyzz") == (3, None)
    assert course(6, "qrs") == (6, None)  # shares nothing: it leaves nothing
    assert course(7, "abcxyzw") == (3, None)  # only the end is another


def test_few_contexts_of_a_session_are_followed() -> None:
    contexts: list[Context] = []
    for number in range(3 * CONTEXTS_MAX):
        course = course_of(contexts, ContextId(number), prompt_hashes(chr(97 + number) * 4))
        course.context.marks = course.context.marks.of(prompt_hashes(chr(97 + number) * 4))
    assert [context.id for context in contexts] == list(range(2 * CONTEXTS_MAX, 3 * CONTEXTS_MAX))


def test_nodes_that_have_a_session_no_longer_and_holders_of_what_it_left_hear_so() -> None:
    expectations, line = Expectations(), Line()
    assert turn(expectations, line, 1, "abcd", 0.0, A) == []
    assert turn(expectations, line, 2, "abcdef", 5.0, B) == [A]
    _, told = expectations.started(line, RequestId(3), prompt_hashes("abxyz"), (A,), False, 9.0)
    (node, outlook) = told[0]
    assert (node, outlook.context) == (B, 1)
    other = expectations.outlook(Context(ContextId(9)), RequestId(9))
    assert other is not None
    assert 0.0 < outlook.chances[-1] < other.chances[-1]  # few come back


def test_a_tool_s_time_is_told_when_its_turn_is_over_or_at_once() -> None:
    expectations, line = Expectations(), Line()
    context, _ = expectations.started(line, RequestId(1), prompt_hashes("ab"), (A,), False, 0.0)
    assert expectations.tool_started(line, "bash", 40.0, 1.0) == []  # the turn still runs
    [(node, outlook)] = expectations.paused(context, 2.0)
    assert (node, outlook.context) == (A, 1)
    assert outlook.chance(30.0) == 0.0
    assert outlook.chance(44.0) > 0.8
    [(_, sooner)] = expectations.tool_started(line, "bash", 1.0, 3.0)
    assert sooner.per_second(0.0) > outlook.per_second(0.0)


def test_tools_are_learned_by_class() -> None:
    expectations = Expectations()
    for number in range(200):
        for tool, pause_s in (("fast", 0.4), ("slow", 100.0)):
            line = Line()
            at = number * 300.0
            turn(expectations, line, 2 * number, "ab", at)
            expectations.tool_started(line, tool, None, at + 1.0)
            turn(expectations, line, 2 * number + 1, "abc", at + 1.0 + pause_s)
    told = {}
    for tool in ("fast", "slow"):
        line = Line()
        turn(expectations, line, 1000, "ab", 1e6)
        [(_, told[tool])] = expectations.tool_started(line, tool, None, 1e6 + 1.0)
    assert told["fast"].chance(0.5) > 0.8
    assert told["slow"].chance(0.5) < 0.2
    assert told["slow"].chance(128.0) > 0.8


def test_what_models_wait_for_is_learned_by_class() -> None:
    expectations = Expectations()
    for number in range(200):
        line, at = Line(), number * 300.0
        turn(expectations, line, 2 * number, "ab", at)
        expectations.answered(line, RequestId(2 * number), "read", at + 1.0)
        turn(expectations, line, 2 * number + 1, "abc", at + 1.4)
        expectations.answered(line, RequestId(2 * number + 1), "", at + 2.4)  # and is not heard of again
    line = Line()
    turn(expectations, line, 1000, "ab", 1e6)
    [(node, called)] = expectations.answered(line, RequestId(1000), "read", 1e6 + 1.0)
    [(_, done)] = expectations.answered(line, RequestId(1000), "", 1e6 + 1.0)
    assert node == A
    assert called.chance(0.5) > 0.8
    assert done.chance(128.0) < 0.4 < called.chance(128.0)


def test_nothing_is_said_of_requests_without_session_where_there_are_no_sessions() -> None:
    expectations, line = Expectations(), Line()
    assert expectations.outlook(None, RequestId(1)) is None
    turn(expectations, line, 2, "ab", 0.0)
    outlook = expectations.outlook(None, RequestId(3))
    assert outlook is not None
    assert outlook.context == 3


def test_where_each_request_is_a_session_of_its_own_first_turns_are_expected_as_if_nothing_were_known() -> None:
    expectations, unknown = Expectations(), Expectations().outlook(Context(ContextId(0)), RequestId(0))
    assert unknown is not None

    def first_turn(number: int) -> Outlook | None:
        context, _ = expectations.started(Line(), RequestId(number), prompt_hashes("abcd"), (A,), False, 10.0 * number)
        outlook = expectations.outlook(context, context.request)
        expectations.paused(context, 10.0 * number + 1.0)
        return outlook

    *_, last = [first_turn(number) for number in range(3000)]
    assert last is not None
    assert last.chances == pytest.approx(unknown.chances)
    line = Line()
    for number in range(3000, 3002):
        turn(expectations, line, number, "efgh" + "i" * number, 10.0 * number)
    later = expectations.outlook(line.contexts[-1], RequestId(3001))
    assert later is not None
    assert later.chances[4] < unknown.chances[4] / 2  # one came back, and few do


def test_what_a_model_waits_for_says_nothing_where_more_is_known() -> None:
    expectations, line = Expectations(), Line()
    turn(expectations, line, 1, "ab", 0.0)
    assert expectations.answered(line, RequestId(7), "read", 1.0) == []  # nobody's turn
    expectations.tool_started(line, "bash", 40.0, 1.5)
    assert expectations.answered(line, RequestId(1), "bash", 2.0) == []  # its harness was sooner, and says how long
    context, _ = expectations.started(line, RequestId(2), prompt_hashes("abc"), (A,), False, 3.0)
    assert expectations.answered(line, RequestId(1), "read", 4.0) == []  # its next turn runs
    assert expectations.answered(line, RequestId(2), "read", 4.0) == []  # another choice of it does
    expectations.paused(context, 5.0)
    assert len(expectations.answered(line, RequestId(2), "read", 5.0)) == 1


def test_a_finished_tool_and_an_ended_session_are_told_of() -> None:
    expectations, line = Expectations(), Line()
    turn(expectations, line, 1, "ab", 0.0, A, B)
    assert [node for node, _ in expectations.tool_finished(line, 2.0)] == [A, B]
    assert expectations.ended(line) == [(A, Outlook(ContextId(1))), (B, Outlook(ContextId(1)))]


@pytest.mark.parametrize("way", ["forgotten", "ended", "ended in a turn", "crowded out"])
def test_nothing_is_kept_of_what_is_followed_no_longer(way: str) -> None:
    expectations, line = Expectations(), Line()
    context, _ = expectations.started(line, RequestId(1), prompt_hashes("ab"), (A,), False, 0.0)
    if way == "ended in a turn":
        expectations.ended(line)
    expectations.paused(context, 1.0)
    if way == "forgotten":
        line.forget()
    elif way == "ended":
        expectations.ended(line)
    elif way == "crowded out":
        for number in range(CONTEXTS_MAX):
            expectations.started(line, RequestId(2 + number), prompt_hashes(chr(107 + number) * 4), (A,), False, 2.0)
    line.contexts.clear()
    expectations.started(Line(), RequestId(9), prompt_hashes("z"), (A,), False, 5.0)  # ages go on
    assert sys.getrefcount(context) == 2  # this name, and the question


def test_classes_beyond_the_bound_share_one() -> None:
    expectations = Expectations()
    for number in range(2 * CLASSES_MAX):
        line = Line()
        turn(expectations, line, number, "ab", float(number))
        assert len(expectations.tool_started(line, f"tool {number}", None, number + 1.0)) == 1
    assert expectations.classes == CLASSES_MAX
