"""Answers in OpenAI's shapes: whole bodies, and streamed events put together from bytes made once per answer.

A streamed event is  head of its choice + the text as a JSON string + tail;  only the middle differs from token to token.
"""

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from orchestrator.core.making import quickly_made
from orchestrator.live.asked import Asked, Texts
from orchestrator.live.choices import Usage
from orchestrator.live.http.errors import HttpError
from orchestrator.live.http.openai.legacy import FUNCTIONS
from orchestrator.live.http.openai.prompts import Echo, by_name, scored_prompt
from orchestrator.live.intake import ServedModel
from orchestrator.live.text.detokenise import Vocabulary
from orchestrator.live.text.generation import AnswerEnd, Generation, Piece, PromptTold, Scored, ScoredToken, Taken
from orchestrator.live.text.reasoning import Reasoning
from orchestrator.live.text.tools import MoreArguments, ToolCall, calls_in

_DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.encode
_END = b"\n\n"
#: Padded events have so many bytes, or a multiple of them, and an end of fixed size.
PADDED_BYTES = 256
#: Types of errors by status; of others it is the client's fault or ours.
_ERROR_TYPES = {
    401: "invalid_request_error",
    403: "permission_error",
    429: "rate_limit_error",
    529: "overloaded_error",
    504: "timeout_error",
}
#: OpenAI's words for why an answer ended.
_REASONS = {
    AnswerEnd.STOP: "stop",
    AnswerEnd.LENGTH: "length",
    AnswerEnd.TOOL_CALLS: "tool_calls",
    AnswerEnd.FAILED: "error",
    AnswerEnd.CANCELLED: "stop",
}


