"""Two halves that overlap: what is hidden, and how many micro-batches pay."""

from math import isclose

import pytest

from orchestrator.core.cost.overlap import Halves, choose_microbatches, ping_pong_seconds


def halves(attention_s: float, ffn_s: float, hop_s: float, microbatches: int, layers: int = 10) -> Halves:
    return Halves(attention_s, ffn_s, hop_s, microbatches, layers)


def test_one_micro_batch_hides_nothing() -> None:
    one = halves(6.0, 4.0, 0.1, 1)
    assert isclose(one.seconds, 6 + 4 + 2 * 10 * 0.1)
    assert isclose(one.hidden_share, 0.0, abs_tol=1e-12)


def test_many_rounds_hide_nearly_all_of_the_shorter_half() -> None:
    two = halves(6.0, 4.0, 0.0, 2, layers=100)
    # The longer half, and the shorter one of a single round.
    assert isclose(two.seconds, 6 + 4 / 200)
    assert isclose(two.hidden_share, 1 - 1 / 200)


@pytest.mark.parametrize("hop_s", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_share_is_a_share(hop_s: float, count: int) -> None:
    assert 0.0 <= halves(3.0, 5.0, hop_s, count).hidden_share <= 1.0


def test_nothing_to_hide_is_not_hidden() -> None:
    assert halves(3.0, 0.0, 0.0, 2).hidden_share == 0.0


def seconds(weights_s: float, rows_s: float, hop_s: float, rows: int, count: int) -> float:
    """Return a pass over 1000 layers in which each half reads its weights for every micro-batch."""
    half_s = 1000 * (count * weights_s + rows * rows_s)
    return ping_pong_seconds(half_s, half_s, hop_s / count, count, 1000)


def test_a_pass_is_split_where_rows_count_and_not_where_weights_do() -> None:
    assert choose_microbatches(lambda count: seconds(0.0, 1.0, 0.0, 64, count), 4) == 2
    assert choose_microbatches(lambda count: seconds(10.0, 0.0, 0.0, 64, count), 4) == 1


def test_long_hops_want_more_micro_batches_in_flight() -> None:
    assert choose_microbatches(lambda count: seconds(0.0, 1.0, 20.0, 64, count), 4) == 4


def test_ping_pong_is_megascales_formula_where_micro_batches_suffice() -> None:
    # One micro-batch in one layer: 3 s, 2 s and no hop; 4 of them in 5 layers.
    assert isclose(ping_pong_seconds(60.0, 40.0, 0.0, 4, 5), (3 + 2) + 3 * (4 * 5 - 1))
    # Serial: everything, and both hops in each layer.
    assert isclose(ping_pong_seconds(60.0, 40.0, 1.0, 1, 5), 100 + 10)


@pytest.mark.parametrize("hop", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("microbatches", [2, 3, 8])
def test_splitting_the_same_work_into_ping_pong_never_takes_longer(hop: float, microbatches: int) -> None:
    # A hop's bytes are split too.
    serial = ping_pong_seconds(60.0, 40.0, hop, 1, 5)
    assert ping_pong_seconds(60.0, 40.0, hop / microbatches, microbatches, 5) <= serial
