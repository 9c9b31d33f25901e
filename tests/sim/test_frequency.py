"""Least often used first: a prefix that many prompts found outlives one that was used later by fewer."""

from collections.abc import Iterable, Sequence

from orchestrator.core.kvpool import BlockPool
from orchestrator.core.types import BlockHash
from orchestrator.sim.frequency import FrequencyPool
from tests.builders import prompt_hashes


def use(pool: BlockPool, prompt: str) -> None:
    """Let a sequence compute what is missing of a prompt and end."""
    names = prompt_hashes(prompt)
    matched = pool.match(names, len(names))
    claim, _ = pool.acquire(names, matched)
    pool.register(claim, pool.allocate(len(names) - matched), names[matched:])
    pool.release(claim)


def cached(pool: BlockPool, prompts: Iterable[str]) -> list[str]:
    def here(names: Sequence[BlockHash]) -> bool:
        return pool.match(names, len(names)) == len(names)

    return [prompt for prompt in prompts if here(prompt_hashes(prompt))]


def test_what_was_used_least_often_goes_first_and_of_those_the_longest_unused() -> None:
    pool = FrequencyPool(8)
    for prompt in ("aa", "aa", "aa", "bb", "cc", "cc", "dd"):
        use(pool, prompt)
    use(pool, "e")  # bb and dd were never found again, bb longer ago; its end goes
    assert cached(pool, ("aa", "b", "bb", "cc", "dd", "e")) == ["aa", "b", "cc", "dd", "e"]
    for prompt in ("ff", "ggg"):  # the others that were never found; aa and cc were
        use(pool, prompt)
    assert cached(pool, ("aa", "b", "cc", "dd", "ggg")) == ["aa", "cc", "ggg"]
    pool.validate([], [])


def test_both_parts_of_a_run_that_is_cut_were_used_as_often() -> None:
    pool = FrequencyPool(6)
    for prompt in ("aaa", "aaa", "abb"):
        use(pool, prompt)
    use(pool, "e")
    use(pool, "f")  # the end of what nobody found
    assert cached(pool, ("aaa", "abb", "ab")) == ["aaa", "ab"]
    pool.validate([], [])
