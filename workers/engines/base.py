"""What a node asks of an engine: seven verbs over a paged KV pool.

The node's driver owns one engine and calls `add`, `forget` and `step` from one thread, never two at a time. `read_blocks` and
`write_blocks`, `encode_blocks` and `decode_blocks` may come from other threads while a step runs, but only for blocks that no
running step touches: the node's core guarantees that.

Blocks are numbered 0 to `blocks - 1`. Each is one contiguous slab of `block_bytes` holding the KV of `block_tokens` tokens over
all layers, so that moving a block is one copy and needs no knowledge of the model. Outside of the pool, in lower tiers and on the
way to another host, a block has its *stored form*: the same bytes, or fewer (`engine.kv_format_stored`).
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from orchestrator.core.commands import Slice
from orchestrator.core.experts import Placement
from orchestrator.core.types import BlockId, PooledDrafts, RequestId, Sampling, SplitLoad
from orchestrator.wire.trust import Trust


class NotEncodable(ValueError):
    """KV that the stored form cannot hold: there is a NaN or an infinity among it."""


class EngineLost(Exception):
    """An engine that can compute nothing any more, whatever it is asked: its node should end."""


@dataclass(frozen=True, slots=True)
class BeatCounts:
    """How an engine has kept its beat since its start."""

    beats: int = 0
    #: Beats on which somebody waited for a token that was not computed by their end.
    missed: int = 0
    #: Seconds between the last beat and the beginning of its step.
    late_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineDescription:
    """What an engine is: fixed once it is made."""

    blocks: int
    block_tokens: int
    block_bytes: int
    #: Bytes of a block in its stored form, and what they mean: engines of one model that agree in this read each other's.
    stored_bytes: int
    stored_layout: str
    vocabulary: int
    #: Longest prompt plus output, tokens.
    context_tokens_max: int
    #: Names weights, dtype-independent; nodes of one model must agree, since blocks are exchanged.
    fingerprint: str
    #: cpu, cuda:0, or none.
    device: str
    #: True when a step computes and must run in a thread of its own; False when it returns at once and `pause_s` is waited for.
    computes: bool


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log probabilities (before temperature and truncation) at one sampled position."""

    logprob: float
    #: Most likely first.
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Natural log probabilities of a run of a prompt's tokens, each given those before it."""

    #: The first one's place in the prompt; never 0.
    first: int
    logprobs: "array[float]"
    #: How many tokens are as likely or likelier, itself included.
    ranks: "array[int]"
    #: As many for each token, most likely first.
    top_tokens: "array[int]"
    top_logprobs: "array[float]"

    def __len__(self) -> int:
        return len(self.logprobs)

    def part(self, start: int, end: int) -> "PromptScores":
        """Return the entries [start, end)."""
        tops = len(self.top_tokens) // len(self)
        wide = slice(start * tops, end * tops)
        narrow = self.logprobs[start:end], self.ranks[start:end]
        return PromptScores(self.first + start, *narrow, self.top_tokens[wide], self.top_logprobs[wide])


@dataclass(frozen=True, slots=True)
class SliceOutput:
    """What one slice of a step brought."""

    #: None unless the slice asked to sample; then the sampled token, and one more for each draft that was accepted.
    tokens: tuple[int, ...] = ()
    #: One entry a token, or empty if the request wants none.
    logprobs: tuple[TokenLogprobs, ...] = ()
    #: True when the last token is an end-of-sequence or stop token (it is included in `tokens`).
    stopped: bool = False
    #: Why this sequence cannot go on; the others are not affected.
    failure: str | None = None
    #: Tokens that were drafted and verified, accepted or not: no more than the slice allowed.
    drafted: int = 0
    #: Seconds of the step that a draft model took for this sequence: to draft them or, if there are none, to read what came
    #: before. None: it did nothing, what was drafted was looked up.
    drafting_s: float | None = None
    #: Of the prompt's tokens that follow those of the slice, if the request wants them; of each token once.
    scores: PromptScores | None = None


def broken_promise(engine: "Engine", part: Slice, output: SliceOutput) -> str | None:
    """Return how an output breaks what engines promise, None if it does not.

    A slice that samples brings one token, and one more for each accepted draft, of which it allows `drafts_max`; others bring
    none. The node's scheduler has given the sequence blocks for so many, and would lose track of them otherwise.
    """
    brought = len(output.tokens)
    if output.failure is not None and not brought:
        return None
    if part.sample <= brought <= part.sample + output.drafted and output.drafted <= part.drafts_max:
        return None
    place = f"request {part.request}, tokens {part.start} to {part.start + part.count}"
    drafted = f" and {output.drafted} drafted" if output.drafted else ""
    most = f" to {part.sample + part.drafts_max}" if part.drafts_max else ""
    must = f"it must bring {part.sample:d}{most}"
    return f"{type(engine).__name__} brought {brought} tokens{drafted} for a slice ({place}); {must}"


