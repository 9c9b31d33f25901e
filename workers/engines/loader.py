"""Reads a checkpoint's tensors and lays them out for the device, part by part."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.core.config import ModelConfig
from orchestrator.core.cost.shapes import Latent
from orchestrator.profiles.model_config import Architecture, Experts
from workers.engines.adapters import AdaptedLinear, Adapters, Part
from workers.engines.experts import ExpertBank, GroupedRouter, Router, SoftmaxRouter
from workers.engines.linear import Linear, make_linear
from workers.engines.mlp import GatedMlp
from workers.engines.norms import HeadNorm, Norm
from workers.engines.quantised import Matrix, columns, stack
from workers.engines.weights import Weights

#: The two products that are computed as one.
GATE_UP = ("gate_proj", "up_proj")
#: In latent attention's own normalisations, whatever `rms_norm_eps` is.
LATENT_EPSILON = 1e-6
#: What an expert consists of.
EXPERT = (*GATE_UP, "down_proj")


@dataclass(frozen=True, slots=True)
class Share:
    """Which of how many ranks that share a dense FFN's inner width."""

    rank: int = 0
    ranks: int = 1

    def of(self, width: int) -> slice:
        """Return the rank's part of a width; parts differ by 1 where it does not divide."""
        return slice(width * self.rank // self.ranks, width * (self.rank + 1) // self.ranks)


class Loader:
    """Reads tensors and lays them out for the device."""

    def __init__(
        self,
        weights: Weights,
        shape: Architecture,
        dtype: torch.dtype,
        device: torch.device,
        adapters: Adapters | None = None,
    ) -> None:
        self.shape = shape
        self._adapters = adapters or Adapters(ModelConfig(), dtype, device)
        self._weights = weights
        self._dtype = dtype
        self._device = device
        for number in range(shape.layers, shape.layers + shape.guessing_layers):
            weights.leave_all(f"model.layers.{number}.")

    def norm(self, name: str) -> tuple[Norm, Tensor | None]:
        """Return a normalisation of the residual stream, and what the weights after it have to be multiplied by."""
        return self._norm(name, self.shape.hidden, self.shape.norm_epsilon)

    def _norm(self, name: str, width: int, epsilon: float) -> tuple[Norm, Tensor | None]:
        gain = self._weights.take(name, (width,)).double() * math.sqrt(width)
        folded = self._dtype == torch.float32 and not self._weights.quantised
        kept = None if folded else gain.float().to(self._device)
        return Norm(width, epsilon, kept, self._dtype, self._device), gain if folded else None

    def head_norm(self, prefix: str) -> HeadNorm:
        shape = self.shape
        gains: list[Tensor] = []
        for name, heads in (("q_norm", shape.heads), ("k_norm", shape.kv_heads)):
            gain = self._weights.take(f"{prefix}{name}.weight", (shape.head_dim,))
            gains.append(gain[_paired(shape.head_dim, shape.head_dim)].expand(heads, -1))
        stacked = (torch.cat(gains).double() * math.sqrt(shape.head_dim)).float()
        return HeadNorm(stacked.to(self._device), math.sqrt(shape.head_dim * shape.norm_epsilon))

    def linear(self, name: str, outputs: int, inputs: int, biased: bool) -> AdaptedLinear:
        weight = self._weights.take_matrix(f"{name}.weight", (outputs, inputs))
        linear = make_linear(weight, self._bias(name, outputs, biased), self._dtype, self._device)
        return AdaptedLinear(linear, self._adapters.low_rank([Part(name, outputs)], inputs, None))

    def queries_keys_values(self, prefix: str, gain: Tensor | None) -> AdaptedLinear:
        shape = self.shape
        weights: list[Matrix] = []
        biases: list[Tensor] = []
        parts: list[Part] = []
        for name, width in (("q_proj", shape.queries_width), ("k_proj", shape.keys_width), ("v_proj", shape.keys_width)):
            weight, bias = self._taken(prefix + name, width, shape.attention_bias)
            order = torch.arange(width) if name == "v_proj" else _paired(width, shape.head_dim)
            weights.append(weight[order])
            biases.append(bias[order])
            parts.append(Part(prefix + name, width, order))
        bias = torch.cat(biases)
        linear = make_linear(_gained(stack(weights), gain), bias if bias.any() else None, self._dtype, self._device)
        return AdaptedLinear(linear, self._adapters.low_rank(parts, shape.hidden, gain))

    def latent_inputs(self, prefix: str, gain: Tensor | None) -> Linear:
        """Return the product to (compressed) queries, latents and the shared key, side by side."""
        shape, latent = self.shape, self._latent()
        kept = latent.kv_rank + latent.rope_dim
        compressed = bool(latent.query_rank)
        name, width = ("q_a_proj", latent.query_rank) if compressed else ("q_proj", shape.queries_width)
        queries, queries_bias = self._taken(prefix + name, width, shape.attention_bias and compressed)
        latents, latents_bias = self._taken(f"{prefix}kv_a_proj_with_mqa", kept, shape.attention_bias)
        if not compressed:
            queries = queries[self._paired_ends(width, shape.heads)]
        order = self._paired_ends(kept, 1)
        weight = _gained(stack([queries, latents[order]]), gain)
        bias = torch.cat([queries_bias, latents_bias[order]])
        return make_linear(weight, bias if bias.any() else None, self._dtype, self._device)

    def compressed_queries(self, prefix: str) -> tuple[Norm, Linear]:
        """Return the normalisation of compressed queries and the product from them."""
        rank, width = self._latent().query_rank, self.shape.queries_width
        norm, gain = self._norm(f"{prefix}q_a_layernorm.weight", rank, LATENT_EPSILON)
        weight = self._weights.take_matrix(f"{prefix}q_b_proj.weight", (width, rank))[self._paired_ends(width, self.shape.heads)]
        return norm, make_linear(_gained(weight, gain), None, self._dtype, self._device)

    def latents(self, prefix: str) -> tuple[Norm, Tensor, Tensor]:
        """Return the normalisation of latents to length 1, and what keys and values are made of them with.

        In every dtype the gain is in the latter: latents mean the same in all pools.
        """
        shape, latent = self.shape, self._latent()
        rank, plain = latent.kv_rank, latent.nope_dim
        gain = self._weights.take(f"{prefix}kv_a_layernorm.weight", (rank,)).double() * math.sqrt(rank)
        width = shape.heads * (plain + latent.value_dim)
        weight = scaled(self._weights.take(f"{prefix}kv_b_proj.weight", (width, rank)), gain)
        heads = weight.to(self._device, self._dtype).view(shape.heads, -1, rank)
        norm = Norm(rank, LATENT_EPSILON, None, self._dtype, self._device)
        return norm, heads[:, :plain].contiguous(), heads[:, plain:].transpose(1, 2).contiguous()

    def mlp(self, prefix: str, gain: Tensor | None, share: Share = Share()) -> GatedMlp:
        """Return a dense FFN, or a rank's share of its inner width; what the shares make adds up to the whole."""
        return self._gated(prefix, self.shape.intermediate, gain, self.shape.mlp_bias, share)

    def _gated(self, prefix: str, whole: int, gain: Tensor | None, biased: bool, share: Share = Share()) -> GatedMlp:
        part = share.of(whole)
        width = part.stop - part.start
        gates_ups = [self._weights.take_matrix(f"{prefix}{name}.weight", (whole, self.shape.hidden))[part] for name in GATE_UP]
        biases = [self._bias(prefix + name, whole, biased) for name in GATE_UP]
        bias = torch.cat([one[part] for one in biases if one is not None]) if biased else None
        gate_up = make_linear(_gained(stack(gates_ups), gain), bias, self._dtype, self._device)
        down = columns(self._weights.take_matrix(f"{prefix}down_proj.weight", (self.shape.hidden, whole)), part)
        down_bias = self._bias(f"{prefix}down_proj", self.shape.hidden, biased)
        first = share.rank == 0  # a sum has its bias once
        finish = make_linear(down, down_bias if first else None, self._dtype, self._device)
        gates_ups_added = self._adapters.low_rank([Part(prefix + name, whole) for name in GATE_UP], self.shape.hidden, gain)
        downs_added = self._adapters.low_rank([Part(f"{prefix}down_proj", self.shape.hidden)], whole, None)
        return GatedMlp(AdaptedLinear(gate_up, gates_ups_added), AdaptedLinear(finish, downs_added), width)

    def router(self, prefix: str, gain: Tensor | None) -> Router:
        experts = self._experts()
        weight = scaled(self._weights.take(f"{prefix}gate.weight", (experts.count, self.shape.hidden)), gain)
        if experts.grouped is None:
            return SoftmaxRouter(make_linear(weight, None, self._dtype, self._device), experts.per_token, experts.normalised)
        bias = self._weights.take(f"{prefix}gate.e_score_correction_bias", (experts.count,)).to(self._device)
        return GroupedRouter(make_linear(weight, None, torch.float32, self._device), bias, experts)

    def shared(self, prefix: str, gain: Tensor | None) -> GatedMlp | None:
        """Return the experts that every row visits, as one; None if there are none."""
        width = self._experts().shared_intermediate
        return self._gated(f"{prefix}shared_experts.", width, gain, biased=False) if width else None

    def bank(self, prefix: str, gain: Tensor | None, numbers: Sequence[int]) -> ExpertBank:
        """Return the experts of these numbers, each in the slot of its place."""
        width = self._experts().intermediate
        names = [f"{prefix}experts.{number}." for number in numbers]
        gate_ups = [_gained(self._gate_up(name, width), gain) for name in names]
        downs = [self._weights.take_matrix(f"{name}down_proj.weight", (self.shape.hidden, width)) for name in names]
        return ExpertBank(gate_ups, downs, self._dtype, self._device)

    def leave_experts(self, prefix: str) -> None:
        """Note that other processes take what this one does not of a layer's router and experts."""
        names = [f"{prefix}experts.{number}.{name}.weight" for number in range(self._experts().count) for name in EXPERT]
        self._weights.leave(*names)
        self._weights.leave_all(f"{prefix}gate.")
        self._weights.leave_all(f"{prefix}shared_experts.")

    def leave_ffn(self, prefix: str) -> None:
        """Note that other processes take a layer's whole FFN, but for what is taken here."""
        self._weights.leave_all(prefix)

    def _paired_ends(self, outputs: int, heads: int) -> Tensor:
        """Return a product's outputs in the order that has the ends of heads, which turn, pair after pair."""
        order = torch.arange(outputs)
        if self.shape.interleaved:
            return order
        turned = self.shape.rotated_dim
        kept, ends = order.view(heads, -1).split((outputs // heads - turned, turned), dim=1)
        return torch.cat([kept, ends[:, _paired(turned, turned)]], dim=1).flatten()

    def _latent(self) -> Latent:
        assert self.shape.latent is not None
        return self.shape.latent

    def _experts(self) -> Experts:
        assert self.shape.experts is not None
        return self.shape.experts

    def _gate_up(self, prefix: str, width: int) -> Matrix:
        return stack([self._weights.take_matrix(f"{prefix}{name}.weight", (width, self.shape.hidden)) for name in GATE_UP])

    def _taken(self, name: str, outputs: int, biased: bool) -> tuple[Matrix, Tensor]:
        """Return the weight and the bias of a product of normalised rows; a bias of zeros if there is none."""
        weight, bias = (
            self._weights.take_matrix(f"{name}.weight", (outputs, self.shape.hidden)),
            self._bias(name, outputs, biased),
        )
        return weight, torch.zeros(outputs) if bias is None else bias

    def _bias(self, name: str, outputs: int, biased: bool) -> Tensor | None:
        return self._weights.take(f"{name}.bias", (outputs,)) if biased else None


def scaled(weight: Tensor, gain: Tensor | None) -> Tensor:
    """Return a weight whose inputs are multiplied by `gain`, rounded once."""
    return weight if gain is None else (weight.double() * gain).float()


def _gained(weight: Matrix, gain: Tensor | None) -> Matrix:
    """Return the same of a weight that may be quantised: then there is no gain, the norm before kept it."""
    if isinstance(weight, Tensor):
        return scaled(weight, gain)
    assert gain is None, "gains are not folded into quantised weights"
    return weight


def _paired(outputs: int, head_dim: int) -> Tensor:
    """Return each head's outputs, (all firsts, all seconds) of the rotated pairs, in the order of pair after pair."""
    return torch.arange(outputs).view(-1, 2, head_dim // 2).transpose(1, 2).reshape(-1)
