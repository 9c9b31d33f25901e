"""Finds the cheapest cluster that serves a trace as fast as is asked, within a budget; says what else there is and why not that.

    sweep     every kind of cluster, by prediction alone: thousands in seconds, each that falls out with its reason
    measure   the most promising ones of every family, by simulating the trace
    refine    the best of them, one step in one dimension at a time, while a neighbour is predicted and measured to be better

A sweep and not a general optimiser: the dimensions are few and mostly discrete, half of the combinations do not exist (a model
that does not fit), a prediction costs a thousandth of a simulation, and whoever pays wants to know why the other plans fell out.
The same trace, question and seed give the same plan.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf

from orchestrator.plan.demand import Demand
from orchestrator.plan.estimate import Estimate, Estimator, Reason, Sizer
from orchestrator.plan.goal import Budget, Slo
from orchestrator.plan.measure import Measured
from orchestrator.plan.space import Choices, Plan
from orchestrator.plan.steps import neighbours, rebalanced
from orchestrator.plan.sweep import Sweep, Swept, shortlist

#: Simulates plans and returns what they reached, in their order.
Measure = Callable[[Sequence[Plan]], Sequence[Measured]]

#: A neighbour is simulated only if its prediction takes no more of the limits than this.
PROMISING = 1.5
#: Factors by which limits are loosened to find the nearest answer when there is none.
LOOSER = (1.5, 2.0, 4.0, 8.0, 16.0, 64.0)
#: Plans simulated to find how far the nearest answer is.
NEAREST_MEASURED = 4


@dataclass(frozen=True, slots=True)
class Effort:
    """How many simulations a search may take."""

    shortlist: int = 10
    rounds: int = 4
    neighbours: int = 4


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a plan, and what it may be built of."""

    slo: Slo
    budget: Budget
    choices: Choices


@dataclass(frozen=True, slots=True)
class Answer:
    """What a search found."""

    #: The cheapest plan that reaches all; None if none does.
    pick: Measured | None
    #: The next cheapest one that reaches all.
    runner_up: Measured | None
    #: The cheapest of those that cost less than the pick and fall short by least.
    near_miss: Measured | None
    #: Without a pick: the best plan within the budget, and the cheapest that reaches all outside it.
    closest: Measured | None
    affordable_at: Measured | None
    #: Everything that was simulated, in that order, and of it what nothing else beats in price, speed and goodput.
    measured: tuple[Measured, ...]
    front: tuple[Measured, ...]
    swept: Swept


