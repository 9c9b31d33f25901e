"""Outputs that engines keep to a grammar: with drafts, after a loss, on a beat, beside others; and schemas by the thousand."""

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from tokenizers import Tokenizer

from orchestrator.core.commands import Slice
from orchestrator.core.config import EngineConfig, SpeculationConfig, SpeculationMethod
from orchestrator.core.types import BlockId, RequestId, Sampling
from orchestrator.live.asked import Constraint, ConstraintKind
from orchestrator.live.text.checks import keepable
from orchestrator.live.text.grammars import Thoughts, Unkeepable, answer_part, whole
from tests.schemas import Schemas
from tests.workers.beat.beating import beat_engine
from tests.workers.split.test_split_identity import attention_of, ranks_of
from workers.engines.base import Engine, SliceOutput
from workers.engines.checkpoint import create_checkpoint
from workers.engines.eager import EagerEngine

BLOCK_TOKENS, BLOCKS, VOCABULARY = 16, 256, 512
END = VOCABULARY - 1
#: As many as the engine takes at once.
ROWS = 8
REPEATING = {"type": "array", "items": {"enum": ["again and again"]}, "minItems": 6, "maxItems": 6}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    create_checkpoint(folder, "qwen3", 7, layers=1, hidden=64, intermediate=96, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> EagerEngine:
    config = EngineConfig(name="eager", device="cpu", dtype="float32", block_tokens=BLOCK_TOKENS, blocks=BLOCKS, threads=1)
    return EagerEngine(model_dir, config, sequences_max=ROWS, step_tokens_max=256)


@pytest.fixture(scope="module")
def drafting(model_dir: Path) -> EagerEngine:
    """An engine whose draft model is the model itself."""
    speculation = SpeculationConfig(SpeculationMethod.DRAFT_MODEL, draft_model=str(model_dir))
    config = EngineConfig(device="cpu", dtype="float32", block_tokens=BLOCK_TOKENS, blocks=BLOCKS, speculation=speculation)
    return EagerEngine(model_dir, config, sequences_max=ROWS, step_tokens_max=256)


def grammar_of(schema: dict[str, Any]) -> str | Unkeepable:
    try:
        part = answer_part(Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema), "response_format.json_schema.schema"))
    except Unkeepable as error:
        return error
    return keepable(whole("@answer", (), (part,), part.field, Thoughts(), {}))


def constrained(schema: dict[str, Any], **more: Any) -> Sampling:
    grammar = grammar_of(schema)
    assert isinstance(grammar, str)
    return Sampling(stop_token_ids=(END,), grammar=grammar, **more)


