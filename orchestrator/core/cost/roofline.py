"""From chips and a model's shape to what a step costs: one formula for each phase, compiled into a `CostProfile`.

A phase takes the longer of two times, reading its bytes or multiplying its numbers (the roofline: Williams, Waterman and
Patterson, CACM 52(4), 2009), each at a stated share of the chip's published rate. Between phases:

    matrices     weights are read once a step, multiplied with every token
    experts      E (1 - (1 - k/E)^tokens) of E experts are hit by tokens that choose k each, spread over all chips of the group
    attention    a decoded token reads the KV of its context; a prompt token is multiplied with every token before it
    hops         all-reduce within a node (GenZ's ring formula), all-to-all between the nodes of a group (straight lines with a
                 floor, fitted to measurements), activations to the FFN half and back

Every time is for one node while all nodes of its group do the same. Not counted: latent vectors of a cached prefix that are
expanded again for each chunk of a prompt, which matters for chunks of a few hundred tokens. Sources: `orchestrator/profiles/`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from orchestrator.core.config import DecodeMode, Precision
from orchestrator.core.cost.machines import BYTES, Link, Machine
from orchestrator.core.cost.overlap import Halves, choose_microbatches, ping_pong_seconds
from orchestrator.core.types import CostProfile

#: More micro-batches than ever paid in the literature (three in DeepSeek-V3's and MegaScale-Infer's pipelines).
MICROBATCHES_MAX = 4


def tier_load_seconds(link: Link, size_bytes: float, chips: int = 1) -> float:
    """Return the seconds to bring bytes from CPU memory, context storage or another node, each chip bringing its share."""
    return link.latency_s + size_bytes / (link.rate * chips) if size_bytes > 0 else 0.0


def expert_seconds(machine: Machine, tokens: float) -> float:
    """Return the seconds of one layer's routed experts: the weights of those that are hit, on the busiest chip."""
    shape, side = machine.shape, machine.routed
    if not shape.experts:
        return 0.0
    share = shape.experts_per_token / shape.experts
    hit = shape.experts * (1.0 - (1.0 - share) ** (tokens * side.nodes))
    # Some chip reads a whole expert; where there are more chips than experts, each expert is cut over several.
    whole = min(side.chips, shape.experts)
    read = max(hit * machine.expert_imbalance, whole) * shape.expert_parameters
    multiplied = shape.experts_per_token * shape.expert_parameters * machine.expert_imbalance
    return side.routed_seconds(read, multiplied, tokens)


def all_reduce_seconds(machine: Machine, tokens: float) -> float:
    """Return the seconds to add up a layer's partial results over the chips of a node, in BF16 (GenZ: ring of N chips)."""
    chips = machine.hardware.chips
    if chips == 1 or machine.hardware.mode is DecodeMode.WHOLE:
        return 0.0
    link = machine.chip.scale_up if chips <= machine.chip.domain_chips else machine.chip.scale_out
    size = tokens * machine.shape.hidden * BYTES[Precision.BF16]
    return machine.practice.collective_s + 2 * (chips - 1) * (link.latency_s + size / chips / link.rate)


def exchange_seconds(machine: Machine, tokens: float) -> float:
    """Return the seconds of one layer's all-to-all within a group, there and back; a group of two halves has hops instead."""
    hardware = machine.hardware
    if hardware.mode in (DecodeMode.AFD, DecodeMode.WHOLE) or hardware.group_nodes == 1 or not machine.shape.experts:
        return 0.0
    return _all_to_all_seconds(machine, tokens, BYTES[hardware.activations])


def _all_to_all_seconds(machine: Machine, tokens: float, out_bytes: float) -> float:
    """Return the seconds of tokens to their experts, at so many bytes a number, and of results back in BF16."""
    copies = tokens / machine.hardware.chips * machine.shape.experts_per_token * machine.shape.hidden
    back_bytes = copies * BYTES[Precision.BF16]
    return machine.group_link.all_to_all_seconds(machine.group_chips, copies * out_bytes, back_bytes)


