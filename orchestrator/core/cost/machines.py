"""What a node is made of: chips, the links between them, and which chips hold which weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log2

from orchestrator.core.config import DecodeMode, HardwareConfig, Precision
from orchestrator.core.cost.balance import Balance, balance_of
from orchestrator.core.cost.shapes import ModelShape

#: Bytes of one stored number. NVFP4: 4 bits, and 8 bits of scale for every 16 numbers
#: (https://developer.nvidia.com/blog/introducing-nvfp4-for-efficient-and-accurate-low-precision-inference).
BYTES: Mapping[Precision, float] = {Precision.NVFP4: 0.5625, Precision.FP8: 1.0, Precision.BF16: 2.0}
#: Sizes of the groups whose all-to-all is known apart; between them it goes by the logarithm, beyond them it stays.
NEAR_RANKS, WIDE_RANKS = 8, 64


@dataclass(frozen=True, slots=True)
class Line:
    """How long one chip's part of a transfer among many takes: a straight line with a floor."""

    floor_s: float
    base_s: float
    #: That are reached.
    bytes_per_s: float

    def seconds(self, size_bytes: float) -> float:
        """Return the seconds of so many bytes."""
        return max(self.floor_s, self.base_s + size_bytes / self.bytes_per_s)


@dataclass(frozen=True, slots=True)
class AllToAll:
    """Experts' inputs on their way out and their outputs on their way back, in a group of one size."""

    dispatch: Line
    combine: Line

    def seconds(self, out_bytes: float, back_bytes: float) -> float:
        """Return the seconds of both ways."""
        return self.dispatch.seconds(out_bytes) + self.combine.seconds(back_bytes)


@dataclass(frozen=True, slots=True)
class Link:
    """What carries bytes to or from one chip, or keeps them beside it."""

    name: str
    #: In one direction, for one chip, at most; and the share of it that is reached.
    bytes_per_s: float
    efficiency: float
    latency_s: float
    #: Bytes that it keeps for one chip: of CPU memory and context storage; 0 of what only carries.
    capacity_bytes: float = 0.0
    #: All-to-alls in groups of `NEAR_RANKS` and of `WIDE_RANKS`; None where there are none.
    near: AllToAll | None = None
    wide: AllToAll | None = None

    @property
    def rate(self) -> float:
        """Bytes a second that are reached."""
        return self.bytes_per_s * self.efficiency

    def all_to_all_seconds(self, ranks: int, out_bytes: float, back_bytes: float) -> float:
        """Return the seconds of an all-to-all and the way back among so many chips, the bytes being those of one chip."""
        assert self.near is not None, f"{self.name} has no all-to-all"
        assert self.wide is not None, f"{self.name} has no all-to-all"
        share = min(max(log2(ranks / NEAR_RANKS) / log2(WIDE_RANKS / NEAR_RANKS), 0.0), 1.0)
        return (1 - share) * self.near.seconds(out_bytes, back_bytes) + share * self.wide.seconds(out_bytes, back_bytes)


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
    #: Shares that are reached: of the memory's rate, of multiplying matrices that every token meets and those of routed experts
    #: (many small ones, in groups), both in each precision, and of multiplying in attention.
    memory_efficiency: float
    matmul_efficiency: Mapping[Precision, float]
    expert_efficiency: Mapping[Precision, float]
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
    #: The chance that a drafted token is accepted after all before it were; only a machine that drafts has one.
    acceptance: float = 0.0

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

    @property
    def balance(self) -> Balance | None:
        """How evenly its experts' loads fall on the chips that hold them; None if that is not simulated."""
        hardware, experts = self.hardware, self.shape.experts
        if not hardware.expert_skew or not experts:
            return None
        return balance_of(experts, self.routed.chips, hardware.spare_slots, hardware.expert_skew, hardware.expert_seed)

    @property
    def expert_imbalance(self) -> float:
        """The busiest chip's expert work over the mean."""
        balance = self.balance
        if balance is None:
            return self.practice.expert_imbalance
        return 1 + (balance.placed if self.hardware.balanced else balance.spread)

    @property
    def expert_copies(self) -> float:
        """Copies that there are of an expert, in the mean."""
        experts = self.shape.experts
        return 1 + self.hardware.spare_slots * min(self.routed.chips, experts) / experts if experts else 1.0

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
    def group_chips(self) -> int:
        """Chips of the group, with those of the other half if they are GPUs too."""
        others = self.hardware.ffn_chips if self.ffn_chip is not None and self.ffn_chip.is_gpu else 0
        return self.hardware.chips * self.hardware.group_nodes + others

    @property
    def group_link(self) -> Link:
        """What connects the GPUs of the group."""
        return self.chip.scale_up if self.group_chips <= self.chip.domain_chips else self.chip.scale_out


@dataclass(frozen=True, slots=True)
class Side:
    """Chips that share a kind of weights, the nodes whose tokens come to them, and the precisions they work in."""

    chip: Chip
    chips: int
    nodes: int
    weights: Precision
    activations: Precision

    def matrix_seconds(self, parameters: float, tokens: float) -> float:
        """Return the seconds to read so many weights and to multiply each token of a node with all of them."""
        return self._seconds(parameters, parameters, tokens, self.chip.matmul_efficiency)

    def routed_seconds(self, parameters: float, multiplied: float, tokens: float) -> float:
        """Return the seconds to read so many weights of experts and to multiply each token of a node with some of them."""
        return self._seconds(parameters, multiplied, tokens, self.chip.expert_efficiency)

    def _seconds(self, parameters: float, multiplied: float, tokens: float, efficiency: Mapping[Precision, float]) -> float:
        read = parameters * BYTES[self.weights] / (self.chips * self.chip.memory_bytes_per_s * self.chip.memory_efficiency)
        rate = self.chips * self.chip.flops[self.activations] * efficiency[self.activations]
        return max(read, 2 * multiplied * tokens * self.nodes / rate)
