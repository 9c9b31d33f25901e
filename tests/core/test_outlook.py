"""What a context is worth by the age of its pause: curves whose best moments can be told by hand."""

import pytest

from orchestrator.core.outlook import KNOTS_MAX, ContextId, Outlook, risen

ONE = ContextId(1)


def test_a_context_that_never_comes_back_is_worth_nothing() -> None:
    assert Outlook(ONE).per_second(0.0) == 0.0
    assert Outlook(ONE).chance(5.0) == 0.0


def test_nothing_is_expected_after_the_last_age() -> None:
    outlook = Outlook(ONE, (10.0,), (0.5,))
    assert outlook.per_second(10.0) == outlook.per_second(99.0) == 0.0
    assert outlook.chance(99.0) == 0.5


def test_a_certain_return_is_worth_more_the_nearer_it_is() -> None:
    outlook = Outlook(ONE, (9.9, 10.0), (0.0, 1.0))
    assert outlook.per_second(0.0) == pytest.approx(0.1, rel=0.02)  # kept for ten seconds, for one turn
    assert outlook.per_second(8.0) == pytest.approx(0.5, rel=0.05)


def test_keeping_ends_where_it_pays_best() -> None:
    soon_or_late = Outlook(ONE, (1.0, 1000.0), (0.5, 0.6))
    alone = Outlook(ONE, (1.0,), (0.5,))
    assert soon_or_late.per_second(0.0) == pytest.approx(alone.per_second(0.0))  # what comes late is not waited for
    assert soon_or_late.per_second(2.0) < 0.01 * soon_or_late.per_second(0.0)


def test_where_every_doubling_brings_as_many_back_what_idles_longest_is_worth_least() -> None:
    outlook = Outlook(ONE, tuple(2.0**power for power in range(12)), risen([0.3] * 12))
    worth = [outlook.per_second(1.2**step) for step in range(1, 30)]
    assert worth == sorted(worth, reverse=True)
    assert len(set(worth)) == len(worth)


@pytest.mark.parametrize(
    ("ages_s", "chances"),
    [
        ((1.0,), ()),
        ((2.0, 1.0), (0.1, 0.2)),
        ((1.0, 2.0), (0.2, 0.1)),
        ((0.0,), (0.5,)),
        ((1.0,), (1.5,)),
        ((float("nan"),), (0.5,)),
        ((float("inf"),), (0.5,)),
        (tuple(range(1, KNOTS_MAX + 2)), (0.0,) * (KNOTS_MAX + 1)),
    ],
)
def test_what_is_no_curve_is_said_to_be_none(ages_s: tuple[float, ...], chances: tuple[float, ...]) -> None:
    assert Outlook.problem(ages_s, chances) is not None
    assert Outlook.problem((1.0, 2.0), (0.0, 1.0)) is None
