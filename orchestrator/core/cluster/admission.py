"""Decides what is let in: limits a tenant, holds what no node can take yet, and says when to come back.

    429    the tenant has, or asks for, too much       503    no node serves the model, the gateway drains, or waited too long
    529    too many requests wait already             400    the prompt alone is longer than any node takes
    403    more priority or class than the tenant may

How waiting requests of one model are ordered is in `waiting.py`; models do not hold each other up. When all places to wait are
taken, the tenant that has more of them than its share is the one refused, whoever came last.

A tenant's limits hold over all gateways together: each has an equal part of them, so that none has to ask another. Sessions are
spread over gateways by their names, and so is what a tenant asks for; one with fewer sessions than there are gateways has less.
"""

from collections import Counter
from collections.abc import Sequence

from orchestrator.core.cluster.rates import Rates
from orchestrator.core.cluster.waiting import URGENCY, WaitingQueue, rank_of
from orchestrator.core.commands import Refuse
from orchestrator.core.config import LimitsConfig, TenantConfig
from orchestrator.core.types import ModelName, Request, TenantId

RETRY_AFTER_S_MIN = 1.0
RETRY_AFTER_S_MAX = 60.0
#: Seconds to wait for nodes to come: about what starting one takes.
RETRY_AFTER_START_S = 5.0
#: Weight of the newest interval in the smoothed time between two completions.
PACE_WEIGHT = 0.1

#: What tenants that the cluster file does not name may do.
_UNNAMED = TenantConfig("unnamed")


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


