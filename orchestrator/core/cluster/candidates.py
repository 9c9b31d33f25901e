"""What routing knows of each node: what it is, what it last reported, and what was given to it since.

A node's report is a little old when it comes. What was given to the node since then is counted on top of it, and no longer once
a report has come that must include it:

    known work = last report + parts given after it
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

from orchestrator.core.cluster.kvindex import Matches, columns_in
from orchestrator.core.cluster.stores import StoreView
from orchestrator.core.commands import Scores
from orchestrator.core.cost.costs import decode_seconds, keeps_beat, token_seconds
from orchestrator.core.making import quickly_made
from orchestrator.core.types import CostProfile, Load, NodeId, NodeSpec, PoolKind, Request, RequestId, TenantId

#: A report that comes this many seconds after an assignment was sent includes it: twice the way to a node, generously.
ASSIGN_LAG_S = 0.005
#: Steps that a sequence is guessed to run for; nobody knows how long an answer will be. Coding agents' answers have a median of
#: about 200 tokens and a mean of 400 (https://github.com/callanjfox/kv-cache-tester, 35,000 requests).
STEPS_GUESSED = 256
#: What a node is ranked by if its profile says that nothing takes time: cached tokens must still be worth something.
NOMINAL_TOKEN_S = 1e-5
NOMINAL_SEQUENCE_S = 1e-4
#: How much one second of prefill delays each sequence that decodes beside it, seconds: chunks leave room for them.
DELAY_WEIGHT = 0.25
#: Prefill keeps a node from other work; a second of it counts this much beyond its own duration. More on nodes of a decode
#: pool, because decoding is what only they do: cold prompts go to the prefill pool even while no sequence is in the way.
WORK_WEIGHT = {PoolKind.PREFILL: 1.0, PoolKind.AGGREGATED: 1.0, PoolKind.DECODE: 2.0, PoolKind.LPX: 2.0}
#: Chance that a cached block which a new prompt pushes out would have been asked for again: then it is computed again.
EVICTION_WEIGHT = 0.5
#: Peers with the longest prefix that are compared before one of them is fetched from.
PEERS_COMPARED_MAX = 8


@quickly_made
@dataclass(frozen=True, slots=True)
class Booking:
    """What one part of a request asks of a node."""

    #: Prompt tokens to compute and the predicted seconds that takes by the node's profile.
    uncached_tokens: int
    seconds: float
    #: Prompt tokens that the node will count as queued for it: with those that another request is about to compute there.
    queued_tokens: int
    #: The whole prompt; on a node that keeps a beat the longest context that it may come to.
    context_tokens: int
    #: When it was given to the node.
    given_at: float
    tenant: TenantId


def computes_in_no_time(profile: CostProfile) -> bool:
    """Return whether prompt tokens cost nothing on a node."""
    return profile.prefill_token_s <= 0.0 and not any(profile.batch_s)


def ranking_profile(profile: CostProfile) -> CostProfile:
    """Return the profile that a node is ranked by: its own, or a nominal one if in that one nothing takes time."""
    if not computes_in_no_time(profile):
        return profile
    sequence_s = profile.sequence_s or NOMINAL_SEQUENCE_S
    return replace(profile, prefill_token_s=NOMINAL_TOKEN_S, sequence_s=sequence_s)


class Candidate:
    """One node as routing sees it. Derived fields are made up to date by `refresh`, once for any number of changes."""

    __slots__ = (
        "_base_s",
        "_bookings",
        "_fresh",
        "_share_of",
        "_token_s",
        "_uncomputed",
        "beats",
        "column",
        "compute_factor",
        "context_tokens",
        "context_tokens_max",
        "cost_group",
        "draining",
        "evicted_block_s",
        "free_blocks",
        "generates",
        "joining_s",
        "joining_token_s",
        "load",
        "load_group",
        "profile",
        "queue_s",
        "ready_s",
        "reported",
        "room_blocks",
        "seen_by",
        "sequences",
        "slot_wait_s",
        "spec",
        "stale",
        "step_s",
        "store",
        "store_column",
        "tells_tenants",
        "waiting",
        "work_s",
    )

    def __init__(self, spec: NodeSpec, column: int, cost_group: int, share_of: Callable[[TenantId], float]) -> None:
        self.spec = spec
        self._share_of = share_of
        self.profile = ranking_profile(spec.profile)
        #: Its bit in the index.
        self.column = column
        #: Equal on nodes for which the same work costs the same.
        self.cost_group = cost_group
        #: The store that it can load from, that one's column in the index, and what is equal where loading costs the same.
        self.store: StoreView | None = None
        self.store_column: int | None = None
        self.load_group = 0
        self.generates = spec.kind.generates
        #: Whether it keeps a beat: such a node serves class cadence alone, and only prompts that others compute.
        self.beats = spec.kind is PoolKind.LPX
        #: Longest prompt plus output that its model allows and its pool holds.
        self.context_tokens_max = min(spec.context_tokens_max, spec.blocks * spec.block_tokens)
        self.load = Load()
        self.reported = False
        #: Whether the node tells tenants apart: then a request's way through it depends on whose it is.
        self.tells_tenants = False
        self.draining = False
        #: Whose request the derived fields below are for, where that matters.
        self.seen_by: TenantId | None = None
        #: True when the derived fields below are out of date.
        self.stale = True
        #: Parts of requests that it has of us, by request; those whose prompt is not computed; those no report includes yet.
        self._bookings: dict[RequestId, Booking] = {}
        self._uncomputed: dict[RequestId, Booking] = {}
        self._fresh: dict[RequestId, Booking] = {}
        #: Sequences it has or is about to have, and those of them that do not run.
        self.sequences = 0
        self.waiting = 0
        self.context_tokens = 0
        #: Blocks that it can fill without pushing out what is in use, and without pushing out anything.
        self.room_blocks = spec.blocks
        self.free_blocks = spec.blocks
        #: Seconds of score for each block beyond those that a new prompt pushes out.
        self._token_s = token_seconds(self.profile, spec.step_tokens_max)
        self.evicted_block_s = EVICTION_WEIGHT * spec.block_tokens * self._token_s
        #: A decode step without sequences: what all of them share.
        self._base_s = decode_seconds(self.profile, 0, 0)
        #: Seconds of one decode step now; of prefill work before a new prompt; until a new prompt's computing starts.
        self.step_s = 0.0
        #: What one more sequence adds to a step, counted for each that decodes: as such, and for each token of its context.
        self.joining_s = 0.0
        self.joining_token_s = 0.0
        self.queue_s = 0.0
        self.ready_s = 0.0
        #: Seconds of all predicted work.
        self.work_s = 0.0
        #: Seconds until a sequence ends and makes place, if all places are taken.
        self.slot_wait_s = 0.0
        #: A profile's second of prefill counts as so many here.
        self.compute_factor = 1.0

    @property
    def requests(self) -> int:
        """Parts of requests that this gateway has given to it."""
        return len(self._bookings)

    @property
    def uncomputed_tokens(self) -> int:
        """Prompt tokens of those that are still to be computed, as far as we know."""
        return sum(booking.uncached_tokens for booking in self._uncomputed.values())

    @property
    def prompts_tokens(self) -> int:
        """Prompt tokens of those, computed or not."""
        return sum(booking.context_tokens for booking in self._bookings.values())

    def give(self, request: RequestId, booking: Booking) -> None:
        """Note a part of a request given to the node."""
        assert request not in self._bookings, f"{self.spec.id} has request {request} already"
        self._bookings[request] = booking
        self._fresh[request] = booking
        if booking.uncached_tokens:
            self._uncomputed[request] = booking
        self.stale = True

    def computed(self, request: RequestId) -> None:
        """Note that a prompt is computed; the sequence may go on."""
        if request in self._bookings:
            self._uncomputed.pop(request, None)
            self._fresh.pop(request, None)
            self.stale = True

    def take(self, request: RequestId) -> None:
        """Note that the node has no part in a request any more; unknown ones are ignored."""
        if self._bookings.pop(request, None) is not None:
            self._uncomputed.pop(request, None)
            self._fresh.pop(request, None)
            self.stale = True

    def displaces(self, tenant: TenantId, waiting_max: int) -> bool:
        """Return whether a tenant may give it a request though it is full: others, that have more than their part, fill it."""
        if not self.tells_tenants:
            return False
        waiting = {one.tenant: one.waiting for one in self.load.tenants if one.waiting}
        for booking in self._fresh.values():
            waiting[booking.tenant] = waiting.get(booking.tenant, 0) + 1
        own = waiting.pop(tenant, 0)
        share = self._share_of(tenant)
        return own * (share + sum([self._share_of(other) for other in waiting], 0.0)) < waiting_max * share

    def keeps_beat(self, request: Request) -> bool:
        """Return whether the node has a slot for a request, keeps its beat with it, and the request is content with that beat.

        Such a node tells as its context what all that it has may come to.
        """
        beat_s, spec = self.spec.profile.beat_s, self.spec
        sequences = self.load.running + self.load.waiting + len(self._fresh) + 1
        tokens = request.prompt_tokens + request.output_tokens_max
        tokens += self.load.context_tokens + sum([booking.context_tokens for booking in self._fresh.values()])
        fits = sequences <= spec.sequences_max and tokens + sequences * spec.block_tokens <= spec.blocks * spec.block_tokens
        return fits and (not request.beat_s_max or beat_s <= request.beat_s_max) and keeps_beat(spec.profile, sequences, tokens)

    def report(self, load: Load, now: float) -> None:
        """Take in what the node says of itself."""
        self.load = load
        self.tells_tenants = bool(load.tenants)
        self.reported = True
        self.stale = True
        while self._fresh:
            request, booking = next(iter(self._fresh.items()))
            if booking.given_at + ASSIGN_LAG_S > now:
                break
            del self._fresh[request]

    def refresh(self, tenant: TenantId) -> None:
        """Make the derived fields up to date, as they are for a tenant's request."""
        spec, load, profile, scale = self.spec, self.load, self.profile, self.load.cost_scale
        fresh = self._fresh.values()
        # Who waits there has no room, and what was given since waits behind.
        slots_free = max(0, spec.sequences_max - load.running) if not load.waiting else 0
        self.seen_by = tenant
        before = self._part_before(tenant) if self.tells_tenants else 1.0
        self.sequences = load.running + round(before * (load.waiting + len(fresh)))
        self.waiting = load.waiting + max(0, len(fresh) - slots_free)
        context_tokens, given_tokens, given_s = load.context_tokens, 0, 0.0
        for booking in fresh:
            context_tokens += booking.context_tokens
            given_tokens += booking.queued_tokens
            given_s += booking.seconds
        self.context_tokens = context_tokens
        self.free_blocks = (load.blocks_free if self.reported else spec.blocks) - given_tokens // spec.block_tokens
        self.room_blocks = self.free_blocks + load.blocks_cached
        self.step_s = scale * decode_seconds(profile, self.sequences, self.context_tokens)
        one_more_s = scale * decode_seconds(profile, self.sequences + 1, self.context_tokens)
        self.joining_s = (self.sequences + 1) * (one_more_s - self.step_s)
        token_s = 0.0 if profile.beat_s else profile.context_token_s
        self.joining_token_s = (self.sequences + 1) * scale * token_s / profile.tokens_per_pass
        over = self.sequences + 1 - spec.sequences_max
        self.slot_wait_s = over * self.step_s * STEPS_GUESSED / spec.sequences_max if over > 0 else 0.0
        queued_s = self._queued_token_s() * load.queued_tokens if load.queued_tokens else 0.0
        self.queue_s = scale * before * (queued_s + given_s)
        self.ready_s = self.queue_s + self.step_s / 2 + self.slot_wait_s
        decode_s = STEPS_GUESSED * (self.step_s - scale * self._base_s)
        self.work_s = self.queue_s + decode_s
        decoding = self.sequences if self.generates else 0
        self.compute_factor = scale * (1.0 + WORK_WEIGHT[spec.kind] + DELAY_WEIGHT * decoding)
        self.stale = False

    def _part_before(self, tenant: TenantId) -> float:
        """Return how much of the queued work is done before a new request of a tenant's, 0 to 1.

        Of each other tenant's as much as of its own, by their shares, with a step's worth of the new request.
        """
        told = self.load.tenants
        if len(told) == 1 and told[0].tenant == tenant and all(one.tenant == tenant for one in self._fresh.values()):
            return 1.0
        queued = {one.tenant: one.queued_tokens for one in self.load.tenants}
        for booking in self._fresh.values():
            queued[booking.tenant] = queued.get(booking.tenant, 0) + booking.queued_tokens
        own = queued.pop(tenant, 0)
        total = own + sum(queued.values())
        if not queued or not total:
            return 1.0
        level = (own + self.spec.step_tokens_max) / self._share_of(tenant)
        return (own + sum([min(tokens, level * self._share_of(other)) for other, tokens in queued.items()], 0.0)) / total

    def _queued_token_s(self) -> float:
        """Return the seconds that a token reported as queued stands for: the average over what we gave the node."""
        uncomputed = self._uncomputed.values()
        tokens = sum([booking.queued_tokens for booking in uncomputed])
        return sum([booking.seconds for booking in uncomputed], 0.0) / tokens if tokens else self._token_s

    def validate(self) -> None:
        """Raise `AssertionError` unless what was given is accounted for once."""
        for request in (*self._uncomputed, *self._fresh):
            assert request in self._bookings, f"{self.spec.id} counts request {request} that it does not have"