class Planner:
    """One search for one trace."""

    def __init__(self, question: Question, demand: Demand, sizer: Sizer, measure: Measure, effort: Effort) -> None:
        self._question = question
        self._demand = demand
        self._sizer = sizer
        self._measure = measure
        self._effort = effort
        self._measured: dict[Plan, Measured] = {}
        #: Plans within the budget whose prediction is good enough, or nearly.
        self._kept: Sequence[Estimate] = ()

    def search(self) -> Answer:
        """Return the best plan and what stands beside it."""
        swept = self._sweep(self._question.slo, self._question.budget)
        self._kept = swept.kept
        self._simulate([estimate.plan for estimate in shortlist(swept.kept, self._question.slo, self._effort.shortlist)])
        for _ in range(self._effort.rounds):
            if not self._improve():
                break
        if self._reaching():
            return self._answer(swept, None, None)
        return self._answer(swept, self._closest(), self._affordable_at())

    def _sweep(self, slo: Slo, budget: Budget) -> Swept:
        return Sweep(self._demand, self._sizer, slo, budget, self._question.choices).run()

    def _simulate(self, plans: Sequence[Plan]) -> None:
        new = [plan for plan in dict.fromkeys(plans) if plan not in self._measured]
        if new:
            self._measured.update(zip(new, self._measure(new), strict=True))

    def _improve(self) -> bool:
        """Simulate what promises to be better than the best plan, its neighbours above all; tell whether something is."""
        affordable = self._affordable()
        if not affordable:
            return False
        best = min(affordable, key=self._rank)
        estimator = Estimator(self._demand, self._sizer, self._question.slo.percentile)
        steps = (*rebalanced(best.plan, best.balance), *neighbours(best.plan, self._question.choices))
        beside = map(estimator.estimate, steps)
        # What is cheaper than a plan that reaches all is tried wherever it is.
        looked_at = {
            one.plan: one for one in (*(self._kept if self._reaches(best) else ()), *beside) if not isinstance(one, Reason)
        }
        promising = [one for plan, one in looked_at.items() if plan not in self._measured and self._promises(one, best)]
        promising.sort(key=self._rank_of_cheaper if self._reaches(best) else self._rank_of_faster)
        self._simulate([estimate.plan for estimate in promising[: self._effort.neighbours]])
        return min(self._affordable(), key=self._rank) is not best

    def _promises(self, estimate: Estimate, best: Measured) -> bool:
        """Tell whether a neighbour may be better: cheaper if the best reaches all already, faster if it does not."""
        if not self._question.budget.allows(estimate.price):
            return False
        excess = self._question.slo.excess(estimate.ttft_s, estimate.itl_s)
        if self._reaches(best):
            return estimate.price.usd_per_hour <= best.price.usd_per_hour and excess <= PROMISING
        return excess <= max(PROMISING, self._excess(best))

    def _rank_of_cheaper(self, estimate: Estimate) -> tuple[float, float, str]:
        return estimate.price.usd_per_hour, self._question.slo.excess(estimate.ttft_s, estimate.itl_s), str(estimate.plan)

    def _rank_of_faster(self, estimate: Estimate) -> tuple[float, float, str]:
        return self._question.slo.excess(estimate.ttft_s, estimate.itl_s), estimate.price.usd_per_hour, str(estimate.plan)

    def _affordable(self) -> list[Measured]:
        return [one for one in self._measured.values() if self._question.budget.allows(one.price)]

    def _reaching(self) -> list[Measured]:
        return [one for one in self._affordable() if self._reaches(one)]

    def _reaches(self, one: Measured) -> bool:
        return self._excess(one) <= 1.0

    def _excess(self, one: Measured) -> float:
        """Return how far a plan is from what is asked; failed requests are never forgiven.

        Where a beat is asked for, as large a share of the tokens as must be within the limits must come on it.
        """
        slo = self._question.slo
        excess = inf if one.failed else slo.excess(one.ttft_s, one.itl_s)
        return excess if one.beat_share is None else max(excess, slo.percentile / max(one.beat_share, 1e-9))

    def _rank(self, one: Measured) -> tuple[float, float, float, int, str]:
        """Return what plans are ordered by: those that reach all by price, the others by how far they are."""
        excess = self._excess(one)
        return max(excess, 1.0), one.price.usd_per_hour, excess, one.failed, str(one.plan)

    def _closest(self) -> Measured | None:
        """Return the plan within the budget that falls short by least, loosening the limits until there is one."""
        slo = self._question.slo
        for factor in LOOSER if not self._affordable() else ():
            loose = replace(slo, ttft_s=slo.ttft_s * factor, itl_s=slo.itl_s * factor)
            kept = self._sweep(loose, self._question.budget).kept
            kept.sort(key=self._rank_of_faster)
            self._simulate([one.plan for one in kept[:NEAREST_MEASURED]])
            if kept:
                break
        return min(self._affordable(), key=self._rank, default=None)

    def _affordable_at(self) -> Measured | None:
        """Return the plan that reaches all and is over the budget by least; None if no money helps."""
        if self._question.budget == Budget():
            return None
        # What is within the budget was looked at before.
        kept = [one for one in self._sweep(self._question.slo, Budget()).kept if not self._question.budget.allows(one.price)]
        kept.sort(key=lambda one: (self._question.budget.excess(one.price), one.price.usd_per_hour, str(one.plan)))
        self._simulate([one.plan for one in kept[:NEAREST_MEASURED]])
        reaching = [one for one in self._measured.values() if self._reaches(one)]
        return min(reaching, key=lambda one: (self._question.budget.excess(one.price), self._rank(one)), default=None)

    def _answer(self, swept: Swept, closest: Measured | None, affordable_at: Measured | None) -> Answer:
        reaching = sorted(self._reaching(), key=self._rank)
        # Of plans that cost the same the one that nothing beats.
        pick = min(front_of(reaching), key=self._rank, default=None)
        others = [one for one in self._affordable() if not self._reaches(one)]
        cheaper = [one for one in others if pick is not None and one.price.usd_per_hour < pick.price.usd_per_hour]
        every = tuple(self._measured.values())
        return Answer(
            pick=pick,
            runner_up=next((one for one in reaching if pick is not None and one.price != pick.price), None),
            near_miss=min(cheaper, key=self._rank, default=None),
            closest=closest,
            affordable_at=affordable_at,
            measured=every,
            front=front_of(every),
            swept=swept,
        )


def front_of(measured: Sequence[Measured]) -> tuple[Measured, ...]:
    """Return the plans that no other beats in price, times and goodput together, the cheapest first.

    A plan that loses requests has no times to compare and is not among them.
    """
    whole = [one for one in measured if not one.failed]
    front = [one for one in whole if not any(_beats(other, one) for other in whole)]
    return tuple(sorted(front, key=lambda one: (one.price.usd_per_hour, one.itl_s, str(one.plan))))


def _beats(other: Measured, one: Measured) -> bool:
    better = other.price.usd_per_hour, other.ttft_s, other.itl_s, -other.goodput
    worse = one.price.usd_per_hour, one.ttft_s, one.itl_s, -one.goodput
    return better != worse and all(mine <= theirs for mine, theirs in zip(better, worse, strict=True))
