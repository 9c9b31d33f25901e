"""Charts and pages for reports: plotly figures, tables beside them, one HTML file that needs no network.

A chart function returns a `Figure` and knows nothing of where the numbers came from; `page` puts sections of text, figures and
tables into a single file with plotly's script inside. Colours are chosen to be told apart on light and dark grounds and without
seeing colour well (Okabe and Ito's palette, https://jfly.uni-koeln.de/color/); everything else follows the reader's preference.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from orchestrator.sim.outcome import Served

#: Vermilion and grey are the article's colours for sub-agents and the main agent, so they come last.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#b8a800", "#d55e00", "#888888")
MAIN_COLOUR, SUB_COLOUR = "#888888", "#e69f00"
CACHED_COLOUR, UNCACHED_COLOUR = "#009e73", "#d55e00"
DASHES = ("solid", "dash", "dot", "dashdot")
#: More points than this make a page slow; whole sessions, or groups of requests, are left out or joined beyond it.
POINTS_MAX = 2_000
BARS_MAX = 300
#: A cell of a table with more characters is prose.
FIGURE_CHARACTERS_MAX = 36
PLOT_CONFIG = {"responsive": True, "displayModeBar": False}


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


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a heading row; the first column names the row."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, paragraphs, and what stands under them. `text` is plain: it is escaped."""

    heading: str
    text: Sequence[str] = ()
    figure: go.Figure | None = None
    table: Table | None = None


def _figure(axes: Axes) -> go.Figure:
    """Return an empty chart."""
    figure = go.Figure()
    figure.update_layout(
        xaxis=_axis(axes.x, axes.x_log),
        yaxis=_axis(axes.y, axes.y_log),
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 70, "r": 20, "t": 20, "b": 60},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        hovermode="closest",
        height=420,
        template="none",
    )
    return figure


def _axis(title: str, is_log: bool) -> dict[str, object]:
    """Return an axis; a logarithmic one is marked at 1, 2 and 5."""
    kind: dict[str, object] = {"type": "log", "dtick": "D2"} if is_log else {}
    return {"title": {"text": title}, "automargin": True, **kind}


