"""What harnesses ask of the cache, and what they are answered: the words of `core/cluster/hints.py`.

Targets are resolved before: a hint names blocks by their hashes, whatever the harness named. Nothing here knows gRPC or HTTP.
"""

from dataclasses import dataclass, field, replace
from enum import StrEnum

from orchestrator.core.types import BlockHash, LeaseId, ModelName, PrefetchEnd, PrefetchId, SessionId, TenantId, Tier


class Verb(StrEnum):
    """What is asked for; see `proto/orchestrator/wire/cache.proto` for what each means."""

    PIN = "pin"
    UNPIN = "unpin"
    RETAIN = "retain"
    EVICT = "evict"
    PREFETCH = "prefetch"
    DEMOTE = "demote"
    SHARE = "share"
    FORK = "fork"
    SUPERSEDE = "supersede"
    TOOL_STARTED = "tool_started"
    TOOL_FINISHED = "tool_finished"
    END_SESSION = "end_session"


class Outcome(StrEnum):
    """What became of an action."""

    APPLIED = "applied"  # done, all of it
    CLIPPED = "clipped"  # done in part
    DEFERRED = "deferred"  # taken; takes effect later
    DUPLICATE = "duplicate"  # was done before
    REJECTED = "rejected"  # not allowed, over quota, or malformed
    MISSING = "missing"  # the tenant has no such session, lease or block
    UNSUPPORTED = "unsupported"  # nothing in this cluster could do it

    @property
    def effective(self) -> bool:
        """Whether anything was done, so that the same must not be done again."""
        return self in (Outcome.APPLIED, Outcome.CLIPPED, Outcome.DEFERRED)


class Reason(StrEnum):
    """Why an outcome is what it is, in one word."""

    # clipped
    QUOTA_BYTES = "quota_bytes"  # fewer blocks than asked for; rejected if there was room for none
    QUOTA_BYTE_SECONDS = "quota_byte_s"  # for a shorter time; rejected if it would have been under a second
    LOWER_TIER = "lower_tier"  # on a lower tier than asked for
    TTL_MAX = "ttl_max"  # for the longest time that the cluster allows
    NO_ROOM = (
        "no_room"  # for fewer blocks than asked for: the node needs its memory for requests; rejected if there is room for none
    )
    FEWER_COPIES = "fewer_copies"  # on fewer nodes than asked for: no more can have it
    LEASED = "leased"  # what a lease covers stays; rejected if that is all
    # deferred
    NOT_RESIDENT = (
        "not_resident"  # blocks that nobody holds yet are leased as they are computed; missing where they must be there
    )
    # rejected
    TOO_SHORT = "too_short"  # the target fills no block
    TOO_MANY_LEASES = "too_many_leases"
    TTL_MIN = "ttl_min"  # under a second
    DEADLINE = "deadline"  # its deadline passed before it could be done
    UNKNOWN_BLOCKS = "unknown_blocks"  # of no prompt of this tenant that the gateway remembers
    NO_NODE = "no_node"  # no node serves the model now
    INVALID = "invalid"  # the message says what is wrong
    # missing
    NO_SESSION = "no_session"
    NO_LEASE = "no_lease"
    # unsupported
    NO_TIER = "no_tier"  # the cluster has no such tier
    NO_HOLDER = "no_holder"  # nobody who could do it


#: The priority that says nothing, and the highest.
NEUTRAL, PRIORITY_MAX = 50, 100


