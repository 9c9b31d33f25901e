"""Attention and experts on GPUs of their own: our formulas beside FastAFD's measurement on GB200, and what is between the two.

Both ways get the same GPUs, the same weights in FP8 and contexts of 8K, and as many sequences as give most tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bench.article.claim import Claim, Finding, Verdict, judged
from bench.article.sensitivity import Reach, reach
from bench.article.sources import Source
from bench.article.study import Study
from orchestrator.cli.fronts import GB200, batches, cluster
from orchestrator.core.config import ClusterConfig, ConfigError, DecodeMode, HardwareConfig, PoolConfig, Precision
from orchestrator.core.cost.costs import decode_seconds
from orchestrator.core.cost.roofline import (
    attention_layers_seconds,
    context_token_seconds,
    ffn_layers_seconds,
    head_seconds,
    hop_seconds,
)
from orchestrator.core.types import PoolKind
from orchestrator.profiles.catalog import Catalog
from orchestrator.profiles.resolve import machine_of, resolve

#: The fastest, tokens/s/user at P90.
AGENTX_FASTEST_VR, AGENTX_FASTEST_GB300 = 276.24, 171.53
FAST_AFD = Source(
    "FastAFD, measured on GB200 NVL72: attention and experts on GPUs of their own give 1.35 to 1.45 times the decoded tokens "
    "of a GPU, 1.41 with Qwen3-235B in FP8 at 8K, seven attention GPUs for one of experts",
    "https://haoailab.com/blogs/fastafd/",
)
FAST_AFD_GAIN, FAST_AFD_LOW, FAST_AFD_HIGH = 1.41, 1.35, 1.45
#: Part of a pass of GPUs that do both which stays with the attending ones, as measured there: attention 41 to 48%, dense 16%.
FAST_AFD_ATTENTION = (0.57, 0.64)

SHAPE, CONTEXT_TOKENS = "qwen3-235b-a22b", 8_192
#: Seven GPUs attend for one with experts.
ATTENTION_GPUS, FFN_GPUS = 56, 8
#: GPUs of a group that does both.
JOINED_GPUS = (8, 16, 32, 64)
MICROBATCHES = (1, 2, 3, 4)
SEQUENCES_MAX = 1024


@dataclass(frozen=True, slots=True)
class GpuAfd:
    """The gain for each GPU that we find, the halves of a pass behind it, and what the measured gain would take."""

    gain: float
    microbatches: int
    batch: int
    #: Seconds of one pass: all together on the same GPU; each half of a split one, all micro-batches; one way between the halves.
    joined_s: float
    attention_s: float
    ffn_s: float
    hops_s: float
    #: Part of a pass of GPUs that do both which stays with the attending ones.
    attention_share: float
    reach: Reach

    @property
    def ideal(self) -> float:
        """The gain if the batch were not cut, hops cost nothing and the experts' half were never the longer one."""
        return ATTENTION_GPUS / (ATTENTION_GPUS + FFN_GPUS) / self.attention_share


@dataclass(frozen=True, slots=True)
class _Rate:
    """The tokens a second for each GPU at one batch."""

    tokens_per_s_per_gpu: float
    batch: int
    pool: PoolConfig
    assumptions: tuple[str, ...]


def gpu_afd(catalog: Catalog) -> GpuAfd | None:
    """Return what the formulas give for FastAFD's case; None if the model does not fit."""
    joined, halves = _joined(catalog), _halves(catalog)
    if joined is None or halves is None:
        return None
    machine, batch, count = machine_of(_config(), halves.pool, catalog), halves.batch, halves.pool.hardware.microbatches
    joined_s = joined.batch / joined.tokens_per_s_per_gpu
    context_s = batch * CONTEXT_TOKENS * context_token_seconds(machine)
    uncut_s = context_s + attention_layers_seconds(machine, batch) + head_seconds(machine)
    return GpuAfd(
        gain=halves.tokens_per_s_per_gpu / joined.tokens_per_s_per_gpu,
        microbatches=count,
        batch=batch,
        joined_s=joined_s,
        attention_s=context_s + count * attention_layers_seconds(machine, batch / count),
        ffn_s=count * ffn_layers_seconds(machine, batch / count),
        hops_s=count * machine.shape.layers * hop_seconds(machine, batch / count),
        attention_share=uncut_s / batch / (joined_s / joined.batch),
        reach=reach({*joined.assumptions, *halves.assumptions}, catalog, _gain, FAST_AFD_GAIN),
    )


def _gain(catalog: Catalog) -> float | None:
    joined, halves = _joined(catalog), _halves(catalog)
    return None if joined is None or halves is None else halves.tokens_per_s_per_gpu / joined.tokens_per_s_per_gpu


def _joined(catalog: Catalog) -> _Rate | None:
    """Return the most that GPUs which do both give."""
    return _best(
        [replace(_hardware(), group_nodes=gpus, microbatches=count) for gpus in JOINED_GPUS for count in (1, 2)], catalog
    )


