"""Answers in Anthropic's shapes: whole messages, and events that build one block by block.

    message_start ping (content_block_start content_block_delta* content_block_stop)* message_delta message_stop

Input tokens are told in three parts that add up to the prompt: read (not computed again), created (computed now, within a
beginning that a breakpoint marks and a lease keeps) and the rest.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, cast

import msgspec

from orchestrator.core.types import ServiceClass
from orchestrator.live.asked import Asked
from orchestrator.live.choices import Usage
from orchestrator.live.http.anthropic.signatures import signature_of
from orchestrator.live.http.errors import HttpError
from orchestrator.live.refusals import require
from orchestrator.live.text.detokenise import Vocabulary
from orchestrator.live.text.generation import AnswerEnd, Generation, Piece, PromptTold, Scored, Taken
from orchestrator.live.text.reasoning import Reasoning
from orchestrator.live.text.tools import MoreArguments, ToolCall

_encode = msgspec.json.encode
_END = b"\n\n"
#: Anthropic's words for errors by status; of others it is the client's fault or ours.
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
#: Models of a list that says nothing of how many it wants, and of one that does.
_PAGE_MODELS, _PAGE_MODELS_MAX = 20, 1000
#: Anthropic's tiers; all other classes are its "priority".
_TIERS = {ServiceClass.BATCH: "batch", ServiceClass.STANDARD: "standard"}
#: Leases up to this long count as Anthropic's shorter kind, seconds.
_SHORT_S_MAX = 300.0


def error_body(error: HttpError, request: str = "") -> bytes:
    """Return Anthropic's error object as JSON."""
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    named = {"request_id": request} if request else {}
    return _encode({"type": "error", "error": {"type": kind, "message": error.message}, **named})


def error_event(error: HttpError) -> bytes:
    """Return an error as it stands in a stream."""
    return b"event: error\ndata: " + error_body(error) + _END


def count_body(tokens: int) -> bytes:
    """Return how many tokens a prompt has."""
    return _encode({"input_tokens": tokens})


def write_message(asked: Asked, vocabulary: Vocabulary) -> "MessageWriter":
    """Return the writer of an answer."""
    del vocabulary
    return MessageWriter(asked)


