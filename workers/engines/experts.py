"""Mixture-of-experts MLP: each token goes through the few experts its router picks.

Two ways to the same result, chosen by size. Small experts are computed all at once, as one wide MLP whose unpicked parts are
multiplied by zero: more arithmetic, three products altogether. Otherwise tokens are sorted by expert and each expert that was
picked computes its own.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from orchestrator.profiles.model_config import GROUP_BEST, Experts
from workers.engines.adapters import AdaptedRows
from workers.engines.linear import Linear, make_linear
from workers.engines.mlp import Finish, GatedMlp
from workers.engines.quantised import Matrix

#: Multiply-adds of the wide form up to which it beats the calls of the sorted one, about 20 microseconds an expert.
WIDE_OPERATIONS_MAX = 8_000_000
#: Bytes of all experts of a layer up to which they are also kept as one wide MLP.
WIDE_BYTES_MAX = 4 * 1024 * 1024
#: Added to the sum that weights of experts are divided by, as DeepSeek-V3 has it.
WEIGHTS_FLOOR = 1e-20


class Router(Protocol):
    """Picks each row's experts."""

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights (float32) and numbers of each row's experts, [rows, per token] each."""
        ...


class SoftmaxRouter:
    """Picks each row's experts by softmax over a product's scores."""

    __slots__ = ("_normalised", "_per_token", "_scores")

    def __init__(self, scores: Linear, per_token: int, normalised: bool) -> None:
        self._scores = scores
        self._per_token = per_token
        self._normalised = normalised

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `Router.route`."""
        scores = self._scores(rows).float()
        if self._normalised:
            best, picked = scores.topk(self._per_token, dim=-1)
            return best.softmax(-1), picked
        weights, picked = scores.softmax(-1).topk(self._per_token, dim=-1)
        return weights, picked


class GroupedRouter:
    """Picks each row's experts in its best groups, by sigmoids of a product's scores; see `GroupedRouting`."""

    __slots__ = ("_bias", "_grouped", "_normalised", "_per_token", "_scores")

    def __init__(self, scores: Linear, bias: Tensor, experts: Experts) -> None:
        """Take a product in float32, and what is added to each expert's score where experts are chosen."""
        assert experts.grouped is not None
        self._scores = scores
        self._bias = bias
        self._per_token = experts.per_token
        self._normalised = experts.normalised
        self._grouped = experts.grouped

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `Router.route`."""
        scores = self._scores(rows.float()).sigmoid_()
        choices = scores + self._bias
        if self._grouped.groups_per_token < self._grouped.groups:
            groups = choices.unflatten(1, (self._grouped.groups, -1))
            left = self._grouped.groups - self._grouped.groups_per_token
            worst = groups.topk(GROUP_BEST, dim=-1).values.sum(-1).topk(left, dim=-1, largest=False).indices
            groups.scatter_(1, worst.unsqueeze(-1).expand(-1, -1, groups.shape[2]), -torch.inf)
        picked = choices.topk(self._per_token, dim=-1).indices
        weights = scores.gather(1, picked)
        if self._normalised:
            weights /= weights.sum(-1, keepdim=True) + WEIGHTS_FLOOR
        return weights.mul_(self._grouped.scale), picked


class TurnRouter:
    """Does what a router does, and then picks some experts in turn: no way of picking among them asks for more."""

    __slots__ = ("_experts", "_router")

    def __init__(self, router: Router, experts: Sequence[int]) -> None:
        self._router = router
        self._experts = torch.tensor(experts)

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `Router.route`."""
        weights, picked = self._router.route(rows)
        turns = torch.arange(picked.numel()) % len(self._experts)
        return weights, self._experts[turns].view_as(picked).to(picked.device)


