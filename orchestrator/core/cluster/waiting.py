"""Requests of one model that wait for room on a node: tenants take turns by their shares, each one's own most urgent first.

Start-time fair queueing: every tenant has a tag, the work started for it so far divided by its share; the lowest goes next.
Who comes to wait after a pause begins at the tag that the queue has reached: nobody saves up turns, nobody pays for work that
was done while there was room for all. Class and priority order the requests of one tenant, and decide between tenants whose
tags are equal, no further: else a flood of urgent requests would keep everybody else out.
"""

from collections.abc import Callable
from heapq import heappop, heappush

from orchestrator.core.types import Request, RequestId, ServiceClass, TenantId

#: Output tokens expected of a request that allows more: what clients allow says little of what they get.
OUTPUT_TOKENS_GUESSED = 256
#: How urgent a class is; more is more.
URGENCY = {service_class: rank for rank, service_class in enumerate(ServiceClass)}

#: Class, priority and arrival; the least is the most urgent.
Rank = tuple[int, int, RequestId]


def rank_of(request: Request) -> Rank:
    """Return where a request stands among its tenant's; ids grow with arrival, so a retried one takes its old place."""
    return (-URGENCY[request.service_class], -request.priority, request.id)


def work_of(request: Request) -> int:
    """Return the predicted work of a request, tokens."""
    return request.prompt_tokens + min(request.output_tokens_max, OUTPUT_TOKENS_GUESSED)


class _Line:
    """What one tenant has waiting, most urgent first."""

    __slots__ = ("heap", "requests")

    def __init__(self) -> None:
        #: May still have requests that were withdrawn; those are skipped.
        self.heap: list[Rank] = []
        self.requests: dict[RequestId, Request] = {}

    def push(self, request: Request) -> None:
        self.requests[request.id] = request
        heappush(self.heap, rank_of(request))

    def head(self) -> Rank:
        while self.heap[0][2] not in self.requests:
            heappop(self.heap)
        return self.heap[0]

    def remove(self, request: RequestId) -> Request:
        removed = self.requests.pop(request)
        if len(self.heap) > 2 * len(self.requests) + 16:
            self.heap = sorted(entry for entry in self.heap if entry[2] in self.requests)
        return removed


class WaitingQueue:
    """Waiting requests of one model."""

    __slots__ = ("_first", "_lines", "_reached", "_share_of", "_tags", "_tenants")

    def __init__(self, share_of: Callable[[TenantId], float]) -> None:
        self._share_of = share_of
        #: Of tenants that have something waiting, in the order they came.
        self._lines: dict[TenantId, _Line] = {}
        self._tenants: dict[RequestId, TenantId] = {}
        #: Work started a unit of share, of tenants that are ahead of `_reached` or wait.
        self._tags: dict[TenantId, float] = {}
        #: The tag of what was started last.
        self._reached = 0.0
        #: What `first` found, until something changes.
        self._first: RequestId | None = None

    def __len__(self) -> int:
        return len(self._tenants)

    def __contains__(self, request: RequestId) -> bool:
        return request in self._tenants

    @property
    def tenants(self) -> tuple[TenantId, ...]:
        """Tenants that have something waiting."""
        return tuple(self._lines)

    def waiting(self, tenant: TenantId) -> int:
        """Return how many requests of a tenant wait."""
        line = self._lines.get(tenant)
        return len(line.requests) if line is not None else 0

    def push(self, request: Request) -> None:
        """Let a request wait."""
        assert request.id not in self._tenants, f"request {request.id} waits already"
        line = self._lines.get(request.tenant)
        if line is None:
            line = self._lines[request.tenant] = _Line()
            self._tags[request.tenant] = max(self._tags.get(request.tenant, 0.0), self._reached)
        line.push(request)
        self._tenants[request.id] = request.tenant
        self._first = None

    @property
    def first(self) -> RequestId | None:
        """The request to be placed next, None if nobody waits."""
        if self._first is None and self._lines:
            self._first = min((self._tags[tenant], line.head()) for tenant, line in self._lines.items())[1][2]
        return self._first

    def last(self, tenant: TenantId) -> Request | None:
        """Return the request of a tenant that would be placed last, None if none waits."""
        line = self._lines.get(tenant)
        return max(line.requests.values(), key=rank_of) if line is not None else None

    def started(self, request: RequestId) -> None:
        """Take out a waiting request that nodes have got, and count its work."""
        tenant = self._tenants[request]
        self._reached = max(self._reached, self._tags[tenant])
        self._tags[tenant] += work_of(self._lines[tenant].requests[request]) / self._share_of(tenant)
        self.remove(request)

    def remove(self, request: RequestId) -> None:
        """Withdraw a request; unknown ones are ignored."""
        tenant = self._tenants.pop(request, None)
        if tenant is None:
            return
        line = self._lines[tenant]
        line.remove(request)
        self._first = None
        if not line.requests:
            del self._lines[tenant]
            if self._tags[tenant] <= self._reached:
                del self._tags[tenant]
        if not self._lines:  # there is room for all: what was started before counts no more
            self._tags.clear()
            self._reached = 0.0
