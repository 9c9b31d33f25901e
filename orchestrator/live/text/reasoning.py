"""Tells what a model thinks from what it answers, while the text still comes in.

    think    <think> thoughts </think> answer       Qwen3, DeepSeek-R1 and most others; some prompts end with the first tag
    harmony  <|channel|>analysis<|message|> thoughts <|end|> ...    gpt-oss; see `channels.py`

Of tags only those at an answer's beginning count: one further on is text. White space next to the tags belongs to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.core.config import REASONING_PARSERS
from orchestrator.live.text.stops import partial_match
from orchestrator.live.text.tools import AnswerPart, ToolParser

_OPEN, _CLOSE = "<think>", "</think>"
#: Of the Harmony format: what begins a message and tells what it is, what ends it.
CHANNEL, CHANNEL_END = "<|channel|>", "<|end|>"
CHANNEL_MARKS = ("<|start|>", CHANNEL, "<|message|>", "<|constrain|>", CHANNEL_END, "<|call|>", "<|return|>")


class ReasoningStyle(StrEnum):
    """How a model marks its thoughts."""

    THINK = "think"
    HARMONY = "harmony"
    NONE = "none"

    @property
    def marks(self) -> tuple[str, ...]:
        """Special tokens the parser must see."""
        match self:
            case ReasoningStyle.THINK:
                return (_OPEN, _CLOSE)
            case ReasoningStyle.HARMONY:
                return CHANNEL_MARKS
            case ReasoningStyle.NONE:
                return ()

    def opened_by(self, prompt: str, continued: str | None = None) -> bool:
        """Tell whether an answer begins with thoughts.

        Args:
            prompt: what it follows: opened by the tag it ends in, which is the template's; those of clients stand further ahead.
            continued: the message that it continues, if it continues one: opened by a tag in it that is not closed.
        """
        if self is not ReasoningStyle.THINK:
            return False
        if continued is not None:
            return continued.rfind(_OPEN) > continued.rfind(_CLOSE)
        return prompt.rstrip().endswith(_OPEN)


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Some of what a model thinks."""

    text: str


def reasoning_style_of(reasoning_parser: str, template: str) -> ReasoningStyle:
    """Return the style a cluster file names.

    `auto` is `harmony` where the chat template has channels, else `think`: an answer that begins with the tag has begun its
    thoughts, whether or not the template knows of them.
    """
    named = REASONING_PARSERS[reasoning_parser]
    if named != "auto":
        return ReasoningStyle(named)
    return ReasoningStyle.HARMONY if CHANNEL in template else ReasoningStyle.THINK


class ThinkParser:
    """Splits one generation into thoughts and an answer, in which tool calls may be found.

    Args:
        opened: the prompt ended with the first tag.
        tools: finds tool calls in the answer; None if it can hold none.
        shown: thoughts come out; else they are passed over.
    """

    __slots__ = ("_kept", "_opened", "_phase", "_said", "_shown", "_tools")

    def __init__(self, opened: bool, tools: ToolParser | None, shown: bool = True) -> None:
        self._tools = tools
        self._shown = shown
        self._opened = opened
        self._phase = _Phase.START
        #: Text that is not certain yet: what may become a tag, and white space that may belong to one.
        self._kept = ""
        #: Whether thoughts have come out: white space before the first ones is the tag's.
        self._said = False

    @property
    def thinking(self) -> bool:
        """What comes next is thoughts."""
        return self._phase is _Phase.THINKING or (self._phase is _Phase.START and self._opened)

    @property
    def idle(self) -> bool:
        """All that follows is the answer, word for word."""
        return self._phase is _Phase.ANSWER and self._tools is None

    @property
    def calling(self) -> bool:
        """The arguments of a call are being written."""
        return self._tools is not None and self._tools.calling

    def add(self, text: str) -> list[AnswerPart | Reasoning]:
        """Take more text; return what is certain now."""
        if self._phase is _Phase.ANSWER:
            return self._answer(text)
        self._kept += text
        parts: list[AnswerPart | Reasoning] = []
        if self._phase is _Phase.START:
            start = self._kept.lstrip()
            if not start or (len(start) < len(_OPEN) and _OPEN.startswith(start)):
                return parts
            if start.startswith(_OPEN) or self._opened:
                # Some models write the tag again.
                self._kept, self._phase = start.removeprefix(_OPEN), _Phase.THINKING
            else:
                kept, self._kept, self._phase = self._kept, "", _Phase.ANSWER
                return self._answer(kept)
        if self._phase is _Phase.THINKING:
            parts += self._think()
        if self._phase is _Phase.CLOSED and (answer := self._kept.lstrip()):
            self._kept, self._phase = "", _Phase.ANSWER
            parts += self._answer(answer)
        return parts

    def finish(self, cut: bool = False) -> Sequence[AnswerPart | Reasoning]:
        """Return what was still kept back, as `ToolParser` does; nothing is added afterwards."""
        kept, self._kept = self._kept, ""
        parts: list[AnswerPart | Reasoning] = []
        match self._phase:
            case _Phase.THINKING | _Phase.START if self.thinking:
                thought = kept.rstrip() if self._said else kept.strip()
                return [Reasoning(thought)] if thought and self._shown else []
            case _Phase.START:
                parts += self._answer(kept)
            case _:
                pass
        return [*parts, *(self._tools.finish(cut) if self._tools is not None else ())]

    def _think(self) -> list[Reasoning]:
        """Return thoughts up to the tag or to what may become one."""
        thought, tag, rest = self._kept.partition(_CLOSE)
        if tag:
            self._kept, self._phase = rest, _Phase.CLOSED
            thought = thought.rstrip()
        else:
            sure = self._kept[: len(self._kept) - partial_match(self._kept, _CLOSE)].rstrip()
            thought, self._kept = sure, self._kept[len(sure) :]
        if not self._said:
            thought = thought.lstrip()
        self._said = self._said or bool(thought)
        return [Reasoning(thought)] if thought and self._shown else []

    def _answer(self, text: str) -> list[AnswerPart | Reasoning]:
        if self._tools is not None:
            return [*self._tools.add(text)]
        return [text] if text else []


class _Phase(StrEnum):
    START = "start"
    THINKING = "thinking"
    CLOSED = "closed"
    ANSWER = "answer"
