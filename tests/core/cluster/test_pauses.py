"""How long contexts pause is learned as they do, those included that have not come back."""

import random

import pytest

from orchestrator.core.cluster.pauses import COUNTED_MAX, EDGES_S, HAZARD, Ages, Hazards, range_of

PRIOR = [HAZARD] * len(EDGES_S)


def learn(pauses: list[float | None], until_s: float = 1e6) -> Hazards:
    """Return what is learned of pauses that all begin at once; None never ends."""
    hazards, ages, back = Hazards(), Ages[int](), set[int]()

    def reach(one: int, _: float, place: int) -> bool:
        if one in back:
            return False
        hazards.reach(place - 1)
        return True

    for one in range(len(pauses)):
        ages.pause(0.0, one)
    for pause_s, one in sorted((pause_s, one) for one, pause_s in enumerate(pauses) if pause_s is not None):
        ages.pass_time(pause_s, reach)
        place = range_of(pause_s)
        assert place is not None
        back.add(one)
        hazards.reach(place)
        hazards.come_back(place)
    ages.pass_time(until_s, reach)
    return hazards


def test_the_hazard_of_a_range_is_the_share_of_those_who_reached_it() -> None:
    hazards = learn([0.1] * 10 + [0.3] * 30 + [5.0] * 40 + [None] * 20)
    learned = hazards.over(PRIOR, 0.001)
    assert learned[0] == pytest.approx(0.1, abs=0.01)
    assert learned[1] == pytest.approx(30 / 90, abs=0.01)
    assert learned[2] == pytest.approx(0.0, abs=0.01)
    assert learned[5] == pytest.approx(40 / 60, abs=0.01)
    assert learned[10] == pytest.approx(0.0, abs=0.01)


def test_those_under_way_say_nothing_of_a_range_that_they_are_still_in() -> None:
    assert learn([None] * 50, until_s=3.0).reached[range_of(3.0) or 0] == 0.0


def test_little_is_believed_of_few() -> None:
    assert learn([0.1]).over(PRIOR, 8.0)[0] == pytest.approx((1 + 8 * HAZARD) / 9)
    assert Hazards().over(PRIOR, 8.0) == pytest.approx(PRIOR)


def test_what_never_came_back_young_is_not_taken_to_come_back_old() -> None:
    hazards = Hazards()
    for _ in range(1000):
        hazards.reach(0)
        hazards.reach(1)
    assert hazards.over(PRIOR, 8.0)[-1] == HAZARD  # nothing is known of that age itself
    for wider in (PRIOR, [0.1 + place / 100 for place in range(len(EDGES_S))]):
        assert Hazards().return_chance(wider, 8.0) > 0.9
        assert hazards.return_chance(wider, 8.0) < 0.1
    for _ in range(900):
        hazards.come_back(1)
    assert hazards.return_chance(PRIOR, 8.0) > 0.9


def test_what_was_long_ago_counts_less_and_counts_stay_small() -> None:
    hazards = Hazards()
    for number in range(4 * int(COUNTED_MAX)):
        hazards.reach(0)
        if number > 2 * COUNTED_MAX:
            hazards.come_back(0)
    assert max(hazards.reached) <= COUNTED_MAX + 1
    assert hazards.over(PRIOR, 1.0)[0] > 0.7  # half of all, and nearly all of the newer ones


def test_a_pause_that_counts_no_more_leaves_nothing() -> None:
    hazards = Hazards()
    hazards.reach(0)
    hazards.reach(1)
    hazards.forget(1)
    assert sum(hazards.reached) == 0.0


def test_each_gets_into_each_range_once_and_in_time() -> None:
    chance = random.Random(1)
    ages = Ages[int]()
    reached: dict[int, list[int]] = {}
    now, began = 0.0, dict[int, float]()

    def reach(one: int, since_s: float, place: int) -> bool:
        assert since_s == began[one]
        assert now - since_s >= EDGES_S[place - 1]
        reached.setdefault(one, []).append(place)
        return True

    for one in range(200):
        now += chance.choice((0.01, 1.0, 40.0))
        ages.pass_time(now, reach)
        began[one] = now
        ages.pause(now, one)
    now += 1e6
    ages.pass_time(now, reach)
    assert sorted(reached) == list(range(200))
    assert {tuple(places) for places in reached.values()} == {tuple(range(1, len(EDGES_S)))}
