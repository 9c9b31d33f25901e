"""The cache API (`weft.cache.v1`): what harnesses ask, resolved to blocks, asked of the core, and answered.

    message -> tenant (the same keys as over HTTP)
    each action: target -> chain of blocks -> `Hint` -> core -> `Receipt` -> result
                   └ a session that another gateway owns: the action goes there (`peers`)

A tenant is told of nothing that is not its own: a session, lease or block of another's is as missing as one that never was.
"""

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Protocol

from orchestrator.core.blocks import HASH_BYTES, common_blocks, hash_bytes
from orchestrator.core.cluster.hints import Hints
from orchestrator.core.cluster.leases import Held
from orchestrator.core.commands import ClusterCommand, EndLease, PlaceLease
from orchestrator.core.events import ClusterEvent, NodeJoined, NodeLost, NodeReported
from orchestrator.core.hints import (
    NEUTRAL,
    PRIORITY_MAX,
    Earned,
    Hint,
    Holding,
    LeaseChange,
    Outcome,
    Price,
    Reason,
    Receipt,
    Verb,
)
from orchestrator.core.types import BlockHash, Lease, LeaseId, ModelName, SessionId, TenantId, Tier
from orchestrator.live.asked import Asked
from orchestrator.live.chains import Chain
from orchestrator.live.intake import Intake, Keep, ServedModel
from orchestrator.live.refusals import Invalid, ModelUnknown
from orchestrator.wire import cache_pb2
from orchestrator.wire.cache_codec import OUTCOMES_TOLD, TIERS, TIERS_TOLD

#: Actions of a message, targets of a question, children of a fork at most.
ACTIONS_MAX = 64
#: Characters of ids; of a tool's class.
ID_CHARS_MAX = 128
TOOL_CHARS_MAX = 64
#: Seconds in which changes of residency are gathered before a watcher is told.
WATCH_S = 0.1
#: Streams that one tenant may watch with at one gateway, and changes of leases that wait for one that does not read.
WATCHES_MAX = 64
CHANGES_MAX = 1024

#: Prompts that requests asked to be kept and whose leases are known, by session or by what they end with.
KEPT_MAX = 65_536
#: A session has one lease for times up to this, and one for longer ones.
SHORT_S_MAX = 300.0
#: Seconds up to which a prompt that a request asks to be kept is kept in hbm.
NEAR_S_MAX = 3600.0
_LOWEST_FIRST = (Tier.CMX, Tier.CPU, Tier.HBM)

_CHANGES = {
    LeaseChange.PLACED: cache_pb2.LeaseChange.CHANGE_PLACED,
    LeaseChange.RENEWED: cache_pb2.LeaseChange.CHANGE_CHANGED,
    LeaseChange.LOWERED: cache_pb2.LeaseChange.CHANGE_LOWERED,
}


class HintDriver(Protocol):
    """The core, as hints need it."""

    @property
    def hints(self) -> Hints:
        """What the core knows of leases and holders; to be read only."""
        ...

    @property
    def now(self) -> float:
        """Seconds on the gateway's clock."""
        ...

    def ask(self, hint: Hint) -> Receipt:
        """Do what a harness asks for, as far as it can be; return what became of it."""
        ...

    def listen(self, listener: "Listener") -> Callable[[], None]:
        """Tell somebody of every event and its commands until the returned function is called."""
        ...


class HintMetrics(Protocol):
    """Who counts."""

    def hinted(self, verb: Verb, outcome: Outcome, reason: Reason | None) -> None:
        """An action had an outcome, for a reason."""
        ...


class HintPeers(Protocol):
    """The gateways that sessions belong to."""

    def owner(self, session: SessionId) -> str | None:
        """Return where the gateway is that a session belongs to; None if that is this one."""
        ...

    async def call(self, owner: str, method: str, request: bytes, key: bytes) -> bytes | None:
        """Return what another gateway answers, None if it cannot be reached: then this one serves as well as it can."""
        ...


