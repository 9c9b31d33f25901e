"""Puts sessions whose recorded clocks all start at the same moment onto one clock, as traffic that arrives bit by bit."""

import random
from collections.abc import Sequence
from dataclasses import replace

from orchestrator.traces.turns import TracedTurn


def is_per_session_clock(turns: Sequence[TracedTurn]) -> bool:
    """Tell whether every session has a clock of its own: there are several, and all start at the same moment."""
    starts: dict[str, float] = {}
    for turn in turns:
        starts.setdefault(turn.session, turn.arrival_s)
    return 1 < len(starts) < len(turns) and len(set(starts.values())) == 1


def interleaved(turns: Sequence[TracedTurn], mean_gap_s: float, seed: int) -> list[TracedTurn]:
    """Return the turns in order of arrival when sessions start one after the other, as a Poisson process.

    Args:
        mean_gap_s: mean seconds between the starts of two sessions.
    """
    chance = random.Random(seed)
    shift_s: dict[str, float] = {}
    start_s = 0.0
    for turn in turns:
        if turn.session not in shift_s:
            shift_s[turn.session] = start_s - turn.arrival_s
            start_s += chance.expovariate(1 / mean_gap_s) if mean_gap_s > 0 else 0.0
    moved = [replace(turn, arrival_s=turn.arrival_s + shift_s[turn.session]) for turn in turns]
    return sorted(moved, key=lambda turn: turn.arrival_s)
