"""Reads tool calls that are written as JSON: objects (Hermes, Llama), and names with their arguments (Mistral).

A call is a name and the JSON text of its arguments as the model wrote it, so that a next turn renders to the same prompt.
Arguments that are missing, null or empty are an empty object; what is no object, or nested beyond reading, is no call.
"""

import json
import re
from typing import TypeAlias

import msgspec

#: A tool's name and its arguments as JSON text.
Described: TypeAlias = tuple[str, str]

TOOL_CALLS, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_NAMED = re.compile(r"(?:\[TOOL_CALLS\])?\s*([^\s\[\]{}]+)\s*(?:\[CALL_ID\][^\[\]{}]*)?(?:\[ARGS\])?\s*(?={)")
_JSON = json.JSONDecoder()


class _Call(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")
    parameters: msgspec.Raw = msgspec.Raw()


_CALL = msgspec.json.Decoder(_Call)
_CALLS = msgspec.json.Decoder(list[_Call])


def read_object(text: str) -> Described | None:
    """Return the call that an object describes, or None if it describes none."""
    try:
        return _described(_CALL.decode(text))
    except (ValueError, RecursionError):
        return None


def read_chain(text: str) -> list[Described]:
    """Return the calls in objects separated by semicolons; none at all if anything else is among them."""
    calls: list[Described] = []
    while text:
        try:
            _, end = _JSON.raw_decode(text)
        except (ValueError, RecursionError):
            return []
        call = read_object(text[:end])
        if call is None:
            return []
        calls.append(call)
        text = text[end:].lstrip("; \n")
    return calls


def read_mistral(text: str) -> list[Described]:
    """Return the calls in a list of objects, or in names with arguments; none at all if anything else is among them."""
    text = text.removeprefix(TOOL_CALLS).strip()
    try:
        if text.startswith("["):
            return [call for one in _CALLS.decode(text) if (call := _described(one)) is not None]
        calls: list[Described] = []
        while text:
            named = _NAMED.match(text)
            if named is None:
                return []
            _, end = _JSON.raw_decode(text, named.end())
            call = _described(_Call(named.group(1), msgspec.Raw(text[named.end() : end].encode())))
            if call is None:
                return []
            calls.append(call)
            text = text[end:].strip()
    except (ValueError, RecursionError):
        return []
    return calls


def _described(call: _Call) -> Described | None:
    """Return a call with its arguments as text. Raises `ValueError` or `RecursionError` for what cannot be read."""
    arguments = bytes(call.parameters or call.arguments).decode()
    if arguments.startswith('"'):
        arguments = msgspec.json.decode(arguments, type=str)
    if arguments.strip() in ("", "null"):
        arguments = "{}"
    return (call.name, arguments) if isinstance(json.loads(arguments), dict) else None
