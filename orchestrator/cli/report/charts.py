"""Charts for reports: numbers in, what plotly.js draws out.

A chart function returns a `Figure` and knows nothing of where the numbers came from. Colours are chosen to be told apart on light
and dark grounds and without seeing colour well (Okabe and Ito's palette, https://jfly.uni-koeln.de/color/); everything else
follows the reader's preference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from orchestrator.cli.report.page import Figure
from orchestrator.sim.outcome import Served

#: Vermilion and grey are the article's colours for sub-agents and the main agent, so they come last.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#b8a800", "#d55e00", "#888888")
MAIN_COLOUR, SUB_COLOUR = "#888888", "#e69f00"
CACHED_COLOUR, UNCACHED_COLOUR = "#009e73", "#d55e00"
CPU_COLOUR, CMX_COLOUR = "#56b4e9", "#0072b2"
DASHES = ("solid", "dash", "dot", "dashdot")
#: More points than this make a page slow; whole sessions, or groups of requests, are left out or joined beyond it.
POINTS_MAX = 2_000
BARS_MAX = 300


@dataclass(frozen=True, slots=True)
class Axes:
    """What the axes say, and which of them are logarithmic if their values span a factor of ten."""

    x: str
    y: str
    x_log: bool = False
    y_log: bool = False


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart; `labels` are shown beside the pointer, one a point."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    labels: Sequence[str] = ()
    #: Points alone, without a line through them.
    markers_only: bool = False


@dataclass(frozen=True, slots=True)
class Swing:
    """How far one assumption moves a result: the result with it at its low and at its high end."""

    name: str
    low: float
    high: float
    #: What the ends are, such as "350 W".
    low_label: str = ""
    high_label: str = ""


def _figure(axes: Axes) -> Figure:
    """Return an empty chart."""
    return Figure(
        {
            "xaxis": _axis(axes.x, axes.x_log),
            "yaxis": _axis(axes.y, axes.y_log),
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 13},
            "margin": {"l": 70, "r": 20, "t": 20, "b": 60},
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
            "hovermode": "closest",
            "height": 420,
        }
    )


def _axis(title: str, is_log: bool) -> dict[str, object]:
    """Return an axis; a logarithmic one is marked at 1, 2 and 5."""
    kind: dict[str, object] = {"type": "log", "dtick": "D2"} if is_log else {}
    return {"title": {"text": title}, "automargin": True, **kind}


def lines_chart(series: Sequence[Series], axes: Axes) -> Figure:
    """Return lines through points, one colour a series; the dash changes when the colours have been used up."""
    x_log = axes.x_log and _spans_ten([x for one in series for x in one.x])
    y_log = axes.y_log and _spans_ten([y for one in series for y in one.y])
    figure = _figure(replace(axes, x_log=x_log, y_log=y_log))
    for index, one in enumerate(series):
        figure.add(
            "scatter",
            x=list(one.x),
            y=list(one.y),
            name=one.name,
            mode="markers" if one.markers_only else "lines+markers" if len(one.x) <= 40 else "lines",
            text=list(one.labels),
            line={"color": COLOURS[index % len(COLOURS)], "dash": DASHES[index // len(COLOURS) % len(DASHES)]},
        )
    return figure


def _spans_ten(values: Sequence[float]) -> bool:
    positive = [value for value in values if value > 0]
    return bool(positive) and max(positive) >= 10 * min(positive)


def pareto_chart(series: Sequence[Series], x: str, y: str, y_log: bool = True) -> Figure:
    """Return what is had against what it costs, such as throughput against interactivity, one line a system."""
    figure = lines_chart(series, Axes(x, y, y_log=y_log))
    figure.layout["xaxis"]["rangemode"] = "tozero"
    return figure


def distribution_chart(quantiles: Mapping[str, Sequence[tuple[float, float]]], x: str) -> Figure:
    """Return cumulative distributions: for each name its (value, share of all that are at most so large), ascending."""
    series = [Series(name, [value for value, _ in points], [share for _, share in points]) for name, points in quantiles.items()]
    return lines_chart(series, Axes(x, "share of all", x_log=True))


def stacked_chart(series: Sequence[Series], axes: Axes) -> Figure:
    """Return areas on top of each other, all over the same x."""
    figure = _figure(axes)
    for index, one in enumerate(series):
        colour = COLOURS[index % len(COLOURS)]
        figure.add("scatter", x=list(one.x), y=list(one.y), name=one.name, stackgroup="all", mode="lines", line={"color": colour})
    return figure


def bars_chart(groups: Mapping[str, Mapping[str, float]], y: str) -> Figure:
    """Return bars side by side: for each name one colour, over the same groups."""
    figure = _figure(Axes("", y))
    for index, (name, values) in enumerate(groups.items()):
        colour = {"color": COLOURS[index % len(COLOURS)]}
        figure.add("bar", x=list(values), y=list(values.values()), name=name, marker=colour)
    figure.layout["barmode"] = "group"
    return figure


def tornado_chart(swings: Sequence[Swing], base: float, result: str) -> Figure:
    """Return a bar a named assumption from the result at its low end to the one at its high end, the widest on top."""
    ordered = by_width(swings)[::-1]
    names = [swing.name for swing in ordered]
    figure = _figure(Axes(result, ""))
    ends = (
        ("at its low end", "#0072b2", [swing.low for swing in ordered], [swing.low_label for swing in ordered]),
        ("at its high end", "#d55e00", [swing.high for swing in ordered], [swing.high_label for swing in ordered]),
    )
    for name, colour, values, labels in ends:
        lengths = [value - base for value in values]
        figure.add("bar", y=names, x=lengths, base=base, name=name, orientation="h", marker={"color": colour}, hovertext=labels)
    figure.layout |= {"height": 140 + 34 * len(names), "barmode": "overlay", "shapes": [_upright(base)]}
    return figure


def by_width(swings: Sequence[Swing]) -> list[Swing]:
    """Return the swings, the widest first."""
    return sorted(swings, key=lambda swing: (-abs(swing.high - swing.low), swing.name))


def _upright(x: float) -> dict[str, object]:
    return {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": {"color": "#888888", "dash": "dot"}}


def context_chart(served: Sequence[Served]) -> Figure:
    """Return the prompt length of every request over time, a line an agent: main agents grey, sub-agents orange.

    Of many sessions the longest are shown, as far as `POINTS_MAX` requests go.
    """
    figure = _figure(Axes("minutes since the start", "prompt tokens (context and new input)"))
    named: set[bool] = set()
    for session, agent, requests in _agents(longest_sessions(served)):
        is_main = agent == "main"
        figure.add(
            "scatter",
            x=[request.arrived_s / 60 for request in requests],
            y=[request.turn.input_tokens for request in requests],
            name="main agent" if is_main else "sub-agents",
            legendgroup=str(is_main),
            showlegend=is_main not in named,
            mode="lines+markers",
            marker={"size": 4},
            line={"color": MAIN_COLOUR if is_main else SUB_COLOUR, "width": 1.5},
            text=f"{session} / {agent}",
        )
        named.add(is_main)
    return figure


def longest_sessions(served: Sequence[Served]) -> list[Served]:
    """Return the sessions with most requests, whole, as far as `POINTS_MAX` goes but at least one, in the order of arrival."""
    sessions: dict[str, list[Served]] = {}
    for request in served:
        sessions.setdefault(request.turn.session, []).append(request)
    chosen: list[Served] = []
    for _, requests in sorted(sessions.items(), key=lambda item: (-len(item[1]), item[0])):
        if chosen and len(chosen) + len(requests) > POINTS_MAX:
            break
        chosen += requests
    return sorted(chosen, key=lambda request: (request.arrived_s, request.turn.id))


def _agents(served: Sequence[Served]) -> list[tuple[str, str, list[Served]]]:
    """Return (session, agent, its requests), main agents last so that they are drawn on top."""

    def agent(request: Served) -> tuple[bool, str, str]:
        return request.turn.agent == "main", request.turn.session, request.turn.agent

    return [(key[1], key[2], list(requests)) for key, requests in groupby(sorted(served, key=agent), key=agent)]


def cache_chart(served: Sequence[Served]) -> Figure:
    """Return cached prompt tokens, by tier where stores brought some, and computed ones, in the order of arrival.

    More than `BARS_MAX` requests are joined in groups.
    """
    size = -(-len(served) // BARS_MAX) or 1
    ordered = sorted(served, key=lambda request: (request.arrived_s, request.turn.id))
    groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    cpu = [sum(request.cpu_tokens for request in group) for group in groups]
    cmx = [sum(request.cmx_tokens for request in group) for group in groups]
    hbm = [
        sum(request.cached_tokens for request in group) - loaded - recalled
        for group, loaded, recalled in zip(groups, cpu, cmx, strict=True)
    ]
    computed = [sum(request.turn.input_tokens - request.cached_tokens for request in group) for group in groups]
    x = [start * size + 1 for start in range(len(groups))]
    what = "request, in order of arrival" if size == 1 else f"request, in order of arrival ({size} a bar)"
    figure = _figure(Axes(what, "prompt tokens"))
    figure.layout |= {"barmode": "stack", "bargap": 0.1}
    tiers = any(cpu) or any(cmx)
    figure.add("bar", x=x, y=hbm, name="from hbm" if tiers else "from cache", marker={"color": CACHED_COLOUR})
    if tiers:
        figure.add("bar", x=x, y=cpu, name="from cpu", marker={"color": CPU_COLOUR})
        figure.add("bar", x=x, y=cmx, name="from cmx", marker={"color": CMX_COLOUR})
    figure.add("bar", x=x, y=computed, name="computed", marker={"color": UNCACHED_COLOUR})
    return figure
