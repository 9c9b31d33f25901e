"""The eager engine's own duties: sampling as asked, failures that stay with their sequence, devices and memory."""

import itertools
import math
import random
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.core.commands import Slice
from orchestrator.core.config import ConfigError, EngineConfig
from orchestrator.core.types import BlockId, RequestId, Sampling
from tests.builders import some
from workers.engines.base import SliceOutput
from workers.engines.checkpoint import create_checkpoint
from workers.engines.eager import EagerEngine
from workers.engines.lookup import PromptLookup
from workers.engines.sampler import RANKED_TOKENS, sample, uniform
from workers.engines.sequences import TokenSequence

CONFIG = EngineConfig(device="cpu", dtype="float32", block_tokens=16, blocks=64)


@pytest.fixture(scope="module", params=["llama", "deepseek_v3"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of either kind of attention."""
    directory = tmp_path_factory.mktemp("model")
    create_checkpoint(directory, request.param, 7, layers=2, hidden=64, intermediate=96)
    torch.set_num_threads(1)
    return directory


def sequence(sampling: Sampling, prompt: tuple[int, ...] = (1, 2, 3)) -> TokenSequence:
    return TokenSequence(array("I", prompt), sampling, 1 << 20)


def drawn(logits: list[float], sampling: Sampling, draws: int = 400) -> dict[int, int]:
    """Return how often each token comes out of one row of logits."""
    found: dict[int, int] = {}
    for seed in range(draws):
        changed = Sampling(
            temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, min_p=sampling.min_p, seed=seed
        )
        [output] = sample(torch.tensor([logits]), [sequence(changed)])
        found[output.tokens[0]] = found.get(output.tokens[0], 0) + 1
    return found


FOUR = [math.log(0.1), math.log(0.5), math.log(0.25), math.log(0.15)]


def test_draws_follow_the_distribution() -> None:
    found = drawn(FOUR, Sampling(temperature=1.0), draws=2000)
    for token, share in enumerate((0.1, 0.5, 0.25, 0.15)):
        assert abs(found[token] / 2000 - share) < 0.03


def test_temperature_flattens_and_sharpens() -> None:
    hot = drawn(FOUR, Sampling(temperature=100.0))
    cold = drawn(FOUR, Sampling(temperature=0.05))
    assert min(hot.values()) > 60
    assert cold == {1: 400}


@pytest.mark.parametrize(
    ("sampling", "left"),
    [
        (Sampling(temperature=1.0, top_k=2), {1, 2}),
        (Sampling(temperature=1.0, top_k=1), {1}),
        (Sampling(temperature=1.0, top_p=0.7), {1, 2}),
        (Sampling(temperature=1.0, top_p=0.76), {1, 2, 3}),
        (Sampling(temperature=1.0, top_p=1e-9), {1}),
        (Sampling(temperature=1.0, min_p=0.29), {1, 2, 3}),
        (Sampling(temperature=1.0, min_p=0.4), {1, 2}),
        # Top-p looks at what top-k left: 0.5 and 0.25 of 0.75.
        (Sampling(temperature=1.0, top_k=2, top_p=0.6), {1}),
        (Sampling(temperature=1.0, top_k=3, top_p=0.99), {1, 2, 3}),
    ],
)
def test_truncation_leaves_the_most_likely(sampling: Sampling, left: set[int]) -> None:
    assert set(drawn(FOUR, sampling, draws=150)) == left


def test_truncation_of_a_flat_large_vocabulary_looks_at_all_of_it() -> None:
    vocabulary = 3 * RANKED_TOKENS
    found = {
        sample(torch.zeros(1, vocabulary), [sequence(Sampling(temperature=1.0, top_p=0.9, seed=seed))])[0].tokens[0]
        for seed in range(300)
    }
    assert len(found) > 250


def test_rows_with_different_wishes_share_a_step() -> None:
    wishes = [
        Sampling(),
        Sampling(temperature=1.0, top_k=1),
        Sampling(logit_bias={3: 100.0}),
        Sampling(temperature=0.01, logit_bias={0: 100.0}, logprobs=2),
    ]
    outputs = sample(torch.tensor([FOUR] * 4), [sequence(wish) for wish in wishes])
    assert [output.tokens for output in outputs] == [(1,), (1,), (3,), (0,)]
    assert [len(output.logprobs) for output in outputs] == [0, 0, 0, 1]
    # Log probabilities are of the raw logits, whatever bias chose the token.
    assert outputs[3].logprobs[0].logprob == pytest.approx(math.log(0.1))
    assert [token for token, _ in outputs[3].logprobs[0].top] == [1, 2]


def test_penalties_count_generated_tokens_only() -> None:
    asked = Sampling(frequency_penalty=0.4, presence_penalty=0.3)
    row = sequence(asked, prompt=(1, 1, 1))
    tokens = [sample(torch.tensor([FOUR]), [row])[0].tokens[0] for _ in range(5)]
    # Logits -2.30, -0.69, -1.39, -1.90. Once mentioned, token 1 is at -1.393, twice at -1.79, three times at -2.19.
    assert tokens == [1, 2, 1, 1, 3]


WISHES = {
    "greedy": Sampling(),
    "hot": Sampling(temperature=1.5, seed=3),
    "top": Sampling(temperature=1.0, top_p=0.7, top_k=40, min_p=0.01, seed=4),
    "penalties": Sampling(temperature=0.9, presence_penalty=1.2, frequency_penalty=0.9, seed=5),
    "greedy penalties": Sampling(frequency_penalty=1.7),
    "bias": Sampling(temperature=1.0, logit_bias={5: 4.0, 9: 4.0, 11: 4.0}, seed=6),
    "logprobs": Sampling(temperature=1.0, logprobs=3, seed=7),
    "repetition": Sampling(repetition_penalty=1.4, forbidden_runs=((5,), (7, 9))),
    "allowed": Sampling(temperature=1.0, allowed_token_ids=tuple(range(0, 500, 3)), seed=8),
}


class Guesses(PromptLookup):
    """Drafts what will be right, but for every so many tokens."""

    def __init__(self, text: list[int], wrong: random.Random) -> None:
        super().__init__()
        self._text, self._wrong = text, wrong

    def find(self, tokens: "array[int]", most: int) -> "array[int]":
        drafts = array("I", self._text[len(tokens) : len(tokens) + self._wrong.randint(0, most)])
        for place in range(len(drafts)):
            if self._wrong.random() < 0.2:
                drafts[place] = self._wrong.randrange(500)
        return drafts


def outputs_of(
    engine: EagerEngine, prompts: list[list[int]], sampling: Sampling, guesses: list[list[int]] | None, modelled: int = 0
) -> list[list[SliceOutput]]:
    """Return what the steps of several sequences bring until each has 40 tokens or stops.

    Perhaps with guessed drafts, or so many of a draft model.
    """
    wrong = random.Random(len(prompts))
    found: list[list[SliceOutput]] = []
    for number, tokens in enumerate(prompts):
        engine.add(RequestId(number), array("I", tokens), sampling)
        if guesses is not None:
            engine._sequences[RequestId(number)].lookup = Guesses(tokens + guesses[number], wrong)
        table = tuple(BlockId(number * 5 + place) for place in range(5))
        found.append(engine.step([Slice(RequestId(number), 0, len(tokens), 0, table, True)]))
    while True:
        slices: list[Slice] = []
        for number, tokens in enumerate(prompts):
            count = len(tokens_of(found[number]))
            if count < 40 and not found[number][-1].stopped:
                drafts = min(6, 39 - count) if guesses is not None else 0
                more = min(modelled, 39 - count)
                slices.append(Slice(RequestId(number), len(tokens) + count - 1, 1, 0, (), True, drafts, more))
        if not slices:
            break
        for part, output in zip(slices, engine.step(slices), strict=True):
            found[part.request].append(output)
    for number in range(len(prompts)):
        engine.forget(RequestId(number))
    return found


def tokens_of(outputs: list[SliceOutput]) -> list[int]:
    return [token for output in outputs for token in output.tokens]


@pytest.mark.parametrize("wish", list(WISHES))
@pytest.mark.parametrize("stops", [False, True])
def test_drafts_change_neither_tokens_nor_their_probabilities(model_dir: Path, wish: str, stops: bool) -> None:
    source = random.Random(9)
    prompts = [[source.randrange(500) for _ in range(count)] for count in (3, 17, 30)]
    engine = EagerEngine(model_dir, CONFIG, 8, 256)
    sampling = WISHES[wish]
    if stops:  # at a token that comes in the midst of what is drafted
        ends = {tokens_of(outputs)[21] for outputs in outputs_of(engine, prompts, sampling, None)}
        sampling = replace(sampling, stop_token_ids=tuple(sorted(ends)))
    plain = outputs_of(engine, prompts, sampling, None)
    drafted = outputs_of(engine, prompts, sampling, [tokens_of(outputs) + [1] * 8 for outputs in plain])
    assert [tokens_of(outputs) for outputs in drafted] == [tokens_of(outputs) for outputs in plain]
    assert [outputs[-1].stopped for outputs in drafted] == [outputs[-1].stopped for outputs in plain] == [stops] * 3
    for before, after in zip(plain, drafted, strict=True):
        assert stops or len(after) < 0.7 * len(before)
        pairs = zip(
            [one for output in before for one in output.logprobs],
            [one for output in after for one in output.logprobs],
            strict=True,
        )
        for one, other in pairs:
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]


def drafts_guessed(row: TokenSequence) -> int:
    return row.draft(3)


def drafts_most_likely(row: TokenSequence) -> int:
    """Draft as a model does that gives the right chances."""
    row.tokens.extend([1, 1, 1])
    row.drafted = 3
    return 3


@pytest.mark.slow
@pytest.mark.parametrize("draft", [drafts_guessed, drafts_most_likely])
def test_what_is_drawn_of_drafts_is_distributed_as_without(draft: Callable[[TokenSequence], int]) -> None:
    # Each row of logits is the same: whatever is drafted, each token comes as often as its chance says, and independently.
    shares, counts = (0.1, 0.5, 0.25, 0.15), [[0] * 4 for _ in range(4)]
    for seed in range(4000):
        row = sequence(Sampling(temperature=1.0, seed=seed))
        row.lookup = Guesses([1, 2, 3, 1, 2, 1], random.Random(seed))
        taken: list[int] = []
        while len(taken) < 2:
            drafted = draft(row)
            [output] = sample(torch.tensor([FOUR] * (1 + drafted)), [row])
            taken += output.tokens
        counts[taken[0]][taken[1]] += 1
    for first, second in itertools.product(range(4), repeat=2):
        assert abs(counts[first][second] / 4000 - shares[first] * shares[second]) < 0.03


def test_a_draft_after_which_there_is_no_number_leaves_the_tokens_before_it() -> None:
    row = sequence(Sampling())
    row.lookup = Guesses([1, 2, 3, 1, 1], random.Random(1))
    while row.draft(2) < 2 or row.tokens[-2:].tolist() != [1, 1]:
        row.take_drafts()
    logits = torch.tensor([FOUR, [math.nan] * 4, FOUR])
    assert sample(logits, [row]) == [SliceOutput((1,), drafted=2)]
    assert row.tokens.tolist() == [1, 2, 3, 1]


def test_not_a_number_fails_its_own_row_only() -> None:
    logits = torch.tensor([FOUR, [math.nan] * 4, FOUR])
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=1), Sampling(logprobs=1)):
        outputs = sample(logits, [sequence(sampling) for _ in range(3)])
        assert [output.failure is None for output in outputs] == [True, False, True]
        assert outputs[1].tokens == ()


def test_random_numbers_are_even_and_independent() -> None:
    numbers = [uniform(seed, position) for seed in range(50) for position in range(50)]
    assert len(set(numbers)) == 2500
    assert all(0 <= number < 1 for number in some(numbers))
    assert abs(sum(numbers) / 2500 - 0.5) < 0.02


def test_unseeded_sequences_differ(model_dir: Path) -> None:
    assert sequence(Sampling(temperature=1.0)).seed != sequence(Sampling(temperature=1.0)).seed


def test_a_broken_weight_fails_only_who_uses_it(model_dir: Path, tmp_path: Path) -> None:
    """Not-a-number KV of a failed sequence does not leak into the sequences that reuse its blocks."""
    for file in model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][77] = math.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    broken, sound = EagerEngine(tmp_path, CONFIG, 8, 256), EagerEngine(model_dir, CONFIG, 8, 256)
    greedy = Sampling()
    good, bad = array("I", [5, 6, 7]), array("I", [5, 77, 7, *range(40)])
    for engine in (broken, sound):
        engine.add(RequestId(1), good, greedy)
        engine.add(RequestId(2), bad, greedy)
    slices = [
        Slice(RequestId(1), 0, 3, 0, (BlockId(0),), True),
        Slice(RequestId(2), 0, 43, 0, (BlockId(1), BlockId(2), BlockId(3)), True),
    ]
    outputs, expected = broken.step(slices), sound.step(slices)
    assert outputs[0] == expected[0]
    assert outputs[1].failure is not None
    assert "nan" in outputs[1].failure
    # Another sequence begins in one of the failed one's blocks, and shares steps with one of another length.
    for engine in (broken, sound):
        engine.forget(RequestId(2))
        engine.add(RequestId(3), array("I", range(20, 26)), greedy)
    slices = [Slice(RequestId(3), 0, 6, 0, (BlockId(2),), True), Slice(RequestId(1), 3, 1, 0, (), True)]
    assert broken.step(slices) == sound.step(slices)
    slices = [Slice(RequestId(3), 6, 1, 0, (), True), Slice(RequestId(1), 4, 1, 0, (), True)]
    assert broken.step(slices) == sound.step(slices)


def test_unknown_tokens_fail_their_request(model_dir: Path) -> None:
    engine = EagerEngine(model_dir, CONFIG, 8, 256)
    engine.add(RequestId(1), array("I", [5, 512]), Sampling())
    engine.add(RequestId(2), array("I", [5, 6]), Sampling())
    slices = [Slice(RequestId(number), 0, 2, 0, (BlockId(number),), True) for number in (1, 2)]
    bad, good = engine.step(slices)
    assert bad.failure == "token 512 is not in the model's vocabulary of 512"
    assert good.failure is None
    assert len(good.tokens) == 1


def test_contexts_of_very_different_length_share_a_step(model_dir: Path) -> None:
    """Decodes are cut into groups by length; the result is that of each alone."""
    config = EngineConfig(device="cpu", dtype="float32", block_tokens=16, blocks=2048)
    engine = EagerEngine(model_dir, config, 32, 4096)
    source = random.Random(1)
    lengths = [6000, 5, 17, 2500, 30, 31, 32, 33]
    tables: list[tuple[BlockId, ...]] = []
    first: list[tuple[int, ...]] = []
    taken = 0
    for number, length in enumerate(lengths):
        engine.add(RequestId(number), array("I", [source.randrange(500) for _ in range(length)]), Sampling())
        count = length // 16 + 1
        tables.append(tuple(BlockId(block) for block in range(taken, taken + count)))
        taken += count
        first.append(engine.step([Slice(RequestId(number), 0, length, 0, tables[number], True)])[0].tokens)
    decode = [Slice(RequestId(number), length, 1, 0, (), True) for number, length in enumerate(lengths)]
    together = [output.tokens for output in engine.step(decode)]
    alone = [engine.step([Slice(RequestId(number), length, 1, 0, (), True)])[0].tokens for number, length in enumerate(lengths)]
    assert together == alone


def test_bfloat16_runs_and_agrees_with_itself(model_dir: Path) -> None:
    config = EngineConfig(device="cpu", dtype="bfloat16", block_tokens=16, blocks=64)
    engine = EagerEngine(model_dir, config, 8, 256)
    assert engine.description.block_bytes * 2 == EagerEngine(model_dir, CONFIG, 8, 256).description.block_bytes
    found: list[tuple[int, ...]] = []
    for number in range(2):
        engine.add(RequestId(number), array("I", range(40)), Sampling())
        blocks = tuple(BlockId(4 * number + place) for place in range(3))
        engine.step([Slice(RequestId(number), 0, 40, 0, blocks, True)])
        found.append(engine.step([Slice(RequestId(number), 40, 1, 0, (), True)])[0].tokens)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (EngineConfig(device="cpu", context_tokens_max=1 << 30), "engine.context_tokens_max: must be at most the model's 262144"),
        (EngineConfig(device="tpu9000"), "engine.device: must be auto, cpu, cuda or cuda:N, is 'tpu9000'"),
        (EngineConfig(device="cpu", memory_fraction=1e-9), "engine.memory_fraction: leaves"),
    ],
)
def test_what_cannot_be_had_is_refused(model_dir: Path, config: EngineConfig, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        EagerEngine(model_dir, config, 8, 256)


def test_blocks_are_chosen_from_free_memory(model_dir: Path) -> None:
    config = EngineConfig(device="cpu", context_tokens_max=1000, memory_fraction=0.01)
    engine = EagerEngine(model_dir, config, sequences_max=3, step_tokens_max=256)
    # Never more than all sequences at full length can use.
    assert 1 <= engine.description.blocks <= math.ceil(3 * 1000 / 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_writes_the_same_tokens(model_dir: Path) -> None:
    found: list[list[int]] = []
    for device in ("cpu", "cuda"):
        config = EngineConfig(device=device, dtype="float32", block_tokens=16, blocks=64)
        engine = EagerEngine(model_dir, config, 8, 256)
        engine.add(RequestId(1), array("I", range(40)), Sampling())
        blocks = tuple(BlockId(place) for place in range(4))
        tokens = list(engine.step([Slice(RequestId(1), 0, 40, 0, blocks, True)])[0].tokens)
        while len(tokens) < 20:
            tokens += engine.step([Slice(RequestId(1), 39 + len(tokens), 1, 0, (), True)])[0].tokens
        found.append(tokens)
    assert found[0] == found[1]
