"""The page's tables and tornados: speeds, ratios, comparisons with others' numbers, and the assumptions behind them."""

from collections.abc import Mapping, Sequence

from bench.article.checks import DECODE_NODES, PREFILL_NODES, Check
from bench.article.claims import ABOUT
from bench.article.cost_claim import COST_SPEED, COST_TARGET, COST_WORKLOAD, SPEEDS, CostEffects
from bench.article.evidence import Evidence
from bench.article.fronts import AGENTIC, RUBIN, best_at, by_price, model_of
from bench.article.measured import Compared
from bench.article.sensitivity import Sensitivity
from bench.article.sources import CMX_PORT, STORE_SIMULATOR
from bench.article.speed_claim import SPEED_TARGET, Fastest
from orchestrator.cli.report.charts import Swing, tornado_chart
from orchestrator.cli.report.page import Figure, Section, Table

INTERACTIVITY = "tokens/s for every user"
#: Speeds of the table under the fronts, tokens/s/user.
TABLE_SPEEDS = (50.0, 100.0, 200.0, 400.0)
SWINGS_MAX = 10


def speeds_section(evidence: Evidence) -> Section:
    headers = (
        "system",
        "tokens/s",
        "layout",
        "undrafted",
        "acceptance",
        "400 at acceptance",
        "hangs most on, acceptance aside",
        "400 at",
        "USD at 400",
    )
    rows = [
        (
            name,
            f"{one.alone.tokens_per_s_per_user:.0f}",
            one.layout.name,
            "-" if one.undrafted is None else f"{one.undrafted.tokens_per_s_per_user:.0f}",
            "-" if one.acceptance is None else f"{one.acceptance:g}",
            "-" if one.acceptance_needed is None else f"{one.acceptance_needed:.2f}",
            one.leading.name if one.leading else "-",
            "-" if one.deciding_value is None else f"{one.deciding_value:.3g} ({'in' if one.within_range else 'out of'} range)",
            "-" if one.at_target is None else f"{one.at_target.usd_per_million_tokens:.2f}",
        )
        for name, one in evidence.fastest.items()
    ]
    text = (
        f"{model_of(RUBIN)}, {AGENTIC.context_tokens:,} tokens of context, one user on every decode node. Acceptance: the "
        "chance that a drafted token is taken if those before it were; an assumption that every drafted speed rests on. USD: "
        f"for a million tokens at the cheapest point at which every user still gets {SPEED_TARGET:.0f} a second.",
    )
    return Section("400 tokens a second at 400K context, system by system", text, table=Table(headers, rows))


def front_table(evidence: Evidence) -> Section:
    headers = ("system, work", *(f"at {speed:.0f} tokens/s/user" for speed in TABLE_SPEEDS), "fastest")
    rows: list[Sequence[str]] = []
    for (system, workload), points in evidence.fronts.items():
        found = [best_at(points, speed, by_price) for speed in TABLE_SPEEDS]
        cells = ["-" if one is None else f"{one.usd_per_million_tokens:.2f} USD" for one in found]
        fastest = max((point.tokens_per_s_per_user for point in points), default=None)
        rows.append((f"{system}, {workload}", *cells, "does not fit" if fastest is None else f"{fastest:.0f}"))
    return Section("USD for a million tokens at some speeds", table=Table(headers, rows))


def ratios_section(evidence: Evidence) -> Section:
    headers = ("GB200 NVL72's cost over VR NVL72's", *(f"at {speed:.0f} tokens/s/user" for speed in SPEEDS))
    rows: list[Sequence[str]] = []
    for name, some in evidence.ratios.items():
        by_speed = {ratio.tokens_per_s_per_user: f"{ratio.price:.2f}" for ratio in some}
        rows.append((name, *(by_speed.get(speed, "-") for speed in SPEEDS)))
    return Section("How many times cheaper a token is", table=Table(headers, rows))


def lpx_section(evidence: Evidence) -> Section:
    """Return the gains of three ways to use LPX beside the projected ones."""
    headers = ("tokens/s for each MW over VR NVL72's", "projected", *(f"at {speed:.0f}" for speed in SPEEDS))
    rows: list[Sequence[str]] = [(one.system, f"about {one.quoted:g}", *_by_speed(one.by_speed)) for one in evidence.lpx_gains]
    rows.append(("decoding for nothing, prompts on VR", "-", *_by_speed(evidence.free_decode_gains)))
    text = (
        f"{model_of(RUBIN)}, {AGENTIC.why}; columns are tokens/s for every user, as far as both reach it. The projection says "
        "neither at which speed nor against which batch. Where VR alone gives out there is no ratio. The last row is what no "
        "way to decode can beat.",
    )
    return Section("What LPX adds for each MW, beside NVIDIA's projection", text, table=Table(headers, rows))


def _by_speed(found: Mapping[float, float]) -> list[str]:
    return [f"{found[speed]:.2f}" if speed in found else "-" for speed in SPEEDS]


def measured_section(evidence: Evidence) -> Section:
    """Return our VR and GB300 beside what others measured of them, number by number."""
    headers = ("what", "measured", "ours", "ours over measured", "")
    rows = [(one.what, one.measured, *_ours(one), "holds" if one.holds else "misses") for one in evidence.compared]
    text = (
        "SemiAnalysis AgentX on DeepSeek-V4-Pro against our formulas. Ours holds if it lies in a measured range, or within "
        f"{ABOUT:g} times of a single number.",
    )
    return Section("The model against measurements of VR and GB300", text, table=Table(headers, rows))


