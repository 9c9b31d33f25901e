"""The block pool: references, prefix matching, suffix-first eviction, what gateways are told, and that its checker notices."""

import pytest

from orchestrator.core.kvpool import BlockPool, KvJournal, merged_runs
from orchestrator.core.types import BlockHash, BlockId, KvBatch, StoredRun
from tests.builders import prompt_hashes

A, B, C = prompt_hashes("abc")


def computed(pool: BlockPool, prompt: str) -> list[BlockId]:
    """Take blocks for a prompt and register them all, as a request that computed it does."""
    blocks = pool.allocate(len(prompt))
    hashes = prompt_hashes(prompt)
    for index, block in enumerate(blocks):
        assert pool.register([block], [hashes[index]], hashes[index - 1] if index else None) == {}
    return blocks


def test_blocks_are_handed_out_in_order_and_come_back_free_without_content() -> None:
    pool = BlockPool(4)
    assert pool.allocate(3) == [0, 1, 2]
    pool.release([BlockId(2), BlockId(1)])
    assert (pool.free_blocks, pool.idle_blocks, pool.available_blocks) == (3, 0, 3)
    pool.validate([BlockId(0)])


def test_completed_blocks_stay_reusable_and_match_as_a_prefix() -> None:
    pool = BlockPool(4)
    pool.release(reversed(computed(pool, "abc")))
    assert pool.idle_blocks == 3
    assert pool.match(prompt_hashes("abcd"), 9) == 3
    assert pool.match(prompt_hashes("abx"), 9) == 2
    assert pool.match(prompt_hashes("abc"), 1) == 1  # no more than asked for
    assert pool.match(prompt_hashes("xbc"), 9) == 0
    assert pool.acquire(prompt_hashes("abc"), 2) == [0, 1]
    assert pool.idle_of(prompt_hashes("abc"), 3) == 1  # c alone idles
    pool.validate([BlockId(0), BlockId(1)])


def test_eviction_takes_the_suffix_of_what_idled_longest() -> None:
    pool = BlockPool(5)
    old, new = computed(pool, "abc"), computed(pool, "xy")
    pool.release(reversed(old))
    pool.release(reversed(new))
    assert pool.allocate(2) == [old[2], old[1]]  # c, then b; a is still there
    assert pool.match((A, B, C), 3) == 1
    assert pool.match(prompt_hashes("xy"), 2) == 2
    pool.validate([old[2], old[1]])


def test_a_duplicate_references_its_cached_twin_so_that_the_prefix_outlives_the_suffix() -> None:
    pool = BlockPool(4)
    first = computed(pool, "a")
    own = pool.allocate(2)
    # Computed twice: the twin is referenced, the block stays unnamed.
    assert pool.register(own[:2], [A, B], None) == {0: first[0]}
    pool.release(first)
    pool.validate([own[0], first[0], own[1]])
    pool.release([own[1], own[0], first[0]])
    assert (pool.free_blocks, pool.idle_blocks) == (2, 2)
    pool.validate([])


def test_without_prefix_caching_nothing_is_kept_or_told() -> None:
    pool = BlockPool(2, caching=False)
    pool.release(reversed(computed(pool, "ab")))
    assert (pool.free_blocks, pool.idle_blocks, pool.match((A, B), 2)) == (2, 0, 0)
    assert pool.take_changes() is None


def test_changes_are_told_once_as_runs_and_what_came_and_went_unseen_is_not_told() -> None:
    pool = BlockPool(3)
    pool.release(reversed(computed(pool, "abc")))
    assert pool.take_changes() == ((StoredRun(None, (A, B, C)),), ())
    assert pool.take_changes() is None
    pool.release(pool.allocate(2))
    assert pool.take_changes() == ((), (C, B))
    pool.release(computed(pool, "x"))
    pool.release(pool.allocate(3))
    assert pool.take_changes() == ((), (A,))  # x was stored and evicted in between


def test_runs_are_merged_across_interleaved_requests_parents_first() -> None:
    x = BlockHash(b"x")
    interleaved = {A: None, x: None, B: A, BlockHash(b"xy"): x, C: B, BlockHash(b"abd"): B}
    assert merged_runs(interleaved) == (
        StoredRun(None, (A, B, C)),
        StoredRun(None, (x, BlockHash(b"xy"))),
        StoredRun(B, (BlockHash(b"abd"),)),
    )


def test_the_journal_replays_what_it_still_has_and_else_tells_everything() -> None:
    pool = BlockPool(8)
    journal = KvJournal(pool, batches_max=2)
    assert journal.record() is None
    batches: list[KvBatch | None] = []
    for prompt in ("ab", "x", "y"):
        computed(pool, prompt)
        batches.append(journal.record())
    everything = (KvBatch(3, (StoredRun(None, (A, B)), *(StoredRun(None, (BlockHash(h),)) for h in (b"x", b"y"))), cleared=True),)
    assert [batch and batch.sequence for batch in batches] == [1, 2, 3]
    assert journal.since(1) == tuple(batches[1:])
    assert journal.since(2) == tuple(batches[2:])
    assert journal.since(0) == everything  # number 1 is gone
    assert journal.since(None) == everything
    assert journal.since(3) == everything  # nothing was missed: whoever asks is answered all the same
    assert journal.since(9) == everything  # a number of another life of this node


def corrupt_count(pool: BlockPool) -> None:
    pool._references[0] += 1


def lose_a_block(pool: BlockPool) -> None:
    pool._free.pop()


def forget_a_parent(pool: BlockPool) -> None:
    pool._hash_of[pool._block_of.pop(A)] = None


def evict_the_parent_first(pool: BlockPool) -> None:
    pool._idle.move_to_end(BlockId(0), last=False)


@pytest.mark.parametrize(
    ("corrupt", "complaint"),
    [
        (corrupt_count, "block 0 has 1 references, its holders are 0"),
        (lose_a_block, "free 1 \\+ idle 2 \\+ used 0 != total 4"),
        (forget_a_parent, "block 1 is cached, its parent 0 is not"),
        (evict_the_parent_first, "block 1 would be evicted after its parent 0"),
    ],
)
def test_canary_the_checker_notices_a_corrupted_pool(corrupt, complaint: str) -> None:
    pool = BlockPool(4)
    pool.release(reversed(computed(pool, "ab")))
    pool.validate([])
    corrupt(pool)
    with pytest.raises(AssertionError, match=complaint):
        pool.validate([])
