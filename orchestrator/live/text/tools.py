"""Finds tool calls in what a model writes, in the styles most open models use, while the text still comes in.

    hermes        text <tool_call>{"name": "f", "arguments": {...}}</tool_call> ...     Hermes, Qwen
    qwen3_coder   text <tool_call><function=f><parameter=x>1</parameter></function></tool_call> ...     Qwen3-Coder
    llama         {"name": "f", "parameters": {...}}, alone or after <|python_tag|>     Llama 3
    mistral       text [TOOL_CALLS][{"name": "f", "arguments": {...}}], or [TOOL_CALLS]f[ARGS]{...}     Mistral

Text around calls streams on as content; a call comes out whole, once it is known to be one. What looked like a call and is none
comes out as content, letter for letter.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from secrets import choice, token_hex
from string import ascii_letters, digits
from typing import Protocol

from orchestrator.live.text.functions import FUNCTION_CLOSE, FUNCTION_OPEN, Tools, read_functions
from orchestrator.live.text.objects import ARGUMENTS, CALL_ID, TOOL_CALLS, read_chain, read_mistral, read_object
from orchestrator.live.text.stops import partial_match

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION_END = re.compile(re.escape(FUNCTION_CLOSE))
_CALL_END = re.compile(rf"{FUNCTION_CLOSE}\s*{_CLOSE}")
_PYTHON_TAG = "<|python_tag|>"


class ToolStyle(StrEnum):
    """How a model writes tool calls."""

    HERMES = "hermes"
    QWEN3_CODER = "qwen3_coder"
    LLAMA = "llama"
    MISTRAL = "mistral"
    NONE = "none"

    @property
    def marks(self) -> tuple[str, ...]:
        """Special tokens the parser must see."""
        match self:
            case ToolStyle.HERMES | ToolStyle.QWEN3_CODER:
                return (_OPEN, _CLOSE)
            case ToolStyle.LLAMA:
                return (_PYTHON_TAG,)
            case ToolStyle.MISTRAL:
                return (TOOL_CALLS, ARGUMENTS, CALL_ID)
            case ToolStyle.NONE:
                return ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call; `arguments` is JSON text as the model wrote it, so that a next turn renders to the same prompt.

    While an answer is written, that is its beginning: all of it, some or nothing, and `MoreArguments` follow.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class MoreArguments:
    """How the arguments of the last call that began go on."""

    text: str


def calls_in(pieces: Sequence[object]) -> list[ToolCall]:
    """Return the calls among the pieces of a whole answer, each with all its arguments."""
    calls: list[ToolCall] = []
    for piece in pieces:
        if isinstance(piece, ToolCall):
            calls.append(piece)
        elif isinstance(piece, MoreArguments):
            calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + piece.text)
    return calls


AnswerPart = str | ToolCall | MoreArguments


class ToolParser(Protocol):
    """Splits one generation into content and calls, in order."""

    def add(self, text: str) -> list[AnswerPart]:
        """Take more text; return what is certain now."""
        ...

    def finish(self) -> list[AnswerPart]:
        """Return what was still kept back; nothing is added afterwards."""
        ...


def style_of(tool_parser: str, template: str) -> ToolStyle:
    """Return the style a cluster file names; for `auto` the one that the chat template teaches."""
    if tool_parser != "auto":
        return ToolStyle(tool_parser)
    if _OPEN in template:
        return ToolStyle.QWEN3_CODER if FUNCTION_OPEN in template else ToolStyle.HERMES
    if TOOL_CALLS in template:
        return ToolStyle.MISTRAL
    if _PYTHON_TAG in template or ('"parameters"' in template and "tools" in template):
        return ToolStyle.LLAMA
    return ToolStyle.NONE


def make_parser(style: ToolStyle, tools: Tools) -> ToolParser | None:
    """Return a parser for one generation that may call some tools, or None if its text is content throughout."""
    match style:
        case ToolStyle.HERMES:
            # What is between the tags tells objects from functions, whichever of them the template shows.
            return _TaggedParser((_OPEN,), lambda text: _described(text) or _tagged(text, tools))
        case ToolStyle.QWEN3_CODER:
            return _TaggedParser((_OPEN, FUNCTION_OPEN), lambda text: _tagged(text, tools))
        case ToolStyle.LLAMA:
            return _LlamaParser(tools)
        case ToolStyle.MISTRAL:
            return _TaggedParser((TOOL_CALLS,), _bracketed, ends=False)
        case ToolStyle.NONE:
            return None


def _described(text: str) -> list[ToolCall]:
    call = read_object(text)
    return [] if call is None else [_call(*call)]


def _tagged(text: str, tools: Tools) -> list[ToolCall]:
    return [_call(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in read_functions(text, tools)]


def _call(name: str, arguments: str) -> ToolCall:
    return ToolCall(f"call_{token_hex(12)}", name, arguments)


def _bracketed(text: str) -> list[ToolCall]:
    # Templates of these models refuse ids of any other form.
    calls = read_mistral(text)
    return [ToolCall("".join(choice(ascii_letters + digits) for _ in range(9)), *call) for call in calls]


class _TaggedParser:
    """Waits for tags; white space next to a call belongs to the call.

    Args:
        opens: tags that a call may begin with.
        read: returns the calls that a text between tags describes.
        ends: a tag closes a call; else all that follows the first tag is calls.
    """

    __slots__ = ("_called", "_ends", "_inside", "_kept", "_opens", "_read", "_space")

    def __init__(self, opens: Sequence[str], read: Callable[[str], list[ToolCall]], ends: bool = True) -> None:
        self._opens = opens
        self._ends = ends
        self._read = read
        #: Text that is not certain yet: a tag's beginning or white space outside a call, everything from the tag on inside.
        self._kept = ""
        #: White space before the tag that is kept: a call's, and content's if it is none.
        self._space = ""
        self._inside = False
        self._called = False

    def add(self, text: str) -> list[AnswerPart]:
        self._kept += text
        parts: list[AnswerPart] = []
        if self._inside and (not self._ends or _CLOSE[-1] not in text):
            return parts
        while self._close(parts) if self._inside else self._open(parts):
            pass
        return parts

    def finish(self) -> list[AnswerPart]:
        kept, self._kept = self._kept, ""
        if self._inside and (calls := self._read(kept.removeprefix(_OPEN))):
            return [*calls]
        kept = self._space + kept
        return [] if not kept or (self._called and kept.isspace()) else [kept]

    def _open(self, parts: list[AnswerPart]) -> bool:
        """Pass content on up to a tag; True if one was found."""
        if self._called and self._kept.lstrip().startswith(_CLOSE):
            # Of a call that began without its tag.
            self._kept = self._kept.lstrip()[len(_CLOSE) :]
        places = [place for tag in self._opens if (place := self._kept.find(tag)) >= 0]
        if places:
            self._inside = True
            before, self._kept = self._kept[: min(places)], self._kept[min(places) :]
            content = before.rstrip()
            self._space = before[len(content) :]
        else:
            tags = (*self._opens, _CLOSE) if self._called else self._opens
            kept = max(partial_match(self._kept, tag) for tag in tags)
            content = self._kept[: len(self._kept) - kept].rstrip()
            self._kept = self._kept[len(content) :]
        if content:
            parts.append(content)
            self._called = False
        return self._inside

    def _close(self, parts: list[AnswerPart]) -> bool:
        """Take what is between tags out once its end is there; True if it was."""
        end = self._end()
        if end is None:
            return False
        text, self._kept = self._kept[:end], self._kept[end:]
        calls = self._read(text.removeprefix(_OPEN).removesuffix(_CLOSE))
        parts += calls or [self._space + text]
        self._space = ""
        self._called = bool(calls)
        self._inside = False
        return True

    def _end(self) -> int | None:
        """Return where a call ends. The tag that closes it may be part of a parameter, so a function must have ended before."""
        if not self._ends:
            return None
        inner = self._kept.removeprefix(_OPEN)
        if not inner.lstrip().startswith(FUNCTION_OPEN):
            place = self._kept.find(_CLOSE)
            return place + len(_CLOSE) if place >= 0 else None
        found = (_FUNCTION_END if inner is self._kept else _CALL_END).search(self._kept)
        return found.end() if found is not None else None


class _LlamaParser:
    """Looks at how the text begins: a call is all of it or none of it."""

    __slots__ = ("_content", "_kept", "_tools")

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._kept = ""
        self._content = False

    def add(self, text: str) -> list[AnswerPart]:
        if self._content:
            return [text] if text else []
        self._kept += text
        start = self._kept.lstrip()
        if not start or start.startswith(("{", _PYTHON_TAG)) or _PYTHON_TAG.startswith(start):
            return []
        self._content = True
        kept, self._kept = self._kept, ""
        return [kept]

    def finish(self) -> list[AnswerPart]:
        kept, self._kept = self._kept, ""
        calls = read_chain(kept.strip().removeprefix(_PYTHON_TAG).strip())
        if calls and all(name in self._tools for name, _ in calls):
            return [_call(*call) for call in calls]
        return [kept.replace(_PYTHON_TAG, "", 1)] if kept else []
