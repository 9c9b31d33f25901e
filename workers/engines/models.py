"""The decoder-only transformers of the Llama, Qwen3 and Qwen3-MoE families, for mixed steps over a paged KV pool.

Three things differ from the way the models are usually written; none changes what is computed:

- Queries and keys have their dimensions reordered per head, so that the pairs that rotary embedding turns lie side by side and
  turning is one complex product. Keys lie in the pool in that order.
- Normalisation is x / hypot(|x|, sqrt(n eps)), with sqrt(n) and the learnt gain in the weights that follow (float32) or in one
  product (bfloat16). That is x / sqrt(mean(x^2) + eps) in fewer passes.
- The residual stream is float32 in every dtype.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from orchestrator.profiles.model_config import Architecture
from orchestrator.profiles.positions import Llama3Rope, Rope, YarnRope
from workers.engines.attention import attend
from workers.engines.batch import StepBatch
from workers.engines.experts import ExpertMlp
from workers.engines.kvpool import KvPool
from workers.engines.linear import Linear, make_linear
from workers.engines.shape import NORMED_HEADS
from workers.engines.weights import Weights

#: Positions whose rotations are computed at first; doubled whenever a longer context comes.
ROTATIONS_MIN = 4096
#: The two products that are computed as one.
GATE_UP = ("gate_proj", "up_proj")


class Model:
    """One loaded model: tokens in, logits out."""

    def __init__(self, weights: Weights, shape: Architecture, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        loader = _Loader(weights, shape, dtype, device)
        embedding = weights.take("model.embed_tokens.weight", (shape.vocabulary, shape.hidden))
        self._embedding = embedding.to(device, dtype)
        self._layers = [_Layer(loader, number) for number in range(shape.layers)]
        self._norm, gain = loader.norm("model.norm.weight")
        tied = shape.tied and not weights.has("lm_head.weight")
        head = embedding if tied else weights.take("lm_head.weight", (shape.vocabulary, shape.hidden))
        self._head = make_linear(_scaled(head, gain), None, dtype, device)
        self._row_operations = _row_operations(shape)
        self._rotations = _Rotations(shape.rope, shape.head_dim, device)
        weights.check_all_taken()

    @property
    def row_operations(self) -> int:
        """Multiply-adds of one row, attention aside."""
        return self._row_operations

    def logits(self, batch: StepBatch, pool: KvPool) -> Tensor | None:
        """Compute a step; return [sampled rows, vocabulary] in the model's dtype, None if none is sampled.

        Writes the rows' keys and values into the pool.
        """
        state = functional.embedding(batch.token_ids, self._embedding).float()
        rotation = self._rotations.at(batch.positions, batch.positions_max)
        for number, layer in enumerate(self._layers):
            state = layer.forward(state, rotation, batch, pool, number)
        return self._head(self._norm(state)) if len(state) else None


def _row_operations(shape: Architecture) -> int:
    """Return the weights that one token is multiplied with in all layers."""
    attention = 2 * (shape.queries_width + shape.keys_width) * shape.hidden
    mlp = 3 * shape.hidden * shape.intermediate
    if shape.experts is None:
        return shape.layers * (attention + mlp)
    sparse = 3 * shape.hidden * shape.experts.intermediate * shape.experts.per_token
    count = len(shape.experts.layers)
    return shape.layers * attention + count * sparse + (shape.layers - count) * mlp


class _Norm:
    """Root-mean-square normalisation, with or without its gain (see the file's head)."""

    __slots__ = ("_dtype", "_floor", "_gain")

    def __init__(self, width: int, epsilon: float, gain: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        self._floor = torch.tensor([math.sqrt(width * epsilon)], device=device)
        self._gain = gain
        self._dtype = dtype

    def __call__(self, rows: Tensor) -> Tensor:
        normed = rows / torch.linalg.vector_norm(rows, 2, -1, True).hypot_(self._floor)
        if self._gain is None:
            return normed
        return normed.mul_(self._gain).to(self._dtype)


class _Rotations:
    """cos + i sin of every position's angles, computed once for as many positions as were needed so far."""

    def __init__(self, rope: Rope, head_dim: int, device: torch.device) -> None:
        self._frequencies = _frequencies(rope, head_dim).to(device)
        self._amplitude = rope.way.amplitude if isinstance(rope.way, YarnRope) else 1.0
        self._table = torch.empty(0, head_dim // 2, dtype=torch.complex64, device=device)

    def at(self, positions: Tensor, highest: int) -> Tensor:
        """Return [rows, 1, head_dim / 2] complex."""
        if highest >= len(self._table):
            count = max(ROTATIONS_MIN, 1 << highest.bit_length())
            angles = torch.arange(count, dtype=torch.float32, device=positions.device)[:, None] * self._frequencies
            self._table = torch.complex(angles.cos(), angles.sin()) * self._amplitude
        return self._table.index_select(0, positions).unsqueeze(1)


def _frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Return the angle per position of each pair of dimensions."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / (rope.theta**exponents)
    match rope.way:
        case None:
            return plain / rope.factor
        case YarnRope():
            low, high = _mixed_dimensions(rope.way, rope.theta, head_dim)
            pairs = torch.arange(head_dim // 2, dtype=torch.float32)
            share = ((pairs - low) / ((high - low) or 0.001)).clamp(0, 1)
            return plain / rope.factor * share + plain * (1 - share)
        case Llama3Rope(low, high, original):
            wavelengths = 2 * math.pi / plain
            smooth = (original / wavelengths - low) / (high - low)
            blended = (1 - smooth) * plain / rope.factor + smooth * plain
            stretched = torch.where(wavelengths > original / low, plain / rope.factor, plain)
            between = (wavelengths <= original / low) & (wavelengths >= original / high)
            return torch.where(between, blended, stretched)


def _mixed_dimensions(way: YarnRope, theta: float, head_dim: int) -> tuple[float, float]:
    """Return the pairs of dimensions between which YaRN mixes stretched and plain frequencies, as `transformers` has it."""

    def turning(rotations: float) -> float:
        """The pair that turns so many times over the original context."""
        return head_dim * math.log(way.original_tokens / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turning(way.beta_fast), turning(way.beta_slow)
    if way.whole:
        low, high = float(math.floor(low)), float(math.ceil(high))
    return max(low, 0.0), min(high, float(head_dim - 1))


class _Layer:
    """Attention and MLP, each behind a normalisation and added to the residual stream."""

    def __init__(self, loader: "_Loader", number: int) -> None:
        prefix, shape = f"model.layers.{number}.", loader.shape
        self._shape = shape
        self._queries_keys = shape.queries_width + shape.keys_width
        self._attention_norm, gain = loader.norm(prefix + "input_layernorm.weight")
        self._queries_keys_values = loader.queries_keys_values(prefix + "self_attn.", gain)
        self._head_norm = loader.head_norm(prefix + "self_attn.") if shape.family in NORMED_HEADS else None
        self._output = loader.linear(prefix + "self_attn.o_proj", shape.hidden, shape.queries_width, shape.attention_bias)
        self._mlp_norm, gain = loader.norm(prefix + "post_attention_layernorm.weight")
        sparse = shape.experts is not None and number in shape.experts.layers
        self._mlp = loader.experts(prefix + "mlp.", gain) if sparse else loader.mlp(prefix + "mlp.", gain)
        self._last = number == shape.layers - 1

    def forward(self, state: Tensor, rotation: Tensor, batch: StepBatch, pool: KvPool, number: int) -> Tensor:
        shape = self._shape
        rows = self._queries_keys_values(self._attention_norm(state))
        # In float32 `turned` is a view, and rotating it in place is all there is to do.
        turned = rows[:, : self._queries_keys].float().view(batch.rows, -1, shape.head_dim)
        if self._head_norm is not None:
            self._head_norm(turned)
        torch.view_as_complex(turned.view(batch.rows, -1, shape.head_dim // 2, 2)).mul_(rotation)
        if rows.dtype != torch.float32:
            rows[:, : self._queries_keys] = turned.view(batch.rows, -1)
        keys_values = rows[: batch.tokens, shape.queries_width :].view(batch.tokens, 2 * shape.kv_heads, shape.head_dim)
        pool.write(number, batch.write_index, keys_values)
        attended = attend(rows, batch, pool, number, shape)
        if self._last and batch.sampled_rows is not None:
            # Nobody looks at the other rows any more; most of a prompt is spared the last MLP.
            state, attended = state[batch.sampled_rows], attended[batch.sampled_rows]
            if not len(state):
                return state
        state = self._output.add_to(state, attended)
        return self._mlp.add_to(state, self._mlp_norm(state))


class _HeadNorm:
    """Normalises each query and key head in place."""

    __slots__ = ("_floor", "_gain")

    def __init__(self, gain: Tensor, floor: float) -> None:
        self._gain = gain
        self._floor = torch.tensor([floor], device=gain.device)

    def __call__(self, heads: Tensor) -> None:
        heads.div_(torch.linalg.vector_norm(heads, 2, -1, True).hypot_(self._floor)).mul_(self._gain)


class GatedMlp:
    """down(silu(gate(x)) * up(x))."""

    __slots__ = ("_down", "_gate_up", "_width")

    def __init__(self, gate_up: Linear, down: Linear, width: int) -> None:
        self._gate_up = gate_up
        self._down = down
        self._width = width

    def add_to(self, state: Tensor, rows: Tensor) -> Tensor:
        both = self._gate_up(rows)
        return self._down.add_to(state, functional.silu(both[:, : self._width]).mul_(both[:, self._width :]))


class _Loader:
    """Reads tensors and lays them out for the device."""

    def __init__(self, weights: Weights, shape: Architecture, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self._weights = weights
        self._dtype = dtype
        self._device = device

    def norm(self, name: str) -> tuple[_Norm, Tensor | None]:
        """Return a normalisation, and what the weights after it have to be multiplied by."""
        width = self.shape.hidden
        gain = self._weights.take(name, (width,)).double() * math.sqrt(width)
        folded = self._dtype == torch.float32
        kept = None if folded else gain.float().to(self._device)
        return _Norm(width, self.shape.norm_epsilon, kept, self._dtype, self._device), gain if folded else None

    def head_norm(self, prefix: str) -> _HeadNorm:
        shape = self.shape
        gains: list[Tensor] = []
        for name, heads in (("q_norm", shape.heads), ("k_norm", shape.kv_heads)):
            gain = self._weights.take(f"{prefix}{name}.weight", (shape.head_dim,))
            gains.append(_paired(gain, shape.head_dim).expand(heads, -1))
        stacked = (torch.cat(gains).double() * math.sqrt(shape.head_dim)).float()
        return _HeadNorm(stacked.to(self._device), math.sqrt(shape.head_dim * shape.norm_epsilon))

    def linear(self, name: str, outputs: int, inputs: int, biased: bool) -> Linear:
        weight = self._weights.take(f"{name}.weight", (outputs, inputs))
        return make_linear(weight, self._bias(name, outputs, biased), self._dtype, self._device)

    def queries_keys_values(self, prefix: str, gain: Tensor | None) -> Linear:
        shape = self.shape
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        for name, width in (("q_proj", shape.queries_width), ("k_proj", shape.keys_width), ("v_proj", shape.keys_width)):
            weight = self._weights.take(f"{prefix}{name}.weight", (width, shape.hidden))
            bias = self._bias(prefix + name, width, shape.attention_bias)
            bias = torch.zeros(width) if bias is None else bias
            turned = name != "v_proj"
            weights.append(_paired(weight, shape.head_dim) if turned else weight)
            biases.append(_paired(bias, shape.head_dim) if turned else bias)
        bias = torch.cat(biases)
        return make_linear(_scaled(torch.cat(weights), gain), bias if bias.any() else None, self._dtype, self._device)

    def mlp(self, prefix: str, gain: Tensor | None) -> GatedMlp:
        width, biased = self.shape.intermediate, self.shape.mlp_bias
        biases = [self._bias(prefix + name, width, biased) for name in GATE_UP]
        bias = torch.cat([one for one in biases if one is not None]) if biased else None
        gate_up = make_linear(_scaled(self._gate_up(prefix, width), gain), bias, self._dtype, self._device)
        return GatedMlp(gate_up, self.linear(prefix + "down_proj", self.shape.hidden, width, biased), width)

    def experts(self, prefix: str, gain: Tensor | None) -> ExpertMlp:
        experts = self.shape.experts
        assert experts is not None
        width, hidden = experts.intermediate, self.shape.hidden
        router = _scaled(self._weights.take(f"{prefix}gate.weight", (experts.count, hidden)), gain)
        names = [f"{prefix}experts.{number}." for number in range(experts.count)]
        gate_ups = [_scaled(self._gate_up(name, width), gain) for name in names]
        downs = [self._weights.take(f"{name}down_proj.weight", (hidden, width)) for name in names]
        return ExpertMlp(experts, router, gate_ups, downs, self._dtype, self._device)

    def _gate_up(self, prefix: str, width: int) -> Tensor:
        return torch.cat([self._weights.take(f"{prefix}{name}.weight", (width, self.shape.hidden)) for name in GATE_UP])

    def _bias(self, name: str, outputs: int, biased: bool) -> Tensor | None:
        return self._weights.take(f"{name}.bias", (outputs,)) if biased else None


def _scaled(weight: Tensor, gain: Tensor | None) -> Tensor:
    """Return a weight whose inputs are multiplied by `gain`, rounded once."""
    return weight if gain is None else (weight.double() * gain).float()


def _paired(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder each head's outputs from (all firsts, all seconds) of the rotated pairs to pair after pair."""
    heads = weight.view(-1, 2, head_dim // 2, *weight.shape[1:])
    return heads.transpose(1, 2).reshape(weight.shape)