@dataclass(frozen=True, slots=True)
class NetworkPlace:
    """Where a process listens for those of other hosts that are no gRPC clients, and whom it believes."""

    #: An address of its host; the system chooses the port.
    host: str
    trust: Trust


@dataclass(frozen=True, slots=True)
class SplitPlaces:
    """What an attention rank is told of its group."""

    #: Of the FFN ranks, in their order: the name of one on this host, NAME@HOST:PORT of one on another.
    addresses: tuple[str, ...]
    spare_slots: int = 0
    #: 0: by measurement.
    microbatches: int = 0
    #: Seconds without an answer after which a rank is lost.
    silent_s: float = 10.0
    #: Attention ranks of the group.
    attention: int = 1
    #: What ranks on other hosts are told and asked to be believed; None where there are none.
    trust: Trust | None = None


class ExpertRouting(Protocol):
    """How an attention rank's rows find their FFN ranks: looked at and changed while it computes, by any thread."""

    def take_picks(self) -> list[list[int]]:
        """Return how many rows picked each expert, by layer, since the last call."""
        ...

    def use(self, layer: int, version: int, placement: Placement) -> None:
        """Route a layer's rows by another placement, which all FFN ranks have prepared."""
        ...


class DraftPlaces(Protocol):
    """How a node's engine finds the pool that drafts for it: looked at and told while it computes, by any thread."""

    @property
    def load(self) -> PooledDrafts:
        """What that pool did for it."""
        ...

    def use(self, address: str | None) -> None:
        """Ask the process there from now on; None: nobody."""
        ...


class Engine(Protocol):
    """One model on one device, computing steps over a paged KV pool."""

    @property
    def description(self) -> EngineDescription: ...

    @property
    def pool(self) -> memoryview | None:
        """The whole pool's bytes if they are in host memory (block b at b * block_bytes), else None."""
        ...

    @property
    def routing(self) -> ExpertRouting | None:
        """None where an engine has no FFN ranks whose experts may move."""
        ...

    @property
    def halves(self) -> SplitLoad | None:
        """What either half did since the engine began, of experts nothing; None where it has no FFN ranks."""
        ...

    @property
    def drafts(self) -> DraftPlaces | None:
        """None where no pool drafts for it."""
        ...

    @property
    def beats(self) -> BeatCounts | None:
        """How the beat is kept; None if there is none."""
        ...

    def add(self, request: RequestId, tokens: "array[int]", sampling: Sampling, generated: int = 0) -> None:
        """Take a request's prompt (array of type code "I"). Called once, before its first slice.

        The last `generated` tokens are output that another engine sampled for this request and these settings: what comes after
        them is what would have come there.
        """
        ...

    def forget(self, request: RequestId) -> None:
        """Drop what is kept for a request; unknown ids are ignored. Its blocks may be reused at once."""
        ...

    def step(self, slices: Sequence[Slice]) -> list[SliceOutput]:
        """Compute a step; one output a slice, in order.

        A slice covers tokens [start, start + count) of the request's prompt and output so far. KV of all earlier positions is
        in its blocks already: computed here, or written by `write_blocks`. Sampled tokens are appended to the request's tokens.
        An engine that drafts may bring up to `drafts_max` tokens more than one, which must be those that steps of one token each
        would have brought; an output with others fails its request (`broken_promise`).
        """
        ...

    def pause_s(self, slices: Sequence[Slice], decoding: int) -> float:
        """Return the seconds a step must appear to take beyond its computing: 0 unless the engine only passes time.

        The first `decoding` slices decode; a prompt's last token alone looks like one of them and costs otherwise.
        """
        ...

    def read_blocks(self, blocks: Sequence[BlockId], into: memoryview) -> None:
        """Copy slabs, one after the other, into `into` (len(blocks) * block_bytes bytes)."""
        ...

    def write_blocks(self, blocks: Sequence[BlockId], data: memoryview) -> None:
        """Copy slabs from `data` (len(blocks) * block_bytes bytes) into the pool."""
        ...

    def encode_blocks(self, blocks: Sequence[BlockId], into: memoryview) -> None:
        """Write blocks in their stored form, one after the other, into `into` (len(blocks) * stored_bytes bytes).

        Raises `NotEncodable`; what was written by then means nothing.
        """
        ...

    def decode_blocks(self, blocks: Sequence[BlockId], data: memoryview) -> None:
        """Fill blocks from their stored form (len(blocks) * stored_bytes bytes), made by any engine of this `stored_layout`."""
        ...

    def close(self) -> None:
        """Release the device's memory; nothing is called afterwards."""
        ...