class ExpertBank:
    """Some experts of one layer, in slots: what rows they are given they compute, whoever picked."""

    def __init__(self, gate_ups: Sequence[Matrix], downs: Sequence[Matrix], dtype: torch.dtype, device: torch.device) -> None:
        """Take the weights of each slot: gate over up [2 x width, hidden], and down [hidden, width]."""
        self._slots = len(downs)
        self._width = downs[0].shape[1]
        self._gate_ups = [make_linear(weight, None, dtype, device) for weight in gate_ups]
        self._downs = [make_linear(weight, None, dtype, device) for weight in downs]
        self._row_operations = sum(math.prod(weight.shape) for weight in (*gate_ups, *downs))
        plain = [weight for weight in (*gate_ups, *downs) if isinstance(weight, Tensor)]
        self._wide = len(plain) == 2 * self._slots and self._row_operations * dtype.itemsize <= WIDE_BYTES_MAX
        if self._wide:
            gates, ups = zip(*(weight.chunk(2) for weight in plain[: self._slots]), strict=True)
            self._wide_gate_up = make_linear(torch.cat([*gates, *ups]), None, dtype, device)
            self._wide_down = make_linear(torch.cat(plain[self._slots :], dim=1), None, dtype, device)

    def add_to(self, state: Tensor, rows: Tensor, weights: Tensor, picked: Tensor) -> Tensor:
        """Return state + the weighted sum of each row's experts.

        Args:
            state: float32 [rows, hidden]; may be changed.
            rows: normalised, [rows, hidden].
            weights: float32 [rows, picks].
            picked: slots, [rows, picks]; picks of other banks have the number of slots there are here, or a higher one.
        """
        if self._wide and self._row_operations * len(rows) <= WIDE_OPERATIONS_MAX:
            return self._add_wide(state, rows, weights, picked)
        return self._add_sorted(state, rows, weights, picked)

    def _add_wide(self, state: Tensor, rows: Tensor, weights: Tensor, picked: Tensor) -> Tensor:
        width = self._slots * self._width
        both = self._wide_gate_up(rows)
        inner = functional.silu(both[:, :width]).mul_(both[:, width:])
        shares = weights.new_zeros(len(rows), self._slots + 1)
        shares = shares.scatter_add_(1, picked.clamp(max=self._slots), weights)[:, :-1].to(inner.dtype)
        inner.view(len(rows), self._slots, self._width).mul_(shares.unsqueeze(-1))
        return self._wide_down.add_to(state, inner)

    def _add_sorted(self, state: Tensor, rows: Tensor, weights: Tensor, picked: Tensor) -> Tensor:
        flat = picked.reshape(-1).clamp(max=self._slots)
        order = flat.argsort()
        counts = torch.bincount(flat, minlength=self._slots).tolist()[: self._slots]
        order = order[: sum(counts)]
        owners = order // picked.shape[1]
        inputs = rows.index_select(0, owners)
        outputs = torch.empty(len(inputs), state.shape[1], dtype=torch.float32, device=rows.device)
        first = 0
        for slot, count in enumerate(counts):
            if count:
                both = self._gate_ups[slot](inputs[first : first + count])
                inner = functional.silu(both[:, : self._width]).mul_(both[:, self._width :])
                outputs[first : first + count] = self._downs[slot](inner)
                first += count
        outputs.mul_(weights.reshape(-1).index_select(0, order).unsqueeze(-1))
        return state.index_add_(0, owners, outputs)


class ExpertMlp:
    """A layer's router and all its experts, in one process."""

    __slots__ = ("_bank", "_shared", "router")

    def __init__(self, router: Router, bank: ExpertBank, shared: GatedMlp | None = None) -> None:
        """Take the experts that rows are routed to, and those that all of them visit."""
        self.router = router
        self._bank = bank
        self._shared = shared

    def begin(self, rows: Tensor, adapted: AdaptedRows) -> Finish:
        """See `Ffn.begin`: computes when finished."""
        return partial(self.add_to, rows=rows, adapted=adapted)

    def add_to(self, state: Tensor, rows: Tensor, adapted: AdaptedRows = ()) -> Tensor:
        """Return state + experts(rows); of adapters those of what all rows visit count."""
        weights, picked = self.router.route(rows)
        state = self._bank.add_to(state, rows, weights, picked)
        return state if self._shared is None else self._shared.add_to(state, rows, adapted)
