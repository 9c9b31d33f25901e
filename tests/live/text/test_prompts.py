"""Incremental tokenising and hashing give exactly what tokenising and hashing everything gives, within their bounds."""

import asyncio
import json
import random
import sys
from array import array
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from orchestrator.core.blocks import extend_hashes, hash_root
from orchestrator.live.text.prompts import OFFLOADED_CHARS_MIN, PromptTokeniser
from orchestrator.live.text.segments import Segmenter

ROOT = hash_root(b"secret", "model", "tenant")
BLOCK_TOKENS = 16
SPECIALS = ("<s>", "<|im_start|>", "<|im_end|>", "<|reserved_special_token_0|>")
LLAMA = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = LLAMA.replace(r"\p{N}{1,3}", r"\p{N}")
#: Pieces that sit badly with careless cuts: contractions, runs of space, accents in two code points, partial special tokens.
PIECES = (
    *(
        "the user's files ",
        "don't ",
        "a  b   c",
        "\n\n",
        " \n ",
        "\t",
        "12345 ",
        "é",
        "e\u0301",
        "中文字符",
        "👩‍👩‍👧",
        "<|im_",
        "end|>",
    ),
    *(
        "|>",
        "<tool_call>",
        "x" * 40,
        " word",
        "Word",
        "'s",
        "'",
        "\r\n",
        "\u00a0",
        "ﬁ",
        "A\u030a",
        "<s>",
        '{"a": 1}',
        "<|im_start|>",
    ),
    "<|im_end|>\n",
)


def split_tokenizer(pattern: str, normalizer: object = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    stages = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(stages)
    tokenizer.decoder = decoders.ByteLevel()
    return train(tokenizer)


def gpt2_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return train(tokenizer)


def metaspace_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return train(tokenizer)


def odd_tokenizer() -> Tokenizer:
    """Added tokens that look around themselves: none of them may be cut at, nor text near them."""
    tokenizer = split_tokenizer(LLAMA)
    tokenizer.add_tokens([AddedToken("<tool_call>", lstrip=True), AddedToken("word", single_word=True), AddedToken("b   c")])
    return tokenizer


def train(tokenizer: Tokenizer) -> Tokenizer:
    text = " ".join(PIECES[:6]) + " the user's words and files, don't word Words 12345 " * 3
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "llama": lambda: split_tokenizer(LLAMA),
    "qwen": lambda: split_tokenizer(QWEN, normalizers.NFC()),
    "gpt2": gpt2_tokenizer,
    "metaspace": metaspace_tokenizer,
    "odd": odd_tokenizer,
    "unlisted": lambda: split_tokenizer(r"\s+|\S+"),
}


def description(tokenizer: Tokenizer) -> dict[str, object]:
    return json.loads(tokenizer.to_str())


def make(
    tokenizer: Tokenizer, prompts_max: int = 64, chars_max: int = 10_000_000, prefix: tuple[int, ...] = ()
) -> PromptTokeniser:
    return PromptTokeniser(tokenizer, Segmenter(description(tokenizer)), prefix, BLOCK_TOKENS, prompts_max, chars_max)


