"""What harnesses say and hear, as plain Python: targets and actions in, results out. Knows messages, but neither client nor gRPC.

    pin(session("my-session"), ttl_s=600)     an action on a target
    Result(outcome=Outcome.APPLIED, ...)      what became of it

See also: `proto/orchestrator/wire/cache.proto`, which says what each word means.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.core.hints import Outcome
from orchestrator.core.types import Tier
from orchestrator.wire import cache_pb2
from orchestrator.wire.cache_codec import OUTCOMES, TIERS, TIERS_TOLD

Target = cache_pb2.Target
Action = cache_pb2.Action


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one action."""

    action_id: str
    outcome: Outcome
    #: One word for programs, and a sentence for people; both empty if it was simply applied.
    reason: str = ""
    message: str = ""
    #: The lease that was placed, renewed, lowered or ended.
    lease: str = ""
    #: What was done or granted.
    blocks: int = 0
    tokens: int = 0
    size_bytes: int = 0
    tier: Tier | None = None
    ttl_s: float = 0.0
    #: With DUPLICATE: the outcome of the first time.
    first: Outcome | None = None

    @property
    def done(self) -> bool:
        """Whether it has, or had before, all or a part of its effect."""
        return self.outcome in (Outcome.APPLIED, Outcome.CLIPPED, Outcome.DEFERRED, Outcome.DUPLICATE)


@dataclass(frozen=True, slots=True)
class Holding:
    """Somebody holds the first `blocks` of a target."""

    tier: Tier
    #: A node or a store; empty for what all share.
    holder: str
    blocks: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease, as it is now."""

    id: str
    model: str
    tier: Tier
    blocks: int
    size_bytes: int
    #: Seconds left.
    ttl_s: float
    session: str


@dataclass(frozen=True, slots=True)
class Effect:
    """What an action has brought since it was done."""

    message_id: str
    action_id: str
    #: "pin", "prefetch", ...
    verb: str
    lease: str
    #: Bytes that it kept, had brought or let go.
    size_bytes: int
    #: Tokens of later prompts that were found of what it is about, and those that would not have been without it.
    found_tokens: int
    earned_tokens: int
    #: Seconds that those would have cost.
    saved_s: float
    #: How a prefetch into hbm has ended: "used", "lapsed", "cancelled", "no_room", "not_found"; empty if it has not, or is none.
    ended: str


@dataclass(frozen=True, slots=True)
class Residency:
    """Where a target's KV is; nothing but outcome, reason and message unless the outcome is APPLIED."""

    outcome: Outcome
    reason: str = ""
    message: str = ""
    model: str = ""
    blocks: int = 0
    tokens: int = 0
    size_bytes: int = 0
    #: Most first.
    holdings: tuple[Holding, ...] = ()
    leases: tuple[Lease, ...] = ()
    hashes: tuple[bytes, ...] = ()
    #: What the tenant's actions on it have brought, oldest action first.
    effects: tuple[Effect, ...] = ()

    def held_tokens(self, tier: Tier | None = None) -> int:
        """Return how many first tokens somebody holds, on a tier or on any."""
        return max((one.tokens for one in self.holdings if tier in (None, one.tier)), default=0)


@dataclass(frozen=True, slots=True)
class Price:
    """What an action would come to, and what a pin would take of the quota."""

    result: Result
    byte_s: float
    bytes_left: float
    #: None: any number.
    byte_s_left: float | None
    ttft_cached_s: float
    ttft_computed_s: float


@dataclass(frozen=True, slots=True)
class LeaseChange:
    """What has become of a lease: "placed", "changed", "lowered" or "ended", and why."""

    lease: Lease
    change: str
    reason: str


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """Something that happened to the target at a place in the question: one of both is there."""

    target: int
    residency: Residency | None = None
    lease: LeaseChange | None = None


# --- targets --------------------------------------------------------------------------------------------------------------


def session(name: str, model: str = "", tokens: tuple[int, int] | None = None) -> Target:
    """Return a session's context: its last prompt, or tokens [start, end) of it."""
    return Target(session=named(name, model, tokens))


def named(name: str, model: str = "", tokens: tuple[int, int] | None = None) -> cache_pb2.Session:
    """Return a session's name with what is meant of its context."""
    return cache_pb2.Session(id=name, model=model, range=_range(tokens))


def conversation(body: Mapping[str, Any] | str, tokens: tuple[int, int] | None = None) -> Target:
    """Return the beginning that a chat request's body has in common with others: its `messages`, `tools`, `model`, ..."""
    text = body if isinstance(body, str) else json.dumps(body)
    return Target(prompt=cache_pb2.Prompt(chat_json=text, range=_range(tokens)))


def text(prompt: str, model: str, cache_salt: str = "", tokens: tuple[int, int] | None = None) -> Target:
    """Return a prompt given as text."""
    return Target(prompt=cache_pb2.Prompt(text=prompt, model=model, cache_salt=cache_salt, range=_range(tokens)))


def blocks(hashes: Iterable[bytes], model: str = "", first_block: int = 0) -> Target:
    """Return consecutive blocks of one of the tenant's prompts, the first of them at a place in it."""
    return Target(blocks=cache_pb2.Blocks(hashes=hashes, model=model, first_block=first_block))


def lease(name: str) -> Target:
    """Return what a lease is on."""
    return Target(lease=name)


def _range(tokens: tuple[int, int] | None) -> cache_pb2.TokenRange | None:
    return cache_pb2.TokenRange(start=tokens[0], end=tokens[1]) if tokens is not None else None


# --- actions --------------------------------------------------------------------------------------------------------------


