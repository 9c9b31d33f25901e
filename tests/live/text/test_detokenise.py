"""Pieces of text, joined, are what the tokens add to the prompt; stop strings are cut wherever pieces end."""

import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from orchestrator.core.types import FinishReason
from orchestrator.live.text.detokenise import Vocabulary
from orchestrator.live.text.generation import Generation, Piece, Scored
from orchestrator.live.text.stops import StopStrings, partial_match
from orchestrator.live.turns import Delta, TokenLogprob
from tests.builders import some
from tests.live.text.vocabularies import KINDS, TEXT, byte_level, gemma, llama, vocabulary_of

#: Ids past the tokenizer's last, which models with a padded vocabulary may choose.
PADDING = 40
TOKENIZERS = {make.__name__: make() for make in KINDS}
VOCABULARIES = {name: vocabulary_of(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def pieces_of(vocabulary: Vocabulary, tokens: list[int], prompt: list[int] | None = None) -> list[str]:
    detokeniser = vocabulary.detokeniser(array("I", prompt or []).tobytes())
    return [*(detokeniser.add(token) for token in tokens), detokeniser.finish()]


def continued(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """Return what decoding everything has beyond what decoding the prompt has."""
    before, text = tokenizer.decode(prompt), tokenizer.decode([*prompt, *tokens])
    while not text.startswith(before):
        before = before[:-1]
    return text.removeprefix(before)


@st.composite
def some_tokens(draw: st.DrawFn) -> tuple[str, list[int], list[int]]:
    name = draw(st.sampled_from(sorted(TOKENIZERS)))
    size = TOKENIZERS[name].get_vocab_size()
    token = st.integers(0, size - 1 + PADDING)
    return name, draw(st.lists(token, max_size=12)), draw(st.lists(token, min_size=1, max_size=30))


@pytest.mark.slow
@given(some_tokens())
@settings(deadline=None, max_examples=5_000, derandomize=True)
def test_very_many_answers_are_what_their_tokens_add_to_the_prompt(drawn: tuple[str, list[int], list[int]]) -> None:
    check_continues(*drawn)


@given(some_tokens())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_an_answer_is_what_its_tokens_add_to_the_prompt(drawn: tuple[str, list[int], list[int]]) -> None:
    check_continues(*drawn)


def check_continues(name: str, prompt: list[int], tokens: list[int]) -> None:
    tokenizer, vocabulary = TOKENIZERS[name], VOCABULARIES[name]
    assert "".join(pieces_of(vocabulary, tokens)) == tokenizer.decode(tokens)
    assert "".join(pieces_of(vocabulary, tokens, prompt)) == continued(tokenizer, prompt, tokens)


@pytest.mark.parametrize("open_bytes", [b"\xed\xa1", b"\xed\xa0", b"\xe1\x80", b"\xf0\x90\x80", b"\xf4\x90", b"\xc3", b"\xf0"])
@pytest.mark.parametrize("answer", ["!", "b!", "𐍈"])
def test_what_the_prompt_shows_of_bytes_that_begin_no_character_is_not_the_answers(open_bytes: bytes, answer: str) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    by_bytes = {VOCABULARIES["byte_level"].token_bytes(token): token for token in range(tokenizer.get_vocab_size())}
    prompt = [by_bytes[bytes([byte])] for byte in open_bytes]
    check_continues("byte_level", prompt, [by_bytes[bytes([byte])] for byte in answer.encode()])


@pytest.mark.parametrize("name", ["llama", "metaspace", "gemma", "suffixed"])
def test_an_answer_keeps_its_leading_space(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    prompt = tokenizer.encode("abc").ids if name != "suffixed" else [tokenizer.token_to_id("c</w>")]
    word = tokenizer.token_to_id("words</w>" if name == "suffixed" else "▁words")
    assert "".join(pieces_of(VOCABULARIES[name], [word], prompt)) == " words"
    # Special tokens do not show, so what is before them is what the answer continues.
    assert "".join(pieces_of(VOCABULARIES[name], [word], [*prompt, tokenizer.token_to_id("<s>")] * 2)) == " words"


@pytest.mark.parametrize("make", [byte_level, llama, gemma])
def test_a_character_that_the_prompt_began_is_finished(make: object) -> None:
    tokenizer = make()  # type: ignore[operator]
    vocabulary = vocabulary_of(tokenizer)
    tokens = tokenizer.encode("a𐍈", add_special_tokens=False).ids
    assert "".join(pieces_of(vocabulary, tokens[-1:], tokens[:-1])) == "𐍈"
    assert "".join(pieces_of(vocabulary, tokens[-2:], tokens[:-2])) == "𐍈"
    other = tokenizer.token_to_id("a")
    assert "".join(pieces_of(vocabulary, [other], tokens[:-1])) == continued(tokenizer, tokens[:-1], [other]) == "a"


@pytest.mark.parametrize("name", ["byte_level", "llama", "gemma", "metaspace"])
def test_bytes_of_tokens_are_the_bytes_of_the_text(name: str) -> None:
    tokenizer, vocabulary = TOKENIZERS[name], VOCABULARIES[name]
    prompt = tokenizer.encode("ab").ids
    tokens = tokenizer.encode("ab words, 日 w").ids[len(prompt) :] + tokenizer.encode("日").ids[-1:]
    assert b"".join(map(vocabulary.token_bytes, tokens)).decode() == "".join(pieces_of(vocabulary, tokens, prompt))


def test_a_byte_is_itself_and_what_is_no_token_nothing() -> None:
    tokenizer = llama()
    vocabulary = vocabulary_of(tokenizer)
    assert vocabulary.token_bytes(tokenizer.token_to_id("<0xF0>")) == b"\xf0"
    assert vocabulary.token_bytes(tokenizer.token_to_id("▁words")) == b" words"
    assert vocabulary.token_bytes(tokenizer.token_to_id("</s>")) == b"</s>"
    assert vocabulary.token_bytes(tokenizer.get_vocab_size() + 5) == b""


def test_what_does_not_show_is_what_transformers_skips() -> None:
    tokenizer = byte_level()
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="x", clean_up_tokenization_spaces=False)
    vocabulary = Vocabulary(
        byte_level(), {"decoder": {"type": "ByteLevel"}, "added_tokens": []}, special=theirs.all_special_tokens
    )
    tokens = byte_level().encode("plain x end").ids
    assert "".join(pieces_of(vocabulary, tokens)) == theirs.decode(tokens, skip_special_tokens=True) == "plain  end"


def test_a_piece_never_ends_inside_a_character() -> None:
    tokenizer = byte_level()
    pieces = pieces_of(vocabulary_of(tokenizer), tokenizer.encode(TEXT).ids)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in some(pieces))


def test_special_tokens_are_hidden_but_for_marks_that_something_reads() -> None:
    tokenizer = byte_level()
    tokens = tokenizer.encode("<s>plain<|python_tag|>end").ids
    assert "".join(pieces_of(vocabulary_of(tokenizer), tokens)) == "plainend"
    vocabulary = vocabulary_of(tokenizer, ("<|python_tag|>",))
    assert "".join(pieces_of(vocabulary, tokens)) == "plainend"
    marked = vocabulary.detokeniser(marked=True)
    assert "".join(marked.add(token) for token in tokens) == "plain<|python_tag|>end"
    assert vocabulary.token_bytes(tokens[0]) == b"<s>"


@pytest.mark.parametrize("seed", range(5))
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(seed: int) -> None:
    source = random.Random(seed)
    for _ in range(200):
        text = "".join(source.choices("abc", k=source.randint(0, 30)))
        strings = ["".join(source.choices("abc", k=source.randint(1, 5))) for _ in range(source.randint(1, 3))]
        ends = [(text.find(string) + len(string), text.find(string), string) for string in strings if string in text]
        expected = text[: min(ends)[1]] if ends else text
        stops, out, rest = StopStrings(strings), "", text
        while rest:
            count = source.randint(1, 4)
            out += stops.add(rest[:count])
            assert expected.startswith(out)
            rest = rest[count:]
        assert out + stops.finish() == expected
        assert stops.found == (min(ends)[2] if ends else "")


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
    assert [token.token for piece in pieces if isinstance(piece, Scored) for token in piece.tokens] == tokens[:2]
    assert (generation.finish_reason, generation.stopped, generation.tokens) == ("stop", True, 5)


def test_an_ending_token_counts_and_does_not_show() -> None:
    tokenizer = byte_level()
    word = tokenizer.encode("x").ids
    generation = Generation(vocabulary_of(tokenizer).detokeniser(), [], frozenset({5}), None, scored=False)
    assert generation.take(Delta([*word, 5], [], FinishReason.STOP, 3)) == ["x"]
    assert (generation.tokens, generation.finish_reason, generation.cached_tokens) == (2, "stop", 3)


@pytest.mark.parametrize(
    ("name", "names", "offsets"),
    [
        ("llama", ["▁w", "a", "▁words", "a"], [0, 2, 3, 9]),
        ("gemma", ["<0xE6>", "<0x97>", "<0xA5>", "<0xE6>", "<0x9C>", "<0xAC>", "a", "b"], [0, 0, 0, 1, 1, 1, 2, 3]),
        ("gemma", ["a", "<s>", "<0xE6>", "<0x97>", "<0xA5>", "▁"], [0, 1, 1, 1, 1, 2]),
    ],
)
def test_a_token_begins_where_its_first_character_is(name: str, names: list[str], offsets: list[int]) -> None:
    tokenizer = TOKENIZERS[name]
    prompt = array("I", tokenizer.encode("ab").ids).tobytes()
    generation = Generation(VOCABULARIES[name].detokeniser(prompt), [], frozenset(), None, scored=True)
    tokens = [tokenizer.token_to_id(name) for name in names]
    pieces = [piece for token in tokens for piece in generation.take(Delta([token], [TokenLogprob(-1.0, [])]))]
    pieces += generation.take(Delta([], [], FinishReason.STOP))
    scored = [token for piece in pieces if isinstance(piece, Scored) for token in piece.tokens]
    assert [(one.token, one.offset) for one in scored] == list(zip(tokens, offsets, strict=True))
