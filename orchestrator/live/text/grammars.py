"""What an answer must be, as a grammar that engines keep it to: the parts that clients wrote, and what a model puts around them.

    thoughts?  part        a schema, an expression, a list of texts, a grammar

Grammars are Lark as `llguidance` reads it. Engines keep to them (`workers/engines/grammars.py`); whether they can is told here
(`checks.py`). What cannot be kept to the letter is refused, never approximated.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from orchestrator.live.asked import Constraint, ConstraintKind
from orchestrator.live.text.reasoning import CHANNEL_END, CHANNEL_MARKS, ReasoningStyle

#: Characters of what a client wrote of a grammar.
CHARS_MAX = 1 << 17
#: Rules of a grammar, and references in a schema: each may lead to the next, and the library follows them on its stack.
RULES_MAX = 500
#: Texts to choose from.
CHOICES_MAX = 10_000
#: How JSON may be laid out: as `json.dumps` does, with indentation, with spaces or without. With any white space between two
#: tokens models may go on for ever.
LAYOUT: Mapping[str, Any] = {
    "whitespace_flexible": True,
    "whitespace_pattern": r" ?|\n[ \t]{0,40}",
    "coerce_one_of": False,
    "lenient": False,
}
_RULE = re.compile(r"^\s*[?!]?[\w.-]+\s*(\[[^\]]*\])?\s*(\.\d+\s*)?(:|::=)", re.MULTILINE)
_REFERENCE = re.compile(r'"\$(ref|dynamicRef|recursiveRef)"')


class Unkeepable(ValueError):
    """An answer cannot be kept to what a client wrote at `field`."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Part:
    """What a client wrote of a grammar."""

    #: What our rules call it, after an `@`.
    name: str
    #: `json_schema` or `lark_grammar`, and what it is.
    written: Mapping[str, Any]
    #: Where the client wrote it.
    field: str
    #: What it is replaced by if it cannot be kept to; None: that is refused.
    otherwise: Mapping[str, Any] | None = None

    @property
    def schema(self) -> Mapping[str, Any] | None:
        """The schema, if it is one."""
        return self.written.get("json_schema")


@dataclass(frozen=True, slots=True)
class Grammar:
    """A whole answer's."""

    #: Our rules; the first is `start`.
    rules: str
    parts: Sequence[Part]
    #: What asks for it.
    field: str

    @property
    def text(self) -> str:
        """As engines read it; the same for equal grammars."""
        return self.text_of(self.parts)

    def text_of(self, parts: Sequence[Part]) -> str:
        """Return it with such parts in the place of its own."""
        written = [{"name": part.name, **part.written} for part in parts]
        return json.dumps({"grammars": [{"name": "whole", "lark_grammar": self.rules}, *written]}, separators=(",", ":"))


# --- what clients write -----------------------------------------------------------------------------------------------


def answer_part(constraint: Constraint) -> Part:
    """Return what a constraint says, as the part `answer`. Raises `Unkeepable`."""
    field, text = constraint.field, constraint.text
    _require(len(text) <= CHARS_MAX, field, f"must be at most {CHARS_MAX} characters, is {len(text)}")
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            return schema_part("answer", _read(text, field), field)
        case ConstraintKind.REGEX:
            return Part("answer", {"lark_grammar": _expression(text)}, field)
        case ConstraintKind.CHOICE:
            return Part("answer", {"lark_grammar": _choice(_read(text, field), field)}, field)
        case ConstraintKind.GRAMMAR:
            return Part("answer", {"lark_grammar": _lark(text, field)}, field)


def schema_part(name: str, schema: object, field: str, otherwise: Mapping[str, Any] | None = None) -> Part:
    """Return a JSON schema as a part; `otherwise` is one to keep to if it cannot be. Raises `Unkeepable`."""
    if not isinstance(schema, Mapping):
        raise Unkeepable(field, "must be an object, a JSON schema")
    found = cast("Mapping[str, Any]", schema)
    references = len(_REFERENCE.findall(json.dumps(found)))
    _require(references <= RULES_MAX, field, f"must have at most {RULES_MAX} references, has {references}")
    return Part(name, _laid_out(found), field, None if otherwise is None else _laid_out(otherwise))


def inline_part(name: str, schema: Mapping[str, Any], field: str) -> Part:
    """Return a schema of our own as a part: what is wrong in it is wrong as a whole."""
    return Part(name, {"lark_grammar": f"start: %json {json.dumps({**schema, 'x-guidance': LAYOUT})}"}, field)


def _laid_out(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"json_schema": {**schema, "x-guidance": LAYOUT}}


