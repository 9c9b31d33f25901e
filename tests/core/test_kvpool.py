"""The block pool: references, prefix matching, suffix-first eviction, what gateways are told, and that its checker notices."""

from random import Random

import pytest

from orchestrator.core.cluster.following import Trust
from orchestrator.core.cluster.kvindex import KvIndex
from orchestrator.core.kvpool import STALE_MAX, BlockPool, Claim, KvJournal
from orchestrator.core.types import BlockHash, BlockId, KvBatch, NodeId, StoredRun
from tests.builders import prompt_hashes

A, B, C = prompt_hashes("abc")


def computed(pool: BlockPool, prompt: str) -> tuple[Claim, list[BlockId]]:
    """Take blocks for a prompt and register them one by one, as a request that computed it does."""
    claim, _ = pool.acquire((), 0)
    blocks = pool.allocate(len(prompt))
    for block, name in zip(blocks, prompt_hashes(prompt), strict=True):
        pool.register(claim, [block], [name])
    return claim, blocks


def keep(pool: BlockPool, prompt: str) -> list[BlockId]:
    """Compute a prompt and let go of it."""
    claim, blocks = computed(pool, prompt)
    pool.release(claim)
    return blocks


def test_blocks_are_handed_out_in_order_and_come_back_free_without_content() -> None:
    pool = BlockPool(4)
    assert pool.allocate(3) == [0, 1, 2]
    pool.give_back([BlockId(2), BlockId(1)])
    assert (pool.free_blocks, pool.idle_blocks, pool.available_blocks) == (3, 0, 3)
    pool.validate([], [BlockId(0)])


def test_completed_blocks_stay_reusable_and_match_as_a_prefix() -> None:
    pool = BlockPool(4)
    keep(pool, "abc")
    assert pool.idle_blocks == 3
    assert pool.match(prompt_hashes("abcd"), 9) == 3
    assert pool.match(prompt_hashes("abx"), 9) == 2
    assert pool.match(prompt_hashes("abc"), 1) == 1  # no more than asked for
    assert pool.match(prompt_hashes("xbc"), 9) == 0
    claim, blocks = pool.acquire(prompt_hashes("abc"), 2)
    assert blocks == [0, 1]
    assert pool.idle_of(prompt_hashes("abc"), 3) == 1  # c alone idles
    pool.validate([claim], [])


def test_eviction_takes_the_suffix_of_what_idled_longest() -> None:
    pool = BlockPool(5)
    old, _ = keep(pool, "abc"), keep(pool, "xy")
    taken = pool.allocate(2)
    assert taken == [old[2], old[1]]  # c, then b; a is still there
    assert pool.match((A, B, C), 3) == 1
    assert pool.match(prompt_hashes("xy"), 2) == 2
    pool.validate([], taken)


def test_a_shared_prefix_outlives_all_that_follows_on_it() -> None:
    pool = BlockPool(6)
    keep(pool, "abc")
    claim, _ = pool.acquire(prompt_hashes("ab"), 2)
    pool.register(claim, pool.allocate(2), [BlockHash(b"abx"), BlockHash(b"abxy")])  # a branch: the run is split after b
    pool.release(claim)
    pool.allocate(1 + 1)  # the free one, then c, which idled longest
    assert [pool.match(prompt_hashes(text), 4) for text in ("abc", "abxy")] == [2, 4]
    pool.allocate(2)  # the other branch
    assert pool.match(prompt_hashes("abxy"), 4) == 2
    pool.allocate(1)
    assert pool.match(prompt_hashes("ab"), 2) == 1


def test_a_copy_stays_private_and_the_chain_goes_through_the_cached_block() -> None:
    pool = BlockPool(4)
    first, _ = computed(pool, "a")
    own, _ = pool.acquire((), 0)
    blocks = pool.allocate(2)
    assert pool.register(own, blocks, [A, B]) == 1
    pool.release(first)
    assert pool.idle_blocks == 0  # a is held through b
    pool.validate([own], blocks[:1])
    pool.give_back(blocks[:1])
    pool.release(own)
    assert (pool.free_blocks, pool.idle_blocks) == (2, 2)
    pool.validate([], [])


