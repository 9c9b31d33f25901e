"""Thoughts that are as long as they may be end, whichever way their tokens come: one by one, drafted, generated elsewhere."""

import json
from array import array
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer

from orchestrator.core.config import SpeculationConfig, SpeculationMethod
from orchestrator.core.types import Sampling, ThoughtsLimit
from orchestrator.live.asked import Constraint, ConstraintKind
from orchestrator.live.text.checks import keepable
from orchestrator.live.text.grammars import Thoughts, answer_part, whole
from tests.workers.split.test_split_identity import attention_of, ranks_of
from tests.workers.test_grammars import END, REPEATING, drafting, engine, model_dir, run, tokenizer
from workers.engines.eager import EagerEngine
from workers.engines.thoughts import ThoughtsCount

__all__ = ["drafting", "engine", "model_dir", "tokenizer"]

#: Special tokens of the random model that stand for tags here; it writes neither by itself in these tests.
BEGIN, CLOSE = END - 2, END - 1
MOST = 40


def thinking(most: int, begin: int | None = None, **more: Any) -> Sampling:
    limit = ThoughtsLimit(most, CLOSE, () if begin is None else (begin,))
    return Sampling(stop_token_ids=(END,), logit_bias={CLOSE: -100.0}, thoughts=limit, **more)


def free(**more: Any) -> Sampling:
    return Sampling(stop_token_ids=(END,), logit_bias={CLOSE: -100.0}, **more)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("most", [0, 1, 17])
def test_the_end_comes_once_there_are_enough(engine: EagerEngine, drafting: EagerEngine, most: int, temperature: float) -> None:
    asked = thinking(most, temperature=temperature, seed=3)
    [output] = run(engine, [asked], MOST)
    [as_ever] = run(engine, [free(temperature=temperature, seed=3)], MOST)
    assert output[:most] == as_ever[:most]
    assert output[most] == CLOSE
    assert CLOSE not in output[most + 1 :]
    assert run(engine, [asked], MOST, drafts=6) == [output]
    # The draft model knows of no end of thoughts.
    assert [drafted[:MOST] for drafted in run(drafting, [asked], MOST, modelled=6)] == [output]
    for generated in (most, most + 1):
        assert run(engine, [asked], MOST, [output[:generated]]) == [output]


def test_a_plain_sequence_ends_its_thoughts_too(engine: EagerEngine) -> None:
    plain = Sampling(stop_token_ids=(END,), thoughts=ThoughtsLimit(9, CLOSE))
    outputs = run(engine, [plain, Sampling(stop_token_ids=(END,)), plain], MOST)
    assert outputs[0] == outputs[2]
    assert outputs[0][9] == CLOSE
    assert outputs[0][:9] == outputs[1][:9]


@pytest.mark.parametrize("before", [[], [20], [20, 21, 22]])
def test_thoughts_that_the_output_begins_are_counted_from_there(engine: EagerEngine, before: list[int]) -> None:
    [output] = run(engine, [thinking(5, BEGIN)], MOST, [[*before, BEGIN]])
    assert output.index(CLOSE) == len(before) + 1 + 5


@pytest.mark.parametrize("before", [[20], [20, 21, 22, 23, BEGIN], [BEGIN, 20, CLOSE]])
def test_what_has_no_thoughts_or_has_ended_them_goes_on(engine: EagerEngine, before: list[int]) -> None:
    [output] = run(engine, [thinking(5, BEGIN)], MOST, [before])
    assert CLOSE not in output[len(before) :]


def thinking_before_a_form(tokenizer: Tokenizer, most: int, **more: Any) -> Sampling:
    marks = {tokenizer.id_to_token(token): token for token in (BEGIN, CLOSE)}
    part = answer_part(Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(REPEATING), "response_format"))
    grammar = keepable(whole("@answer", (), (part,), part.field, Thoughts(tuple(marks), opened=True), marks))
    assert isinstance(grammar, str)
    return thinking(most, grammar=grammar, **more)


