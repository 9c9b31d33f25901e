"""One answer in the making: tokens come in, pieces ready to be sent come out.

    tokens -> text (whole characters) -> stop strings cut out -> thoughts and tool calls found -> pieces

Log probabilities travel beside the text: a token's entry comes out with the last of its characters, and not at all if they fell
to a stop string.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from orchestrator.core.types import FinishReason
from orchestrator.live.text.channels import ChannelParser
from orchestrator.live.text.detokenise import Detokeniser
from orchestrator.live.text.reasoning import Reasoning, ThinkParser
from orchestrator.live.text.stops import StopStrings
from orchestrator.live.text.tools import AnswerPart, ToolCall, ToolParser
from orchestrator.live.turns import Delta, PromptScores, TokenLogprob


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token with its log probabilities."""

    token: int
    logprob: TokenLogprob
    #: Characters of the answer before the one in which the token begins.
    offset: int


@dataclass(frozen=True, slots=True)
class Scored:
    """Text with the log probabilities of the tokens that end in it."""

    text: str
    tokens: tuple[ScoredToken, ...]


@dataclass(frozen=True, slots=True)
class PromptTold:
    """What a generation goes on from; comes first, where tokens are to be told."""

    tokens: tuple[int, ...]
    #: Log probabilities of them, if they were asked for.
    scores: PromptScores | None = None


@dataclass(frozen=True, slots=True)
class Taken:
    """Tokens of which the next pieces are made, if they make any; come before them, where tokens are to be told."""

    tokens: tuple[int, ...]
    #: Of the prompt, as far as it is known.
    cached_tokens: int


Piece = Scored | AnswerPart | Reasoning | PromptTold | Taken

AnswerParser = ToolParser | ThinkParser | ChannelParser


class AnswerEnd(StrEnum):
    """Why there is no more of an answer."""

    STOP = "stop"  # the model ended it, or a stop token or string did
    LENGTH = "length"  # it has as many tokens as were asked for, or as there is room for
    TOOL_CALLS = "tool_calls"  # the model ended it and wants tools called
    FAILED = "failed"
    CANCELLED = "cancelled"  # nobody wants more


_ENDS = {FinishReason.LENGTH: AnswerEnd.LENGTH, FinishReason.FAILED: AnswerEnd.FAILED}


