"""Tokens go through the experts their router picks, with its weights: held against one token and one expert at a time."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from orchestrator.profiles.model_config import Experts, GroupedRouting
from workers.engines import experts as experts_file
from workers.engines.adapters import AdaptedLinear
from workers.engines.experts import ExpertBank, ExpertMlp, GroupedRouter, Router, SoftmaxRouter
from workers.engines.linear import make_linear
from workers.engines.mlp import GatedMlp

HIDDEN, WIDTH = 8, 6
CPU = torch.device("cpu")
EIGHT = Experts(count=8, per_token=2, intermediate=WIDTH, shared_intermediate=0, normalised=True, layers=frozenset({0}))


class Weights:
    """A router's and its experts' weights, from a seed."""

    def __init__(self, experts: Experts, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def matrix(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.router = matrix(experts.count, HIDDEN)
        self.gate_ups = [matrix(2 * WIDTH, HIDDEN) for _ in range(experts.count)]
        self.downs = [matrix(HIDDEN, WIDTH) for _ in range(experts.count)]
        #: Added to scores where grouped experts are chosen; large enough to decide.
        self.bias = matrix(experts.count)
        self.shared_gate_up, self.shared_down = (
            matrix(2 * experts.shared_intermediate, HIDDEN),
            matrix(HIDDEN, experts.shared_intermediate),
        )

    def mlp(self, experts: Experts, dtype: torch.dtype = torch.float32) -> ExpertMlp:
        shared = None
        if experts.shared_intermediate:
            gate_up, down = (make_linear(weight, None, dtype, CPU) for weight in (self.shared_gate_up, self.shared_down))
            shared = GatedMlp(AdaptedLinear(gate_up), AdaptedLinear(down), experts.shared_intermediate)
        return ExpertMlp(self.routing(experts, dtype), ExpertBank(self.gate_ups, self.downs, dtype, CPU), shared)

    def routing(self, experts: Experts, dtype: torch.dtype = torch.float32) -> Router:
        if experts.grouped is not None:
            return GroupedRouter(make_linear(self.router, None, torch.float32, CPU), self.bias, experts)
        return SoftmaxRouter(make_linear(self.router, None, dtype, CPU), experts.per_token, experts.normalised)

    def one_by_one(self, experts: Experts, state: Tensor, rows: Tensor) -> Tensor:
        """Return state + experts(rows) in float64, the way it is written in papers."""
        found = state.double().clone()
        for place, row in enumerate(rows.double()):
            shares, choices, scale = self._scores(experts, self.router.double() @ row)
            picked = sorted(choices, key=lambda expert: -choices[expert])[: experts.per_token]
            total = sum(float(shares[expert]) for expert in picked) if experts.normalised else 1.0
            for expert in picked:
                output = self._through(self.gate_ups[expert], self.downs[expert], row)
                found[place] += scale * float(shares[expert]) / total * output
            found[place] += self._through(self.shared_gate_up, self.shared_down, row)
        return found

    def _scores(self, experts: Experts, scores: Tensor) -> tuple[Tensor, dict[int, float], float]:
        """Return what weights are made of, what the experts that may be picked are picked by, and what scales weights."""
        grouped = experts.grouped
        if grouped is None:
            return scores.softmax(0), dict(enumerate(scores.tolist())), 1.0
        shares = scores.sigmoid()
        biased = (shares + self.bias.double()).tolist()
        size = experts.count // grouped.groups
        groups = [list(range(first, first + size)) for first in range(0, experts.count, size)]
        groups.sort(key=lambda group: -sum(sorted(biased[expert] for expert in group)[-2:]))
        return shares, {expert: biased[expert] for group in groups[: grouped.groups_per_token] for expert in group}, grouped.scale

    @staticmethod
    def _through(gate_up: Tensor, down: Tensor, row: Tensor) -> Tensor:
        gate, up = (gate_up.double() @ row).chunk(2)
        return down.double() @ (gate * torch.sigmoid(gate) * up)


def inputs(rows: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, HIDDEN, generator=generator), torch.randn(rows, HIDDEN, generator=generator)


@pytest.fixture(params=["wide", "sorted", "sorted-with-wide-at-hand"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have all experts computed at once, or each that was picked by itself."""
    monkeypatch.setattr(experts_file, "WIDE_BYTES_MAX", 0 if request.param == "sorted" else 1 << 40)
    monkeypatch.setattr(experts_file, "WIDE_OPERATIONS_MAX", 1 << 40 if request.param == "wide" else 0)
    return request.param


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(("count", "per_token"), [(1, 1), (2, 1), (8, 2), (8, 7), (8, 8)])
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_tokens_go_through_their_experts(form: str, rows: int, count: int, per_token: int, normalised: bool) -> None:
    experts = replace(EIGHT, count=count, per_token=per_token, normalised=normalised)
    weights, (state, tokens) = Weights(experts, seed=count), inputs(rows)
    expected = weights.one_by_one(experts, state, tokens)
    found = weights.mlp(experts).add_to(state.clone(), tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("shared", [0, 5])
@pytest.mark.parametrize(("count", "per_token", "groups", "chosen"), [(8, 2, 1, 1), (8, 2, 4, 1), (8, 3, 4, 2), (12, 4, 3, 2)])
@pytest.mark.parametrize("rows", [1, 33])
def test_experts_are_picked_in_the_best_groups(
    form: str, rows: int, count: int, per_token: int, groups: int, chosen: int, shared: int, normalised: bool
) -> None:
    routing = GroupedRouting(groups, chosen, 2.5)
    experts = Experts(count, per_token, WIDTH, shared, normalised, frozenset({0}), routing)
    weights, (state, tokens) = Weights(experts, seed=count), inputs(rows)
    expected = weights.one_by_one(experts, state, tokens)
    torch.testing.assert_close(weights.mlp(experts).add_to(state.clone(), tokens).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_bias_picks_experts_and_does_not_weigh_them() -> None:
    experts = replace(EIGHT, per_token=1, normalised=False, grouped=GroupedRouting(1, 1, 1.0))
    weights, (_, tokens) = Weights(experts, seed=1), inputs(5)
    weights.bias.fill_(0.0)[3] = 9.0
    shares, picked = weights.routing(experts).route(tokens)
    assert picked.tolist() == [[3]] * 5
    torch.testing.assert_close(shares[:, 0], (tokens @ weights.router[3]).sigmoid())


def test_experts_that_nobody_picked_do_not_matter(form: str) -> None:
    weights, (state, tokens) = Weights(EIGHT, seed=1), inputs(4)
    picked = weights.router @ tokens.T
    unpicked = set(range(8)) - set(picked.T.topk(2).indices.flatten().tolist())
    assert unpicked
    before = weights.mlp(EIGHT).add_to(state.clone(), tokens)
    for expert in unpicked:
        weights.gate_ups[expert].mul_(-3.0)
        weights.downs[expert].add_(1.0)
    torch.testing.assert_close(weights.mlp(EIGHT).add_to(state.clone(), tokens), before)


def test_all_tokens_may_pick_the_same_expert(form: str) -> None:
    experts = replace(EIGHT, per_token=1)
    weights, (state, _) = Weights(experts, seed=2), inputs(20)
    tokens = torch.full((20, HIDDEN), 0.3) + torch.arange(20)[:, None] * 1e-3
    weights.router.zero_()[5] = 1.0
    expected = weights.one_by_one(experts, state, tokens)
    torch.testing.assert_close(weights.mlp(experts).add_to(state.clone(), tokens).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_step_without_rows_changes_nothing(form: str) -> None:
    state, tokens = inputs(0)
    assert Weights(EIGHT, seed=1).mlp(EIGHT).add_to(state, tokens).shape == (0, HIDDEN)


def test_a_broken_row_stays_alone(form: str) -> None:
    weights, (state, tokens) = Weights(EIGHT, seed=3), inputs(5)
    expected = weights.mlp(EIGHT).add_to(state.clone(), tokens)
    tokens[2] = torch.nan
    found = weights.mlp(EIGHT).add_to(state.clone(), tokens)
    assert found[2].isnan().all()
    sound = [0, 1, 3, 4]
    torch.testing.assert_close(found[sound], expected[sound])


def test_banks_share_the_experts_of_a_layer(form: str) -> None:
    weights, (state, tokens) = Weights(EIGHT, seed=6), inputs(33)
    expected = weights.one_by_one(EIGHT, state, tokens)
    shares, picked = weights.routing(EIGHT).route(tokens)
    owned = ([7, 0, 3], [1, 2, 4, 5, 6])
    for numbers in owned:
        slots = torch.full((EIGHT.count,), len(numbers) + 2)
        slots[numbers] = torch.arange(len(numbers))
        bank = ExpertBank([weights.gate_ups[one] for one in numbers], [weights.downs[one] for one in numbers], torch.float32, CPU)
        state = bank.add_to(state, tokens, shares, slots[picked])
    torch.testing.assert_close(state.double(), expected, rtol=1e-4, atol=1e-4)


def test_in_bfloat16_sums_stay_in_float32(form: str) -> None:
    weights, (state, tokens) = Weights(EIGHT, seed=4), inputs(6)
    # Rounded first, so that both pick the same experts.
    weights.router = weights.router.bfloat16().float()
    tokens = tokens.bfloat16()
    found = weights.mlp(EIGHT, torch.bfloat16).add_to(state.clone(), tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), weights.one_by_one(EIGHT, state, tokens), rtol=0.1, atol=0.3)


@pytest.mark.parametrize(
    ("bytes_max", "operations_max", "rows", "wide"),
    [
        # 8 experts of 6 x 8 x 3 weights: 4,608 bytes, 1,152 multiply-adds a row.
        (4608, 1152, 1, True),
        (4608, 1152, 2, False),
        (4608, 2 * 1152, 2, True),
        (4607, 1 << 40, 1, False),
    ],
)
def test_small_experts_and_few_rows_are_computed_at_once(
    monkeypatch: pytest.MonkeyPatch, bytes_max: int, operations_max: int, rows: int, wide: bool
) -> None:
    monkeypatch.setattr(experts_file, "WIDE_BYTES_MAX", bytes_max)
    monkeypatch.setattr(experts_file, "WIDE_OPERATIONS_MAX", operations_max)
    used: list[str] = []
    for name in ("_add_wide", "_add_sorted"):
        monkeypatch.setattr(ExpertBank, name, lambda bank, state, *rest, name=name: used.append(name) or state)
    state, tokens = inputs(rows)
    Weights(EIGHT, seed=1).mlp(EIGHT).add_to(state, tokens)
    assert used == ["_add_wide" if wide else "_add_sorted"]
