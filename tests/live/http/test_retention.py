"""How long a prompt is to be kept, in all the ways that clients say it; none of them, and nothing else, is refused."""

import json
from typing import Any

import pytest

from orchestrator.live.http.openai.requests import parse_chat
from orchestrator.live.http.retention import EPHEMERAL_S, is_final

MARKER = {"type": "ephemeral"}


def asked_s(message: dict[str, Any] | None = None, **body: Any) -> float:
    """Return the seconds that a chat request asks its prompt to be kept for."""
    messages = [{"role": "user", "content": "Hello"} | (message or {})]
    return parse_chat(json.dumps({"model": "m", "messages": messages, **body}).encode()).hints.retention_s


def test_nothing_asked_is_nothing_kept() -> None:
    assert asked_s() == 0.0


@pytest.mark.parametrize(("ttl", "seconds"), [("5m", 300.0), ("1h", 3600.0), ("45s", 45.0), (None, EPHEMERAL_S)])
def test_a_marker_says_how_long(ttl: str | None, seconds: float) -> None:
    marker = MARKER | ({"ttl": ttl} if ttl is not None else {})
    assert asked_s(cache_control=marker) == seconds
    assert asked_s({"cache_control": marker}) == seconds
    assert asked_s({"content": [{"type": "text", "text": "Hello", "cache_control": marker}]}) == seconds
    assert asked_s(nvext={"cache_control": marker}) == seconds
    tool = {"type": "function", "function": {"name": "f"}, "cache_control": marker}
    assert asked_s(tools=[tool]) == seconds


def test_the_longest_of_several_counts() -> None:
    assert asked_s({"cache_control": MARKER}, nvext={"cache_control": MARKER | {"ttl": "1h"}}) == 3600.0
    assert asked_s({"cache_control": MARKER}, prompt_cache_retention="24h") == 86_400.0


@pytest.mark.parametrize("retention", ["in_memory", "7d", 24, None, ["24h"], {"a": 1}])
def test_a_retention_that_means_nothing_is_ignored(retention: Any) -> None:
    assert asked_s(prompt_cache_retention=retention) == 0.0


@pytest.mark.parametrize("marker", ["ephemeral", 5, [], {}, {"type": "persistent"}, {"ttl": "1h"}])
def test_a_marker_that_means_nothing_is_ignored(marker: Any) -> None:
    assert asked_s({"cache_control": marker}, cache_control=marker, nvext={"cache_control": marker}) == 0.0


@pytest.mark.parametrize("ttl", ["forever", "-5m", "5 m", "", "9999999999h", 5])
def test_a_time_that_means_nothing_is_the_usual_one(ttl: Any) -> None:
    assert asked_s(cache_control=MARKER | {"ttl": ttl}) == EPHEMERAL_S


def test_legacy_hints_are_taken_and_ignored() -> None:
    hints = {"priority": 3, "strict_priority": 1, "osl": 100, "speculative_prefill": True, "latency_sensitivity": 1.5, "iat": 9}
    control = {"session_id": "s", "action": "open", "timeout": 300}
    body = {"agent_hints": hints, "session_control": control, "annotations": ["a"]}
    request = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "nvext": body, "agent_hint": {"x": 1}}
    asked = parse_chat(json.dumps(request).encode())
    assert (asked.hints.priority, asked.hints.retention_s) == (3, 0.0)


@pytest.mark.parametrize(("value", "final"), [(b"true", True), (b"True", True), (b"1", True), (b"false", False), (b"", False)])
def test_a_header_says_that_a_request_is_a_sessions_last(value: bytes, final: bool) -> None:
    assert is_final({b"x-dynamo-session-final": value}) is final
