"""What is known to be in cmx: links between a chain's segments, the order of eviction, and that the checker notices."""

from random import Random

import pytest

from orchestrator.core.store.segments import STALE_MAX, Segments
from orchestrator.core.types import BlockHash, ModelName
from tests.builders import prompt_hashes

M, N = ModelName("m"), ModelName("n")


def made(*chains: str) -> Segments:
    """Return the segments of chains, one letter each, written one after the other."""
    segments = Segments({M: 10, N: 100})
    for chain in chains:
        parent = None
        for name in prompt_hashes(chain):
            segments.add(M, name, parent)
            parent = name
    return segments


def evicted(segments: Segments, count: int = 99) -> list[bytes]:
    """Evict so many and return their names."""
    names: list[bytes] = []
    while len(names) < count and (gone := segments.evict()) is not None:
        segments.validate()
        names.append(gone.name)
    return names


def test_suffixes_go_before_prefixes_and_what_was_used_longest_ago_first() -> None:
    assert evicted(made("abc", "xy")) == [b"abc", b"ab", b"a", b"xy", b"x"]
    used = made("abc", "xy")
    used.use(M, prompt_hashes("abcd"))  # the last is not known
    assert evicted(used) == [b"xy", b"x", b"abc", b"ab", b"a"]
    branched = made("abc", "xy", "abd")
    assert evicted(branched, 4) == [b"abc", b"xy", b"x", b"abd"]


def test_models_share_the_bytes_and_the_order() -> None:
    segments = made("a")
    segments.add(N, BlockHash(b"a"), None)
    segments.add(N, BlockHash(b"a"), None)  # known already
    assert (segments.bytes, segments.count(M), segments.count(N)) == (110, 1, 1)
    segments.use(M, prompt_hashes("a"))
    assert [(gone.model, gone.name) for gone in (segments.evict(), segments.evict()) if gone] == [(N, b"a"), (M, b"a")]
    assert (segments.bytes, segments.evict()) == (0, None)


def test_segments_found_at_start_are_linked_once_their_chain_is_used() -> None:
    segments = Segments({M: 10})
    for name in prompt_hashes("abc"):
        segments.add(M, name, None)
    segments.use(M, prompt_hashes("abc"))
    segments.add(M, BlockHash(b"x"), None)
    assert evicted(segments) == [b"abc", b"ab", b"a", b"x"]


def test_what_is_pinned_stays_and_so_does_what_it_follows_on() -> None:
    segments = made("abc")
    segments.pin(M, BlockHash(b"ab"))
    segments.pin(M, BlockHash(b"q"))  # not known yet
    segments.add(M, BlockHash(b"q"), None)
    assert evicted(segments) == [b"abc"]
    assert segments.full_of_pins
    segments.unpin(M, BlockHash(b"ab"))
    assert evicted(segments) == [b"ab", b"a"]


def test_the_end_of_a_chain_is_discarded_as_far_as_nothing_else_follows_on_it() -> None:
    segments = made("abcd", "abx")
    assert segments.discard(M, prompt_hashes("abcde")) == [b"abcd", b"abc"]
    segments.pin(M, BlockHash(b"abx"))
    assert segments.discard(M, prompt_hashes("abx")) == []


def test_what_came_and_went_is_told_once_and_what_is_missing_even_if_it_was_not_known() -> None:
    segments = made("ab")
    assert segments.take_changes(M) == ([b"a", b"ab"], [])
    assert segments.take_changes(M) == ([], [])
    segments.remove(M, BlockHash(b"ab"))
    segments.remove(M, BlockHash(b"z"))
    segments.add(M, BlockHash(b"ab"), BlockHash(b"a"))  # lost and written again: both are told, the loss first
    assert segments.take_changes(M) == ([b"ab"], [b"ab", b"z"])


def test_a_lost_segment_leaves_what_follows_on_it_to_be_evicted_and_linked_again() -> None:
    segments = made("abc")
    segments.remove(M, BlockHash(b"ab"))
    segments.validate()
    segments.add(M, BlockHash(b"ab"), BlockHash(b"a"))
    segments.use(M, prompt_hashes("abc"))
    assert evicted(segments) == [b"abc", b"ab", b"a"]


def test_the_order_is_cleaned_of_what_is_stale() -> None:
    segments, random = made("abcdefgh", "xyz"), Random(1)
    for _ in range(4 * STALE_MAX):
        segments.use(M, prompt_hashes("abcdefgh")[: random.randrange(1, 9)])
    assert len(segments._order) <= 2 * 11 + STALE_MAX
    segments.validate()


def lose_count(segments: Segments) -> None:
    segments.bytes += 1


def lose_child(segments: Segments) -> None:
    segments._known[M][BlockHash(b"a")].children = 0


def never_evict(segments: Segments) -> None:
    segments._order.clear()


@pytest.mark.parametrize(
    ("corrupt", "complaint"),
    [
        (lose_count, "segments of 20 bytes are known, 21 are counted"),
        (lose_child, "segment b'a' counts 0 that follow on it, there are 1"),
        (never_evict, "segment b'ab' may go and is in no order"),
    ],
)
def test_canary_the_checker_notices(corrupt, complaint: str) -> None:
    segments = made("ab")
    segments.validate()
    corrupt(segments)
    with pytest.raises(AssertionError, match=complaint):
        segments.validate()
