"""The index of segments in the shared storage: told by several stores, outliving them, looked up until one is missing."""

import random

import pytest

from orchestrator.core.cluster.following import Trust
from orchestrator.core.cluster.segments import SegmentIndex
from orchestrator.core.types import BlockHash, KvBatch, StoreId
from tests.builders import prompt_hashes

A, B = StoreId("a"), StoreId("b")
#: Blocks in a segment in these tests.
SIZE = 2


def names(prompt: str) -> tuple[BlockHash, ...]:
    """Return the names of a prompt's whole segments."""
    return prompt_hashes(prompt)[SIZE - 1 :: SIZE]


def told(
    sequence: int, stored: tuple[BlockHash, ...] = (), removed: tuple[BlockHash, ...] = (), cleared: bool = False
) -> KvBatch:
    return KvBatch(sequence, cleared=cleared, segments_stored=stored, segments_removed=removed)


def index_of(segments_max: int = 100, **segments: str) -> SegmentIndex:
    """Return an index in which each store has told of one prompt's segments, in a batch numbered 1."""
    index = SegmentIndex(segments_max)
    for store, prompt in segments.items():
        index.add_store(StoreId(store))
        assert index.apply(StoreId(store), told(1, names(prompt), cleared=True)) is Trust.EXACT
    return index


def found(index: SegmentIndex, prompt: str) -> int:
    index.validate()
    return index.blocks(prompt_hashes(prompt), SIZE)


def test_a_chain_is_there_up_to_its_first_missing_segment() -> None:
    index = index_of(a="uvwxyz", b="")
    assert found(index, "uvwxyz") == 6
    assert found(index, "uvwxy") == 4  # y alone is no whole segment
    assert found(index, "u") == found(index, "") == 0
    assert found(index, "uvabyz") == 2
    index.apply(B, told(2, removed=names("uvwx")[1:]))
    assert found(index, "uvwxyz") == 2  # what is behind the hole is there, and of no use
    index.apply(B, told(3, stored=names("uvwx")[1:]))
    assert found(index, "uvwxyz") == 6


def test_segments_outlive_the_store_that_told_of_them_and_its_next_self() -> None:
    index = index_of(a="uvwx", b="")
    index.remove_store(A)
    assert found(index, "uvwx") == 4
    index.add_store(A)
    assert (index.trust(A), index.sequence(A)) == (Trust.BLIND, None)
    assert index.apply(A, told(1, names("yz"), cleared=True)) is Trust.EXACT
    assert (found(index, "uvwx"), found(index, "yz")) == (4, 2)


def test_whoever_removes_a_segment_removes_it_for_all() -> None:
    index = index_of(a="uvwx", b="uv")
    index.apply(B, told(2, removed=(*names("uvwx"), BlockHash(b"unknown"))))
    assert (found(index, "uvwx"), index.segments) == (0, 0)


def test_a_snapshot_replaces_what_its_store_told_and_nothing_else() -> None:
    index = index_of(a="uvwx", b="yz")
    assert index.apply(A, told(7, names("uv"), cleared=True)) is Trust.EXACT
    assert (found(index, "uvwx"), found(index, "yz")) == (2, 2)


def test_what_several_stores_told_is_the_last_ones_who_did() -> None:
    index = index_of(a="uv", b="uv")
    index.apply(A, told(7, cleared=True))
    assert found(index, "uv") == 2
    index.apply(B, told(7, cleared=True))
    assert found(index, "uv") == 0


def test_a_gap_makes_a_store_stale_until_the_replay_came() -> None:
    index = index_of(a="uv")
    assert index.apply(A, told(3, names("uvwxyz")[2:])) is Trust.STALE
    assert (index.sequence(A), found(index, "uvwxyz")) == (1, 2)
    assert index.apply(A, told(2, names("uvwx")[1:])) is Trust.STALE
    assert index.apply(A, told(3, names("uvwxyz")[2:])) is Trust.EXACT
    assert found(index, "uvwxyz") == 6
    index.distrust(A)
    assert index.apply(A, told(4, names("ab"))) is Trust.BLIND
    assert (found(index, "uvwxyz"), found(index, "ab")) == (6, 0)


def test_pages_are_believed_as_they_come() -> None:
    index = index_of(a="uv")
    pages = [
        KvBatch(5, cleared=not page, snapshot=1, page=page, more=page < 1, segments_stored=names("wx" * (page + 1))[page:])
        for page in (0, 1)
    ]
    assert index.apply(A, pages[0]) is Trust.STALE
    assert (found(index, "uv"), found(index, "wxwx")) == (0, 2)
    assert index.apply(A, pages[1]) is Trust.EXACT
    assert found(index, "wxwx") == 4


def test_beyond_the_bound_those_known_for_longest_are_forgotten() -> None:
    index = index_of(segments_max=8, a="")
    prompts = [f"{letter}{letter}" for letter in "abcdefghi"]
    for number, prompt in enumerate(prompts, 2):
        index.apply(A, told(number, names(prompt)))
    assert [found(index, prompt) for prompt in prompts] == [0, 0, 2, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("seed", range(4))
def test_random_histories_match_a_plain_model(seed: int) -> None:
    generator = random.Random(seed)
    index = SegmentIndex()
    there: dict[BlockHash, StoreId | None] = {}
    sequences: dict[StoreId, int] = {}
    chains = [prompt_hashes(f"{number}" * 24) for number in range(4)]
    for _ in range(300):
        store = StoreId(f"s{generator.randrange(3)}")
        some = tuple(generator.sample([name for chain in chains for name in chain[SIZE - 1 :: SIZE]], 8))
        if store not in sequences:
            index.add_store(store)
            sequences[store] = 0
            index.apply(store, told(0, cleared=True))
        elif generator.random() < 0.1:
            index.remove_store(store)
            del sequences[store]
            there = {name: None if teller == store else teller for name, teller in there.items()}
        else:
            sequences[store] += 1
            cleared = generator.random() < 0.1
            assert index.apply(store, told(sequences[store], some[:5], some[5:], cleared)) is Trust.EXACT
            there = {name: teller for name, teller in there.items() if name not in some[5:] and not (cleared and teller == store)}
            there |= dict.fromkeys(some[:5], store)
        for chain in chains:
            ends = chain[SIZE - 1 :: SIZE]
            expected = next((number for number, name in enumerate(ends) if name not in there), len(ends))
            assert index.blocks(chain, SIZE) == SIZE * expected, f"seed {seed}"
        index.validate()