Listener = Callable[[ClusterEvent, Sequence[ClusterCommand]], None]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks."""

    tenant: TenantId
    #: What it showed, for the gateways that this one asks on its behalf.
    key: bytes
    #: Another gateway has passed it on: it is served here.
    forwarded: bool = False


class MessageRefused(ValueError):
    """A whole message is more than is taken, or no message at all."""


class TooManyWatches(Exception):
    """A tenant watches with as many streams as it may."""


class _Failed(Exception):
    """A target means nothing here."""

    def __init__(self, outcome: Outcome, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.receipt = Receipt(outcome, reason, message)


class _Elsewhere(Exception):
    """A session belongs to another gateway, which was told as `owner`."""

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.owner = owner


@dataclass(frozen=True, slots=True)
class _Target:
    """What somebody means: some of a chain, or a lease."""

    model: ModelName | None = None
    hashes: tuple[BlockHash, ...] = field(default=(), repr=False)
    first_block: int = 0
    session: SessionId | None = None
    lease: LeaseId | None = None


class HintDesk:
    """One gateway's. Belongs to one event loop.

    Args:
        intake: knows keys, models, sessions and prompts.
        driver: the core.
        metrics: counts.
        peers: the other gateways.
        parse_chat: reads the body of a chat request; raises `Invalid`.
        block_tokens: of each model.
    """

    def __init__(
        self,
        intake: Intake,
        driver: HintDriver,
        metrics: HintMetrics,
        peers: HintPeers,
        parse_chat: Callable[[bytes], Asked],
        block_tokens: Mapping[ModelName, int],
    ) -> None:
        self._intake = intake
        self._driver = driver
        self._metrics = metrics
        self._peers = peers
        self._parse_chat = parse_chat
        self._block_tokens = block_tokens
        #: Leases of prompts that requests asked to be kept: by session, or by its last block where there is none, and by whether
        #: for long; oldest first.
        self._kept: dict[tuple[TenantId, ModelName, SessionId | BlockHash, bool], LeaseId] = {}
        #: Streams by tenant.
        self._watches: dict[TenantId, int] = {}

    def caller(self, key: bytes, forwarded: bool = False) -> Caller:
        """Return who shows a key. Raises `KeyUnknown`."""
        return Caller(self._intake.tenant_of(key), key, forwarded)

    async def serve(self, method: str, request: bytes, caller: Caller) -> bytes | None:
        """Answer a question of another gateway, as bytes; None for one that it cannot have. Raises what `apply` does."""
        match method:
            case "Apply":
                return (await self.apply(cache_pb2.ApplyRequest.FromString(request), caller)).SerializeToString()
            case "Lookup":
                return (await self.lookup(cache_pb2.LookupRequest.FromString(request), caller)).SerializeToString()
            case "Quote":
                return (await self.quote(cache_pb2.QuoteRequest.FromString(request), caller)).SerializeToString()
            case _:
                return None

    # --- actions ------------------------------------------------------------------------------------------------------

    async def apply(self, request: cache_pb2.ApplyRequest, caller: Caller) -> cache_pb2.ApplyResponse:
        """Do a batch of actions, in order. Raises `MessageRefused`."""
        _check_count(request.actions, "actions")
        _check_id(request.message_id, "message_id")
        # Without a name nothing is recognised again.
        message = request.message_id or uuid.uuid4().hex
        came = self._driver.now
        response = cache_pb2.ApplyResponse(message_id=request.message_id)
        for number, action in enumerate(request.actions):
            _check_id(action.action_id, "action_id")
            name = action.action_id or str(number)
            result = await self._act(action, message, name, came, caller)
            result.action_id = name
            response.results.append(result)
        return response

    async def _act(self, action: cache_pb2.Action, message: str, name: str, came: float, caller: Caller) -> cache_pb2.Result:
        """Do one action here or where its session is at home; count it where it is done."""
        verb = _verb(action)
        if verb is None:
            return _result(_invalid("no verb: one of pin, unpin, evict, ... must be set"), None)
        try:
            hint = await self._hint(action, verb, message, name, caller)
            if action.deadline_s and self._driver.now - came > action.deadline_s:
                raise _Failed(Outcome.REJECTED, Reason.DEADLINE, f"{action.deadline_s:g} s have passed")
            receipt = self._driver.ask(hint)
            self._follow(hint, receipt, caller.tenant)
        except _Failed as failed:
            hint, receipt = None, failed.receipt
        except _Elsewhere as elsewhere:
            forwarded = cache_pb2.ApplyRequest(message_id=message)
            forwarded.actions.add().CopyFrom(action)
            forwarded.actions[0].action_id = name
            answer = await self._peers.call(elsewhere.owner, "Apply", forwarded.SerializeToString(), caller.key)
            if (
                answer is not None
                and (result := cache_pb2.ApplyResponse.FromString(answer).results[0]).reason != Reason.NO_SESSION
            ):
                return result
            return await self._act(action, message, name, came, replace(caller, forwarded=True))
        self._metrics.hinted(verb, receipt.outcome, receipt.reason)
        return _result(receipt, self._tokens_in(hint, receipt))

    async def _hint(self, action: cache_pb2.Action, verb: Verb, message: str, name: str, caller: Caller) -> Hint:
        """Return an action as the core takes it. Raises `_Failed`, `_Elsewhere`."""
        if not (isfinite(action.deadline_s) and action.deadline_s >= 0):
            raise _Failed(Outcome.REJECTED, Reason.INVALID, f"deadline_s must be 0 or more seconds, is {action.deadline_s}")
        hint = Hint(verb, caller.tenant, message, name)
        match verb:
            case Verb.PIN:
                pin = action.pin
                target = await self._target(pin.target, caller)
                lease = LeaseId(pin.lease) if pin.lease else None
                if target.lease is not None:  # the lease itself is what is pinned: for longer, or on another tier
                    target, lease = self._leased(target.lease, caller.tenant), target.lease
                return _aimed(hint, target, lease=lease, tier=_tier(pin.tier), ttl_s=_seconds(pin.ttl_s, "ttl_s"))
            case Verb.UNPIN:
                return _aimed(hint, await self._target(action.unpin.target, caller))
            case Verb.EVICT:
                evict = action.evict
                tier = _tier(evict.tier) if evict.HasField("tier") else None
                return _aimed(hint, await self._own(evict.target, caller), tier=tier)
            case Verb.RETAIN:
                retain = action.retain
                priority = retain.priority if retain.HasField("priority") else NEUTRAL
                if priority > PRIORITY_MAX:
                    raise _Failed(Outcome.REJECTED, Reason.INVALID, f"priority must be 0 to {PRIORITY_MAX}, is {priority}")
                own = await self._own(retain.target, caller)
                return _aimed(hint, own, lease=None, ttl_s=_seconds(retain.ttl_s, "ttl_s"), priority=priority)
            case Verb.PREFETCH:
                own = await self._own(action.prefetch.target, caller)
                return _aimed(hint, own, tier=_tier(action.prefetch.tier), ttl_s=action.deadline_s)
            case Verb.DEMOTE:
                return _aimed(hint, await self._target(action.demote.target, caller), tier=_tier(action.demote.tier))
            case Verb.SHARE:
                return _aimed(hint, await self._own(action.share.target, caller), copies=action.share.copies)
            case Verb.FORK | Verb.SUPERSEDE | Verb.TOOL_STARTED | Verb.TOOL_FINISHED | Verb.END_SESSION:
                return await self._session_hint(action, hint, caller)

    async def _session_hint(self, action: cache_pb2.Action, hint: Hint, caller: Caller) -> Hint:
        """Return an action whose target is a session."""
        match hint.verb:
            case Verb.FORK:
                names = action.fork.children
                if not 1 <= len(names) <= ACTIONS_MAX:
                    raise _Failed(Outcome.REJECTED, Reason.INVALID, f"a fork has 1 to {ACTIONS_MAX} children, not {len(names)}")
                named = [self._intake.session_named(child) for child in names]
                children = tuple(child for child in named if child is not None)
                return _aimed(hint, self._session(action.fork.parent, caller), children=children)
            case Verb.SUPERSEDE:
                target = self._session(action.supersede.session, caller)
                kept = _blocks_up(action.supersede.keep_tokens, self._tokens_of(target))
                return _aimed(hint, replace(target, first_block=min(kept, len(target.hashes))))
            case Verb.TOOL_STARTED:
                tool = action.tool_started
                if len(tool.tool_class) > TOOL_CHARS_MAX:
                    raise _Failed(Outcome.REJECTED, Reason.INVALID, f"tool_class has more than {TOOL_CHARS_MAX} characters")
                expected_s = _seconds(tool.expected_s, "expected_s") or None
                target = self._session(tool.session, caller)
                return _aimed(hint, target, tool_class=tool.tool_class, call=tool.call_id, expected_s=expected_s)
            case Verb.TOOL_FINISHED:
                return _aimed(hint, self._session(action.tool_finished.session, caller), call=action.tool_finished.call_id)
            case _:
                return _aimed(hint, self._session(action.end_session.session, caller))

    def _follow(self, hint: Hint, receipt: Receipt, tenant: TenantId) -> None:
        """Keep what is remembered of sessions in step with what was done."""
        if not receipt.outcome.effective or hint.model is None or hint.session is None:
            return
        chain = Chain(hint.model, hint.session, hint.hashes)
        if hint.verb is Verb.FORK:
            self._intake.chains.fork(tenant, chain, hint.children)
        elif hint.verb is Verb.END_SESSION:
            self._intake.chains.forget(tenant, chain)

    def _tokens_in(self, hint: Hint | None, receipt: Receipt) -> int | None:
        if hint is None or hint.model is None:
            return None
        return receipt.blocks * self._block_tokens[hint.model]

    # --- what requests over HTTP say ----------------------------------------------------------------------------------

    def begins(self, model: ModelName, tenant: TenantId, session: SessionId, parent: SessionId) -> None:
        """Let a session that is new begin where another one is."""
        chains = self._intake.chains
        if parent == session or chains.of(tenant, session, [model]) or not (found := chains.of(tenant, parent, [model])):
            return
        hint = Hint(Verb.FORK, tenant, uuid.uuid4().hex, "0", model, parent, found[0].hashes, children=(session,))
        receipt = self._driver.ask(hint)
        self._metrics.hinted(hint.verb, receipt.outcome, receipt.reason)

    def kept(self, model: ModelName, tenant: TenantId, session: SessionId | None, keep: Keep) -> int:
        """Keep a prompt's beginning for a while, for long on the lowest tier; return how many of its blocks are kept.

        The lease moves: with its session, or else with a prompt that goes on from the one that it was for.
        """
        seconds, lasts = keep.seconds, keep.seconds > SHORT_S_MAX
        has_tier = self._driver.hints.leases.has_tier
        tier = next(filter(has_tier, _LOWEST_FIRST), Tier.HBM) if seconds > NEAR_S_MAX else Tier.HBM
        names: Iterable[SessionId | BlockHash] = (session,) if session is not None else reversed(keep.hashes)
        former = next((self._kept.pop(key) for name in names if (key := (tenant, model, name, lasts)) in self._kept), None)
        known = former is not None and self._driver.hints.leases.get(former, tenant) is not None
        hint = Hint(Verb.PIN, tenant, uuid.uuid4().hex, "0", model, session, keep.hashes, tier=tier, ttl_s=seconds)
        receipt = self._driver.ask(replace(hint, lease=former if known else None))
        self._metrics.hinted(hint.verb, receipt.outcome, receipt.reason)
        if receipt.lease is not None:
            self._kept[tenant, model, session or keep.hashes[-1], lasts] = receipt.lease
        while len(self._kept) > KEPT_MAX:
            del self._kept[next(iter(self._kept))]
        return receipt.blocks

    def ends(self, model: ModelName, tenant: TenantId, session: SessionId) -> None:
        """Nothing more comes of a session."""
        for chain in self._intake.chains.of(tenant, session, [model]):
            hint = Hint(Verb.END_SESSION, tenant, uuid.uuid4().hex, "0", model, session, chain.hashes)
            receipt = self._driver.ask(hint)
            self._follow(hint, receipt, tenant)
            self._metrics.hinted(hint.verb, receipt.outcome, receipt.reason)

    # --- targets ------------------------------------------------------------------------------------------------------

    async def _target(self, target: cache_pb2.Target, caller: Caller) -> _Target:
        """Return what a target means. Raises `_Failed`, `_Elsewhere`."""
        match target.WhichOneof("what"):
            case "session":
                return self._session(target.session, caller)
            case "prompt":
                return await self._prompt(target.prompt, caller.tenant)
            case "blocks":
                return self._blocks(target.blocks, caller.tenant)
            case "lease":
                return _Target(lease=LeaseId(target.lease))
            case _:
                raise _Failed(Outcome.REJECTED, Reason.INVALID, "no target: session, prompt, blocks or lease must be set")

    async def _own(self, target: cache_pb2.Target, caller: Caller) -> _Target:
        """Return the blocks that a target means, those of a lease if it is one."""
        meant = await self._target(target, caller)
        return meant if meant.lease is None else self._leased(meant.lease, caller.tenant)

    def _leased(self, lease: LeaseId, tenant: TenantId) -> _Target:
        held = self._driver.hints.leases.get(lease, tenant)
        if held is None:
            raise _Failed(Outcome.MISSING, Reason.NO_LEASE, "this tenant has no such lease")
        return _Target(held.lease.model, held.lease.hashes, 0, held.lease.session)

    def _session(self, session: cache_pb2.Session, caller: Caller) -> _Target:
        name = self._intake.session_named(session.id)
        if name is None:
            raise _Failed(Outcome.REJECTED, Reason.INVALID, "a session must be named")
        owner = None if caller.forwarded else self._peers.owner(name)
        if owner is not None:
            raise _Elsewhere(owner)
        models = [self._model(session.model).name] if session.model else list(self._intake.models)
        chains = self._intake.chains.of(caller.tenant, name, models)
        if not chains:
            raise _Failed(Outcome.MISSING, Reason.NO_SESSION, "this tenant has had no such session here lately")
        if len(chains) > 1:
            asked = ", ".join(chain.model for chain in chains)
            raise _Failed(Outcome.REJECTED, Reason.INVALID, f"the session has asked several models; name one of {asked}")
        within = session.range if session.HasField("range") else None
        return self._ranged(_Target(chains[0].model, chains[0].hashes, 0, name), within)

    async def _prompt(self, prompt: cache_pb2.Prompt, tenant: TenantId) -> _Target:
        try:
            match prompt.WhichOneof("content"):
                case "chat_json":
                    asked = self._parse_chat(prompt.chat_json.encode())
                    model = self._model(asked.model or prompt.model)
                    encoded = await self._intake.beginning(asked, model, tenant)
                case "text":
                    model = self._model(prompt.model)
                    encoded = await self._intake.encode(model, prompt.text, tenant, salt=prompt.cache_salt, prefixed=True)
                case _:
                    raise _Failed(Outcome.REJECTED, Reason.INVALID, "no content: chat_json or text must be set")
        except Invalid as error:
            raise _Failed(Outcome.REJECTED, Reason.INVALID, error.message) from error
        self._intake.chains.remember(tenant, Chain(model.name, None, encoded.hashes))
        within = prompt.range if prompt.HasField("range") else None
        return self._ranged(_Target(model.name, encoded.hashes), within)

    def _blocks(self, blocks: cache_pb2.Blocks, tenant: TenantId) -> _Target:
        if not blocks.hashes:
            raise _Failed(Outcome.REJECTED, Reason.INVALID, "no hashes")
        wrong = next((block for block in blocks.hashes if len(block) != HASH_BYTES), None)
        if wrong is not None:
            raise _Failed(Outcome.REJECTED, Reason.INVALID, f"a block's hash has {HASH_BYTES} bytes, not {len(wrong)}")
        if not blocks.model and len(self._intake.models) > 1:
            raise _Failed(Outcome.REJECTED, Reason.INVALID, "this cluster serves several models: name one")
        model = self._model(blocks.model) if blocks.model else next(iter(self._intake.models.values()))
        hashes = tuple(BlockHash(block) for block in blocks.hashes)
        chain = self._intake.chains.with_blocks(tenant, model.name, hashes, blocks.first_block)
        if chain is None:
            message = "these are no consecutive blocks of a prompt of this tenant that this gateway remembers"
            raise _Failed(Outcome.REJECTED, Reason.UNKNOWN_BLOCKS, message)
        return _Target(model.name, chain.hashes, blocks.first_block)

    def _model(self, name: str) -> ServedModel:
        try:
            return self._intake.model_named(name)
        except ModelUnknown as error:
            raise _Failed(Outcome.REJECTED, Reason.INVALID, error.message) from error

    def _ranged(self, target: _Target, within: cache_pb2.TokenRange | None) -> _Target:
        """Return the whole blocks of a target that lie within a range of tokens."""
        if within is None:
            return target
        tokens = self._tokens_of(target)
        end = len(target.hashes) if not within.end else min(len(target.hashes), within.end // tokens)
        first = _blocks_up(within.start, tokens)
        if first >= end:
            message = f"no whole block of {tokens} tokens lies in tokens {within.start} to {within.end or 'the end'}"
            raise _Failed(Outcome.REJECTED, Reason.TOO_SHORT, message)
        return replace(target, hashes=target.hashes[:end], first_block=first)

    def _tokens_of(self, target: _Target) -> int:
        assert target.model is not None, "a lease has no range"
        return self._block_tokens[target.model]

    # --- looking ------------------------------------------------------------------------------------------------------

    async def lookup(self, request: cache_pb2.LookupRequest, caller: Caller) -> cache_pb2.LookupResponse:
        """Return where things are. Raises `MessageRefused`."""
        _check_count(request.targets, "targets")
        response = cache_pb2.LookupResponse()
        for target in request.targets:
            response.residencies.append(await self._residency(target, request.hashes, caller))
        return response

    async def _residency(self, target: cache_pb2.Target, hashes: bool, caller: Caller) -> cache_pb2.Residency:
        try:
            return self._residency_of(await self._own(target, caller), hashes, caller.tenant)
        except _Failed as failed:
            receipt = failed.receipt
            reason = receipt.reason or ""
            return cache_pb2.Residency(outcome=OUTCOMES_TOLD[receipt.outcome], reason=reason, message=receipt.message)
        except _Elsewhere as elsewhere:
            question = cache_pb2.LookupRequest(targets=[target], hashes=hashes)
            answer = await self._peers.call(elsewhere.owner, "Lookup", question.SerializeToString(), caller.key)
            if (
                answer is not None
                and (found := cache_pb2.LookupResponse.FromString(answer).residencies[0]).reason != Reason.NO_SESSION
            ):
                return found
            return await self._residency(target, hashes, replace(caller, forwarded=True))

    def _residency_of(self, target: _Target, hashes: bool, tenant: TenantId) -> cache_pb2.Residency:
        assert target.model is not None, "the target is resolved to blocks of a model"
        tokens, blocks = self._tokens_of(target), len(target.hashes)
        residency = cache_pb2.Residency(
            outcome=cache_pb2.OUTCOME_APPLIED,
            model=target.model,
            blocks=blocks,
            tokens=blocks * tokens,
            bytes=blocks * self._driver.hints.block_bytes(target.model),
            hashes=map(hash_bytes, target.hashes) if hashes else (),
        )
        for holding in self._driver.hints.holdings(target.model, target.hashes):
            residency.holdings.append(_holding(holding, tokens))
        for held in self._driver.hints.leases.of(tenant):
            if held.lease.model == target.model and common_blocks(held.lease.hashes, target.hashes):
                residency.leases.append(self._lease_state(held))
        for earned in self._driver.hints.effects.of(tenant, target.session, target.hashes):
            residency.effects.append(_effect(earned))
        return residency

    def _lease_state(self, held: Held) -> cache_pb2.LeaseState:
        return _lease_state(held.lease, held.expires_at - self._driver.now)

    async def quote(self, request: cache_pb2.QuoteRequest, caller: Caller) -> cache_pb2.QuoteResponse:
        """Return what actions would come to. Raises `MessageRefused`."""
        _check_count(request.actions, "actions")
        response = cache_pb2.QuoteResponse()
        for number, action in enumerate(request.actions):
            _check_id(action.action_id, "action_id")
            price = await self._price(action, caller)
            price.result.action_id = action.action_id or str(number)
            response.prices.append(price)
        return response

    async def _price(self, action: cache_pb2.Action, caller: Caller) -> cache_pb2.Price:
        verb = _verb(action)
        if verb is None:
            return cache_pb2.Price(result=_result(_invalid("no verb: one of pin, unpin, evict, ... must be set"), None))
        try:
            hint = await self._hint(action, verb, "", "", caller)
        except _Failed as failed:
            return cache_pb2.Price(result=_result(failed.receipt, None))
        except _Elsewhere as elsewhere:
            question = cache_pb2.QuoteRequest(actions=[action])
            answer = await self._peers.call(elsewhere.owner, "Quote", question.SerializeToString(), caller.key)
            if (
                answer is not None
                and (price := cache_pb2.QuoteResponse.FromString(answer).prices[0]).result.reason != Reason.NO_SESSION
            ):
                return price
            return await self._price(action, replace(caller, forwarded=True))
        price = self._driver.hints.price(hint, self._driver.now)
        return _price(price, self._tokens_in(hint, price.receipt))

    # --- watching -----------------------------------------------------------------------------------------------------

    async def watch(self, request: cache_pb2.WatchRequest, caller: Caller) -> AsyncIterator[cache_pb2.WatchEvent]:
        """Yield what happens to targets, beginning with how they are. Raises `MessageRefused`, `TooManyWatches`."""
        _check_count(request.targets, "targets")
        if self._watches.get(caller.tenant, 0) >= WATCHES_MAX:
            raise TooManyWatches(f"this tenant watches with {WATCHES_MAX} streams already")
        self._watches[caller.tenant] = self._watches.get(caller.tenant, 0) + 1
        watch = _Watch(caller.tenant)
        stop = self._driver.listen(watch.heard)
        told: list[cache_pb2.Residency | None] = [None] * len(request.targets)
        try:
            while True:
                changes = watch.take()
                for number, target in enumerate(request.targets):
                    residency = await self._residency(target, True, caller)
                    for event in _changes_of(changes, number, target, residency):
                        yield event
                    del residency.hashes[:]
                    if _without_times(residency) != told[number]:
                        told[number] = _without_times(residency)
                        yield cache_pb2.WatchEvent(target=number, residency=residency)
                await watch.news.wait()
                await asyncio.sleep(WATCH_S)
        finally:
            stop()
            self._watches[caller.tenant] -= 1


class _Watch:
    """One stream's ear at the core."""

    def __init__(self, tenant: TenantId) -> None:
        self._tenant = tenant
        self.news = asyncio.Event()
        #: The tenant's, not yet told; the oldest are lost to a stream that is not read.
        self._changes: deque[tuple[Lease, LeaseChange]] = deque(maxlen=CHANGES_MAX)

    def heard(self, event: ClusterEvent, commands: Sequence[ClusterCommand]) -> None:
        """Take in what happened."""
        for command in commands:
            if isinstance(command, PlaceLease | EndLease) and command.change is not None and command.lease.tenant == self._tenant:
                self._changes.append((command.lease, command.change))
                self.news.set()
        if isinstance(event, NodeJoined | NodeLost) or (
            isinstance(event, NodeReported) and (event.kv or event.ended or event.prefetches)
        ):
            self.news.set()

    def take(self) -> Sequence[tuple[Lease, LeaseChange]]:
        """Return what has changed since the last call."""
        taken = tuple(self._changes)
        self._changes.clear()
        self.news.clear()
        return taken