class Generation:
    """The state of one answer.

    Args:
        detokeniser: fresh.
        stops: stop strings.
        ends: tokens that end the answer.
        parser: fresh, or None if the answer can hold neither thoughts nor tool calls.
        scored: log probabilities come with the tokens and are wanted.
        includes_ends: what ends the answer is part of it.
        tokens_min: strings that end in the first so many tokens do not end the answer.
        told: the prompt, if tokens are to be told (uint32, packed).
        silent: there is no answer, whatever tokens come.
    """

    __slots__ = (
        "_cut_off", "_detokeniser", "_ends", "_out_chars", "_parser", "_scored", "_scores", "_silent", "_stops", "_tells",
        "_text_chars", "_tokens_min", "_untold",
        "cached_tokens", "finish_reason", "reasoning_tokens", "stopped", "tokens", "tool",
    )  # fmt: skip

    def __init__(
        self,
        detokeniser: Detokeniser,
        stops: Sequence[str],
        ends: Collection[int],
        parser: AnswerParser | None,
        scored: bool,
        includes_ends: bool = False,
        tokens_min: int = 0,
        told: bytes | None = None,
        silent: bool = False,
    ) -> None:
        self._detokeniser = detokeniser
        self._stops = StopStrings(stops, includes_ends) if stops else None
        self._tokens_min = tokens_min
        self._tells = told is not None
        self._silent = silent
        #: The prompt, until it is told.
        self._untold = told
        #: Tokens that are no part of it.
        self._ends = () if includes_ends else ends
        self._parser = parser
        self._scored = scored
        #: Tokens whose text is not out yet, each after the number of characters up to its end.
        self._scores: deque[tuple[int, ScoredToken]] = deque()
        self._text_chars = 0
        #: It ended within the arguments of a call, and not by the model's will.
        self._cut_off = False
        self._out_chars = 0
        #: Tokens generated, the ending one included.
        self.tokens = 0
        #: Those of them that are thoughts.
        self.reasoning_tokens = 0
        self.cached_tokens = 0
        #: The first tool that it calls; empty: none so far.
        self.tool = ""
        #: True once a stop string came: nobody wants more of the turn.
        self.stopped = False
        self.finish_reason: AnswerEnd | None = None

    @property
    def stop_string(self) -> str:
        """The stop string that ended it; empty: none did."""
        return self._stops.found if self._stops is not None else ""

    @property
    def wanted(self) -> str | None:
        """The tool that the model waits for at the end, empty if for none; None if it did not get to say.

        Where a stop string ends it, that may stand for a tool's turn or for anything.
        """
        ended_itself = self.finish_reason in (AnswerEnd.STOP, AnswerEnd.TOOL_CALLS) and not self.stopped
        return self.tool if ended_itself else None

    def take(self, delta: Delta) -> list[Piece]:
        """Return what is ready after some more tokens; `finish_reason` is set once there will be no more."""
        self.cached_tokens = max(self.cached_tokens, delta.cached_tokens)
        if self._silent:
            finish = delta.finish and FinishReason.LENGTH
            delta = replace(delta, tokens=[], logprobs=[], finish=finish)
        before = self.tokens
        if self._stops is None and self._parser is None and not self._scored:
            pieces = self._take_plain(delta.tokens)
        else:
            pieces = self._take_careful(delta)
            if isinstance(self._parser, ThinkParser) and self._parser.idle:
                self._parser = None
        if delta.finish is not None and not self.stopped:
            pieces += self._flush(delta.finish is not FinishReason.STOP)
            self.finish_reason = _ENDS.get(delta.finish, AnswerEnd.STOP)
        if self.stopped:
            self.finish_reason = AnswerEnd.STOP
        if self.tool and not self._cut_off and self.finish_reason is AnswerEnd.STOP:
            self.finish_reason = AnswerEnd.TOOL_CALLS
        if self._tells:
            return [*self._told(delta.tokens[: self.tokens - before], delta.prompt_scores), *pieces]
        return pieces

    def _told(self, tokens: Sequence[int], scores: PromptScores | None) -> list[Piece]:
        """Return what tells of new tokens, and of the prompt before the first."""
        told: list[Piece] = [Taken(tuple(tokens), self.cached_tokens)] if tokens else []
        if self._untold is not None:
            told.insert(0, PromptTold(tuple(memoryview(self._untold).cast("I")), scores))
            self._untold = None
        return told

    def _take_plain(self, tokens: Sequence[int]) -> list[Piece]:
        self.tokens += len(tokens)
        add, ends = self._detokeniser.add, self._ends
        return [text for token in tokens if token not in ends and (text := add(token))]

    def _take_careful(self, delta: Delta) -> list[Piece]:
        pieces: list[Piece] = []
        for place, token in enumerate(delta.tokens):
            self.tokens += 1
            if token in self._ends:
                continue
            start = self._text_chars + self._detokeniser.kept_chars if self._scored else 0
            text = self._detokeniser.add(token)
            if self._scored and delta.logprobs:
                self._scores.append((self._text_chars + len(text), ScoredToken(token, delta.logprobs[place], start)))
            self._text_chars += len(text)
            if self._stops is not None:
                text = self._stops.add(text, self.tokens > self._tokens_min)
            thinking = self._thinking
            pieces += self._pieces(text)
            self.reasoning_tokens += thinking and self._thinking
            if self._stops is not None and self._stops.found:
                self.stopped = True
                return pieces + self._end_parser(cut=True)
        return pieces

    @property
    def _thinking(self) -> bool:
        return isinstance(self._parser, ThinkParser | ChannelParser) and self._parser.thinking

    def _flush(self, cut: bool) -> list[Piece]:
        """Return what was kept back when the tokens ended; `cut`: not because the model ended them."""
        text = self._detokeniser.finish()
        self._text_chars += len(text)
        if self._stops is not None:
            text = self._stops.add(text, self.tokens > self._tokens_min) + self._stops.finish()
            self.stopped = bool(self._stops.found)
        return self._pieces(text) + self._end_parser(cut or self.stopped)

    def _pieces(self, text: str) -> list[Piece]:
        """Return certain text as pieces, with the log probabilities it completes."""
        self._out_chars += len(text)
        scores = self._due()
        parts: list[AnswerPart | Reasoning] = [*self._parser.add(text)] if self._parser is not None else [text] if text else []
        return self._dressed(parts, scores)

    def _end_parser(self, cut: bool) -> list[Piece]:
        if self._parser is None:
            return []
        self._cut_off = cut and self._parser.calling
        return self._dressed([*self._parser.finish(cut)], ())

    def _dressed(self, parts: list[AnswerPart | Reasoning], scores: tuple[ScoredToken, ...]) -> list[Piece]:
        if not self.tool:
            self.tool = next((part.name for part in parts if isinstance(part, ToolCall)), "")
        if not scores:
            return list(parts)
        match parts:
            case [str(first), *rest]:
                return [Scored(first, scores), *rest]
            case _:
                return [Scored("", scores), *parts]

    def _due(self) -> tuple[ScoredToken, ...]:
        """Return the entries whose text is out now."""
        due: list[ScoredToken] = []
        while self._scores and self._scores[0][0] <= self._out_chars:
            due.append(self._scores.popleft()[1])
        return tuple(due)
