"""The official `openai` client against /v1/responses: what it sends is understood and what it gets it understands."""

import json
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import (
    ResponseCompletedEvent,
    ResponseCustomToolCall,
    ResponseFailedEvent,
    ResponseFunctionToolCall,
    ResponseIncompleteEvent,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseReasoningItem,
    ResponseStreamEvent,
)
from pydantic import BaseModel

from orchestrator.core.types import FinishReason
from orchestrator.live.text.models import ModelText
from orchestrator.live.turns import Turn, TurnFailed
from tests.live.scripted import MODEL, TENANTS, Script, Served, play_openai

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "strict": False,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
#: Its arguments would be kept to what no schema says.
UNKEEPABLE: Any = {"type": "function", "name": "f", "strict": True, "parameters": {"type": "object", "$ref": "http://elsewhere"}}


def formed(syntax: str, definition: str) -> Any:
    """Return a tool that takes a text of some form."""
    return {"type": "custom", "name": "c", "format": {"type": "grammar", "syntax": syntax, "definition": definition}}


CALL = '<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{}"}}}}\n</tool_call>'


def prompt_of(served: Served, turn: Turn) -> str:
    """Return a turn's prompt as text, with its special tokens."""
    tokens = list(memoryview(turn.prompt.tokens).cast("I"))
    return served.driver.text.tokenizer.decode(tokens, skip_special_tokens=False)


def answering(served: Served, *answers: str) -> None:
    """Let the model say these, turn by turn."""
    said = iter(answers)
    served.driver.script = lambda turn: Script([*next(said)])


def checked(events: list[ResponseStreamEvent]) -> list[str]:
    """Return the types of a stream's events, each once in a row, having seen that it is one stream from beginning to end."""
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    return kinds[:1] + [after for before, after in pairwise(kinds) if after != before]


def test_a_response_is_one_object(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        served.driver.script = lambda turn: Script(cached_tokens=5)
        answer = await client.responses.create(
            model=MODEL, input="Hi there", instructions="Be brief.", metadata={"a": "b"}, user="me", temperature=0.5
        )
        turn = served.driver.turns[0]
        assert prompt_of(served, turn) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
        )
        assert turn.sampling.temperature == 0.5
        assert turn.output_tokens_max == text.context_tokens_max - turn.prompt.count
        assert (answer.status, answer.output_text, answer.model) == ("completed", "Hello world", MODEL)
        assert (answer.metadata, answer.user, answer.temperature, answer.top_p) == ({"a": "b"}, "me", 0.5, 1.0)
        assert answer.usage is not None
        assert answer.usage.input_tokens == turn.prompt.count
        assert answer.usage.input_tokens_details.cached_tokens == 5
        assert answer.usage.output_tokens == len(text.tokenizer.encode("Hello world").ids)
        assert answer.usage.output_tokens_details.reasoning_tokens == 0
        assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens

    play_openai(text, talk)


