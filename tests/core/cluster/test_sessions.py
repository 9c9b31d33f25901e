"""What is remembered of sessions: where they ran, what their prompts repeat, and not more of them than allowed."""

import pytest

from orchestrator.core.cluster.contexts import MARKS_MAX, Marks
from orchestrator.core.cluster.sessions import ReprefillReason, Sessions
from orchestrator.core.events import SessionEnded, ToolStarted
from orchestrator.core.types import BlockHash, ModelName, NodeId, SessionId, TenantId
from tests.builders import BLOCK_TOKENS, prompt_hashes
from tests.core.cluster.cluster_builders import make_request

A, B = NodeId("a"), NodeId("b")


def turn(
    sessions: Sessions,
    prompt: str,
    computed_tokens: int,
    stayed: bool = True,
    regretted: int = 0,
    session: str = "s",
    scored: bool = False,
) -> None:
    request = make_request(prompt=prompt, session=SessionId(session), scored=scored)
    sessions.started(request, A, None, again=False, now=0.0)
    sessions.ended(request, computed_tokens, stayed, BLOCK_TOKENS, regretted)


def test_a_session_knows_where_its_last_turn_ran() -> None:
    sessions = Sessions(sessions_max=4)
    request = make_request(session=SessionId("s"))
    assert sessions.of(request) is None
    sessions.started(request, A, B, again=False, now=0.0)
    known = sessions.of(request)
    assert known is not None
    assert known.nodes == (A, B)
    sessions.started(request, B, None, again=False, now=0.0)
    assert known.nodes == (B,)


def test_requests_without_a_session_are_not_remembered() -> None:
    sessions = Sessions(sessions_max=4)
    sessions.started(make_request(), A, None, again=False, now=0.0)
    assert len(sessions) == 0


def test_the_longest_quiet_session_goes_first() -> None:
    sessions = Sessions(sessions_max=2)
    for name in ("x", "y", "x", "z"):
        sessions.started(make_request(session=SessionId(name)), A, None, again=False, now=0.0)
    assert [sessions.of(make_request(session=SessionId(name))) is not None for name in "xyz"] == [True, False, True]


def forked(sessions: Sessions, *children: str) -> tuple[ModelName, TenantId]:
    """Let a session wait for others that fork from it, as its harness says for an hour; return its model and tenant."""
    request = make_request(prompt="abcd", session=SessionId("s"))
    sessions.paused(sessions.started(request, A, None, again=False, now=0.0), 1.0)
    place = request.model, request.tenant
    sessions.hinted(ToolStarted(*place, SessionId("s"), "helpers", 3600.0), 1.0)
    assert sessions.fork(*place, SessionId("s"), [SessionId(child) for child in children])
    return place


def test_a_session_is_expected_back_once_the_last_that_forked_from_it_has_ended() -> None:
    sessions = Sessions(sessions_max=4)
    place = forked(sessions, "x", "y")
    assert sessions.hinted(SessionEnded(*place, SessionId("x")), 2.0) == []
    ((node, outlook),) = sessions.hinted(SessionEnded(*place, SessionId("y")), 3.0)
    assert node == A
    assert outlook.chance(10.0) > 0.0
    assert sessions.hinted(SessionEnded(*place, SessionId("y")), 4.0) == []


def test_nobody_is_told_of_a_join_while_the_session_runs_already() -> None:
    sessions = Sessions(sessions_max=4)
    place = forked(sessions, "x")
    sessions.started(make_request(prompt="abcde", session=SessionId("s")), A, None, again=False, now=2.0)
    assert sessions.hinted(SessionEnded(*place, SessionId("x")), 3.0) == []


def test_a_session_waits_for_none_that_is_forgotten() -> None:
    sessions = Sessions(sessions_max=3)
    place = forked(sessions, "x", "y")
    sessions.started(make_request(prompt="abcd", session=SessionId("s")), A, None, again=True, now=2.0)
    sessions.hinted(ToolStarted(*place, SessionId("s"), "helpers", 3600.0), 2.0)
    sessions.started(make_request(session=SessionId("z")), A, None, again=False, now=3.0)  # x goes, the longest quiet one
    assert [node for node, _ in sessions.hinted(SessionEnded(*place, SessionId("y")), 4.0)] == [A]


def test_the_same_name_of_another_tenant_or_model_is_another_session() -> None:
    sessions = Sessions(sessions_max=4)
    sessions.started(make_request(session=SessionId("s")), A, None, again=False, now=0.0)
    assert sessions.of(make_request(session=SessionId("s"), tenant="u")) is None
    assert sessions.of(make_request(session=SessionId("s"), model="other")) is None


@pytest.mark.parametrize(
    ("second", "computed", "stayed", "regretted", "expected"),
    [
        # 2 blocks and 1 token first, then 2 blocks more: what follows the 2 full blocks is new
        ("uvwx", 9, True, 0, {"new": 9 + 9}),
        # the first blocks were gone from the node that served them: forgotten, or it did not have them
        ("uvwx", 17, True, 8, {"new": 9 + 9, "evicted": 8}),
        ("uvwx", 17, True, 4, {"new": 9 + 9, "evicted": 4, "not_stored": 4}),
        ("uvwx", 17, True, 0, {"new": 9 + 9, "not_stored": 8}),
        # another session's blocks had been forgotten as well
        ("uvwx", 13, True, 12, {"new": 9 + 9, "evicted": 4}),
        # the session had to move
        ("uvwx", 17, False, 8, {"new": 9 + 9, "moved": 8}),
        # the second block was changed: the first is repeated, the rest was rewritten
        ("u1wx", 13, True, 0, {"new": 9 + 9, "rewritten": 4}),
        ("u1wx", 17, True, 4, {"new": 9 + 9, "rewritten": 4, "evicted": 4}),
        # a shorter prompt than before
        ("u", 1, True, 0, {"new": 9, "rewritten": 1}),
    ],
)
def test_every_computed_token_has_one_reason(
    second: str, computed: int, stayed: bool, regretted: int, expected: dict[str, int]
) -> None:
    sessions = Sessions(sessions_max=4)
    turn(sessions, "uv", computed_tokens=9)
    turn(sessions, second, computed, stayed, regretted)
    assert {reason: tokens for reason, tokens in sessions.reprefilled_tokens.items() if tokens} == {
        ReprefillReason(name): tokens for name, tokens in expected.items()
    }
    assert sum(sessions.reprefilled_tokens.values()) == 9 + computed


@pytest.mark.parametrize(("stayed", "regretted"), [(True, 0), (True, 4), (False, 0)])
def test_what_is_computed_again_to_be_scored_is_no_nodes_fault(stayed: bool, regretted: int) -> None:
    sessions = Sessions(sessions_max=4)
    turn(sessions, "uv", computed_tokens=9)
    turn(sessions, "uvwx", 17, stayed, regretted, scored=True)
    found = {str(reason): tokens for reason, tokens in sessions.reprefilled_tokens.items() if tokens}
    assert found == {"new": 9 + 9, "scored": 8}


def test_few_marks_tell_how_much_of_a_long_prompt_is_repeated() -> None:
    old = [BlockHash(index.to_bytes(16, "big")) for index in range(1000)]
    marks = Marks.of(old)
    assert len(marks.hashes) == MARKS_MAX
    assert marks.repeated_blocks(old) == 1000
    assert marks.repeated_blocks(old[:700]) == 687
    assert marks.repeated_blocks([*old[:500], *prompt_hashes("x" * 600)]) == 500
    assert Marks.of([]).repeated_blocks(old) == 0
