"""Lists what a cluster may be built of: kinds of nodes, how many of them, and what differs by one step.

    aggregated        nodes that compute prompts and generate
    prefill, decode   nodes that do one of them; the same precision of KV in both, as it is handed over
    prefill, decode, lpx  where a beat is asked for: nodes that keep it, and a little of what serves whoever finds no slot there

A decode node may have its feed-forward half, all of decoding or its drafting on other chips (`DecodeMode`). Chips that only
serve as such a half never hold a pool of their own.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from orchestrator.core.config import (
    DecodeMode,
    EngineConfig,
    HardwareConfig,
    PoolConfig,
    Precision,
    SchedulerConfig,
)
from orchestrator.core.types import CostProfile, PoolKind

#: Precisions that are tried unless it is said otherwise: those that published checkpoints and caches use. What they do to answers
#: is not judged here.
WEIGHTS = (Precision.NVFP4, Precision.FP8)
KV = (Precision.FP8,)
#: Chips of one node, nodes that share the experts, tokens drafted in a pass, micro-batches in flight: what is tried.
CHIPS = (1, 2, 4, 8)
GROUPS = (1, 2, 4, 8, 16, 32, 64)
DRAFTS = (0, 1, 2, 3)
MICROBATCHES = (1, 2, 3)
#: Chips of a feed-forward half: one to nine racks of 256 (NVIDIA's Groq 3 LPX rack,
#: https://www.nvidia.com/en-us/data-center/lpx/), and small counts for drafting.
HALVES = (256, 512, 768, 1024, 1280, 1536, 2048, 2304)
DRAFTERS = (8, 16, 32, 64, 128)
DRAFTER_DRAFTS = (2, 3, 4, 6, 8)
#: Attention chips for each feed-forward chip when both are of one kind; optima between 7 and 17 were found on GB200
#: (https://haoailab.com/blogs/fastafd/).
ATTENTION_SHARES = (3, 7, 11)
#: Chips that a half is built to stand beside
#: (https://developer.nvidia.com/blog/inside-nvidia-groq-3-lpx-the-low-latency-inference-accelerator-for-the-nvidia-vera-rubin-platform/).
PARTNERS = {"lp30": ("vr200",)}
#: Tokens in a step at most: large where only prompts are computed, small where sequences wait for each step.
PREFILL_STEPS = (4096, 8192, 16384)
MIXED_STEPS = (512, 1024, 2048, 4096, 8192)
#: Nodes in steps that grow with their number, in units of a group.
COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128, 160, 192, 256, 384, 512)
#: Sequences that run together on a node at most.
SEQUENCES_MAX = 256
#: Share of a chip's memory for weights and KV; vLLM's default `gpu_memory_utilization`
#: (https://docs.vllm.ai/en/latest/configuration/engine_args.html).
MEMORY_FRACTION = 0.9


@dataclass(frozen=True, slots=True)
class Choices:
    """What the search may use."""

    #: Chips that hold a pool, and chips that may be another's feed-forward half.
    chips: tuple[str, ...]
    halves: tuple[str, ...]
    #: The most chips that share a fast network, by chip.
    domains: tuple[tuple[str, int], ...]
    weights: tuple[Precision, ...] = WEIGHTS
    kv: tuple[Precision, ...] = KV


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """So many nodes of one kind."""

    kind: PoolKind
    hardware: HardwareConfig
    step_tokens_max: int
    nodes: int = 1
    #: Of a pool of kind lpx, seconds.
    beat_s: float = 0.0

    @property
    def groups(self) -> int:
        """Sets of nodes that step together."""
        return self.nodes // self.hardware.group_nodes

    def sized(self, groups: int) -> "PoolPlan":
        """Return the same with another number of groups."""
        return replace(self, nodes=groups * self.hardware.group_nodes)

    def __str__(self) -> str:
        made = self.hardware
        parts = [f"{self.kind.value} {self.nodes} x {made.chips} {made.chip}"]
        if made.group_nodes > 1:
            parts.append(f"groups of {made.group_nodes}")
        if made.mode is not DecodeMode.PLAIN:
            parts.append(f"{made.mode.value} with {made.ffn_chips} {made.ffn_chip} a group")
        if made.mode is DecodeMode.AFD:
            parts.append(f"{made.microbatches} micro-batches")
        parts.append(f"{made.weights.value} weights, {made.kv.value} KV")
        if made.draft_tokens:
            parts.append(f"{made.draft_tokens} drafted")
        parts.append(f"a beat of {1e3 * self.beat_s:g} ms" if self.beat_s else f"steps of {self.step_tokens_max}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole cluster: one aggregated pool, or a prefill and a decode pool; with a beat, a third for what finds no slot."""

    pools: tuple[PoolPlan, ...]

    @staticmethod
    def paired(prefill: PoolPlan, decode: PoolPlan) -> "Plan":
        """Return the cluster of two pools; with one that keeps a beat, one group of the prefill pool's nodes decodes as well."""
        if decode.kind is not PoolKind.LPX:
            return Plan((prefill, decode))
        return Plan((prefill, PoolPlan(PoolKind.DECODE, prefill.hardware, MIXED_STEPS[0]).sized(1), decode))

    @property
    def prefill(self) -> PoolPlan:
        """The pool that computes prompts."""
        return self.pools[0]

    @property
    def decode(self) -> PoolPlan:
        """The pool that generates: the same if it does both."""
        return self.pools[-1]

    @property
    def family(self) -> tuple[str, str, int]:
        """What kind of plan it is: chip, how decoding is spread, number of pools."""
        return self.decode.hardware.chip, self.decode.hardware.mode.value, len(self.pools)

    def __str__(self) -> str:
        return "; ".join(str(pool) for pool in self.pools)