def hop_seconds(machine: Machine, tokens: float) -> float:
    """Return the seconds of one way between the halves, the mean of both: out as they are multiplied there, back in BF16.

    Between GPUs it is half an all-to-all, a copy for each expert; to an LPX rack each activation goes once.
    """
    assert machine.coupling is not None, "only a machine with two halves has hops"
    side, link = machine.ffn, machine.coupling.link
    if side.chip.is_gpu and machine.shape.experts:
        return _all_to_all_seconds(machine, tokens, BYTES[side.activations]) / 2
    size = tokens * machine.shape.hidden * (BYTES[side.activations] + BYTES[Precision.BF16]) / 2
    return tier_load_seconds(link, size, machine.hardware.chips)


def attention_layers_seconds(machine: Machine, tokens: float) -> float:
    """Return the seconds of all layers' attention but for the context: projections, kernels, all-reduce."""
    shape, side = machine.shape, machine.attention
    projections = side.matrix_seconds(shape.attention_parameters, tokens)
    return shape.layers * (projections + side.chip.attention_floor_s + all_reduce_seconds(machine, tokens))


def ffn_layers_seconds(machine: Machine, tokens: float) -> float:
    """Return the seconds of all layers' FFNs, dense, shared and routed, without the all-to-all."""
    shape, side = machine.shape, machine.ffn
    dense = shape.dense_layers * side.matrix_seconds(shape.dense_parameters, tokens)
    shared = shape.expert_layers * side.matrix_seconds(shape.shared_parameters, tokens)
    routed = shape.expert_layers * expert_seconds(machine, tokens)
    if machine.hardware.mode in (DecodeMode.AFD, DecodeMode.WHOLE):
        reduced = 0
    else:
        reduced = shape.layers if machine.hardware.group_nodes == 1 else shape.dense_layers
    return dense + shared + routed + shape.layers * side.chip.ffn_floor_s + reduced * all_reduce_seconds(machine, tokens)


def head_seconds(machine: Machine) -> float:
    """Return the seconds to read the output head, kept in BF16; its products are few where only last tokens need them."""
    side = machine.attention
    size = machine.shape.head_parameters * BYTES[Precision.BF16]
    return size / (side.chips * side.chip.memory_bytes_per_s * side.chip.memory_efficiency)


def joined_layers_seconds(machine: Machine, tokens: float) -> float:
    """Return the seconds of all layers but for the context where one half does everything.

    The all-to-all is hidden behind computing by as many micro-batches as the pool has, where that is sooner (DeepSeek-V3,
    arXiv 2412.19437, section 3.4): each micro-batch reads the weights again, so small batches are not split.
    """
    shape, count = machine.shape, machine.hardware.microbatches
    computing = attention_layers_seconds(machine, tokens) + ffn_layers_seconds(machine, tokens)
    exchanging = shape.expert_layers * exchange_seconds(machine, tokens)
    if count == 1 or exchanging == 0.0:
        return computing + exchanging
    part = tokens / count
    computing_parts = count * (attention_layers_seconds(machine, part) + ffn_layers_seconds(machine, part))
    exchanging_parts = count * shape.expert_layers * exchange_seconds(machine, part)
    return min(computing + exchanging, ping_pong_seconds(computing_parts, exchanging_parts, 0.0, count, shape.layers))


def context_token_seconds(machine: Machine) -> float:
    """Return the seconds that one token of context adds to the pass of the sequence that decodes after it."""
    return machine.shape.full_layers * _layer_context_token_s(machine)


def window_seconds(machine: Machine) -> float:
    """Return the seconds of one decoding sequence in the layers that see a window; level as soon as the window is full."""
    return machine.shape.windowed_layers * machine.shape.window_tokens * _layer_context_token_s(machine)


def _layer_context_token_s(machine: Machine) -> float:
    chip, shape, kv = machine.attention.chip, machine.shape, machine.hardware.kv
    shards = machine.kv_shards
    read = shape.layer_kv_elements * BYTES[kv] / (shards * chip.memory_bytes_per_s * chip.memory_efficiency)
    multiply = machine.pass_tokens * shape.decode_pair_flops / _attention_rate(machine)
    return max(read, multiply)


def prefill_pair_seconds(machine: Machine) -> float:
    """Return the seconds of one layer for a prompt token and one token before it."""
    return machine.shape.prefill_pair_flops / _attention_rate(machine)


