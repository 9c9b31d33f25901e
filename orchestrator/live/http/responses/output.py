"""One answer's items in the making: pieces come in, events about items come out, and the items as they are when it ends.

    Reasoning            a reasoning item: its thoughts as they are, or as a summary where the client asked for one
    text                 a message of one part
    ToolCall, arguments  a function_call, or a custom_tool_call, whose input is told once it is there

An item ends where the next begins, or with the answer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec

from orchestrator.live.http.responses.offered import Named
from orchestrator.live.http.responses.thoughts import carried
from orchestrator.live.text.generation import Piece, Scored, ScoredToken
from orchestrator.live.text.reasoning import Reasoning
from orchestrator.live.text.tools import MoreArguments, ToolCall


class _Input(msgspec.Struct):
    input: str


_INPUT = msgspec.json.Decoder(_Input)
#: An event's type, and what it tells besides its number.
Event = tuple[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Wording:
    """How an answer's items are put."""

    #: Names an item of a kind.
    named: Callable[[str], str]
    #: Shows a token's log probabilities.
    scored: Callable[[ScoredToken], dict[str, Any]]
    #: Tools as the client has them, by what the model calls them.
    tools: Mapping[str, Named]
    #: Thoughts are told as a summary.
    summarises: bool
    #: Thoughts come back by way of the client.
    carries: bool


class Growing(ABC):
    """An item that may still grow."""

    #: The pieces that are more of it and nothing else; None: what more of it tells is not told at once.
    grown_by: ClassVar[type | None] = None

    def __init__(self, name: str, place: int) -> None:
        self.id = name
        self._place = place
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def _at(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self._place}

    def add(self, text: str) -> None:
        """Make it longer."""
        self._texts.append(text)

    @property
    @abstractmethod
    def delta(self) -> Event:
        """The event that tells of more of it, without what is more."""
        ...

    def more(self, text: str) -> Event:
        """Make it longer; return the event that tells so."""
        self.add(text)
        kind, fields = self.delta
        return (kind, {**fields, "delta": text})

    def begin(self) -> list[Event]:
        """Return the events with which it begins."""
        return [("response.output_item.added", {"output_index": self._place, "item": self.shown("in_progress")})]

    def end(self, status: str) -> list[Event]:
        """Return the events with which it ends."""
        return [*self._last(), ("response.output_item.done", {"output_index": self._place, "item": self.shown(status)})]

    @abstractmethod
    def shown(self, status: str) -> dict[str, Any]:
        """Return it as it is now."""
        ...

    @abstractmethod
    def _last(self) -> list[Event]:
        """Return what is said of its content as a whole."""
        ...


class _Texted(Growing):
    """An item whose text is in one part of it."""

    #: Events about the text, and about the part, begin so; and the field that counts parts.
    text_event: ClassVar[str]
    part_event: ClassVar[str] = "response.content_part"
    part_field: ClassVar[str] = "content_index"

    def begin(self) -> list[Event]:
        return [*super().begin(), (f"{self.part_event}.added", {**self._part, "part": self._content})]

    @property
    def delta(self) -> Event:
        return (f"{self.text_event}.delta", self._part)

    def _last(self) -> list[Event]:
        return [
            (f"{self.text_event}.done", {**self._part, "text": self.text}),
            (f"{self.part_event}.done", {**self._part, "part": self._content}),
        ]

    @property
    def _part(self) -> dict[str, Any]:
        return {**self._at, self.part_field: 0}

    @property
    @abstractmethod
    def _content(self) -> dict[str, Any]:
        """The part as it is now."""
        ...


class _Message(_Texted):
    grown_by = str
    text_event = "response.output_text"

    def __init__(self, name: str, place: int) -> None:
        super().__init__(name, place)
        self._scores: list[dict[str, Any]] = []

    @property
    def delta(self) -> Event:
        kind, fields = super().delta
        return (kind, {**fields, "logprobs": []})

    def scored(self, text: str, scores: list[dict[str, Any]]) -> Event:
        """Make it longer by text with its log probabilities; return the event that tells so."""
        self._scores += scores
        kind, fields = self.more(text)
        return (kind, {**fields, "logprobs": scores})

    def shown(self, status: str) -> dict[str, Any]:
        content = [self._content] if self._texts or status != "in_progress" else []
        return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _last(self) -> list[Event]:
        (kind, told), part = super()._last()
        return [(kind, {**told, "logprobs": [*self._scores]}), part]

    @property
    def _content(self) -> dict[str, Any]:
        return {"type": "output_text", "annotations": [], "logprobs": [*self._scores], "text": self.text}


