"""The interface between HTTP gateway and driver: one `Turn` in, one `TokenStream` out.

The gateway (`choices.py` and above) knows text and HTTP; the driver (`driver.py`) knows the cluster and the nodes. This file is
all they share, so that either can be tested against a small stand-in for the other.
"""

from dataclasses import dataclass, field
from typing import Protocol

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