def _ours(one: Compared) -> tuple[str, str]:
    return "not reached" if one.ours is None else f"{one.ours:.3g}", "-" if one.factor is None else f"{one.factor:.2f}"


def checks_section(checks: Sequence[Check]) -> Section:
    headers = ("point", "users a node", "decoding", "formula, tokens/s", "simulated, tokens/s", "difference")
    rows = [
        (
            f"{one.system}, {one.workload}",
            str(one.users),
            f"{one.batch:.1f}",
            f"{one.formula_tokens_per_s:.1f}",
            f"{one.simulated_tokens_per_s:.1f}",
            f"{one.deviation:+.1%}",
        )
        for one in checks
    ]
    text = (
        f"Points of the fronts through the whole simulator, {DECODE_NODES} decode and {PREFILL_NODES} prefill nodes under "
        "closed-loop load. The formula is taken at the batches that were there at every moment.",
    )
    return Section("Fronts against the simulator", text, table=Table(headers, rows))


def speed_section(one: Fastest) -> Section:
    """Return what the speed of a system hangs on."""
    text = (f"One user a decode node, {one.layout.name}. The article states {SPEED_TARGET:.0f} and more.",)
    heading = f"What the speed at 400K context hangs on: {one.layout.system.name}"
    chart = _tornado(one.effects, one.alone.tokens_per_s_per_user, INTERACTIVITY)
    return Section(heading, text, chart, _effects_table(one.effects, "tokens/s"))


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


def cost_section(cost: CostEffects) -> Section:
    text = (
        f"GB200 NVL72's price over VR NVL72's at {COST_SPEED:.0f} tokens/s/user, {COST_WORKLOAD.name}, owners' cost, with the "
        f"layouts kept: {cost.base:.2f}. The article states {COST_TARGET:.0f}.",
    )
    chart, table = _tornado(cost.effects, cost.base, "times cheaper"), _effects_table(cost.effects, "times cheaper")
    return Section("What the ratio of costs hangs on", text, chart, table)


def restoring_section(evidence: Evidence) -> Section:
    headers = (
        "context",
        "KV, GB",
        "from CPU memory, s",
        "from CMX, s",
        "computed again, s",
        "CMX sooner by",
        "CMX must give, GB/s",
        "fit in CPU memory",
        "fit in CMX",
    )
    rows = [
        (
            f"{one.context_tokens:,} tokens",
            f"{one.size_bytes / 1e9:.1f}",
            f"{one.cpu_s:.3f}",
            f"{one.cmx_s:.2f}",
            f"{one.recompute_s:.2f}",
            f"{one.cmx_gain:.0f} times",
            f"{one.cmx_bytes_per_s_least / 1e9:.2f}",
            f"{one.cpu_contexts:,}",
            f"{one.cmx_contexts:,}",
        )
        for one in evidence.restoring
    ]
    text = (
        f"{model_of(RUBIN)} with an FP8 cache on one prefill GPU of {RUBIN.name}, nothing else running. What CMX must give is "
        "the rate at which fetching takes as long as computing: anything faster wins. The last columns count contexts of that "
        "length in one GPU's part of either tier.",
        f"{CMX_PORT.text} ({CMX_PORT.url}); the rate used is the assumption cmx.bytes_per_s.",
    )
    return Section("Fetching a context back or computing it again", text, table=Table(headers, rows))


def spared_section(evidence: Evidence) -> Section:
    """Return how much work a loaded context spares a GPU in another simulator and here."""
    headers = (
        "model, cached + new tokens",
        "theirs, loaded over computed",
        "ours, loading free",
        "ours, waiting for CMX",
        "ours is of",
    )
    rows = [
        (
            f"{one.theirs.model}, {one.theirs.cached_tokens:,} + {one.theirs.new_tokens:,}",
            f"{one.stated:.1f}",
            f"{one.ours:.1f}",
            f"{one.ours_waiting:.1f}",
            one.shape,
        )
        for one in evidence.spared
    ]
    answers = [one.theirs.output_tokens for one in evidence.spared]
    text = (
        f"How many times the requests a GPU computes if it need not compute the cached context. Theirs: {STORE_SIMULATOR.text} "
        f"({STORE_SIMULATOR.url}); their answers of {min(answers):,} to {max(answers):,} tokens may be in it. Ours: seconds of "
        "a prefill GPU for the whole prompt over those for its new tokens alone, and over those with the GPU idle until CMX "
        "has delivered; answers are not in it.",
    )
    return Section("What a loaded context spares, beside another simulator", text, table=Table(headers, rows))


def assumptions_section(evidence: Evidence) -> Section:
    headers = ("assumption", "used", "range", "unit", "why")
    rows = [(one.name, f"{one.value:g}", f"{one.low:g} to {one.high:g}", one.unit, one.why) for one in evidence.assumptions]
    text = (
        "Numbers that nobody has published. Each can be set: weft simulate --figures DIR --set NAME=VALUE.",
        "Beside these, models are taken to have one more layer to draft with, which Kimi-K2 was not published with.",
    )
    return Section("Assumptions", text, table=Table(headers, rows))
