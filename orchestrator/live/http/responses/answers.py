"""Writes responses: the whole object, or its making as numbered events, and says what went wrong.

response.created, in_progress, then each item's events (`output.py`), then response.completed, incomplete or failed
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from orchestrator.core.types import GatewayId
from orchestrator.live.asked import Asked, Conversation
from orchestrator.live.choices import Usage
from orchestrator.live.http.errors import HttpError
from orchestrator.live.http.openai.answers import error_body as openai_error_body
from orchestrator.live.http.openai.answers import padded, token_score
from orchestrator.live.http.responses.ids import new_id
from orchestrator.live.http.responses.output import Event, Output, Wording
from orchestrator.live.http.responses.requests import Origin
from orchestrator.live.text.detokenise import Vocabulary
from orchestrator.live.text.generation import AnswerEnd, Generation, Piece

_encode = msgspec.json.encode
_END = b"\n\n"
#: Takes a response that is done.
Keep = Callable[[dict[str, Any]], None]
#: OpenAI's words for a response that failed; anything else is the server's fault.
_FAILURES = {429: "rate_limit_exceeded"}


def count_body(tokens: int) -> bytes:
    """Return how many tokens a request's input has."""
    return _encode({"object": "response.input_tokens", "input_tokens": tokens})


def error_body(error: HttpError, request: str = "") -> bytes:
    """Return OpenAI's error object, in which messages are called input."""
    if error.param == "messages":
        error = HttpError(error.status, error.message, error.code, "input", error.retry_after_s)
    return openai_error_body(error, request)


def error_event(error: HttpError) -> bytes:
    """Return an error as it stands in a stream of which nobody knows any more how far it came."""
    told = {"type": "error", "code": error.code, "message": error.message, "param": error.param, "sequence_number": 0}
    return _event("error", told)


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + _encode(fields) + _END


