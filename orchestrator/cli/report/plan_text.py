"""Says what a search for a plan found: the front as a table, the pick and why, what comes next, what fell out."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil, isfinite
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from orchestrator.cli.report.page import Table
from orchestrator.plan.goal import Budget, Slo
from orchestrator.plan.measure import Measured
from orchestrator.plan.planner import Answer, Question
from orchestrator.plan.tiers import Tried, best_of
from orchestrator.profiles.catalog import Catalog
from orchestrator.profiles.resolve import acceptance_of

BAR_CELLS = 16


@dataclass(frozen=True, slots=True)
class Told:
    """An answer with what was asked."""

    command: str
    question: Question
    answer: Answer
    notes: Sequence[str]
    catalog: Catalog
    #: What was tried below the pick's memory; empty unless that was asked for.
    tiers: Sequence[Tried] = ()

    def number(self, one: Measured) -> int:
        """Return a simulated plan's number: in the order of prices."""
        ordered = sorted(self.answer.measured, key=lambda one: (one.price.usd_per_hour, one.itl_s, str(one.plan)))
        return ordered.index(one) + 1


def print_answer(told: Told) -> None:
    """Print the front, the plans on it, the pick and why."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=150)
    front = front_table(told)
    shown = RichTable(*front.headers)
    for row in front.rows:
        shown.add_row(*row)
    console.print(shown)
    for one in told.answer.front:
        console.print(f"{told.number(one):3}  {one.plan}", soft_wrap=True)
    if told.tiers:
        tiers = tiers_table(told)
        shown = RichTable(*tiers.headers)
        for row in tiers.rows:
            shown.add_row(*row)
        console.print(shown)
    for line in (*told.notes, *(reasons(told) if told.answer.pick else shortfalls(told))):
        console.print(line, soft_wrap=True)
    fell = pruned_table(told.answer)
    shown = RichTable(*fell.headers)
    for row in fell.rows:
        shown.add_row(*row)
    console.print(shown)


def front_table(told: Told) -> Table:
    """Return the plans that nothing beats, cheapest first, with a bar for the price."""
    percent = f"p{100 * told.question.slo.percentile:g}"
    headers = ["plan", "USD/h", "", "kW", "GPUs", f"TTFT {percent}", f"ITL {percent}", "goodput", "out tokens/USD", "hits", ""]
    front = told.answer.front
    # Chips that cost nothing may be planned with too.
    dearest = max((one.price.usd_per_hour for one in front), default=1.0) or 1.0
    return Table(headers, [_row(told, one, dearest) for one in front])


def tiers_table(told: Told) -> Table:
    """Return what the pick reaches with what below its memory."""
    headers = ["CPU memory a host", "CMX", f"TTFT p{100 * told.question.slo.percentile:g}", "hits", "hbm", "cpu", "cmx", ""]
    best = best_of(told.tiers)
    rows: list[list[str]] = []
    for one in told.tiers:
        store = one.store
        sizes = [f"{store.cpu_bytes / 1e9:,.3g} GB" if store else "none", "yes" if store and store.cmx else "none"]
        shares = [f"{100 * share:.1f} %" for share in (one.hit_rate, one.hbm, one.cpu, one.cmx)]
        rows.append([*sizes, f"{one.ttft_s:.3g} s", *shares, "enough" if one is best else ""])
    return Table(headers, rows)


def _row(told: Told, one: Measured, dearest: float) -> list[str]:
    price = one.price
    return [
        str(told.number(one)),
        f"{price.usd_per_hour:,.1f}",
        "#" * max(1, round(BAR_CELLS * price.usd_per_hour / dearest)),
        f"{price.kw:,.1f}",
        f"{price.gpus:g}",
        f"{one.ttft_s:.3g} s",
        f"{1e3 * one.itl_s:.3g} ms",
        f"{100 * one.goodput:.1f} %",
        f"{one.output_tokens_per_usd:,.0f}",
        f"{100 * one.hit_rate:.1f} %",
        _verdict(told, one),
    ]


def _verdict(told: Told, one: Measured) -> str:
    if one is told.answer.pick:
        return "pick"
    if one.failed:
        return f"{one.failed} failed"
    over = [] if told.question.budget.allows(one.price) else ["over budget"]
    slo = told.question.slo
    if slo.excess(one.ttft_s, one.itl_s) > 1.0:
        over.append(f"{slo.binding(one.ttft_s, one.itl_s)} too long")
    return ", ".join(over) or "also good"


def pruned_table(answer: Answer) -> Table:
    """Return how many plans and pools fell out before simulation, and why."""
    rows = [[f"{count:,}", reason.value] for reason, count in answer.swept.pruned.most_common()]
    return Table(["fell out", "because"], rows)


def reasons(told: Told) -> list[str]:
    """Return why the pick was picked, how near the next best is, and what it rests on."""
    answer, slo = told.answer, told.question.slo
    pick = answer.pick
    assert pick is not None, "there is no pick to explain"
    price = pick.price
    lines = [
        f"Pick: plan {told.number(pick)}, {pick.plan}: {price.usd_per_hour:.2f} USD/h, {price.kw:.1f} kW, {price.gpus:g} GPUs.",
        f"It is the cheapest of {len(answer.measured)} simulated plans that keeps the limits at the "
        f"{100 * slo.percentile:g}th percentile: {_used(slo, pick)}. {slo.binding(pick.ttft_s, pick.itl_s)} binds.",
    ]
    if answer.runner_up is not None:
        lines.append(
            f"Next best: plan {told.number(answer.runner_up)}, {_beside(pick, answer.runner_up)}: {answer.runner_up.plan}."
        )
    if answer.near_miss is not None:
        miss = answer.near_miss
        lines.append(f"Cheaper, but not enough: plan {told.number(miss)}, {_miss(slo, miss)}: {miss.plan}.")
    lines.append(
        f"Looked at {answer.swept.considered:,} plans and pools; {len(answer.swept.kept):,} plans were good enough by prediction."
    )
    if pick.balance is not None:
        made = pick.plan.decode.hardware
        ratio = f"{made.chips * made.group_nodes} to {made.ffn_chips}"
        lines.append(
            f"With {ratio} chips attention is {pick.balance:.2f} times as busy as FFNs: at 1 neither waits for the other."
        )
    if pick.beat_share is not None:
        lines.append(f"{100 * pick.beat_share:.2f} % of the tokens came on the beat, the others from the decode pool beside it.")
    drafting = [pool.hardware for pool in pick.plan.pools if pool.hardware.draft_tokens]
    if drafting:
        chance = acceptance_of(drafting[0], told.catalog)
        lines.append(f"Each drafted token is taken to be accepted with a chance of {chance:g}: measure yours.")
    if pick.assumptions:
        lines.append(f"It rests on {len(pick.assumptions)} unpublished numbers: {', '.join(pick.assumptions)}.")
    return lines


def _used(slo: Slo, one: Measured) -> str:
    return (
        f"TTFT {one.ttft_s:.3g} s is {100 * one.ttft_s / slo.ttft_s:.0f} % of its limit, "
        f"ITL {1e3 * one.itl_s:.3g} ms is {100 * one.itl_s / slo.itl_s:.0f} %"
    )


def _beside(pick: Measured, other: Measured) -> str:
    more = other.price.usd_per_hour - pick.price.usd_per_hour
    dearer = f"{100 * more / pick.price.usd_per_hour:.1f} %" if pick.price.usd_per_hour else f"{more:.2f} USD/h"
    if not pick.itl_s:  # No answer had a second token.
        return f"{dearer} dearer"
    faster = 1 - other.itl_s / pick.itl_s
    return f"{dearer} dearer, ITL {abs(100 * faster):.0f} % {'shorter' if faster >= 0 else 'longer'}"


def _miss(slo: Slo, one: Measured) -> str:
    if one.failed:
        return f"{one.failed} requests fail"
    over = 100 * (slo.excess(one.ttft_s, one.itl_s) - 1)
    return f"its {slo.binding(one.ttft_s, one.itl_s)} is {over:.0f} % over the limit"


def shortfalls(told: Told) -> list[str]:
    """Return what would have to change for there to be a plan."""
    slo, answer = told.question.slo, told.answer
    budgeted = told.question.budget != Budget()
    within = " within the budget" if budgeted else ""
    lines = [f"No plan{within} keeps TTFT {slo.ttft_s:g} s and ITL {slo.itl_s:g} s at p{100 * slo.percentile:g}."]
    if answer.affordable_at is not None:
        one = answer.affordable_at
        needs = [
            f"{ceil(getattr(one.price, key) * 100) / 100:g} {unit}"
            for key, unit in (("gpus", "GPUs"), ("usd_per_hour", "USD/h"), ("kw", "kW"))
            if isfinite(getattr(told.question.budget, key))
        ]
        lines.append(f"It needs at least {' and '.join(needs)}: {one.plan}.")
    elif budgeted:
        lines.append("No larger budget was found to help.")
    if answer.closest is not None:
        one = answer.closest
        failing = f", {one.failed} requests fail" if one.failed else ""
        where = "Within the budget" if budgeted else "Nearest"
        lines.append(f"{where}: TTFT {one.ttft_s:.3g} s and ITL {one.itl_s:.3g} s{failing} with {one.plan}.")
    return lines


def _tier_json(one: Tried, told: Told) -> dict[str, Any]:
    store = one.store
    return {
        "cpu_bytes": store.cpu_bytes if store is not None else 0,
        "cmx_bytes": store.cmx_bytes if store is not None and store.cmx else 0,
        "ttft_s": one.ttft_s,
        "hit_rate": {"hbm": one.hbm, "cpu": one.cpu, "cmx": one.cmx},
        "enough": one is best_of(told.tiers),
    }


def as_json(told: Told) -> dict[str, Any]:
    """Return all that was found, as it is written to a JSON file."""
    answer = told.answer
    single = {
        name: None if one is None else told.number(one)
        for name, one in (
            ("pick", answer.pick),
            ("runner_up", answer.runner_up),
            ("near_miss", answer.near_miss),
            ("closest", answer.closest),
            ("affordable_at", answer.affordable_at),
        )
    }
    ordered = sorted(answer.measured, key=told.number)
    return {
        "slo": asdict(told.question.slo),
        "budget": {key: value for key, value in asdict(told.question.budget).items() if isfinite(value)},
        **single,
        "front": [told.number(one) for one in answer.front],
        "tiers": [_tier_json(one, told) for one in told.tiers],
        "plans": [{"number": told.number(one), **_plan_json(one)} for one in ordered],
        "considered": answer.swept.considered,
        "pruned": {reason.value: count for reason, count in answer.swept.pruned.items()},
        "why": reasons(told) if answer.pick else shortfalls(told),
    }


def _plan_json(one: Measured) -> dict[str, Any]:
    fields = asdict(one)
    fields.pop("plan")
    return {**fields, "description": str(one.plan), "pools": [asdict(pool) for pool in one.plan.pools]}
