"""Tells apart what gpt-oss says in one answer, in the Harmony format, while the text still comes in.

    <|channel|>analysis<|message|> thoughts <|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|> arguments <|call|>
    <|start|>assistant<|channel|>final<|message|> answer <|return|>

Commentary for nobody is part of the answer; what is said to tools that nobody has offered is thought. Each answer begins after
`<|start|>assistant`, which ends the prompt; one that begins with neither channel nor recipient is text as it is.
"""

import re
from collections.abc import Callable, Collection
from enum import Enum, auto

from orchestrator.live.text.reasoning import CHANNEL_MARKS, THOUGHTS, Reasoning
from orchestrator.live.text.stops import partial_match
from orchestrator.live.text.tools import AnswerPart, MoreArguments, ToolCall
from orchestrator.live.text.values import ValueReader

_START, _CHANNEL, _MESSAGE, _, *_ENDS = CHANNEL_MARKS
#: What ends a message: its own end, or the next one's beginning where that is left out.
_STOPS = (*_ENDS, _START, _CHANNEL)
_BEGINNINGS = (_START, _CHANNEL, "to=")
_HEADER_CHARS_MAX = 1024
_KIND = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_FUNCTIONS = "functions."
#: A header, or the beginning of one.
_HEADER = re.compile(
    r"\s*(?:<\|start\|>\s*)?(?:\w*\s*)?(?:to=[^\s<]*\s*)?(?:<\|channel\|>\s*\w*\s*)?(?:to=[^\s<]*\s*)?(?:<\|constrain\|>\s*)?\w*\s*"
    r"(?:<[|a-z]*)?"
)


class _At(Enum):
    """What the text that comes is."""

    BEGINNING = auto()  # of the answer
    HEADER = auto()
    THOUGHTS = auto()
    CONTENT = auto()
    PASSED = auto()  # over
    CALL = auto()  # before its arguments
    ARGUMENTS = auto()
    AFTER = auto()  # after a message's end


