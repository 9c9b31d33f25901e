"""Reads what clients ask of /v1/responses: a body in, checked, what is asked out, but for the conversation's earlier turns.

Those are put in by `dialect.py`, which knows what is kept. Fields that are known and not served are refused; others are ignored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from orchestrator.core.types import GatewayId, SessionId, TenantId
from orchestrator.live.asked import Asked, Constraint, Conversation, Effort, Thinking
from orchestrator.live.http.openai.constraints import formatted
from orchestrator.live.http.openai.requests import KEPT_BUDGET, TOP_LOGPROBS_MAX, asked_of, check_common, kept_budget
from orchestrator.live.http.reading import check_range, decode
from orchestrator.live.http.responses.bodies import ResponsesRequest
from orchestrator.live.http.responses.ids import gateway_of
from orchestrator.live.http.responses.offered import Offered, chosen, offered
from orchestrator.live.refusals import require
from orchestrator.live.text.conversations import shown_tools

ITEMS_MAX = 100_000
_METADATA_MAX, _METADATA_KEY_CHARS_MAX, _METADATA_VALUE_CHARS_MAX = 16, 64, 512
_SCORES = "message.output_text.logprobs"
_ENCRYPTED = "reasoning.encrypted_content"
#: What may be asked for besides the answer; most of it is about tools that are not there, so that nothing is to be told.
_INCLUDED = frozenset({
    _SCORES, _ENCRYPTED, "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
    "code_interpreter_call.outputs", "computer_call_output.output.image_url", "message.input_image.image_url",
})  # fmt: skip
#: Fields of other requests, and what to do about them here.
_ELSEWHERE = {
    "return_token_ids": "is not served here; leave it out",
    "return_tokens_as_token_ids": "is not served here; leave it out",
    "max_tokens": "is called max_output_tokens here",
    "response_format": "is called text.format here",
}
#: Known and not served; each with the values that ask for what happens anyway.
_UNSERVED: Mapping[str, Sequence[Any]] = {
    "background": (False,),
    "conversation": (),
    "prompt": (),
    "context_management": ([],),
    "moderation": (),
}
_RESPONSES = msgspec.json.Decoder(ResponsesRequest, strict=True)
_EFFORTS = tuple(Effort)


@dataclass(frozen=True, slots=True)
class Origin:
    """What is known of a request beyond what is asked: how it was worded, and where its response belongs."""

    request: ResponsesRequest
    tools: Offered
    #: Thoughts come back by way of the client (`thoughts.py`).
    carries_thoughts: bool
    #: The response's name.
    id: str = ""
    tenant: TenantId | None = None
    session: SessionId | None = None
    #: Its own items, named.
    items: Sequence[dict[str, Any]] = ()


def parse(body: bytes) -> Asked:
    """Read and check a body of /v1/responses. Raises `Invalid`."""
    request = decode(_RESPONSES, body)
    _check(request)
    tools = offered(request.tools or ())
    shown, use = chosen(request.tool_choice, tools)
    fields = [tools.names[tool["function"]["name"]].schema_field for tool in shown]
    inputs = {name: one.input for name, one in tools.names.items() if one.input is not None}
    use = replace(use, parallel=request.parallel_tool_calls is not False, schema_fields=fields, inputs=inputs)
    conversation = Conversation((), shown_tools(shown), _variables(request), tool_use=use, thinking=_thinking(request))
    include = request.include or ()
    logprobs = (request.top_logprobs or 0) if _SCORES in include or request.top_logprobs else None
    asked = asked_of(request, conversation, request.max_output_tokens, logprobs, thoughts=True)
    return replace(
        asked,
        constraint=_constraint(request, asked.constraint),
        hints=replace(asked.hints, gateway=_keeper(request)),
        origin=Origin(request, tools, _ENCRYPTED in include),
    )


def items_of(request: ResponsesRequest) -> list[dict[str, Any]]:
    """Return a request's own items."""
    if isinstance(request.input, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": request.input}]}]
    return request.input or []


def referred(item: Mapping[str, Any]) -> str | None:
    """Return the name of the item that one only refers to; None if it is an item itself."""
    if item.get("type") == "item_reference" or (set(item) == {"id"}):
        return str(item.get("id"))
    return None


def _check(request: ResponsesRequest) -> None:
    for name, problem in _ELSEWHERE.items():
        value = getattr(request, name)
        require(value is None or value is False, name, problem)
    require(request.n in (None, 1), "n", "a response is one answer")
    each = request.stream_options is not None and request.stream_options.continuous_usage_stats
    require(not each, "stream_options.continuous_usage_stats", "is not served here; leave it out")
    for name, harmless in _UNSERVED.items():
        value = getattr(request, name)
        require(value is None or value in harmless, name, "is not served here; leave it out")
    if not request.tools:
        request.parallel_tool_calls = None  # Codex says so when it compacts, and means nothing by it.
    check_common(request)
    given = request.input is not None or request.previous_response_id is not None
    require(given, "input", "must be text or a list of items")
    require(len(request.input or "") > 0 or not isinstance(request.input, list), "input", "must hold at least one item")
    require(not isinstance(request.input, list) or len(request.input) <= ITEMS_MAX, "input", f"must be at most {ITEMS_MAX} items")
    check_range("max_output_tokens", request.max_output_tokens, 1)
    check_range("top_logprobs", request.top_logprobs, 0, TOP_LOGPROBS_MAX)
    for name in request.include or ():
        require(name in _INCLUDED, "include", f"{name!r} is none of {', '.join(sorted(_INCLUDED))}")
    truncation = request.truncation
    require(truncation in (None, "auto", "disabled"), "truncation", f"must be auto or disabled, is {truncation!r}")
    _check_metadata(request.metadata or {})


def _check_metadata(metadata: Mapping[str, str]) -> None:
    require(len(metadata) <= _METADATA_MAX, "metadata", f"must be at most {_METADATA_MAX} pairs")
    for key, value in metadata.items():
        require(len(key) <= _METADATA_KEY_CHARS_MAX, "metadata", f"keys may have {_METADATA_KEY_CHARS_MAX} characters")
        require(len(value) <= _METADATA_VALUE_CHARS_MAX, "metadata", f"values may have {_METADATA_VALUE_CHARS_MAX} characters")


def _keeper(request: ResponsesRequest) -> GatewayId | None:
    """Return the gateway that keeps what a request goes on from; None if it goes on from nothing."""
    if request.previous_response_id is not None:
        return gateway_of(request.previous_response_id)
    items = request.input if isinstance(request.input, list) else ()
    return next((gateway_of(name) for item in items if (name := referred(item)) is not None), None)


def _variables(request: ResponsesRequest) -> dict[str, Any]:
    """Return what the template is told besides: how long to answer, and what it alone knows."""
    verbosity = request.text.verbosity if request.text is not None else None
    told = {"verbosity": verbosity} if verbosity is not None else {}
    return {**told, **(request.chat_template_kwargs or {})}


def _thinking(request: ResponsesRequest) -> Thinking:
    """Return how much the model is to think. Raises `Invalid`."""
    effort, field = request.reasoning.effort if request.reasoning is not None else None, "reasoning.effort"
    require(effort is None or effort in _EFFORTS, field, f"must be one of {', '.join(_EFFORTS)}, is {effort!r}")
    budget = kept_budget(request)
    return Thinking(None, None if effort is None else Effort(effort), budget, field, KEPT_BUDGET if budget is not None else "")


def _constraint(request: ResponsesRequest, otherwise: Constraint | None) -> Constraint | None:
    """Return what binds the answer's text: its form, or what was said in the words of other servers. Raises `Invalid`."""
    form = request.text.format if request.text is not None else None
    found = formatted(form, "text.format") if form is not None else None
    if found is not None and otherwise is not None:
        require(False, otherwise.field, "cannot be combined with text.format: one of them says what the answer must be")
    return found or otherwise
