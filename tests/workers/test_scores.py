"""Log probabilities of prompts are those of `transformers`, however the prompt is cut and whatever computes beside it."""

import random
from array import array
from pathlib import Path

import pytest
import torch
import transformers

from orchestrator.core.commands import Slice
from orchestrator.core.config import EngineConfig
from orchestrator.core.types import BlockId, RequestId, Sampling
from workers.engines.base import PromptScores
from workers.engines.checkpoint import create_checkpoint
from workers.engines.eager import EagerEngine
from workers.engines.sampler import SCORED_ROWS

CONFIG = EngineConfig(device="cpu", dtype="float32", block_tokens=16, blocks=64)
TOPS = 4


@pytest.fixture(scope="module", params=["qwen3", "deepseek_v3"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of either kind of attention."""
    directory = tmp_path_factory.mktemp("model")
    create_checkpoint(directory, request.param, 7, layers=2, hidden=64, intermediate=96)
    torch.set_num_threads(1)
    return directory


@pytest.fixture
def engine(model_dir: Path) -> EagerEngine:
    return EagerEngine(model_dir, CONFIG, sequences_max=8, step_tokens_max=512)


def prompt(seed: int, count: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(500) for _ in range(count)]


def theirs(model_dir: Path, tokens: list[int]) -> torch.Tensor:
    """Return log probabilities [tokens, vocabulary] of what follows each token."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1)


def blocks(number: int) -> tuple[BlockId, ...]:
    return tuple(BlockId(20 * number + place) for place in range(20))


def scored(engine: EagerEngine, tokens: list[int], chunks: list[int], wanted: Sampling) -> list[PromptScores]:
    """Compute a prompt in such chunks, from its beginning again where they start over, beside another that decodes."""
    engine.add(RequestId(1), array("I", tokens), wanted)
    engine.add(RequestId(2), array("I", prompt(99, 5)), Sampling(temperature=1.0, seed=3))
    engine.step([Slice(RequestId(2), 0, 5, 0, blocks(1), True)])
    found: list[PromptScores] = []
    start, other, told = 0, 5, blocks(0)
    for size in chunks:
        if size == 0:  # it was preempted
            start, told = 0, blocks(2)
            continue
        part = Slice(RequestId(1), start, size, 0, told, start + size == len(tokens))
        company, output = engine.step([Slice(RequestId(2), other, 1, 0, (), True), part])
        assert (len(company.tokens), company.scores) == (1, None)
        assert len(output.tokens) == part.sample
        if output.scores is not None:
            found.append(output.scores)
        start, other, told = start + size, other + 1, ()
    engine.forget(RequestId(1))
    engine.forget(RequestId(2))
    return found


CUTS = {
    "whole": [200],
    "in two": [130, 70],
    "last alone": [199, 1],
    "first alone": [1, 199],
    "one by one": [1, 1, 1, 1, 196],
    "started over": [100, 0, 60, 140],
    "started over early": [60, 0, 30, 100, 70],
}


@pytest.mark.parametrize("cut", CUTS)
def test_each_token_is_scored_once_as_transformers_does(engine: EagerEngine, model_dir: Path, cut: str) -> None:
    tokens = prompt(1, 200)
    assert len(tokens) > SCORED_ROWS
    chances = theirs(model_dir, tokens)
    found = scored(engine, tokens, CUTS[cut], Sampling(prompt_logprobs=TOPS))
    places = [place for part in found for place in range(part.first, part.first + len(part))]
    assert places == list(range(1, 200))
    for part in found:
        for number, place in enumerate(range(part.first, part.first + len(part))):
            row = chances[place - 1]
            expected = float(row[tokens[place]])
            assert part.logprobs[number] == pytest.approx(expected, abs=1e-4)
            assert abs(part.ranks[number] - int((row >= expected).sum())) <= 1  # neighbours may be level to the last digits
            values, _ = row.topk(TOPS)
            assert part.top_logprobs[TOPS * number : TOPS * (number + 1)].tolist() == pytest.approx(values.tolist(), abs=1e-4)
            for token, value in zip(
                part.top_tokens[TOPS * number : TOPS * (number + 1)],
                part.top_logprobs[TOPS * number : TOPS * (number + 1)],
                strict=True,
            ):
                assert value == pytest.approx(float(row[token]), abs=1e-4)


def test_what_is_wanted_of_the_answer_stays_the_same(engine: EagerEngine) -> None:
    tokens = prompt(2, 40)
    outputs = []
    for wanted in (Sampling(logprobs=2), Sampling(logprobs=2, prompt_logprobs=0)):
        engine.add(RequestId(1), array("I", tokens), wanted)
        outputs.append(engine.step([Slice(RequestId(1), 0, 40, 0, blocks(0), True)])[0])
        engine.forget(RequestId(1))
    plain, told = outputs
    assert plain.scores is None
    assert told.scores is not None
    assert (len(told.scores), len(told.scores.top_tokens)) == (39, 0)
    assert told.tokens == plain.tokens
    assert [token for token, _ in told.logprobs[0].top] == [token for token, _ in plain.logprobs[0].top]
    assert told.logprobs[0].logprob == pytest.approx(plain.logprobs[0].logprob, abs=1e-4)


def test_a_part_is_what_it_says() -> None:
    whole = PromptScores(5, array("f", [1, 2, 3]), array("I", [4, 5, 6]), array("I", range(6)), array("f", range(6)))
    part = whole.part(1, 3)
    assert (part.first, part.logprobs.tolist(), part.ranks.tolist()) == (6, [2, 3], [5, 6])
    assert (part.top_tokens.tolist(), part.top_logprobs.tolist()) == ([2, 3, 4, 5], [2, 3, 4, 5])