def test_two_who_go_on_from_one_chain_branch_where_the_first_of_them_did_not_stop() -> None:
    pool = BlockPool(8)
    keep(pool, "ab")
    one, _ = pool.acquire(prompt_hashes("ab"), 2)
    two, _ = pool.acquire(prompt_hashes("ab"), 2)
    pool.register(one, pool.allocate(1), [C])  # grows the run that both hold
    pool.register(two, pool.allocate(1), [BlockHash(b"abx")])
    pool.validate([one, two], [])
    assert [pool.match(prompt_hashes(text), 3) for text in ("abc", "abx")] == [3, 3]
    pool.release(one)
    pool.release(two)
    pool.validate([], [])


def test_what_is_lent_is_free_when_its_last_user_gives_it_back() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.lend(blocks)
    pool.give_back(blocks)
    assert pool.free_blocks == 1
    pool.validate([], blocks)
    pool.give_back(blocks)
    assert pool.free_blocks == 2


def test_a_dead_end_goes_before_what_idled_longer_and_its_prefix_stays() -> None:
    pool = BlockPool(7)
    keep(pool, "xy")
    keep(pool, "abcde")
    pool.retire(prompt_hashes("abcd")[-1], prompt_hashes("abz"))  # e was generated after d; the new prompt goes on from b
    pool.allocate(3)
    assert [pool.match(prompt_hashes(text), 5) for text in ("abcde", "xy")] == [2, 2]
    pool.allocate(1)
    assert [pool.match(prompt_hashes(text), 5) for text in ("abcde", "xy")] == [2, 1]


def test_nothing_is_dead_that_somebody_holds_or_another_chain_continues() -> None:
    pool = BlockPool(8)
    keep(pool, "xy")
    keep(pool, "abc")
    claim, _ = pool.acquire(prompt_hashes("ab"), 2)
    pool.register(claim, pool.allocate(1), [BlockHash(b"abx")])
    pool.retire(BlockHash(b"abx"), prompt_hashes("z"))  # held
    pool.retire(B, prompt_hashes("z"))  # continued by two
    pool.allocate(2 + 2)
    assert [pool.match(prompt_hashes(text), 3) for text in ("abx", "abc", "xy")] == [3, 3, 0]


def test_a_chain_is_claimed_by_its_last_block_and_gives_its_end() -> None:
    pool = BlockPool(6)
    keep(pool, "abc")
    claim = pool.claim(B)
    assert claim is not None
    assert pool.tail(claim, 1) == ([B], [1])
    pool.extend(claim, C, 3)
    assert pool.tail(claim, 2) == ([B, C], [1, 2])
    assert pool.tail(claim, 3) == ([A, B, C], [0, 1, 2])
    other, start = pool.claim(A), pool.claim(None)
    assert other is not None
    assert start is not None
    pool.register(other, pool.allocate(1), [BlockHash(b"ax")])  # a branch: the run that was claimed is split
    assert pool.tail(other, 2) == ([A, b"ax"], [0, 3])
    assert pool.tail(claim, 3) == ([A, B, C], [0, 1, 2])
    assert pool.claim(BlockHash(b"x")) is None
    pool.validate([claim, other, start], [])


def test_a_chain_is_kept_for_a_while_without_cutting_what_it_ends_in() -> None:
    pool = BlockPool(6)
    keep(pool, "abc")
    claim = pool.keep(B, 2)
    assert claim is not None
    assert pool.tail(claim, 1) == ([B], [1])
    assert (pool.idle_blocks, len(pool._runs())) == (0, 1)  # c as well
    cut = pool.claim(A)  # by somebody else, meanwhile
    assert cut is not None
    assert pool.tail(claim, 2) == ([A, B], [0, 1])
    pool.validate([claim, cut], [])
    pool.release(claim)
    assert pool.idle_blocks == 2
    assert pool.keep(BlockHash(b"x"), 1) is None


def test_what_is_dropped_goes_from_the_end_as_far_as_nobody_needs_it() -> None:
    pool = BlockPool(12)
    keep(pool, "abcd")
    branch, _ = pool.acquire((A, B), 2)
    pool.register(branch, pool.allocate(1), [BlockHash(b"abx")])
    pool.release(branch)
    assert pool.drop(prompt_hashes("abc"), 1, 3) == 2  # c, and what follows on it in one line; abx goes on from b
    assert pool.match(prompt_hashes("abc"), 3) == 2
    claim, _ = pool.acquire(prompt_hashes("abx"), 2)
    assert pool.drop(prompt_hashes("abx"), 0, 3) == 1  # a and b are held
    pool.release(claim)
    assert pool.drop(prompt_hashes("aby"), 1, 3) == 1  # as much of the chain as there is
    assert pool.drop(prompt_hashes("ab"), 1, 2) == 0  # gone already
    pool.validate([], [])
    assert (pool.free_blocks, pool.idle_blocks) == (11, 1)


