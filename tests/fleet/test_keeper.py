"""How the controller judges the silence of its processes."""

from orchestrator.fleet.keeper import PING_EVERY_S, Silence


def test_silence_adds_up_from_look_to_look_and_ends_with_an_answer() -> None:
    silence = Silence(100.0)
    assert [silence.goes_on(100.0 + second) for second in (1, 2, 3.5)] == [1.0, 2.0, 3.5]
    silence.ends(103.6)
    assert silence.goes_on(104.6) == 1.0


def test_a_controller_that_stood_still_does_not_take_all_others_for_hung() -> None:
    silence = Silence(100.0)
    # It was stopped for a minute, or its machine was: of that it knows no more than of two looks.
    assert silence.goes_on(160.0) == 2 * PING_EVERY_S
    assert silence.goes_on(161.0) == 2 * PING_EVERY_S + 1.0
