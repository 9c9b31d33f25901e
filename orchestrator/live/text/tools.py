"""Finds tool calls in what a model writes, in the styles most open models use, while the text still comes in.

    hermes        text <tool_call>{"name": "f", "arguments": {...}}</tool_call> ...     Hermes, Qwen
    qwen3_coder   text <tool_call><function=f><parameter=x>1</parameter></function></tool_call> ...     Qwen3-Coder
    llama         {"name": "f", "parameters": {...}}, alone or after <|python_tag|>     Llama 3

Text around calls streams on as content; a call comes out whole, once it is known to be one. What looked like a call and is none
comes out as content, letter for letter.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from secrets import token_hex
from typing import Any, Protocol, TypeAlias, cast

import msgspec

from orchestrator.live.text.stops import partial_match

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION = "<function="
_PYTHON_TAG = "<|python_tag|>"
_JSON = json.JSONDecoder()


class ToolStyle(StrEnum):
    """How a model writes tool calls."""

    HERMES = "hermes"
    QWEN3_CODER = "qwen3_coder"
    LLAMA = "llama"
    NONE = "none"

    @property
    def marks(self) -> tuple[str, ...]:
        """Special tokens the parser must see."""
        match self:
            case ToolStyle.HERMES | ToolStyle.QWEN3_CODER:
                return (_OPEN, _CLOSE)
            case ToolStyle.LLAMA:
                return (_PYTHON_TAG,)
            case ToolStyle.NONE:
                return ()


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


#: By the name of each tool the JSON schema of its parameters, empty if it has none.
Tools: TypeAlias = Mapping[str, Mapping[str, Any]]


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
        return ToolStyle.QWEN3_CODER if _FUNCTION in template else ToolStyle.HERMES
    if _PYTHON_TAG in template or ('"parameters"' in template and "tools" in template):
        return ToolStyle.LLAMA
    return ToolStyle.NONE


def make_parser(style: ToolStyle, tools: Tools) -> ToolParser | None:
    """Return a parser for one generation that may call some tools, or None if its text is content throughout."""
    match style:
        case ToolStyle.HERMES:
            return _TaggedParser(_parse)
        case ToolStyle.QWEN3_CODER:
            return _TaggedParser(lambda text: _parse_function(text, tools))
        case ToolStyle.LLAMA:
            return _LlamaParser(tools)
        case ToolStyle.NONE:
            return None


def _parse(text: str) -> ToolCall | None:
    """Return the call that a JSON object describes, or None if it describes none. Missing, null or empty arguments are none."""
    try:
        call = _CALL.decode(text)
        arguments = bytes(call.parameters or call.arguments).decode()
        if arguments.startswith('"'):
            arguments = str(json.loads(arguments))
        if arguments.strip() in ("", "null"):
            arguments = "{}"
        if not isinstance(json.loads(arguments), dict):
            return None
    except (ValueError, RecursionError):  # no JSON, or nested beyond reading
        return None
    return ToolCall(_call_id(), call.name, arguments)


def _call_id() -> str:
    return f"call_{token_hex(12)}"


_XML_CALL = re.compile(r"\s*<function=([^>\s]+)>(.*)</function>\s*", re.DOTALL)
_XML_PARAMETER = re.compile(r"\s*<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


def _parse_function(text: str, tools: Tools) -> ToolCall | None:
    """Return the call that a function's tags describe, or None if they describe none."""
    found = _XML_CALL.fullmatch(text)
    if found is None:
        return None
    name, inner = found.groups()
    properties = tools.get(name, {}).get("properties")
    arguments: dict[str, Any] = {}
    while inner.strip():
        parameter = _XML_PARAMETER.match(inner)
        if parameter is None:
            return None
        key, value = parameter.groups()
        arguments[key] = _typed(value, _object(_object(properties).get(key)))
        inner = inner[parameter.end() :]
    return ToolCall(_call_id(), name, json.dumps(arguments, ensure_ascii=False))


def _object(value: Any) -> Mapping[str, Any]:
    """Return an object of a schema that anybody may have written; what is none says nothing."""
    return cast(Mapping[str, Any], value) if isinstance(value, Mapping) else {}


def _typed(value: str, schema: Mapping[str, Any]) -> Any:
    """Return a parameter as its schema has it: JSON where that is no text; what is none stays text, for the tool to refuse."""
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else cast(list[Any], kinds) if isinstance(kinds, list) else []
    if value.strip() == "null" and (not kinds or "null" in kinds):
        return None
    if "string" in kinds or (not kinds and not {"anyOf", "oneOf", "$ref"} & schema.keys()):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return {"True": True, "False": False}.get(value.strip(), value)


class _TaggedParser:
    """Waits for tags; white space next to a call belongs to the call."""

    __slots__ = ("_called", "_held", "_inside", "_parse")

    def __init__(self, parse: Callable[[str], ToolCall | None]) -> None:
        #: Returns the call that the text between two tags describes.
        self._parse = parse
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
        if self._inside and (call := self._parse(held[len(_OPEN) :])) is not None:
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
        call = self._parse(inner)
        parts.append(call if call is not None else _OPEN + inner + _CLOSE)
        self._called = self._called or call is not None
        self._inside, self._held = False, rest
        return True


class _LlamaParser:
    """Looks at how the text begins: a call is all of it or none of it."""

    __slots__ = ("_content", "_held", "_tools")

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
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
            except (ValueError, RecursionError):
                return []
            call = _parse(text[:end])
            if call is None or call.name not in self._tools:
                return []
            calls.append(call)
            text = text[end:].lstrip("; \n")
        return calls
