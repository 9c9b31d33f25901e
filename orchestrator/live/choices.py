"""One request's generations under way: all its choices are started together, read as they come, and ended together.

    Prepared -> turns -> driver -> tokens -> pieces (`text/generation.py`) -> whoever writes the answer

Does not know in whose words that is, nor over what it goes.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from orchestrator.core.making import quickly_made
from orchestrator.core.types import FinishReason, ModelName, RequestId, ServiceClass
from orchestrator.live.intake import Prepared
from orchestrator.live.text.generation import AnswerEnd, Generation, Piece
from orchestrator.live.turns import Prompt, TokenStream, Turn, TurnDriver


class TurnWatch(Protocol):
    """Measures one generation."""

    def assigned(self, request: RequestId) -> None:
        """The driver took it under this id."""
        ...

    def delivered(self, tokens: int) -> None:
        """So many more tokens came."""
        ...

    def ended(self, reason: FinishReason, wanted: str | None = None) -> None:
        """It is over; what the model waits for (`Generation.wanted`)."""
        ...


class TurnMetrics(Protocol):
    """Measures generations; see `metrics.py`."""

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds, monotonic."""
        ...

    def open_turn(self, model: ModelName, service_class: ServiceClass, arrived_s: float) -> TurnWatch:
        """One generation begins, of a request that arrived then on that clock."""
        ...


class TurnRecorder(Protocol):
    """Writes down generations; see `recorder.py`."""

    def watch(self, turn: Turn, inner: TurnWatch) -> TurnWatch:
        """Return what measures a generation that begins now and passes everything on."""
        ...


@dataclass(frozen=True, slots=True)
class Kept:
    """Tokens at a prompt's beginning that stay cached for some time."""

    tokens: int
    seconds: float