def _changes_of(
    changes: Sequence[tuple[Lease, LeaseChange]], number: int, target: cache_pb2.Target, residency: cache_pb2.Residency
) -> Iterable[cache_pb2.WatchEvent]:
    """Return what has become of leases that cover some of a target."""
    hashes = tuple(BlockHash(block) for block in residency.hashes)
    for lease, change in changes:
        if lease.id == target.lease or (lease.model == residency.model and common_blocks(lease.hashes, hashes)):
            kind = _CHANGES.get(change, cache_pb2.LeaseChange.CHANGE_ENDED)
            told = cache_pb2.LeaseChange(lease=_lease_state(lease, lease.ttl_s), change=kind, reason=change)
            yield cache_pb2.WatchEvent(target=number, lease=told)


# --- messages -------------------------------------------------------------------------------------------------------------


def _verb(action: cache_pb2.Action) -> Verb | None:
    name = action.WhichOneof("verb")
    return Verb(name) if name is not None else None


def _aimed(hint: Hint, target: _Target, **fields: object) -> Hint:
    """Return a hint about a target; its lease is that of the fields if they name one."""
    aimed = replace(hint, model=target.model, hashes=target.hashes, first_block=target.first_block, session=target.session)
    return replace(aimed, **{"lease": target.lease, **fields})


