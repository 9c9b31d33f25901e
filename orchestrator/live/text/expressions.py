"""Makes one regular expression of a grammar in Lark that does not refer to itself: within a text of JSON, too, it can be kept to.

    start: "a" b*            a(?:x|[0-9]+)*
    b: "x" | /[0-9]+/

What Lark has beyond rules and terminals (templates, %ignore, other grammars than its own common one) is not understood.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Characters of an expression: rules that name others twice each would double it with every step.
EXPRESSION_CHARS_MAX = 1 << 16
#: Rules within rules, and brackets within brackets.
DEPTH_MAX = 100
_TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+|(?://|\#)[^\n]*|\n[ \t\r]*(?=\n|//|\#|\|))|(?P<line>\n\s*)"""
    r"""|(?P<name>[?!]*[A-Za-z_][A-Za-z_0-9]*(?:\.-?\d+(?=\s*:))?)"""
    r"""|(?P<text>"(?:\\.|[^"\\\n])*"i?)|(?P<expression>/(?!/)(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\[\n])+/[imslux]*)"""
    r"""|(?P<number>\d+)|(?P<mark>->|\.\.|[:|()\[\]?*+~,])|(?P<import>%import[ \t]+[^\n]*)"""
)
#: Lark's own terminals, in what they come to.
_COMMON: Mapping[str, str] = {
    "DIGIT": "[0-9]", "HEXDIGIT": "[0-9a-fA-F]", "INT": "[0-9]+", "SIGNED_INT": "[+-]?[0-9]+", "LCASE_LETTER": "[a-z]",
    "UCASE_LETTER": "[A-Z]", "LETTER": "[A-Za-z]", "WORD": "[A-Za-z]+", "CNAME": "[A-Za-z_][A-Za-z_0-9]*",
    "DECIMAL": r"(?:[0-9]+\.[0-9]*|\.[0-9]+)", "WS_INLINE": r"[ \t]+", "WS": r"[ \t\f\r\n]+", "CR": r"\r", "LF": r"\n",
    "NEWLINE": r"(?:\r?\n)+", "ESCAPED_STRING": r'"(?:[^"\\\n]|\\.)*"',
    "FLOAT": r"(?:[0-9]+[eE][+-]?[0-9]+|(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)",
    "NUMBER": r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?",
    "SIGNED_NUMBER": r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?",
}  # fmt: skip
_IMPORT = re.compile(
    r"%import\s+common\s*(?:\.\s*(?P<one>\w+)(?:\s*->\s*(?P<alias>\w+))?|\(\s*(?P<several>[\w\s,]+)\))\s*(?://.*)?"
)


class NoExpression(ValueError):
    """A grammar cannot be made one expression."""


def expression_of(grammar: str) -> str:
    """Return an expression for the texts of a grammar, from its rule `start`. Raises `NoExpression`."""
    rules, known = _rules_of(_tokens_of(grammar))
    return _Rules(rules, known).expression("start")


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str


def _tokens_of(grammar: str) -> list[_Token]:
    tokens, place = [_Token("line", "\n")], 0
    while place < len(grammar):
        found = _TOKEN.match(grammar, place)
        if found is None or found.lastgroup is None:
            raise NoExpression(f"is not understood here: {grammar[place : place + 20]!r}")
        if found.lastgroup != "space":
            tokens.append(_Token(found.lastgroup, found.group()))
        place = found.end()
    return tokens


def _rules_of(tokens: Sequence[_Token]) -> tuple[dict[str, list[_Token]], dict[str, str]]:
    """Return what each rule is made of, and expressions for what is imported."""
    rules: dict[str, list[_Token]] = {}
    imported: dict[str, str] = {}
    rule: list[_Token] | None = None
    for place, token in enumerate(tokens):
        begins = (
            token.kind == "name" and tokens[place - 1].kind == "line" and tokens[place + 1 : place + 2] == [_Token("mark", ":")]
        )
        if begins:
            name = token.text.lstrip("?!").partition(".")[0]
            if name in rules:
                raise NoExpression(f"has two rules called {name!r}")
            rule = rules[name] = []
        elif token.kind == "import":
            imported |= _imported(token.text)
        elif token.kind != "line":
            if rule is None:
                raise NoExpression(f"is not understood here: {token.text!r}")
            rule.append(token)
    return {name: rule[1:] for name, rule in rules.items()}, imported


def _imported(line: str) -> dict[str, str]:
    found = _IMPORT.fullmatch(line.strip())
    names = re.findall(r"\w+", found["several"] or found["one"]) if found is not None else []
    if found is None or any(name not in _COMMON for name in names):
        raise NoExpression(f"imports what is not known here: {line.strip()!r}")
    return {found["alias"] or name: _COMMON[name] for name in names}