@quickly_made
@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer, all its choices together; a prompt counts once."""

    prompt_tokens: int
    #: Those of the prompts that were not computed again.
    cached_tokens: int
    completion_tokens: int
    #: Those of the completion that are thoughts.
    reasoning_tokens: int = 0
    #: What is kept because the request asked for it.
    kept: Sequence[Kept] = ()


@dataclass(slots=True)
class Choice:
    """One generation under way."""

    index: int
    stream: TokenStream
    generation: Generation
    watch: TurnWatch

    async def read(self) -> list[Piece]:
        """Wait for the next tokens and return what they bring. Raises `TurnFailed`."""
        generation = self.generation
        delta = await self.stream.read()
        self.watch.delivered(len(delta.tokens))
        pieces = generation.take(delta)
        if generation.stopped and delta.finish is None:
            self.stream.cancel()
        if generation.finish_reason is not None:
            wanted = generation.wanted
            self.watch.ended(delta.finish or FinishReason.STOP, wanted)
            if wanted is not None:
                self.stream.answered(wanted)
        return pieces

    def cancel(self) -> None:
        """Free what it holds, unless it has ended."""
        if self.generation.finish_reason is None:
            self.generation.finish_reason = AnswerEnd.CANCELLED
            self.stream.cancel()
            self.watch.ended(FinishReason.CANCELLED)


class Choices:
    """Every choice of every prompt of one request.

    Args:
        prepared: the request.
        name: what clients, logs and traces call it.
        arrived_s: when it arrived, on the clock of what measures it.
    """

    __slots__ = ("_arrived_s", "_choices", "_name", "_prepared", "kept")

    def __init__(self, prepared: Prepared, name: str, arrived_s: float) -> None:
        self._arrived_s = arrived_s
        self._prepared = prepared
        self._name = name
        self._choices: list[Choice] = []
        #: What is kept of their prompts.
        self.kept: Sequence[Kept] = ()

    def start(self, driver: TurnDriver, metrics: TurnMetrics, recorder: TurnRecorder | None) -> None:
        """Start all of them. Whoever calls this calls `cancel` in the end, whatever happens."""
        for prompt in self._prepared.prompts:
            for sample in range(self._prepared.asked.limits.choices):
                turn = self._turn(prompt, sample)
                generation = self._generation(turn)
                watch = metrics.open_turn(self._prepared.model.label, turn.service_class, self._arrived_s)
                stream = driver.start(turn)
                if recorder is not None:
                    watch = recorder.watch(turn, watch)
                watch.assigned(stream.request)
                self._choices.append(Choice(len(self._choices), stream, generation, watch))

    def _turn(self, prompt: Prompt, sample: int) -> Turn:
        prepared = self._prepared
        asked, model = prepared.asked, prepared.model
        room, wanted = model.text.context_tokens_max - prompt.count, asked.limits.output_tokens_max
        if wanted == 0:  # a prompt is computed for a token's sake
            wanted = 1
        return Turn(
            model=model.name,
            tenant=prepared.tenant,
            prompt=prompt,
            sampling=prepared.sampling.for_choice(sample),
            output_tokens_max=room if wanted is None else min(room, wanted),
            session=prepared.session,
            service_class=prepared.service_class,
            priority=asked.hints.priority,
            name=self._name,
            beat_s_max=asked.hints.beat_s_max,
        )

    def _generation(self, turn: Turn) -> Generation:
        limits, report, sampling = self._prepared.asked.limits, self._prepared.asked.report, turn.sampling
        parser, prompt = self._prepared.parser(), turn.prompt.tokens
        vocabulary = self._prepared.model.text.vocabulary
        return Generation(
            vocabulary.detokeniser(prompt, marked=parser is not None, special=report.special_tokens),
            limits.stop_strings,
            frozenset(sampling.stop_token_ids),
            parser,
            scored=sampling.logprobs is not None,
            includes_ends=limits.includes_ends,
            tokens_min=sampling.output_tokens_min,
            told=prompt if report.tells_tokens else None,
            silent=limits.output_tokens_max == 0,
        )

    def __len__(self) -> int:
        return len(self._choices)

    async def collect(self) -> list[tuple[Generation, list[Piece]]]:
        """Read all of them to their ends. Raises `TurnFailed`."""
        collected: list[tuple[Generation, list[Piece]]] = []
        for choice in self._choices:
            pieces: list[Piece] = []
            while choice.generation.finish_reason is None:
                pieces += await choice.read()
            collected.append((choice.generation, pieces))
        return collected

    async def batches(self) -> AsyncGenerator[list[tuple[Choice, list[Piece]]], None]:
        """Yield what they bring, as it comes, until all have ended. Raises `TurnFailed` of whichever fails first."""
        if len(self._choices) == 1:
            [choice] = self._choices
            while choice.generation.finish_reason is None:
                yield [(choice, await choice.read())]
            return
        reads = _reads(self._choices)
        try:
            while reads:
                await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
                batch = [(choice, read.result()) for read, choice in reads.items() if read.done()]
                again = [choice for choice, _ in batch if choice.generation.finish_reason is None]
                reads = {read: choice for read, choice in reads.items() if not read.done()} | _reads(again)
                yield batch
        finally:
            for read in reads:
                read.cancel()
            await asyncio.gather(*reads, return_exceptions=True)

    def cancel(self) -> None:
        """Free what those that have not ended hold."""
        for choice in self._choices:
            choice.cancel()

    @property
    def usage(self) -> Usage:
        """The tokens so far; a prompt's cached tokens are those its first choice found."""
        choices, samples = self._choices, self._prepared.asked.limits.choices
        if len(choices) == 1:
            one = choices[0].generation
            return Usage(self._prepared.prompts[0].count, one.cached_tokens, one.tokens, one.reasoning_tokens, self.kept)
        return Usage(
            prompt_tokens=sum(prompt.count for prompt in self._prepared.prompts),
            cached_tokens=sum(choice.generation.cached_tokens for choice in choices[::samples]),
            completion_tokens=sum(choice.generation.tokens for choice in choices),
            reasoning_tokens=sum(choice.generation.reasoning_tokens for choice in choices),
            kept=self.kept,
        )


def _reads(choices: Sequence[Choice]) -> dict["asyncio.Future[list[Piece]]", Choice]:
    return {asyncio.ensure_future(choice.read()): choice for choice in choices}
