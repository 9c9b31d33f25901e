"""What is looked up follows the same tokens somewhere before: the latest place, no longer than it is sure, in bounded memory."""

from array import array
from random import Random

import pytest

from workers.engines.lookup import BULK, ENTRIES_MAX, NGRAM, PromptLookup


def found(text: str, most: int = 8) -> str:
    """Look up what follows a text of letters."""
    drafts = PromptLookup().find(array("I", list(text.encode())), most)
    return bytes(drafts.tolist()).decode()


@pytest.mark.parametrize(
    ("text", "follows"),
    [
        ("", ""),
        ("abc", ""),
        ("xabcdefgh yabc", "def"),  # three are equal, so three are believed
        ("xabcdefgh xabcd", "efgh "),  # five are equal
        ("abc1 abc2 abc", "2 ab"),  # the latest place
        ("abcx abd", ""),
        ("aaaaaa", "aaaaa"),  # a period of one
        ("abababab", "ababab"),
        ("the quick brown fox. the quick br", "own fox."),
    ],
)
def test_what_followed_the_last_tokens_before_follows_again(text: str, follows: str) -> None:
    assert found(text) == follows


def test_no_more_is_found_than_is_asked_for() -> None:
    text = "the quick brown fox. the quick br"
    assert [found(text, most) for most in (1, 2, 3, 6)] == ["o", "ow", "own", "own fo"]
    # Of fewer than three tokens that are asked for, three must be equal all the same.
    assert found("abcx ubc", 1) == ""


@pytest.mark.parametrize("seed", range(6))
def test_an_index_that_grew_with_its_sequence_finds_what_a_new_one_does(seed: int) -> None:
    random = Random(seed)
    tokens, grown = array("I"), PromptLookup()
    hits = 0
    for _ in range(120):
        tokens.extend([random.randrange(4) for _ in range(random.choice((1, 1, 1, 2, 9, BULK + 5)))])
        drafts = grown.find(tokens, 6)
        assert drafts == PromptLookup().find(tokens, 6)
        hits += len(drafts)
        if drafts:
            assert tokens.tobytes().find(array("I", [*tokens[-NGRAM:], drafts[0]]).tobytes()) >= 0
    assert hits > 100


@pytest.mark.slow
def test_what_is_found_was_compared_and_not_only_hashed() -> None:
    random = Random(1)
    lookup, tokens = PromptLookup(), array("I", [random.randrange(1 << 31) for _ in range(4 * ENTRIES_MAX)])
    for _ in range(200):  # nothing repeats, and every place of the table is taken
        assert not lookup.find(tokens, 8)
        tokens.append(random.randrange(1 << 31))
    assert len(lookup._table) == ENTRIES_MAX