def test_a_form_is_kept_to_after_thoughts_that_had_to_end(
    engine: EagerEngine, drafting: EagerEngine, tokenizer: Tokenizer
) -> None:
    asked = thinking_before_a_form(tokenizer, 12)
    [output] = run(engine, [asked], 200)
    assert output.index(CLOSE) == 12
    jsonschema.validate(json.loads(tokenizer.decode(output[13:])), REPEATING)
    assert run(engine, [asked], 200, drafts=5) == [output]
    assert run(drafting, [asked], 200, modelled=5) == [output]
    assert run(engine, [asked], 200, [output[:10]]) == [output]


@pytest.mark.slow
def test_a_split_group_with_a_draft_model_ends_them_and_keeps_to_a_form(
    model_dir: Path, engine: EagerEngine, tokenizer: Tokenizer
) -> None:
    draws = {"temperature": 1.0, "seed": 4}
    asked = [thinking_before_a_form(tokenizer, 12), thinking_before_a_form(tokenizer, 7, **draws), thinking(9, **draws), free()]
    expected = run(engine, asked, 60)
    speculation = SpeculationConfig(SpeculationMethod.DRAFT_MODEL, draft_model=str(model_dir))
    with ranks_of(model_dir, 2) as ranks:
        split = attention_of(model_dir, ranks, microbatches=2, speculation=speculation)
        assert run(split, asked, 60) == expected
        for ways in ({"drafts": 4}, {"modelled": 4}, {"drafts": 2, "modelled": 4}):
            assert [output[:60] for output in run(split, asked, 60, **ways)] == expected
        split.close()


#: What begins thoughts in channels: a mark, the channel's name, another mark; and the name of the channel of answers.
CHANNEL, ANALYSIS, MESSAGE, FINAL = 20, 21, 22, 23
IN_CHANNELS = ThoughtsLimit(4, CLOSE, (CHANNEL, ANALYSIS, MESSAGE), FINAL)
BEFORE = [CHANNEL, ANALYSIS, MESSAGE]


@pytest.mark.parametrize(
    ("output", "chosen", "kept"),
    [
        ([CHANNEL], ANALYSIS, ANALYSIS),
        ([*BEFORE, 30, 31, 32], 33, 33),
        ([*BEFORE, 30, 31, 32, 33], 34, CLOSE),
        ([*BEFORE, 30, 31, 32, 33, CLOSE], 34, 34),
        ([*BEFORE, 30, CLOSE, 40, CHANNEL], ANALYSIS, ANALYSIS),
        ([*BEFORE, 30, CLOSE, 40, *BEFORE, 31, 32, 33], 34, CLOSE),
        ([*BEFORE, 30, 31, 32, 33, CLOSE, 40, CHANNEL], ANALYSIS, FINAL),
        ([*BEFORE, 30, 31, 32, 33, CLOSE, 40, CHANNEL], 24, 24),
        ([*BEFORE, 30, 31, 32, 33, CLOSE, 40], ANALYSIS, ANALYSIS),
        ([CHANNEL, FINAL, MESSAGE, *range(30, 60)], ANALYSIS, ANALYSIS),
    ],
)
def test_in_channels_all_thoughts_count_and_none_begin_once_there_are_enough(output: list[int], chosen: int, kept: int) -> None:
    prompt = [7, 8, CHANNEL]
    tokens = array("I", prompt + output)
    assert ThoughtsCount(IN_CHANNELS, len(prompt)).kept(chosen, tokens, 0, 0) == kept
    for drafted in range(len(output)):
        # As if the last ones were drafts, seen after a step that had them all before it, or none.
        one = ThoughtsCount(IN_CHANNELS, len(prompt))
        one.kept(chosen, tokens[: len(tokens) - drafted], 0, 0)
        assert one.kept(chosen, tokens, drafted, drafted) == kept


def test_an_end_that_is_no_token_fails_its_request_alone(model_dir: Path, engine: EagerEngine) -> None:
    with pytest.raises(AssertionError, match="token 512 is not in the model's vocabulary of 512"):
        run(engine, [Sampling(stop_token_ids=(END,), thoughts=ThoughtsLimit(3, END + 1))], MOST)