class _Rules:
    """Rules, and expressions for those that were needed so far."""

    def __init__(self, rules: Mapping[str, Sequence[_Token]], known: dict[str, str]) -> None:
        self._rules = rules
        self._known = known
        #: Rules within which it is.
        self._within: list[str] = []

    def expression(self, name: str) -> str:
        """Return a rule's expression."""
        if name in self._known:
            return self._known[name]
        if name not in self._rules:
            raise NoExpression(f"has no rule {name!r}")
        if name in self._within:
            raise NoExpression(f"has a rule that refers to itself: {name!r}")
        if len(self._within) >= DEPTH_MAX:
            raise NoExpression(f"has rules within more than {DEPTH_MAX} others")
        self._within.append(name)
        found = _Reader(self._rules[name], self).read()
        self._within.pop()
        self._known[name] = found
        return found


class _Reader:
    """Reads what one rule is made of."""

    def __init__(self, tokens: Sequence[_Token], rules: _Rules) -> None:
        self._tokens = tokens
        self._rules = rules
        self._place = 0
        self._depth = 0

    def read(self) -> str:
        """Return its expression."""
        found = self._choices()
        if self._place < len(self._tokens):
            raise NoExpression(f"is not understood here: {self._tokens[self._place].text!r}")
        return found

    def _choices(self) -> str:
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise NoExpression(f"has brackets within more than {DEPTH_MAX} others")
        choices = [self._series()]
        while self._takes("|"):
            choices.append(self._series())
            _check_length(sum(map(len, choices)))
        self._depth -= 1
        return choices[0] if len(choices) == 1 else f"(?:{'|'.join(choices)})"

    def _series(self) -> str:
        found: list[str] = []
        chars = 0
        while self._place < len(self._tokens) and self._tokens[self._place].text not in ("|", ")", "]", "->"):
            found.append(self._repeated(self._one()))
            chars += len(found[-1])
            _check_length(chars)
        if self._takes("->"):
            self._take("name")
        return "".join(found)

    def _one(self) -> str:
        if self._takes("("):
            found = self._choices()
            self._need(")")
            return found
        if self._takes("["):
            found = self._choices()
            self._need("]")
            return f"(?:{found})?"
        token = self._tokens[self._place]
        self._place += 1
        match token.kind:
            case "name":
                return self._rules.expression(token.text)
            case "text" if self._takes(".."):
                return f"[{_escaped(_said(token.text))}-{_escaped(_said(self._take('text')))}]"
            case "text":
                return f"(?i:{_escaped(_said(token.text))})" if token.text.endswith("i") else _escaped(_said(token.text))
            case "expression":
                inner, _, flags = token.text[1:].rpartition("/")
                return f"(?{flags}:{inner})" if flags else f"(?:{inner})"
            case _:
                raise NoExpression(f"is not understood here: {token.text!r}")

    def _repeated(self, one: str) -> str:
        for mark in "?*+":
            if self._takes(mark):
                return f"(?:{one}){mark}"
        if not self._takes("~"):
            return one
        least = self._take("number")
        return f"(?:{one}){{{least},{self._take('number')}}}" if self._takes("..") else f"(?:{one}){{{least}}}"

    def _takes(self, mark: str) -> bool:
        taken = self._place < len(self._tokens) and self._tokens[self._place] == _Token("mark", mark)
        self._place += taken
        return taken

    def _need(self, mark: str) -> None:
        if not self._takes(mark):
            raise NoExpression(f"lacks a {mark!r}")

    def _take(self, kind: str) -> str:
        if self._place >= len(self._tokens) or self._tokens[self._place].kind != kind:
            raise NoExpression(f"lacks a {kind}")
        self._place += 1
        return self._tokens[self._place - 1].text


def _check_length(chars: int) -> None:
    if chars > EXPRESSION_CHARS_MAX:
        raise NoExpression(f"is longer than {EXPRESSION_CHARS_MAX} characters as one expression")


def _said(text: str) -> str:
    """Return what a text in quotes says."""
    try:
        return str(ast.literal_eval(text.removesuffix("i")))
    except (ValueError, SyntaxError) as error:
        raise NoExpression(f"has a text that is none: {text}") from error


def _escaped(text: str) -> str:
    return re.sub(r"[^\w\s\"'<>/,:;=!@%`&~#\-]", lambda found: "\\" + found.group(), text).replace("-", r"\-")
