"""Pages of charts, tables and text: one HTML file that needs no network, drawn by plotly's script, which it contains.

A `Figure` is what plotly.js draws, as plain data (https://plotly.com/javascript/reference/); plotly's Python package is needed
for its script alone, and only when a page has charts.
"""

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.resources import files
from typing import Any

from orchestrator.cli.cluster_file import UnusableInput

PLOT_CONFIG = {"responsive": True, "displayModeBar": False}
#: A cell of a table with more characters is prose: it may be broken into lines.
FIGURE_CHARACTERS_MAX = 36
#: What a figure in a cell may begin with: a number, a range, a share, "-" for none.
_FIGURE = re.compile(r"^[<>~±+\-−]?\s*(about )?[\d.,]+")


class Tone(StrEnum):
    """How a cell is coloured; what it says is in its words."""

    GOOD = "good"
    MIDDLING = "middling"
    BAD = "bad"
    NEUTRAL = "neutral"


class Badge(str):
    """A cell that is seen at a glance: a word on a colour."""

    tone: Tone

    def __new__(cls, text: str, tone: Tone) -> "Badge":
        badge = super().__new__(cls, text)
        badge.tone = tone
        return badge


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a heading row; the first column names the row."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(slots=True)
class Figure:
    """A chart as plotly.js takes it: its traces and its layout."""

    layout: dict[str, Any]
    data: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def add(self, kind: str, **trace: Any) -> None:
        """Add a trace, such as a "scatter" or a "bar"."""
        self.data.append({"type": kind, **trace})

    @property
    def script(self) -> str:
        """Return both as JavaScript that can stand in a page."""
        text = json.dumps([self.data, self.layout], allow_nan=False, separators=(",", ":"))
        return text.replace("</", "<\\/")


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, paragraphs, and what stands under them. `text` is plain: it is escaped."""

    heading: str
    text: Sequence[str] = ()
    figure: Figure | None = None
    table: Table | None = None
    #: Whether it is shown only when the reader opens it.
    folded: bool = False


def plotly_script() -> str:
    """Return plotly.js. Raises `UnusableInput` where plotly is not installed."""
    try:
        return (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    except ModuleNotFoundError:
        raise UnusableInput("charts need plotly, which is not installed: pip install 'weft[plan]'") from None


def page(title: str, made: Sequence[str], sections: Sequence[Section]) -> str:
    """Return a whole HTML page; `made` are lines that say how it came about. The same arguments give the same text.

    Raises `UnusableInput` where there are charts and plotly is not installed.
    """
    contents = "".join(f'<li><a href="#s{index}">{html.escape(one.heading)}</a></li>' for index, one in enumerate(sections))
    body = "".join(_section(index, one) for index, one in enumerate(sections))
    how = "".join(f"<p>{html.escape(line)}</p>" for line in made)
    script = f"<script>{plotly_script()}</script><script>{DRAWER}</script>" if any(one.figure for one in sections) else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>'
        f"{script}</head>\n<body><main><h1>{html.escape(title)}</h1>"
        f'<details class="made"><summary>Contents, and how this page was made</summary>{how}'
        f'<nav aria-label="Contents"><ol>{contents}</ol></nav></details>{body}</main><script>{OPENER}</script></body></html>\n'
    )


def _section(index: int, section: Section) -> str:
    text = "".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in section.text)
    figure = "" if section.figure is None else _chart(index, section.heading, section.figure)
    table = "" if section.table is None else _table(section.table)
    heading = f"<h2>{html.escape(section.heading)}</h2>"
    if section.folded:
        return f'<details id="s{index}"><summary>{heading}</summary>{text}{figure}{table}</details>\n'
    return f'<section id="s{index}">{heading}{text}{figure}{table}</section>\n'


def _chart(index: int, heading: str, figure: Figure) -> str:
    """Return a chart's place and its data."""
    height = figure.layout.get("height", 420)
    return (
        f'<figure role="img" aria-label="Chart: {html.escape(heading)}"><div id="plot{index}" style="height:{height}px"></div>'
        f'<script>draw("plot{index}",{figure.script});</script></figure>'
    )