def _attention_rate(machine: Machine) -> float:
    """Return FLOP/s of attention on a node; a 4-bit cache is widened to 8 bits before it is multiplied."""
    kv, hardware = machine.hardware.kv, machine.hardware
    chip = machine.attention.chip
    whole = hardware.mode is DecodeMode.WHOLE
    chips = hardware.ffn_chips / hardware.group_nodes if whole else hardware.chips
    return chips * chip.flops[Precision.FP8 if kv is Precision.NVFP4 else kv] * chip.attention_efficiency


def draft_seconds(machine: Machine, sequences_tokens: float) -> float:
    """Return the seconds of drafting in a pass: by the other half, or a layer and the head a token (arXiv 2412.19437)."""
    count, shape = machine.hardware.draft_tokens, machine.shape
    if not count:
        return 0.0
    if machine.hardware.mode is not DecodeMode.DRAFTER:
        return count * (joined_or_serial_seconds(machine, sequences_tokens) / shape.layers + head_seconds(machine))
    assert machine.ffn_chip is not None, "a drafter is another chip"
    assert machine.coupling is not None, "a drafter is joined by a link"
    chip, coupling = machine.ffn_chip, machine.coupling
    rate = machine.hardware.ffn_chips * chip.memory_bytes_per_s * chip.memory_efficiency
    reading = coupling.draft_parameters * BYTES[machine.hardware.ffn_weights] / rate
    floor = coupling.draft_layers * (chip.attention_floor_s + chip.ffn_floor_s)
    return count * (reading + floor) + 2 * coupling.link.latency_s


def joined_or_serial_seconds(machine: Machine, tokens: float) -> float:
    """Return the seconds of all layers but for the context, halves one after the other where there are two."""
    if machine.hardware.mode is not DecodeMode.AFD:
        return joined_layers_seconds(machine, tokens)
    halves = attention_layers_seconds(machine, tokens) + ffn_layers_seconds(machine, tokens)
    return halves + 2 * machine.shape.layers * hop_seconds(machine, tokens)


def context_seconds(machine: Machine, sequences: int, context_tokens: float) -> float:
    """Return the seconds in which a pass reads and multiplies its sequences' contexts; own drafted tokens read a layer each."""
    seconds = sequences * window_seconds(machine) + context_tokens * context_token_seconds(machine)
    return seconds * _drafting_scale(machine)


def _drafting_scale(machine: Machine) -> float:
    drafted_layers = 0 if machine.hardware.mode is DecodeMode.DRAFTER else machine.hardware.draft_tokens
    return 1 + drafted_layers / machine.shape.layers


def pass_seconds(machine: Machine, sequences: int, context_tokens: float) -> float:
    """Return the seconds of one pass that only decodes, by the formulas themselves: what the compiled profile is held against."""
    hardware = machine.hardware
    tokens = sequences * machine.pass_tokens
    context = context_seconds(machine, sequences, context_tokens)
    fixed = head_seconds(machine) + draft_seconds(machine, sequences)
    if hardware.mode is not DecodeMode.AFD:
        return fixed + context + joined_layers_seconds(machine, tokens)
    return fixed + halves_at(machine, tokens, context).seconds


def halves_at(machine: Machine, tokens: float, context_s: float) -> Halves:
    """Return the two halves of a pass over so many tokens a node, whose context takes attention so many seconds."""
    count = machine.hardware.microbatches
    return Halves(
        attention_s=context_s + count * attention_layers_seconds(machine, tokens / count),
        ffn_s=count * ffn_layers_seconds(machine, tokens / count),
        hop_s=hop_seconds(machine, tokens / count),
        microbatches=count,
        layers=machine.shape.layers,
    )


def with_microbatches(machine: Machine, sequences: int, context_tokens: float) -> Machine:
    """Return the machine with a number of micro-batches: its own, or the best for that many sequences if it leaves that open."""
    if machine.hardware.microbatches:
        return machine

    def made(count: int) -> Machine:
        return replace(machine, hardware=replace(machine.hardware, microbatches=count))

    return made(choose_microbatches(lambda count: pass_seconds(made(count), sequences, context_tokens), MICROBATCHES_MAX))


