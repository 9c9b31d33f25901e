"""Checkpoints that quote or follow do so, as `transformers` computes it too, and drafts then save steps and change no token."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.quoting import create_following_checkpoint, create_quoting_checkpoint, cut_checkpoint
from bench.speculate import BLOCK_TOKENS, Loop, pooled
from orchestrator.core.config import EngineConfig, SpeculationConfig, SpeculationMethod
from orchestrator.core.types import Sampling
from tests.oracle import oracle
from workers.engines.eager import EagerEngine

VOCABULARY = 512


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quoting")
    create_quoting_checkpoint(directory, 3, layers=3, hidden=256, intermediate=128, vocabulary=VOCABULARY)
    torch.set_num_threads(1)
    return directory


def prompts() -> list[list[int]]:
    """Return prompts in which no token comes twice, but for the last ones: these say the beginning of a passage again."""
    made: list[list[int]] = []
    for seed in range(3):
        tokens = list(range(VOCABULARY - 20))
        random.Random(seed).shuffle(tokens)
        made.append([*tokens[:300], *tokens[100 + seed : 103 + seed]])
    return made


@pytest.mark.slow
def test_it_says_again_what_followed(path: Path) -> None:
    generate = oracle(path)
    for seed, prompt in enumerate(prompts()):
        assert generate(prompt, 60) == prompt[103 + seed : 163 + seed]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_of_what_it_quotes_save_steps_and_change_no_token(path: Path, temperature: float) -> None:
    config = EngineConfig(device="cpu", dtype="float32", block_tokens=BLOCK_TOKENS, blocks=64)
    loop = Loop(EagerEngine(path, config, 3, 2048), 3)
    samplings = [replace(Sampling(), temperature=temperature, seed=seed) for seed in range(3)]
    plain, drafted = (loop.run(loop.node(most), prompts(), samplings, 80) for most in (0, 6))
    assert drafted.tokens == plain.tokens
    assert plain.counted == plain.passes
    assert drafted.passes < 0.6 * plain.passes
    assert drafted.accepted > 0.7 * drafted.drafted > 0


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_follows_is_drafted_by_its_first_layer(tmp_path: Path, temperature: float) -> None:
    create_following_checkpoint(tmp_path / "whole", 3, layers=6, hidden=256, intermediate=512, vocabulary=VOCABULARY)
    cut_checkpoint(tmp_path / "whole", tmp_path / "draft", 1)
    expected = oracle(tmp_path / "whole")(prompts()[0], 60)
    assert expected is not None
    assert len(set(expected)) == 60  # nothing comes twice
    speculation = SpeculationConfig(SpeculationMethod.DRAFT_MODEL, draft_model=str(tmp_path / "draft"))
    config = EngineConfig(device="cpu", dtype="float32", block_tokens=BLOCK_TOKENS, blocks=64, speculation=speculation)
    loop = Loop(EagerEngine(tmp_path / "whole", config, 3, 2048), 3)
    samplings = [replace(Sampling(), temperature=temperature, seed=seed) for seed in range(3)]
    plain, drafted = (loop.run(node, prompts(), samplings, 80) for node in (loop.node(0), loop.node(6, draft_model=True)))
    assert drafted.tokens == plain.tokens
    assert temperature > 0 or drafted.tokens[0][:60] == expected
    assert drafted.passes < 0.9 * plain.passes
    assert drafted.accepted > 0.6 * drafted.drafted > 0


@pytest.mark.slow
def test_what_follows_is_drafted_by_a_process_of_its_own(tmp_path: Path) -> None:
    create_following_checkpoint(tmp_path / "whole", 3, layers=6, hidden=256, intermediate=512, vocabulary=VOCABULARY)
    cut_checkpoint(tmp_path / "whole", tmp_path / "draft", 1)
    with pooled(tmp_path / "whole", [3], 80, tmp_path / "draft") as loop:
        samplings = [Sampling()] * 3
        plain, drafted = (loop.run(node, prompts(), samplings, 80) for node in (loop.node(0), loop.node(6, draft_model=True)))
    assert drafted.tokens == plain.tokens
    assert drafted.accepted > 0.6 * drafted.drafted > 0