class Admission:
    """Counts what each tenant has under way and holds what must wait."""

    __slots__ = ("_configs", "_gateways", "_limits", "_paces", "_place", "_queues", "_rates", "_tenants", "draining")

    def __init__(
        self,
        limits: LimitsConfig,
        models: Sequence[ModelName],
        tenants: Sequence[TenantConfig] = (),
        gateways: int = 1,
        place: int = 0,
    ) -> None:
        self._limits = limits
        #: Gateways that take requests, and which of them this one is.
        self._gateways = gateways
        self._place = place
        #: Those of the cluster file; others have the defaults.
        self._configs = {TenantId(tenant.name): tenant for tenant in tenants}
        self._rates = {name: Rates(tenant, gateways) for name, tenant in self._configs.items()}
        self._tenants: dict[TenantId, int] = {}
        self._queues = {model: WaitingQueue(self.share) for model in models}
        self._paces = {model: Pace() for model in models}
        #: True once nothing new is to be let in.
        self.draining = False

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(len(queue) for queue in self._queues.values())

    def running(self, tenant: TenantId) -> int:
        """Return the requests that a tenant has under way, waiting ones included."""
        return self._tenants.get(tenant, 0)

    def queue(self, model: ModelName) -> WaitingQueue:
        """Return the queue of a model that the cluster serves."""
        return self._queues[model]

    def share(self, tenant: TenantId) -> float:
        """Return the weight of a tenant."""
        return self._config(tenant).share

    def divide(self, place: int, gateways: int, now: float) -> None:
        """Have an equal part of what tenants may have, as the `place`th of so many gateways."""
        self._place, self._gateways = place, gateways
        for rates in self._rates.values():
            rates.divide(gateways, now)

    def refusal(self, request: Request, generates: bool, context_tokens_max: int, now: float) -> Refuse | None:
        """Return why a new request is not let in, or None.

        Args:
            request: the new one.
            generates: whether any node takes requests for its model.
            context_tokens_max: longest prompt plus output that any of them takes.
            now: seconds.
        """
        if self.draining:
            return refuse(request, 503, "draining", "this gateway is shutting down", RETRY_AFTER_START_S)
        config = self._config(request.tenant)
        refusal = self._not_allowed(request, config) or self._too_many(request, config)
        if refusal is not None:
            return refusal
        if not generates:
            return refuse(request, 503, "no_node", f"no node serves {request.model} now", RETRY_AFTER_START_S)
        if request.prompt_tokens >= context_tokens_max:
            message = f"the prompt has {request.prompt_tokens} tokens; with at least one of output {context_tokens_max} fit"
            return refuse(request, 400, "context_length_exceeded", message, None)
        rates = self._rates.get(request.tenant)
        return self._too_fast(request, config, rates, now) if rates is not None else None

    @staticmethod
    def _not_allowed(request: Request, config: TenantConfig) -> Refuse | None:
        if request.priority > config.priority_max:
            message = f"priority {request.priority} is more than {config.priority_max}, the highest this tenant may ask for"
            return refuse(request, 403, "priority_not_allowed", message, None)
        if URGENCY[request.service_class] > URGENCY[config.class_max]:
            message = f"class {request.service_class} is more urgent than {config.class_max}, the most this tenant may ask for"
            return refuse(request, 403, "class_not_allowed", message, None)
        return None

    def _too_many(self, request: Request, config: TenantConfig) -> Refuse | None:
        running = self.running(request.tenant)
        whole = config.requests_max or self._limits.tenant_requests_max
        allowed = whole // self._gateways + (self._place < whole % self._gateways)
        if running < allowed:
            return None
        shown = f"{allowed}" if self._gateways == 1 else f"{allowed} at this gateway, {whole} at all {self._gateways},"
        message = f"{running} requests of this tenant are under way, at most {shown} may be"
        return refuse(request, 429, "tenant_requests_max", message, self._retry_after_s(request.model, 1))

    @staticmethod
    def _too_fast(request: Request, config: TenantConfig, rates: Rates, now: float) -> Refuse | None:
        exceeded = rates.exceeded(request, now)
        if exceeded is None:
            return None
        name, wait_s = exceeded
        message = f"this tenant asks for more than its {name}, {getattr(config, name):g}"
        return refuse(request, 429, name, message, min(max(wait_s, RETRY_AFTER_S_MIN), RETRY_AFTER_S_MAX))

    def overflow(self, request: Request) -> Request | None:
        """Return who is to be refused so that a request can wait, itself or one that waits; None if there is a place.

        Every tenant that waits, or comes to, has the part of the places that its share is of theirs together, and at least one.
        While a tenant is within its part, a place is made for it by the tenant furthest over its own: its last request goes.
        """
        if self.waiting < self._limits.waiting_max:
            return None
        counts: dict[TenantId, int] = {request.tenant: 0}
        for queue in self._queues.values():
            for tenant in queue.tenants:
                counts[tenant] = counts.get(tenant, 0) + queue.waiting(tenant)
        unit = self._limits.waiting_max / sum([self.share(tenant) for tenant in counts], 0.0)
        parts = {tenant: max(1.0, unit * self.share(tenant)) for tenant in counts}
        over = [(count / parts[tenant], tenant) for tenant, count in counts.items() if count > parts[tenant]]
        if counts[request.tenant] + 1 > parts[request.tenant] or not over:
            return request
        _, tenant = max(over)
        lasts = [last for queue in self._queues.values() if (last := queue.last(tenant)) is not None]
        return max(lasts, key=rank_of)

    def overloaded(self, request: Request) -> Refuse:
        """Return the refusal of a request for which there is no place to wait, or none any more."""
        waiting = self.waiting
        message = f"all nodes are full and {waiting} requests wait, at most {self._limits.waiting_max} may"
        return refuse(request, 529, "overloaded", message, self._retry_after_s(request.model, waiting))

    def waited_too_long(self, request: Request, seconds: float) -> Refuse:
        """Return the refusal of a request for which no node had room in time."""
        message = f"no node had room for this request in {seconds:.0f} seconds"
        waiting = len(self.queue(request.model))
        return refuse(request, 503, "waited_too_long", message, self._retry_after_s(request.model, waiting))

    def entered(self, request: Request, now: float) -> None:
        """Count a request that was let in."""
        if (rates := self._rates.get(request.tenant)) is not None:
            rates.entered(request, now)
        self._tenants[request.tenant] = self.running(request.tenant) + 1

    def left(self, request: Request) -> None:
        """Count a request that is over."""
        remaining = self.running(request.tenant) - 1
        assert remaining >= 0, f"tenant {request.tenant} has {remaining} requests"
        if remaining:
            self._tenants[request.tenant] = remaining
        else:
            del self._tenants[request.tenant]

    def delivered(self, tenant: TenantId, output_tokens: int, now: float) -> None:
        """Count what a tenant's request brought, which is over."""
        if (rates := self._rates.get(tenant)) is not None:
            rates.delivered(output_tokens, now)

    def completed(self, model: ModelName, now: float) -> None:
        """Note that a request went well, for estimates."""
        self._paces[model].completed(now)

    def validate(self, requests: Sequence[Request]) -> None:
        """Raise `AssertionError` unless exactly these requests are counted."""
        counts = Counter(request.tenant for request in requests)
        assert counts == self._tenants, f"tenants have {dict(counts)} requests, counted are {self._tenants}"
        assert self.waiting <= len(requests), f"{self.waiting} requests wait of {len(requests)}"

    def _config(self, tenant: TenantId) -> TenantConfig:
        return self._configs.get(tenant, _UNNAMED)

    def _retry_after_s(self, model: ModelName, requests: int) -> float:
        pace = self._paces.get(model)
        return pace.retry_after_s(requests) if pace is not None else RETRY_AFTER_S_MIN


def refuse(request: Request, status: int, code: str, message: str, retry_after_s: float | None) -> Refuse:
    """Return the refusal of a request."""
    return Refuse(request.id, status, code, message, retry_after_s)
