"""Requests of one model that wait for room on a node: tenants take turns by their shares, each one's own most urgent first.

Class and priority order the requests of one tenant, and decide between tenants that had equal work done for their shares, no
further: else a flood of urgent requests would keep everybody else out. See also: `core/fairness.py`.
"""

from collections.abc import Callable, Sequence

from orchestrator.core.fairness import Accounts, FairQueue, output_work
from orchestrator.core.types import Request, RequestId, ServiceClass, TenantId

#: How urgent a class is; more is more.
URGENCY = {service_class: rank for rank, service_class in enumerate(ServiceClass)}

#: Class, priority and arrival; the least is the most urgent.
Rank = tuple[int, int, RequestId]


def rank_of(request: Request) -> Rank:
    """Return where a request stands among its tenant's; ids grow with arrival, so a retried one takes its old place."""
    return (-URGENCY[request.service_class], -request.priority, request.id)


class WaitingQueue:
    """Waiting requests of one model."""

    __slots__ = ("_accounts", "_queue", "_requests", "_share_of")

    def __init__(self, share_of: Callable[[TenantId], float]) -> None:
        self._share_of = share_of
        #: A tenant competes while it has something waiting.
        self._accounts = Accounts()
        self._queue: FairQueue[Request] = FairQueue(self._accounts)
        self._requests: dict[RequestId, Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request: RequestId) -> bool:
        return request in self._requests

    @property
    def tenants(self) -> tuple[TenantId, ...]:
        """Tenants that have something waiting."""
        return self._queue.tenants

    def waiting(self, tenant: TenantId) -> int:
        """Return how many requests of a tenant wait."""
        return self._queue.waiting(tenant)

    def push(self, request: Request) -> None:
        """Let a request wait."""
        assert request.id not in self._requests, f"request {request.id} waits already"
        self._requests[request.id] = request
        self._queue.push(request.tenant, rank_of(request), request)
        self._accounts.enter(request.tenant)

    def first(self, passed: Sequence[TenantId] = ()) -> RequestId | None:
        """Return the request to be placed next, None if nobody waits. Tenants that were passed over do not count."""
        first = self._queue.first(passed)
        return first.id if first is not None else None

    def last(self, tenant: TenantId) -> Request | None:
        """Return the request of a tenant that would be placed last, None if none waits."""
        return self._queue.last(tenant)

    def started(self, request: RequestId, cached_tokens: int) -> None:
        """Take out a waiting request that nodes have got, and count its work: what is not cached, and output."""
        asked = self._requests[request]
        tokens = asked.prompt_tokens - cached_tokens + output_work(asked.output_tokens_max)
        self._accounts.reach(self._accounts.level(asked.tenant))
        self._accounts.charge(asked.tenant, tokens, self._share_of(asked.tenant))
        self.remove(request)

    def remove(self, request: RequestId) -> None:
        """Withdraw a request; unknown ones are ignored."""
        removed = self._requests.pop(request, None)
        if removed is None:
            return
        self._queue.remove(removed.tenant, rank_of(removed))
        self._accounts.leave(removed.tenant)