def _table(table: Table) -> str:
    prose = [_is_prose([row[column] for row in table.rows]) for column in range(len(table.headers))]
    head = "".join(
        f'<th scope="col"{_kind(is_prose)}>{html.escape(name)}</th>' for name, is_prose in zip(table.headers, prose, strict=True)
    )
    rows = "".join(_row(row, prose) for row in table.rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _is_prose(cells: Sequence[str]) -> bool:
    """Tell words, which stand at the left and may be broken into lines, from figures."""
    return any(len(cell) > FIGURE_CHARACTERS_MAX for cell in cells) or not all(
        _FIGURE.match(cell) or cell in ("", "-", "none") for cell in cells
    )


def _kind(is_prose: bool) -> str:
    return ' class="text"' if is_prose else ""


def _row(row: Sequence[str], prose: Sequence[bool]) -> str:
    first, *rest = row
    cells = "".join(f"<td{_kind(is_prose)}>{_cell(cell)}</td>" for cell, is_prose in zip(rest, prose[1:], strict=True))
    return f'<tr><th scope="row"{_kind(prose[0])}>{_cell(first)}</th>{cells}</tr>'


def _cell(cell: str) -> str:
    if isinstance(cell, Badge):
        return f'<span class="badge {cell.tone}">{html.escape(cell)}</span>'
    return html.escape(cell)


#: Draws a chart once it can be seen: one in a folded section has no width before.
DRAWER = f"""
const draw = (id, [data, layout]) => {{
  const place = document.getElementById(id);
  new IntersectionObserver((seen, watch) => {{
    if (!seen.some(one => one.isIntersecting)) return;
    watch.disconnect();
    Plotly.newPlot(place, data, layout, {json.dumps(PLOT_CONFIG)});
  }}, {{rootMargin: "600px"}}).observe(place);
}};
"""

#: Opens the folded section that a link leads to.
OPENER = """
const open = () => {
  const one = document.getElementById(location.hash.slice(1));
  if (one && one.tagName === "DETAILS") one.open = true;
};
addEventListener("hashchange", open); open();
"""

#: plotly writes colours into every text and line; these rules are what makes them follow the reader's preference.
STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1a1a1a; --faint: #d9d9d9; --soft: #f4f4f4; --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16181c; --ink: #e8e8e8; --faint: #3a3d42; --soft: #202328; --link: #7ab8ff; }
}
body { background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0; }
main { max-width: 76rem; margin: 0 auto; padding: 1rem; }
a { color: var(--link); }
.made { background: var(--soft); padding: .5rem 1rem; font-size: .9rem; overflow-wrap: anywhere; }
.made p { margin: .2rem 0; }
summary { cursor: pointer; }
summary h2 { display: inline; font-size: 1.1rem; }
details { margin: .6rem 0; }
figure { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; max-width: 100%; }
th, td { border-bottom: 1px solid var(--faint); padding: .25rem .75rem; text-align: right; vertical-align: top; }
td { white-space: nowrap; }
th.text, td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
td.text { min-width: 8em; }
th[scope=row], th:first-child { text-align: left; font-weight: 500; }
th[scope=row].text { min-width: 14em; }
.badge { border-radius: .3rem; padding: .05rem .5rem; color: #fff; font-weight: 600; white-space: nowrap; }
.badge.good { background: #00704f; }
.badge.middling { background: #8a5a00; }
.badge.bad { background: #b04000; }
.badge.neutral { background: #5f6368; }
.js-plotly-plot .main-svg text { fill: var(--ink) !important; }
.js-plotly-plot .hoverlayer text { fill: #fff !important; }
.js-plotly-plot .gridlayer path, .js-plotly-plot .zerolinelayer path { stroke: var(--faint) !important; }
"""
