"""How tokens are to be chosen arrives at an engine as it was asked for, over the wire."""

import pytest

from orchestrator.core.types import SEED_MASK, Sampling
from orchestrator.wire import codec, node_pb2

#: Fractions are such that 32 bits hold them.
ALL = Sampling(
    0.5, 0.25, 3, 0.125, 1.5, -0.5, SEED_MASK, (5, 6), 0, {7: 2.0, 8: -100.0}, 1.25, 9, ((3,), (4, 5)), (1, 2), "start: /a+/", 3
)


def over_the_wire(sampling: Sampling) -> Sampling:
    message = node_pb2.Sampling()
    codec.write_sampling(message, sampling)
    return codec.sampling_from(node_pb2.Sampling.FromString(message.SerializeToString()))


@pytest.mark.parametrize(
    "sampling", [Sampling(), ALL, Sampling(seed=0), Sampling(logprobs=4)], ids=["least", "all", "seed", "scored"]
)
def test_every_field_arrives(sampling: Sampling) -> None:
    found = over_the_wire(sampling)
    assert {name: getattr(found, name) for name in Sampling.__slots__} == {
        name: getattr(sampling, name) for name in Sampling.__slots__
    }


def test_each_choice_has_a_seed_of_its_own_if_there_is_one() -> None:
    assert [Sampling(seed=SEED_MASK).for_choice(number).seed for number in range(3)] == [SEED_MASK, 0, 1]
    assert Sampling().for_choice(2) == Sampling()


def test_further_ends_come_once_and_in_order() -> None:
    assert Sampling(stop_token_ids=(9, 3)).ending_with(frozenset({7, 3, 5})).stop_token_ids == (9, 3, 5, 7)
    assert Sampling(stop_token_ids=(9, 3)).ending_with(frozenset({3})).stop_token_ids == (9, 3)
