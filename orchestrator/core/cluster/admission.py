"""Decides what is let in: limits a tenant, holds what no node can take yet, and says when to come back.

    429    the tenant has too many requests            503    no node serves the model, the gateway drains, or held too long
    529    too many requests are held already          400    the prompt alone is longer than any node takes

Held requests of one model wait in order of class, priority and arrival; models do not hold each other up.
"""

from collections import Counter
from collections.abc import Sequence
from heapq import heappop, heappush

from orchestrator.core.commands import Refuse
from orchestrator.core.config import LimitsConfig
from orchestrator.core.types import ModelName, Request, RequestId, ServiceClass, TenantId

RETRY_AFTER_S_MIN = 1.0
RETRY_AFTER_S_MAX = 60.0
#: Seconds to wait for nodes to come: about what starting one takes.
RETRY_AFTER_START_S = 5.0
#: Weight of the newest interval in the smoothed time between two completions.
PACE_WEIGHT = 0.1

_URGENCY = {service_class: rank for rank, service_class in enumerate(ServiceClass)}


class Pace:
    """How fast requests of one model complete, for estimates of how long others must wait."""

    __slots__ = ("_interval_s", "_last_at")

    def __init__(self) -> None:
        self._interval_s: float | None = None
        self._last_at: float | None = None

    def completed(self, now: float) -> None:
        """Note that a request completed."""
        if self._last_at is not None:
            interval_s = now - self._last_at
            former = self._interval_s
            self._interval_s = interval_s if former is None else former + PACE_WEIGHT * (interval_s - former)
        self._last_at = now

    def retry_after_s(self, requests: int) -> float:
        """Return the seconds in which so many requests will have completed, within bounds."""
        estimate_s = requests * (self._interval_s or 0.0)
        return min(max(estimate_s, RETRY_AFTER_S_MIN), RETRY_AFTER_S_MAX)


class WaitingQueue:
    """Held requests of one model, most urgent first; at equal urgency and priority the earliest."""

    __slots__ = ("_heap", "_requests")

    def __init__(self) -> None:
        #: May still have requests that were withdrawn; those are skipped.
        self._heap: list[tuple[int, int, RequestId]] = []
        self._requests: dict[RequestId, None] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request: RequestId) -> bool:
        return request in self._requests

    def push(self, request: Request) -> None:
        """Hold a request; ids grow with arrival, so a retried one takes its old place."""
        assert request.id not in self._requests, f"request {request.id} is held already"
        self._requests[request.id] = None
        heappush(self._heap, (-_URGENCY[request.service_class], -request.priority, request.id))

    @property
    def first(self) -> RequestId | None:
        """The request to be placed next, None if nobody waits."""
        while self._heap and self._heap[0][2] not in self._requests:
            heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def remove(self, request: RequestId) -> None:
        """Withdraw a request; unknown ones are ignored."""
        self._requests.pop(request, None)
        if len(self._heap) > 2 * len(self._requests) + 16:
            self._heap = [entry for entry in self._heap if entry[2] in self._requests]
            self._heap.sort()


class Admission:
    """Counts what each tenant has under way and holds what must wait."""

    __slots__ = ("_limits", "_paces", "_queues", "_tenants", "draining")

    def __init__(self, limits: LimitsConfig, models: Sequence[ModelName]) -> None:
        self._limits = limits
        self._tenants: dict[TenantId, int] = {}
        self._queues = {model: WaitingQueue() for model in models}
        self._paces = {model: Pace() for model in models}
        #: True once nothing new is to be let in.
        self.draining = False

    @property
    def waiting(self) -> int:
        """Requests held."""
        return sum(len(queue) for queue in self._queues.values())

    def running(self, tenant: TenantId) -> int:
        """Return the requests that a tenant has under way, held ones included."""
        return self._tenants.get(tenant, 0)

    def queue(self, model: ModelName) -> WaitingQueue:
        """Return the queue of a model that the cluster serves."""
        return self._queues[model]

    def refusal(self, request: Request, generates: bool, context_tokens_max: int) -> Refuse | None:
        """Return why a new request is not let in, or None.

        Args:
            request: the new one.
            generates: whether any node takes requests for its model.
            context_tokens_max: longest prompt plus output that any of them takes.
        """
        limits = self._limits
        if self.draining:
            return refuse(request, 503, "draining", "this gateway is shutting down", RETRY_AFTER_START_S)
        running = self.running(request.tenant)
        if running >= limits.tenant_requests_max:
            message = f"{running} requests of this tenant are under way, at most {limits.tenant_requests_max} may be"
            return refuse(request, 429, "tenant_requests_max", message, self._retry_after_s(request.model, 1))
        if not generates:
            return refuse(request, 503, "no_node", f"no node serves {request.model} now", RETRY_AFTER_START_S)
        if request.prompt_tokens >= context_tokens_max:
            message = f"the prompt has {request.prompt_tokens} tokens; with at least one of output {context_tokens_max} fit"
            return refuse(request, 400, "context_length_exceeded", message, None)
        return None

    def overflow(self, request: Request) -> Refuse | None:
        """Return the refusal of a request that would have to be held if there is no place for it, or None."""
        waiting = self.waiting
        if waiting < self._limits.waiting_max:
            return None
        message = f"all nodes are full and {waiting} requests wait, at most {self._limits.waiting_max} may"
        return refuse(request, 529, "overloaded", message, self._retry_after_s(request.model, waiting))

    def held_too_long(self, request: Request, seconds: float) -> Refuse:
        """Return the refusal of a request for which no node had room in time."""
        message = f"no node had room for this request in {seconds:.0f} seconds"
        waiting = len(self.queue(request.model))
        return refuse(request, 503, "waited_too_long", message, self._retry_after_s(request.model, waiting))

    def entered(self, request: Request) -> None:
        """Count a request that was let in."""
        self._tenants[request.tenant] = self.running(request.tenant) + 1

    def left(self, request: Request) -> None:
        """Count a request that is over."""
        remaining = self.running(request.tenant) - 1
        assert remaining >= 0, f"tenant {request.tenant} has {remaining} requests"
        if remaining:
            self._tenants[request.tenant] = remaining
        else:
            del self._tenants[request.tenant]

    def completed(self, model: ModelName, now: float) -> None:
        """Note that a request went well, for estimates."""
        self._paces[model].completed(now)

    def validate(self, requests: Sequence[Request]) -> None:
        """Raise `AssertionError` unless exactly these requests are counted."""
        counts = Counter(request.tenant for request in requests)
        assert counts == self._tenants, f"tenants have {dict(counts)} requests, counted are {self._tenants}"
        assert self.waiting <= len(requests), f"{self.waiting} requests wait of {len(requests)}"

    def _retry_after_s(self, model: ModelName, requests: int) -> float:
        pace = self._paces.get(model)
        return pace.retry_after_s(requests) if pace is not None else RETRY_AFTER_S_MIN


def refuse(request: Request, status: int, code: str, message: str, retry_after_s: float | None) -> Refuse:
    """Return the refusal of a request."""
    return Refuse(request.id, status, code, message, retry_after_s)