def blocks_from(first: int) -> tuple[BlockId, ...]:
    return tuple(BlockId(first + place) for place in range(BLOCKS // ROWS))


def run(
    engine: Engine,
    samplings: Sequence[Sampling],
    most: int,
    given: Sequence[list[int]] | None = None,
    drafts: int = 0,
    first: int = 1,
    modelled: int = 0,
) -> list[list[int]]:
    """Return the outputs of requests that run together, up to `most` tokens each, after those that are `given`."""
    outputs = [list(one) for one in given or [[] for _ in samplings]]
    each = BLOCKS // max(ROWS, len(samplings))
    open_ones: list[int] = []
    for number, sampling in enumerate(samplings):
        tokens = array("I", [7, 8, 9, *outputs[number]])
        engine.add(RequestId(number + first), tokens, sampling, len(outputs[number]))
        blocks = tuple(BlockId(number * each + place) for place in range(each))
        [output] = engine.step([Slice(RequestId(number + first), 0, len(tokens), 0, blocks, True)])
        assert output.failure is None, output.failure
        outputs[number] += output.tokens
        open_ones += [] if output.stopped else [number]
    while open_ones:
        slices = [Slice(RequestId(one + first), 2 + len(outputs[one]), 1, 0, (), True, drafts, modelled) for one in open_ones]
        for one, output in zip(list(open_ones), engine.step(slices), strict=True):
            assert output.failure is None, output.failure
            outputs[one] += output.tokens
            if output.stopped or len(outputs[one]) >= most:
                open_ones.remove(one)
    for number in range(len(samplings)):
        engine.forget(RequestId(number + first))
    return outputs


def test_the_end_comes_where_the_grammar_may_end(engine: EagerEngine, tokenizer: Tokenizer) -> None:
    [output] = run(engine, [constrained({"enum": ["yes", "no"]})], 40)
    assert output[-1] == END
    assert tokenizer.decode(output) in ('"yes"', '"no"')


def test_log_probabilities_are_those_of_the_model(engine: EagerEngine) -> None:
    engine.add(RequestId(1), array("I", [7, 8, 9]), constrained({"const": 5}, logprobs=2))
    engine.add(RequestId(2), array("I", [7, 8, 9]), Sampling(logprobs=2))
    slices = [Slice(RequestId(one), 0, 3, 0, (BlockId(one),), True) for one in (1, 2)]
    bound, free = engine.step(slices)
    assert bound.logprobs[0].top == free.logprobs[0].top
    assert bound.tokens != free.tokens
    for one in (1, 2):
        engine.forget(RequestId(one))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_change_nothing(engine: EagerEngine, tokenizer: Tokenizer, temperature: float) -> None:
    sampling = constrained(REPEATING, temperature=temperature, seed=5)
    [alone] = run(engine, [sampling], 200)
    [drafted] = run(engine, [sampling], 200, drafts=6)
    assert drafted == alone
    jsonschema.validate(json.loads(tokenizer.decode(alone)), REPEATING)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_model_is_kept_to_the_grammar_as_well(
    engine: EagerEngine, drafting: EagerEngine, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    outputs: list[SliceOutput] = []

    def step(slices: Sequence[Slice], compute: Any = drafting.step) -> list[SliceOutput]:
        outputs.extend(found := compute(slices))
        return found

    sampling = constrained(REPEATING, temperature=temperature, seed=5)
    free = Sampling(temperature=1.0, seed=3, stop_token_ids=(END,))
    alone = run(engine, [sampling, free], 60)
    monkeypatch.setattr(drafting, "step", step)
    assert [output[:60] for output in run(drafting, [sampling, free], 60, modelled=6)] == alone
    if temperature == 0.0:  # it drafts for itself, and the most likely token of those that may come is what comes
        outputs.clear()
        assert run(drafting, [sampling], 200, modelled=6) == run(engine, [sampling], 200)
        assert [output for output in outputs if len(output.tokens) <= output.drafted and not output.stopped] == []
        assert len(outputs) < 60


def test_what_goes_on_elsewhere_has_the_tokens_it_would_have_had(engine: EagerEngine) -> None:
    sampling = constrained(REPEATING, temperature=1.0, seed=5)
    [expected] = run(engine, [sampling], 200)
    for generated in (1, 7, len(expected) - 1):
        assert run(engine, [sampling], 200, [expected[:generated]]) == [expected]


@pytest.mark.slow
def test_what_loses_its_blocks_goes_on_as_if_nothing_had_happened(engine: EagerEngine) -> None:
    sampling = constrained(REPEATING, temperature=1.0, seed=5)
    [expected] = run(engine, [sampling], 200)
    prompt = array("I", [7, 8, 9])
    for after in (1, 6, 20):
        engine.add(RequestId(1), prompt, sampling)
        found = list(engine.step([Slice(RequestId(1), 0, 3, 0, blocks_from(0), True)])[0].tokens)
        while len(found) < after:
            found += engine.step([Slice(RequestId(1), 2 + len(found), 1, 0, (), True, 3)])[0].tokens
        # Another has its blocks in the meantime; prompt and output are computed again elsewhere, in parts.
        assert run(engine, [sampling], 200, first=2) == [expected]
        known = 3 + len(found)
        for start in range(0, known, 5):
            told = blocks_from(100) if start == 0 else ()
            [output] = engine.step([Slice(RequestId(1), start, min(5, known - start), 0, told, start + 5 >= known)])
        found += output.tokens
        while not output.stopped:
            [output] = engine.step([Slice(RequestId(1), 2 + len(found), 1, 0, (), True)])
            found += output.tokens
        engine.forget(RequestId(1))
        assert found == expected


@pytest.mark.slow
def test_a_split_group_keeps_to_grammars(model_dir: Path, engine: EagerEngine) -> None:
    samplings = [constrained(REPEATING), constrained(REPEATING, temperature=1.0, seed=4), Sampling()]
    expected = run(engine, samplings, 60)
    with ranks_of(model_dir, 2) as ranks:
        split = attention_of(model_dir, ranks, microbatches=2)
        assert run(split, samplings, 60) == expected
        assert run(split, samplings, 60, drafts=4) == expected
        split.close()


def test_company_changes_nothing(engine: EagerEngine) -> None:
    free = Sampling(temperature=1.0, seed=3, stop_token_ids=(END,))
    samplings = [constrained(REPEATING, temperature=1.0, seed=seed) for seed in range(3)]
    alone = [run(engine, [one], 60)[0] for one in samplings]
    together = run(engine, [samplings[0], free, samplings[1], free, samplings[2]], 60)
    assert [together[0], together[2], together[4]] == alone
    assert together[1] == together[3] == run(engine, [free], 60)[0]


def test_a_grammar_that_its_output_has_left_ends_its_request_alone(engine: EagerEngine) -> None:
    engine.add(RequestId(1), array("I", [7, 8, 9, 300]), constrained({"const": 5}), 1)
    engine.add(RequestId(2), array("I", [7, 8, 9]), Sampling())
    slices = [Slice(RequestId(1), 0, 4, 0, (BlockId(1),), True), Slice(RequestId(2), 0, 3, 0, (BlockId(2),), True)]
    broken, other = engine.step(slices)
    assert broken.failure is not None
    assert "cannot be kept to its grammar" in broken.failure
    assert len(other.tokens) == 1
    for one in (1, 2):
        engine.forget(RequestId(one))


@pytest.mark.slow
def test_an_engine_on_a_beat_keeps_to_grammars(model_dir: Path, engine: EagerEngine) -> None:
    sampling = constrained(REPEATING)
    expected = run(engine, [sampling], 200)
    process = beat_engine(model_dir, blocks=BLOCKS)
    try:
        assert run(process, [sampling], 200) == expected
    finally:
        with suppress(AttributeError):
            process.close()


# --- schemas ----------------------------------------------------------------------------------------------------------


def leaning(tokenizer: Tokenizer) -> dict[int, float]:
    """Return biases with which a model that knows nothing comes to an end: towards ends of texts, lists and objects."""
    bias = {token: 4.0 for mark in ('"', "}", "]") if (token := tokenizer.token_to_id(mark)) is not None}
    blank = {token: -6.0 for token in range(VOCABULARY) if tokenizer.decode([token]).isspace()}
    return {**bias, **blank, END: 8.0}


def outcomes(engine: EagerEngine, tokenizer: Tokenizer, count: int, seed: int) -> Counter[str]:
    """Return what became of some schemas; fails for an output that ended and does not fit its schema."""
    made, found = Schemas(seed), Counter[str]()
    bias = leaning(tokenizer)
    kept: list[tuple[dict[str, Any], Sampling]] = []
    for number in range(count):
        schema = made.make()
        grammar = grammar_of(schema)
        if isinstance(grammar, Unkeepable):
            assert grammar.field.startswith("response_format.json_schema.schema")
            found["refused"] += 1
        else:
            kept.append((schema, Sampling(1.0, seed=number, stop_token_ids=(END,), logit_bias=bias, grammar=grammar)))
    for first in range(0, len(kept), ROWS):
        part = kept[first : first + ROWS]
        for (schema, _), output in zip(part, run(engine, [one for _, one in part], 400), strict=True):
            if output[-1] != END:
                found["unfinished"] += 1
                continue
            found["finished"] += 1
            # A leap second is a time in a schema's eyes, at any minute; what it says else of formats is checked.
            value = json.loads(tokenizer.decode(output))
            jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(value)
    return found


FORMATS = jsonschema.FormatChecker(["date", "uuid", "ipv4", "ipv6", "email"])


def test_a_few_schemas_are_kept_to(engine: EagerEngine, tokenizer: Tokenizer) -> None:
    found = outcomes(engine, tokenizer, 8, 1)
    assert found["finished"] > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thousands_of_schemas_are_kept_to_or_refused(engine: EagerEngine, tokenizer: Tokenizer) -> None:
    found = outcomes(engine, tokenizer, 2000, 2)
    assert found["finished"] > found["unfinished"]
    assert found["refused"] > 0, dict(found)
