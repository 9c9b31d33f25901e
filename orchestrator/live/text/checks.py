"""Tells whether answers can be kept to grammars, and what in a client's part of one is in the way.

A check is `llguidance` compiling the grammar as engines will: it takes some milliseconds, in a thread, and gives up by itself
where that would take much longer. What it found is remembered for all clients: it depends on nothing but the grammar.

**Why llguidance** (2026-11). With a vocabulary of 151,646 tokens it compiled six schemas in 1 to 18 ms each where xgrammar 0.2.9
took 1 to 110, at equal times for a token (some 10 us, the longest some ms), and it needs no torch, which gateways do not have.
"""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import blake2b
from typing import Any, cast

from llguidance import LLMatcher, LLParserLimits

from orchestrator.live.text.grammars import Grammar, Part, Unkeepable
from orchestrator.live.turns import TurnFailed

#: Grammars of which a gateway remembers whether they can be kept to.
CHECKED_MAX = 1024
#: Checks that may wait for the one that runs.
WAITING_MAX = 256
#: Characters of a whole grammar: it travels with its request.
WHOLE_CHARS_MAX = 1 << 19
#: Parts of a schema that are looked at to say which of them is in the way.
_LOOKS_MAX = 200
#: Of what the library says; more is the grammar itself.
_PROBLEM_CHARS_MAX = 300
_LIMITS = LLParserLimits(verbose_errors=False)
#: Where schemas are in a schema: alone, in lists, by names.
_ALONE = ("items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else")
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


class Checks:
    """One gateway's. Belongs to one event loop."""

    def __init__(self) -> None:
        #: Grammars as engines read them, or what is in the way; least recently asked first.
        self._found: OrderedDict[bytes, str | Unkeepable] = OrderedDict()
        self._running: dict[bytes, asyncio.Future[str | Unkeepable]] = {}
        self._thread = ThreadPoolExecutor(1, "grammars")

    async def check(self, grammar: Grammar) -> str:
        """Return a grammar as engines read it. Raises `Unkeepable`, or `TurnFailed` if too much waits to be checked."""
        text = grammar.text
        if len(text) > WHOLE_CHARS_MAX:
            raise Unkeepable(grammar.field, f"is too large: {len(text)} characters with all around it, {WHOLE_CHARS_MAX} at most")
        fields = "\0".join(part.field for part in grammar.parts)
        key = blake2b(f"{fields}\0{text}".encode(), digest_size=16).digest()
        if key in self._found:
            self._found.move_to_end(key)
            found = self._found[key]
        else:
            found = await self._ask(key, grammar)
        if isinstance(found, Unkeepable):
            raise Unkeepable(found.field, found.problem)
        return found

    async def _ask(self, key: bytes, grammar: Grammar) -> str | Unkeepable:
        running = self._running.get(key)
        if running is None:
            if len(self._running) >= WAITING_MAX:
                raise TurnFailed(529, "overloaded", "too many grammars wait to be checked", 1.0)
            running = asyncio.get_running_loop().run_in_executor(self._thread, keepable, grammar)
            self._running[key] = running
            running.add_done_callback(lambda done: self._done(key, done))
        # Others may wait for it as well.
        return await asyncio.shield(running)

    def _done(self, key: bytes, done: "asyncio.Future[str | Unkeepable]") -> None:
        del self._running[key]
        if not done.cancelled() and done.exception() is None:
            self._found[key] = done.result()
            if len(self._found) > CHECKED_MAX:
                self._found.popitem(last=False)


def keepable(grammar: Grammar) -> str | Unkeepable:
    """Return a grammar as engines read it, or what of it cannot be kept to."""
    parts: list[Part] = []
    for part in grammar.parts:
        problem = _problem(part.written)
        if problem is not None and part.otherwise is None:
            return Unkeepable(part.field + _where(part, problem), problem)
        parts.append(part if problem is None or part.otherwise is None else replace(part, written=part.otherwise))
    text = grammar.text_of(parts)
    # Our own rules may name tokens, of which is warned.
    wrong, messages = LLMatcher.validate_grammar_with_warnings(text, limits=_LIMITS)
    return Unkeepable(grammar.field, messages[0].strip()[:_PROBLEM_CHARS_MAX]) if wrong else text


def _problem(written: Mapping[str, Any]) -> str | None:
    """Return why a part cannot be kept to, None if it can. One that names tokens cannot: clients know texts."""
    _, messages = LLMatcher.validate_grammar_with_warnings(json.dumps({"grammars": [written]}), limits=_LIMITS)
    return messages[0].strip()[:_PROBLEM_CHARS_MAX] if messages else None


def _where(part: Part, problem: str) -> str:
    """Return the way to the innermost schema that has a problem of its own: `.properties.city`, or empty for the whole."""
    if part.schema is None:
        return ""
    shared = {name: part.schema[name] for name in ("$defs", "definitions", "x-guidance") if name in part.schema}
    found, looks = "", _LOOKS_MAX
    inner: Iterator[tuple[str, Any]] | None = _schemas_in(part.schema)
    while inner is not None:
        within, inner = inner, None
        for way, schema in within:
            looks -= 1
            if looks < 0:
                return found
            if (
                isinstance(schema, Mapping)
                and _problem({"json_schema": {**shared, **cast("Mapping[str, Any]", schema)}}) == problem
            ):
                found, inner = found + way, _schemas_in(cast("Mapping[str, Any]", schema))
                break
    return found


def _schemas_in(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the schemas right inside one, each with the way there."""
    for name in _ALONE:
        if name in schema:
            yield f".{name}", schema[name]
    for name in _LISTED:
        if isinstance(schema.get(name), list):
            yield from ((f".{name}[{place}]", one) for place, one in enumerate(schema[name]))
    for name in _NAMED:
        if isinstance(schema.get(name), Mapping):
            yield from ((f".{name}.{key}", one) for key, one in schema[name].items())