def test_without_prefix_caching_nothing_is_kept_or_told() -> None:
    pool = BlockPool(2, caching=False)
    claim, blocks = computed(pool, "ab")
    pool.validate([claim], blocks)
    pool.give_back(blocks)
    assert (pool.free_blocks, pool.idle_blocks, pool.match((A, B), 2)) == (2, 0, 0)
    assert pool.take_changes() is None


def test_changes_are_told_once_as_runs_and_what_came_and_went_unseen_is_not_told() -> None:
    pool = BlockPool(3)
    keep(pool, "abc")
    assert pool.take_changes() == ((StoredRun(None, (A, B, C)),), ())
    assert pool.take_changes() is None
    pool.give_back(pool.allocate(2))
    assert pool.take_changes() == ((), (C, B))
    keep(pool, "x")
    pool.give_back(pool.allocate(3))
    assert pool.take_changes() == ((), (A,))  # x was stored and evicted in between


def test_the_order_of_eviction_is_cleaned_of_what_is_stale() -> None:
    pool = BlockPool(4)
    keep(pool, "ab")
    for _ in range(10 * STALE_MAX):
        pool.release(pool.acquire(prompt_hashes("ab"), 2)[0])
    assert len(pool._idle_runs) <= STALE_MAX + 8
    pool.allocate(3)
    assert pool.match((A, B), 2) == 1


def test_branches_are_told_of_after_what_they_follow_on_even_when_that_was_split_meanwhile() -> None:
    pool = BlockPool(8)
    keep(pool, "abc")
    claim, _ = pool.acquire(prompt_hashes("ab"), 2)
    pool.register(claim, pool.allocate(1), [BlockHash(b"abx")])
    assert pool.take_changes() == (
        (StoredRun(None, (A, B)), StoredRun(B, (C,)), StoredRun(B, (BlockHash(b"abx"),))),
        (),
    )


def test_the_journal_replays_what_it_still_has_and_else_tells_everything() -> None:
    pool = BlockPool(8)
    journal = KvJournal(pool, batches_max=2)
    assert journal.record() == ()
    batches: list[KvBatch] = []
    for prompt in ("ab", "x", "y"):
        computed(pool, prompt)
        batches += journal.record()
    runs = (StoredRun(None, (A, B)), *(StoredRun(None, (BlockHash(h),)) for h in (b"x", b"y")))
    assert [batch.sequence for batch in batches] == [1, 2, 3]
    assert journal.since(1) == tuple(batches[1:])
    assert journal.since(2) == tuple(batches[2:])
    # 0: number 1 is gone. 3: nothing was missed, whoever asks is answered all the same. 9: a number of another life of this node.
    for number, after in enumerate((0, None, 3, 9), start=1):
        assert journal.since(after) == (KvBatch(3, runs, cleared=True, snapshot=number),)


def test_the_journal_tells_of_segments_after_blocks_and_within_its_measure() -> None:
    pool = BlockPool(8)
    journal = KvJournal(pool, batches_max=8, batch_hashes_max=4)
    keep(pool, "ab")
    batches = journal.record(segments_stored=prompt_hashes("vwxyz"), segments_removed=(A,))
    assert batches == (
        KvBatch(1, (StoredRun(None, (A, B)),)),
        KvBatch(2, segments_removed=(A,)),
        KvBatch(3, segments_stored=prompt_hashes("vwxy")),
        KvBatch(4, segments_stored=prompt_hashes("vwxyz")[4:]),
    )
    assert journal.record() == ()
    assert journal.since(2) == batches[2:]
    first, second = journal.since(None, prompt_hashes("v"))
    assert (first.cleared, first.stored, first.more) == (True, (StoredRun(None, (A, B)),), True)
    assert (second.cleared, second.segments_stored, second.more) == (False, prompt_hashes("v"), False)


