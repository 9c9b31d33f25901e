"""Writes the figures: one page with charts and tables that needs no network, and every number as JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.article.evidence import Evidence, gather
from bench.article.fronts import WORKLOADS, by_power, by_price, by_throughput, front
from bench.article.sections import axis, sections
from bench.article.sources import ARTICLE
from orchestrator.cli.report.page import page

PAGE, NUMBERS = "index.html", "figures.json"
TITLE = "The article's figures, simulated"


def write_figures(directory: Path, overrides: Mapping[str, float]) -> None:
    """Write `index.html` and `figures.json` into a directory, which is made if it is not there.

    The same overrides give the same files. Raises `CatalogError` for an override of a number that does not exist.
    """
    evidence = gather(overrides)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(numbers(evidence, overrides), indent=1, allow_nan=False)
    (directory / NUMBERS).write_text(text + "\n", encoding="utf-8")
    (directory / PAGE).write_text(page(TITLE, _made(overrides), sections(evidence)), encoding="utf-8")


def numbers(evidence: Evidence, overrides: Mapping[str, float]) -> dict[str, Any]:
    """Return every number of the page."""
    return {
        "article": asdict(ARTICLE),
        "overrides": dict(sorted(overrides.items())),
        "claims": [asdict(claim) for claim in evidence.claims],
        "session": [
            {
                "agent": one.turn.agent,
                "arrived_s": one.arrived_s,
                "ended_s": one.ended_s,
                "input_tokens": one.turn.input_tokens,
                "cached_tokens": one.cached_tokens,
                "output_tokens": one.output_tokens,
            }
            for one in evidence.session.served
        ],
        "workloads": [asdict(workload) for workload in WORKLOADS],
        "fronts": {
            axis(merit): [asdict(point) for points in evidence.fronts.values() for point in front(points, merit)]
            for merit in (by_throughput, by_power, by_price)
        },
        "ratios": {name: [asdict(ratio) for ratio in some] for name, some in evidence.ratios.items()},
        "checks": [{**asdict(one), "deviation": one.deviation} for one in evidence.checks],
        "effects": {
            **{f"speed, {name}": [asdict(effect) for effect in one.effects] for name, one in evidence.fastest.items()},
            "cost": [asdict(effect) for effect in evidence.cost.effects] if evidence.cost else [],
        },
        "compared": [{**asdict(one), "holds": one.holds, "factor": one.factor} for one in evidence.compared],
        "lpx_gains": [asdict(one) for one in evidence.lpx_gains],
        "free_decode_gains": evidence.free_decode_gains,
        "restoring": [{**asdict(one), "cmx_gain": one.cmx_gain} for one in evidence.restoring],
        "spared": [{**asdict(one), "stated": one.stated, "ours": one.ours} for one in evidence.spared],
        "assumptions": [asdict(one) for one in evidence.assumptions],
    }


def _made(overrides: Mapping[str, float]) -> list[str]:
    changed = ", ".join(f"{name}={value:g}" for name, value in sorted(overrides.items())) or "none"
    return [
        "Made by `python -m bench.article`, without randomness: the same numbers give the same page.",
        f"Overrides: {changed}. All numbers: {NUMBERS}, beside this page.",
        f"The article: {ARTICLE.text}, {ARTICLE.url}. Its Figures 3, 6 and 7 are qualitative: they have no numbers on the axes.",
    ]
