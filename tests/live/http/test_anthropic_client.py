"""The official `anthropic` client against a served gateway: what it sends is understood and what it gets it understands."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import AsyncAnthropic

from orchestrator.core.types import FinishReason, ServiceClass
from orchestrator.live.text.models import ModelText
from orchestrator.live.turns import TurnFailed
from tests.live.http.test_gateway import foreign_session, peers_of
from tests.live.scripted import MODEL, TENANTS, Script, Served, make_model, serve
from workers.engines.vocabulary import CHAT_TEMPLATE

USER: Any = [{"role": "user", "content": "Hi there"}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "Tells the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "London"}}\n</tool_call>'
#: As the template shows it.
THINKING = CHAT_TEMPLATE.replace(
    "{{- '<|im_start|>assistant\\n' + content }}",
    "{{- '<|im_start|>assistant\\n' }}{%- if message.thinking %}{{- '<think>' + message.thinking + '</think>' }}{%- endif %}"
    "{{- content }}",
)
BLOCK = 64


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    folder: Path = tmp_path_factory.mktemp("model")
    make_model(folder, 8192)
    (folder / "chat_template.jinja").write_text(THINKING)
    return ModelText.load(folder, "scripted")


def play(text: ModelText, talk: Callable[[AsyncAnthropic, Served], Awaitable[None]], key: str = "sk-any", **gateway: Any) -> None:
    async def run() -> None:
        async with (
            serve(text, **gateway) as served,
            AsyncAnthropic(base_url=served.url, api_key=key, max_retries=0) as client,
        ):
            await talk(client, served)

    asyncio.run(run())


async def both(client: AsyncAnthropic, **asked: Any) -> list[anthropic.types.Message]:
    """Return an answer that came whole, and the same that was put together from a stream."""
    asked = {"model": MODEL, "max_tokens": 500, "messages": USER, **asked}
    whole = await client.messages.create(**asked)
    async with client.messages.stream(**asked) as stream:
        return [whole, await stream.get_final_message()]  # type: ignore[list-item]


def told(message: anthropic.types.Message) -> dict[str, Any]:
    """Return a message without what names it."""
    said = message.model_dump(exclude_none=True)
    for block in said["content"]:
        block.pop("parsed_output", None)
        if block["type"] == "tool_use":
            assert block.pop("id").startswith("call_")
    return {name: value for name, value in said.items() if name not in ("id", "model", "role", "type")}


def shown(text: ModelText, served: Served, place: int = 0) -> str:
    tokens = list(memoryview(served.driver.turns[place].prompt.tokens).cast("I"))
    return text.tokenizer.decode(tokens, skip_special_tokens=False)


def test_text_comes_whole_and_streamed(text: ModelText) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        served.driver.script = lambda turn: Script(["naïve ", "日本", " end"], cached_tokens=5)
        for message in await both(client, system="Be short.", extra_body={"temperature": 0.25, "top_p": 0.5, "top_k": 3}):
            assert message.id.startswith("msg_")
            assert (message.role, message.model) == ("assistant", MODEL)
            assert [block.text for block in message.content if block.type == "text"] == ["naïve 日本 end"]
            assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
            usage = message.usage
            assert usage.output_tokens == len(text.tokenizer.encode("naïve 日本 end").ids)
            assert usage.cache_read_input_tokens == 5
            assert usage.input_tokens == served.driver.turns[0].prompt.count - 5
        turn = served.driver.turns[0]
        assert (turn.sampling.temperature, turn.sampling.top_p, turn.sampling.top_k) == (0.25, 0.5, 3)
        assert turn.output_tokens_max == 500
        assert shown(text, served) == (
            "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
        )

    play(text, talk)


def test_events_come_in_their_order(text: ModelText) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        served.driver.script = lambda turn: Script(["<think>", "so", "</think>", "Look.", *CALL], cached_tokens=3)
        stream = await client.messages.create(model=MODEL, max_tokens=99, messages=USER, tools=[WEATHER], stream=True)
        events = [event async for event in stream]
        kinds = [event.type for event in events]
        assert kinds[0] == "message_start"
        assert kinds[-2:] == ["message_delta", "message_stop"]
        blocks = [kind for kind in kinds if kind.startswith("content_block") and kind != "content_block_delta"]
        assert blocks == ["content_block_start", "content_block_stop"] * 3
        deltas = [event.delta.type for event in events if event.type == "content_block_delta"]
        assert list(dict.fromkeys(deltas)) == ["thinking_delta", "signature_delta", "text_delta", "input_json_delta"]
        first = events[0]
        assert first.type == "message_start"
        assert first.message.usage.cache_read_input_tokens == 3
        async with client.messages.stream(model=MODEL, max_tokens=99, messages=USER) as raw:
            lines = [line async for line in raw.response.aiter_lines()]
        assert 'data: {"type":"ping"}' in lines
        named = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
        assert named == [json.loads(line.removeprefix("data: "))["type"] for line in lines if line.startswith("data: ")]

    play(text, talk)


def test_tools_are_called_one_after_another(text: ModelText) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        served.driver.script = lambda turn: Script(["Let me look.", "\n", *CALL, "\n", *CALL])
        called = {"type": "tool_use", "name": "get_weather", "input": {"city": "London"}}
        whole, streamed = await both(client, tools=[WEATHER])
        assert told(whole)["content"] == [{"type": "text", "text": "Let me look."}, called, called]
        assert told(whole)["stop_reason"] == "tool_use"
        assert told(streamed) == told(whole)
        assert len({block.id for block in whole.content if block.type == "tool_use"}) == 2
        for message in await both(client, tools=[WEATHER], tool_choice={"type": "auto", "disable_parallel_tool_use": True}):
            assert told(message)["content"] == [{"type": "text", "text": "Let me look."}, called]
        assert '{"type": "function", "function": {"name": "get_weather", "description": "Tells the weather.", ' in shown(
            text, served
        )

    play(text, talk)


def test_results_of_tools_are_shown_as_the_template_has_them(text: ModelText) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        served.driver.script = lambda turn: Script(["Look.", *CALL, *CALL])
        answer = await client.messages.create(model=MODEL, max_tokens=99, messages=USER, tools=[WEATHER])
        first, second = (block.id for block in answer.content if block.type == "tool_use")
        results: Any = [
            {"type": "tool_result", "tool_use_id": first, "content": [{"type": "text", "text": "Rain"}]},
            {"type": "tool_result", "tool_use_id": second, "content": "no such city", "is_error": True},
            {"type": "text", "text": "And now?"},
        ]
        messages = [*USER, {"role": "assistant", "content": answer.content}, {"role": "user", "content": results}]
        await client.messages.create(model=MODEL, max_tokens=99, messages=messages, tools=[WEATHER])
        before, after = shown(text, served), shown(text, served, 1)
        assert after == (
            f"{before}Look.\n{CALL}\n{CALL}<|im_end|>\n"
            "<|im_start|>user\n<tool_response>\nRain\n</tool_response><|im_end|>\n"
            "<|im_start|>user\n<tool_response>\nError: no such city\n</tool_response><|im_end|>\n"
            "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
        )

    play(text, talk)


@pytest.mark.parametrize(
    ("asked", "wanted", "tier"),
    [
        ({}, ServiceClass.STANDARD, "standard"),
        ({"service_tier": "standard_only"}, ServiceClass.STANDARD, "standard"),
        ({"service_tier": "batch"}, ServiceClass.BATCH, "batch"),
        ({"service_tier": "auto", "speed": "fast"}, ServiceClass.INTERACTIVE, "priority"),
    ],
)
def test_tiers_name_classes(text: ModelText, asked: Any, wanted: ServiceClass, tier: str) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        message = await client.messages.create(model=MODEL, max_tokens=9, messages=USER, **asked)
        assert (served.driver.turns[0].service_class, message.usage.service_tier) == (wanted, tier)

    play(text, talk)


def test_documents_that_are_text_are_shown(text: ModelText) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        document = {
            "type": "document",
            "source": {"type": "text", "media_type": "text/plain", "data": "It rains."},
            "title": "Sky",
        }
        found = {"type": "search_result", "source": "http://a", "title": "Rain", "content": [{"type": "text", "text": "Often."}]}
        result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "tool_reference", "tool_name": "rain"}, found]}
        messages: Any = [{"role": "user", "content": [result, document, found, {"type": "text", "text": "Why?"}]}]
        await client.messages.create(model=MODEL, max_tokens=9, messages=messages)
        told_result = "The tool rain can be called.\nRain\nhttp://a\nOften."
        assert f"<tool_response>\n{told_result}\n</tool_response>" in shown(text, served)
        assert "<|im_start|>user\nSky\nIt rains.\nRain\nhttp://a\nOften.\nWhy?<|im_end|>" in shown(text, served)

    play(text, talk)


def test_neighbours_of_one_role_are_one_message_and_billing_lines_none(text: ModelText) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        system: Any = [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=0af;"},
            {"type": "text", "text": "You are an agent."},
            {"type": "text", "text": "Be short."},
        ]
        messages: Any = [
            *USER,
            {"role": "user", "content": [{"type": "text", "text": "Who?"}, {"type": "text", "text": "When?"}]},
        ]
        await client.messages.create(model=MODEL, max_tokens=9, system=system, messages=messages)
        assert shown(text, served) == (
            "<|im_start|>system\nYou are an agent.\nBe short.<|im_end|>\n"
            "<|im_start|>user\nHi there\nWho?\nWhen?<|im_end|>\n<|im_start|>assistant\n"
        )

    play(text, talk)


LATE: Any = [
    {"role": "user", "content": [{"type": "text", "text": "Who?", "cache_control": {"type": "ephemeral"}}]},
    {"role": "system", "content": "There are agents."},
    {"role": "user", "content": "When?"},
]
STRICT = "{% for m in messages %}{{ raise_exception('late') if m.role == 'system' and not loop.first }}{% endfor %}"


@pytest.mark.parametrize("refusal", ["", STRICT])
def test_what_the_system_says_later_is_told_as_the_template_can(tmp_path: Path, refusal: str) -> None:
    make_model(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(refusal + CHAT_TEMPLATE)
    text = ModelText.load(tmp_path, "scripted")

    async def talk(client: AsyncAnthropic, served: Served) -> None:
        await client.messages.create(model=MODEL, max_tokens=9, system=WORDS, messages=LATE)
        [keep] = served.lives.asked
        said = shown(text, served).partition("<|im_start|>user\n")[2]
        if refusal:
            reminder = "<system-reminder>\nThere are agents.\n</system-reminder>"
            assert said == f"Who?\n{reminder}\nWhen?<|im_end|>\n<|im_start|>assistant\n"
        else:
            assert said.startswith("Who?<|im_end|>\n<|im_start|>system\nThere are agents.<|im_end|>\n<|im_start|>user\nWhen?")
        before = shown(text, served).partition("Who?")[0] + "Who?"
        assert keep.tokens == len(text.tokenizer.encode(before, add_special_tokens=False).ids) // BLOCK * BLOCK
        counted = await client.messages.count_tokens(model=MODEL, system=WORDS, messages=LATE)
        assert counted.input_tokens == served.driver.turns[0].prompt.count

    play(text, talk)


def test_thoughts_go_both_ways(text: ModelText) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        served.driver.script = lambda turn: Script(["<think>", "it may be", "</think>", "Yes"])
        whole, streamed = await both(client, thinking={"type": "enabled", "budget_tokens": 1024})
        assert told(whole) == told(streamed)
        thought, said = whole.content
        assert thought.type == "thinking"
        assert thought.thinking == "it may be"
        assert thought.signature
        assert said.type == "text"
        assert whole.usage.output_tokens_details is not None
        assert 0 < whole.usage.output_tokens_details.thinking_tokens < whole.usage.output_tokens
        sent: Any = [{"type": "redacted_thinking", "data": "abc"}, *whole.content]
        await client.messages.create(model=MODEL, max_tokens=9, messages=[*USER, {"role": "assistant", "content": sent}, *USER])
        assert "<think>it may be</think>Yes<|im_end|>" in shown(text, served, 2)

    play(text, talk)


def test_withheld_thoughts_come_back_in_their_signature(text: ModelText) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        served.driver.script = lambda turn: Script(["<think>", "ümlaut", "</think>", "Yes"])
        for message in await both(client, thinking={"type": "adaptive", "display": "omitted"}):
            thought = message.content[0]
            assert thought.type == "thinking"
            assert thought.thinking == ""
            sent: Any = [*USER, {"role": "assistant", "content": message.content}, *USER]
            await client.messages.create(model=MODEL, max_tokens=9, messages=sent)
            assert "<think>ümlaut</think>Yes<|im_end|>" in shown(text, served, len(served.driver.turns) - 1)

        async with client.messages.stream(
            model=MODEL, max_tokens=99, messages=USER, thinking={"type": "adaptive", "display": "omitted"}
        ) as raw:
            sent = [line async for line in raw.response.aiter_lines() if line.startswith("data: ")]
        # Whoever waits hears that something goes on.
        assert sent.index('data: {"type":"ping"}', 2) < next(
            place for place, line in enumerate(sent) if "signature_delta" in line
        )

    play(text, talk)


def test_a_model_that_thinks_regardless_does_so_in_silence(tmp_path: Path) -> None:
    make_model(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE + "{% if add_generation_prompt %}<think>{% endif %}")

    async def talk(client: AsyncAnthropic, served: Served) -> None:
        served.driver.script = lambda turn: Script(["it may be", "</think>", "Yes"])
        for message in await both(client, thinking={"type": "disabled"}):
            assert told(message)["content"] == [{"type": "text", "text": "Yes"}]

    play(ModelText.load(tmp_path, "scripted"), talk)


def test_it_is_said_what_ended_an_answer(text: ModelText) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        served.driver.script = lambda turn: Script([*"one STO two STOP three", None])
        for message in await both(client, stop_sequences=["never", "STOP"]):
            assert [block.text for block in message.content if block.type == "text"] == ["one STO two "]
            assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "STOP")
        tokens = len(text.tokenizer.encode("Hello world").ids)
        served.driver.script = lambda turn: Script(finish=FinishReason.LENGTH)
        for most, reason in ((tokens, "max_tokens"), (tokens + 1, "model_context_window_exceeded")):
            for message in await both(client, max_tokens=most):
                assert (message.stop_reason, message.stop_sequence) == (reason, None)

    play(text, talk)


def test_a_prompt_is_cached_without_an_answer(text: ModelText) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        for message in await both(client, max_tokens=0, messages=[{"role": "user", "content": WORDS}], cache_control=MARK):
            assert (message.content, message.stop_reason) == ([], "max_tokens")
            assert message.usage.output_tokens == 0
            assert message.usage.cache_creation_input_tokens == served.driver.turns[0].prompt.count // BLOCK * BLOCK
        assert served.driver.turns[0].output_tokens_max == 1

    play(text, talk)


def test_a_last_message_of_the_assistants_is_gone_on_with(text: ModelText) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        messages: Any = [*USER, {"role": "assistant", "content": "The answer is ("}]
        await client.messages.create(model=MODEL, max_tokens=9, messages=messages)
        assert shown(text, served).endswith("<|im_start|>assistant\nThe answer is (")
        await client.messages.create(model=MODEL, max_tokens=9, messages=[*USER, {"role": "assistant", "content": ""}])
        assert shown(text, served, 1).endswith("<|im_end|>\n<|im_start|>assistant\n")

    play(text, talk)


def test_no_tool_is_shown_where_none_is_to_be_called(text: ModelText) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        served.driver.script = lambda turn: Script([CALL])
        for message in await both(client, tools=[WEATHER], tool_choice={"type": "none"}):
            assert told(message)["content"] == [{"type": "text", "text": CALL}]
        assert "get_weather" not in shown(text, served)

    play(text, talk)


def test_tokens_are_counted_as_they_are_served(text: ModelText) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        asked: Any = {"model": MODEL, "messages": USER, "system": "Be short.", "tools": [WEATHER]}
        counted = await client.messages.count_tokens(**asked)
        assert served.driver.turns == []
        await client.messages.create(max_tokens=9, **asked)
        assert counted.input_tokens == served.driver.turns[0].prompt.count
        long = await client.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": "word " * 9000}])
        assert long.input_tokens > text.context_tokens_max
        for wrong in ({"model": "nobody"}, {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}):
            with pytest.raises(anthropic.APIStatusError) as refused:
                await client.messages.count_tokens(**{**asked, **wrong})
            assert refused.value.status_code in (400, 404)

    play(text, talk)


# --- what is cached -------------------------------------------------------------------------------------------------------

MARK: Any = {"type": "ephemeral"}
LONG: Any = {"type": "ephemeral", "ttl": "1h"}
WORDS = "some words that fill a few blocks of it " * 30


@pytest.mark.parametrize("cached_blocks", [0, 2, 100])
def test_tokens_that_were_read_created_and_neither_add_up(text: ModelText, cached_blocks: int) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        system: Any = [{"type": "text", "text": WORDS, "cache_control": LONG}]
        content: Any = [{"type": "text", "text": WORDS, "cache_control": MARK}, {"type": "text", "text": "What now? " * 40}]

        def script(turn: Any) -> Script:
            return Script(cached_tokens=min(cached_blocks * BLOCK, turn.prompt.count - 1))

        served.driver.script = script
        for message in await both(client, system=system, messages=[{"role": "user", "content": content}]):
            usage, prompt = message.usage, served.driver.turns[0].prompt
            long, short = (keep.tokens for keep in served.lives.asked[:2])
            # Each ends with the last whole block before the text that follows.
            behind = [shown(text, served).index(what) for what in ("<|im_end|>", "\nWhat now? ")]
            ends = [len(text.tokenizer.encode(shown(text, served)[:end], add_special_tokens=False).ids) for end in behind]
            assert [long, short] == [end // BLOCK * BLOCK for end in ends]
            assert [keep.hashes for keep in served.lives.asked[:2]] == [prompt.hashes[: n // BLOCK] for n in (long, short)]
            assert [keep.seconds for keep in served.lives.asked[:2]] == [3600.0, 300.0]
            read = usage.cache_read_input_tokens or 0
            created = usage.cache_creation
            assert created is not None
            assert created.ephemeral_1h_input_tokens == max(0, long - read)
            assert created.ephemeral_5m_input_tokens == max(0, short - max(long, read))
            total = created.ephemeral_1h_input_tokens + created.ephemeral_5m_input_tokens
            assert usage.cache_creation_input_tokens == total
            assert usage.input_tokens + total + read == prompt.count

    play(text, talk)


@pytest.mark.parametrize("where", ["tools", "system", "message", "result", "call", "top"])
def test_a_breakpoint_may_stand_anywhere(text: ModelText, where: str) -> None:
    def mark(place: str) -> dict[str, Any]:
        return {"cache_control": MARK} if place == where else {}

    async def talk(client: AsyncAnthropic, served: Served) -> None:
        called = {"type": "tool_use", "id": "call_1", "name": "get_weather", "input": {"city": WORDS}, **mark("call")}
        result = {"type": "tool_result", "tool_use_id": "call_1", "content": WORDS, **mark("result")}
        asked: Any = {
            "tools": [{**WEATHER, "description": WORDS, **mark("tools")}, {**WEATHER, "name": "other", "description": WORDS}],
            "system": [{"type": "text", "text": WORDS, **mark("system")}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": WORDS, **mark("message")}]},
                {"role": "assistant", "content": [called]},
                {"role": "user", "content": [result, {"type": "text", "text": WORDS}]},
            ],
            "extra_body": mark("top"),
        }
        await client.messages.create(model=MODEL, max_tokens=9, **asked)
        [keep] = served.lives.asked
        prompt = shown(text, served)
        tokens = list(memoryview(served.driver.turns[0].prompt.tokens).cast("I"))
        kept = text.tokenizer.decode(tokens[: keep.tokens], skip_special_tokens=False)
        rest = prompt.removeprefix(kept)
        # What comes right after the marked block, and how often its words are still to come.
        behind, left = {
            "tools": ('{"type": "function", "function": {"name": "other"', 5),
            "system": ("# Tools", 6),
            "message": ("<|im_start|>assistant", 3),
            "call": ("<tool_response>", 2),
            "result": ("</tool_response>", 1),
            "top": (None, 0),
        }[where]
        assert rest.count(WORDS.strip()) == left
        assert len(text.tokenizer.encode(rest[: rest.index(behind)] if behind else rest).ids) < BLOCK + 5

    play(text, talk)


def test_what_no_lease_keeps_is_not_said_to_be_created(text: ModelText) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        served.lives.blocks_max = 1
        messages: Any = [{"role": "user", "content": WORDS}]
        for message in await both(client, messages=messages, extra_body={"cache_control": MARK}):
            assert message.usage.cache_creation_input_tokens == BLOCK
            assert message.usage.input_tokens == served.driver.turns[0].prompt.count - BLOCK

    play(text, talk)


def test_breakpoints_are_limited_and_in_order(text: ModelText) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        def asked(*markers: Any) -> Any:
            return [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": one} for one in markers]}]

        for markers in ((MARK,) * 5, (MARK, LONG)):
            with pytest.raises(anthropic.BadRequestError, match="cache_control"):
                await client.messages.create(model=MODEL, max_tokens=9, messages=asked(*markers))
        await client.messages.create(model=MODEL, max_tokens=9, messages=asked(LONG, LONG, MARK, MARK))

    play(text, talk)


# --- what is refused ------------------------------------------------------------------------------------------------------


def cited(source: dict[str, str], enabled: bool) -> Any:
    return [{"role": "user", "content": [{"type": "document", "source": source, "citations": {"enabled": enabled}}]}]


PICTURE: Any = [{"role": "user", "content": [{"type": "text", "text": "See:"}, {"type": "image", "source": {"type": "url"}}]}]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"messages": PICTURE}, "messages.0.content.1: blocks of type 'image' are not served here"),
        ({"messages": []}, "messages: must hold"),
        ({"messages": cited({"type": "text", "data": "x"}, True)}, "messages.0.content.0.citations: citations"),
        ({"messages": cited({"type": "base64", "data": "x"}, False)}, "messages.0.content.0.source: documents of type 'base64'"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages.0.content: must not be empty"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        (
            {"messages": [*USER, {"role": "assistant", "content": "So "}]},
            "messages.1: text to go on with must not end in white space",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0: 'web_search_20250305'"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: needs tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name: 'g'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "sometimes"}}, "tool_choice.type"),
        ({"thinking": {"type": "often"}}, "thinking.type"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"extra_body": {"temperature": 3}}, "temperature"),
        ({"extra_body": {"top_p": 0}}, "top_p"),
        ({"extra_body": {"top_k": -1}}, "top_k"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"extra_body": {"temperature": "hot"}}, "temperature"),
        ({"extra_body": {"mcp_servers": [{"url": "x"}]}}, "mcp_servers"),
        ({"extra_body": {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}}, "context_management.edits.0"),
        ({"output_config": {"format": {"type": "text"}}}, "output_config.format.type"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, "prompt is too long: "),
    ],
)
def test_what_is_wrong_is_said_in_anthropics_words(text: ModelText, wrong: dict[str, Any], said: str) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        with pytest.raises(anthropic.BadRequestError) as refused:
            await client.messages.create(**{"model": MODEL, "max_tokens": 9, "messages": USER, **wrong})
        body: Any = refused.value.body
        assert body["type"] == "error"
        assert body["error"]["type"] == "invalid_request_error"
        assert said in body["error"]["message"]
        assert refused.value.request_id == body["request_id"]
        assert served.driver.turns == []

    play(text, talk)


def test_what_asks_for_nothing_is_ignored(text: ModelText) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        nothing = {
            "container": None,
            "mcp_servers": [],
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "unheard_of": {"a": [1]},
            "diagnostics": None,
        }
        await client.beta.messages.create(model=MODEL, max_tokens=9, messages=USER, betas=["any-2026"], extra_body=nothing)
        assert len(served.driver.turns) == 1

    play(text, talk)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(429, "rate_limit_error"), (503, "overloaded_error"), (504, "timeout_error"), (529, "overloaded_error"), (500, "api_error")],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_keep_their_status_and_say_when_to_come_back(text: ModelText, status: int, kind: str, stream: bool) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        failure = TurnFailed(status, "too_busy", "come back later", retry_after_s=2.2)
        served.driver.script = lambda turn: Script((), failure=failure)
        with pytest.raises(anthropic.APIStatusError) as refused:
            await client.messages.create(model=MODEL, max_tokens=9, messages=USER, stream=stream)
        assert refused.value.status_code == status
        assert refused.value.response.headers["retry-after"] == "2"
        body: Any = refused.value.body
        assert body["error"] == {"type": kind, "message": "come back later"}

    play(text, talk)


def test_a_failure_after_the_first_token_ends_the_stream_with_an_error(text: ModelText) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        served.driver.script = lambda turn: Script(["some"], failure=TurnFailed(500, "node_lost", "the node is gone"))
        stream = await client.messages.create(model=MODEL, max_tokens=9, messages=USER, stream=True)

        async def listen() -> None:
            async for _ in stream:
                pass

        with pytest.raises(anthropic.APIStatusError, match="the node is gone"):
            await listen()

    play(text, talk)


def test_keys_models_and_paths(text: ModelText) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        await client.messages.create(model="claude-opus-9", max_tokens=9, messages=USER)
        assert served.driver.turns[0].tenant == "acme"
        with pytest.raises(anthropic.NotFoundError) as missing:
            await client.messages.create(model="nobody", max_tokens=9, messages=USER)
        body: Any = missing.value.body
        assert body["error"] == {"type": "not_found_error", "message": "the model 'nobody' does not exist"}
        with pytest.raises(anthropic.AuthenticationError):
            await client.with_options(api_key="sk-bad").messages.create(model=MODEL, max_tokens=9, messages=USER)
        async with httpx.AsyncClient(base_url=served.url, headers={"x-api-key": "sk-good"}) as raw:
            for method, path, status, kind in (
                ("GET", "/v1/messages", 405, "invalid_request_error"),
                ("POST", "/v1/messages/batches", 404, "not_found_error"),
                ("POST", "/v1/messages", 413, "request_too_large"),
            ):
                answer = await raw.request(method, path, content=b"x" * 5000 if status == 413 else b"")
                assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)
                assert answer.json()["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]

    play(text, talk, key="sk-good", tenants=TENANTS, body_bytes_max=4096)


def test_models_are_listed_in_pages(text: ModelText) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        assert [model.id async for model in client.models.list(limit=1)] == [MODEL, "gpt-4o"]
        first = await client.models.list(limit=1)
        assert (first.first_id, first.last_id, first.has_more) == (MODEL, MODEL, True)
        before = await client.models.list(before_id="gpt-4o")
        assert ([model.id for model in before.data], before.has_more) == ([MODEL], False)
        one = await client.models.retrieve(MODEL)
        assert (one.id, one.type, one.display_name, one.max_input_tokens) == (MODEL, "model", MODEL, text.context_tokens_max)
        for wrong in ({"limit": 0}, {"after_id": "nobody"}):
            with pytest.raises(anthropic.BadRequestError):
                await client.models.list(**wrong)  # type: ignore[arg-type]
        with pytest.raises(anthropic.NotFoundError):
            await client.models.retrieve("nobody")

    play(text, talk)


@pytest.mark.parametrize(
    ("user", "session"),
    [
        ("user_1f_account_2e_session_3d-4c", "3d-4c"),
        ('{"device_id":"d","session_id":"3d-4c"}', "3d-4c"),
        ("somebody", None),
        ('{"session_id":', None),
    ],
)
def test_claude_code_names_its_session_within_its_user(text: ModelText, user: str, session: str | None) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        await client.messages.create(model=MODEL, max_tokens=9, messages=USER, metadata={"user_id": user})
        assert served.driver.turns[0].session == session
        named = {"x-claude-code-session-id": "header"}
        await client.messages.create(model=MODEL, max_tokens=9, messages=USER, metadata={"user_id": user}, extra_headers=named)
        assert served.driver.turns[1].session == "header"

    play(text, talk)


def test_agents_of_claude_code_work_for_their_session_or_for_another_agent(text: ModelText) -> None:
    async def talk(client: AsyncAnthropic, served: Served) -> None:
        session, agent = "x-claude-code-session-id", "x-claude-code-agent-id"
        for named in ({}, {agent: "a"}, {agent: "b", "x-claude-code-parent-agent-id": "a"}):
            headers = {session: "main", **named}
            await client.messages.create(model=MODEL, max_tokens=9, messages=USER, extra_headers=headers)
        assert [turn.session for turn in served.driver.turns] == ["main", "a", "b"]
        assert served.lives.begun == [("a", "main"), ("b", "a")]

    play(text, talk)


def test_a_session_named_by_its_user_is_served_by_its_owner(text: ModelText) -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack:
            gateways = [await stack.enter_async_context(serve(text, number)) for number in range(2)]
            for one in gateways:
                one.gateway.join(peers_of(gateways))
            client = await stack.enter_async_context(AsyncAnthropic(base_url=gateways[0].url, api_key="any", max_retries=0))
            asked: Any = {"model": MODEL, "messages": USER, "metadata": {"user_id": f"user_1_session_{foreign_session(2, 1)}"}}
            message = await client.messages.create(max_tokens=9, extra_headers={"x-request-id": "through"}, **asked)
            assert message._request_id == "through"
            assert [len(one.driver.turns) for one in gateways] == [0, 1]
            with pytest.raises(anthropic.BadRequestError) as refused:
                await client.messages.create(max_tokens=9, system=" ".join(["word"] * 9000), **asked)
            body: Any = refused.value.body
            assert refused.value.request_id == body["request_id"]

    asyncio.run(run())
