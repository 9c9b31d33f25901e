"""How long what is forgotten for want of room had not been used."""

import pytest

from orchestrator.core.idling import NOTED_MAX, Idling
from orchestrator.core.kvpool import BlockPool
from tests.builders import prompt_hashes


def fill(pool: BlockPool, prompt: str) -> None:
    """Use blocks for a prompt, and give them up."""
    claim = pool.claim(None)
    assert claim is not None
    names = prompt_hashes(prompt)
    pool.register(claim, pool.allocate(len(names)), list(names))
    pool.release(claim)


def test_a_pool_tells_how_long_the_blocks_had_idled_that_made_room() -> None:
    pool = BlockPool(6)
    for now, prompt in ((10.0, "abc"), (20.0, "def")):
        pool.now = now
        fill(pool, prompt)
    assert (pool.idling.blocks, pool.idling.idle_s) == (0, 0.0)
    pool.now = 50.0
    fill(pool, "gh")
    assert pool.idling.blocks == 2
    assert pool.idling.idle_s == 40.0  # those of abc, from when it was given up
    pool.now = 51.0
    fill(pool, "ijk")
    assert pool.idling.blocks == 5
    assert 31.0 < pool.idling.idle_s < 41.0  # one more of abc, two of def: newer ones weigh a little


def test_what_was_dead_says_nothing_of_how_long_others_last() -> None:
    pool = BlockPool(3)
    pool.now = 10.0
    fill(pool, "abc")
    pool.retire(prompt_hashes("abc")[-1], ())
    pool.now = 90.0
    fill(pool, "d")
    assert (pool.idling.blocks, pool.idling.idle_s) == (1, 0.0)


def test_notes_are_bounded_and_old_ones_become_coarser() -> None:
    count = 4 * NOTED_MAX
    for ago in (10, 1_000, count // 2):
        idling = Idling()
        for number in range(1, count):
            idling.note(number, float(number))
            assert len(idling._numbers) <= NOTED_MAX  # the bound is not to be seen otherwise
        idling.forgotten(1, count - ago, float(count))
        assert idling.idle_s == pytest.approx(ago, rel=0.02)