def pool_config(pool: PoolPlan, block_tokens: int) -> PoolConfig:
    """Return a pool as a cluster file says it."""
    return PoolConfig(
        name=pool.kind.value,
        kind=pool.kind,
        nodes=pool.nodes,
        gpus=float(pool.hardware.chips),
        engine=EngineConfig(device="cuda", dtype="bfloat16", block_tokens=block_tokens, memory_fraction=MEMORY_FRACTION),
        scheduler=SchedulerConfig(step_tokens_max=pool.step_tokens_max, sequences_max=SEQUENCES_MAX),
        profile=CostProfile(beat_s=pool.beat_s),
        hardware=pool.hardware,
    )


def prefill_kinds(choices: Choices) -> Iterator[PoolPlan]:
    """Yield every kind of prefill pool, one group of nodes each; what lies between those is left to improving a plan."""
    for made in _plain(choices, drafts=(0,)):
        for step in PREFILL_STEPS[1:]:
            yield PoolPlan(PoolKind.PREFILL, made, step, made.group_nodes)


def aggregated_kinds(choices: Choices) -> Iterator[PoolPlan]:
    """Yield every kind of pool that does both, one group of nodes each, in coarse steps too."""
    for made in _plain(choices, DRAFTS[::3]):
        for step in MIXED_STEPS[::2]:
            yield PoolPlan(PoolKind.AGGREGATED, made, step, made.group_nodes)


def decode_kinds(choices: Choices) -> Iterator[PoolPlan]:
    """Yield every kind of decode pool, one group of nodes each, in coarse steps too."""
    for made in (*_plain(choices, DRAFTS[::3]), *_split(choices)):
        # What few prompts such a node computes itself come in small pieces, so that they delay nobody much.
        yield PoolPlan(PoolKind.DECODE, made, MIXED_STEPS[0], made.group_nodes)


def beat_kinds(choices: Choices, beat_s: float) -> Iterator[PoolPlan]:
    """Yield every kind of pool that keeps a beat, one group of nodes each; none drafts, as each beat brings one token."""
    for made in (*_plain(choices, (0,)), *_split(choices)):
        if made.mode is not DecodeMode.DRAFTER:
            yield PoolPlan(PoolKind.LPX, made, SEQUENCES_MAX, made.group_nodes, beat_s)


def _plain(choices: Choices, drafts: Iterable[int]) -> Iterator[HardwareConfig]:
    """Yield the hardware of nodes that do all on their own chips."""
    for (chip, domain), weights, kv, drafted in product(choices.domains, choices.weights, choices.kv, drafts):
        if chip not in choices.chips:
            continue
        for chips, group in _spreads(domain):
            yield HardwareConfig(
                chip=chip, chips=chips, group_nodes=group, weights=weights, activations=weights, kv=kv, draft_tokens=drafted
            )


def _spreads(domain: int) -> Iterator[tuple[int, int]]:
    """Yield (chips of a node, nodes of a group): within one fast network, or some whole networks."""
    for chips, group in product(CHIPS, GROUPS):
        if chips * group <= domain or (1 < domain == chips and chips * group <= GROUPS[-1]):
            yield chips, group


def _split(choices: Choices) -> Iterator[HardwareConfig]:
    """Yield the hardware of nodes that leave a part of decoding to other chips."""
    for made in _plain(choices, drafts=(0,)):
        for share in ATTENTION_SHARES:
            if made.group_nodes * made.chips >= 4 * share:
                ffn_chips = made.group_nodes * made.chips // share
                yield replace(made, mode=DecodeMode.AFD, ffn_chip=made.chip, ffn_chips=ffn_chips, ffn_weights=made.weights)
        for half in choices.halves:
            if made.chip in PARTNERS.get(half, ()):
                yield from _on_half(made, half)


def _on_half(made: HardwareConfig, half: str) -> Iterator[HardwareConfig]:
    for count, batches in product(HALVES, MICROBATCHES[:2]):
        yield replace(made, mode=DecodeMode.AFD, ffn_chip=half, ffn_chips=count, microbatches=batches)
    if made.group_nodes == 1 and made.chips == 1:
        yield from (replace(made, mode=DecodeMode.WHOLE, ffn_chip=half, ffn_chips=count) for count in HALVES)
    for count, drafted in product(DRAFTERS[::2], DRAFTER_DRAFTS[::2]):
        yield replace(made, mode=DecodeMode.DRAFTER, ffn_chip=half, ffn_chips=count, draft_tokens=drafted)
