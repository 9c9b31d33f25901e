"""Answers in OpenAI's shapes: whole bodies, and streamed events put together from bytes made once per answer.

A streamed event is  head of its choice + the text as a JSON string + tail;  only the middle differs from token to token.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from orchestrator.live.text.detokenise import Vocabulary
from orchestrator.live.text.generation import Generation, Piece, Scored, ScoredToken
from orchestrator.live.text.reasoning import Reasoning
from orchestrator.live.text.tools import ToolCall

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.encode
_END = b"\n\n"


@dataclass(frozen=True, slots=True)
class Answer:
    """What identifies one answer to one request."""

    id: str
    created: int
    #: As the client named it.
    model: str
    vocabulary: Vocabulary


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer, all its choices together; a prompt counts once."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    #: Those of the completion that are thoughts.
    reasoning_tokens: int = 0

    def shape(self) -> dict[str, Any]:
        """Return OpenAI's usage object."""
        thoughts = {"completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens}} if self.reasoning_tokens else {}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            **thoughts,
        }


class Shape(ABC):
    """What chat and plain completions do differently. One object serves one answer.

    Args:
        answer: identifies it.
        choices: how many there are.
        usage_follows: a streamed answer ends with its usage, so that every event says it is not that one.
    """

    #: OpenAI's names for the streamed and for the whole object.
    chunk_object = ""
    whole_object = ""
    text_before = b""
    text_after = b""

    def __init__(self, answer: Answer, choices: int, usage_follows: bool) -> None:
        self._answer = answer
        head = {"id": answer.id, "object": self.chunk_object, "created": answer.created, "model": answer.model}
        start = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._start = start
        self._tail = (b'],"usage":null}' if usage_follows else b"]}") + _END
        self._heads = [start + b'{"index":%d,' % index for index in range(choices)]
        self._text_heads = [head + self.text_before for head in self._heads]
        self._text_tail = self.text_after + b',"logprobs":null,"finish_reason":null}' + self._tail

    def events(self, index: int, pieces: Sequence[Piece]) -> list[bytes]:
        """Return one event for each piece of text, two for each tool call."""
        head, tail = self._text_heads[index], self._text_tail
        events: list[bytes] = []
        for piece in pieces:
            if type(piece) is str:
                events.append(head + _encode(piece) + tail)
            else:
                events += self._special(index, piece)
        return events

    def opening(self, index: int) -> bytes:
        """Return the event before a choice's first text; empty if there is none."""
        del index
        return b""

    def ending(self, index: int, reason: str) -> bytes:
        """Return the event that says why a choice ended."""
        return self._event(index, {**self.delta(""), "logprobs": None, "finish_reason": reason})

    def usage(self, usage: Usage) -> bytes:
        """Return the event with the usage."""
        return self._start + b'],"usage":' + _encode(usage.shape()) + b"}" + _END

    def whole(self, generations: Sequence[tuple[Generation, Sequence[Piece]]], usage: Usage) -> bytes:
        """Return the body of an answer that is not streamed."""
        choices = [
            {"index": index, **self.message(pieces), "logprobs": self._all_scores(pieces), "finish_reason": done.finish_reason}
            for index, (done, pieces) in enumerate(generations)
        ]
        answer = self._answer
        head = {"id": answer.id, "object": self.whole_object, "created": answer.created, "model": answer.model}
        return _encode({**head, "choices": choices, "usage": usage.shape()})

    @abstractmethod
    def delta(self, text: str) -> dict[str, Any]:
        """Return the part of an event's choice that holds new text; empty text is left out where the shape allows."""
        ...

    @abstractmethod
    def message(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return the part of a whole answer's choice that holds its text."""
        ...

    @abstractmethod
    def scores(self, scored: Sequence[Scored]) -> dict[str, Any]:
        """Return log probabilities."""
        ...

    def _all_scores(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        scored = [piece for piece in pieces if isinstance(piece, Scored)]
        return self.scores(scored) if scored else None

    def _special(self, index: int, piece: Piece) -> list[bytes]:
        """Return the events of a piece that is more than text."""
        assert isinstance(piece, Scored), f"{type(piece).__name__} in a plain completion"
        return [self._event(index, {**self.delta(piece.text), "logprobs": self.scores([piece]), "finish_reason": None})]

    def _event(self, index: int, fields: dict[str, Any]) -> bytes:
        return self._heads[index] + _encode(fields)[1:] + self._tail


class ChatShape(Shape):
    """/v1/chat/completions."""

    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"
    text_before = b'"delta":{"content":'
    text_after = b"}"

    def __init__(self, answer: Answer, choices: int, usage_follows: bool) -> None:
        super().__init__(answer, choices, usage_follows)
        self._calls = [0] * choices

    def opening(self, index: int) -> bytes:
        fields = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return self._event(index, fields)

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def message(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
        text, thoughts = _joined(pieces), "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        if thoughts:
            message |= _thoughts(thoughts)
        if calls:
            message["tool_calls"] = [_call(call, call.arguments) for call in calls]
        return {"message": message}

    def scores(self, scored: Sequence[Scored]) -> dict[str, Any]:
        return {"content": [self._score(token) for piece in scored for token in piece.tokens]}

    def _score(self, scored: ScoredToken) -> dict[str, Any]:
        top = [self._named(*entry) for entry in scored.logprob.top]
        return {**self._named(scored.token, scored.logprob.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._answer.vocabulary.token_bytes(token)
        return {"token": data.decode(errors="backslashreplace"), "logprob": logprob, "bytes": list(data)}

    def _special(self, index: int, piece: Piece) -> list[bytes]:
        if isinstance(piece, Reasoning):
            return [self._event(index, {"delta": _thoughts(piece.text), "logprobs": None, "finish_reason": None})]
        if not isinstance(piece, ToolCall):
            return super()._special(index, piece)
        place = self._calls[index]
        self._calls[index] += 1
        first = {"index": place, **_call(piece, "")}
        second = {"index": place, "function": {"arguments": piece.arguments}}
        rest = {"logprobs": None, "finish_reason": None}
        return [self._event(index, {"delta": {"tool_calls": [call]}, **rest}) for call in (first, second)]


class CompletionShape(Shape):
    """/v1/completions."""

    chunk_object = "text_completion"
    whole_object = "text_completion"
    text_before = b'"text":'

    def delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def message(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        return {"text": _joined(pieces)}

    def scores(self, scored: Sequence[Scored]) -> dict[str, Any]:
        tokens = [token for piece in scored for token in piece.tokens]
        return {
            "tokens": [self._name(token.token) for token in tokens],
            "token_logprobs": [token.logprob.logprob for token in tokens],
            "top_logprobs": [self._named(token.logprob.top) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _name(self, token: int) -> str:
        """Return a token's text; bytes that are none are written as OpenAI writes them, so that they stay apart."""
        data = self._answer.vocabulary.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _named(self, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Return log probabilities by name; of tokens of one name (a special one may be called like another) the likeliest."""
        named: dict[str, float] = {}
        for token, logprob in top:
            named.setdefault(self._name(token), logprob)
        return named


def _joined(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text if isinstance(piece, Scored) else piece for piece in pieces if isinstance(piece, str | Scored))


def _thoughts(text: str) -> dict[str, Any]:
    """Return thoughts under both names: vLLM's older one, which DeepSeek's API has too, and its newer one."""
    return {"reasoning_content": text, "reasoning": text}


def _call(call: ToolCall, arguments: str) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}
