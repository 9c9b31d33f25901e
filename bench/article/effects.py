"""What a result hangs on, as the page shows it: a chart of the largest effects and a table of all."""

from collections.abc import Sequence

from bench.article.sensitivity import Sensitivity
from orchestrator.cli.report.charts import Swing, tornado_chart
from orchestrator.cli.report.page import Figure, Section, Table

SWINGS_MAX = 10


def effects_section(
    heading: str, text: Sequence[str], effects: Sequence[Sensitivity], base: float, axis: str, result: str
) -> Section:
    """Return the effects on a result that is `base` as things are; `axis` names it at the chart, `result` in the table."""
    return Section(heading, text, _tornado(effects, base, axis), _effects_table(effects, result), folded=True)


def _end(value: float, unit: str) -> str:
    return f"{value:g} {unit}"


def _ends(effect: Sensitivity) -> tuple[str, str]:
    low, high = ("does not fit" if end is None else f"{end:.4g}" for end in (effect.result_low, effect.result_high))
    return low, high


def _effects_table(effects: Sequence[Sensitivity], result: str) -> Table:
    headers = ("assumption", "used", "range", "unit", f"{result} at its low end", "at its high end")
    return Table(
        headers,
        [
            (effect.name, f"{effect.value:g}", f"{effect.low:g} to {effect.high:g}", effect.unit, *_ends(effect))
            for effect in effects
        ],
    )


def _tornado(effects: Sequence[Sensitivity], base: float, result: str) -> Figure | None:
    """Return a chart of the largest effects; those that make the result vanish at one end are in the table alone."""
    swings = [
        Swing(one.name, one.result_low, one.result_high, _end(one.low, one.unit), _end(one.high, one.unit))
        for one in effects
        if one.result_low is not None and one.result_high is not None
    ]
    return tornado_chart(swings[:SWINGS_MAX], base, result) if swings else None
