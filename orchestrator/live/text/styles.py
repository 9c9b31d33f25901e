"""How models write tool calls: one style for each family, what teaches it, and what reads it.

    hermes        text <tool_call>{"name": "f", "arguments": {...}}</tool_call> ...     Hermes, Qwen
    qwen3_coder   text <tool_call><function=f><parameter=x>1</parameter></function></tool_call> ...     Qwen3-Coder
    llama         text {"name": "f", "parameters": {...}}, at a line's beginning or after <|python_tag|>     Llama 3
    pythonic      text [f(x=1), g()], at a line's beginning     Llama 3.2 and 4, where their templates teach it
    mistral       text [TOOL_CALLS][{"name": "f", "arguments": {...}}], or [TOOL_CALLS]f[ARGS]{...}     Mistral
    deepseek      text CALLS CALL f SEP {...} END ...; V3 and R1 write  CALL function SEP f, and a block of JSON     DeepSeek-V3.1
    kimi_k2       text SECTION CALL functions.f:0 ARGUMENTS {...} END ...     Kimi-K2
    harmony       channels, see `channels.py`     gpt-oss

Capitals stand for special tokens here. See also: `finding.py`, which tells calls from the text around them; `objects.py`,
`functions.py` and `pythonic.py`, which read them.
"""

import re
from collections.abc import Callable
from enum import StrEnum
from secrets import choice, token_hex
from string import ascii_letters, digits

from orchestrator.core.config import TOOL_PARSERS
from orchestrator.live.text.finding import CallFinder
from orchestrator.live.text.functions import FUNCTION_OPEN, FunctionsReader, Tools
from orchestrator.live.text.objects import NamedReader, ObjectsReader
from orchestrator.live.text.pythonic import PythonReader
from orchestrator.live.text.reasoning import CHANNEL, CHANNEL_MARKS
from orchestrator.live.text.tools import AnswerPart, CallReader, ToolCall, ToolParser

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"
_TOOL_CALLS, _ARGUMENTS, _CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
#: Models write one too many at times.
_BRACKETS = ("}", "]")
_MISTRAL_HEAD = re.compile(r"\s*(?P<name>[^\s\[\]{}]+)\s*(?:\[CALL_ID\][^\[\]{}]*)?(?:\[ARGS\])?\s*(?=\{)")

_DEEPSEEK = tuple(
    f"<\uff5ctool\u2581{words}\uff5c>"
    for words in ("calls\u2581begin", "calls\u2581end", "call\u2581begin", "call\u2581end", "sep")
)
_DEEPSEEK_HEAD = re.compile(
    rf"\s*(?:{_DEEPSEEK[2]}\s*)?(?:function{_DEEPSEEK[4]}(?=[^\n{{]+\n))?"
    rf"(?P<name>[^\s{{<]+)\s*(?:{_DEEPSEEK[4]}|```(?:json)?)\s*(?=\{{)"
)
_KIMI = tuple(f"<|tool_call{words}|>" for words in ("s_section_begin", "s_section_end", "_begin", "_end", "_argument_begin"))
_KIMI_HEAD = re.compile(
    r"\s*(?:<\|tool_call_begin\|>\s*)?(?P<id>(?:functions\.)?(?P<name>[^\s:<{]+)(?::\d+)?)\s*<\|tool_call_argument_begin\|>\s*(?=\{)"
)


class ToolStyle(StrEnum):
    """How a model writes tool calls."""

    HERMES = "hermes"
    QWEN3_CODER = "qwen3_coder"
    LLAMA = "llama"
    PYTHONIC = "pythonic"
    MISTRAL = "mistral"
    DEEPSEEK = "deepseek"
    KIMI_K2 = "kimi_k2"
    HARMONY = "harmony"
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
                return (_TOOL_CALLS, _ARGUMENTS, _CALL_ID)
            case ToolStyle.DEEPSEEK:
                return _DEEPSEEK
            case ToolStyle.KIMI_K2:
                return _KIMI
            case ToolStyle.HARMONY:
                return CHANNEL_MARKS
            case ToolStyle.PYTHONIC | ToolStyle.NONE:
                return ()

    @property
    def openings(self) -> tuple[str, ...]:
        """Special tokens that calls begin with."""
        match self:
            case ToolStyle.HERMES | ToolStyle.QWEN3_CODER | ToolStyle.MISTRAL:
                return self.marks[:1]
            case ToolStyle.DEEPSEEK | ToolStyle.KIMI_K2:
                return self.marks[:3:2]
            case _:
                return ()


#: What templates say that teach a style.
_TAUGHT = {
    CHANNEL: ToolStyle.HARMONY,
    _DEEPSEEK[0]: ToolStyle.DEEPSEEK,
    _KIMI[0]: ToolStyle.KIMI_K2,
    _TOOL_CALLS: ToolStyle.MISTRAL,
    "[func_name1(": ToolStyle.PYTHONIC,
    _PYTHON_TAG: ToolStyle.LLAMA,
}


def style_of(tool_parser: str, template: str) -> ToolStyle:
    """Return the style a cluster file names; for `auto` the one that the chat template teaches."""
    named = TOOL_PARSERS[tool_parser]
    if named != "auto":
        return ToolStyle(named)
    if _OPEN in template:
        return ToolStyle.QWEN3_CODER if FUNCTION_OPEN in template else ToolStyle.HERMES
    for mark, style in _TAUGHT.items():
        if mark in template:
            return style
    return ToolStyle.LLAMA if '"parameters"' in template and "tools" in template else ToolStyle.NONE


