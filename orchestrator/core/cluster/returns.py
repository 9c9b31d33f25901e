"""When sessions that wait for a tool of known length are to have their contexts brought back, so that their next turns find them.

    tool_started ── expected_s is known ──> a moment before that, unless a turn, or the tool's end, comes earlier
    tool_finished ────────────────────────> now

What is brought is a prefetch into `hbm` like one that a harness asks for (`prefetches.py`): within the tenant's quota, as far as
a node has room, and nothing where the context still is. How long before is a compromise: in simulations of coding agents with
tiers of several speeds a second served better than a tenth of one, and five no better than one.
"""

from dataclasses import replace

from orchestrator.core.cluster.expectations import EARLY, LATE
from orchestrator.core.commands import ClearTimer, ClusterCommand, SetTimer
from orchestrator.core.hints import Hint
from orchestrator.core.timers import ReturnTimer
from orchestrator.core.types import ModelName, SessionId, TenantId

#: Seconds before a tool is to end at which a context is asked for, and for which it is kept beyond when that should have been.
LEAD_S, LATE_S = 1.0, 5.0
#: Sessions that are awaited at once; one more is not.
RETURNS_MAX = 16_384


class Returns:
    """The sessions of one gateway that are awaited."""

    __slots__ = ("_awaited", "_numbers", "_serial")

    def __init__(self) -> None:
        self._serial = 0
        #: What is to be brought, by the number of its timer; and that number by session.
        self._awaited: dict[int, Hint] = {}
        self._numbers: dict[tuple[ModelName, TenantId, SessionId], int] = {}

    def pause(self, hint: Hint, now: float) -> list[ClusterCommand]:
        """Await a session whose tool has just started, if that is said to take long enough."""
        assert hint.model is not None, "a session is resolved to one of a model"
        assert hint.session is not None, "a pause is that of a session"
        commands = self.over(hint.model, hint.tenant, hint.session)
        early_s = EARLY * (hint.expected_s or 0.0) - LEAD_S
        if early_s <= 0.0 or not hint.hashes or len(self._awaited) >= RETURNS_MAX:
            return commands
        self._serial += 1
        kept_s = LEAD_S + (LATE - EARLY) * (hint.expected_s or 0.0) + LATE_S
        self._awaited[self._serial] = replace(hint, ttl_s=kept_s)
        self._numbers[hint.model, hint.tenant, hint.session] = self._serial
        return [*commands, SetTimer(ReturnTimer(self._serial), now + early_s)]

    def over(self, model: ModelName, tenant: TenantId, session: SessionId) -> list[ClusterCommand]:
        """Await a session no longer: it is back, or comes back no more."""
        number = self._numbers.pop((model, tenant, session), None)
        if number is None:
            return []
        del self._awaited[number]
        return [ClearTimer(ReturnTimer(number))]

    def due(self, number: int) -> Hint | None:
        """Return what is to be brought now; None if that is over."""
        hint = self._awaited.pop(number, None)
        if hint is not None and hint.model is not None and hint.session is not None:
            del self._numbers[hint.model, hint.tenant, hint.session]
        return hint

    def validate(self) -> None:
        """Raise `AssertionError` unless every session that is awaited has its timer's number."""
        assert len(self._awaited) <= RETURNS_MAX, f"{len(self._awaited)} sessions are awaited"
        assert sorted(self._numbers.values()) == sorted(self._awaited), "sessions are awaited that have no number"
