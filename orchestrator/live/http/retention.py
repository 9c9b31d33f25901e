"""How long clients want a prompt to stay cached, in the many ways to say it; what means nothing asks for nothing."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

#: Seconds of a marker that names none.
EPHEMERAL_S = 300.0
#: OpenAI's retentions; "in_memory" is as long as there is room.
_RETENTIONS = {"24h": 86_400.0}
_TTL = re.compile(r"([0-9]{1,9})(s|m|h)", re.ASCII)
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
#: Headers that name the session which one forked from, and that say that a request is a session's last.
PARENT_HEADERS = (
    b"x-dynamo-parent-session-id",
    b"x-claude-code-parent-agent-id",
    b"x-codex-parent-thread-id",
    b"x-parent-session-id",
)
#: Claude Code's agents name themselves and the session that they work for, which the first of them have no other parent than.
_AGENT_HEADER, _MAIN_HEADER = b"x-claude-code-agent-id", b"x-claude-code-session-id"
FINAL_HEADERS = (b"x-dynamo-session-final",)


def retention_s(markers: Iterable[Any], retention: Any = None) -> float:
    """Return the longest time that is asked for, seconds; 0 for none.

    Args:
        markers: Anthropic's `cache_control`, wherever they were: {"type": "ephemeral", "ttl": "5m"}.
        retention: OpenAI's `prompt_cache_retention`.
    """
    longest = _RETENTIONS.get(retention, 0.0) if isinstance(retention, str) else 0.0
    for marker in markers:
        if marker is not None:
            longest = max(longest, marked_s(marker))
    return longest


def marked_s(marker: Any) -> float:
    """Return the seconds that one `cache_control` asks for; 0 for one that means nothing."""
    if not isinstance(marker, dict):
        return 0.0
    fields = cast("dict[str, Any]", marker)
    if fields.get("type") != "ephemeral":
        return 0.0
    ttl = fields.get("ttl")
    found = _TTL.fullmatch(ttl) if isinstance(ttl, str) else None
    return float(found[1]) * _UNITS[found[2]] if found is not None else EPHEMERAL_S


def parent_of(headers: Mapping[bytes, bytes]) -> bytes | None:
    """Return what names the session that a request's session forked from, if anything does."""
    named = next((value for name in PARENT_HEADERS if (value := headers.get(name))), None)
    return headers.get(_MAIN_HEADER) if named is None and _AGENT_HEADER in headers else named


def is_final(headers: Mapping[bytes, bytes]) -> bool:
    """Return whether a request is said to be its session's last."""
    return any(headers.get(name, b"").strip().lower() in (b"true", b"1") for name in FINAL_HEADERS)
