"""Rate limits of one tenant: token buckets for requests, tokens and byte-seconds, a gateway's part of them."""

from orchestrator.core.config import TenantConfig
from orchestrator.core.types import Request

#: Seconds of its rate that a tenant may save up.
BURST_S = 2.0


class Bucket:
    """Fills at a rate up to a capacity; what is taken at once may be more than is in it, and is owed then."""

    __slots__ = ("_at", "_burst_s", "_capacity", "_level", "_rate")

    def __init__(self, rate: float, burst_s: float = BURST_S) -> None:
        assert rate > 0, f"a bucket fills at {rate} a second"
        self._rate = rate
        self._burst_s = burst_s
        self._capacity = max(rate * burst_s, 1.0)
        self._level = self._capacity
        self._at = 0.0

    def refit(self, rate: float, now: float) -> None:
        """Fill at another rate from now on; what is in it, or owed, grows or shrinks with it."""
        self._fill(now)
        former = self._capacity
        self._rate, self._capacity = rate, max(rate * self._burst_s, 1.0)
        self._level *= self._capacity / former

    def level(self, now: float) -> float:
        """Return what is in it; less than 0 is owed."""
        self._fill(now)
        return self._level

    def wait_s(self, amount: float, now: float) -> float:
        """Return the seconds until so much may be taken, 0 for now; more than the bucket holds may be when it is full."""
        self._fill(now)
        return max(0.0, (min(amount, self._capacity) - self._level) / self._rate)

    def take(self, amount: float, now: float) -> None:
        """Take so much, whether or not it is there."""
        self._fill(now)
        self._level -= amount

    def _fill(self, now: float) -> None:
        self._level = min(self._capacity, self._level + (now - self._at) * self._rate)
        self._at = now


class Rates:
    """A gateway's part of the requests and tokens a second that a tenant may have.

    Prompts count when they are let in, output when it has ended. Output of requests that are cancelled counts as what they had
    got; that of requests which the cluster itself gave up is free.
    """

    __slots__ = ("_config", "_requests", "_tokens")

    def __init__(self, tenant: TenantConfig, gateways: int) -> None:
        self._config = tenant
        self._requests = Bucket(tenant.requests_per_s / gateways) if tenant.requests_per_s else None
        self._tokens = Bucket(tenant.tokens_per_s / gateways) if tenant.tokens_per_s else None

    def divide(self, gateways: int, now: float) -> None:
        """Have an equal part among so many gateways from now on."""
        if self._requests is not None:
            self._requests.refit(self._config.requests_per_s / gateways, now)
        if self._tokens is not None:
            self._tokens.refit(self._config.tokens_per_s / gateways, now)

    def exceeded(self, request: Request, now: float) -> tuple[str, float] | None:
        """Return the limit that a request would exceed and the seconds until it would not, None if it may enter."""
        for name, bucket, amount in (
            ("requests_per_s", self._requests, 1),
            ("tokens_per_s", self._tokens, request.prompt_tokens),
        ):
            wait_s = bucket.wait_s(amount, now) if bucket is not None else 0.0
            if wait_s > 0:
                return name, wait_s
        return None

    def entered(self, request: Request, now: float) -> None:
        """Count a request that was let in."""
        if self._requests is not None:
            self._requests.take(1, now)
        if self._tokens is not None:
            self._tokens.take(request.prompt_tokens, now)

    def delivered(self, output_tokens: int, now: float) -> None:
        """Count the output of a request that is over."""
        if self._tokens is not None:
            self._tokens.take(output_tokens, now)