def pin(target: Target, tier: Tier = Tier.HBM, ttl_s: float = 0.0, renew: str = "") -> Action:
    """Return: keep a target at or above a tier for so many seconds (0: the server's default), by a new lease or a renewed one."""
    return Action(pin=cache_pb2.Pin(target=target, tier=TIERS_TOLD[tier], ttl_s=ttl_s, lease=renew))


def unpin(target: Target) -> Action:
    """Return: end a lease, or those placed with this very target."""
    return Action(unpin=cache_pb2.Unpin(target=target))


def retain(target: Target, priority: int, ttl_s: float = 0.0) -> Action:
    """Return: lean towards keeping a target (over 50, to 100), or towards forgetting it first (under 50); no promise."""
    return Action(retain=cache_pb2.Retain(target=target, priority=priority, ttl_s=ttl_s))


def evict(target: Target, tier: Tier | None = None) -> Action:
    """Return: let go of what only this target needs, on one tier or on all."""
    return Action(evict=cache_pb2.Evict(target=target, tier=TIERS_TOLD[tier] if tier is not None else None))


def prefetch(target: Target, tier: Tier = Tier.HBM, deadline_s: float = 0.0) -> Action:
    """Return: bring a target up to a tier, for a prompt that is expected within so many seconds (60 if it is not said)."""
    return Action(prefetch=cache_pb2.Prefetch(target=target, tier=TIERS_TOLD[tier]), deadline_s=deadline_s)


def demote(target: Target, tier: Tier) -> Action:
    """Return: let a target sink to a tier."""
    return Action(demote=cache_pb2.Demote(target=target, tier=TIERS_TOLD[tier]))


def share(target: Target, copies: int = 0) -> Action:
    """Return: make a target available on several nodes."""
    return Action(share=cache_pb2.Share(target=target, copies=copies))


def fork(parent: str, children: Sequence[str], model: str = "") -> Action:
    """Return: sessions begin with another one's context."""
    return Action(fork=cache_pb2.Fork(parent=named(parent, model), children=children))


def supersede(name: str, keep_tokens: int, model: str = "") -> Action:
    """Return: of a session's last prompt only the first tokens go on to be used."""
    return Action(supersede=cache_pb2.Supersede(session=named(name, model), keep_tokens=keep_tokens))


def tool_started(name: str, tool_class: str, expected_s: float = 0.0, call_id: str = "", model: str = "") -> Action:
    """Return: a session pauses for a tool, for about so many seconds (0: unknown)."""
    told = cache_pb2.ToolStarted(session=named(name, model), tool_class=tool_class, expected_s=expected_s, call_id=call_id)
    return Action(tool_started=told)


def tool_finished(name: str, call_id: str = "", model: str = "") -> Action:
    """Return: a session's tool has returned."""
    return Action(tool_finished=cache_pb2.ToolFinished(session=named(name, model), call_id=call_id))


def end_session(name: str, model: str = "") -> Action:
    """Return: nothing more comes of a session."""
    return Action(end_session=cache_pb2.EndSession(session=named(name, model)))


# --- answers --------------------------------------------------------------------------------------------------------------


def result_of(message: cache_pb2.Result) -> Result:
    """Return what became of an action."""
    return Result(
        action_id=message.action_id,
        outcome=OUTCOMES[message.outcome],
        reason=message.reason,
        message=message.message,
        lease=message.lease,
        blocks=message.blocks,
        tokens=message.tokens,
        size_bytes=message.bytes,
        tier=TIERS.get(message.tier),
        ttl_s=message.ttl_s,
        first=OUTCOMES[message.first_outcome] if message.first_outcome else None,
    )


def residency_of(message: cache_pb2.Residency) -> Residency:
    """Return where something is."""
    return Residency(
        outcome=OUTCOMES[message.outcome],
        reason=message.reason,
        message=message.message,
        model=message.model,
        blocks=message.blocks,
        tokens=message.tokens,
        size_bytes=message.bytes,
        holdings=tuple(Holding(TIERS[one.tier], one.holder, one.blocks, one.tokens) for one in message.holdings),
        leases=tuple(_lease(one) for one in message.leases),
        hashes=tuple(message.hashes),
        effects=tuple(_effect(one) for one in message.effects),
    )


def price_of(message: cache_pb2.Price) -> Price:
    """Return what an action would come to."""
    return Price(
        result=result_of(message.result),
        byte_s=message.byte_s,
        bytes_left=message.bytes_left,
        byte_s_left=message.byte_s_left if message.byte_s_left >= 0 else None,
        ttft_cached_s=message.ttft_cached_s,
        ttft_computed_s=message.ttft_computed_s,
    )


def event_of(message: cache_pb2.WatchEvent) -> WatchEvent:
    """Return something that happened."""
    if message.HasField("lease"):
        told = message.lease
        change = cache_pb2.LeaseChange.Change.Name(told.change).removeprefix("CHANGE_").lower()
        return WatchEvent(message.target, lease=LeaseChange(_lease(told.lease), change, told.reason))
    return WatchEvent(message.target, residency=residency_of(message.residency))


def _lease(message: cache_pb2.LeaseState) -> Lease:
    return Lease(
        id=message.lease,
        model=message.model,
        tier=TIERS[message.tier],
        blocks=message.blocks,
        size_bytes=message.bytes,
        ttl_s=message.ttl_s,
        session=message.session,
    )


def _effect(message: cache_pb2.Effect) -> Effect:
    return Effect(
        message_id=message.message_id,
        action_id=message.action_id,
        verb=message.verb,
        lease=message.lease,
        size_bytes=message.bytes,
        found_tokens=message.found_tokens,
        earned_tokens=message.earned_tokens,
        saved_s=message.saved_s,
        ended=message.ended,
    )
