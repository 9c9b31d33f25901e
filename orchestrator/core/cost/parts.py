"""Where the seconds of a pass go: which of reading contexts, reading weights, starting up and crossing links binds it."""

from dataclasses import dataclass

from orchestrator.core.config import DecodeMode
from orchestrator.core.cost.machines import Machine
from orchestrator.core.cost.roofline import (
    all_reduce_seconds,
    attention_layers_seconds,
    context_seconds,
    draft_seconds,
    exchange_seconds,
    ffn_layers_seconds,
    head_seconds,
    hop_seconds,
    pass_seconds,
)


@dataclass(frozen=True, slots=True)
class PassParts:
    """The seconds of one pass by what takes them, everything one after the other."""

    #: Contexts read and multiplied, each token of every sequence.
    kv_s: float
    #: Weights read and multiplied: attention's, FFNs' and experts', the output head's.
    weights_s: float
    #: What each layer takes however little there is to do: kernels started on a GPU, fabric crossed between LPUs.
    floor_s: float
    #: Results added up or exchanged among the chips of a group.
    exchange_s: float
    #: Activations on their way between two halves.
    hop_s: float
    drafting_s: float
    #: The pass itself, shorter by what overlaps.
    pass_s: float

    @property
    def named(self) -> dict[str, float]:
        """The parts by what they are called, the longest first."""
        parts = {
            "KV read": self.kv_s,
            "weights": self.weights_s,
            "floor": self.floor_s,
            "exchange": self.exchange_s,
            "hop": self.hop_s,
            "drafting": self.drafting_s,
        }
        return dict(sorted(parts.items(), key=lambda part: -part[1]))

    @property
    def longest(self) -> str:
        """The part that binds the pass."""
        return next(iter(self.named))


def parts_of(machine: Machine, sequences: int, context_tokens: float) -> PassParts:
    """Return where the seconds go of a pass of so many sequences a node with so much context together."""
    shape, hardware, tokens = machine.shape, machine.hardware, sequences * machine.pass_tokens
    attention, ffn = machine.attention.chip, machine.ffn.chip
    floor_s = shape.layers * (attention.attention_floor_s + ffn.ffn_floor_s)
    reduces = shape.layers
    if hardware.mode not in (DecodeMode.AFD, DecodeMode.WHOLE):
        reduces += shape.layers if hardware.group_nodes == 1 else shape.dense_layers
    reduce_s = reduces * all_reduce_seconds(machine, tokens)
    layers_s = attention_layers_seconds(machine, tokens) + ffn_layers_seconds(machine, tokens)
    return PassParts(
        kv_s=context_seconds(machine, sequences, context_tokens),
        weights_s=layers_s - floor_s - reduce_s + head_seconds(machine),
        floor_s=floor_s,
        exchange_s=reduce_s + shape.expert_layers * exchange_seconds(machine, tokens),
        hop_s=2 * shape.layers * hop_seconds(machine, tokens) if hardware.mode is DecodeMode.AFD else 0.0,
        drafting_s=draft_seconds(machine, sequences),
        pass_s=pass_seconds(machine, sequences, context_tokens),
    )
