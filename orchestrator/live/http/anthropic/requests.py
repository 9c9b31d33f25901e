"""Reads what clients ask in Anthropic's words: a body in, checked, what is asked out.

`parse_messages` and `parse_count` return what is asked in no API's words (`live/asked.py`), or raise `Invalid`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import msgspec

from orchestrator.core.types import Sampling, ServiceClass
from orchestrator.live.asked import (
    TOP_K_MAX,
    Asked,
    Breakpoint,
    Constraint,
    ConstraintKind,
    Conversation,
    Effort,
    Hints,
    Limits,
    Report,
    Thinking,
    ToolUse,
)
from orchestrator.live.http.anthropic.bodies import Format, Message, MessagesRequest
from orchestrator.live.http.anthropic.conversing import Drafts
from orchestrator.live.http.anthropic.unserved import check_unserved
from orchestrator.live.http.reading import check_range, decode
from orchestrator.live.refusals import Invalid, require

MESSAGES_MAX = 100_000
TOOLS_MAX = 4096
STOP_SEQUENCES_MAX = 64
#: Markers of what to cache in one request.
BREAKPOINTS_MAX = 4
_MESSAGES = msgspec.json.Decoder(MessagesRequest, strict=True)
#: Anthropic's tiers, and our classes by name; any other is the tenant's own.
_CLASSES = {"standard_only": ServiceClass.STANDARD} | {str(one): one for one in ServiceClass}
_THINKING = {"enabled": True, "adaptive": None, "between_tools": None, "disabled": False}
#: How hard to think, where it is to think.
_EFFORTS = tuple(effort for effort in Effort if effort is not Effort.NONE)
#: Claude Code names its session behind this, or in JSON.
_SESSION = "_session_"


def parse_messages(body: bytes) -> Asked:
    """Read and check a body of /v1/messages. Raises `Invalid`."""
    request = decode(_MESSAGES, body)
    require(request.max_tokens is not None, "max_tokens", "must be given")
    return _asked(request)


def parse_count(body: bytes) -> Asked:
    """Read and check a body of /v1/messages/count_tokens. Raises `Invalid`."""
    return _asked(decode(_MESSAGES, body))


def _asked(request: MessagesRequest) -> Asked:
    """Return what a request asks for, once it is checked."""
    check_unserved(request)
    check_range("max_tokens", request.max_tokens, 0)
    check_range("temperature", request.temperature, 0, 2)
    check_range("top_p", request.top_p, 0, 1)
    require(request.top_p is None or request.top_p > 0, "top_p", "must be over 0")
    check_range("top_k", request.top_k, 0)
    stops = request.stop_sequences or ()
    require(len(stops) <= STOP_SEQUENCES_MAX, "stop_sequences", f"must be at most {STOP_SEQUENCES_MAX} strings")
    require(all(stops), "stop_sequences", "must not be empty")
    thinking = request.thinking
    return Asked(
        model=request.model,
        prompt=_conversation(request),
        sampling=_sampling(request),
        limits=Limits(request.max_tokens, stops),
        hints=_hints(request),
        report=Report(
            bool(request.stream),
            thoughts=thinking is None or thinking.type != "disabled",
            withholds_thoughts=thinking is not None and thinking.display == "omitted",
        ),
        constraint=_constraint(request),
    )


def _sampling(request: MessagesRequest) -> Sampling:
    return Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=min(request.top_k or 0, TOP_K_MAX),
    )


def _hints(request: MessagesRequest) -> Hints:
    tier = request.service_tier
    service_class = _CLASSES.get(tier) if tier is not None else None
    if service_class is None and request.speed == "fast":
        service_class = ServiceClass.INTERACTIVE
    user = request.metadata.user_id if request.metadata is not None else None
    return Hints(service_class=service_class, session=_session(user or ""))


def _session(user: str) -> str | None:
    """Return the session that Claude Code names within a user's name; other names of users name none."""
    if user.startswith("{"):
        try:
            named: Any = msgspec.json.decode(user)
        except (msgspec.DecodeError, RecursionError):
            return None
        session = cast("dict[str, Any]", named).get("session_id") if isinstance(named, dict) else None
        return session if isinstance(session, str) and session else None
    return user.rpartition(_SESSION)[2] or None if _SESSION in user else None


