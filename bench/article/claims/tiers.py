"""Many of the article's sessions at once, whose contexts do not fit GPU memory, with and without tiers below it: simulated."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from bench.article.claim import Finding
from bench.article.study import Study
from orchestrator.cli.fronts import RUBIN, cluster, model_of
from orchestrator.cli.report.comparison import percent, seconds
from orchestrator.cli.report.page import Section, Table
from orchestrator.cli.sweeps import copies
from orchestrator.core.config import ClusterConfig, StoreConfig
from orchestrator.profiles.catalog import Catalog
from orchestrator.profiles.resolve import resolve
from orchestrator.sim.runs import figures
from orchestrator.sim.world import World, WorldOptions
from orchestrator.traces import TracedTurn

#: The article's session so many times, the copies sharing nothing, begun at random over its hours.
SESSIONS = 16
#: Memory of a host that holds all of them, and one that holds a few, with storage below it that holds all.
LARGE = StoreConfig(cpu_bytes=2_000_000_000_000)
SMALL = StoreConfig(cpu_bytes=20_000_000_000, cmx="file:///cmx", cmx_bytes=1_000_000_000_000_000)


@dataclass(frozen=True, slots=True)
class Tiered:
    """One simulated run."""

    name: str
    #: KV blocks of a node's memory.
    blocks: int
    #: Share of prompt tokens that were found, and its parts by tier.
    hit_rate: float
    hbm: float
    cpu: float
    cmx: float
    ttft_p50_s: float
    ttft_p99_s: float
    session_mean_s: float
    #: Busy time of the prefill nodes, as a share.
    prefill_busy: float


def tiered(catalog: Catalog, turns: Sequence[TracedTurn], sessions: int = SESSIONS) -> list[Tiered]:
    """Return the runs: where all fits and, over three kinds of tiers, where a node holds one of the longest contexts."""
    several = copies(turns, sessions, seed=0)
    whole = cluster(RUBIN.file)
    size = whole.pools[0].engine.block_tokens
    least = max(turn.input_tokens + turn.output_tokens for turn in turns) // size + whole.pools[0].scheduler.sequences_max
    tight = replace(whole, pools=tuple(replace(pool, engine=replace(pool.engine, blocks=least)) for pool in whole.pools))
    return [
        _run("all fits into GPU memory", whole, several, catalog),
        _run("it does not", tight, several, catalog),
        _run("below it CPU memory for all", replace(tight, store=LARGE), several, catalog),
        _run("below it CPU memory for few, and CMX", replace(tight, store=SMALL), several, catalog),
    ]


def _run(name: str, config: ClusterConfig, turns: Sequence[TracedTurn], catalog: Catalog) -> Tiered:
    resolved = resolve(config, catalog)
    outcome = World(resolved, turns, WorldOptions()).run()
    found = figures(outcome, resolved.hardware)
    assert found["completed"] == len(turns), f"{name}: {found['failures']}"
    first = resolved.config.pools[0]
    return Tiered(
        name=name,
        blocks=first.engine.blocks,
        hit_rate=found["hit_rate"],
        **found["hit_rate_by_tier"],
        ttft_p50_s=found["ttft_s"]["p50"],
        ttft_p99_s=found["ttft_s"]["p99"],
        session_mean_s=found["session_s"]["mean"],
        prefill_busy=found["pools"][first.name]["utilisation"],
    )


def find(study: Study) -> Finding:
    """Return the runs beside each other; the article states no number of them."""
    runs = tiered(study.catalog, study.turns)
    return Finding((), (_section(runs),), {"tiers": [asdict(one) for one in runs]})


def _section(runs: Sequence[Tiered]) -> Section:
    headers = (
        "",
        "blocks a node",
        "hit rate",
        "from hbm",
        "cpu",
        "cmx",
        "TTFT p50",
        "TTFT p99",
        "prefill nodes busy",
        "session, mean",
    )
    rows = [
        (
            one.name,
            f"{one.blocks:,}",
            *(percent(share) for share in (one.hit_rate, one.hbm, one.cpu, one.cmx)),
            seconds(one.ttft_p50_s),
            seconds(one.ttft_p99_s),
            percent(one.prefill_busy),
            seconds(one.session_mean_s),
        )
        for one in runs
    ]
    text = (
        f"{SESSIONS} of the session at once with {model_of(RUBIN)} on {RUBIN.name}, each row a run through the simulator with "
        "the live system's routing, stores and caches. Where contexts do not fit, a node has room for one of the longest and "
        "a few blocks for what else runs.",
    )
    return Section("Contexts that do not fit, with and without tiers", text, table=Table(headers, rows), folded=True)
