"""Sweeps layouts and batches of each system through the cost model: what throughput and price are left at which speed for a user.

A point is one layout (chips of a node, nodes of a group, drafted tokens) at one batch. With n users on a decode node, a token
takes `itl_s = decode_seconds(profile, n, n * context)`, and with prefill on nodes of its own the chips' time for an answer is

    GPU seconds for a token = GPUs of the decode node * itl_s / n  +  GPUs of the prefill node * prefill seconds / output tokens

Price and energy follow in the same way from what the nodes cost and draw. The tokens counted are the generated ones.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import ceil

from orchestrator.cli.cluster_file import FOLDER, read_cluster
from orchestrator.core.config import ClusterConfig, ConfigError, DecodeMode, HardwareConfig, PoolConfig
from orchestrator.core.cost.costs import decode_seconds, prompt_seconds
from orchestrator.core.cost.machines import BYTES
from orchestrator.core.types import PoolKind, PoolName
from orchestrator.profiles.catalog import Catalog
from orchestrator.profiles.resolve import PoolHardware, Resolved, resolve

CLUSTERS = FOLDER / "sim"
#: What is tried: chips that hold one copy of a sequence's cache, GPUs that step together, tokens drafted by one more layer.
NODE_CHIPS = (1, 2, 4, 8)
GROUP_CHIPS = (4, 8, 16, 32, 64)
DRAFT_TOKENS = (0, 3)
#: Drafted by LPX; one pass of a small drafter there is quick enough for more.
LPX_DRAFT_TOKENS = (1, 3, 5)
MICROBATCHES = (1, 2)
SEQUENCES_MAX = 512
#: What the x axis of every front says.
INTERACTIVITY = "tokens/s for every user"
#: Neighbouring batches differ by this factor at least.
BATCH_RATIO = 1.12


@dataclass(frozen=True, slots=True)
class Workload:
    """What every request of a point is like."""

    name: str
    cached_tokens: int
    new_tokens: int
    output_tokens: int
    #: Why these lengths.
    why: str

    @property
    def prompt_tokens(self) -> int:
        return self.cached_tokens + self.new_tokens

    @property
    def context_tokens(self) -> int:
        """Context of a sequence in the middle of its answer."""
        return self.prompt_tokens + self.output_tokens // 2


BATCH = Workload("batch", 0, 32_768, 8_192, "32K in and 8K out: the case of NVIDIA's claim of a tenth of the cost")
CODING = Workload("coding", 136_000, 4_000, 400, "140K in, most of it cached: the median of SemiAnalysis AgentX")
AGENTIC = Workload("agentic", 400_000, 4_000, 400, "400K cached, 4K new, 400 out: the case of NVIDIA's LPX projection")
WORKLOADS = (BATCH, CODING, AGENTIC)


@dataclass(frozen=True, slots=True)
class System:
    """One kind of cluster under comparison."""

    name: str
    #: Cluster file under `deploy/sim` that says what it is made of.
    file: str
    mode: DecodeMode = DecodeMode.PLAIN
    #: Chips of the other half for one group, if it has one.
    ffn_chips: int = 0
    #: GPUs that can share those chips: a smaller group may also have just its part of them. 0: they are one group's.
    sharing_gpus: int = 0

    def other_half(self, group_gpus: int) -> tuple[int, ...]:
        """Return how many chips of the other half a group of so many GPUs may have."""
        if not 0 < group_gpus < self.sharing_gpus:
            return (self.ffn_chips,)
        return (self.ffn_chips, ceil(self.ffn_chips * group_gpus / self.sharing_gpus))


GB200 = System("GB200 NVL72", "gb200-nvl72.toml")
GB300 = System("GB300 NVL72", "gb300-nvl72.toml")
RUBIN = System("VR NVL72", "vr-nvl72.toml")
#: Nine racks of 256 LPX chips hold Kimi-K2's FFNs in FP8, sixteen leave room for contexts of 400K beside it, one drafts for all
#: 72 GPUs of an NVL72 (`sources.LPX_PAIRING`) or for fewer.
AFD = System("VR NVL72 + LPX, AFD", "vr-nvl72-lpx.toml", DecodeMode.AFD, 2304)
WHOLE = System("VR NVL72 + LPX, decode on LPX", "vr-nvl72-lpx.toml", DecodeMode.WHOLE, 4096)
DRAFTER = System("VR NVL72 + LPX, LPX drafts", "vr-nvl72-lpx.toml", DecodeMode.DRAFTER, 256, 72)
SYSTEMS = (GB200, GB300, RUBIN, AFD, WHOLE, DRAFTER)


@dataclass(frozen=True, slots=True)
class Layout:
    """A system's decode nodes put together in one way, with the prefill nodes of its cluster file."""

    system: System
    resolved: Resolved
    decode: PoolConfig
    prefill: PoolConfig

    @property
    def name(self) -> str:
        hardware = self.decode.hardware
        parts = [f"{hardware.group_nodes} x {hardware.chips} GPUs"]
        if hardware.mode is DecodeMode.WHOLE:
            parts = [f"{hardware.group_nodes} nodes"]
        if hardware.ffn_chips:
            parts.append(f"{hardware.ffn_chips} {hardware.ffn_chip}")
        if hardware.draft_tokens:
            parts.append(f"{hardware.draft_tokens} drafted")
        if hardware.microbatches > 1:
            parts.append(f"{hardware.microbatches} micro-batches")
        return ", ".join(parts)

    def hardware(self, pool: PoolConfig) -> PoolHardware:
        """Return what a node of the pool is made of and costs."""
        return self.resolved.hardware[PoolName(pool.name)]

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Names of those that time, price or power of either pool rest on."""
        both = (self.hardware(pool).assumptions for pool in (self.decode, self.prefill))
        return tuple(sorted({name for names in both for name in names}))

    def batch_max(self, workload: Workload) -> int:
        """Return the most sequences of a workload that one decode node has memory for."""
        engine, scheduler = self.decode.engine, self.decode.scheduler
        tokens = workload.prompt_tokens + workload.output_tokens
        blocks = -(-tokens // engine.block_tokens)
        return min(engine.blocks // blocks, scheduler.sequences_max)


@dataclass(frozen=True, slots=True)
class Point:
    """What one layout gives at one batch."""

    system: str
    workload: str
    layout: str
    #: Sequences that decode on each node.
    batch: float
    tokens_per_s_per_user: float
    tokens_per_s_per_gpu: float
    tokens_per_s_per_mw: float
    usd_per_million_tokens: float


#: What is wanted of a point, more being better.
Merit = Callable[[Point], float]


def by_throughput(point: Point) -> float:
    """Judge a point by tokens a second for each GPU."""
    return point.tokens_per_s_per_gpu


def by_power(point: Point) -> float:
    """Judge a point by tokens a second for each megawatt."""
    return point.tokens_per_s_per_mw


def by_price(point: Point) -> float:
    """Judge a point by how little a token costs."""
    return -point.usd_per_million_tokens


@lru_cache(maxsize=8)
def cluster(file: str) -> ClusterConfig:
    """Return a cluster file of `deploy/sim`."""
    return read_cluster(CLUSTERS / file)


def layouts(system: System, catalog: Catalog) -> list[Layout]:
    """Return all layouts of a system in which the model fits."""
    made = (_layout(system, catalog, hardware) for hardware in _candidates(system))
    return [layout for layout in made if layout is not None]


def gpus_of(config: ClusterConfig) -> int:
    """Return the GPUs of a cluster file's nodes."""
    return sum(pool.nodes * pool.hardware.chips for pool in config.pools)