@quickly_made
@dataclass(frozen=True, slots=True)
class Options:
    """What a router may choose from for one request."""

    #: Nodes that may generate; never empty.
    generators: Sequence[Candidate]
    #: Nodes that may compute the prompt for another.
    prefillers: Sequence[Candidate]
    #: All nodes of the model by column: any of them may be fetched from.
    peers: Mapping[int, Candidate]
    #: Blocks of the prompt that each node holds or will hold in a moment, and each store holds in `cpu`, by column.
    present: Sequence[int]
    #: What the index says of nodes.
    matches: Matches
    #: Nodes of the session's last turn.
    sticky: Sequence[NodeId] = ()
    #: Whether there are others of these, which are full.
    prefillers_full: bool = False
    #: Whether any host has a store.
    stores: bool = False
    #: Blocks of the prompt that are in the storage which all stores share.
    cmx_blocks: int = 0


def best_peer(options: Options, reader: Candidate, turn: int) -> tuple[Candidate, int] | None:
    """Return the node to fetch from of those that hold most of a prompt, and how many blocks; None if no other has any.

    The session's comes first, then one of the reader's host, then the idlest; with the turn others are asked.
    """
    if not options.matches.levels:
        return None
    blocks, mask = options.matches.levels[-1]
    # Half of the time the search starts in the middle, and so on: nobody is asked always.
    upper = mask >> (start := turn % len(options.present)) << start
    columns = (column for part in (upper, mask & ~upper) for column in columns_in(part) if column != reader.column)
    peers = [options.peers[column] for column in islice(columns, PEERS_COMPARED_MAX)]
    if not peers:
        return None
    host = reader.spec.host
    return min(peers, key=lambda peer: (peer.spec.id not in options.sticky, peer.spec.host != host, peer.work_s)), blocks


@quickly_made
@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes."""

    generate: Candidate
    #: Node that computes the prompt; None if the one that generates does it.
    prefill: Candidate | None
    #: Node from which the one that computes fetches first, and the prompt tokens it is expected to have.
    source: NodeId | None
    source_tokens: int
    #: Prompt tokens that will not be computed.
    cached_tokens: int
    scores: Scores
    #: Prompt tokens that the one that computes loads before that from its host's store.
    stored_tokens: int = 0

    @property
    def computes(self) -> Candidate:
        """The node that computes what is not cached."""
        return self.prefill or self.generate


class Router(Protocol):
    """A way to choose nodes."""

    def place(self, request: Request, options: Options) -> Placement | None:
        """Return where a request goes; None if no node may take it."""
        ...
