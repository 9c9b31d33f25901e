"""Fair queueing between tenants: whoever has had the least work done for its share goes next.

Start-time fair queueing (Goyal, Vin and Cheng, 1996). A tenant that competes for something has a level: the work done for it so
far, divided by its share. The lowest level goes next. Who comes to compete begins at most `CREDIT_TOKENS` below the level that is
served then: nobody saves up more while away, and nobody pays for what was done while there was nobody else.

Gateways let requests wait by this rule (`cluster/waiting.py`), nodes sequences and their prompts (`node/scheduler.py`).
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any, Generic, TypeVar

from orchestrator.core.types import TenantId

#: Output tokens expected of a request that allows more: what clients allow says little of what they get.
OUTPUT_TOKENS_GUESSED = 256

#: How far a tenant may fall behind what others got while it asked for less, and catch up at once, tokens a unit of share: the
#: bursts of one that asks for less than its share do not wait. Measured by `bench/fairness.py`: without, their p99 doubles.
CREDIT_TOKENS = 16_384

Item = TypeVar("Item")
_rank = itemgetter(0)


def output_work(output_tokens_max: int) -> int:
    """Return the output that a request is charged for when it starts, tokens."""
    return min(output_tokens_max, OUTPUT_TOKENS_GUESSED)


class Accounts:
    """What was done for each tenant that competes."""

    __slots__ = ("_counts", "_levels", "_reached")

    def __init__(self) -> None:
        #: Things of each tenant that compete; none has 0.
        self._counts: dict[TenantId, int] = {}
        #: Tokens a unit of share, of tenants that compete or are ahead of where they may begin.
        self._levels: dict[TenantId, float] = {}
        #: The level at which somebody is served now.
        self._reached = 0.0

    @property
    def contested(self) -> bool:
        """Whether more than one tenant competes."""
        return len(self._counts) > 1

    def level(self, tenant: TenantId) -> float:
        """Return the work done for a tenant that competes, tokens a unit of share."""
        return self._levels[tenant]

    def enter(self, tenant: TenantId) -> None:
        """Let one more thing of a tenant's compete."""
        count = self._counts.get(tenant, 0)
        self._counts[tenant] = count + 1
        if not count:
            self._levels[tenant] = max(self._levels.get(tenant, 0.0), self._reached - CREDIT_TOKENS)

    def charge(self, tenant: TenantId, tokens: int, share: float) -> None:
        """Count work that a tenant which competes gets."""
        self._levels[tenant] += tokens / share

    def reach(self, level: float) -> None:
        """Note that what began at a level is served now: who comes to compete later begins no lower."""
        self._reached = max(self._reached, level)

    def leave(self, tenant: TenantId) -> None:
        """Let one thing of a tenant's compete no more. When nothing does, all accounts are closed."""
        count = self._counts.pop(tenant) - 1
        if count:
            self._counts[tenant] = count
        elif self._levels[tenant] <= self._reached - CREDIT_TOKENS:
            del self._levels[tenant]
        if not self._counts:
            self._levels.clear()
            self._reached = 0.0

    def validate(self, counts: dict[TenantId, int]) -> None:
        """Raise `AssertionError` unless exactly so many things compete."""
        assert self._counts == counts, f"{counts} compete, counted are {self._counts}"
        missing = [tenant for tenant in counts if tenant not in self._levels]
        assert not missing, f"{missing} compete without a level"


class FairQueue(Generic[Item]):
    """What waits: tenants by their accounts, each one's own by rank. Equal levels are decided by rank."""

    __slots__ = ("_accounts", "_lines", "count")

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        #: Of tenants that have something waiting, in the order they came: (rank, item), lowest rank first. Ranks are unique.
        self._lines: dict[TenantId, list[tuple[Any, Item]]] = {}
        #: How much waits. Read only; a field, since every step asks.
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Item]:
        """Each tenant's, lowest rank first."""
        return (item for line in self._lines.values() for _, item in line)

    @property
    def tenants(self) -> tuple[TenantId, ...]:
        """Tenants that have something waiting."""
        return tuple(self._lines)

    def waiting(self, tenant: TenantId) -> int:
        """Return how many of a tenant's wait."""
        return len(self._lines.get(tenant, ()))

    def first(self, passed: Sequence[TenantId] = ()) -> Item | None:
        """Return what goes next, None if nothing waits. Tenants that were passed over do not count."""
        lines = self._lines
        if len(lines) == 1 and not passed:
            (line,) = lines.values()
            return line[0][1]
        level = self._accounts.level
        heads = [(level(tenant), *line[0]) for tenant, line in lines.items() if tenant not in passed]
        return min(heads, key=itemgetter(0, 1))[2] if heads else None

    def last(self, tenant: TenantId) -> Item | None:
        """Return what goes last of a tenant's, None if nothing of it waits."""
        line = self._lines.get(tenant)
        return line[-1][1] if line else None

    def push(self, tenant: TenantId, rank: Any, item: Item) -> None:
        """Let something wait."""
        insort(self._lines.setdefault(tenant, []), (rank, item), key=_rank)
        self.count += 1

    def remove(self, tenant: TenantId, rank: Any) -> None:
        """Take out something that waits."""
        line = self._lines[tenant]
        index = bisect_left(line, rank, key=_rank)
        assert line[index][0] == rank, f"{tenant}: rank {line[index][0]} waits, not {rank}"
        del line[index]
        self.count -= 1
        if not line:
            del self._lines[tenant]

    def validate(self) -> None:
        """Raise `AssertionError` unless it is in order."""
        for tenant, line in self._lines.items():
            ranks = [rank for rank, _ in line]
            assert ranks, f"{tenant} has a line in which nothing waits"
            assert ranks == sorted(ranks), f"{tenant}'s {len(ranks)} that wait are out of order"
        total = sum(map(len, self._lines.values()))
        assert self.count == total, f"{total} wait, counted are {self.count}"