def error_body(error: HttpError, request: str = "") -> bytes:
    """Return OpenAI's error object as JSON, which does not name the request."""
    del request
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return _encode({"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}})


def error_event(error: HttpError) -> bytes:
    """Return an error as it stands in a stream."""
    return b"data: " + error_body(error) + _END


def write_chat(asked: Asked, vocabulary: Vocabulary) -> "ChatWriter":
    """Return the writer of an answer to a chat request."""
    return ChatWriter(_answer("chatcmpl", asked, vocabulary), asked)


def write_completion(asked: Asked, vocabulary: Vocabulary) -> "CompletionWriter":
    """Return the writer of an answer to a completion request."""
    return CompletionWriter(_answer("cmpl", asked, vocabulary), asked)


def model_card(name: str, model: ServedModel, created_unix_s: int) -> dict[str, Any]:
    """Return a model as clients may name it; `root` is the model's own name, and the `parent` of an adapter as well."""
    return {
        "id": name,
        "object": "model",
        "created": created_unix_s,
        "owned_by": "weft",
        "root": model.name,
        "parent": model.name if model.adapter is not None else None,
        "max_model_len": model.text.context_tokens_max,
    }


def _answer(kind: str, asked: Asked, vocabulary: Vocabulary) -> "Answer":
    return Answer(f"{kind}-{random.getrandbits(96):024x}", int(time.time()), asked.model, vocabulary)


@quickly_made
@dataclass(frozen=True, slots=True)
class Answer:
    """What identifies one answer to one request."""

    id: str
    created: int
    #: As the client named it.
    model: str
    vocabulary: Vocabulary


class AnswerWriter(ABC):
    """What chat and plain completions do differently. One object serves one answer.

    A streamed answer with usage ends with it, so that every event before says that it is not that one, or has the usage up to it.

    Args:
        answer: identifies it.
        asked: what it answers.
    """

    #: OpenAI's names for the streamed and for the whole object.
    chunk_object = ""
    whole_object = ""
    #: Whether what is told of a prompt stands beside the choices, not within each.
    prompt_tops = True
    text_before = b""
    text_after = b""

    def __init__(self, answer: Answer, asked: Asked) -> None:
        self._answer = answer
        self._report = asked.report
        self._samples = asked.limits.choices
        #: The usage so far; kept only if events tell it.
        self._usage = Usage(0, 0, 0)
        #: Characters of the prompt before each choice's own text.
        self.chars_before = [0] * asked.generations
        #: Tokens that the next event tells of.
        self._untold: Sequence[int] = ()
        #: What all events begin with, each choice's, and those that are text alone; what they end with.
        self._start = self._tail = self._text_tail = b""
        self._heads: list[bytes] = []
        self._text_heads: list[bytes] = []
        if asked.report.streams:
            self._begin_with({"id": answer.id, "object": self.chunk_object, "created": answer.created, "model": answer.model})
            self._end_with(b'],"usage":null}' if asked.report.usage else b"]}")

    def _begin_with(self, head: dict[str, Any]) -> None:
        """Begin all events so."""
        self._start = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._heads = [self._start + b'{"index":%d,' % index for index in range(len(self.chars_before))]
        self._text_heads = [head + self.text_before for head in self._heads]

    def _end_with(self, tail: bytes) -> None:
        """End all events so from now on."""
        self._tail = tail + _END
        self._text_tail = self.text_after + b',"logprobs":null,"finish_reason":null}' + self._tail

    def events(self, index: int, pieces: Sequence[Piece]) -> list[bytes]:
        """Return one event for each piece of text, two for each tool call."""
        head = self._text_heads[index]
        events: list[bytes] = []
        for piece in pieces:
            if type(piece) is str and not self._untold:
                events.append(head + _encode(piece) + self._text_tail)
            else:
                events += self._special(index, piece)
        if self._untold:
            events.append(self._event(index, self._said("")))
        return [padded(event) for event in events] if self._report.padded else events

    def opening(self, index: int, usage: Usage) -> bytes:
        """Return the event before a choice's first text; empty if there is none."""
        del index, usage
        return b""

    def ending(self, index: int, done: Generation) -> bytes:
        """Return the event that says why a choice ended."""
        return self._event(index, {**self.delta(""), "logprobs": None, "finish_reason": self.reason(done)})

    def closing(self, usage: Usage) -> bytes:
        """Return the last events of a stream: its usage if that was asked for, and the mark that it is complete."""
        told = self._start + b'],"usage":' + _encode(_usage(usage)) + b"}" + _END if self._report.usage else b""
        return told + _DONE

    def broken(self, error: HttpError) -> bytes:
        """Return the last events of a stream that cannot go on."""
        return error_event(error) + _DONE

    def whole(self, generations: Sequence[tuple[Generation, Sequence[Piece]]], usage: Usage) -> bytes:
        """Return the body of an answer that is not streamed."""
        choices = [self.choice_of(index, done, pieces) for index, (done, pieces) in enumerate(generations)]
        answer = self._answer
        head = {"id": answer.id, "object": self.whole_object, "created": answer.created, "model": answer.model}
        prompts = [piece for _, pieces in generations for piece in pieces if isinstance(piece, PromptTold)]
        told = self.prompt_fields(prompts[0]) if prompts and self.prompt_tops else {}
        return _encode({**head, "choices": choices, **told, "usage": _usage(usage)})

    def choice_of(self, index: int, done: Generation, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return a whole answer's choice."""
        scored = [piece for piece in pieces if isinstance(piece, Scored)]
        scores = self.scores(scored, self.chars_before[index]) if scored else None
        reason = self.reason(done)
        choice = {"index": index, **self.message(pieces), "logprobs": scores, "finish_reason": reason}
        if not self.prompt_tops and pieces and isinstance(pieces[0], PromptTold):
            choice |= self.prompt_fields(pieces[0])
        if self._report.token_ids:
            choice["token_ids"] = [token for piece in pieces if isinstance(piece, Taken) for token in piece.tokens]
        return choice

    def reason(self, done: Generation) -> str:
        """Return OpenAI's word for why an answer ended."""
        assert done.finish_reason is not None, f"an answer is written after {done.tokens} tokens, and has not ended"
        return _REASONS[done.finish_reason]

    @abstractmethod
    def delta(self, text: str) -> dict[str, Any]:
        """Return the part of an event's choice that holds new text; empty text is left out where the shape allows."""
        ...

    @abstractmethod
    def message(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return the part of a whole answer's choice that holds its text."""
        ...

    @abstractmethod
    def scores(self, scored: Sequence[Scored], chars_before: int) -> dict[str, Any]:
        """Return log probabilities of text that so many characters of the prompt stand before."""
        ...

    def prompt_fields(self, prompt: PromptTold) -> dict[str, Any]:
        """Return the fields that tell of a prompt what is asked for."""
        fields: dict[str, Any] = {"prompt_token_ids": prompt.tokens} if self._report.token_ids else {}
        if self._report.prompt_scores and prompt.scores is not None:
            fields["prompt_logprobs"] = scored_prompt(prompt.tokens, prompt.scores, self._answer.vocabulary)
        return fields

    def _special(self, index: int, piece: Piece) -> list[bytes]:
        """Return the events of a piece that is more than text."""
        match piece:
            case PromptTold(tokens):
                self._count(len(tokens) if index % self._samples == 0 else 0, 0, 0)
                return self.prompt_events(index, piece)
            case Taken(tokens, cached_tokens):
                self._count(0, len(tokens), cached_tokens)
                self._untold = tokens if self._report.token_ids else ()
                return []
            case str(text):
                return [self._event(index, self._said(text))]
            case Scored(text):
                scores = self.scores([piece], self.chars_before[index])
                return [self._event(index, {**self.delta(text), "logprobs": scores, "finish_reason": None})]
            case _:
                raise AssertionError(f"{type(piece).__name__} in a plain completion")

    def _count(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> None:
        """Take tokens into the usage that further events tell."""
        if self._report.usage_each:
            so_far = self._usage
            self._usage = Usage(
                so_far.prompt_tokens + prompt_tokens,
                max(so_far.cached_tokens, cached_tokens),
                so_far.completion_tokens + completion_tokens,
            )
            self._end_with(b'],"usage":' + _encode(_usage(self._usage)) + b"}")

    def _said(self, text: str) -> dict[str, Any]:
        return {**self.delta(text), "logprobs": None, "finish_reason": None}

    @abstractmethod
    def prompt_events(self, index: int, prompt: PromptTold) -> list[bytes]:
        """Return the events that tell of a prompt what is asked for."""
        ...

    def _event(self, index: int, fields: dict[str, Any]) -> bytes:
        if self._untold:
            fields, self._untold = {**fields, "token_ids": self._untold}, ()
        return self._heads[index] + _encode(fields)[1:] + self._tail


class ChatWriter(AnswerWriter):
    """/v1/chat/completions."""

    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"
    text_before = b'"delta":{"content":'
    text_after = b"}"

    def __init__(self, answer: Answer, asked: Asked) -> None:
        super().__init__(answer, asked)
        self._calls = [0] * asked.generations
        #: A call is told as older clients know it.
        self._functions = asked.origin == FUNCTIONS

    def reason(self, done: Generation) -> str:
        reason = super().reason(done)
        return "function_call" if self._functions and reason == "tool_calls" else reason

    def prompt_events(self, index: int, prompt: PromptTold) -> list[bytes]:
        fields = self.prompt_fields(prompt)
        if not fields:
            return []
        event, tail = self._event(index, self._said("")), self._tail
        return [event[: -len(tail)] + b"]," + _encode(fields)[1:-1] + tail[1:]]

    def opening(self, index: int, usage: Usage) -> bytes:
        del usage
        fields = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return self._event(index, fields)

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def message(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        calls = calls_in(pieces)
        text, thoughts = _joined(pieces), "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        if thoughts:
            message |= _thoughts(thoughts)
        if calls and self._functions:
            message["function_call"] = {"name": calls[0].name, "arguments": calls[0].arguments}
        elif calls:
            message["tool_calls"] = [_call(call, call.arguments) for call in calls]
        return {"message": message}

    def scores(self, scored: Sequence[Scored], chars_before: int) -> dict[str, Any]:
        del chars_before
        vocabulary, by_id = self._answer.vocabulary, self._report.tokens_by_id
        return {"content": [token_score(token, vocabulary, by_id) for piece in scored for token in piece.tokens]}

    def _special(self, index: int, piece: Piece) -> list[bytes]:
        if isinstance(piece, Reasoning):
            return [self._event(index, {"delta": _thoughts(piece.text), "logprobs": None, "finish_reason": None})]
        if isinstance(piece, ToolCall):
            self._calls[index] += 1
            begun = self._call_event(
                index, {"function": {"name": piece.name, "arguments": ""}} if self._functions else _call(piece, "")
            )
            return [begun, self._arguments_event(index, piece.arguments)] if piece.arguments else [begun]
        if isinstance(piece, MoreArguments):
            return [self._arguments_event(index, piece.text)]
        return super()._special(index, piece)

    def _arguments_event(self, index: int, arguments: str) -> bytes:
        return self._call_event(index, {"function": {"arguments": arguments}})

    def _call_event(self, index: int, call: dict[str, Any]) -> bytes:
        """Return an event about the last call that began."""
        told: dict[str, Any] = {"delta": {"tool_calls": [{"index": self._calls[index] - 1, **call}]}}
        if self._functions:
            told = {"delta": {"function_call": call["function"]}}
        return self._event(index, {**told, "logprobs": None, "finish_reason": None})


class CompletionWriter(AnswerWriter):
    """/v1/completions."""

    prompt_tops = False

    chunk_object = "text_completion"
    whole_object = "text_completion"
    text_before = b'"text":'

    def __init__(self, answer: Answer, asked: Asked) -> None:
        super().__init__(answer, asked)
        self._tops = asked.sampling.logprobs
        self._texts = asked.prompt.texts if isinstance(asked.prompt, Texts) else ()

    def delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def message(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        return {"text": _joined(pieces)}

    def choice_of(self, index: int, done: Generation, pieces: Sequence[Piece]) -> dict[str, Any]:
        prompt = pieces[0] if pieces else None
        echo = self._echo(index, prompt) if isinstance(prompt, PromptTold) else None
        if echo is None or not isinstance(prompt, PromptTold):
            return super().choice_of(index, done, pieces)
        self.chars_before[index] = len(echo.text)
        choice = super().choice_of(index, done, pieces)
        choice["text"] = echo.text + choice["text"]
        before, answered = self._echo_scores(echo, prompt), choice["logprobs"]
        if before is not None:
            choice["logprobs"] = {name: [*told, *(answered[name] if answered else ())] for name, told in before.items()}
        return choice

    def prompt_events(self, index: int, prompt: PromptTold) -> list[bytes]:
        echo, fields = self._echo(index, prompt), self.prompt_fields(prompt)
        if echo is not None:
            self.chars_before[index] = len(echo.text)
            return [self._event(index, {**self._said(echo.text), "logprobs": self._echo_scores(echo, prompt), **fields})]
        return [self._event(index, {**self._said(""), **fields})] if fields else []

    def _echo(self, index: int, piece: Piece) -> Echo | None:
        """Return what is to be echoed of a prompt; None for other pieces, and where nothing is."""
        if not (self._report.echoes and isinstance(piece, PromptTold)):
            return None
        given = self._texts[index // self._samples]
        return Echo(piece.tokens, self._answer.vocabulary, given if isinstance(given, str) else None)

    def _echo_scores(self, echo: Echo, prompt: PromptTold) -> dict[str, Any] | None:
        if self._tops is None or prompt.scores is None:
            return None
        return echo.logprobs(prompt.scores, self._tops, self._name)

    def scores(self, scored: Sequence[Scored], chars_before: int) -> dict[str, Any]:
        tokens = [token for piece in scored for token in piece.tokens]
        return {
            "tokens": [self._name(token.token) for token in tokens],
            "token_logprobs": [token.logprob.logprob for token in tokens],
            "top_logprobs": [by_name(token.logprob.top, self._name) for token in tokens],
            "text_offset": [chars_before + token.offset for token in tokens],
        }

    def _name(self, token: int) -> str:
        """Return a token's text; bytes that are none are written as OpenAI writes them, so that they stay apart."""
        if self._report.tokens_by_id:
            return f"token_id:{token}"
        data = self._answer.vocabulary.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def token_score(scored: ScoredToken, vocabulary: Vocabulary, by_id: bool = False) -> dict[str, Any]:
    """Return a token with its log probability and the likeliest beside it; named by their numbers or by their text."""

    def named(token: int, logprob: float) -> dict[str, Any]:
        data = vocabulary.token_bytes(token)
        name = f"token_id:{token}" if by_id else data.decode(errors="backslashreplace")
        return {"token": name, "logprob": logprob, "bytes": list(data)}

    top = [named(*entry) for entry in scored.logprob.top]
    return {**named(scored.token, scored.logprob.logprob), "top_logprobs": top}


def padded(event: bytes) -> bytes:
    """Return an event with OpenAI's field that makes its size one of few."""
    bare = event[: -len(b"}" + _END)] + b',"obfuscation":"'
    return bare + b"x" * (-len(bare) % PADDED_BYTES) + b'"}' + _END


def _usage(usage: Usage) -> dict[str, Any]:
    """Return OpenAI's usage object."""
    thoughts = {"completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens}} if usage.reasoning_tokens else {}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        **thoughts,
    }


def _joined(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text if isinstance(piece, Scored) else piece for piece in pieces if isinstance(piece, str | Scored))


def _thoughts(text: str) -> dict[str, Any]:
    """Return thoughts under both names: vLLM's older one, which DeepSeek's API has too, and its newer one."""
    return {"reasoning_content": text, "reasoning": text}


def _call(call: ToolCall, arguments: str) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}