def model_info(name: str, created_unix_s: int, context_tokens_max: int) -> dict[str, Any]:
    """Return a model as clients may name it."""
    created = datetime.fromtimestamp(created_unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    known = {"type": "model", "id": name, "display_name": name, "created_at": created}
    return {**known, "lifecycle": "active", "max_input_tokens": context_tokens_max, "max_tokens": context_tokens_max}


def page_of(models: Sequence[Mapping[str, Any]], asked: Mapping[str, str]) -> dict[str, Any]:
    """Return some of all models, as a list's query asks: the first ones, those after one or before one. Raises `Invalid`."""
    limit = asked.get("limit", str(_PAGE_MODELS))
    known = limit.isascii() and limit.isdigit() and len(limit) <= 4 and 1 <= int(limit) <= _PAGE_MODELS_MAX
    require(known, "limit", f"must be from 1 to {_PAGE_MODELS_MAX}, is {limit!r}")
    names, most = [str(model["id"]) for model in models], int(limit)
    after, before = (_place(names, name, asked.get(name)) for name in ("after_id", "before_id"))
    rest = models[after + 1 if after is not None else 0 : before]
    shown = rest[-most:] if before is not None else rest[:most]
    first, last = (shown[0]["id"], shown[-1]["id"]) if shown else (None, None)
    return {"data": shown, "has_more": len(shown) < len(rest), "first_id": first, "last_id": last}


def _place(names: Sequence[str], field: str, name: str | None) -> int | None:
    if name is None:
        return None
    require(name in names, field, f"there is no model {name!r}")
    return names.index(name)


@dataclass(slots=True)
class _Block:
    """One block of an answer, as far as it has come."""

    #: What it is before anything is in it.
    head: dict[str, Any]
    #: Text, thoughts or arguments.
    parts: list[str] = field(default_factory=lambda: [])

    @property
    def kind(self) -> str:
        return self.head["type"]

    @property
    def text(self) -> str:
        return "".join(self.parts)


class MessageWriter:
    """Writes one answer of /v1/messages. Its blocks are put together in one way, whether or not they are streamed."""

    def __init__(self, asked: Asked) -> None:
        self._id = f"msg_{random.getrandbits(96):024x}"
        self._asked = asked
        #: Those that have begun; the last goes on.
        self._blocks: list[_Block] = []
        self._done: Generation | None = None
        #: Nothing is to be said.
        self._silent = asked.limits.output_tokens_max == 0

    # --- streamed -----------------------------------------------------------------------------------------------------

    def opening(self, index: int, usage: Usage) -> bytes:
        """Return the events before the first block."""
        del index
        return _event("message_start", {"message": self._message([], usage, None)}) + _PING

    def events(self, index: int, pieces: Sequence[Piece]) -> list[bytes]:
        """Return one event for each piece, and those around blocks that end and begin with it."""
        del index
        events: list[bytes] = []
        for piece in () if self._silent else pieces:
            match piece:
                case str() | Scored():
                    text = piece if isinstance(piece, str) else piece.text
                    events += self._delta("text", text, {"type": "text", "text": ""}) if text else ()
                case Reasoning():
                    events += self._delta("thinking", piece.text, {"type": "thinking", "thinking": "", "signature": ""})
                case ToolCall():
                    events += self._begin({"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}})
                    events += self._grow(piece.arguments)
                case MoreArguments():
                    events += self._grow(piece.text)
                case PromptTold() | Taken():
                    pass  # tokens are told to nobody here
        return events

    def ending(self, index: int, done: Generation) -> bytes:
        """Return the events that end the last block."""
        del index
        self._done = done
        return b"".join(self._close())

    def closing(self, usage: Usage) -> bytes:
        """Return the events that say why the answer ended and what it took."""
        delta, told = _stop(self._done, self._asked), self._usage(usage)
        del told["service_tier"]
        return _event("message_delta", {"delta": delta, "usage": told}) + _event("message_stop", {})

    def broken(self, error: HttpError) -> bytes:
        """Return the last event of a stream that cannot go on."""
        return error_event(error)

    def _delta(self, kind: str, text: str, head: dict[str, Any]) -> list[bytes]:
        """Return what adds text to the last block, or to a new one if that is of another kind."""
        begun = self._begin(head) if not self._blocks or self._blocks[-1].kind != kind else []
        return begun + self._grow(text)

    def _begin(self, head: dict[str, Any]) -> list[bytes]:
        closed = self._close()
        self._blocks.append(_Block(head))
        return [*closed, _event("content_block_start", {"index": len(self._blocks) - 1, "content_block": head})]

    def _grow(self, text: str) -> list[bytes]:
        block = self._blocks[-1]
        block.parts.append(text)
        match block.kind:
            case _ if not text:
                return []
            case "thinking" if self._asked.report.withholds_thoughts:
                return [_PING]  # so that nobody takes a long silence for the end
            case "text":
                return [self._delta_event({"type": "text_delta", "text": text})]
            case "thinking":
                return [self._delta_event({"type": "thinking_delta", "thinking": text})]
            case _:
                return [self._delta_event({"type": "input_json_delta", "partial_json": text})]

    def _close(self) -> list[bytes]:
        """Return what ends the last block, if there is one."""
        if not self._blocks:
            return []
        block, signed = self._blocks[-1], list[bytes]()
        if block.kind == "thinking":
            signed.append(self._delta_event({"type": "signature_delta", "signature": self._signature(block)}))
        return [*signed, _event("content_block_stop", {"index": len(self._blocks) - 1})]

    def _delta_event(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", {"index": len(self._blocks) - 1, "delta": delta})

    def _signature(self, block: _Block) -> str:
        return signature_of(block.text, self._asked.report.withholds_thoughts)

    # --- whole --------------------------------------------------------------------------------------------------------

    def whole(self, generations: Sequence[tuple[Generation, Sequence[Piece]]], usage: Usage) -> bytes:
        """Return the body of an answer that is not streamed."""
        [(done, pieces)] = generations
        self.events(0, pieces)
        return _encode(self._message([self._whole(block) for block in self._blocks], usage, done))

    def _message(self, content: list[dict[str, Any]], usage: Usage, done: Generation | None) -> dict[str, Any]:
        head = {"id": self._id, "type": "message", "role": "assistant", "model": self._asked.model, "content": content}
        return {**head, **_stop(done, self._asked), "usage": self._usage(usage)}

    def _usage(self, usage: Usage) -> dict[str, Any]:
        tier = _TIERS.get(self._asked.hints.service_class or ServiceClass.STANDARD, "priority")
        return {"service_tier": tier} | _usage(replace(usage, completion_tokens=0, reasoning_tokens=0) if self._silent else usage)

    def _whole(self, block: _Block) -> dict[str, Any]:
        match block.kind:
            case "text":
                return {**block.head, "text": block.text}
            case "thinking":
                shown = "" if self._asked.report.withholds_thoughts else block.text
                return {**block.head, "thinking": shown, "signature": self._signature(block)}
            case _:
                return {**block.head, "input": _input(block.text)}


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + _encode({"type": kind, **fields}) + _END


_PING = _event("ping", {})


def _input(arguments: str) -> Any:
    """Return a call's arguments as an object; what a model wrote that is none stands in one."""
    try:
        found: Any = msgspec.json.decode(arguments) if arguments else {}
    except (msgspec.DecodeError, RecursionError):
        found = arguments
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {"arguments": found}


def _stop(done: Generation | None, asked: Asked) -> dict[str, Any]:
    """Return why an answer ended; nothing while it has not."""
    if done is None:
        return {"stop_reason": None, "stop_sequence": None}
    most, reason = asked.limits.output_tokens_max, "end_turn"
    if most == 0:
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    match done.finish_reason:
        case AnswerEnd.TOOL_CALLS:
            reason = "tool_use"
        case AnswerEnd.LENGTH:
            reason = "max_tokens" if most is not None and done.tokens >= most else "model_context_window_exceeded"
        case _ if done.stop_string:
            return {"stop_reason": "stop_sequence", "stop_sequence": done.stop_string}
        case _:
            pass
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, Any]:
    """Return Anthropic's usage object."""
    short, long = _created(usage)
    thoughts = {"output_tokens_details": {"thinking_tokens": usage.reasoning_tokens}} if usage.reasoning_tokens else {}
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens - short - long,
        "cache_creation_input_tokens": short + long,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation": {"ephemeral_5m_input_tokens": short, "ephemeral_1h_input_tokens": long},
        "output_tokens": usage.completion_tokens,
        **thoughts,
    }


def _created(usage: Usage) -> tuple[int, int]:
    """Return the tokens that were computed now and are kept, for the shorter and for the longer of Anthropic's times.

    What is kept for long counts there, whatever else keeps it too.
    """
    ends = dict.fromkeys((False, True), usage.cached_tokens)
    for kept in usage.kept:
        lasts = kept.seconds > _SHORT_S_MAX
        ends[lasts] = max(ends[lasts], kept.tokens)
    long = ends[True] - usage.cached_tokens
    return max(0, ends[False] - ends[True]), long
