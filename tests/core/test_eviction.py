"""What a pool forgets first that knows what is expected of contexts, and that its books hold whatever happens."""

import random

from orchestrator.core.eviction import OUTLOOKS_MAX, ValuePool
from orchestrator.core.kvpool import BlockPool, Claim
from orchestrator.core.outlook import ContextId, Outlook
from orchestrator.core.types import BlockId, RequestId
from tests.builders import prompt_hashes


def soon(context: int, seconds: float = 10.0) -> Outlook:
    """Return the outlook of a context that comes back in so many seconds, nearly always."""
    return Outlook(ContextId(context), (seconds, 2 * seconds), (0.9, 0.95))


def use(pool: BlockPool, prompt: str, outlook: Outlook | None = None) -> None:
    """Let a turn compute what is missing of its prompt and end."""
    names = prompt_hashes(prompt)
    matched = pool.match(names, len(names))
    claim, _ = pool.acquire(names, matched)
    pool.register(claim, pool.allocate(len(names) - matched), names[matched:])
    if outlook is not None:
        pool.leave(claim, outlook)
    pool.release(claim)


def cached(pool: BlockPool, prompt: str) -> int:
    names = prompt_hashes(prompt)
    return pool.match(names, len(names))


def test_what_nobody_expects_goes_before_what_was_used_longer_ago() -> None:
    pool = ValuePool(6)
    use(pool, "aaa", soon(1))
    use(pool, "bbb")
    use(pool, "cc")
    assert (cached(pool, "aaa"), cached(pool, "bbb"), cached(pool, "cc")) == (3, 1, 2)
    pool.validate([], [])


def test_what_is_expected_sooner_stays_and_a_later_word_counts_more() -> None:
    pool = ValuePool(4)
    use(pool, "aa", soon(1, 5.0))
    use(pool, "bb", soon(2, 50.0))
    pool.expect(soon(1, 500.0))
    use(pool, "c")
    assert (cached(pool, "aa"), cached(pool, "bb")) == (1, 2)
    pool.expect(Outlook(ContextId(2)))  # it has ended
    use(pool, "d")
    assert (cached(pool, "aa"), cached(pool, "bb")) == (1, 1)
    pool.validate([], [])


def test_what_is_overdue_is_expected_less_with_time_alone() -> None:
    pool = ValuePool(4)
    use(pool, "aa", soon(1, 5.0))
    use(pool, "bb", soon(2, 50.0))
    pool.now = 11.0  # the first should have come by now
    use(pool, "c")
    assert (cached(pool, "aa"), cached(pool, "bb")) == (1, 2)


def test_a_prompt_that_waits_keeps_what_it_will_find_and_the_first_that_came_keeps_it_longest() -> None:
    pool = ValuePool(6)
    for prompt, request in (("aa", 1), ("bb", 2)):
        use(pool, prompt)
        pool.await_chain(RequestId(request), prompt_hashes(prompt), 2)
        pool.now += 2.0
    use(pool, "cc", soon(3))
    use(pool, "dd")
    assert (cached(pool, "aa"), cached(pool, "bb"), cached(pool, "cc")) == (2, 2, 0)
    pool.stop_awaiting(RequestId(1))
    use(pool, "ee")
    use(pool, "fff")
    assert (cached(pool, "aa"), cached(pool, "bb")) == (0, 2)
    pool.validate([], [])


def test_a_shared_beginning_is_worth_what_all_are_that_would_come_back_to_it() -> None:
    pool = ValuePool(8)
    for context, prompt in ((1, "sab"), (2, "scd")):
        use(pool, prompt, soon(context, 20.0))
    use(pool, "eee", soon(3, 15.0))
    use(pool, "ffff")  # nobody expects it: the ends of 1 and 2 go, 4 blocks
    assert cached(pool, "s") == 1
    use(pool, "ggg", soon(4, 1.0))
    assert (cached(pool, "s"), cached(pool, "eee")) == (1, 3)
    use(pool, "hh", soon(5, 1.0))
    assert (cached(pool, "s"), cached(pool, "eee")) == (1, 2)  # two would come back in 20 s: more than one in 15
    pool.validate([], [])


def test_without_any_outlook_it_is_least_recently_used() -> None:
    chance = random.Random(4)
    plain, valued = BlockPool(24), ValuePool(24)
    for _ in range(400):
        prompt = "".join(chance.choice("ab") for _ in range(chance.randrange(1, 12)))
        valued.now += chance.random()
        use(plain, prompt)
        use(valued, prompt)
        assert sorted(plain.snapshot(), key=repr) == sorted(valued.snapshot(), key=repr)


def test_the_books_hold_whatever_is_expected_forgotten_and_waited_for() -> None:
    chance = random.Random(7)
    pool = ValuePool(40)
    held: list[tuple[Claim, list[BlockId]]] = []
    for step in range(1500):
        pool.now += chance.random()
        prompt = "".join(chance.choice("ab") for _ in range(chance.randrange(1, 10)))
        names = prompt_hashes(prompt)
        matched = pool.match(names, len(names))
        match chance.randrange(5):
            case 0:
                pool.expect(soon(chance.randrange(60), chance.uniform(0.1, 30.0)))
            case 1:
                pool.await_chain(RequestId(step), names, matched)
                if chance.random() < 0.9:
                    pool.stop_awaiting(RequestId(step))
            case 2 if held:
                claim, private = held.pop(chance.randrange(len(held)))
                pool.give_back(private)
                pool.leave(claim, soon(chance.randrange(60)) if chance.random() < 0.8 else Outlook(ContextId(3)))
                pool.release(claim)
            case _ if len(names) - matched + pool.idle_of(names, matched) <= pool.available_blocks and len(held) < 4:
                claim, _ = pool.acquire(names, matched)
                blocks = pool.allocate(len(names) - matched)
                copies = pool.register(claim, blocks, names[matched:])
                held.append((claim, blocks[:copies]))
            case _:
                pass
        pool.validate([claim for claim, _ in held], [block for _, private in held for block in private])
    assert OUTLOOKS_MAX < 60  # the bound was met
