"""Goes through every kind of cluster and keeps those whose prediction meets what is asked; says how many fell out, and why.

Each kind grows group by group from the smallest number. What cannot be built, or is too slow even for one sequence alone, falls
out with all its sizes at once; the first few sizes that are good enough are kept. Of prefill and decode pools alike, only those
are paired for which no other is neither dearer nor slower.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from orchestrator.plan.demand import Demand, Held
from orchestrator.plan.estimate import Decoding, Estimate, Estimator, Reason, Sizer, Sizing, price_of
from orchestrator.plan.goal import Budget, Slo
from orchestrator.plan.space import COUNTS, Choices, Plan, PoolPlan, aggregated_kinds, beat_kinds, decode_kinds, prefill_kinds
from orchestrator.plan.steps import rebalanced

#: Predictions may miss what is asked by this factor and still be simulated.
MARGIN = 1.2
#: Sizes of one kind that are kept: the smallest that is good enough and some larger ones, which answer faster.
SIZES_KEPT = 3
#: Pools of one precision and chip that are paired: the cheapest of those that nothing dominates.
DECODES_PAIRED = 16
PREFILLS_PAIRED = 4


@dataclass(slots=True)
class Swept:
    """What a sweep found."""

    #: Plans that are good enough by prediction.
    kept: list[Estimate] = field(default_factory=lambda: [])
    #: Plans, and pools not yet paired, that fell out; kinds that fell out whole count once.
    pruned: Counter[Reason] = field(default_factory=Counter[Reason])

    @property
    def considered(self) -> int:
        """All that was looked at."""
        return len(self.kept) + self.pruned.total()


@dataclass(frozen=True, slots=True)
class _Half:
    """A decode pool that is fast enough, or a prefill pool that is soon enough, waiting for its partner."""

    pool: PoolPlan
    usd_per_hour: float
    #: Time between tokens, or to the first one.
    seconds: float
    kv_tokens: int


class Sweep:
    """One pass over all kinds of clusters for one trace."""

    def __init__(self, demand: Demand, sizer: Sizer, slo: Slo, budget: Budget, choices: Choices) -> None:
        self._demand = demand
        self._sizer = sizer
        self._slo = slo
        self._budget = budget
        self._choices = choices
        self._estimator = Estimator(demand, sizer, slo.percentile)
        self._found = Swept()
        #: Kinds that were proposed for the balance of their halves.
        self._balanced: set[PoolPlan] = set()

    def run(self) -> Swept:
        """Return every plan that is good enough by prediction, and why others are not."""
        beat_s = self._slo.beat_s
        for kind in () if beat_s else aggregated_kinds(self._choices):
            self._grow_whole(kind)
        decodes: dict[tuple[str, ...], list[_Half]] = {}
        for kind in beat_kinds(self._choices, beat_s) if beat_s else decode_kinds(self._choices):
            made = kind.hardware
            decodes.setdefault((made.chip, made.weights, made.kv, made.mode), []).extend(self._grow_balanced(kind))
        prefills: dict[tuple[str, ...], list[PoolPlan]] = {}
        for kind in prefill_kinds(self._choices):
            if self._fits(kind) is not None:
                prefills.setdefault((kind.hardware.chip, kind.hardware.weights, kind.hardware.kv), []).append(kind)
        best: dict[tuple[tuple[str, ...], Held], list[_Half]] = {}
        for key, halves in decodes.items():
            for decode in self._undominated(halves, DECODES_PAIRED):
                held = self._demand.with_memory(decode.kv_tokens)
                known = key[:3], held
                if known not in best:
                    best[known] = self._soonest(prefills.get(key[:3], ()), held)
                for prefill in best[known]:
                    self._judge(Plan.paired(prefill.pool, decode.pool))
        return self._found

    def _prune(self, reason: Reason, count: int = 1) -> None:
        self._found.pruned[reason] += count

    def _fits(self, kind: PoolPlan) -> Sizing | None:
        """Return what a node of a kind is, None (and why is noted) if it cannot be built or hold the longest context."""
        size = self._sizer(kind)
        if size is None:
            self._prune(Reason.BUILD)
            return None
        if size.kv_tokens < self._demand.context_tokens_max:
            self._prune(Reason.CONTEXT)
            return None
        return size

    def _quick_enough(self, kind: PoolPlan) -> Sizing | None:
        """Return what a node is if it fits and, serving one sequence alone, is quick enough."""
        size = self._fits(kind)
        if size is not None and self._estimator.quickest_s(size) > MARGIN * self._slo.itl_s:
            self._prune(Reason.ITL)
            return None
        return size

    def _judge(self, plan: Plan) -> Estimate | Reason:
        """Keep a plan if it is good enough and within the budget; note why if not."""
        verdict = self._verdict(plan)
        if isinstance(verdict, Reason):
            self._prune(verdict)
        else:
            self._found.kept.append(verdict)
        return verdict

    def _verdict(self, plan: Plan) -> Estimate | Reason:
        price = price_of(plan, self._sizer)
        if price is not None and not self._budget.allows(price):
            return Reason.BUDGET
        estimate = self._estimator.estimate(plan)
        if isinstance(estimate, Reason):
            return estimate
        if estimate.itl_s > MARGIN * self._slo.itl_s:
            return Reason.ITL
        return Reason.TTFT if estimate.ttft_s > MARGIN * self._slo.ttft_s else estimate

    def _grow_whole(self, kind: PoolPlan) -> None:
        """Judge an aggregated pool, larger and larger."""
        if self._quick_enough(kind) is None:
            return
        kept = 0
        for count in COUNTS:
            verdict = self._judge(Plan((kind.sized(count),)))
            kept += not isinstance(verdict, Reason)
            if verdict is Reason.BUDGET or kept == SIZES_KEPT:
                return

    def _grow_balanced(self, kind: PoolPlan) -> list[_Half]:
        """Return sizes of a decode pool, and of it with as many chips for FFNs as the smallest of those sizes keeps busy."""
        kept = self._grow_decode(kind)
        size = self._sizer(kind) if kept else None
        if size is None:
            return kept
        smallest = kept[0].pool
        decoding = self._estimator.decoding(smallest, size, self._demand.with_memory(kept[0].kv_tokens))
        balance = self._estimator.balance(size, decoding) if isinstance(decoding, Decoding) else None
        for plan in rebalanced(Plan((smallest,)), balance):
            other = plan.decode.sized(1)
            if other not in self._balanced:
                self._balanced.add(other)
                kept = [*kept, *self._grow_decode(other)]
        return kept

    def _grow_decode(self, kind: PoolPlan) -> list[_Half]:
        """Return the smallest sizes of a decode pool that are quick enough and within the budget."""
        size = self._quick_enough(kind)
        kept: list[_Half] = []
        for count in COUNTS if size is not None else ():
            pool = kind.sized(count)
            price = price_of(Plan((pool,)), self._sizer)
            if price is None or not self._budget.allows(price):
                self._prune(Reason.BUDGET)
                break
            assert size is not None
            kv_tokens = size.kv_tokens * pool.nodes
            decoding = self._estimator.decoding(pool, size, self._demand.with_memory(kv_tokens))
            if isinstance(decoding, Decoding) and decoding.itl_s <= MARGIN * self._slo.itl_s:
                kept.append(_Half(pool, price.usd_per_hour, decoding.itl_s, kv_tokens))
            else:
                self._prune(decoding if isinstance(decoding, Reason) else Reason.ITL)
            if len(kept) == SIZES_KEPT:
                break
        return kept

    def _soonest(self, kinds: Iterable[PoolPlan], held: Held) -> list[_Half]:
        """Return the prefill pools worth pairing with decode pools that hold so much."""
        halves = [half for kind in kinds for half in self._grow_prefill(kind, held)]
        return self._undominated(halves, PREFILLS_PAIRED)

    def _grow_prefill(self, kind: PoolPlan, held: Held) -> list[_Half]:
        """Return the smallest sizes of a prefill pool that are soon enough and within the budget."""
        size = self._sizer(kind)
        kept: list[_Half] = []
        for count in COUNTS if size is not None else ():
            pool = kind.sized(count)
            price = price_of(Plan((pool,)), self._sizer)
            if price is None or not self._budget.allows(price):
                self._prune(Reason.BUDGET)
                break
            assert size is not None
            prefilling = self._estimator.prefilling(pool, size, held, Decoding(0.0, 0.0))
            if isinstance(prefilling, Reason) or prefilling.ttft_s > MARGIN * self._slo.ttft_s:
                self._prune(prefilling if isinstance(prefilling, Reason) else Reason.TTFT)
            else:
                kept.append(_Half(pool, price.usd_per_hour, prefilling.ttft_s, size.kv_tokens * pool.nodes))
            if len(kept) == SIZES_KEPT:
                break
        return kept

    def _undominated(self, halves: Sequence[_Half], kept_max: int) -> list[_Half]:
        """Return the cheapest pools for which no other is as cheap, as quick and as large."""
        kept: list[_Half] = []
        for half in sorted(halves, key=lambda half: (half.usd_per_hour, half.seconds, -half.kv_tokens)):
            beaten = any(other.seconds <= half.seconds and other.kv_tokens >= half.kv_tokens for other in kept)
            if beaten or len(kept) == kept_max:
                self._prune(Reason.DOMINATED)
            else:
                kept.append(half)
        return kept


def shortlist(estimates: Iterable[Estimate], slo: Slo, count: int) -> list[Estimate]:
    """Return the plans to simulate: the cheapest of every family, then the cheapest that nothing dominates.

    Plans that miss the objective by prediction come after those that meet it, but for the cheapest of a family: a prediction may
    be wrong for all plans of one kind.
    """
    ordered = sorted(estimates, key=lambda one: (_misses(one, slo), one.price.usd_per_hour, one.itl_s, one.ttft_s, str(one.plan)))
    families: dict[tuple[str, str, int], Estimate] = {}
    for estimate in ordered:
        families.setdefault(estimate.plan.family, estimate)
    chosen = list(families.values())[: (count + 1) // 2]
    front: list[Estimate] = []
    for estimate in ordered:
        if not any(_as_good(other, estimate) for other in front):
            front.append(estimate)
    for estimate in (*front, *ordered):
        if len(chosen) >= count:
            break
        if estimate not in chosen:
            chosen.append(estimate)
    return chosen


def _misses(estimate: Estimate, slo: Slo) -> bool:
    return slo.excess(estimate.ttft_s, estimate.itl_s) > 1.0


def _as_good(other: Estimate, estimate: Estimate) -> bool:
    """Tell whether a plan is neither dearer nor slower than another; first tokens a tenth sooner are no reason to pay more."""
    cheaper = other.price.usd_per_hour <= estimate.price.usd_per_hour
    return cheaper and other.itl_s <= estimate.itl_s * 1.02 and other.ttft_s <= estimate.ttft_s * 1.1