def cost_profile(machine: Machine, sequences_max: int, step_tokens_max: int, fetch: Link) -> CostProfile:
    """Compile a machine's formulas into the coefficients that router, engine and simulator predict with.

    Exact at the curve's points; between them the curve is straight. With two halves in ping-pong, attention's share that does
    not depend on the context is taken as a constant and a slope over decoded tokens.
    """
    hardware, shape = machine.hardware, machine.shape
    scale = _drafting_scale(machine)
    windowed_pairs = shape.windowed_layers * shape.window_tokens
    halves = _halves(machine, sequences_max, batch_points(step_tokens_max))
    chance = machine.acceptance
    return CostProfile(
        step_s=halves.step_s + head_seconds(machine),
        prefill_token_s=halves.prefill_token_s + windowed_pairs * prefill_pair_seconds(machine),
        prefill_token_context_s=shape.full_layers * prefill_pair_seconds(machine),
        sequence_s=halves.sequence_s + scale * window_seconds(machine),
        context_token_s=scale * context_token_seconds(machine),
        fetch_bytes_per_s=fetch.rate * hardware.chips,
        fetch_latency_s=fetch.latency_s,
        batch_tokens=batch_points(step_tokens_max),
        batch_s=halves.batch_s,
        overlap=halves.overlap,
        pass_tokens=machine.pass_tokens,
        tokens_per_pass=(1 - chance**machine.pass_tokens) / (1 - chance),
    )


def batch_points(tokens_max: int) -> tuple[int, ...]:
    """Return where a batch curve is sampled: 1, 2, 3, 4, 6, 8, 12, ... up to `tokens_max`, which is always one."""
    doubled = [1 << power for power in range(tokens_max.bit_length())]
    points = {point for low in doubled for point in (low, low + low // 2) if point <= tokens_max}
    return tuple(sorted(points | {tokens_max}))


@dataclass(frozen=True, slots=True)
class _Halves:
    """The part of a profile that depends on how a step is spread over processors."""

    step_s: float
    sequence_s: float
    prefill_token_s: float
    batch_s: tuple[float, ...]
    overlap: float


def _halves(machine: Machine, sequences_max: int, points: tuple[int, ...]) -> _Halves:
    if machine.hardware.mode is DecodeMode.AFD and machine.hardware.microbatches > 1:
        return _ping_pong(machine, sequences_max, points)
    drafting = [draft_seconds(machine, tokens / machine.pass_tokens) for tokens in points]
    batch = [joined_or_serial_seconds(machine, tokens) + draft for tokens, draft in zip(points, drafting, strict=True)]
    return _Halves(0.0, 0.0, 0.0, tuple(batch), 0.0)


def _ping_pong(machine: Machine, sequences_max: int, points: tuple[int, ...]) -> _Halves:
    """Return the terms of a pass in ping-pong: with o = (m L - 1) / (m L), the profile's own sum equals `ping_pong_seconds`.

    Besides its context, attention takes A + a b for b tokens; hops and drafting together take H + h b, whatever the halves do.
    That slope is given to both halves as y b with (2 - o) y = h. A moves out of both: max(A + x, r) = A + max(x, r - A).
    """
    count, layers, sequences = machine.hardware.microbatches, machine.shape.layers, sequences_max * machine.pass_tokens
    rounds = count * layers
    overlap = (rounds - 1) / rounds
    constant, slope = _line(lambda tokens: count * attention_layers_seconds(machine, tokens / count), sequences)
    hops = 2 + (rounds - 1) * 2 / count
    extra, extra_slope = _line(
        lambda tokens: hops * hop_seconds(machine, tokens / count) + draft_seconds(machine, tokens / machine.pass_tokens),
        sequences,
    )
    shared = extra_slope / (2 - overlap)
    batch = [count * ffn_layers_seconds(machine, tokens / count) + shared * tokens - constant for tokens in points]
    return _Halves(
        step_s=(2 - overlap) * constant + extra,
        sequence_s=(slope + shared) * machine.pass_tokens,
        # A prompt's chunk takes more of attention's side than the constant allows for: the chord from 0 to a full step.
        prefill_token_s=count * attention_layers_seconds(machine, points[-1] / count) / points[-1],
        batch_s=tuple(batch),
        overlap=overlap,
    )


def _line(seconds: Callable[[float], float], tokens_max: int) -> tuple[float, float]:
    """Return constant and slope of the straight line through a phase's seconds at 1 token and at the most that decode."""
    first, last = seconds(1), seconds(tokens_max)
    slope = (last - first) / (tokens_max - 1) if tokens_max > 1 else 0.0
    return first - slope, slope
