"""Tests of made-up agent sessions: well formed, the same for the same seed, and shaped like recorded ones."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

import pytest

from orchestrator.sim.bounds import infinite_cache
from orchestrator.sim.names import successors
from orchestrator.sim.synthetic import SyntheticOptions, parse_synthetic, synthetic_trace
from orchestrator.traces import TracedTurn, TraceError, is_per_session_clock, read_trace
from orchestrator.traces.turns import repeated

MIX = Path(__file__).parents[2] / "bench" / "data" / "agent_mix.jsonl.gz"


def test_turns_are_well_formed() -> None:
    turns = parse_synthetic("synthetic:sessions=40,seed=2")
    seen: dict[int, TracedTurn] = {}
    for turn in turns:
        assert sum(count for _, count in turn.block_runs) == turn.input_tokens // turn.block_tokens
        assert repeated(turn.block_runs) is None
        assert turn.output_tokens > 0
        assert {seen[other].session for other in turn.after} <= {turn.session}, "waits for earlier turns of its session"
        seen[turn.id] = turn
    assert len(seen) == len(turns)
    assert any(turn.after for turn in turns)
    assert len({turn.session for turn in turns}) == 40
    assert [turn.arrival_s for turn in turns] == sorted(turn.arrival_s for turn in turns)
    assert not is_per_session_clock(turns)


def test_a_block_follows_the_same_block_everywhere() -> None:
    before: dict[int, int] = {}
    for turn in parse_synthetic("synthetic:sessions=12,seed=5"):
        former = -1
        for block in turn.blocks:
            assert before.setdefault(block, former) == former, "a name stands for one prefix"
            former = block


def test_the_seed_decides_everything() -> None:
    assert synthetic_trace(SyntheticOptions(5, seed=1)) == parse_synthetic("synthetic:sessions=5,seed=1")
    assert parse_synthetic("sessions=5,seed=1") != parse_synthetic("sessions=5,seed=2")


def test_settings_are_kept() -> None:
    turns = parse_synthetic("synthetic:sessions=30,seed=1,start_s=0,gap_s_max=7,block_tokens=16")
    assert max(turn.gap_s for turn in turns) == 7
    assert {turn.block_tokens for turn in turns} == {16}
    assert {turn.arrival_s for turn in turns if not turn.after} == {0.0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("synthetic:", "nothing: not a setting"),
        ("synthetic:seed=1", "sessions: missing"),
        ("synthetic:sessions=0", "sessions: must be a whole number, 1 or more, is '0'"),
        ("synthetic:sessions=1000000000", "sessions: must be at most 1000000, is '1000000000'"),
        ("synthetic:sessions=many", "sessions: must be a whole number"),
        ("synthetic:sessions=2,gap_s_max=nan", "gap_s_max: must be a number"),
        ("synthetic:session=2", "session: not a setting; there are sessions, seed"),
    ],
)
def test_unusable_settings_are_named(text: str, said: str) -> None:
    with pytest.raises(TraceError) as raised:
        parse_synthetic(text)
    assert str(raised.value).startswith(said)


def shape(turns: Sequence[TracedTurn]) -> list[str]:
    """Return the names of a trace's quantities, the smallest first."""
    after = successors(turns)
    added = [after[turn.id].input_tokens - turn.input_tokens - turn.output_tokens for turn in turns if turn.id in after]
    gaps = [turn.gap_s for turn in turns if turn.after]
    contexts = [turn.input_tokens for turn in turns]
    outputs = [turn.output_tokens for turn in turns]
    endless = infinite_cache(turns)
    quantities = {
        "usual gap, s": median(gaps),
        "mean gap, s": mean(gaps),
        "usual answer": median(outputs),
        "mean answer": mean(outputs),
        "mean addition": mean(added),
        "computed a turn, nothing forgotten": (endless.input_tokens - endless.cached_tokens) / len(turns),
        "usual context": median(contexts),
        "longest context": max(contexts),
        "cached of all": endless.cached_tokens,
    }
    return sorted(quantities, key=lambda name: quantities[name])


def test_sessions_are_shaped_like_recorded_ones() -> None:
    """The mix is a part of the corpus that the distributions were measured on, with pauses of 120 s at most."""
    assert shape(parse_synthetic("synthetic:sessions=16,seed=1,gap_s_max=120")) == shape(list(read_trace(MIX)))


def test_canary_sessions_of_another_shape_are_told_apart() -> None:
    alike = [TracedTurn(number, "s", "main", number, (), 1.0, 640, 700, 64, ((0, 10),)) for number in range(2)]
    other = [TracedTurn(2, "s", "main", 9.0, (1,), 9.0, 1400, 700, 64, ((0, 21),))]
    assert shape([*alike, *other]) != shape(list(read_trace(MIX)))