def _read(text: str, field: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unkeepable(field, f"is not readable as JSON: {error}") from error


def _expression(text: str) -> str:
    return f"start: {expression_literal(text)}"


def _choice(texts: object, field: str) -> str:
    listed = cast("list[object]", texts) if isinstance(texts, list) else []
    _require(0 < len(listed) <= CHOICES_MAX, field, f"must be a list of 1 to {CHOICES_MAX} texts")
    _require(all(isinstance(one, str) for one in listed), field, "must be a list of texts and nothing else")
    return "start: " + " | ".join(literal(str(one)) for one in listed)


def _lark(text: str, field: str) -> str:
    """Return a grammar in Lark, whichever of Lark and EBNF (llama.cpp's) it is in."""
    rules = len(_RULE.findall(text))
    _require(rules <= RULES_MAX, field, f"must have at most {RULES_MAX} rules, has {rules}")
    try:
        return any_to_lark(text)
    except (Exception, RecursionError) as error:  # The library raises what it happens to meet.
        raise Unkeepable(field, f"is neither Lark nor EBNF: {error}") from error


def _require(holds: bool, field: str, problem: str) -> None:
    if not holds:
        raise Unkeepable(field, problem)


# --- what stands around it --------------------------------------------------------------------------------------------


def literal(text: str) -> str:
    """Return a text as Lark has it."""
    return json.dumps(text, ensure_ascii=False)


def expression_literal(text: str) -> str:
    """Return an expression as Lark has it."""
    return json.loads(LLMatcher.grammar_from_regex(text))["grammars"][0]["lark_grammar"].removeprefix("start: ")


def up_to(mark: str, special: int | None, rule: str) -> str:
    """Return a rule for any text up to a mark, which is a token that is no text if it has a number of such."""
    if special is not None:
        return f"{rule}: /(?s:.*)/ <[{special}]>"
    end = re.escape(mark).replace("/", r"\/")
    return f"{rule}[lazy]: /(?s:.*){end}/"


@dataclass(frozen=True, slots=True)
class Thoughts:
    """What an answer begins with."""

    #: The tags around them; empty: an answer has none.
    marks: Sequence[str] = ()
    #: The prompt has opened them.
    opened: bool = False
    #: The answer has channels, one for thoughts and one for what is said: how gpt-oss writes both.
    in_channels: bool = False

    def said(self, rule: str, marks: Mapping[str, int]) -> str:
        """Return the rule for an answer that is no call, in the channel for that where there are channels."""
        _, channel, message, *_ = (mark(one, marks) for one in CHANNEL_MARKS)
        return f'{channel} "final" {message} {rule}' if self.in_channels else rule

    @staticmethod
    def after(prompt: str, style: ReasoningStyle, opened: bool, known: bool) -> "Thoughts":
        """Return what an answer to a prompt may begin with.

        Args:
            prompt: ends with what opens the answer; one that has closed thoughts there wants none.
            style: how the model marks them.
            opened: whether the answer begins with thoughts.
            known: whether the first tag is a token of the model's: others have not learnt to think so.
        """
        if not style.marks:
            return Thoughts()
        closed = prompt.rstrip().endswith(style.marks[1])
        return Thoughts(style.marks, opened) if opened or (known and not closed) else Thoughts()


def whole(
    rule: str, rules: Sequence[str], parts: Sequence[Part], field: str, thoughts: Thoughts, marks: Mapping[str, int]
) -> Grammar:
    """Return a whole answer's grammar.

    Args:
        rule: what comes after thoughts.
        rules: those that it needs, a line each.
        parts: those that they need.
        field: what asks for it.
        thoughts: what it begins with.
        marks: numbers of the marks that are no text.
    """
    if thoughts.in_channels:
        start, channel, message, *_ = (mark(one, marks) for one in CHANNEL_MARKS)
        thinking = f'({channel} "analysis" {message} thought {start} "assistant")?'
        thought = up_to(CHANNEL_END, marks.get(CHANNEL_END), "thought")
        return Grammar("\n".join((f"start: {thinking} ({rule})", thought, *rules)), parts, field)
    if not thoughts.marks:
        return Grammar("\n".join((f"start: {rule}", *rules)), parts, field)
    first, last = thoughts.marks
    opening = "thoughts" if thoughts.opened else f"({mark(first, marks)} thoughts)?"
    lines = (f"start: {opening} {rule}", r"thoughts: thought /[ \t\n]{0,8}/", up_to(last, marks.get(last), "thought"), *rules)
    return Grammar("\n".join(lines), parts, field)


def mark(text: str, marks: Mapping[str, int]) -> str:
    """Return a mark as Lark has it: as the token that it is, or as text."""
    return f"<[{marks[text]}]>" if text in marks else literal(text)
