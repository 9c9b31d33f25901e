"""What a node is made of: chips, the links between them, and which chips hold which weights."""

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.core.config import DecodeMode, HardwareConfig, Precision
from orchestrator.core.shapes import ModelShape

#: Bytes of one stored number. NVFP4: 4 bits, and 8 bits of scale for every 16 numbers
#: (https://developer.nvidia.com/blog/introducing-nvfp4-for-efficient-and-accurate-low-precision-inference).
BYTES: Mapping[Precision, float] = {Precision.NVFP4: 0.5625, Precision.FP8: 1.0, Precision.BF16: 2.0}


@dataclass(frozen=True, slots=True)
class Link:
    """What carries bytes to or from one chip."""

    name: str
    #: In one direction, for one chip, at most; and the share of it that is reached.
    bytes_per_s: float
    efficiency: float
    latency_s: float
    #: An all-to-all takes max(floor, base + bytes / rate), experts' inputs (dispatch) and outputs (combine) apart.
    dispatch_floor_s: float = 0.0
    dispatch_base_s: float = 0.0
    combine_floor_s: float = 0.0
    combine_base_s: float = 0.0

    @property
    def rate(self) -> float:
        """Bytes a second that are reached."""
        return self.bytes_per_s * self.efficiency


@dataclass(frozen=True, slots=True)
class Chip:
    """One processor with its memory."""

    name: str
    #: Counts in figures per GPU.
    is_gpu: bool
    memory_bytes: float
    memory_bytes_per_s: float
    #: Dense FLOP/s by the precision of what is multiplied; a precision that it lacks is absent.
    flops: Mapping[Precision, float]
    #: Shares that are reached: of the memory's rate, of multiplying matrices in each precision, of multiplying in attention.
    memory_efficiency: float
    matmul_efficiency: Mapping[Precision, float]
    attention_efficiency: float
    #: What one layer's attention and FFN take however little there is to do: kernels started, or hops over a fabric.
    attention_floor_s: float
    ffn_floor_s: float
    #: Chips that `scale_up` connects; beyond them `scale_out` does.
    domain_chips: int
    scale_up: Link
    scale_out: Link
    #: CPU memory and context storage, where it has them.
    host: Link | None
    storage: Link | None
    kw: float
    usd_per_hour: float


@dataclass(frozen=True, slots=True)
class Practice:
    """What holds for all chips."""

    #: Fixed part of an all-reduce.
    collective_s: float
    #: The busiest chip's expert work over the mean, with balanced and redundant experts.
    expert_imbalance: float
    #: Memory of a chip for activations and the runtime.
    reserve_bytes: float


@dataclass(frozen=True, slots=True)
class Coupling:
    """How the chips of the other half are joined to a node's own chips, and what they draft with."""

    link: Link
    draft_parameters: float
    draft_layers: float


@dataclass(frozen=True, slots=True)
class Machine:
    """One node of a pool: its chips, its part of the group, and the model it runs."""

    shape: ModelShape
    hardware: HardwareConfig
    chip: Chip
    practice: Practice
    ffn_chip: Chip | None = None
    coupling: Coupling | None = None

    @property
    def attention(self) -> "Side":
        """What holds the attention's matrices."""
        hardware = self.hardware
        if hardware.mode is DecodeMode.WHOLE:
            return self._other_half()
        return Side(self.chip, hardware.chips, 1, hardware.weights, hardware.activations)

    @property
    def ffn(self) -> "Side":
        """What holds dense FFNs and shared experts."""
        return self._other_half() if self.hardware.mode in (DecodeMode.AFD, DecodeMode.WHOLE) else self.attention

    @property
    def routed(self) -> "Side":
        """What holds the routed experts."""
        hardware = self.hardware
        if hardware.mode in (DecodeMode.AFD, DecodeMode.WHOLE):
            return self._other_half()
        chips = hardware.chips * hardware.group_nodes
        return Side(self.chip, chips, hardware.group_nodes, hardware.weights, hardware.activations)

    def _other_half(self) -> "Side":
        assert self.ffn_chip is not None, f"mode {self.hardware.mode.value} needs an ffn_chip"
        hardware = self.hardware
        return Side(self.ffn_chip, hardware.ffn_chips, hardware.group_nodes, hardware.ffn_weights, hardware.ffn_weights)

    @property
    def kv_shards(self) -> float:
        """Chips that share one copy of a sequence's KV: heads are split, a latent vector belongs to all heads and is not."""
        if self.hardware.mode is DecodeMode.WHOLE:
            return self.hardware.ffn_chips / self.hardware.group_nodes
        return 1 if self.shape.latent is not None else min(self.hardware.chips, self.shape.kv_heads)

    @property
    def kv_token_bytes(self) -> float:
        """Bytes a token of context occupies once, in the layers that keep all of it."""
        return self.shape.kv_elements * BYTES[self.hardware.kv]

    @property
    def pass_tokens(self) -> int:
        """Tokens computed for a decoding sequence in a pass."""
        return 1 + self.hardware.draft_tokens

    @property
    def group_link(self) -> Link:
        """What connects the GPUs of the group."""
        chips = self.hardware.chips * self.hardware.group_nodes
        if self.ffn_chip is not None and self.ffn_chip.is_gpu:
            chips += self.hardware.ffn_chips
        return self.chip.scale_up if chips <= self.chip.domain_chips else self.chip.scale_out


@dataclass(frozen=True, slots=True)
class Side:
    """Chips that share a kind of weights, the nodes whose tokens come to them, and the precisions they work in."""

    chip: Chip
    chips: int
    nodes: int
    weights: Precision
    activations: Precision

    def matrix_seconds(self, parameters: float, tokens: float, multiplied: float | None = None) -> float:
        """Return the seconds to read so many weights and to multiply each token of a node with `multiplied` of them, or all."""
        read = parameters * BYTES[self.weights] / (self.chips * self.chip.memory_bytes_per_s * self.chip.memory_efficiency)
        each = parameters if multiplied is None else multiplied
        rate = self.chips * self.chip.flops[self.activations] * self.chip.matmul_efficiency[self.activations]
        return max(read, 2 * each * tokens * self.nodes / rate)
