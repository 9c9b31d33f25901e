"""Pieces of text, joined, are the decoded whole; stop strings are cut wherever pieces end."""

import json
import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from orchestrator.core.types import FinishReason
from orchestrator.live.text.detokenise import StopStrings, Vocabulary, partial_match
from orchestrator.live.text.generation import Generation, Piece, Scored
from orchestrator.live.turns import Delta, TokenLogprob
from tests.builders import some

TEXT = "naïve 日本語 👩‍👩‍👧 plain words, and\nmore words; e\u0301 ﬁ \u00a0 end"


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens(["<s>", "<|python_tag|>"])
    tokenizer.add_tokens([AddedToken("two words"), AddedToken("日")])
    return tokenizer


def byte_fallback() -> Tokenizer:
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["<unk>", "<s>", "▁", *"abcdefghijklmnopqrstuvwxyz,;\n", "▁words", "▁w"]
    vocabulary = {piece: place for place, piece in enumerate([*words, *pieces])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def vocabulary_of(tokenizer: Tokenizer, kept: tuple[str, ...] = ()) -> Vocabulary:
    return Vocabulary(tokenizer, json.loads(tokenizer.to_str()), kept)


def pieces_of(vocabulary: Vocabulary, tokens: list[int]) -> list[str]:
    detokeniser = vocabulary.detokeniser()
    return [*(detokeniser.add(token) for token in tokens), detokeniser.finish()]


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("seed", range(5))
def test_random_tokens_decode_piece_by_piece_as_at_once(make: object, seed: int) -> None:
    tokenizer = make()  # type: ignore[operator]
    vocabulary = vocabulary_of(tokenizer)
    source = random.Random(seed)
    for _ in range(40):
        tokens = [source.randrange(tokenizer.get_vocab_size()) for _ in range(source.randint(1, 60))]
        assert "".join(pieces_of(vocabulary, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_piece_never_ends_inside_a_character() -> None:
    tokenizer = byte_level()
    pieces = pieces_of(vocabulary_of(tokenizer), tokenizer.encode(TEXT).ids)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in some(pieces))


def test_special_tokens_are_hidden_unless_kept() -> None:
    tokenizer = byte_level()
    tokens = tokenizer.encode("<s>plain<|python_tag|>end").ids
    assert "".join(pieces_of(vocabulary_of(tokenizer), tokens)) == "plainend"
    assert "".join(pieces_of(vocabulary_of(tokenizer, ("<|python_tag|>",)), tokens)) == "plain<|python_tag|>end"
    assert vocabulary_of(tokenizer).token_bytes(tokens[0]) == b"<s>"


@pytest.mark.parametrize("seed", range(5))
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(seed: int) -> None:
    source = random.Random(seed)
    for _ in range(200):
        text = "".join(source.choices("abc", k=source.randint(0, 30)))
        strings = ["".join(source.choices("abc", k=source.randint(1, 5))) for _ in range(source.randint(1, 3))]
        ends = [(text.find(string) + len(string), text.find(string)) for string in strings if string in text]
        expected = text[: min(ends)[1]] if ends else text
        stops, out, rest = StopStrings(strings), "", text
        while rest:
            count = source.randint(1, 4)
            out += stops.add(rest[:count])
            assert expected.startswith(out)
            rest = rest[count:]
        assert out + stops.finish() == expected
        assert stops.found == bool(ends)


@pytest.mark.parametrize(
    ("text", "string", "length"), [("abc", "cd", 1), ("abab", "abac", 2), ("abc", "abc", 0), ("", "x", 0), ("aaa", "aaaa", 3)]
)
def test_partial_matches(text: str, string: str, length: int) -> None:
    assert partial_match(text, string) == length


def test_log_probabilities_of_what_a_stop_string_swallows_do_not_come_out() -> None:
    tokenizer = byte_level()
    generation = Generation(vocabulary_of(tokenizer).detokeniser(), ["END"], frozenset(), None, scored=True)
    tokens = [tokenizer.encode(letter).ids[0] for letter in "abENDc"]
    pieces: list[Piece] = []
    for token in tokens:
        if generation.finish_reason is None:
            pieces += generation.take(Delta([token], [TokenLogprob(-1.0, [])]))
    assert [piece.text for piece in pieces if isinstance(piece, Scored)] == ["a", "b"]
    assert [token for piece in pieces if isinstance(piece, Scored) for token, _ in piece.tokens] == tokens[:2]
    assert (generation.finish_reason, generation.stopped, generation.tokens) == ("stop", True, 5)


def test_an_ending_token_counts_and_does_not_show() -> None:
    tokenizer = byte_level()
    word = tokenizer.encode("x").ids
    generation = Generation(vocabulary_of(tokenizer).detokeniser(), [], frozenset({5}), None, scored=False)
    assert generation.take(Delta([*word, 5], [], FinishReason.STOP, 3)) == ["x"]
    assert (generation.tokens, generation.finish_reason, generation.cached_tokens) == (2, "stop", 3)
