"""What is wrong in a checkpoint's text files is one line that names file and field; what is written unusually is read."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from orchestrator.core.config import ConfigError
from orchestrator.live.text.models import ModelText
from orchestrator.profiles.fields import CheckpointError
from tests.live.text.vocabularies import byte_level


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "config.json", {"max_position_embeddings": 4096, "eos_token_id": 5, "vocab_size": 400})
    write(tmp_path, "generation_config.json", {"eos_token_id": [7, 9]})
    write(tmp_path, "tokenizer_config.json", {"eos_token": "<s>", "chat_template": "{{ messages }}"})
    return tmp_path


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def load(folder: Path) -> ModelText:
    return ModelText.load(folder, "fingerprint")


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("config.json", "{", "config.json: not readable as JSON"),
        ("config.json", "[1]", r"config.json: must hold a JSON object, holds \[1\]"),
        ("config.json", {"max_position_embeddings": "long"}, "config.json: max_position_embeddings: must be a whole number"),
        ("config.json", {"max_position_embeddings": 1.5}, "config.json: max_position_embeddings: must be a whole number"),
        ("config.json", {"vocab_size": 400}, "config.json: max_position_embeddings: is missing"),
        (
            "config.json",
            {"max_position_embeddings": 1, "rope_scaling": {"type": "yarn", "factor": "4"}},
            "config.json: rope_scaling.factor: must be a number over 0, is '4'",
        ),
        ("config.json", {"text_config": [1]}, r"config.json: text_config: must be an object, is \[1\]"),
        ("config.json", {"vocab_size": -1}, "config.json: vocab_size: must be a whole number of 1 or more, is -1"),
        (
            "generation_config.json",
            {"eos_token_id": [7, 400]},
            "generation_config.json: eos_token_id: must be token ids from 0 to 399",
        ),
        ("generation_config.json", {"eos_token_id": "</s>"}, "generation_config.json: eos_token_id: must be token ids"),
        ("tokenizer.json", "{}", "tokenizer.json: "),
        ("tokenizer.json", {"added_tokens": [{"id": 1}]}, r"tokenizer.json: added_tokens\[0\].content: is missing"),
        ("tokenizer.json", {"added_tokens": "all"}, "tokenizer.json: added_tokens: must be a list"),
        ("tokenizer_config.json", {"chat_template": 5}, "tokenizer_config.json: chat_template: must be a text, is 5"),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "default"}]},
            r"tokenizer_config.json: chat_template\[0\].template: is missing",
        ),
        ("tokenizer_config.json", {"chat_template": "\n{% if %}"}, "tokenizer_config.json: chat template, line 2"),
        ("tokenizer_config.json", {"eos_token": {"special": True}}, "tokenizer_config.json: eos_token.content: is missing"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": [1]},
            "tokenizer_config.json: added_tokens_decoder: must be an object",
        ),
        ("chat_template.jinja", "{% endfor %}", "chat_template.jinja: chat template, line 1"),
    ],
)
def test_a_malformed_file_is_named_with_its_field(folder: Path, name: str, value: Any, problem: str) -> None:
    write(folder, name, value)
    with pytest.raises(CheckpointError, match=problem) as refused:
        load(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        load(folder)


def test_a_template_that_is_no_text_is_named(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{{ messages }}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: is not UTF-8"):
        load(folder)


@pytest.mark.parametrize(
    "rewritten", [lambda text: "\ufeff" + text, lambda text: text.replace("4096", "4096.0").replace("[7, 9]", "[7.0, 9.0]")]
)
def test_byte_order_marks_and_integral_floats_are_read(folder: Path, rewritten: Callable[[str], str]) -> None:
    write(folder, "chat_template.jinja", "{{ messages[0].content }}")
    for path in folder.iterdir():
        path.write_text(rewritten(path.read_text()))
    text = load(folder)
    assert (text.context_tokens_max, text.eos_token_ids) == (4096, {7, 9})
    assert text.template.render([{"role": "user", "content": "hi"}], None) == "hi"


def test_a_limit_shortens_the_context_and_may_not_lengthen_it(folder: Path) -> None:
    assert ModelText.load(folder, "fingerprint", context_tokens_max=100).context_tokens_max == 100
    with pytest.raises(ConfigError, match=r"engine\.context_tokens_max: must be at most the model's 4096, is 4097"):
        ModelText.load(folder, "fingerprint", context_tokens_max=4097)


def test_a_multimodal_checkpoints_language_model_is_in_its_text_config(folder: Path) -> None:
    text = {"max_position_embeddings": 2048, "vocab_size": 500, "rope_scaling": {"type": "yarn", "factor": 4}}
    write(folder, "config.json", {"text_config": text, "max_position_embeddings": 1, "vision_config": {}})
    found = load(folder)
    assert (found.context_tokens_max, found.vocabulary_size) == (8192, 500)


@pytest.mark.parametrize(
    ("generation", "config", "own", "completion", "chat"),
    [
        ({"eos_token_id": [7, 9]}, {"eos_token_id": 5}, None, {7, 9}, {7, 9}),
        ({}, {"eos_token_id": 5}, None, {5}, {5}),
        ({"eos_token_id": None}, {"eos_token_id": [5]}, "<s>", {5}, {5, 300}),
        ({"eos_token_id": 7}, {}, {"content": "<s>"}, {7}, {7, 300}),
        ({}, {}, "no such token", set(), set()),
    ],
)
def test_where_ends_come_from(folder: Path, generation: Any, config: Any, own: Any, completion: Any, chat: Any) -> None:
    write(folder, "generation_config.json", generation)
    write(folder, "config.json", config | {"vocab_size": 400, "max_position_embeddings": 4096})
    write(folder, "tokenizer_config.json", {"eos_token": own})
    text = load(folder)
    assert (text.eos_token_ids, text.chat_eos_token_ids) == (completion, chat)


@pytest.mark.parametrize(
    "named",
    [
        {"pad_token": "日"},
        {"additional_special_tokens": ["日"]},
        {"additional_special_tokens": [{"content": "日"}]},
        {"extra_special_tokens": {"image_token": "日"}},
        {"added_tokens_decoder": {"302": {"content": "日", "special": True}}},
    ],
)
def test_tokens_that_any_file_calls_special_do_not_show(folder: Path, named: Any) -> None:
    write(folder, "tokenizer_config.json", named)
    text = load(folder)
    tokens = text.tokenizer.encode("a日b").ids
    assert "".join(map(text.vocabulary.detokeniser().add, tokens)) == "ab"


def seconds_for_a_known_word(tokenizer: Tokenizer) -> float:
    """Return how long a long word takes that comes again and again, as a share of what words take that never came before."""
    source = random.Random(1)

    def seconds(kinds: int) -> float:
        names = ["".join(source.choices(("words", "plain", "more", "and"), k=50)) for _ in range(kinds)]
        text = " ".join(names * (100 // kinds))
        started = time.process_time()
        tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return time.process_time() - started

    return min(seconds(1) for _ in range(20)) / min(seconds(100) for _ in range(20))


def test_words_of_other_prompts_take_as_long_as_unknown_ones(folder: Path) -> None:
    assert seconds_for_a_known_word(load(folder).tokenizer) > 0.65


def test_canary_a_tokenizer_that_remembers_words_is_told(folder: Path) -> None:
    assert seconds_for_a_known_word(Tokenizer.from_file(str(folder / "tokenizer.json"))) < 0.65
