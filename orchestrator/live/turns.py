"""The interface between HTTP gateway and driver: one `Turn` in, one `TokenStream` out.

The gateway (`choices.py` and above) knows text and HTTP; the driver (`driver.py`) knows the cluster and the nodes. This file is
all they share, so that either can be tested against a small stand-in for the other.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.core.making import quickly_made
from orchestrator.core.types import BlockHash, FinishReason, ModelName, RequestId, Sampling, ServiceClass, SessionId, TenantId


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenised, hashed prompt."""

    #: uint32 little-endian, packed.
    tokens: bytes = field(repr=False)
    count: int
    #: Chained hashes of the full blocks.
    hashes: tuple[BlockHash, ...] = field(repr=False)
    #: What the chain starts from (model, tenant and secret in one), for prompts shorter than a block.
    hash_root: BlockHash


@quickly_made
@dataclass(frozen=True, slots=True)
class Turn:
    """One generation the gateway wants."""

    model: ModelName
    tenant: TenantId
    prompt: Prompt
    sampling: Sampling
    output_tokens_max: int
    session: SessionId | None = None
    service_class: ServiceClass = ServiceClass.STANDARD
    priority: int = 0
    #: What clients, logs and traces call the request.
    name: str = ""
    #: As in `Request`.
    beat_s_max: float = 0.0


@dataclass(slots=True)
class TokenLogprob:
    """Log probabilities at one position; `top` is most likely first."""

    logprob: float
    top: list[tuple[int, float]]


class PromptScores:
    """Log probabilities of a prompt's tokens, each given those before it; the first has none.

    They come in runs, in any order, perhaps twice.

    Args:
        count: the prompt's tokens.
        tops: most likely tokens told beside each.
    """

    __slots__ = ("_logprobs", "_missing", "_ranks", "_top_logprobs", "_top_tokens", "tops")

    def __init__(self, count: int, tops: int) -> None:
        self.tops = tops
        self._logprobs = array("f", bytes(4 * count))
        #: 0 where nothing has come.
        self._ranks = array("I", bytes(4 * count))
        self._top_tokens = array("I", bytes(4 * count * tops))
        self._top_logprobs = array("f", bytes(4 * count * tops))
        self._missing = count - 1

    def __len__(self) -> int:
        return len(self._ranks)

    @property
    def complete(self) -> bool:
        """True once all have come."""
        return not self._missing

    def add(
        self,
        first: int,
        logprobs: Sequence[float],
        ranks: Sequence[int],
        top_tokens: Sequence[int],
        top_logprobs: Sequence[float],
    ) -> None:
        """Take those of the tokens from place `first` on.

        Raises:
            ValueError: they are beyond the prompt, or other tokens stand beside each than were asked for.
        """
        count, tops = len(logprobs), len(logprobs) * self.tops
        end = first + count
        if not (1 <= first < end <= len(self)) or (len(ranks), len(top_tokens), len(top_logprobs)) != (count, tops, tops):
            problem = f"{len(ranks)} tokens from {first} on, and {len(top_tokens)} beside them"
            raise ValueError(f"{problem}, for a prompt of {len(self)} with {self.tops} beside each")
        self._missing -= self._ranks[first:end].count(0)
        self._logprobs[first:end] = array("f", logprobs)
        self._ranks[first:end] = array("I", ranks)
        self._top_tokens[first * self.tops : end * self.tops] = array("I", top_tokens)
        self._top_logprobs[first * self.tops : end * self.tops] = array("f", top_logprobs)

    def at(self, place: int) -> tuple[float, int, list[tuple[int, float]]]:
        """Return a token's log probability, its rank from 1 on, and the most likely tokens there; not of the first token."""
        assert 0 < place < len(self._ranks), f"place {place} of a prompt of {len(self._ranks)} tokens"
        wide = slice(place * self.tops, (place + 1) * self.tops)
        top = list(zip(self._top_tokens[wide], self._top_logprobs[wide], strict=True))
        return self._logprobs[place], self._ranks[place], top


@dataclass(slots=True)
class Delta:
    """Everything that came since the last read; never empty, except that the last may hold only the end."""

    tokens: list[int]
    #: One a token, or empty if not asked for.
    logprobs: list[TokenLogprob]
    #: Set on the last delta.
    finish: FinishReason | None = None
    #: Prompt tokens that were not computed again; known from the first token on.
    cached_tokens: int = 0
    #: If they were asked for: of the whole prompt, on the first delta.
    prompt_scores: PromptScores | None = None


class TurnFailed(Exception):
    """A turn ended without success: before its first token (refused) or after it (aborted)."""

    def __init__(self, status: int, code: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s


class TokenStream(Protocol):
    """The output of one turn."""

    @property
    def request(self) -> RequestId: ...

    async def read(self) -> Delta:
        """Wait for more and return all there is. Raises `TurnFailed`. Not to be called after a delta with `finish`."""
        ...

    def answered(self, tool: str) -> None:
        """It was read to its end, and the model waits for a tool now; empty: for none, it has said all it has to say."""
        ...

    def cancel(self) -> None:
        """Nobody wants more: free what the turn holds. Harmless after the end."""
        ...


class TurnDriver(Protocol):
    """The gateway's view of the cluster."""

    def start(self, turn: Turn) -> TokenStream:
        """Start a turn; refusals come out of the first `read`."""
        ...

    @property
    def ready(self) -> bool:
        """True while every model has at least one node that generates."""
        ...
