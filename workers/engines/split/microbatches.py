"""How many micro-batches a step is cut into: what was measured to be soonest for steps of about as many rows."""

from dataclasses import dataclass, field

from orchestrator.core.config import MICROBATCHES_MAX

#: A measurement's weight in the running mean.
WEIGHT = 0.1
#: Steps between two tries of another number.
TRY_EVERY = 64
#: Tries of a number before its mean counts.
TRIES_MIN = 3


@dataclass(slots=True)
class _Size:
    """Steps whose numbers of rows have the same highest bit."""

    seconds: list[float] = field(default_factory=lambda: [0.0] * MICROBATCHES_MAX)
    tries: list[int] = field(default_factory=lambda: [0] * MICROBATCHES_MAX)
    steps: int = 0


class Microbatches:
    """Chooses by measured steps; `fixed` above 0 is always taken."""

    def __init__(self, fixed: int) -> None:
        self._fixed = fixed
        self._sizes: dict[int, _Size] = {}

    def choose(self, rows: int) -> int:
        """Return into how many a step of so many sequences is to be cut."""
        if self._fixed:
            return min(self._fixed, rows)
        most = min(MICROBATCHES_MAX, rows)
        size = self._sizes.setdefault(rows.bit_length(), _Size())
        size.steps += 1
        untried = [count for count in range(1, most + 1) if size.tries[count - 1] < TRIES_MIN]
        if untried:
            return untried[0]
        if size.steps % TRY_EVERY == 0:
            return size.steps // TRY_EVERY % most + 1
        return min(range(1, most + 1), key=lambda count: size.seconds[count - 1])

    def measured(self, rows: int, count: int, seconds: float) -> None:
        """Note what a step took."""
        if self._fixed:
            return
        size = self._sizes.setdefault(rows.bit_length(), _Size())
        tries = size.tries[count - 1]
        mean = size.seconds[count - 1]
        weight = max(WEIGHT, 1 / (tries + 1))
        size.seconds[count - 1] = mean + weight * (seconds - mean)
        size.tries[count - 1] = tries + 1
