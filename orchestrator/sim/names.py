"""Names the blocks that a turn's answer fills, so that the turn after it can find them in a cache.

A trace lists the blocks of prompts only. An answer's tokens become part of the session's next prompt, so the blocks that they
fill are the ones the next prompt lists at those positions:

    turn        |== prompt's full blocks ==|~ rest ~|-- answer --|
    successor   |== the same ==============|== named by it ==|~~ new ~~ ...
                                           ^ generated runs ^
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from orchestrator.traces import TracedTurn

Runs = tuple[tuple[int, int], ...]

#: Names set aside for each turn's answer when no later turn lists it: more blocks than any answer fills.
PRIVATE_NAMES = 1 << 24


def successors(turns: Iterable[TracedTurn]) -> Mapping[int, TracedTurn]:
    """Return, by a turn's id, the turn that continues it; turns that nothing continues are absent.

    That is the next turn in the trace of the same session and agent, if its prompt is this turn's prompt and answer, perhaps
    with more after them.
    """
    latest: dict[tuple[str, str], TracedTurn] = {}
    found: dict[int, TracedTurn] = {}
    for turn in turns:
        previous = latest.get((turn.session, turn.agent))
        if previous is not None and _continues(turn, previous):
            found[previous.id] = turn
        latest[turn.session, turn.agent] = turn
    return found


def _continues(turn: TracedTurn, previous: TracedTurn) -> bool:
    if not previous.block_runs or turn.block_tokens != previous.block_tokens:
        return False
    if turn.input_tokens < previous.input_tokens + previous.output_tokens:
        return False
    return starts_with(turn.block_runs, previous.block_runs)


def starts_with(runs: Sequence[tuple[int, int]], start: Sequence[tuple[int, int]]) -> bool:
    """Tell whether the blocks that `start` names are the first ones that `runs` names. Adjacent runs must be merged in both."""
    if not start:
        return True
    last = len(start) - 1
    if len(runs) <= last or tuple(runs[:last]) != tuple(start[:last]):
        return False
    return runs[last][0] == start[last][0] and runs[last][1] >= start[last][1]


def generated_runs(turn: TracedTurn, successor: TracedTurn | None) -> Runs:
    """Return the names of the full blocks that a turn's answer completes, in order, as (first name, count) runs.

    The last token of an answer has no KV. Without a successor the names are the turn's own: negative, listed by no other turn.
    """
    if not turn.block_tokens:
        return ()
    first = turn.input_tokens // turn.block_tokens
    end = max(turn.input_tokens + turn.output_tokens - 1, 0) // turn.block_tokens
    if end <= first:
        return ()
    if successor is None:
        return ((-(turn.id + 1) * PRIVATE_NAMES, end - first),)
    return tuple(between(successor.block_runs, first, end))


def between(runs: Iterable[tuple[int, int]], first: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield what `runs` names at the positions [first, end)."""
    position = 0
    for name, count in runs:
        start, stop = max(first, position), min(end, position + count)
        if start < stop:
            yield name + start - position, stop - start
        position += count
        if position >= end:
            return
