"""What answers are kept to, and what cannot be asked of them together with that."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.core.types import Sampling
from orchestrator.live.asked import Asked, Constraint, ConstraintKind, Conversation, Limits, ToolUse
from orchestrator.live.binding import bound
from orchestrator.live.text.grammars import Unkeepable
from orchestrator.live.text.models import ModelText
from orchestrator.live.text.reasoning import ReasoningStyle
from orchestrator.live.text.styles import ToolStyle
from tests.live.scripted import MODEL, make_model
from tests.live.text.test_models import load, write
from tests.live.text.vocabularies import llama, suffixed, word_piece

MESSAGES = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "object", "properties": {}}}}]
CHOICE = Constraint(ConstraintKind.CHOICE, json.dumps(["a", "b"]), "structured_outputs")
BOUND = Asked(MODEL, Conversation(MESSAGES), constraint=CHOICE)
FORCED = Asked(MODEL, Conversation(MESSAGES, TOOLS, tool_use=ToolUse(forced=True)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    return make_model(tmp_path_factory.mktemp("model"), 256)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (replace(BOUND, limits=Limits(ignores_ends=True)), "ignore_eos"),
        (replace(BOUND, sampling=Sampling(output_tokens_min=3)), "min_tokens"),
        (replace(FORCED, limits=Limits(ignores_ends=True)), "ignore_eos"),
        (replace(FORCED, prompt=replace(FORCED.prompt, tools=None)), "tool_choice"),
    ],
)
def test_what_does_not_go_with_a_form_is_refused(model: ModelText, asked: Asked, field: str) -> None:
    with pytest.raises(Unkeepable) as caught:
        bound(asked, model, "", False)
    assert caught.value.field == field


def test_models_whose_tokens_have_no_text_of_their_own_keep_to_nothing(tmp_path: Path) -> None:
    write(tmp_path, "config.json", {"max_position_embeddings": 4096, "eos_token_id": 1, "vocab_size": 400})
    write(tmp_path, "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    for make, kept in ((llama, True), (word_piece, False), (suffixed, False)):
        make().save(str(tmp_path / "tokenizer.json"))
        model = load(tmp_path)
        assert bound(Asked(MODEL, Conversation(MESSAGES)), model, "", False) is None
        if kept:
            assert bound(BOUND, model, "", False) is not None
        else:
            with pytest.raises(Unkeepable, match="structured_outputs: tokens of this model have no text of their own"):
                bound(BOUND, model, "", False)


@pytest.mark.parametrize("by", ["tools", "thoughts"])
def test_calls_are_in_channels_if_the_answer_is_whatever_else_is_configured(model: ModelText, by: str) -> None:
    one = (
        replace(model, tool_style=ToolStyle.HARMONY) if by == "tools" else replace(model, reasoning_style=ReasoningStyle.HARMONY)
    )
    grammar = bound(FORCED, one, "", False)
    assert grammar is not None
    assert "to=functions.f" in grammar.rules


def test_an_answer_that_goes_on_with_a_message_in_a_channel_is_bound_as_text_and_not_to_calls(model: ModelText) -> None:
    one = replace(model, tool_style=ToolStyle.HARMONY)
    going_on = Conversation([*MESSAGES, {"role": "assistant", "content": "So"}], continues=True)
    grammar = bound(replace(BOUND, prompt=going_on), one, "", False)
    assert grammar is not None
    assert grammar.rules == "start: @answer"
    with pytest.raises(Unkeepable, match="cannot be kept to calls"):
        bound(replace(FORCED, prompt=replace(going_on, tools=TOOLS, tool_use=ToolUse(forced=True))), one, "", False)


def test_an_input_of_some_form_is_refused_where_calls_are_not_bound_unless_forced(model: ModelText) -> None:
    form = Constraint(ConstraintKind.REGEX, "[a-z]+", "tools[0].format.definition")
    may = Conversation(MESSAGES, TOOLS, tool_use=ToolUse(inputs={"f": form}))
    must = replace(may, tool_use=replace(may.tool_use, forced=True))
    assert bound(Asked(MODEL, may), model, "", False) is not None
    for style in (ToolStyle.LLAMA, ToolStyle.PYTHONIC):
        one = replace(model, tool_style=style)
        assert bound(Asked(MODEL, must), one, "", False) is not None
        with pytest.raises(Unkeepable, match="can be kept to in forced calls alone"):
            bound(Asked(MODEL, may), one, "", False)