class ResponseWriter:
    """Writes one response.

    Args:
        asked: the request, completed.
        origin: how it was worded.
        gateway: keeps the response.
        vocabulary: of its tokens.
        keep: takes the response once it is done; None if it is not to be kept.
    """

    def __init__(self, asked: Asked, origin: Origin, gateway: GatewayId, vocabulary: Vocabulary, keep: Keep | None) -> None:
        reasoning = origin.request.reasoning
        summarises = reasoning is not None and reasoning.told_as_summary
        wording = Wording(
            lambda kind: new_id(kind, gateway),
            lambda scored: token_score(scored, vocabulary),
            origin.tools.names,
            summarises,
            origin.carries_thoughts,
        )
        self._keep = keep
        self._output = Output(wording)
        self._frame = _frame(asked, origin)
        #: The item that grew last, and how events begin that tell of more of it.
        self._growing, self._head = "", b""
        self._end = AnswerEnd.STOP
        self._events = 0
        self._pads = asked.report.padded

    def opening(self, index: int, usage: Usage) -> bytes:
        """Return the two events that say which response this is."""
        del index, usage
        begun = self._response("in_progress")
        return self._written([("response.created", {"response": begun}), ("response.in_progress", {"response": begun})])

    def events(self, index: int, pieces: Sequence[Piece]) -> list[bytes]:
        """Return the events of some more of its items."""
        del index
        return [self._told(piece) for piece in pieces]

    def _told(self, piece: Piece) -> bytes:
        """Return the events of one piece; most are more of what came before, and told from bytes made once per item."""
        grown = self._output.grown_by(piece)
        if grown is None or self._pads:
            return self._written(self._output.take((piece,)))
        item, text = grown
        if item.id != self._growing:
            kind, fields = item.delta
            self._growing = item.id
            self._head = b"event: " + kind.encode() + b"\ndata: " + _encode({"type": kind, **fields})[:-1] + b',"delta":'
        item.add(text)
        self._events += 1
        return self._head + _encode(text) + b',"sequence_number":%d}\n\n' % (self._events - 1)

    def ending(self, index: int, done: Generation) -> bytes:
        """Return the events with which its last item ends."""
        del index
        self._end = _end(done)
        return self._written(self._output.finish(_complete(self._end)))

    def closing(self, usage: Usage) -> bytes:
        """Return the event that says what became of it."""
        done = self._done(usage)
        return self._written([(f"response.{done['status']}", {"response": done})])

    def broken(self, error: HttpError) -> bytes:
        """Return the event that says that it failed."""
        failure = {"code": _FAILURES.get(error.status, "server_error"), "message": error.message}
        return self._written([("response.failed", {"response": {**self._response("failed"), "error": failure}})])

    def whole(self, generations: Sequence[tuple[Generation, Sequence[Piece]]], usage: Usage) -> bytes:
        """Return the response as one object."""
        [(generation, pieces)] = generations
        self._output.take(pieces)
        self._end = _end(generation)
        self._output.finish(_complete(self._end))
        return _encode(self._done(usage))

    def _done(self, usage: Usage) -> dict[str, Any]:
        """Return the response at its end, which was handed to whoever keeps it; one that failed is not kept."""
        match self._end:
            case AnswerEnd.LENGTH:
                became = {**self._response("incomplete"), "incomplete_details": {"reason": "max_output_tokens"}}
            case AnswerEnd.FAILED:
                became = {**self._response("failed"), "error": {"code": "server_error", "message": "the model failed"}}
            case _:
                became = {**self._response("completed"), "completed_at": int(time.time())}
        done = {**became, "usage": _usage(usage)}
        if self._keep is not None and self._end is not AnswerEnd.FAILED:
            self._keep(done)
        return done

    def _response(self, status: str) -> dict[str, Any]:
        return {**self._frame, "status": status, "output": [*self._output.items]}

    def _written(self, events: Sequence[Event]) -> bytes:
        written: list[bytes] = []
        for kind, fields in events:
            event = _event(kind, {"type": kind, **fields, "sequence_number": self._events})
            written.append(padded(event) if self._pads and kind.endswith(".delta") else event)
            self._events += 1
        return b"".join(written)


def _end(done: Generation) -> AnswerEnd:
    assert done.finish_reason is not None, f"a response is written after {done.tokens} tokens, and has not ended"
    return done.finish_reason


def _complete(end: AnswerEnd) -> bool:
    return end not in (AnswerEnd.LENGTH, AnswerEnd.FAILED)


def _frame(asked: Asked, origin: Origin) -> dict[str, Any]:
    """Return what a response says of its request, with what was not asked for as it is served."""
    request = origin.request
    text, reasoning, conversation = request.text, request.reasoning, asked.prompt
    assert isinstance(conversation, Conversation), "responses answer conversations"
    return {
        "id": origin.id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "model": request.model,
        "output": [],
        "parallel_tool_calls": conversation.tool_use.parallel,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "prompt_cache_retention": request.prompt_cache_retention,
        "reasoning": {
            "effort": reasoning.effort if reasoning is not None else None,
            "summary": (reasoning.summary or reasoning.generate_summary) if reasoning is not None else None,
        },
        "safety_identifier": request.safety_identifier,
        "service_tier": request.service_tier if request.service_tier not in (None, "auto") else "default",
        "store": request.stores,
        "temperature": asked.sampling.temperature,
        "text": {
            "format": (text.format if text is not None else None) or {"type": "text"},
            "verbosity": (text.verbosity if text is not None else None) or "medium",
        },
        "tool_choice": request.tool_choice or "auto",
        "tools": origin.tools.told,
        "top_logprobs": request.top_logprobs or 0,
        "top_p": asked.sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": request.user,
        "metadata": request.metadata or {},
    }


def _usage(usage: Usage) -> dict[str, Any]:
    written = max([0, *(kept.tokens - usage.cached_tokens for kept in usage.kept)])
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": written},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