def _conversation(request: MessagesRequest) -> Conversation:
    require(len(request.messages) > 0, "messages", "must hold at least one message")
    require(len(request.messages) <= MESSAGES_MAX, "messages", f"must hold at most {MESSAGES_MAX} messages")
    tools = request.tools or ()
    require(len(tools) <= TOOLS_MAX, "tools", f"must be at most {TOOLS_MAX} tools")
    drafts = Drafts()
    drafts.add_tools(tools)
    drafts.add_system(request.system or ())
    for place, message in enumerate(request.messages):
        final = place == len(request.messages) - 1
        if not message.content:
            require(final and message.role == "assistant", f"messages.{place}.content", "must not be empty")
            continue
        drafts.add(message, f"messages.{place}")
    drafts.mark_end(request.cache_control)
    use = _tool_use(request, drafts)
    _check_breakpoints(drafts.breakpoints)
    return Conversation(
        messages=drafts.shown(),
        tools=drafts.tools or None if use is not None else None,
        tool_use=replace(use or ToolUse(), schema_field="tools.{}.input_schema"),
        thinking=_thinking(request),
        opens_answer=not (continues := _continues(request.messages, drafts)),
        continues=continues,
        breakpoints=[one for one in drafts.breakpoints if one.chars is not None or use is not None],
    )


def _continues(messages: Sequence[Message], drafts: Drafts) -> bool:
    """Return whether the answer goes on with a last message of the assistant's. Raises `Invalid`."""
    if messages[-1].role != "assistant" or not messages[-1].content:
        return False
    last, where = drafts.last, f"messages.{len(messages) - 1}"
    require(last is not None and not last.calls, where, "a last message that calls tools must be followed by their results")
    require(last is not None and bool(last.content), where, "a last message of the assistant's needs text to go on with")
    require(last is None or last.content == last.content.rstrip(), where, "text to go on with must not end in white space")
    return True


def _tool_use(request: MessagesRequest, drafts: Drafts) -> ToolUse | None:
    """Return what is to be done with tools; None: the model is not to know of them. Raises `Invalid`."""
    choice = request.tool_choice
    if choice is None:
        return ToolUse()
    parallel = not choice.disable_parallel_tool_use
    match choice.type:
        case "none":
            return None
        case "auto":
            return ToolUse(parallel=parallel, field="tool_choice.disable_parallel_tool_use")
        case "any":
            require(bool(drafts.tools), "tool_choice", "needs tools to choose from")
            return ToolUse(forced=True, parallel=parallel)
        case "tool":
            known = choice.name in {tool["function"]["name"] for tool in drafts.tools}
            require(known, "tool_choice.name", f"{choice.name!r} is none of the tools")
            return ToolUse(forced=True, name=choice.name or "", parallel=parallel)
        case _:
            raise Invalid("tool_choice.type: must be auto, any, tool or none", "invalid_value", "tool_choice.type")


def _check_breakpoints(breakpoints: Sequence[Breakpoint]) -> None:
    found = len(breakpoints)
    require(found <= BREAKPOINTS_MAX, "cache_control", f"at most {BREAKPOINTS_MAX} blocks may have one, {found} have")
    times = [one.seconds for one in breakpoints]
    problem = "a longer ttl must not come after a shorter one (tools, then system, then messages)"
    require(times == sorted(times, reverse=True), "cache_control", problem)


def _thinking(request: MessagesRequest) -> Thinking:
    """Return how much the model is to think. Raises `Invalid`."""
    asked, config, enabled, effort = request.thinking, request.output_config, None, None
    if asked is not None:
        require(asked.type in _THINKING, "thinking.type", f"must be one of {', '.join(_THINKING)}, is {asked.type!r}")
        check_range("thinking.budget_tokens", asked.budget_tokens, 1, TOP_K_MAX)
        enabled = _THINKING[asked.type]
    if config is not None and config.effort is not None:
        known = config.effort in _EFFORTS
        require(known, "output_config.effort", f"must be one of {', '.join(_EFFORTS)}, is {config.effort!r}")
        effort = Effort(config.effort) if enabled is not False else None
    return Thinking(enabled, effort, asked.budget_tokens if asked is not None else None, "thinking.type")


def _constraint(request: MessagesRequest) -> Constraint | None:
    """Return what the answer must be. Raises `Invalid`."""
    config = request.output_config
    asked: dict[str, Format | None] = {
        "output_config.format": config.format if config is not None else None,
        "output_format": request.output_format,
    }
    for name, one in asked.items():
        if one is None:
            continue
        require(one.type == "json_schema", f"{name}.type", f"must be json_schema, is {one.type!r}")
        require(one.schema is not None, f"{name}.schema", "must be an object, a JSON schema")
        return Constraint(ConstraintKind.JSON_SCHEMA, msgspec.json.encode(one.schema).decode(), f"{name}.schema")
    return None
