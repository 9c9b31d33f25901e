"""Budgets of thinking are kept: asked for in each API's words, computed by a model that would think on, told in usage."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI, BadRequestError
from tokenizers import AddedToken

from orchestrator.core.config import ModelConfig
from tests.live.test_structured import MODEL, SCHEMA, USER, play, schema_format
from tests.live.test_structured_messages import talk_to
from workers.engines.checkpoint import create_checkpoint
from workers.engines.vocabulary import CHAT_TEMPLATE, build_tokenizer, write_json

pytestmark = pytest.mark.slow

VOCABULARY, BUDGET = 512, 23
BEGIN, CLOSE = VOCABULARY - 2, VOCABULARY - 1
#: The model itself never ends its thoughts.
THINKING_ON = {"seed": 5, "max_tokens": 60, "logit_bias": {str(CLOSE): -100}}


def thinking_model(directory: Path, template: str) -> Path:
    """Return a random model with tokens for thoughts."""
    create_checkpoint(
        directory, "qwen3", seed=3, layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128,
        context_tokens_max=2048, dtype="float32", vocabulary=VOCABULARY,
    )  # fmt: skip
    tokenizer = build_tokenizer(VOCABULARY - 2)
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in ("<think>", "</think>")])
    tokenizer.save(str(directory / "tokenizer.json"))
    ends = [tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")]
    changes = {"config.json": {"eos_token_id": ends}, "generation_config.json": {"eos_token_id": ends}}
    for name, change in {**changes, "tokenizer_config.json": {"chat_template": template}}.items():
        write_json(directory / name, json.loads((directory / name).read_text()) | change)
    return directory


@pytest.fixture(scope="module")
def opening(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose template opens its thoughts."""
    template = CHAT_TEMPLATE.replace("{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}")
    assert template != CHAT_TEMPLATE
    return thinking_model(tmp_path_factory.mktemp("opening"), template)


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model that begins its thoughts itself, if it is made to."""
    return thinking_model(tmp_path_factory.mktemp("beginning"), CHAT_TEMPLATE)


WORDS: dict[str, dict[str, Any]] = {
    "vLLM's": {"thinking_token_budget": BUDGET},
    "Qwen's": {"thinking_budget": BUDGET},
    "OpenRouter's": {"reasoning": {"max_tokens": BUDGET}},
    "DeepSeek's": {"thinking": {"type": "enabled", "budget_tokens": BUDGET}},
}


@pytest.mark.parametrize("words", WORDS)
def test_a_budget_is_kept_in_all_words_for_it(opening: Path, words: str) -> None:
    async def talk(client: AsyncOpenAI) -> None:
        asked: dict[str, Any] = {"model": MODEL, "messages": USER, "extra_body": WORDS[words], **THINKING_ON}
        whole = await client.chat.completions.create(**asked)
        assert whole.usage is not None
        assert whole.usage.completion_tokens_details is not None
        assert whole.usage.completion_tokens_details.reasoning_tokens == BUDGET
        message = whole.choices[0].message
        assert message.content
        thoughts, content, usage = "", "", None
        async for chunk in await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                thoughts += getattr(choice.delta, "reasoning_content", None) or ""
                content += choice.delta.content or ""
        assert (thoughts, content) == (message.model_dump()["reasoning_content"], message.content)
        assert usage is not None
        assert usage.completion_tokens_details == whole.usage.completion_tokens_details
        assert usage.completion_tokens == whole.usage.completion_tokens

    play(opening, talk)


def test_thoughts_that_the_answer_begins_are_kept_short_and_what_follows_is_what_was_asked(beginning: Path) -> None:
    async def talk(client: AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(
            model=MODEL, messages=USER, response_format=schema_format(SCHEMA), seed=5, max_tokens=700,
            logit_bias={str(CLOSE): -100, str(BEGIN): 100}, extra_body={"thinking_token_budget": BUDGET},
        )  # fmt: skip
        assert answer.usage is not None
        assert answer.usage.completion_tokens_details is not None
        assert answer.usage.completion_tokens_details.reasoning_tokens == BUDGET
        assert answer.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(answer.choices[0].message.content or ""), SCHEMA)

    play(beginning, talk)


def test_thinking_of_messages_ends_with_its_budget(opening: Path) -> None:
    async def talk(client: AsyncAnthropic) -> None:
        asked: Any = {
            "model": MODEL, "messages": USER, "max_tokens": 60, "thinking": {"type": "enabled", "budget_tokens": BUDGET},
            "extra_body": {"temperature": 0},
        }  # fmt: skip
        whole = await client.messages.create(**asked)
        async with client.messages.stream(**asked) as stream:
            streamed = await stream.get_final_message()
        for message in (whole, streamed):
            assert [block.type for block in message.content] == ["thinking", "text"]

    talk_to(opening, talk)


def test_a_budget_that_must_be_kept_and_cannot_be_is_refused(opening: Path) -> None:
    async def talk(client: AsyncOpenAI) -> None:
        with pytest.raises(BadRequestError, match="cannot be limited") as caught:
            await client.chat.completions.create(
                model=MODEL, messages=USER, max_tokens=9, extra_body={"thinking_token_budget": 5}
            )
        assert caught.value.param == "thinking_token_budget"
        # In other words for it it is advice.
        await client.chat.completions.create(model=MODEL, messages=USER, max_tokens=9, extra_body={"thinking_budget": 5})

    play(opening, talk, model=ModelConfig(reasoning_parser="none"))
