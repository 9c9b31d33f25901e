"""Sets simulated runs beside each other: a column a run, a row a figure, as text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.cli.report.page import Table
from orchestrator.sim.bounds import Bound
from orchestrator.sim.runs import Run

NOTHING = "–"


@dataclass(frozen=True, slots=True)
class Column:
    """One run under its heading."""

    heading: str
    run: Run
    #: What theory gives as hit rate: for runs that stand for a bound.
    bound: Bound | None = None


def seconds(value: float | None) -> str:
    """Return a time with three digits and the unit that suits it."""
    if value is None:
        return NOTHING
    if value < 1:
        return f"{1e3 * value:.3g} ms"
    return f"{value:.3g} s" if value < 1000 else f"{value:,.0f} s"


def number(value: float | None) -> str:
    """Return a number with three digits, or with all that stand before the point."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def size(size_bytes: float) -> str:
    """Return bytes with three digits, in GB."""
    return f"{size_bytes / 1e9:,.3g} GB"


def percent(value: float | None) -> str:
    """Return a share of 0 to 1 in hundredths."""
    return NOTHING if value is None else f"{100 * value:.2f} %"


#: Name of a row, the way to its figure, how it is written.
Row = tuple[str, tuple[str, ...], Callable[[float | None], str]]
HIT_RATE: Row = ("hit rate", ("hit_rate",), percent)
#: Its parts, where there are stores.
TIERS: tuple[Row, ...] = tuple((f"hit rate, {tier}", ("hit_rate_by_tier", tier), percent) for tier in ("hbm", "cpu", "cmx"))
ROWS: tuple[Row, ...] = (
    ("requests completed", ("completed",), number),
    *((f"TTFT {at}", ("ttft_s", at), seconds) for at in ("p50", "p90", "p99")),
    *((f"ITL {at}", ("itl_s", at), seconds) for at in ("p50", "p90", "p99")),
    ("tokens/s/user p50", ("tokens_per_s_per_user", "p50"), number),
    ("tokens/s/user p10", ("tokens_per_s_per_user", "p10"), number),
    *((f"session time {at}", ("session_s", at), seconds) for at in ("mean", "p50", "p90")),
    ("output tokens/s/GPU", ("tokens_per_s_per_gpu",), number),
    ("USD / M output tokens", ("usd_per_million_output_tokens",), number),
    ("USD / M tokens", ("usd_per_million_tokens",), number),
    ("kWh / M tokens", ("kwh_per_million_tokens",), number),
    ("simulated in", ("wall_s",), seconds),
)


#: Of a pool whose experts' load is skewed.
EXPERTS = (
    ("expert imbalance, spread", "spread", percent),
    ("expert imbalance, placed", "placed", percent),
)
#: Of a pool that keeps a beat.
BEAT = (
    ("beats", "beats", number),
    ("beats missed", "missed", number),
    ("slots taken", "slots", number),
    ("work in a beat", "work", percent),
)
#: Of a pool whose passes have two halves.
SPLIT = (
    ("attention half busy", "attention_busy", percent),
    ("FFN half busy", "ffn_busy", percent),
    ("attention over FFN", "balance", number),
    ("hidden by micro-batches", "hidden", percent),
)


def figure_of(run: Run, path: Sequence[str]) -> float | None:
    """Return a figure by the way to it, such as ("session_s", "p50")."""
    value: object = run.figures
    for part in path:
        value = value.get(part) if isinstance(value, dict) else None
    return float(value) if isinstance(value, (int, float)) else None


def comparison(columns: Sequence[Column]) -> Table:
    """Return the table of all figures; the rows are the same for every column."""
    rows = [_row(HIT_RATE, columns)]
    if any(column.run.figures.get("stores") for column in columns):
        rows += [_row(row, columns) for row in TIERS]
    if any(column.bound for column in columns):
        rows.append(["hit rate, bound", *(percent(column.bound.hit_rate) if column.bound else "" for column in columns)])
    rows += [_row(row, columns) for row in (*ROWS[:-1], *_pool_rows(columns[0].run), ROWS[-1])]
    return Table(["", *(column.heading for column in columns)], rows)


def _pool_rows(run: Run) -> list[Row]:
    rows: list[Row] = []
    for pool in run.figures["pools"]:
        rows.append((f"{pool}: utilisation", ("pools", pool, "utilisation"), percent))
        rows.append((f"{pool}: mean queue", ("pools", pool, "queue", "mean"), number))
        for part, entries in (("split", SPLIT), ("experts", EXPERTS), ("beat", BEAT)):
            if run.figures["pools"][pool][part] is not None:
                rows += [(f"{pool}: {name}", ("pools", pool, part, key), text) for name, key, text in entries]
    return rows


def _row(row: Row, columns: Sequence[Column]) -> list[str]:
    name, path, text = row
    return [name, *(text(figure_of(column.run, path)) for column in columns)]
