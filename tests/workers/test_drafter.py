"""A draft model beside the model: what it drafts depends on the text alone, is bounded, and changes no token."""

import json
import random
from array import array
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bench.quoting import cut_checkpoint
from orchestrator.core.commands import Slice
from orchestrator.core.config import ConfigError, EngineConfig, SpeculationConfig, SpeculationMethod
from orchestrator.core.types import BlockId, RequestId, Sampling
from tests.workers.test_eager import CONFIG as FEW_BLOCKS
from tests.workers.test_eager import WISHES, outputs_of, tokens_of
from workers.engines import drafter
from workers.engines.checkpoint import create_checkpoint
from workers.engines.drafter import IDLE_STEPS, PIECE_TOKENS, UNREAD_MAX, Drafter, Window
from workers.engines.eager import EagerEngine

VOCABULARY = 500
CONFIG = replace(FEW_BLOCKS, blocks=160)


@pytest.fixture(scope="module", params=["llama", "deepseek_v3"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of either kind of attention; beside it `draft`, its first layers."""
    directory = tmp_path_factory.mktemp("models")
    create_checkpoint(directory / "model", request.param, 7, layers=3, hidden=64, intermediate=96)
    cut_checkpoint(directory / "model", directory / "draft", 2)
    torch.set_num_threads(1)
    return directory / "model"


def config_of(draft: Path, **more: int) -> EngineConfig:
    return replace(CONFIG, speculation=SpeculationConfig(SpeculationMethod.DRAFT_MODEL, draft_model=str(draft), **more))


def prompts_of(*lengths: int) -> list[list[int]]:
    source = random.Random(9)
    return [[source.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


class Text:
    """One request in an engine, step by step."""

    def __init__(
        self, engine: EagerEngine, number: int, tokens: Sequence[int], sampling: Sampling | None = None, generated: int = 0
    ) -> None:
        self._engine = engine
        self.request = RequestId(number)
        self.tokens = list(tokens)
        engine.add(self.request, array("I", tokens), sampling or Sampling(), generated)
        self._table = tuple(BlockId(number * 32 + place) for place in range(32))
        [output] = engine.step([Slice(self.request, 0, len(tokens), 0, self._table, True)])
        self.tokens += output.tokens

    def step(self, most: int) -> tuple[int, int] | None:
        """Write on; return how many tokens a draft model drafted, and how many were right; None if it did nothing."""
        [output] = self._engine.step([Slice(self.request, len(self.tokens) - 1, 1, 0, (), True, 0, most)])
        self.tokens += output.tokens
        return (output.drafted, len(output.tokens) - 1) if output.drafting_s is not None else None


@pytest.mark.slow
@pytest.mark.parametrize("wish", list(WISHES))
def test_drafts_of_a_model_change_neither_tokens_nor_their_probabilities(model_dir: Path, wish: str) -> None:
    prompts, sampling = prompts_of(3, 17, 30), WISHES[wish]
    plain = outputs_of(EagerEngine(model_dir, CONFIG, 8, 256), prompts, sampling, None)
    drafted = outputs_of(EagerEngine(model_dir, config_of(model_dir.with_name("draft")), 8, 256), prompts, sampling, None, 5)
    assert [tokens_of(outputs) for outputs in drafted] == [tokens_of(outputs) for outputs in plain]
    assert sum(output.drafted for outputs in drafted for output in outputs) > 30
    for before, after in zip(plain, drafted, strict=True):
        chances = [[one.logprob for output in outputs for one in output.logprobs] for outputs in (before, after)]
        assert chances[0] == pytest.approx(chances[1], abs=1e-4)


def test_a_model_that_drafts_for_itself_is_always_right(model_dir: Path) -> None:
    engine = EagerEngine(model_dir, config_of(model_dir), 8, 256)
    outputs = outputs_of(engine, prompts_of(3, 12, 15), Sampling(), None, 5)
    assert [len(of) for of in outputs] == [8] * 3  # the prompt, six times six tokens, and the last three
    assert [output for of in outputs for output in of if len(output.tokens) <= output.drafted] == []


def test_what_is_drafted_depends_on_the_text_alone(model_dir: Path) -> None:
    # Sampled, so that most drafts are wrong and what was read of them has to go.
    [prompt] = prompts_of(10)
    engine = EagerEngine(model_dir, config_of(model_dir.with_name("draft")), 8, 256)
    alone = EagerEngine(model_dir.with_name("draft"), CONFIG, 8, 256)
    text = Text(engine, 0, prompt, Sampling(temperature=1.0, seed=4))
    lengths: set[int] = set()
    for number in range(25):
        window = engine._drafter._windows.get(text.request) if engine._drafter is not None else None
        known = list(text.tokens)
        drafted = text.step(1 + number % 5)
        assert drafted is not None
        window = window or some_window(engine)
        expected = Text(alone, 1, known)
        while len(expected.tokens) < len(known) + drafted[0]:
            expected.step(0)
        assert window.tokens[: len(known) + drafted[0]].tolist() == expected.tokens
        alone.forget(expected.request)
        lengths.add(drafted[1])
    assert len(lengths) > 1, "all drafts were as right as each other"


def some_window(engine: EagerEngine) -> Window:
    assert engine._drafter is not None
    return next(iter(engine._drafter._windows.values()))


@pytest.mark.parametrize("generated", [1, 9, 20])
def test_what_goes_on_elsewhere_is_drafted_for_there(model_dir: Path, generated: int) -> None:
    # The model drafts for itself: all that it says of a text that came from elsewhere is right.
    [prompt] = prompts_of(30)
    plain = Text(EagerEngine(model_dir, CONFIG, 8, 256), 0, prompt)
    while len(plain.tokens) < 80:
        plain.step(0)
    engine = EagerEngine(model_dir, config_of(model_dir), 8, 256)
    text = Text(engine, 0, plain.tokens[: 30 + generated], generated=generated)
    done = [text.step(4) for _ in range(6)]
    assert text.tokens == plain.tokens[: len(text.tokens)]
    assert done[0] == (0, 0)  # it reads
    assert done[1:] == [(4, 4)] * 5


def test_a_long_text_is_read_in_pieces_before_anything_is_drafted(model_dir: Path) -> None:
    [prompt] = prompts_of(400)
    engine = EagerEngine(model_dir, config_of(model_dir.with_name("draft")), 8, 512)
    text = Text(engine, 0, prompt)
    read: list[int] = []
    while (done := text.step(3)) == (0, 0):
        read.append(some_window(engine).computed)
    assert done is not None
    assert done[0] == 3
    assert read[0] == PIECE_TOKENS
    assert [after for before, after in pairwise(read) if after > 2 * before + PIECE_TOKENS] == []
    assert read[-1] >= 400 - UNREAD_MAX


@pytest.mark.slow
def test_a_text_is_seen_through_a_window_that_begins_anew_when_it_is_full(model_dir: Path) -> None:
    # The model drafts for itself: what it cannot see is all that makes it wrong.
    [prompt] = prompts_of(120)
    engine = EagerEngine(model_dir, config_of(model_dir, draft_context_tokens_max=128), 8, 512)
    plain = Text(EagerEngine(model_dir, CONFIG, 8, 512), 0, prompt)
    text = Text(engine, 0, prompt)
    firsts: list[int] = []
    right = drafted = 0
    while len(text.tokens) < 400:
        done = text.step(6)
        window = some_window(engine)
        firsts.append(window.first)
        assert len(window.tokens) <= 128 + 6
        if done is not None and window.first == 0:
            right, drafted = right + done[1], drafted + done[0]
    while len(plain.tokens) < 400:
        plain.step(0)
    assert text.tokens[:400] == plain.tokens
    assert right == drafted > 0
    assert len(set(firsts)) >= 3


def test_there_are_no_more_windows_than_are_allowed_and_idle_ones_go(model_dir: Path) -> None:
    engine = EagerEngine(model_dir, config_of(model_dir.with_name("draft"), draft_sequences_max=2), 8, 256)
    texts = [Text(engine, number, prompt) for number, prompt in enumerate(prompts_of(5, 6, 7, 8))]
    assert [text.step(3) is not None for text in texts] == [True, True, False, False]
    engine.forget(texts[0].request)
    assert [text.step(3) is not None for text in texts[1:]] == [True, True, False]
    for _ in range((IDLE_STEPS - 2) // 2):  # the third drafts, the fourth finds no room
        assert texts[3].step(3) is None
        assert texts[2].step(3) is not None
    assert texts[3].step(3) is not None  # the second has not drafted for so long
    assert texts[1].step(3) is None


def test_what_is_kept_is_bounded_by_the_memory_for_kv(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(model_dir.with_name("draft"))
    monkeypatch.setattr("workers.engines.eager.CPU_POOL_BYTES_MAX", 16 * 1024**2)
    engine = EagerEngine(model_dir, config, 64, 256)
    assert engine._drafter is not None
    size = engine._drafter._pool.slabs.numel()
    assert 0 < size <= 2 * 1024**2
    monkeypatch.setattr("workers.engines.eager.CPU_POOL_BYTES_MAX", 1024)
    with pytest.raises(ConfigError, match=r"^engine\.speculation\.draft_context_tokens_max: a window takes \d+ bytes, and there"):
        EagerEngine(model_dir, config, 64, 256)


def test_what_is_read_is_forgotten_with_its_request(model_dir: Path) -> None:
    engine = EagerEngine(model_dir, config_of(model_dir.with_name("draft")), 8, 256)
    for number, prompt in enumerate(prompts_of(5, 6, 7)):
        text = Text(engine, number, prompt)
        text.step(3)
        engine.forget(text.request)
        engine.forget(text.request)
    assert engine._drafter is not None
    assert not engine._drafter._windows
    assert len(engine._drafter._free) == 8


@pytest.mark.parametrize(
    ("draft", "problem"),
    [
        ({"vocabulary": 320}, "has a vocabulary of 320 tokens, {model} one of 512"),
        ({"context_tokens_max": 100}, "is for 100 tokens of context, which are too few"),
    ],
)
def test_a_draft_model_that_cannot_draft_is_refused(tmp_path: Path, model_dir: Path, draft: dict[str, int], problem: str) -> None:
    create_checkpoint(tmp_path, "llama", 3, layers=1, hidden=32, intermediate=32, **draft)
    with pytest.raises(ConfigError) as raised:
        EagerEngine(model_dir, config_of(tmp_path), 8, 256)
    said = problem.format(model=model_dir)
    assert str(raised.value) == f"engine.speculation.draft_model: {tmp_path} {said}"


def test_a_draft_model_with_another_tokenizer_is_refused(tmp_path: Path, model_dir: Path) -> None:
    create_checkpoint(tmp_path, "llama", 3, layers=1, hidden=32, intermediate=32)
    path = tmp_path / "tokenizer.json"
    written = json.loads(path.read_text())
    tokens = written["model"]["vocab"]
    one, other = (next(text for text, number in tokens.items() if number == wanted) for wanted in (70, 71))
    tokens[one], tokens[other] = tokens[other], tokens[one]
    path.write_text(json.dumps(written))
    with pytest.raises(ConfigError) as raised:
        EagerEngine(model_dir, config_of(tmp_path), 8, 256)
    said = f"{tmp_path} has another tokenizer than {model_dir}: token 70 is not {one!r} there"
    assert str(raised.value) == f"engine.speculation.draft_model: {said}"


def test_reading_takes_what_it_may_of_a_step(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EagerEngine(model_dir, config_of(model_dir.with_name("draft")), 8, 512)
    model = engine._drafter
    assert isinstance(model, Drafter)
    now = [0.0]

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            now[0] += 1.0  # each reading takes a second
            return now[0]

    monkeypatch.setattr(drafter, "time", Clock)
    for step_s, piece in ((100.0, 2 * PIECE_TOKENS), (4.0, PIECE_TOKENS), (0.1, PIECE_TOKENS // 2)):
        model._piece = float(PIECE_TOKENS)
        text = Text(engine, 0, prompts_of(400)[0])
        model.stepped(step_s)
        assert text.step(3) == (0, 0)
        assert model._piece == piece
        engine.forget(text.request)
