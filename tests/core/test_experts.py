"""Experts are placed so that each is somewhere, no rank has one twice, and ranks carry about the same."""

import random

import pytest

from orchestrator.core.experts import ExpertBalance, ExpertBalancer, copies_of, imbalance, place_experts


@pytest.mark.parametrize("seed", range(20))
def test_every_expert_is_placed_once_a_rank_at_most(seed: int) -> None:
    generator = random.Random(seed)
    ranks, experts = generator.randint(1, 9), generator.randint(1, 70)
    slots = -(-experts // ranks) + generator.randint(0, 4)
    loads = [generator.paretovariate(0.8) * generator.choice((0, 1, 1)) for _ in range(experts)]
    placement = place_experts(loads, ranks, slots)
    assert len(placement) == ranks
    assert [len(set(held)) for held in placement] == [len(held) for held in placement]
    assert max(map(len, placement)) <= slots
    assert set(copies_of(placement)) == set(range(experts))


@pytest.mark.parametrize("seed", range(5))
def test_a_skewed_load_is_levelled_by_copies(seed: int) -> None:
    generator = random.Random(seed)
    loads = [1 / (place + 1) for place in range(64)]
    generator.shuffle(loads)
    even = place_experts([0.0] * 64, 8, 8)
    placed = place_experts(loads, 8, 10)
    assert imbalance(loads, placed) < 0.05 < imbalance(loads, even)


def test_without_load_nothing_is_copied_and_ranks_hold_as_many() -> None:
    placement = place_experts([0.0] * 12, 3, 6)
    assert [len(held) for held in placement] == [4, 4, 4]
    assert set(copies_of(placement).values()) == {1}
    assert imbalance([0.0] * 12, placement) == 0.0


def test_imbalance_is_the_busiest_ranks_excess_over_the_mean() -> None:
    # Expert 0 is in both ranks and gives 2 to each: 2 + 1 against 2 + 3.
    assert imbalance([4.0, 1.0, 3.0], ((0, 1), (0, 2))) == pytest.approx(0.25)


@pytest.mark.parametrize(("ranks", "slots"), [(0, 5), (2, 1), (1, 2)])
def test_too_few_slots_are_refused(ranks: int, slots: int) -> None:
    with pytest.raises(ValueError, match=f"3 experts do not fit into {ranks} ranks of {slots} slots"):
        place_experts([1.0, 1.0, 1.0], ranks, slots)


def balanced(imbalance_max: float) -> ExpertBalancer:
    return ExpertBalancer({0: ((0, 2), (1, 3)), 1: ((0, 2), (1, 3))}, slots=3, imbalance_max=imbalance_max)


def test_the_most_uneven_layer_moves_first_and_each_once() -> None:
    balancer = balanced(0.1)
    balancer.observe([[300, 100, 300, 100], [900, 0, 900, 0]])
    assert (balancer.imbalance_of(0), balancer.imbalance_of(1)) == (pytest.approx(0.5), pytest.approx(1.0))
    layers: list[int] = []
    while (move := balancer.next_move()) is not None:
        layers.append(move.layer)
        assert move.version == 1
        balancer.moved(move)
    assert layers == [1, 0]
    assert (balancer.imbalance_of(0), balancer.imbalance_of(1)) == (pytest.approx(0.0), pytest.approx(0.0))


def test_loads_that_are_even_enough_or_hardly_known_move_nothing() -> None:
    balancer = balanced(0.6)
    balancer.observe([[300, 100, 300, 100], [9, 0, 9, 0]])
    assert balancer.next_move() is None
    balancer = balanced(0.0)
    balancer.observe([[300, 0, 300, 0], [300, 0, 300, 0]])
    assert balancer.next_move() is None


def test_a_load_that_no_placement_evens_out_moves_nothing() -> None:
    balancer = ExpertBalancer({0: ((0,), (1,))}, slots=1, imbalance_max=0.1)
    balancer.observe([[500, 100]])
    assert balancer.next_move() is None


def test_a_balance_tells_what_moves_have_brought() -> None:
    balancer = balanced(0.1)
    assert balancer.balance is None
    # What is hardly known does not count.
    balancer.observe([[9, 0, 9, 0], [900, 0, 900, 0]])
    assert balancer.balance == ExpertBalance(0, pytest.approx(1.0), pytest.approx(1.0))
    balancer.observe([[300, 100, 300, 100], [900, 0, 900, 0]])
    while (move := balancer.next_move()) is not None:
        balancer.moved(move)
    assert balancer.balance == ExpertBalance(2, pytest.approx(0.0, abs=0.02), pytest.approx(0.76, abs=0.02))


def test_what_was_asked_for_long_ago_counts_less_and_less() -> None:
    balancer = balanced(0.1)
    balancer.observe([[400, 0, 400, 0], [100, 100, 100, 100]])
    for _ in range(12):
        balancer.observe([[100, 100, 100, 100], [100, 100, 100, 100]])
    assert balancer.next_move() is None