def _tier(number: int) -> Tier:
    if number == cache_pb2.TIER_UNSPECIFIED:
        return Tier.HBM
    tier = TIERS.get(number)  # type: ignore[call-overload]
    if tier is None:
        raise _Failed(Outcome.REJECTED, Reason.INVALID, f"there is no tier {number}")
    return tier


def _seconds(seconds: float, name: str) -> float:
    if not (isfinite(seconds) and seconds >= 0):
        raise _Failed(Outcome.REJECTED, Reason.INVALID, f"{name} must be 0 or more seconds, is {seconds}")
    return seconds


def _blocks_up(tokens: int, block_tokens: int) -> int:
    """Return the first whole block at or after so many tokens."""
    return -(-tokens // block_tokens)


def _check_count(items: Sequence[object], what: str) -> None:
    if len(items) > ACTIONS_MAX:
        raise MessageRefused(f"{what}: {len(items)} in one message, at most {ACTIONS_MAX} may be")


def _check_id(name: str, what: str) -> None:
    if len(name) > ID_CHARS_MAX:
        raise MessageRefused(f"{what} has {len(name)} characters, at most {ID_CHARS_MAX} may be")


def _invalid(message: str) -> Receipt:
    return Receipt(Outcome.REJECTED, Reason.INVALID, message)


def _result(receipt: Receipt, tokens: int | None) -> cache_pb2.Result:
    return cache_pb2.Result(
        outcome=OUTCOMES_TOLD[receipt.outcome],
        reason=receipt.reason or "",
        message=receipt.message,
        lease=receipt.lease or "",
        blocks=receipt.blocks,
        tokens=tokens or 0,
        bytes=receipt.size_bytes,
        tier=TIERS_TOLD[receipt.tier] if receipt.tier is not None else cache_pb2.TIER_UNSPECIFIED,
        ttl_s=receipt.ttl_s,
        first_outcome=OUTCOMES_TOLD[receipt.first] if receipt.first is not None else cache_pb2.OUTCOME_UNSPECIFIED,
    )


def _price(price: Price, tokens: int | None) -> cache_pb2.Price:
    return cache_pb2.Price(
        result=_result(price.receipt, tokens),
        byte_s=price.byte_s,
        bytes_left=price.bytes_left,
        byte_s_left=price.byte_s_left if price.byte_s_left is not None else -1.0,
        ttft_cached_s=price.ttft_cached_s,
        ttft_computed_s=price.ttft_computed_s,
    )


def _holding(holding: Holding, block_tokens: int) -> cache_pb2.Holding:
    tier = TIERS_TOLD[holding.tier]
    return cache_pb2.Holding(tier=tier, holder=holding.holder, blocks=holding.blocks, tokens=holding.blocks * block_tokens)


def _effect(earned: Earned) -> cache_pb2.Effect:
    return cache_pb2.Effect(
        message_id=earned.message,
        action_id=earned.action,
        verb=earned.verb,
        lease=earned.lease or "",
        bytes=earned.size_bytes,
        found_tokens=earned.found_tokens,
        earned_tokens=earned.earned_tokens,
        saved_s=earned.saved_s,
        ended=earned.ended or "",
    )


def _lease_state(lease: Lease, ttl_s: float) -> cache_pb2.LeaseState:
    return cache_pb2.LeaseState(
        lease=lease.id,
        model=lease.model,
        tier=TIERS_TOLD[lease.tier],
        blocks=len(lease.hashes),
        bytes=lease.size_bytes,
        ttl_s=max(0.0, ttl_s),
        session=lease.session or "",
    )


def _without_times(residency: cache_pb2.Residency) -> cache_pb2.Residency:
    """Return a copy in which nothing changes by itself."""
    copy = cache_pb2.Residency()
    copy.CopyFrom(residency)
    for lease in copy.leases:
        lease.ttl_s = 0.0
    return copy
