"""Writes the article's page, figures and verdicts first and detail folded, and every number as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.article.claim import MEANINGS, TONES, Claim, Finding, Verdict
from bench.article.claims import caching, cost, gpu_afd, lpx, measured, restoring, session, speed, tiers
from bench.article.figures import axis, details, figures
from bench.article.sources import ARTICLE
from bench.article.study import Study, begin
from orchestrator.cli.fronts import WORKLOADS, by_power, by_price, by_throughput, front
from orchestrator.cli.report.page import Badge, Section, Table, page
from orchestrator.profiles.catalog import Assumption

PAGE, NUMBERS = "index.html", "figures.json"
TITLE = "The article's figures, simulated"
#: The files of `claims/`, in the order of the page.
CLAIMS = (session, caching, speed, cost, lpx, measured, gpu_afd, restoring, tiers)
#: Profiles that only the times to fetch a context rest on.
RESTORING = ("cmx.", "vera.")


def write_figures(directory: Path, overrides: Mapping[str, float]) -> None:
    """Write `index.html` and `figures.json` into a directory, which is made if it is not there.

    The same overrides give the same files. Raises `CatalogError` for an override of a number that does not exist.
    """
    study = begin(overrides)
    findings = [claim.find(study) for claim in CLAIMS]
    assumptions = _assumptions(study, findings)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_numbers(study, findings, assumptions, overrides), indent=1, allow_nan=False)
    (directory / NUMBERS).write_text(text + "\n", encoding="utf-8")
    made = page(TITLE, _made(overrides), _sections(study, findings, assumptions))
    (directory / PAGE).write_text(made, encoding="utf-8")


def _sections(study: Study, findings: Sequence[Finding], assumptions: Sequence[Assumption]) -> list[Section]:
    claims = [claim for finding in findings for claim in finding.claims]
    behind = [section for finding in findings for section in finding.sections]
    return [*figures(study), _verdicts(claims), _reasons(claims), *details(study), *behind, _assumptions_section(assumptions)]


def _verdicts(claims: Sequence[Claim]) -> Section:
    rows = [(claim.text, claim.stated, claim.ours, Badge(str(claim.verdict), TONES[claim.verdict])) for claim in claims]
    text = (
        "Verdicts are computed from the numbers beside them. " + " ".join(f"{key}: {MEANINGS[key]}." for key in Verdict),
        "Rows in brackets are not the article's: they hold our model against what others have measured or projected.",
    )
    return Section("The article's numbers and ours", text, table=Table(("claim", "stated", "ours", "verdict"), rows))


def _reasons(claims: Sequence[Claim]) -> Section:
    headers = ("claim", "why the verdict, and what it would take", "how it was computed", "public support")
    rows = [(claim.text, claim.reason, claim.how, _support(claim)) for claim in claims]
    return Section("Why: formulas, sources, what would have to be true", table=Table(headers, rows), folded=True)


def _support(claim: Claim) -> str:
    return "; ".join(f"{source.text} ({source.url})" for source in claim.support) or "none needed"


def _assumptions(study: Study, findings: Sequence[Finding]) -> list[Assumption]:
    """Return the unpublished numbers that anything here rests on."""
    used = study.assumptions | {name for finding in findings for claim in finding.claims for name in claim.assumptions}
    return [one for one in study.catalog.assumptions if one.name in used or one.name.startswith(RESTORING)]


def _assumptions_section(assumptions: Sequence[Assumption]) -> Section:
    headers = ("assumption", "used", "range", "unit", "why")
    rows = [(one.name, f"{one.value:g}", f"{one.low:g} to {one.high:g}", one.unit, one.why) for one in assumptions]
    text = (
        "Numbers that nobody has published. Each can be set: python -m bench.article DIR --set NAME=VALUE.",
        "Beside these, models are taken to have one more layer to draft with, which Kimi-K2 was not published with.",
    )
    return Section("Assumptions", text, table=Table(headers, rows), folded=True)


def _numbers(
    study: Study, findings: Sequence[Finding], assumptions: Sequence[Assumption], overrides: Mapping[str, float]
) -> dict[str, Any]:
    """Return every number of the page."""
    found: dict[str, Any] = {
        "article": asdict(ARTICLE),
        "overrides": dict(sorted(overrides.items())),
        "claims": [asdict(claim) for finding in findings for claim in finding.claims],
        "session": [
            {
                "agent": one.turn.agent,
                "arrived_s": one.arrived_s,
                "ended_s": one.ended_s,
                "input_tokens": one.turn.input_tokens,
                "cached_tokens": one.cached_tokens,
                "output_tokens": one.output_tokens,
            }
            for one in study.session.served
        ],
        "workloads": [asdict(workload) for workload in WORKLOADS],
        "fronts": {
            axis(merit): [asdict(point) for points in study.fronts.values() for point in front(points, merit)]
            for merit in (by_throughput, by_power, by_price)
        },
        "checks": [{**asdict(one), "deviation": one.deviation} for one in study.checks],
        "effects": {},
        "assumptions": [asdict(one) for one in assumptions],
    }
    for finding in findings:
        found["effects"] |= finding.numbers.get("effects", {})
        found |= {name: value for name, value in finding.numbers.items() if name != "effects"}
    return found


def _made(overrides: Mapping[str, float]) -> list[str]:
    changed = ", ".join(f"{name}={value:g}" for name, value in sorted(overrides.items())) or "none"
    return [
        "Made by `python -m bench.article`, without randomness: the same numbers give the same page.",
        f"Overrides: {changed}. All numbers: {NUMBERS}, beside this page.",
        f"The article: {ARTICLE.text}, {ARTICLE.url}. Its Figures 3, 6 and 7 are qualitative: they have no numbers on the axes.",
    ]