class _Thoughts(_Texted):
    grown_by = Reasoning
    text_event = "response.reasoning_text"

    def __init__(self, name: str, place: int, carries: bool) -> None:
        super().__init__(name, place)
        self._carries = carries

    def shown(self, status: str) -> dict[str, Any]:
        parts = [self._content] if self._texts else []
        told: dict[str, Any] = {"id": self.id, "type": "reasoning", **self._parts(parts), "status": status}
        return {**told, "encrypted_content": carried(self.text)} if self._carries and self._texts else told

    def _parts(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the fields that hold its parts."""
        return {"summary": [], "content": parts}

    @property
    def _content(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": self.text}


class _Summary(_Thoughts):
    text_event = "response.reasoning_summary_text"
    part_event = "response.reasoning_summary_part"
    part_field = "summary_index"

    def _parts(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        return {"summary": parts}

    @property
    def _content(self) -> dict[str, Any]:
        return {"type": "summary_text", "text": self.text}


class _Call(Growing):
    grown_by = MoreArguments

    def __init__(self, name: str, place: int, call: ToolCall, tool: Named) -> None:
        super().__init__(name, place)
        self._called = {"call_id": call.id, "name": tool.name}
        if tool.namespace is not None:
            self._called["namespace"] = tool.namespace

    @property
    def delta(self) -> Event:
        return ("response.function_call_arguments.delta", self._at)

    def shown(self, status: str) -> dict[str, Any]:
        return {"id": self.id, "type": "function_call", **self._called, "arguments": self.text, "status": status}

    def _last(self) -> list[Event]:
        told = {**self._at, "name": self._called["name"], "arguments": self.text}
        return [("response.function_call_arguments.done", told)]


class _CustomCall(_Call):
    grown_by = None

    def shown(self, status: str) -> dict[str, Any]:
        written = "" if status == "in_progress" else self._input
        return {"id": self.id, "type": "custom_tool_call", **self._called, "input": written, "status": status}

    def _last(self) -> list[Event]:
        kind = "response.custom_tool_call_input"
        return [(f"{kind}.delta", {**self._at, "delta": self._input}), (f"{kind}.done", {**self._at, "input": self._input})]

    @property
    def _input(self) -> str:
        """What the model wrote as the input; all that it wrote if it put none where it should."""
        try:
            return _INPUT.decode(self.text).input
        except msgspec.MsgspecError:
            return self.text


class Output:
    """The items of one answer."""

    __slots__ = ("_open", "_scores", "_wording", "items")

    def __init__(self, wording: Wording) -> None:
        self._wording = wording
        self._open: Growing | None = None
        #: Of tokens whose text is still to come; they may turn out to be no message's.
        self._scores: list[dict[str, Any]] = []
        #: Those that have ended.
        self.items: list[dict[str, Any]] = []

    def grown_by(self, piece: Piece) -> tuple[Growing, str] | None:
        """Return the item that a piece is merely more of, and what is more, if it is; `take` takes others."""
        one = self._open
        if (
            one is None
            or self._scores
            or not isinstance(piece, str | Reasoning | MoreArguments)
            or type(piece) is not one.grown_by
        ):
            return None
        return one, piece if isinstance(piece, str) else piece.text

    def take(self, pieces: Sequence[Piece]) -> list[Event]:
        """Return the events of some more of the answer."""
        events: list[Event] = []
        for piece in pieces:
            match piece:
                case str():
                    events += self._say(piece, [])
                case Scored(text, tokens):
                    events += self._say(text, [self._wording.scored(token) for token in tokens])
                case Reasoning(text):
                    events += self._think(text)
                case ToolCall():
                    events += self._call(piece)
                case MoreArguments(text):
                    events += self._go_on(text)
                case _:
                    pass  # what only other APIs tell of
        return events

    def finish(self, complete: bool) -> list[Event]:
        """Return the events with which the answer ends; an answer that says nothing says so in a message."""
        events: list[Event] = []
        said = isinstance(self._open, _Message | _Call) or any(item["type"] != "reasoning" for item in self.items)
        if complete and not said:
            events += self._begin(_Message(self._wording.named("msg"), self._next))
        if isinstance(self._open, _Message) and self._scores:
            events.append(self._open.scored("", self._scores))
        return [*events, *self._end("completed" if complete else "incomplete")]

    @property
    def _next(self) -> int:
        return len(self.items) + (self._open is not None)

    def _say(self, text: str, scores: list[dict[str, Any]]) -> list[Event]:
        self._scores += scores
        if not text:
            return []
        scores, self._scores = self._scores, []
        events: list[Event] = []
        if not isinstance(self._open, _Message):
            events += self._begin(_Message(self._wording.named("msg"), self._next))
            scores = _last_of(scores, len(text.encode()))
        assert isinstance(self._open, _Message), "text goes into a message"
        return [*events, self._open.scored(text, scores)]

    def _think(self, text: str) -> list[Event]:
        self._scores = []
        events: list[Event] = []
        if not isinstance(self._open, _Thoughts):
            kind = _Summary if self._wording.summarises else _Thoughts
            events += self._begin(kind(self._wording.named("rs"), self._next, self._wording.carries))
        assert isinstance(self._open, _Thoughts), "thoughts go into a reasoning item"
        return [*events, self._open.more(text)]

    def _call(self, call: ToolCall) -> list[Event]:
        self._scores = []
        tool = self._wording.tools.get(call.name, Named(call.name))
        kind, short = (_CustomCall, "ctc") if tool.custom else (_Call, "fc")
        item = kind(self._wording.named(short), self._next, call, tool)
        events = self._begin(item)
        return [*events, *self._go_on(call.arguments)] if call.arguments else events

    def _go_on(self, arguments: str) -> list[Event]:
        one = self._open
        assert isinstance(one, _Call), "arguments go on after something that is no call"
        if one.grown_by is not None:
            return [one.more(arguments)]
        one.add(arguments)
        return []

    def _begin(self, item: Growing) -> list[Event]:
        events = self._end("completed")
        self._open = item
        return [*events, *item.begin()]

    def _end(self, status: str) -> list[Event]:
        if self._open is None:
            return []
        one, self._open = self._open, None
        self.items.append(one.shown(status))
        return one.end(status)


def _last_of(scores: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """Return the last tokens, as many as write `size` bytes: those before a message's text are what ended the thoughts."""
    start = len(scores)
    while start and size > 0:
        start -= 1
        size -= len(scores[start]["bytes"])
    return scores[start:]
