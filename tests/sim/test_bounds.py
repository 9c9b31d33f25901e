"""Tests of the bounds on hit rates, against every policy there could be on tiny traces, and against a plain cache."""

import random
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

import pytest

from orchestrator.sim.bounds import infinite_cache, offline_optimum, working_set_tokens
from orchestrator.sim.names import generated_runs, successors
from orchestrator.traces import TracedTurn, read_trace
from orchestrator.traces.turns import merged

MIX = Path(__file__).parents[2] / "bench" / "data" / "agent_mix.jsonl.gz"
BLOCK = 4


def random_trace(chance: random.Random, turns: int, agents: int, grow: int) -> list[TracedTurn]:
    """Return turns of agents that go on, or go back to an earlier point of anybody's context, sharing prefixes."""
    contexts: list[list[int]] = [[] for _ in range(agents)]
    fresh, made = 0, list[TracedTurn]()
    for number in range(turns):
        agent = chance.randrange(agents)
        if chance.random() < 0.3:
            other = chance.choice(contexts)
            contexts[agent] = other[: chance.randint(0, len(other))]
        new = chance.randint(0, grow)
        contexts[agent] = contexts[agent] + list(range(fresh, fresh + new))
        fresh += new + 1
        blocks = contexts[agent]
        tokens = max(1, len(blocks) * BLOCK + chance.randint(0, BLOCK - 1))
        output = chance.randint(0, 2 * BLOCK)
        runs = merged((block, 1) for block in blocks)
        made.append(TracedTurn(number, "s", str(agent), float(number), (), 0.0, tokens, output, BLOCK, runs))
    return made


def uses(turns: Sequence[TracedTurn]) -> list[tuple[list[int], list[int]]]:
    """Return each turn's blocks that it may find, and those that it leaves behind."""
    after = successors(turns)
    found: list[tuple[list[int], list[int]]] = []
    for turn in turns:
        answer = [name for first, count in generated_runs(turn, after.get(turn.id)) for name in range(first, first + count)]
        found.append((turn.blocks[: (turn.input_tokens - 1) // BLOCK], turn.blocks + answer))
    return found


def hits(wanted: Sequence[int], cached: Iterable[int]) -> int:
    here = set(cached)
    return next((place for place, block in enumerate(wanted) if block not in here), len(wanted))


def best_of_all(turns: Sequence[TracedTurn], capacity: int) -> int:
    """Return the most hits that any choice of what to keep after each turn can have."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for wanted, left in uses(turns):
        after: dict[frozenset[int], int] = {}
        for cached, total in best.items():
            now = total + hits(wanted, cached)
            there = sorted(cached | set(left))
            for kept in combinations(there, min(capacity, len(there))):
                state = frozenset(kept)
                after[state] = max(now, after.get(state, 0))
        best = after
    return max(best.values())


def least_recently_used(turns: Sequence[TracedTurn], capacity: int) -> int:
    """Return the hits of a cache that drops what was used longest ago, ends of chains first."""
    order: dict[int, None] = {}
    total = 0
    for wanted, left in uses(turns):
        total += hits(wanted, order)
        for block in reversed(left):
            order.pop(block, None)
            order[block] = None
        while len(order) > capacity:
            del order[next(iter(order))]
    return total


@pytest.mark.parametrize("seed", range(30))
def test_the_optimum_is_the_best_of_all_policies(seed: int) -> None:
    chance = random.Random(seed)
    turns = random_trace(chance, turns=8, agents=2, grow=2)
    for capacity in (1, 2, 3):
        assert offline_optimum(turns, capacity * BLOCK).cached_tokens == best_of_all(turns, capacity) * BLOCK


@pytest.mark.parametrize("seed", range(20))
def test_the_optimum_is_never_below_a_cache_that_forgets_the_oldest(seed: int) -> None:
    turns = random_trace(random.Random(seed), turns=60, agents=5, grow=6)
    endless = infinite_cache(turns)
    for capacity in (3, 10, 40, 100):
        optimum = offline_optimum(turns, capacity * BLOCK)
        assert least_recently_used(turns, capacity) * BLOCK <= optimum.cached_tokens <= endless.cached_tokens


@pytest.mark.parametrize("seed", range(20))
def test_an_endless_cache_finds_all_that_was_there_before(seed: int) -> None:
    turns = random_trace(random.Random(seed), turns=60, agents=5, grow=6)
    endless = infinite_cache(turns)
    assert endless.cached_tokens == least_recently_used(turns, 10**9) * BLOCK
    assert endless == offline_optimum(turns, 10**9)
    assert endless.hit_rate == endless.cached_tokens / sum(turn.input_tokens for turn in turns)


def test_canary_a_policy_that_is_not_the_best_is_told_apart() -> None:
    """The exhaustive search would notice an optimum that is not one."""
    turns = random_trace(random.Random(3), turns=8, agents=2, grow=2)
    gains = [best_of_all(turns, capacity) - least_recently_used(turns, capacity) for capacity in (1, 2, 3)]
    assert max(gains) > 0
    assert min(gains) >= 0


def test_more_room_never_hurts_on_real_sessions() -> None:
    turns = list(read_trace(MIX))

    found = [offline_optimum(turns, tokens).cached_tokens for tokens in (0, 100_000, 300_000, 1_000_000, 10**9)]
    assert found == sorted(found)
    assert found[0] == 0
    assert found[-1] == infinite_cache(turns).cached_tokens


def test_turns_without_blocks_share_nothing() -> None:
    turns = [TracedTurn(number, "s", "main", 0.0, (), 0.0, 100, 10, 0, ()) for number in range(2)]
    assert infinite_cache(turns) == offline_optimum(turns, 1000)
    assert infinite_cache(turns).cached_tokens == 0


@pytest.mark.parametrize("seed", range(30))
def test_the_working_set_is_the_most_that_was_used_and_is_wanted_again(seed: int) -> None:
    turns = random_trace(random.Random(seed), turns=12, agents=3, grow=4)
    both = uses(turns)
    most = 0
    for now in range(len(turns)):
        behind = {name for _, left in both[: now + 1] for name in left}
        wanted = {name for found, _ in both[now + 1 :] for name in found}
        most = max(most, len(behind & wanted))
    assert working_set_tokens(turns) == most * BLOCK
    assert offline_optimum(turns, most * BLOCK) == infinite_cache(turns)