class ChannelParser:
    """Splits one generation into thoughts, calls and answer.

    Args:
        tools: names of the tools that may be called; None: none may be, and what looks like a call is content.
        make_id: returns an id for a call.
        shown: thoughts come out; else they are passed over.
        parallel: several may be called; else calls after the first are passed over.
        continued: the answer goes on with a message's content.
    """

    __slots__ = ("_at", "_calls", "_header", "_kept", "_make_id", "_parallel", "_said", "_shown", "_tools", "_value")

    def __init__(
        self,
        tools: Collection[str] | None,
        make_id: Callable[[], str],
        shown: bool = True,
        parallel: bool = True,
        continued: bool = False,
    ) -> None:
        self._tools = tools
        self._parallel = parallel
        self._calls = 0
        self._make_id = make_id
        self._shown = shown
        self._at = _At.CONTENT if continued else _At.BEGINNING
        #: Text that is not certain yet: what may become a mark, or a header.
        self._kept: str = ""
        self._header = ""
        self._value = ValueReader(_STOPS)
        #: Whether thoughts, and content, have come out of an earlier message: another one begins on a line of its own.
        self._said = {_At.THOUGHTS: False, _At.CONTENT: False}

    @property
    def thinking(self) -> bool:
        """What comes next is thoughts."""
        return self._at is _At.THOUGHTS

    @property
    def calling(self) -> bool:
        """The arguments of a call are being written."""
        return self._at is _At.ARGUMENTS

    @property
    def idle(self) -> bool:
        """All that follows is the answer, word for word: never, since a mark may come."""
        return False

    def add(self, text: str) -> list[AnswerPart | Reasoning]:
        """Take more text; return what is certain now."""
        self._kept += text
        parts: list[AnswerPart | Reasoning] = []
        while self._kept and self._step(parts):
            pass
        return parts

    def finish(self, cut: bool = False) -> list[AnswerPart | Reasoning]:
        """Return what was still kept back, as `ToolParser` does; nothing is added afterwards."""
        parts: list[AnswerPart | Reasoning] = []
        kept, self._kept = self._kept, ""
        match self._at:
            case _At.ARGUMENTS:
                if more := self._value.finish(cut):
                    parts.append(MoreArguments(more))
            case _At.CALL if not cut:
                self._tell("{}", parts)
            case _At.THOUGHTS | _At.CONTENT:
                self._say(kept, parts)
            case _At.BEGINNING | _At.HEADER if _HEADER.fullmatch(kept) is None:
                self._at = _At.CONTENT
                self._say(kept, parts)
            case _:
                pass
        return parts

    # --- steps: True if there may be more to do -----------------------------------------------------------------------

    def _step(self, parts: list[AnswerPart | Reasoning]) -> bool:
        match self._at:
            case _At.BEGINNING:
                return self._begin()
            case _At.HEADER:
                return self._read_header(parts)
            case _At.THOUGHTS | _At.CONTENT | _At.PASSED:
                return self._read_message(parts)
            case _At.CALL:
                return self._begin_call(parts)
            case _At.ARGUMENTS:
                if more := self._value.add(self._take()):
                    parts.append(MoreArguments(more))
                if self._value.done:
                    self._kept, self._at = self._value.rest, _At.AFTER
                return self._value.done
            case _At.AFTER:
                return self._go_on()

    def _begin(self) -> bool:
        start = self._kept.lstrip()
        if start.startswith(_BEGINNINGS):
            self._at = _At.HEADER
        elif start and not any(one.startswith(start) for one in _BEGINNINGS):
            self._at = _At.CONTENT
        return self._at is not _At.BEGINNING

    def _read_header(self, parts: list[AnswerPart | Reasoning]) -> bool:
        header, mark, rest = self._kept.partition(_MESSAGE)
        if not mark and len(header) <= _HEADER_CHARS_MAX + len(_MESSAGE):
            return False
        if len(header) > _HEADER_CHARS_MAX:
            # What began like one is text.
            self._at = _At.CONTENT
            self._say(self._kept[0], parts)
            self._kept = self._kept[1:]
            return True
        self._kept, self._header = rest, header
        kind, recipient = _KIND.search(header), _RECIPIENT.search(header)
        thought = kind is not None and kind.group(1) == THOUGHTS
        if recipient is not None and self._tools is not None and self._called(recipient.group(1)):
            self._at = _At.CALL if self._parallel or not self._calls else _At.PASSED
        elif thought or (recipient is not None and not recipient.group(1).startswith(_FUNCTIONS)):
            self._at = _At.THOUGHTS
        else:
            self._at = _At.CONTENT
        if self._said.get(self._at):
            self._kept = "\n" + self._kept
        return True

    def _called(self, recipient: str) -> bool:
        return recipient.startswith(_FUNCTIONS) or (self._tools is not None and recipient in self._tools)

    def _read_message(self, parts: list[AnswerPart | Reasoning]) -> bool:
        """Pass a message on up to a mark, or to what may become one."""
        places = [(place, stop) for stop in _STOPS if (place := self._kept.find(stop)) >= 0]
        if places:
            place, stop = min(places)
            text, self._kept = self._kept[:place], self._kept[place + len(stop) * (stop in _ENDS) :]
            self._say(text, parts)
            self._at = _At.AFTER
            return True
        kept = max(partial_match(self._kept, stop) for stop in _STOPS)
        text = self._kept[: len(self._kept) - kept]
        self._kept = self._kept[len(text) :]
        self._say(text, parts)
        return False

    def _begin_call(self, parts: list[AnswerPart | Reasoning]) -> bool:
        """Tell of a call once its arguments begin as an object; there may be none."""
        start = self._kept.lstrip()
        if start.startswith("{"):
            self._kept, self._at = start, _At.ARGUMENTS
            self._value = ValueReader(_STOPS)
            self._tell("", parts)
        elif start.startswith(_STOPS):
            self._kept, self._at = start, _At.AFTER
            self._tell("{}", parts)
        elif start and not any(stop.startswith(start) for stop in _STOPS):
            self._at = _At.CONTENT
        return self._at is not _At.CALL

    def _go_on(self) -> bool:
        """Begin another message."""
        start = self._kept.lstrip()
        if start.startswith((_START, _CHANNEL)):
            self._at = _At.HEADER
        elif (end := next((one for one in _ENDS if start.startswith(one)), "")) != "":
            self._kept = start[len(end) :]
            return True
        elif start and not any(stop.startswith(start) for stop in _STOPS):
            self._at = _At.CONTENT
        return self._at is not _At.AFTER

    # --- what comes out -------------------------------------------------------------------------------------------------

    def _tell(self, arguments: str, parts: list[AnswerPart | Reasoning]) -> None:
        recipient = _RECIPIENT.search(self._header)
        assert recipient is not None
        self._calls += 1
        parts.append(ToolCall(self._make_id(), recipient.group(1).removeprefix(_FUNCTIONS), arguments))

    def _say(self, text: str, parts: list[AnswerPart | Reasoning]) -> None:
        if not text or self._at is _At.PASSED:
            return
        self._said[self._at] = True
        if self._at is _At.CONTENT:
            parts.append(text)
        elif self._shown:
            parts.append(Reasoning(text))

    def _take(self) -> str:
        text, self._kept = self._kept, ""
        return text