def check(tokeniser: PromptTokeniser, tokenizer: Tokenizer, text: str, session: str | None = None) -> None:
    prompt = tokeniser.encode(text, ROOT, (session,) if session else None)
    whole = tokenizer.encode(text, add_special_tokens=False)
    expected = whole.ids
    assert list(array("I", prompt.tokens)) == expected
    assert prompt.count == len(expected)
    assert list(prompt.hashes) == extend_hashes(ROOT, prompt.tokens, BLOCK_TOKENS)
    assert prompt.hash_root == ROOT
    for chars in (0, 1, len(text) // 3, len(text) * 2 // 3, len(text)):
        assert tokeniser.tokens_before(text, chars, ROOT) == sum(stop <= chars for _, stop in whole.offsets)


def words(source: random.Random, count: int) -> str:
    return "".join(
        source.choice(PIECES) if source.random() < 0.3 else source.choice(("files ", "and ", "user")) for _ in range(count)
    )


def conversation(source: random.Random, turns: int) -> list[str]:
    return [
        f"<|im_start|>{source.choice(('user', 'assistant'))}\n{words(source, source.randint(1, 600))}<|im_end|>\n"
        for _ in range(turns)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_growing_edited_and_compacted_conversations_tokenise_as_if_new(kind: str, seed: int) -> None:
    source, tokenizer = random.Random(seed), KINDS[kind]()
    tokeniser = make(tokenizer)
    system = "<|im_start|>system\n" + words(source, 800) + "<|im_end|>\n"
    for session in ("a", "b", None):
        messages = conversation(source, 3)
        for _ in range(6):
            check(tokeniser, tokenizer, system + "".join(messages) + "<|im_start|>assistant\n", session)
            change = source.random()
            if change < 0.6:
                messages += conversation(source, source.randint(1, 2))
            elif change < 0.8:
                place = source.randrange(len(messages))
                cut = source.randrange(len(messages[place]))
                messages[place] = messages[place][:cut] + source.choice(PIECES) + messages[place][cut:]
            else:
                messages = [*conversation(source, 1), *messages[-1:]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_plain_prompts_cut_anywhere_tokenise_as_if_new(kind: str, seed: int) -> None:
    source, tokenizer = random.Random(seed), KINDS[kind]()
    tokeniser = make(tokenizer)
    text = words(source, 3000)
    for _ in range(25):
        place = source.randrange(1024, len(text))
        text = text[:place] + source.choice((words(source, 300), text[place:], source.choice(PIECES) + text[place:]))
        text += words(source, 400) if len(text) < 4000 else ""
        check(tokeniser, tokenizer, text, source.choice(("a", None)))


def counting(tokenizer: Tokenizer) -> tuple[PromptTokeniser, list[int]]:
    """Return a tokeniser and the list that gets the length of everything it tokenises."""
    seen: list[int] = []

    class Counting:
        """The tokenizer, counting characters."""

        def encode(self, text: str, add_special_tokens: bool) -> object:
            seen.append(len(text))
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)

        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> object:
            seen.extend(map(len, texts))
            return tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    return PromptTokeniser(Counting(), Segmenter(description(tokenizer)), (), BLOCK_TOKENS, 64, 10_000_000), seen  # type: ignore[arg-type]


def test_a_foreign_prompt_takes_the_work_of_an_unknown_one() -> None:
    source, tokenizer = random.Random(8), KINDS["llama"]()
    for length in (20, 5000, 100_000):  # kept short and whole, kept, tokenised aside
        tokeniser, seen = counting(tokenizer)
        known, unknown = words(source, length), words(source, length)
        tokeniser.encode(known, ROOT, ("session",))
        work: list[int] = []
        # Another tenant's prompt, another salt's, one that nobody sent; the same session's name does not help either.
        for text, who in ((known, "other tenant"), (known, "tenant\0salt"), (unknown, "third tenant")):
            seen.clear()
            tokeniser.encode(text, hash_root(b"secret", "model", who), ("session",))
            work.append(sum(seen))
        assert work == [len(known), len(known), len(unknown)]
        seen.clear()
        tokeniser.encode(known, ROOT, ("session",))
        assert seen == []


def test_a_turn_tokenises_only_what_is_new() -> None:
    source, tokenizer = random.Random(1), KINDS["llama"]()
    tokeniser, seen = counting(tokenizer)
    text = "".join(conversation(source, 40))
    tokeniser.encode(text + "<|im_start|>assistant\n", ROOT)
    assert sum(seen) == len(text) + len("<|im_start|>assistant\n")
    seen.clear()
    added = (
        "<|im_start|>assistant\nfine<|im_end|>\n<|im_start|>user\n" + words(source, 50) + "<|im_end|>\n<|im_start|>assistant\n"
    )
    tokeniser.encode(text + added, ROOT)
    assert sum(seen) < len(added) + 3000
    seen.clear()
    tokeniser.encode(text + added, ROOT)
    assert seen == []


def test_another_session_reuses_a_shared_beginning() -> None:
    source, tokenizer = random.Random(2), KINDS["qwen"]()
    tokeniser = make(tokenizer)
    system = "<|im_start|>system\n" + words(source, 2000) + "<|im_end|>\n"
    one = tokeniser.encode(system + words(source, 300), ROOT, ("one",))
    other = tokeniser.encode(system + words(source, 300), ROOT, ("other",))
    shared = sum(mine is theirs for mine, theirs in zip(one.hashes, other.hashes, strict=False))
    assert shared >= len(tokenizer.encode(system).ids) // BLOCK_TOKENS - 2200 // BLOCK_TOKENS


def test_hashes_follow_the_root_and_tokens_do_not() -> None:
    source, tokenizer = random.Random(3), KINDS["llama"]()
    tokeniser = make(tokenizer)
    text = words(source, 2000)
    foreign = hash_root(b"secret", "model", "other tenant")
    mine, theirs = tokeniser.encode(text, ROOT), tokeniser.encode(text, foreign)
    assert mine.tokens == theirs.tokens
    assert list(theirs.hashes) == extend_hashes(foreign, theirs.tokens, BLOCK_TOKENS)
    assert set(mine.hashes).isdisjoint(theirs.hashes)


def test_a_prefix_is_put_in_front_and_kept_apart() -> None:
    source, tokenizer = random.Random(4), KINDS["llama"]()
    beginning = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", beginning)])
    tokeniser = make(tokenizer, prefix=(beginning,))
    for text in ("short", words(source, 2000), words(source, 2000) * 2):
        for prefixed in (True, False, True):
            prompt = tokeniser.encode(text, ROOT, ("session",), prefixed)
            assert list(array("I", prompt.tokens)) == tokenizer.encode(text, add_special_tokens=prefixed).ids
            assert list(prompt.hashes) == extend_hashes(ROOT, prompt.tokens, BLOCK_TOKENS)


def test_what_is_kept_stays_within_its_bounds() -> None:
    source, tokenizer = random.Random(5), KINDS["llama"]()
    tokeniser = make(tokenizer, prompts_max=3, chars_max=40_000)
    for turn in range(30):
        check(tokeniser, tokenizer, f"{turn}" + words(source, source.randint(500, 4000)), f"{turn}")
        assert len(tokeniser) <= 3
        assert tokeniser.chars <= 40_000
    check(tokeniser, tokenizer, words(source, 20_000), "larger than everything that may be kept")
    assert tokeniser.chars <= 40_000


def test_a_long_text_is_tokenised_aside_with_the_same_result() -> None:
    source, tokenizer = random.Random(6), KINDS["llama"]()
    tokeniser = make(tokenizer)
    text = words(source, OFFLOADED_CHARS_MIN // 4)
    assert len(text) >= OFFLOADED_CHARS_MIN
    prompt = asyncio.run(tokeniser.encode_aside(text, ROOT, ("session",)))
    assert array("I", prompt.tokens).tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert asyncio.run(tokeniser.encode_aside(text, ROOT)) is prompt


def test_tokens_given_by_the_client_are_hashed_as_they_are() -> None:
    tokeniser = make(KINDS["llama"]())
    packed = array("I", range(100)).tobytes()
    prompt = tokeniser.adopt(packed, ROOT)
    assert (prompt.tokens, prompt.count) == (packed, 100)
    assert list(prompt.hashes) == extend_hashes(ROOT, packed, BLOCK_TOKENS)


def test_packed_tokens_are_little_endian() -> None:
    assert sys.byteorder == "little"
    assert array("I", [1]).tobytes() == b"\1\0\0\0"
