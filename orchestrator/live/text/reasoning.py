"""Tells what a model thinks from what it answers, while the text still comes in.

    think    <think> thoughts </think> answer       Qwen3, DeepSeek-R1 and most others; some prompts end with the first tag
    harmony  <|channel|>analysis<|message|> thoughts <|end|> ...    gpt-oss; see `channels.py`

Of tags only those at an answer's beginning count: one further on is text. White space next to the tags belongs to them.
Models leave out the end of their thoughts before tool calls: calls that an answer ends with are called, though it ends in
thoughts; others within thoughts are thought.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.core.config import REASONING_PARSERS
from orchestrator.live.text.stops import partial_match
from orchestrator.live.text.tools import AnswerPart, ToolParser

_OPEN, _CLOSE = "<think>", "</think>"
#: Tags of calls within thoughts that are looked at: those of models that write about calls are not to cost much.
_TRIALS_MAX = 8
#: Of the Harmony format: what begins a message and tells what it is, what ends it.
CHANNEL, CHANNEL_END = "<|channel|>", "<|end|>"
CHANNEL_MARKS = ("<|start|>", CHANNEL, "<|message|>", "<|constrain|>", CHANNEL_END, "<|call|>", "<|return|>")
#: Its channels of thoughts and of answers.
THOUGHTS, FINAL = "analysis", "final"


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
        calls: special tokens that calls begin with.
        again: returns another parser like `tools`.
    """

    __slots__ = (
        "_again", "_calls", "_found", "_kept", "_opened", "_phase", "_said", "_shown", "_tag_end", "_tools", "_trial",
        "_trials", "_tried",
    )  # fmt: skip

    def __init__(
        self,
        opened: bool,
        tools: ToolParser | None,
        shown: bool = True,
        calls: Sequence[str] = (),
        again: Callable[[], ToolParser | None] = lambda: None,
    ) -> None:
        self._tools = tools
        self._shown = shown
        self._calls = calls
        self._again = again
        #: Reads what may be calls within thoughts, and what it found.
        self._trial: ToolParser | None = None
        self._found: list[AnswerPart] = []
        #: Of what is kept: how much it has read, and where the tag ends.
        self._tried = 0
        self._tag_end = 0
        self._trials = _TRIALS_MAX
        self._opened = opened
        self._phase = _Phase.START
        #: Text that is not certain yet: what may become a tag, and white space that may belong to one.
        self._kept: str = ""
        #: Whether thoughts have come out: white space before the first ones is the tag's.
        self._said = False

    @property
    def thinking(self) -> bool:
        """What comes next is thoughts."""
        return self._phase in (_Phase.THINKING, _Phase.TRIED) or (self._phase is _Phase.START and self._opened)

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
        while self._step(parts):
            pass
        return parts

    def finish(self, cut: bool = False) -> Sequence[AnswerPart | Reasoning]:
        """Return what was still kept back, as `ToolParser` does; nothing is added afterwards."""
        parts: list[AnswerPart | Reasoning] = []
        if self._phase is _Phase.TRIED:
            assert self._trial is not None
            found = [*self._found, *self._trial.finish(cut)]
            if not cut and found and not any(isinstance(part, str) for part in found):
                return found
            self._trials, self._phase = 0, _Phase.THINKING
            parts += self.add("")
        kept, self._kept = self._kept, ""
        match self._phase:
            case _Phase.THINKING | _Phase.START if self.thinking:
                return [*parts, *self._said_of(kept.rstrip())]
            case _Phase.START:
                parts += self._answer(kept)
            case _:
                pass
        return [*parts, *(self._tools.finish(cut) if self._tools is not None else ())]

    def _step(self, parts: list[AnswerPart | Reasoning]) -> bool:
        """Read on; True if there may be more to do."""
        match self._phase:
            case _Phase.START:
                return self._begin(parts)
            case _Phase.THINKING:
                return self._think(parts)
            case _Phase.TRIED:
                return self._try(parts)
            case _Phase.CLOSED:
                if answer := self._kept.lstrip():
                    self._kept, self._phase = "", _Phase.ANSWER
                    parts += self._answer(answer)
                return False
            case _Phase.ANSWER:
                return False

    def _begin(self, parts: list[AnswerPart | Reasoning]) -> bool:
        start = self._kept.lstrip()
        if not start or (len(start) < len(_OPEN) and _OPEN.startswith(start)):
            return False
        if start.startswith(_OPEN) or self._opened:
            # Some models write the tag again.
            self._kept, self._phase = start.removeprefix(_OPEN), _Phase.THINKING
            return True
        kept, self._kept, self._phase = self._kept, "", _Phase.ANSWER
        parts += self._answer(kept)
        return False

    def _think(self, parts: list[AnswerPart | Reasoning]) -> bool:
        """Pass thoughts on up to a tag or to what may become one."""
        tags = (_CLOSE, *self._calls) if self._trials else (_CLOSE,)
        places = [(place, tag) for tag in tags if (place := self._kept.find(tag)) >= 0]
        if places:
            place, tag = min(places)
            thought = self._kept[:place].rstrip()
            self._kept = self._kept[len(thought) :]
            if tag == _CLOSE:
                self._kept, self._phase = self._kept.lstrip().removeprefix(_CLOSE), _Phase.CLOSED
            else:
                self._phase, self._trial = _Phase.TRIED, self._again()
                self._tried, self._tag_end = 0, place - len(thought) + len(tag)
                self._found = []
        else:
            thought = self._kept[: len(self._kept) - max(partial_match(self._kept, tag) for tag in tags)].rstrip()
            self._kept = self._kept[len(thought) :]
        parts += self._said_of(thought)
        return bool(places)

    def _try(self, parts: list[AnswerPart | Reasoning]) -> bool:
        """Read on in what may be calls; it is thought once more thoughts follow, or their end."""
        assert self._trial is not None
        ended = _CLOSE in self._kept
        if not ended:
            self._found += self._trial.add(self._kept[self._tried :])
            self._tried = len(self._kept)
            if not any(isinstance(part, str) for part in self._found):
                return False
        self._trials -= 1
        self._phase = _Phase.THINKING
        thought, self._kept = self._kept[: self._tag_end], self._kept[self._tag_end :]
        parts += self._said_of(thought)
        return True

    def _said_of(self, thought: str) -> list[Reasoning]:
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
    TRIED = "tried"  # a call may begin
    CLOSED = "closed"
    ANSWER = "answer"
