"""A beat on a clock that is told the time: steps begin on it, late ones too if they can still be done, and misses are counted."""

import pytest

from workers.engines.base import BeatCounts
from workers.engines.beat.schedule import Beat

#: A beat of 10 ms, steps of 6 at most: one may begin 4 ms late.
BEAT_S, WORK_S = 0.010, 0.006


class FakeClock:
    """Time passes by sleeping, and a little by looking."""

    def __init__(self) -> None:
        self.time = 100.0
        self.slept: list[float] = []
        self.looks = 0
        #: A sleeper is woken so much later than it asked for.
        self.wakes_late_s = 0.0

    def now(self) -> float:
        self.looks += 1
        self.time += 1e-9
        return self.time

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds + self.wakes_late_s

    def at(self) -> float:
        """Return the milliseconds since the beginning."""
        return round((self.time - 100.0) * 1000, 3)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def beat(clock: FakeClock) -> Beat:
    return Beat(BEAT_S, WORK_S, 0.0002, clock)


def step(beat: Beat, clock: FakeClock, seconds: float = 0.005, goes_on: bool = True) -> float:
    """Run a step and return when it began, in milliseconds."""
    beat.wait(goes_on)
    began = clock.at()
    clock.time += seconds
    beat.done()
    return began


def test_nodes_of_one_machine_have_their_beats_together(clock: FakeClock) -> None:
    first = Beat(BEAT_S, WORK_S, 0.0002, clock)
    assert step(first, clock) == 0
    clock.time = 100.0 + 0.0375
    second = Beat(BEAT_S, WORK_S, 0.0002, clock)
    # It would be done too late for the beat that is under way.
    assert step(second, clock, goes_on=False) == 40
    assert [step(one, clock, goes_on=False) for one in (first, second)] == [50, 60]


def test_steps_begin_on_the_beat_however_long_they_take(beat: Beat, clock: FakeClock) -> None:
    assert [step(beat, clock, seconds) for seconds in (0.001, 0.006, 0.003, 0.005)] == [0, 10, 20, 30]
    assert (beat.counts.beats, beat.counts.missed) == (4, 0)


def test_what_is_late_moves_nothing_that_comes_after(beat: Beat, clock: FakeClock) -> None:
    step(beat, clock)
    clock.time = 100.0 + 0.013
    assert step(beat, clock) == pytest.approx(13, abs=0.01)  # it is done by 20
    assert beat.counts.late_s == pytest.approx(0.003, abs=1e-5)
    assert step(beat, clock) == 20
    assert beat.counts == BeatCounts(3, 0, pytest.approx(0.0, abs=1e-6))


def test_a_step_that_comes_too_late_waits_for_the_next_beat_and_one_is_missed(beat: Beat, clock: FakeClock) -> None:
    step(beat, clock)
    clock.time = 100.0 + 0.015  # it would be done at 21
    assert step(beat, clock) == 20
    clock.time = 100.0 + 0.067  # 30, 40, 50 and 60 are over
    assert step(beat, clock) == 70
    assert (beat.counts.beats, beat.counts.missed) == (3, 5)


def test_a_step_that_takes_longer_than_the_beat_misses_it(beat: Beat, clock: FakeClock) -> None:
    step(beat, clock, 0.012)
    assert beat.counts.missed == 1
    # The next one begins at once, and the one after on its beat.
    assert step(beat, clock) == pytest.approx(12, abs=0.01)
    assert step(beat, clock) == 20
    assert beat.counts.missed == 1


def test_beats_that_nobody_waits_on_just_pass(beat: Beat, clock: FakeClock) -> None:
    step(beat, clock)
    clock.time = 100.0 + 12345.678
    began = step(beat, clock, goes_on=False)
    assert began == 12345_680
    assert beat.counts == BeatCounts(2, 0, 0.0)


def test_the_clock_is_looked_at_only_just_before_the_beat(beat: Beat, clock: FakeClock) -> None:
    clock.wakes_late_s = 0.00015
    step(beat, clock)
    assert step(beat, clock) == 10
    [slept] = clock.slept
    assert slept == pytest.approx(0.0048, abs=1e-5)
    # 0.05 ms at a nanosecond a look.
    assert clock.looks < 60_000


def test_a_sleeper_that_is_woken_too_late_is_seen(beat: Beat, clock: FakeClock) -> None:
    step(beat, clock)
    clock.wakes_late_s = 0.0012
    step(beat, clock)
    assert beat.counts.late_s == pytest.approx(0.001, abs=1e-5)
    assert beat.counts.missed == 0


def test_a_beat_shorter_than_its_work_is_refused(clock: FakeClock) -> None:
    with pytest.raises(AssertionError, match=r"a step of 0\.02 s does not fit into a beat of 0\.01 s"):
        Beat(0.01, 0.02, 0.0, clock)
