"""`weft simulate --platforms`: the article's platform and those before it on a session of 400K tokens of context.

For each system all its layouts at every batch that fits, by the cost model that simulated nodes take their time from: how fast a
user can be served, what that costs, whether the wanted speed is reached, and what binds the pass where it is not.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.cli.fronts import (
    AGENTIC,
    SYSTEMS,
    Layout,
    Point,
    Workload,
    best_at,
    by_price,
    front,
    layouts,
    model_of,
    points_of,
)
from orchestrator.cli.report.comparison import NOTHING, number, seconds
from orchestrator.cli.report.page import Table
from orchestrator.core.config import DecodeMode
from orchestrator.core.cost.costs import work_seconds
from orchestrator.core.cost.parts import PassParts, parts_of
from orchestrator.profiles.catalog import Catalog

#: Tokens a second for every user that the article claims at that context.
SPEED_TARGET = 400.0
#: Points of a front that are shown.
SHOWN = 8


@dataclass(frozen=True, slots=True)
class Platform:
    """One system on one workload."""

    name: str
    model: str
    #: Points that no other of the system beats in both speed and price, by ascending speed.
    pareto: tuple[Point, ...]
    #: The fastest, and what its pass is made of.
    fastest: Point
    parts: PassParts
    tokens_per_pass: float
    #: The cheapest at which every user gets the target; None if none does.
    at_target: Point | None
    #: Of decoding on LPX alone: the shortest beat that a cadence pool keeps with the fastest point's users at their longest.
    beat_s: float | None

    def speed_without(self, part: str) -> float:
        """Return the tokens a second for a user of the fastest point if a part of its pass took no time."""
        rest_s = self.parts.pass_s - self.parts.named[part]
        return self.tokens_per_pass / rest_s if rest_s > 0 else float("inf")

    def why(self, target: float) -> str:
        """Return one sentence: whether the target is reached, and what binds the pass."""
        named, parts = self.parts.named, self.parts
        longest = ", ".join(f"{name} {1e3 * taken:.2f} ms" for name, taken in list(named.items())[:3])
        made = f"a pass of {1e3 * parts.pass_s:.2f} ms brings {self.tokens_per_pass:.2f} tokens: {longest}"
        if self.at_target is not None:
            point = self.at_target
            return (
                f"{self.name}: {target:.0f} tokens/s/user is reached, for {point.batch:.0f} users a node at USD "
                f"{point.usd_per_million_tokens:,.0f} a million tokens ({point.layout}); at most {self._most}; {made}."
            )
        without = self.speed_without(parts.longest)
        return (
            f"{self.name}: {target:.0f} tokens/s/user is not reached, at most {self._most}; {made}; {parts.longest} binds, "
            f"without any of it {without:,.0f} would be."
        )

    @property
    def _most(self) -> str:
        return f"{self.fastest.tokens_per_s_per_user:,.0f} ({self.fastest.layout})"


def platforms(catalog: Catalog, workload: Workload = AGENTIC, target: float = SPEED_TARGET) -> list[Platform]:
    """Return every system that the workload's context fits."""
    found: list[Platform] = []
    for system in SYSTEMS:
        made = layouts(system, catalog)
        pairs = [(layout, point) for layout in made for point in points_of(layout, workload)]
        if not pairs:
            continue
        points = [point for _, point in pairs]
        layout, fastest = max(pairs, key=lambda pair: (pair[1].tokens_per_s_per_user, by_price(pair[1])))
        found.append(
            Platform(
                name=system.name,
                model=model_of(system),
                pareto=tuple(front(points, by_price)),
                fastest=fastest,
                parts=_parts(layout, fastest, workload),
                tokens_per_pass=layout.decode.profile.tokens_per_pass,
                at_target=best_at(points, target, by_price),
                beat_s=_beat_s(layout, fastest, workload) if system.mode is DecodeMode.WHOLE else None,
            )
        )
    return found


def _parts(layout: Layout, point: Point, workload: Workload) -> PassParts:
    machine, users = layout.hardware(layout.decode).machine, int(point.batch)
    assert machine is not None, f"{layout.name} is made of nothing"
    return parts_of(machine, users, users * workload.context_tokens)


def _beat_s(layout: Layout, point: Point, workload: Workload) -> float:
    users = int(point.batch)
    return work_seconds(layout.decode.profile, users, users * (workload.prompt_tokens + workload.output_tokens))


def platform_table(found: Sequence[Platform], target: float = SPEED_TARGET) -> Table:
    """Return a column a system: its fastest user, the cheapest of the wanted speed, and what the fastest's pass is made of."""
    rows: list[list[str]] = [
        ["most tokens/s/user", *(f"{one.fastest.tokens_per_s_per_user:,.0f}" for one in found)],
        [f"USD / M tokens at {target:.0f}", *(_at(one, lambda point: point.usd_per_million_tokens) for one in found)],
        [f"tokens/s/MW at {target:.0f}", *(_at(one, lambda point: point.tokens_per_s_per_mw) for one in found)],
        [f"users a node at {target:.0f}", *(_at(one, lambda point: point.batch) for one in found)],
        ["least USD / M tokens", *(number(min(point.usd_per_million_tokens for point in one.pareto)) for one in found)],
        ["fastest: tokens a pass", *(number(one.tokens_per_pass) for one in found)],
        ["fastest: pass", *(seconds(one.parts.pass_s) for one in found)],
        *(["  " + part, *(seconds(one.parts.named[part]) for one in found)] for part in sorted(found[0].parts.named)),
        ["shortest beat kept", *(seconds(one.beat_s) for one in found)],
    ]
    return Table(["", *(one.name for one in found)], rows)


def _at(one: Platform, figure: Callable[[Point], float]) -> str:
    return NOTHING if one.at_target is None else number(figure(one.at_target))


def pareto_table(found: Sequence[Platform]) -> Table:
    """Return some points of every system's front, from the cheapest to the fastest: tokens/s/user at USD a million tokens."""
    columns = [[f"{_speed(point)} at {number(point.usd_per_million_tokens)}" for point in _spread(one.pareto)] for one in found]
    rows = [[str(index + 1), *(texts[index] if index < len(texts) else "" for texts in columns)] for index in range(SHOWN)]
    return Table(["tokens/s/user at USD / M tokens", *(one.name for one in found)], rows)


def _speed(point: Point) -> str:
    return f"{point.tokens_per_s_per_user:,.0f}"


def _spread(points: Sequence[Point]) -> list[Point]:
    """Return as many points as are shown, the first and the last among them."""
    if len(points) <= SHOWN:
        return list(points)
    return [points[round(index * (len(points) - 1) / (SHOWN - 1))] for index in range(SHOWN)]


def platforms_json(found: Sequence[Platform], target: float = SPEED_TARGET) -> dict[str, Any]:
    """Return all that was found, as it is written to a JSON file."""
    systems = [asdict(one) | {"binds": one.parts.longest, "why": one.why(target)} for one in found]
    return {"workload": asdict(AGENTIC), "target_tokens_per_s_per_user": target, "systems": systems}