def make_parser(style: ToolStyle, tools: Tools, parallel: bool = True) -> ToolParser | None:
    """Return a parser for one generation, or None if its text is content throughout.

    Args:
        style: how its model writes calls.
        tools: what it may call.
        parallel: it may call several; else calls after the first are passed over.
    """
    finder = _finder(style, tools)
    return finder if finder is None or parallel else FirstCall(finder)


def _finder(style: ToolStyle, tools: Tools) -> CallFinder | None:
    match style:
        case ToolStyle.HERMES:
            return CallFinder(lambda _: _tagged(tools), (_OPEN,), (_CLOSE, *_BRACKETS))
        case ToolStyle.QWEN3_CODER:
            return CallFinder(
                lambda tag: _tagged(tools) if tag == _OPEN else FunctionsReader(tools, call_id, tagged=False),
                opens=(_OPEN, FUNCTION_OPEN),
                closes=(_CLOSE, *_BRACKETS),
                parts=(FUNCTION_OPEN,),
            )
        case ToolStyle.LLAMA:
            return CallFinder(
                lambda _: ObjectsReader((), call_id, tools), (_PYTHON_TAG,), _BRACKETS, lines="{[", silent=(_PYTHON_TAG,)
            )
        case ToolStyle.MISTRAL:
            return CallFinder(lambda _: EitherReader(_listed_or_named), (_TOOL_CALLS,), _BRACKETS)
        case ToolStyle.PYTHONIC:
            return CallFinder(lambda _: PythonReader(tools, call_id), (), _BRACKETS, lines="[")
        case ToolStyle.DEEPSEEK:
            calls, ended, call, *ends, _ = _DEEPSEEK
            return CallFinder(
                lambda _: NamedReader(_DEEPSEEK_HEAD, (*ends, call, ended), call_id),
                (calls, call),
                ("```", *ends, ended, *_BRACKETS),
            )
        case ToolStyle.KIMI_K2:
            section, ended, call, *ends, _ = _KIMI
            return CallFinder(
                lambda _: NamedReader(_KIMI_HEAD, (*ends, call, ended), call_id), (section, call), (*ends, ended, *_BRACKETS)
            )
        case ToolStyle.HARMONY | ToolStyle.NONE:
            # Channels are told apart before calls are looked for.
            return None


def _tagged(tools: Tools) -> "EitherReader":
    """Return what reads between tags: what is there tells objects from functions, whichever of them the template shows."""

    def choose(first: str) -> CallReader | None:
        if first in "{[":
            return ObjectsReader((_CLOSE, _OPEN), call_id)
        return FunctionsReader(tools, call_id, tagged=True) if first == "<" else None

    return EitherReader(choose)


def _listed_or_named(first: str) -> CallReader | None:
    # Templates of these models refuse ids of any other form.
    if first in "{[":
        return ObjectsReader((_TOOL_CALLS,), _short_id)
    return NamedReader(_MISTRAL_HEAD, (_TOOL_CALLS,), _short_id)


def call_id() -> str:
    """Return an id for a call."""
    return f"call_{token_hex(12)}"


def _short_id() -> str:
    return "".join(choice(ascii_letters + digits) for _ in range(9))


class EitherReader:
    """Reads what the first character says: asks for a reader for it, None where it begins no call."""

    __slots__ = ("_choose", "_kept", "_reader", "over")

    def __init__(self, choose: Callable[[str], CallReader | None]) -> None:
        self._choose = choose
        self._kept: str = ""
        self._reader: CallReader | None = None
        self.over = False

    @property
    def told(self) -> bool:
        return self._reader is not None and self._reader.told

    @property
    def calling(self) -> bool:
        return self._reader is not None and self._reader.calling

    @property
    def rest(self) -> str:
        return self._kept if self._reader is None else self._reader.rest

    def add(self, text: str) -> list[AnswerPart]:
        """Take more text; return what is certain now of its calls."""
        if self._reader is None:
            self._kept += text
            start = self._kept.lstrip()
            if not start:
                return []
            self._reader, text = self._choose(start[0]), self._kept
            if self._reader is None:
                self.over = True
                return []
        parts = self._reader.add(text)
        self.over = self._reader.over
        return parts

    def finish(self, cut: bool) -> list[AnswerPart]:
        """Return what was still kept back."""
        self.over = True
        return [] if self._reader is None else self._reader.finish(cut)


class FirstCall:
    """Passes on what a parser finds, but of its calls only the first."""

    __slots__ = ("_calls", "_parser")

    def __init__(self, parser: ToolParser) -> None:
        self._parser = parser
        self._calls = 0

    @property
    def calling(self) -> bool:
        """The arguments of the first call are being written."""
        return self._calls == 1 and self._parser.calling

    def add(self, text: str) -> list[AnswerPart]:
        """Take more text; return what is certain now."""
        return self._first(self._parser.add(text))

    def finish(self, cut: bool = False) -> list[AnswerPart]:
        """Return what was still kept back."""
        return self._first(self._parser.finish(cut))

    def _first(self, parts: list[AnswerPart]) -> list[AnswerPart]:
        first: list[AnswerPart] = []
        for part in parts:
            self._calls += isinstance(part, ToolCall)
            if isinstance(part, str) or self._calls == 1:
                first.append(part)
        return first
