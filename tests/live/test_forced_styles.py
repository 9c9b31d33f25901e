"""Calls that are forced, in every style that models write them in: computed by a random model, read by the official client."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openai import AsyncOpenAI
from tokenizers import AddedToken, Tokenizer

from orchestrator.core.config import ModelConfig
from orchestrator.live.text.expressions import expression_of
from orchestrator.live.text.reasoning import CHANNEL_END, FINAL, THOUGHTS
from orchestrator.live.text.styles import ToolStyle
from tests.live.test_structured import CHOICES, MODEL, SCHEMA, TOOLS, USER, play, schema_format
from workers.engines.checkpoint import create_checkpoint
from workers.engines.vocabulary import build_tokenizer, write_json

pytestmark = pytest.mark.slow

STYLES = [style for style in ToolStyle if style is not ToolStyle.NONE]
VOCABULARY = 512


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random model that has the marks of all styles as tokens."""
    directory = tmp_path_factory.mktemp("model")
    create_checkpoint(
        directory, "qwen3", seed=3, layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128,
        context_tokens_max=2048, dtype="float32", vocabulary=VOCABULARY,
    )  # fmt: skip
    marks = list(dict.fromkeys(mark for style in STYLES for mark in style.marks))
    tokenizer = build_tokenizer(VOCABULARY - len(marks) - 2)
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer.add_tokens([AddedToken(channel, normalized=False) for channel in (THOUGHTS, FINAL)])
    tokenizer.save(str(directory / "tokenizer.json"))
    ends = [tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>", "<|call|>", "<|return|>")]
    for name in ("config.json", "generation_config.json"):
        path = directory / name
        write_json(path, json.loads(path.read_text()) | {"eos_token_id": ends, "pad_token_id": ends[1]})
    return directory


def test_thoughts_in_a_channel_end_with_their_budget(model_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    # It thinks, and would think on.
    bias = {str(tokenizer.token_to_id(THOUGHTS)): 100, str(tokenizer.token_to_id(CHANNEL_END)): -100}

    async def talk(client: AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(
            model=MODEL, messages=USER, response_format=schema_format(SCHEMA), seed=5, max_tokens=700, logit_bias=bias,
            extra_body={"thinking_token_budget": 17},
        )  # fmt: skip
        assert answer.usage is not None
        assert answer.usage.completion_tokens_details is not None
        assert answer.usage.completion_tokens_details.reasoning_tokens == 17
        assert answer.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(answer.choices[0].message.content or ""), SCHEMA)

    play(model_dir, talk, model=ModelConfig(reasoning_parser="harmony"))


#: Of Qwen3-Coder's texts nothing but lists is kept to.
LISTED = {**SCHEMA, "properties": {**SCHEMA["properties"], "city": {"type": "string", "enum": ["paris", "rome"]}}}


@pytest.mark.parametrize("choice", CHOICES, ids=["required", "named"])
@pytest.mark.parametrize("style", STYLES)
def test_a_call_that_is_forced_is_written_in_the_style_of_the_model(model_dir: Path, style: ToolStyle, choice: Any) -> None:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    schema = LISTED if style is ToolStyle.QWEN3_CODER else SCHEMA
    [weather, now] = TOOLS
    tools = [{**weather, "function": {**weather["function"], "parameters": schema}}, now]
    asked: dict[str, Any] = {
        "model": MODEL, "messages": USER, "tools": tools, "tool_choice": choice, "parallel_tool_calls": False, "seed": 2,
        "max_tokens": 900, "logit_bias": {str(tokenizer.token_to_id(CHANNEL_END)): 100},
    }  # fmt: skip

    async def talk(client: AsyncOpenAI) -> None:
        whole = await client.chat.completions.create(**asked)
        async with client.chat.completions.stream(**asked) as stream:
            streamed = await stream.get_final_completion()
        for answer in (whole, streamed):
            [told] = answer.choices
            assert told.finish_reason == "tool_calls"
            assert not told.message.content
            [call] = told.message.tool_calls or ()
            assert call.type == "function"
            wanted = {"weather": schema, "now": {"const": {}}} if choice == "required" else {"weather": schema}
            jsonschema.validate(json.loads(call.function.arguments), wanted[call.function.name])

    play(model_dir, talk, model=ModelConfig(tool_parser=style.value))


FORMS = {
    "lark": 'start: "add \\"" NAME "\\"" LF (NUMBER LF)~1..2\nNAME: /[a-c\\\\é]{1,4}/\nNUMBER: /[0-9]{1,3}/\n%import common.LF',
    "regex": r'(say|add) "[a-c\\]{1,4}"\n[0-9]{1,3}',
}


@pytest.mark.parametrize("syntax", FORMS)
@pytest.mark.parametrize("style", STYLES)
def test_a_custom_tool_is_called_with_a_text_of_its_form(model_dir: Path, style: ToolStyle, syntax: str) -> None:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    form = {"type": "grammar", "syntax": syntax, "definition": FORMS[syntax]}
    asked: dict[str, Any] = {
        "model": MODEL, "input": "Say something.", "tools": [{"type": "custom", "name": "note", "format": form}],
        "tool_choice": {"type": "custom", "name": "note"}, "parallel_tool_calls": False, "max_output_tokens": 600,
        "extra_body": {"seed": 4, "logit_bias": {str(tokenizer.token_to_id(CHANNEL_END)): 100}},
    }  # fmt: skip

    async def talk(client: AsyncOpenAI) -> None:
        whole = await client.responses.create(**asked)
        async with client.responses.stream(**asked) as stream:
            streamed = await stream.get_final_response()
        for answer in (whole, streamed):
            [call] = [item for item in answer.output if item.type == "custom_tool_call"]
            assert re.fullmatch(expression_of(FORMS[syntax]) if syntax == "lark" else FORMS[syntax], call.input), call.input

    play(model_dir, talk, model=ModelConfig(tool_parser=style.value))