def test_the_journal_keeps_no_more_than_telling_all_would_take() -> None:
    pool = BlockPool(4)
    journal = KvJournal(pool, batches_max=100)
    kept: list[KvBatch] = []
    for prompt in ("ab", "xy", "uv"):
        claim, blocks = computed(pool, prompt)
        pool.release(claim)
        kept += journal.record()
        del blocks
    # "uv" pushed "ab" out: two stored and two removed are as many as the pool has blocks.
    assert kept[2] == KvBatch(3, (StoredRun(None, prompt_hashes("uv")),), prompt_hashes("ab")[::-1])
    assert journal.since(2) == tuple(kept[2:])
    assert [batch.cleared for batch in journal.since(1)] == [True]


@pytest.mark.parametrize(
    ("prompts", "pages"),
    [
        # a run costs two beside its hashes; six fit a page
        (("abcd",), [["abcd"]]),
        (("abcde",), [["abcd"], ["e"]]),
        (("abcdefghi",), [["abcd"], ["efgh"], ["i"]]),
        (("a", "b"), [["a", "b"]]),
        (("a", "bcd"), [["a", "b"], ["cd"]]),
        (("abc", "d", "e"), [["abc"], ["d", "e"]]),
        ((), [[]]),
    ],
)
def test_all_that_is_held_is_told_in_pages(prompts: tuple[str, ...], pages: list[list[str]]) -> None:
    pool = BlockPool(16)
    journal = KvJournal(pool, batches_max=0, batch_hashes_max=6)
    for prompt in prompts:
        computed(pool, prompt)
    recorded = journal.record()
    told = journal.since(None)
    # what a prompt's blocks are called ends with their letter
    assert [[b"".join(name[-1:] for name in run.hashes).decode() for run in page.stored] for page in told] == pages
    last = len(pages) - 1
    assert [(page.page, page.cleared, page.more) for page in told] == [(n, n == 0, n < last) for n in range(len(pages))]
    assert {(page.sequence, page.snapshot) for page in told} == {(len(recorded), 1)}


def test_pages_and_batches_are_as_large_as_they_may_be_and_bring_an_index_to_the_same() -> None:
    random = Random(4)
    pool = BlockPool(200)
    journal = KvJournal(pool, batches_max=1000, batch_hashes_max=7)
    follower, late = KvIndex(), KvIndex()
    node = NodeId("n")
    for index in (follower, late):
        index.add_node(node, 200)
    follower.apply(node, KvBatch(0, cleared=True))
    prompts = [f"{random.choice('rst') * random.randrange(1, 20)}{number}{'x' * random.randrange(30)}" for number in range(40)]
    for prompt in prompts:
        names = prompt_hashes(prompt)
        claim, _ = pool.acquire(names, matched := pool.match(names, len(names)))
        blocks = pool.allocate(len(names) - matched)
        copies = pool.register(claim, blocks, names[matched:])
        pool.give_back(blocks[:copies])
        pool.release(claim)
        for batch in journal.record():
            assert batch.blocks <= 7
            assert follower.apply(node, batch) is Trust.EXACT
    for page in journal.since(None):
        assert page.blocks <= 7
        late.apply(node, page)
    assert late.trust(node) is Trust.EXACT
    assert late.sequence(node) == follower.sequence(node)
    for prompt in prompts:
        names = prompt_hashes(prompt)
        held = {index.find(names).blocks(index.column(node)) for index in (follower, late)}
        assert held == {pool.match(names, len(names))}
    assert late.believed_blocks(node) == follower.believed_blocks(node)


def hold_once_more(pool: BlockPool) -> None:
    pool._place[A].claims += 1


def lose_a_block(pool: BlockPool) -> None:
    pool._unused += 1


def forget_a_parent(pool: BlockPool) -> None:
    del pool._place[A]


def miscount(pool: BlockPool) -> None:
    pool.idle_blocks -= 1


def never_evict(pool: BlockPool) -> None:
    pool._idle_runs.clear()


@pytest.mark.parametrize(
    ("corrupt", "complaint"),
    [
        (hold_once_more, "from block 0 on has 1 claims, there are 0"),
        (lose_a_block, "free 1 \\+ cached 2 \\+ private 0 are not the 4 blocks"),
        (forget_a_parent, "b'a' is in the run from block 0 on, and said to be elsewhere"),
        (miscount, "2 blocks idle, 1 are counted"),
        (never_evict, "idles and will never be evicted"),
    ],
)
def test_canary_the_checker_notices_a_corrupted_pool(corrupt, complaint: str) -> None:
    pool = BlockPool(4)
    keep(pool, "ab")
    pool.validate([], [])
    corrupt(pool)
    with pytest.raises(AssertionError, match=complaint):
        pool.validate([], [])
