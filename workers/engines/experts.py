"""Mixture-of-experts MLP: each token goes through the few experts its router picks.

Two ways to the same result, chosen by size. Small experts are computed all at once, as one wide MLP whose unpicked parts are
multiplied by zero: more arithmetic, three products altogether. Otherwise tokens are sorted by expert and each expert that was
picked computes its own.
"""

import torch
from torch import Tensor
from torch.nn import functional

from orchestrator.profiles.model_config import Experts
from workers.engines.linear import make_linear

#: Multiply-adds of the wide form up to which it beats the calls of the sorted one, about 20 microseconds an expert.
WIDE_OPERATIONS_MAX = 8_000_000
#: Bytes of all experts of a layer up to which they are also kept as one wide MLP.
WIDE_BYTES_MAX = 4 * 1024 * 1024


class ExpertMlp:
    """The experts of one layer and their router."""

    def __init__(
        self,
        experts: Experts,
        router: Tensor,
        gate_ups: list[Tensor],
        downs: list[Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._experts = experts
        self._router = make_linear(router, None, dtype, device)
        self._gate_ups = [make_linear(weight, None, dtype, device) for weight in gate_ups]
        self._downs = [make_linear(weight, None, dtype, device) for weight in downs]
        self._row_operations = sum(weight.numel() for weight in (*gate_ups, *downs))
        self._wide = self._row_operations * dtype.itemsize <= WIDE_BYTES_MAX
        if self._wide:
            gates, ups = zip(*(weight.chunk(2) for weight in gate_ups), strict=True)
            self._wide_gate_up = make_linear(torch.cat([*gates, *ups]), None, dtype, device)
            self._wide_down = make_linear(torch.cat(downs, dim=1), None, dtype, device)

    def add_to(self, state: Tensor, rows: Tensor) -> Tensor:
        """Return state + experts(rows)."""
        weights, picked = self._route(rows)
        if self._wide and self._row_operations * len(rows) <= WIDE_OPERATIONS_MAX:
            return self._add_wide(state, rows, weights, picked)
        return self._add_sorted(state, rows, weights, picked)

    def _route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights and numbers of each row's experts, [rows, per token] each."""
        scores = self._router(rows).float()
        if self._experts.normalised:
            best, picked = scores.topk(self._experts.per_token, dim=-1)
            return best.softmax(-1), picked
        weights, picked = scores.softmax(-1).topk(self._experts.per_token, dim=-1)
        return weights, picked

    def _add_wide(self, state: Tensor, rows: Tensor, weights: Tensor, picked: Tensor) -> Tensor:
        count, width = self._experts.count, self._experts.count * self._experts.intermediate
        both = self._wide_gate_up(rows)
        inner = functional.silu(both[:, :width]).mul_(both[:, width:])
        shares = weights.new_zeros(len(rows), count).scatter_(1, picked, weights).to(inner.dtype)
        inner.view(len(rows), count, self._experts.intermediate).mul_(shares.unsqueeze(-1))
        return self._wide_down.add_to(state, inner)

    def _add_sorted(self, state: Tensor, rows: Tensor, weights: Tensor, picked: Tensor) -> Tensor:
        order = picked.view(-1).argsort()
        counts = torch.bincount(picked.view(-1), minlength=self._experts.count).tolist()
        owners = order // self._experts.per_token
        inputs = rows.index_select(0, owners)
        outputs = torch.empty(len(inputs), state.shape[1], dtype=torch.float32, device=rows.device)
        width, first = self._experts.intermediate, 0
        for expert, count in enumerate(counts):
            if count:
                both = self._gate_ups[expert](inputs[first : first + count])
                inner = functional.silu(both[:, :width]).mul_(both[:, width:])
                outputs[first : first + count] = self._downs[expert](inner)
                first += count
        outputs.mul_(weights.view(-1).index_select(0, order).unsqueeze(-1))
        return state.index_add_(0, owners, outputs)