def lines_chart(series: Sequence[Series], axes: Axes) -> go.Figure:
    """Return lines through points, one colour a series; the dash changes when the colours have been used up."""
    x_log = axes.x_log and _spans_ten([x for one in series for x in one.x])
    y_log = axes.y_log and _spans_ten([y for one in series for y in one.y])
    figure = _figure(replace(axes, x_log=x_log, y_log=y_log))
    for index, one in enumerate(series):
        figure.add_scatter(
            x=list(one.x),
            y=list(one.y),
            name=one.name,
            mode="markers" if one.markers_only else "lines+markers" if len(one.x) <= 40 else "lines",
            text=list(one.labels) or None,
            line={"color": COLOURS[index % len(COLOURS)], "dash": DASHES[index // len(COLOURS) % len(DASHES)]},
        )
    return figure


def _spans_ten(values: Sequence[float]) -> bool:
    positive = [value for value in values if value > 0]
    return bool(positive) and max(positive) >= 10 * min(positive)


def pareto_chart(series: Sequence[Series], x: str, y: str, y_log: bool = True) -> go.Figure:
    """Return what is had against what it costs, such as throughput against interactivity, one line a system."""
    figure = lines_chart(series, Axes(x, y, y_log=y_log))
    figure.update_xaxes(rangemode="tozero")
    return figure


def distribution_chart(quantiles: Mapping[str, Sequence[tuple[float, float]]], x: str) -> go.Figure:
    """Return cumulative distributions: for each name its (value, share of all that are at most so large), ascending."""
    series = [Series(name, [value for value, _ in points], [share for _, share in points]) for name, points in quantiles.items()]
    return lines_chart(series, Axes(x, "share of all", x_log=True))


def stacked_chart(series: Sequence[Series], axes: Axes) -> go.Figure:
    """Return areas on top of each other, all over the same x."""
    figure = _figure(axes)
    for index, one in enumerate(series):
        colour = COLOURS[index % len(COLOURS)]
        figure.add_scatter(x=list(one.x), y=list(one.y), name=one.name, stackgroup="all", mode="lines", line={"color": colour})
    return figure


def bars_chart(groups: Mapping[str, Mapping[str, float]], y: str) -> go.Figure:
    """Return bars side by side: for each name one colour, over the same groups."""
    figure = _figure(Axes("", y))
    for index, (name, values) in enumerate(groups.items()):
        colour = {"color": COLOURS[index % len(COLOURS)]}
        figure.add_bar(x=list(values), y=list(values.values()), name=name, marker=colour)
    figure.update_layout(barmode="group")
    return figure


def tornado_chart(swings: Sequence[Swing], base: float, result: str) -> go.Figure:
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
        figure.add_bar(y=names, x=lengths, base=base, name=name, orientation="h", marker={"color": colour}, hovertext=labels)
    figure.update_layout(height=140 + 34 * len(names), barmode="overlay", shapes=[_upright(base)])
    return figure


def by_width(swings: Sequence[Swing]) -> list[Swing]:
    """Return the swings, the widest first."""
    return sorted(swings, key=lambda swing: (-abs(swing.high - swing.low), swing.name))


def _upright(x: float) -> dict[str, object]:
    return {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": {"color": "#888888", "dash": "dot"}}


def context_chart(served: Sequence[Served]) -> go.Figure:
    """Return the prompt length of every request over time, a line an agent: main agents grey, sub-agents orange.

    Of many sessions the longest are shown, as far as `POINTS_MAX` requests go.
    """
    figure = _figure(Axes("minutes since the start", "prompt tokens (context and new input)"))
    named: set[bool] = set()
    for session, agent, requests in _agents(longest_sessions(served)):
        is_main = agent == "main"
        figure.add_scatter(
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


def cache_chart(served: Sequence[Served]) -> go.Figure:
    """Return cached and computed prompt tokens in the order of arrival; more than `BARS_MAX` requests are joined in groups."""
    size = -(-len(served) // BARS_MAX) or 1
    ordered = sorted(served, key=lambda request: (request.arrived_s, request.turn.id))
    groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    cached = [sum(request.cached_tokens for request in group) for group in groups]
    computed = [sum(request.turn.input_tokens - request.cached_tokens for request in group) for group in groups]
    x = [start * size + 1 for start in range(len(groups))]
    what = "request, in order of arrival" if size == 1 else f"request, in order of arrival ({size} a bar)"
    figure = _figure(Axes(what, "prompt tokens"))
    figure.update_layout(barmode="stack", bargap=0.1)
    figure.add_bar(x=x, y=cached, name="from cache", marker={"color": CACHED_COLOUR})
    figure.add_bar(x=x, y=computed, name="computed", marker={"color": UNCACHED_COLOUR})
    return figure


def page(title: str, made: Sequence[str], sections: Sequence[Section]) -> str:
    """Return a whole HTML page; `made` are lines that say how it came about. The same arguments give the same text."""
    contents = "".join(f'<li><a href="#s{index}">{html.escape(one.heading)}</a></li>' for index, one in enumerate(sections))
    body = "".join(_section(index, one) for index, one in enumerate(sections))
    how = "".join(f"<p>{html.escape(line)}</p>" for line in made)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>'
        f'<script>{get_plotlyjs()}</script></head>\n<body><main><h1>{html.escape(title)}</h1><div class="made">{how}</div>'
        f'<nav aria-label="Contents"><ol>{contents}</ol></nav>{body}</main></body></html>\n'
    )


def _section(index: int, section: Section) -> str:
    text = "".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in section.text)
    figure = table = ""
    if section.figure is not None:
        plot = section.figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"plot{index}", config=PLOT_CONFIG)
        figure = f'<figure role="img" aria-label="Chart: {html.escape(section.heading)}">{plot}</figure>'
    if section.table is not None:
        table = _table(section.table)
    return f'<section id="s{index}"><h2>{html.escape(section.heading)}</h2>{text}{figure}{table}</section>\n'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.headers)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(first)}</th>{"".join(_cell(cell) for cell in rest)}</tr>'
        for first, *rest in table.rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(text: str) -> str:
    """Return a cell; a long text may be broken into lines, a figure may not."""
    kind = ' class="text"' if len(text) > FIGURE_CHARACTERS_MAX else ""
    return f"<td{kind}>{html.escape(text)}</td>"


#: plotly writes colours into every text and line; these rules are what makes them follow the reader's preference.
STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1a1a1a; --faint: #d9d9d9; --soft: #f4f4f4; --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16181c; --ink: #e8e8e8; --faint: #3a3d42; --soft: #202328; --link: #7ab8ff; }
}
body { background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0; }
main { max-width: 70rem; margin: 0 auto; padding: 1rem; }
a { color: var(--link); }
.made { background: var(--soft); padding: .5rem 1rem; font-size: .9rem; overflow-wrap: anywhere; }
.made p { margin: .2rem 0; }
figure { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--faint); padding: .25rem .75rem; text-align: right; vertical-align: top; }
td { white-space: nowrap; }
td.text { min-width: 14em; text-align: left; white-space: normal; }
th[scope=row], th:first-child { text-align: left; font-weight: 500; }
.js-plotly-plot .main-svg text { fill: var(--ink) !important; }
.js-plotly-plot .hoverlayer text { fill: #fff !important; }
.js-plotly-plot .gridlayer path, .js-plotly-plot .zerolinelayer path { stroke: var(--faint) !important; }
"""