def _halves(catalog: Catalog) -> _Rate | None:
    """Return the most that GPUs give which do one of both."""
    plain = _hardware()
    split = replace(plain, mode=DecodeMode.AFD, ffn_chip=plain.chip, ffn_chips=FFN_GPUS, group_nodes=ATTENTION_GPUS)
    return _best([replace(split, microbatches=count) for count in MICROBATCHES], catalog)


def _hardware() -> HardwareConfig:
    return replace(_decode_pool().hardware, weights=Precision.FP8, activations=Precision.FP8, kv=Precision.FP8, chips=1)


def _decode_pool() -> PoolConfig:
    return next(pool for pool in cluster(GB200.file).pools if pool.kind is PoolKind.DECODE)


def _best(choices: list[HardwareConfig], catalog: Catalog) -> _Rate | None:
    rates = (rate for hardware in choices for rate in _rates(hardware, catalog))
    return max(rates, key=lambda rate: rate.tokens_per_s_per_gpu, default=None)


def _rates(hardware: HardwareConfig, catalog: Catalog) -> Iterator[_Rate]:
    """Yield a node's rates at every number of sequences that fits."""
    pool = _decode_pool()
    scheduler = replace(pool.scheduler, sequences_max=SEQUENCES_MAX)
    pool = replace(pool, hardware=hardware, scheduler=scheduler, nodes=hardware.group_nodes)
    try:
        resolved = resolve(replace(_config(), pools=(pool,)), catalog)
    except ConfigError:
        return  # the model does not fit
    filled, (made,) = resolved.config.pools[0], resolved.hardware.values()
    fitting = min(SEQUENCES_MAX, filled.engine.blocks * filled.engine.block_tokens // CONTEXT_TOKENS)
    for batch in sorted({*batches(fitting), fitting}):
        per_gpu = batch / decode_seconds(filled.profile, batch, batch * CONTEXT_TOKENS) / made.gpus
        yield _Rate(per_gpu, batch, filled, made.assumptions)


def _config() -> ClusterConfig:
    config = cluster(GB200.file)
    return replace(config, models={name: replace(model, shape=SHAPE) for name, model in config.models.items()})


def gpu_afd_claim(found: GpuAfd | None) -> Claim:
    """Return how our formulas stand beside FastAFD's measurement: a check of the model, not a claim of the article."""
    verdict, reason = Verdict.NOT_REPRODUCED, "The model does not fit"
    if found is not None:
        verdict, reason = judged(found.gain, FAST_AFD_LOW, FAST_AFD_HIGH, "gain", Verdict.NOT_REPRODUCED)
        reason += f". {_between(found)}. Of the assumptions {found.reach}"
    return Claim(
        id="gpu_afd",
        text="(Others' measurement) Attention and experts on GPUs of their own give more decoded tokens a GPU.",
        stated=f"{FAST_AFD_GAIN:g}x ({FAST_AFD_LOW:g} to {FAST_AFD_HIGH:g}x over all models)",
        ours="does not fit" if found is None else f"{found.gain:.2f}x",
        numbers={} if found is None else {"gain": found.gain, "ideal": found.ideal},
        how=f"{SHAPE} in FP8 on GB200 NVL72, {CONTEXT_TOKENS:,} tokens of context: {ATTENTION_GPUS} GPUs attend and {FFN_GPUS} "
        f"hold experts, against groups of {min(JOINED_GPUS)} to {max(JOINED_GPUS)} that do both; prompts not counted, the best "
        "batch",
        verdict=verdict,
        reason=f"{reason}. FastAFD's kernels and batches are its own; our efficiencies were fitted elsewhere.",
        support=(FAST_AFD,),
        assumptions=() if found is None else tuple(effect.name for effect in found.reach.effects),
    )


def _between(found: GpuAfd) -> str:
    """Return where our gain is lost, and what the measured one would take."""
    low, high = FAST_AFD_ATTENTION
    longer = "experts'" if found.ffn_s > found.attention_s else "attention's"
    return (
        f"At {found.batch} sequences a GPU and {found.microbatches} micro-batches attention's half takes "
        f"{found.attention_s * 1e3:.1f} ms a pass, the experts' {found.ffn_s * 1e3:.1f} ms, either way between them "
        f"{found.hops_s * 1e3:.1f} ms; GPUs that do both take {found.joined_s * 1e3:.1f} ms. The {longer} half is the longer "
        f"one. With the batch uncut, hops free and the experts never waited for, the gain would be {found.ideal:.2f}x, since "
        f"{found.attention_share:.0%} of a pass stays with the attending GPUs; FastAFD measured {low:.0%} to {high:.0%}"
    )


def find(study: Study) -> Finding:
    """Return how our formulas stand beside FastAFD."""
    return Finding((gpu_afd_claim(gpu_afd(study.catalog)),))
