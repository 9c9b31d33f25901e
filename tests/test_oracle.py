"""The oracle of token identity is itself tested: it tells a changed weight, it steps aside at ties, and it is not passed over."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.oracle import TIE, Oracle, first_decided, oracle
from workers.engines.checkpoint import create_checkpoint

PROMPTS = [[number, 2 * number + 1, 3] for number in range(1, 5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    create_checkpoint(path, "llama", 3, layers=2, hidden=32, heads=2, kv_heads=1, intermediate=32, vocabulary=300)
    return path


@pytest.fixture(scope="module")
def generate(model: Path) -> Oracle:
    return oracle(model)


def copied(model: Path, folder: Path) -> Path:
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def changed(model: Path, folder: Path, name: str, row: int, like: int, by: float) -> Path:
    """Return a copy of a checkpoint in which one row of a tensor is another row's, a little larger."""
    copied(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][row] = tensors[name][like] * (1.0 + by)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def naive(path: Path, prompt: list[int], count: int) -> list[int]:
    """Return the most likely tokens, by running the whole model anew for each."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_it_writes_the_most_likely_tokens_and_as_many_as_asked(model: Path, generate: Oracle) -> None:
    for prompt in PROMPTS:
        assert generate(prompt, 3) == naive(model, prompt, 3)


def test_an_end_of_a_sequence_is_a_token_like_any_other(model: Path, tmp_path: Path, generate: Oracle) -> None:
    tokens = generate(PROMPTS[0], 6)
    assert tokens is not None
    path = copied(model, tmp_path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens[:2], "do_sample": False}))
    assert oracle(path)(PROMPTS[0], 6) == tokens


def test_canary_another_models_tokens_are_told_apart(model: Path, tmp_path: Path, generate: Oracle) -> None:
    other = oracle(changed(model, tmp_path, "model.layers.0.mlp.down_proj.weight", 0, 1, 1.0))
    assert [generate(prompt, 12) for prompt in PROMPTS] != [other(prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize(("by", "tied"), [(0.0, True), (1e-7, True), (0.5, False)])
def test_canary_a_tie_is_not_decided(model: Path, tmp_path: Path, generate: Oracle, by: float, tied: bool) -> None:
    """A second token that is as likely as the first one, or likelier by less than float32 tells."""
    [first] = generate(PROMPTS[0], 1) or []
    other = (first + 1) % 300
    path = changed(model, tmp_path, "lm_head.weight", other, first, by)
    found = oracle(path)(PROMPTS[0], 1)
    assert found == (None if tied else [other])


def test_prompts_that_meet_no_tie_are_taken_in_order() -> None:
    def generate(prompt: list[int], count: int) -> list[int] | None:
        return None if prompt == [2] else prompt * count

    prompts = [[number] for number in range(1, 20)]
    assert first_decided(generate, prompts, 5, 2) == {(number,): [number, number] for number in (1, 3, 4, 5, 6)}


def test_canary_an_oracle_that_mostly_steps_aside_is_no_oracle() -> None:
    def seldom(prompt: list[int], count: int) -> list[int] | None:
        return None if prompt[0] % 2 else prompt

    prompts = [[number] for number in range(40)]
    with pytest.raises(AssertionError, match="9 of 19 prompts meet a tie"):
        first_decided(seldom, prompts, 10, 1)
    # There are not as many as are wanted.
    with pytest.raises(AssertionError):
        first_decided(lambda prompt, _: prompt, prompts, 41, 1)


def test_ties_are_wider_than_what_float32_gets_wrong() -> None:
    assert TIE > 3e-5