@dataclass(frozen=True, slots=True)
class Hint:
    """One action of one message of a tenant. Fields that its verb has no use for are as they are by default."""

    verb: Verb
    tenant: TenantId
    #: Name the action: the same pair again has no second effect.
    message: str
    action: str
    model: ModelName | None = None
    #: The session that the target was named by, if it was.
    session: SessionId | None = None
    #: The target's chain of blocks, from the prompt's first one to the target's last one.
    hashes: tuple[BlockHash, ...] = field(default=(), repr=False)
    #: Blocks before it are none of the target's own.
    first_block: int = 0
    #: The lease that is the target, or that is to be renewed.
    lease: LeaseId | None = None
    #: None: the best one, or all of them where a tier is to be left.
    tier: Tier | None = None
    #: Seconds; 0: `TTL_S` of `core/cluster/leases.py`. Of a prefetch, until it is wanted; 0: `KEPT_S` of `prefetches.py`.
    ttl_s: float = 0.0
    #: Of what is to be retained, 0 to 100: above `NEUTRAL` it is kept for longer, below it is forgotten first.
    priority: int = NEUTRAL
    #: Nodes that are to have what is shared; 0: `COPIES` of `core/cluster/hints.py`.
    copies: int = 0
    #: Sessions that begin with the target's context.
    children: tuple[SessionId, ...] = ()
    #: Kind of the tool that is waited for, which call of it, and the seconds it is expected to take; None: unknown.
    tool_class: str = ""
    call: str = ""
    expected_s: float | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of one action."""

    outcome: Outcome
    reason: Reason | None = None
    #: A sentence for people.
    message: str = ""
    lease: LeaseId | None = None
    #: What was done or granted: blocks of the target's chain from its start on, bytes, tier, seconds.
    blocks: int = 0
    size_bytes: int = 0
    tier: Tier | None = None
    ttl_s: float = 0.0
    #: With DUPLICATE: the outcome of the first time.
    first: Outcome | None = None
    #: Blocks [first, end) of the chain that a store is bringing up.
    brought: tuple[int, int] = (0, 0)
    #: What a node is bringing up; how much of it has come is known at its end.
    prefetch: PrefetchId | None = None


@dataclass(frozen=True, slots=True)
class Earned:
    """What an action has brought since it was done; `core/cluster/effects.py` says how that is known."""

    verb: Verb
    #: Name the action; empty in a sum of several.
    message: str = ""
    action: str = ""
    lease: LeaseId | None = None
    #: Bytes that it kept, had brought or let go.
    size_bytes: int = 0
    #: Tokens of later prompts that were found of what it is about, and those that would not have been without it.
    found_tokens: int = 0
    earned_tokens: int = 0
    #: Seconds that those would have cost.
    saved_s: float = 0.0
    #: How a prefetch into `hbm` has ended; None: it has not, or it is no such action.
    ended: PrefetchEnd | None = None

    def plus(self, more: "Earned") -> "Earned":
        """Return this with what was earned since."""
        return replace(
            self,
            size_bytes=self.size_bytes + more.size_bytes,
            found_tokens=self.found_tokens + more.found_tokens,
            earned_tokens=self.earned_tokens + more.earned_tokens,
            saved_s=self.saved_s + more.saved_s,
        )


class LeaseChange(StrEnum):
    """What became of a lease."""

    PLACED = "placed"
    RENEWED = "renewed"  # another time, other blocks
    LOWERED = "lowered"
    UNPINNED = "unpinned"
    EXPIRED = "expired"
    SESSION_ENDED = "session_ended"
    NO_MEMORY = "no_memory"  # what it was promised is gone, and no lower tier has room


@dataclass(frozen=True, slots=True)
class Holding:
    """Somebody who holds the first `blocks` blocks of a chain."""

    tier: Tier
    #: A node or a store; empty for what all share.
    holder: str
    blocks: int


@dataclass(frozen=True, slots=True)
class Price:
    """What a pin would come to, and what is left of the quota before."""

    receipt: Receipt
    #: Bytes times seconds that it takes.
    byte_s: float = 0.0
    bytes_left: float = 0.0
    #: None: any number.
    byte_s_left: float | None = None
    #: Predicted seconds to the first token after the target on idle nodes: from where it is now, and computed anew.
    ttft_cached_s: float = 0.0
    ttft_computed_s: float = 0.0
