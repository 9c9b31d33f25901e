"""Outputs kept to grammars, of models with tokenizers of every kind: their text, as gateways read it, is what was asked."""

import json
import random
import re
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from orchestrator.core.types import Sampling
from orchestrator.live.asked import Constraint, ConstraintKind
from orchestrator.live.text.checks import keepable
from orchestrator.live.text.grammars import Thoughts, answer_part, whole
from tests.live.text.vocabularies import byte_level, gemma, llama, metaspace, suffixed, vocabulary_of, word_piece
from workers.engines.grammars import Grammars, Lexicon, Walk
from workers.engines.vocabulary import write_json

END = "</s>"


def unigram() -> Tokenizer:
    """XLM, T5: likely pieces, spaces as a sign of their own."""
    pieces = [*"abcdefghijklmnopqrstuvwxyz0123456789,;:.'-\"{}[]()\\/_<>日本\n", "▁", "▁words", "ord", "▁日", '":', "▁true", "-1"]
    made = Tokenizer(models.Unigram([("<unk>", 0.0), *((piece, -len(pieces) / len(piece)) for piece in pieces)], 0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made


def unigram_with_bytes() -> Tokenizer:
    """The same with bytes, which its decoder knows, and a step that normalises."""
    made = unigram()
    made.normalizer = normalizers.NFKC()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    made.add_tokens([AddedToken(f"<0x{byte:02X}>", normalized=False) for byte in range(256)])
    return made


def with_bytes_that_show() -> Tokenizer:
    """Pieces named like bytes, and a decoder that does not take them for any."""
    made = metaspace()
    made.add_tokens([AddedToken(char, normalized=False) for char in '{}[]():"\\-+0123456789<>x'])
    return made


def with_added() -> Tokenizer:
    """Added tokens that are normalised as texts are: one with a space in front that is none of its own."""
    made = llama()
    made.add_tokens([AddedToken("日本 words"), AddedToken("é"), AddedToken("true")])
    return made


def with_marks() -> Tokenizer:
    made = byte_level()
    made.add_tokens([AddedToken('{"a": ', normalized=False), AddedToken("é", normalized=False), AddedToken("<b>")])
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level, "byte level, added tokens": with_marks, "llama": llama, "llama, added tokens": with_added,
    "gemma": gemma, "metaspace": with_bytes_that_show, "unigram": unigram, "unigram with bytes": unigram_with_bytes,
}  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"enum": ["日本 words", "plain words", "x\ny", 3, True]},
        "b": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        "c": {"type": "string", "pattern": "^[a-z日 ]{0,6}$"},
    },
    "required": ["a", "b", "c"],
    "additionalProperties": False,
}
#: Constraints, each with what tells whether a text is right.
FORMS: dict[str, tuple[Constraint, Callable[[str], Any]]] = {
    "schema": (
        Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(SCHEMA), "response_format"),
        lambda text: jsonschema.validate(json.loads(text), SCHEMA) is None,
    ),
    "expression": (
        Constraint(ConstraintKind.REGEX, r"( ?(words|日本|[a-f]{1,3}))+\.", "regex"),
        lambda text: re.fullmatch(r"( ?(words|日本|[a-f]{1,3}))+\.", text),
    ),
    "list": (
        Constraint(ConstraintKind.CHOICE, json.dumps([" words", "words", "日 words", "the  end"]), "choice"),
        lambda text: text in (" words", "words", "日 words", "the  end"),
    ),
}  # fmt: skip


class Sequence:
    """Tokens that follow a prompt, drawn from all that may come."""

    def __init__(self, prompt: list[int], walk: Walk) -> None:
        self.tokens = array("I", prompt)
        self.drafted = 0
        self.walk: Walk | None = walk


def folder_of(tokenizer: Tokenizer, folder: Path) -> int:
    """Write what an engine reads of a tokenizer; return the number of its end."""
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    assert end is not None
    write_json(folder / "config.json", {"eos_token_id": end, "model_type": "qwen3"})
    return end


def bits(found: NDArray[np.uint32]) -> list[int]:
    return np.flatnonzero(np.unpackbits(found.view(np.uint8), bitorder="little")).tolist()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_ends_is_what_was_asked(tmp_path: Path, kind: str, form: str) -> None:
    tokenizer = KINDS[kind]()
    end = folder_of(tokenizer, tmp_path)
    size = tokenizer.get_vocab_size() + 40  # models have tokens without texts
    constraint, right = FORMS[form]
    part = answer_part(constraint)
    grammar = keepable(whole("@answer", (), (part,), part.field, Thoughts(), {}))
    assert isinstance(grammar, str)
    grammars, vocabulary = Grammars(tmp_path, size), vocabulary_of(tokenizer)
    prompt = tokenizer.encode("plain words", add_special_tokens=False).ids
    ended = 0
    for seed in range(12):
        source = random.Random(seed)
        walk = grammars.walk(Sampling(stop_token_ids=(end,), grammar=grammar), len(prompt))
        assert walk is not None
        sequence = Sequence(prompt, walk)
        while sequence.tokens[-1] != end and len(sequence.tokens) < 300:
            masks = grammars.begin([sequence])
            assert masks is not None
            may = bits(masks._found.result()[0])
            assert walk.failure is None, walk.failure
            assert may
            sequence.tokens.append(end if end in may and source.random() < 0.3 else source.choice(may))
        if sequence.tokens[-1] != end:
            continue
        reader = vocabulary.detokeniser(array("I", prompt).tobytes())
        text = "".join(reader.add(token) for token in sequence.tokens[len(prompt) : -1]) + reader.finish()
        assert right(text), text
        ended += 1
    grammars.close()
    assert ended > 6


@pytest.mark.parametrize("make", [word_piece, suffixed])
def test_tokens_without_a_text_of_their_own_are_told(tmp_path: Path, make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    folder_of(tokenizer, tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be used with grammars: its tokens have no text of their own"):
        Lexicon(tmp_path, tokenizer.get_vocab_size())
