"""Finds tool calls in what a model writes, in the two styles most open models use, while the text still comes in.

    hermes   text <tool_call>{"name": "f", "arguments": {...}}</tool_call> ...     Hermes, Qwen
    llama    {"name": "f", "parameters": {...}}, alone or after <|python_tag|>     Llama 3

Text around calls streams on as content; a call comes out whole, once it is known to be one. What looked like a call and is none
comes out as content, letter for letter.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from secrets import token_hex
from typing import Protocol

import msgspec

from orchestrator.live.text.detokenise import partial_match

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"
_JSON = json.JSONDecoder()


class ToolStyle(StrEnum):
    """How a model writes tool calls."""

    HERMES = "hermes"
    LLAMA = "llama"
    NONE = "none"

    @property
    def kept_tokens(self) -> tuple[str, ...]:
        """Special tokens the parser must see."""
        return {ToolStyle.HERMES: (_OPEN, _CLOSE), ToolStyle.LLAMA: (_PYTHON_TAG,), ToolStyle.NONE: ()}[self]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call; `arguments` is JSON text as the model wrote it, so that a next turn renders to the same prompt."""

    id: str
    name: str
    arguments: str


class ToolParser(Protocol):
    """Splits one generation into content and calls, in order."""

    def add(self, text: str) -> list[str | ToolCall]:
        """Take more text; return what is certain now."""
        ...

    def finish(self) -> list[str | ToolCall]:
        """Return what was still held back; nothing is added afterwards."""
        ...


class _Call(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")
    parameters: msgspec.Raw = msgspec.Raw()


_CALL = msgspec.json.Decoder(_Call)


def style_of(tool_parser: str, template: str) -> ToolStyle:
    """Return the style a cluster file names; for `auto` the one that the chat template teaches."""
    if tool_parser != "auto":
        return ToolStyle(tool_parser)
    if _OPEN in template:
        return ToolStyle.HERMES
    if _PYTHON_TAG in template or ('"parameters"' in template and "tools" in template):
        return ToolStyle.LLAMA
    return ToolStyle.NONE


def make_parser(style: ToolStyle, names: Collection[str]) -> ToolParser | None:
    """Return a parser for one generation that may call the tools `names`, or None if its text is content throughout."""
    match style:
        case ToolStyle.HERMES:
            return _HermesParser()
        case ToolStyle.LLAMA:
            return _LlamaParser(names)
        case ToolStyle.NONE:
            return None


def _parse(text: str) -> ToolCall | None:
    """Return the call that a JSON object describes, or None if it describes none."""
    try:
        call = _CALL.decode(text)
        arguments = bytes(call.parameters or call.arguments).decode()
        if arguments.startswith('"'):
            arguments = str(json.loads(arguments))
        if not isinstance(json.loads(arguments), dict):
            return None
    except ValueError:
        return None
    return ToolCall(f"call_{token_hex(12)}", call.name, arguments)


class _HermesParser:
    """Waits for tags; white space next to a call belongs to the call."""

    __slots__ = ("_called", "_held", "_inside")

    def __init__(self) -> None:
        #: Text that is not certain yet: a tag's beginning or white space outside a call, everything from the tag on inside.
        self._held = ""
        self._inside = False
        self._called = False

    def add(self, text: str) -> list[str | ToolCall]:
        self._held += text
        parts: list[str | ToolCall] = []
        if self._inside and _CLOSE[-1] not in text:
            return parts
        while self._close(parts) if self._inside else self._open(parts):
            pass
        return parts

    def finish(self) -> list[str | ToolCall]:
        held, self._held = self._held, ""
        if self._inside and (call := _parse(held[len(_OPEN) :])) is not None:
            return [call]
        return [] if not held or (self._called and held.isspace()) else [held]

    def _open(self, parts: list[str | ToolCall]) -> bool:
        """Pass content on up to a tag; True if one was found."""
        content, tag, _ = self._held.partition(_OPEN)
        if tag:
            self._inside = True
            self._held = self._held[len(content) :]
            content = content.rstrip()
        else:
            sure = self._held[: len(self._held) - partial_match(self._held, _OPEN)].rstrip()
            content, self._held = sure, self._held[len(sure) :]
        if content:
            parts.append(content)
        return bool(tag)

    def _close(self, parts: list[str | ToolCall]) -> bool:
        """Take a call out once its end is there; True if it was."""
        inner, tag, rest = self._held[len(_OPEN) :].partition(_CLOSE)
        if not tag:
            return False
        call = _parse(inner)
        parts.append(call if call is not None else _OPEN + inner + _CLOSE)
        self._called = self._called or call is not None
        self._inside, self._held = False, rest
        return True


class _LlamaParser:
    """Looks at how the text begins: a call is all of it or none of it."""

    __slots__ = ("_content", "_held", "_names")

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._content = False

    def add(self, text: str) -> list[str | ToolCall]:
        if self._content:
            return [text] if text else []
        self._held += text
        start = self._held.lstrip()
        if not start or start.startswith(("{", _PYTHON_TAG)) or _PYTHON_TAG.startswith(start):
            return []
        self._content = True
        held, self._held = self._held, ""
        return [held]

    def finish(self) -> list[str | ToolCall]:
        held, self._held = self._held, ""
        calls = self._calls(held.strip().removeprefix(_PYTHON_TAG).strip())
        return [*calls] if calls else [held.replace(_PYTHON_TAG, "", 1)] if held else []

    def _calls(self, text: str) -> list[ToolCall]:
        """Return the calls in objects separated by semicolons; none at all if anything else is between them."""
        calls: list[ToolCall] = []
        while text:
            try:
                _, end = _JSON.raw_decode(text)
            except ValueError:
                return []
            call = _parse(text[:end])
            if call is None or call.name not in self._names:
                return []
            calls.append(call)
            text = text[end:].lstrip("; \n")
        return calls