def model_of(system: System) -> str:
    """Return which model a system's decode nodes run and in which precision its weights are."""
    config = cluster(system.file)
    pool = _pool(config, PoolKind.DECODE)
    return f"{config.models[pool.model].shape} in {pool.hardware.weights.value.upper()}"


def _candidates(system: System) -> Iterator[HardwareConfig]:
    """Yield what a decode node of the system may be made of; a whole decode on the other half has no choices on this one."""
    hardware = replace(_pool(cluster(system.file), PoolKind.DECODE).hardware, mode=system.mode)
    drafts = LPX_DRAFT_TOKENS if system.mode is DecodeMode.DRAFTER else DRAFT_TOKENS
    own_chips, microbatch_counts = (NODE_CHIPS, MICROBATCHES) if system.mode is not DecodeMode.WHOLE else ((1,), (1,))
    for chips, group_chips, drafted, microbatches in product(own_chips, GROUP_CHIPS, drafts, microbatch_counts):
        if group_chips < chips:
            continue
        made = replace(hardware, chips=chips, group_nodes=group_chips // chips, draft_tokens=drafted, microbatches=microbatches)
        for others in system.other_half(group_chips):
            yield replace(made, ffn_chips=others)


def _layout(system: System, catalog: Catalog, hardware: HardwareConfig) -> Layout | None:
    config = cluster(system.file)
    decode = _pool(config, PoolKind.DECODE)
    scheduler = replace(decode.scheduler, sequences_max=SEQUENCES_MAX)
    changed = replace(decode, hardware=hardware, scheduler=scheduler, nodes=hardware.group_nodes)
    pools = tuple(changed if pool.name == decode.name else pool for pool in config.pools)
    try:
        resolved = resolve(replace(config, pools=pools), catalog)
    except ConfigError:
        return None  # the model does not fit
    if hardware.mode is DecodeMode.DRAFTER and not _drafter_fits(hardware, catalog):
        return None
    return Layout(system, resolved, _pool(resolved.config, PoolKind.DECODE), _pool(resolved.config, PoolKind.PREFILL))


def _drafter_fits(hardware: HardwareConfig, catalog: Catalog) -> bool:
    """Tell whether the drafter's weights fit into the chips it runs on."""
    size = catalog.coupling.draft_parameters * BYTES[hardware.ffn_weights]
    return size <= hardware.ffn_chips * catalog.chip(hardware.ffn_chip).memory_bytes


def relaid(layout: Layout, catalog: Catalog, hardware: HardwareConfig | None = None) -> Layout | None:
    """Return the same layout under other numbers, or made of something else; None if the model does not fit then."""
    return _layout(layout.system, catalog, hardware or layout.decode.hardware)


def _pool(config: ClusterConfig, kind: PoolKind) -> PoolConfig:
    return next(pool for pool in config.pools if pool.kind is kind)


def points_of(layout: Layout, workload: Workload) -> list[Point]:
    """Return a layout's points at every batch that fits."""
    return [point_at(layout, workload, batch) for batch in batches(layout.batch_max(workload))]


def batches(largest: int) -> Iterator[int]:
    """Yield the batches that are looked at, the smallest first."""
    batch = 1
    while batch <= largest:
        yield batch
        batch = max(batch + 1, int(batch * BATCH_RATIO))


def point_at(layout: Layout, workload: Workload, batch: int) -> Point:
    """Return what a layout gives with so many sequences on every decode node."""
    return point_with(layout, workload, batch, token_seconds_at(layout, workload, batch))


def point_with(layout: Layout, workload: Workload, batch: float, itl_s: float) -> Point:
    """Return what a layout gives if a token takes so long with so many sequences on every decode node."""
    prefill_s = prefill_seconds_of(layout, workload) / workload.output_tokens
    decode, prefill = layout.hardware(layout.decode), layout.hardware(layout.prefill)
    gpu_s = decode.gpus * itl_s / batch + prefill.gpus * prefill_s
    kw_s = decode.kw * itl_s / batch + prefill.kw * prefill_s
    usd = (decode.usd_per_hour * itl_s / batch + prefill.usd_per_hour * prefill_s) / 3600
    return Point(layout.system.name, workload.name, layout.name, batch, 1 / itl_s, 1 / gpu_s, 1e3 / kw_s, 1e6 * usd)


def token_seconds_at(layout: Layout, workload: Workload, batch: int) -> float:
    """Return the mean seconds between a user's tokens."""
    return decode_seconds(layout.decode.profile, batch, batch * workload.context_tokens)


def prefill_seconds_of(layout: Layout, workload: Workload) -> float:
    """Return the seconds a prefill node works for one request."""
    pool = layout.prefill
    return prompt_seconds(pool.profile, workload.new_tokens, workload.cached_tokens, pool.scheduler.step_tokens_max)


def front(candidates: Iterable[Point], merit: Merit) -> list[Point]:
    """Return the points that no other beats in both speed and merit, by ascending speed."""
    best: list[Point] = []
    for point in sorted(candidates, key=lambda one: (-one.tokens_per_s_per_user, -merit(one))):
        if not best or merit(point) > merit(best[-1]):
            best.append(point)
    return best[::-1]


def best_at(candidates: Iterable[Point], speed: float, merit: Merit) -> Point | None:
    """Return the best point at which every user gets `speed` tokens a second or more; None if there is none."""
    fast = [point for point in candidates if point.tokens_per_s_per_user >= speed]
    return max(fast, key=merit, default=None)


def sweep(system: System, workload: Workload, made: Sequence[Layout]) -> list[Point]:
    """Return all points of a system for one workload."""
    assert all(layout.system == system for layout in made)
    return [point for layout in made for point in points_of(layout, workload)]