def test_a_stream_tells_of_every_item_and_ends_with_the_response(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        answering(served, f"naïve 日本{CALL.format('London')}\n{CALL.format('Paris')}")
        stream = await client.responses.create(model=MODEL, input="Hi", tools=[WEATHER], stream=True)
        events = [event async for event in stream]
        message = [
            "response.output_item.added", "response.content_part.added", "response.output_text.delta",
            "response.output_text.done", "response.content_part.done", "response.output_item.done",
        ]  # fmt: skip
        call = [
            "response.output_item.added", "response.function_call_arguments.delta",
            "response.function_call_arguments.done", "response.output_item.done",
        ]  # fmt: skip
        began = ["response.created", "response.in_progress"]
        assert checked(events) == [*began, *message, *call, *call, "response.completed"]
        done = events[-1]
        assert isinstance(done, ResponseCompletedEvent)
        said, london, paris = done.response.output
        assert isinstance(said, ResponseOutputMessage)
        assert isinstance(london, ResponseFunctionToolCall)
        assert isinstance(paris, ResponseFunctionToolCall)
        assert done.response.output_text == "naïve 日本"
        assert (london.name, london.arguments, paris.arguments) == ("get_weather", '{"city": "London"}', '{"city": "Paris"}')
        assert london.call_id != paris.call_id
        finished = [event.item for event in events if event.type == "response.output_item.done"]
        assert finished == done.response.output
        for place, item in enumerate(done.response.output):
            of_item = [event for event in events if getattr(event, "item_id", None) == item.id]
            assert {event.output_index for event in of_item} == {place}  # type: ignore[union-attr]
        told = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert told == "naïve 日本"

    play_openai(text, talk)


def test_the_clients_own_stream_puts_the_response_together(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        answering(served, f"Let me look.\n{CALL.format('London')}")
        async with client.responses.stream(model=MODEL, input="Hi", tools=[WEATHER]) as stream:
            kinds = {event.type async for event in stream}
            answer = await stream.get_final_response()
        assert {"response.output_text.delta", "response.function_call_arguments.done"} <= kinds
        assert answer.output_text == "Let me look."
        assert answer.output[1].type == "function_call"
        assert answer.output[1].arguments == '{"city": "London"}'

    play_openai(text, talk)


def test_arguments_come_while_they_are_written_and_may_break_off(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        written = CALL.format("London").removesuffix('n"}}\n</tool_call>')
        served.driver.script = lambda turn: Script([*written], FinishReason.LENGTH)
        stream = await client.responses.create(model=MODEL, input="Hi", tools=[WEATHER], stream=True)
        events = [event async for event in stream]
        checked(events)
        deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        assert len(deltas) > 5
        done = events[-1]
        assert isinstance(done, ResponseIncompleteEvent)
        call = done.response.output[0]
        assert isinstance(call, ResponseFunctionToolCall)
        assert call.arguments == "".join(deltas) == '{"city": "Londo'
        assert call.status == "incomplete"

    play_openai(text, talk)


def test_input_is_counted_as_it_would_be_served(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        first = await client.responses.create(model=MODEL, input="One")
        asked: Any = {"model": MODEL, "input": "Two", "tools": [WEATHER], "previous_response_id": first.id}
        counted = await client.responses.input_tokens.count(**asked)
        second = await client.responses.create(**asked)
        assert second.usage is not None
        assert counted.input_tokens == second.usage.input_tokens
        assert len(served.driver.turns) == 2

    play_openai(text, talk)


@pytest.mark.parametrize("summary", [None, "auto"])
@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_are_an_item_of_their_own(text: ModelText, summary: Any, stream: bool) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        answering(served, "<think>\nHm, well.\n</think>\n\nYes.")
        asked: Any = {"model": MODEL, "input": "Hi", "reasoning": {"effort": "low", "summary": summary}}
        if stream:
            events = [event async for event in await client.responses.create(**asked, stream=True)]
            kind = "response.reasoning_text.delta" if summary is None else "response.reasoning_summary_text.delta"
            assert "".join(event.delta for event in events if event.type == kind) == "Hm, well."  # type: ignore[union-attr]
            checked(events)
            done = events[-1]
            assert isinstance(done, ResponseCompletedEvent)
            answer = done.response
        else:
            answer = await client.responses.create(**asked)
        thoughts = answer.output[0]
        assert isinstance(thoughts, ResponseReasoningItem)
        told = thoughts.content if summary is None else thoughts.summary
        assert [part.text for part in told or ()] == ["Hm, well."]
        assert thoughts.encrypted_content is None
        assert answer.output_text == "Yes."
        assert answer.usage is not None
        assert 0 < answer.usage.output_tokens_details.reasoning_tokens < answer.usage.output_tokens

    play_openai(text, talk)


def test_an_answer_of_thoughts_alone_is_told_as_incomplete(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        served.driver.script = lambda turn: Script([*"<think>\nHm"], FinishReason.LENGTH)
        events = [
            event async for event in await client.responses.create(model=MODEL, input="Hi", stream=True, max_output_tokens=9)
        ]
        assert served.driver.turns[0].output_tokens_max == 9
        done = events[-1]
        assert isinstance(done, ResponseIncompleteEvent)
        assert done.response.status == "incomplete"
        assert done.response.incomplete_details is not None
        assert done.response.incomplete_details.reason == "max_output_tokens"
        assert [item.type for item in done.response.output] == ["reasoning"]

    play_openai(text, talk)


def test_an_empty_answer_is_an_empty_message(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        served.driver.script = lambda turn: Script([])
        answer = await client.responses.create(model=MODEL, input="Hi")
        assert [item.type for item in answer.output] == ["message"]
        assert answer.output_text == ""

    play_openai(text, talk)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_those_of_the_text(text: ModelText, stream: bool) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        answering(served, "<think>\nHm.\n</think>\n\nHello world")
        asked: Any = {"model": MODEL, "input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
        if stream:
            events = [event async for event in await client.responses.create(**asked, stream=True)]
            deltas = [score for event in events if event.type == "response.output_text.delta" for score in event.logprobs]
            done = events[-1]
            assert isinstance(done, ResponseCompletedEvent)
            answer = done.response
            assert "".join(score.token for score in deltas) == "Hello world"
        else:
            answer = await client.responses.create(**asked)
        message = answer.output[1]
        assert isinstance(message, ResponseOutputMessage)
        said = message.content[0]
        assert isinstance(said, ResponseOutputText)
        assert said.logprobs is not None
        assert "".join(score.token for score in said.logprobs) == "Hello world"
        assert {score.logprob for score in said.logprobs} == {-0.5}
        assert {len(score.top_logprobs) for score in said.logprobs} == {2}

    play_openai(text, talk)


def test_a_chain_of_turns_is_one_conversation_in_one_session(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        answering(served, CALL.format("London"), "It is warm.", "You asked of London.")
        first = await client.responses.create(model=MODEL, input="Weather?", tools=[WEATHER], instructions="Look it up.")
        call = first.output[0]
        assert isinstance(call, ResponseFunctionToolCall)
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"}
        second = await client.responses.create(model=MODEL, input=[result], previous_response_id=first.id)
        third = await client.responses.create(model=MODEL, input="Of where?", previous_response_id=second.id, store=False)
        assert third.previous_response_id == second.id
        assert third.output_text == "You asked of London."
        turns = served.driver.turns
        assert prompt_of(served, turns[2]) == (
            f"<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n{CALL.format('London')}<|im_end|>\n"
            "<|im_start|>user\n<tool_response>\n21 degrees\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\nIt is warm.<|im_end|>\n"
            "<|im_start|>user\nOf where?<|im_end|>\n<|im_start|>assistant\n"
        )
        assert turns[0].session is not None
        assert {turn.session for turn in turns} == {turns[0].session}
        with pytest.raises(openai.BadRequestError) as refused:
            await client.responses.create(model=MODEL, input="Go on", previous_response_id=third.id)
        assert refused.value.code == "previous_response_not_found"
        assert refused.value.param == "previous_response_id"

    play_openai(text, talk)


def test_a_session_that_the_client_names_is_the_chains(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        named = {"X-Session-ID": "mine"}
        first = await client.responses.create(model=MODEL, input="Hi", extra_headers=named)
        second = await client.responses.create(model=MODEL, input="More", previous_response_id=first.id)
        await client.responses.create(model=MODEL, input="More", previous_response_id=second.id, prompt_cache_key="other")
        await client.responses.create(model=MODEL, input="Alone", store=False)
        turns = served.driver.turns
        assert [turn.session for turn in turns] == ["mine", "mine", "other", None]
        assert turns[1].prompt.tokens.startswith(turns[0].prompt.tokens)
        assert turns[2].prompt.tokens.startswith(turns[1].prompt.tokens)

    play_openai(text, talk)


def test_thoughts_come_back_by_way_of_a_client_that_keeps_the_conversation(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        answering(served, f"<think>\nHm.\n</think>\n\n{CALL.format('London')}", "Warm.")
        question: Any = {"role": "user", "content": "Weather?"}
        first = await client.responses.create(
            model=MODEL, input=[question], tools=[WEATHER], store=False, include=["reasoning.encrypted_content"]
        )
        thoughts, call = first.output
        assert isinstance(thoughts, ResponseReasoningItem)
        assert isinstance(call, ResponseFunctionToolCall)
        # As Codex does it, which brings back nothing of thoughts but this.
        kept: Any = {"type": "reasoning", "summary": [], "encrypted_content": thoughts.encrypted_content}
        output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": [{"type": "input_text", "text": "21"}]}
        asked: list[Any] = [question, kept, call.model_dump(), output]
        second = await client.responses.create(model=MODEL, input=asked, tools=[WEATHER], store=False)
        assert second.output_text == "Warm."

    play_openai(text, talk)


def test_kept_responses_are_shown_and_forgotten(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        answering(served, "Hello", "Bye")
        first = await client.responses.create(model=MODEL, input="One")
        second = await client.responses.create(
            model=MODEL, input=[{"role": "user", "content": "Two"}], previous_response_id=first.id
        )
        assert await client.responses.retrieve(second.id) == second
        with pytest.raises(openai.BadRequestError, match="stream"):
            await client.responses.retrieve(second.id, stream=True)
        listed = [item async for item in client.responses.input_items.list(second.id, order="asc", limit=1)]
        assert [item.content[0].text for item in listed] == ["One", "Hello", "Two"]  # type: ignore[union-attr]
        newest = await client.responses.input_items.list(second.id)
        assert [item.id for item in newest.data] == [item.id for item in reversed(listed)]
        reference: Any = {"type": "item_reference", "id": first.output[0].id}
        answering(served, "Again")
        three: Any = {"role": "user", "content": "Three"}
        await client.responses.create(model=MODEL, input=[reference, three], store=False)
        assert "assistant\nHello<|im_end|>\n<|im_start|>user\nThree" in prompt_of(served, served.driver.turns[-1])
        await client.responses.delete(first.id)
        for asking in (
            client.responses.retrieve(first.id),
            client.responses.delete(first.id),
            client.responses.input_items.list(first.id),
        ):
            with pytest.raises(openai.NotFoundError):
                await asking
        with pytest.raises(openai.BadRequestError):
            await client.responses.create(model=MODEL, input="Go on", previous_response_id=second.id)
        with pytest.raises(openai.NotFoundError, match="Item with id"):
            await client.responses.create(model=MODEL, input=[reference])

    play_openai(text, talk)


def test_no_tenant_sees_anothers(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        mine = await client.responses.create(model=MODEL, input="Secret")
        item: Any = {"type": "item_reference", "id": mine.output[0].id}
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="sk-other", max_retries=0) as other:
            with pytest.raises(openai.NotFoundError):
                await other.responses.retrieve(mine.id)
            with pytest.raises(openai.NotFoundError):
                await other.responses.delete(mine.id)
            with pytest.raises(openai.NotFoundError):
                await other.responses.input_items.list(mine.id)
            with pytest.raises(openai.NotFoundError):
                await other.responses.create(model=MODEL, input=[item])
            with pytest.raises(openai.BadRequestError, match="not found"):
                await other.responses.create(model=MODEL, input="More", previous_response_id=mine.id)
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0) as nobody:
            with pytest.raises(openai.AuthenticationError):
                await nobody.responses.retrieve(mine.id)
        assert (await client.responses.retrieve(mine.id)).output_text == "Hello world"

    play_openai(text, talk, "sk-good", tenants=TENANTS)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "computer_call"}]}, "input[0]"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "conversation": "conv_1"}, "conversation"),
        ({"input": "x", "prompt": {"id": "p"}}, "prompt"),
        ({"input": "x", "tools": [{"type": "file_search", "vector_store_ids": ["v"]}]}, "tools[0]"),
        ({"input": "x", "tools": [{"type": "function", "name": ""}]}, "tools[0].name"),
        ({"input": "x", "tools": [{"type": "custom", "name": "c", "format": {"type": "grammar"}}]}, "tools[0].format"),
        ({"input": "x", "tools": [formed("lark", 'start: "a" start?')]}, "tools[0].format.definition"),
        ({"input": "x", "tools": [formed("regex", "(?<=a)b")]}, "tools[0].format.definition"),
        ({"input": "x", "tools": [formed("peg", "a")]}, "tools[0].format"),
        ({"input": "x", "extra_body": {"thinking_token_budget": 9}}, "thinking_token_budget"),
        ({"input": "x", "tools": [WEATHER, WEATHER]}, "tools[1]"),
        ({"input": "x", "tools": [{"type": "namespace", "name": "n", "tools": [{"type": "mcp"}]}]}, "tools[0].tools[0]"),
        ({"input": "x", "tools": [{"type": "web_search"}, UNKEEPABLE]}, "tools[1].parameters"),
        ({"input": "x", "tools": [{"type": "namespace", "name": "n", "tools": [UNKEEPABLE]}]}, "tools[0].tools[0].parameters"),
        ({"input": "x", "tool_choice": "sometimes"}, "tool_choice"),
        ({"input": "x", "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"input": "x", "include": ["everything"]}, "include"),
        ({"input": "x", "truncation": "middle"}, "truncation"),
        ({"input": "x", "text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"input": "x", "text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}}, "text.format.name"),
        ({"input": "x", "text": {"format": {"type": "json_schema", "name": "a", "schema": []}}}, "text.format.schema"),
        ({"input": "x", "text": {"format": {"type": "json_object"}}, "extra_body": {"guided_regex": "a"}}, "guided_regex"),
        ({"input": "x", "temperature": -1}, "temperature"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "metadata": {"k": "v" * 513}}, "metadata"),
        ({"input": "x", "extra_body": {"max_tokens": 5}}, "max_tokens"),
        ({"input": "x", "extra_body": {"n": 2}}, "n"),
        ({"input": "x", "extra_body": {"return_token_ids": True}}, "return_token_ids"),
        (
            {"input": "x", "extra_body": {"stream_options": {"continuous_usage_stats": True}}},
            "stream_options.continuous_usage_stats",
        ),
    ],
)
def test_what_is_not_served_is_refused_by_name(text: ModelText, asked: dict[str, Any], param: str) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.responses.create(model=MODEL, **asked)
        assert refused.value.param == param
        assert served.driver.turns == []

    play_openai(text, talk)


def test_what_the_template_refuses_and_what_is_too_long_is_the_inputs(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.responses.create(model=MODEL, input="word " * text.context_tokens_max)
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "input")

    play_openai(text, talk)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_call_can_be_forced_and_be_the_only_one(text: ModelText, choice: Any) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        answering(served, CALL.format("London"))
        asked: Any = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False}
        answer = await client.responses.create(model=MODEL, input="Hi", **asked)
        assert [item.type for item in answer.output] == ["function_call"]
        assert answer.parallel_tool_calls is False
        assert answer.tool_choice == choice or answer.tool_choice.model_dump() == choice  # type: ignore[union-attr]
        assert "get_weather" in served.driver.turns[0].sampling.grammar

    play_openai(text, talk)


class City(BaseModel):
    name: str
    people: int


def test_answers_are_kept_to_a_form_and_parsed(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        answering(served, '{"name": "Oslo", "people": 717710}', "{}", "aa")
        answer = await client.responses.parse(model=MODEL, input="Where?", text_format=City)
        assert answer.output_parsed == City(name="Oslo", people=717710)
        assert '"people"' in served.driver.turns[0].sampling.grammar
        await client.responses.create(model=MODEL, input="What?", text={"format": {"type": "json_object"}})
        assert served.driver.turns[1].sampling.grammar not in ("", served.driver.turns[0].sampling.grammar)
        await client.responses.create(
            model=MODEL, input="So?", text={"format": {"type": "text"}}, extra_body={"guided_regex": "a+"}
        )
        assert "a+" in served.driver.turns[2].sampling.grammar

    play_openai(text, talk)


def test_failures_are_told_before_and_within_a_stream(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        with pytest.raises(openai.NotFoundError, match="'none' does not exist"):
            await client.responses.create(model="none", input="Hi")
        failure = TurnFailed(503, "unavailable", "no node")
        served.driver.script = lambda turn: Script([], failure=failure)
        with pytest.raises(openai.InternalServerError):
            await client.responses.create(model=MODEL, input="Hi", stream=True)
        served.driver.script = lambda turn: Script(["Hel"], failure=failure)
        events = [event async for event in await client.responses.create(model=MODEL, input="Hi", stream=True)]
        checked(events)
        failed = events[-1]
        assert isinstance(failed, ResponseFailedEvent)
        assert failed.response.status == "failed"
        assert failed.response.error is not None
        assert failed.response.error.message == "no node"
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(failed.response.id)

    play_openai(text, talk)


def test_namespaces_and_choices_of_tools(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        agents: Any = {"type": "namespace", "name": "agents", "description": "Helpers.", "tools": [{**WEATHER, "name": "spawn"}]}
        web: Any = {"type": "web_search"}
        call = '<tool_call>\n{"name": "agents__spawn", "arguments": {"city": "a"}}\n</tool_call>'
        answering(served, call, "x", "x")
        first = await client.responses.create(model=MODEL, input="Hi", tools=[WEATHER, agents, web])
        made = first.output[0]
        assert isinstance(made, ResponseFunctionToolCall)
        assert (made.name, made.namespace) == ("spawn", "agents")
        assert [tool.type for tool in first.tools] == ["function", "namespace"]
        assert "web_search" not in prompt_of(served, served.driver.turns[0])
        output: Any = {"type": "function_call_output", "call_id": made.call_id, "output": "done"}
        await client.responses.create(model=MODEL, input=[output], previous_response_id=first.id)
        assert '"name": "agents__spawn"' in prompt_of(served, served.driver.turns[1])
        allowed: Any = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_weather"}]}
        await client.responses.create(model=MODEL, input="Hi", tools=[WEATHER, agents], tool_choice=allowed)
        prompt = prompt_of(served, served.driver.turns[2])
        assert "get_weather" in prompt
        assert "agents__spawn" not in prompt

    play_openai(text, talk)


def test_what_a_custom_tool_takes_is_told_and_bound(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        answering(served, "Fine.")
        await client.responses.create(model=MODEL, input="Hi", tools=[formed("lark", 'start: "add " /[0-9]+/')])
        [turn] = served.driver.turns
        assert json.dumps('start: "add " /[0-9]+/')[1:-1] in prompt_of(served, turn)
        assert "add [0-9]+" in turn.sampling.grammar.replace("(?:", "").replace(")", "")

    play_openai(text, talk)


@pytest.mark.parametrize("stream", [False, True])
def test_custom_tools_are_called_with_a_text(text: ModelText, stream: bool) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        patch = '*** Begin "Patch"\nä\n'
        written = json.dumps({"name": "apply_patch", "arguments": {"input": patch}})
        answering(served, f"<tool_call>\n{written}\n</tool_call>", "Done.")
        asked: Any = {"model": MODEL, "input": "Hi", "tools": [{"type": "custom", "name": "apply_patch", "description": "Edit."}]}
        if stream:
            events = [event async for event in await client.responses.create(**asked, stream=True)]
            checked(events)
            assert "".join(event.delta for event in events if event.type == "response.custom_tool_call_input.delta") == patch
            assert [event.input for event in events if event.type == "response.custom_tool_call_input.done"] == [patch]
            done = events[-1]
            assert isinstance(done, ResponseCompletedEvent)
            answer = done.response
        else:
            answer = await client.responses.create(**asked)
        call = answer.output[0]
        assert isinstance(call, ResponseCustomToolCall)
        assert (call.name, call.input) == ("apply_patch", patch)
        output: Any = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "ok"}
        await client.responses.create(model=MODEL, input=[output], previous_response_id=answer.id)
        prompt = prompt_of(served, served.driver.turns[-1])
        assert json.dumps({"input": patch}, ensure_ascii=False) in prompt
        assert "<tool_response>\nok\n" in prompt

    play_openai(text, talk)


def test_what_is_said_can_be_padded_so_that_sizes_do_not_tell_it(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        served.driver.script = lambda turn: Script(["a", " somewhat longer piece"])
        asked: Any = {"model": MODEL, "input": "Hi", "stream": True, "stream_options": {"include_obfuscation": True}}
        async with httpx.AsyncClient(base_url=served.url) as plain:
            events = (await plain.post("/v1/responses", json=asked)).text.split("\n\n")
        sizes = {len(event) for event in events if "output_text.delta" in event}
        assert len(sizes) == 1
        assert "obfuscation" not in events[-2]

    play_openai(text, talk)


def test_other_methods_and_paths(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        async with httpx.AsyncClient(base_url=served.url) as plain:
            assert (await plain.get("/v1/responses")).status_code == 405
            assert (await plain.post("/v1/responses/resp_1")).status_code == 405
            assert (await plain.post("/v1/responses/resp_1/cancel")).status_code == 404

    play_openai(text, talk)
