"""Which unit a file's times are in: its form says so, or whoever reads it does; what could be either is refused."""

from collections.abc import Sequence
from enum import StrEnum

from orchestrator.traces.turns import TraceError

#: Seconds beyond any date: what is more is in milliseconds.
SECONDS_MAX = 1e11
#: Requests a second that nobody records; so many or more in all, and they are seconds taken for milliseconds.
RATE_MAX, RATE_REQUESTS_MIN = 1000.0, 100


class TimeUnit(StrEnum):
    """What a time of 1 means."""

    SECONDS = "s"
    MILLISECONDS = "ms"

    @property
    def per_second(self) -> float:
        """Times by which a second's number is larger than 1."""
        return 1.0 if self is TimeUnit.SECONDS else 1e3


def seconds(time: float, unit: TimeUnit, where: str) -> float:
    """Return a time in seconds. Raises `TraceError` for what can only be milliseconds but is said to be seconds."""
    if unit is TimeUnit.SECONDS and time > SECONDS_MAX:
        raise TraceError(f"{where}: timestamp: {time:.15g} s is beyond any date; --time-unit ms reads it as milliseconds")
    return time / unit.per_second


def check_milliseconds(times: Sequence[tuple[int, float]], path: object) -> None:
    """Raise `TraceError` if times look like seconds that are about to be taken for milliseconds.

    Args:
        times: line and time of each request that has one.
    """
    for number, time in times:
        if time != int(time):
            raise TraceError(
                f"{path}:{number}: timestamp: {time:.15g} is no whole number, as milliseconds of this form are; say --time-unit "
                "s if it is seconds, --time-unit ms if not"
            )
    if len(times) < RATE_REQUESTS_MIN:
        return
    span_s = (max(time for _, time in times) - min(time for _, time in times)) / TimeUnit.MILLISECONDS.per_second
    if span_s and len(times) / span_s > RATE_MAX:
        raise TraceError(
            f"{path}: timestamp: {len(times):,} requests would come within {span_s:.3g} s if times were milliseconds; say "
            "--time-unit s if they are seconds, --time-unit ms if not"
        )
