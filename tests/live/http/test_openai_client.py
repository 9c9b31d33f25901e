"""The official `openai` client against a served gateway: what it sends is understood and what it gets it understands."""

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from orchestrator.core.config import TenantConfig
from orchestrator.core.types import FinishReason
from orchestrator.live.text.models import ModelText
from orchestrator.live.turns import TurnFailed
from tests.builders import some
from tests.live.scripted import MODEL, TENANTS, Script, Served, play_openai

USER = [{"role": "user", "content": "Hi there"}]
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def test_chat_without_streaming(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        served.driver.script = lambda turn: Script(cached_tokens=5)
        answer = await client.chat.completions.create(model=MODEL, messages=USER)
        assert answer.choices[0].message.content == "Hello world"
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].finish_reason == "stop"
        turn = served.driver.turns[0]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == turn.prompt.count
        assert answer.usage.completion_tokens == len(text.tokenizer.encode("Hello world").ids)
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 5
        assert turn.output_tokens_max == text.context_tokens_max - turn.prompt.count
        assert turn.sampling.temperature == 1.0

    play_openai(text, talk)


def test_chat_with_streaming_and_usage(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        served.driver.script = lambda turn: Script(["naïve ", "日本", " end"], FinishReason.LENGTH, cached_tokens=7)
        stream = await client.chat.completions.create(
            model=MODEL, messages=USER, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "naïve 日本 end"
        assert chunks[-2].choices[0].finish_reason == "length"
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.prompt_tokens_details is not None
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 7
        assert len({chunk.id for chunk in chunks}) == 1
        quiet = await client.chat.completions.create(model=MODEL, messages=USER, stream=True)
        assert all(chunk.usage is None and chunk.choices for chunk in some([chunk async for chunk in quiet]))

    play_openai(text, talk)


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls_are_parsed_back(text: ModelText, stream: bool) -> None:
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "London"}}\n</tool_call>'

    async def talk(client: AsyncOpenAI, served: Served) -> None:
        served.driver.script = lambda turn: Script(["Let me look.", "\n", *call, "\n", *call])
        if stream:
            content, names, arguments, reasons = "", {}, {}, []
            async for chunk in await client.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER], stream=True):
                delta = chunk.choices[0].delta
                content += delta.content or ""
                reasons.append(chunk.choices[0].finish_reason)
                for piece in delta.tool_calls or ():
                    if piece.id:
                        names[piece.index] = piece.function.name
                    arguments[piece.index] = arguments.get(piece.index, "") + (piece.function.arguments or "")
            assert reasons[-1] == "tool_calls"
        else:
            choice = (await client.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER])).choices[0]
            content, calls = choice.message.content, choice.message.tool_calls or []
            names = {place: made.function.name for place, made in enumerate(calls)}
            arguments = {place: made.function.arguments for place, made in enumerate(calls)}
            assert len({made.id for made in calls}) == 2
            assert choice.finish_reason == "tool_calls"
        assert content == "Let me look."
        assert names == {0: "get_weather", 1: "get_weather"}
        assert arguments == {0: '{"city": "London"}', 1: '{"city": "London"}'}
        shown = text.tokenizer.decode(list(memoryview(served.driver.turns[0].prompt.tokens).cast("I")))
        assert "get_weather" in shown

    play_openai(text, talk)


def test_tool_choice_none_hides_tools_and_calls_stay_text(text: ModelText) -> None:
    written = '<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>'

    async def talk(client: AsyncOpenAI, served: Served) -> None:
        served.driver.script = lambda turn: Script([written])
        answer = await client.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER], tool_choice="none")
        assert answer.choices[0].message.content == written
        assert "get_weather" not in text.tokenizer.decode(list(memoryview(served.driver.turns[0].prompt.tokens).cast("I")))

    play_openai(text, talk)


def test_logprobs_of_chat(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        served.driver.script = lambda turn: Script(["日本 ok"])
        expected = text.tokenizer.encode("日本 ok").ids
        answer = await client.chat.completions.create(model=MODEL, messages=USER, logprobs=True, top_logprobs=2)
        entries = answer.choices[0].logprobs.content
        assert b"".join(bytes(entry.bytes) for entry in entries).decode() == "日本 ok"
        assert [entry.logprob for entry in entries] == [-0.5] * len(expected)
        assert [len(entry.top_logprobs) for entry in entries] == [2] * len(expected)
        streamed = []
        async for chunk in await client.chat.completions.create(model=MODEL, messages=USER, logprobs=True, stream=True):
            if chunk.choices[0].logprobs is not None:
                streamed += chunk.choices[0].logprobs.content
        assert [entry.bytes for entry in streamed] == [entry.bytes for entry in entries]
        assert served.driver.turns[0].sampling.logprobs == 2
        assert served.driver.turns[1].sampling.logprobs == 0

    play_openai(text, talk)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_turn_and_is_cut_out(text: ModelText, stream: bool) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        served.driver.script = lambda turn: Script([*"one STO two STOP three", None])
        if stream:
            made = await client.chat.completions.create(model=MODEL, messages=USER, stop=["STOP", "never"], stream=True)
            chunks = [chunk async for chunk in made]
            content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            choice = (await client.chat.completions.create(model=MODEL, messages=USER, stop="STOP")).choices[0]
            content, reason = choice.message.content, choice.finish_reason
        assert content == "one STO two "
        assert reason == "stop"
        assert served.driver.streams[0].cancelled.is_set()

    play_openai(text, talk)


def test_sampling_parameters_reach_the_turn(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        await client.chat.completions.create(
            model=MODEL,
            messages=USER,
            seed=41,
            n=2,
            temperature=0.25,
            top_p=0.5,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            logit_bias={"7": 2},
            max_completion_tokens=9,
            extra_body={"top_k": 3, "min_p": 0.125, "ignore_eos": True, "stop_token_ids": [5], "unheard_of": {"a": [1]}},
        )
        first, second = served.driver.turns
        assert [first.sampling.seed, second.sampling.seed] == [41, 42]
        assert first.output_tokens_max == 9
        sampling = first.sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.25, 0.5, 3, 0.125)
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
        assert dict(sampling.logit_bias) == {7: 2.0}
        assert list(sampling.stop_token_ids) == [5]

    play_openai(text, talk)


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices(text: ModelText, stream: bool) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        served.driver.script = lambda turn: Script(["seed ", str(turn.sampling.seed)])
        contents = ["", "", ""]
        if stream:
            async for chunk in await client.chat.completions.create(model=MODEL, messages=USER, n=3, seed=7, stream=True):
                for choice in chunk.choices:
                    contents[choice.index] += choice.delta.content or ""
        else:
            answer = await client.chat.completions.create(model=MODEL, messages=USER, n=3, seed=7)
            contents = [choice.message.content for choice in answer.choices]
            assert answer.usage.prompt_tokens == served.driver.turns[0].prompt.count
        assert contents == ["seed 7", "seed 8", "seed 9"]

    play_openai(text, talk)


def test_completions_of_text_and_of_tokens(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        answer = await client.completions.create(model=MODEL, prompt=["one", "two"], n=2, logprobs=1)
        assert [choice.text for choice in answer.choices] == ["Hello world"] * 4
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        scores = answer.choices[0].logprobs
        assert "".join(scores.tokens) == "Hello world"
        assert scores.text_offset[0] == 0
        assert served.driver.turns[0].output_tokens_max == 16
        served.driver.streams.clear()
        await client.completions.create(model=MODEL, prompt=[1, 2, 3])
        await client.completions.create(model=MODEL, prompt=[[4, 5], [6]])
        assert [list(memoryview(turn.prompt.tokens).cast("I")) for turn in served.driver.turns] == [[1, 2, 3], [4, 5], [6]]
        stream = await client.completions.create(model=MODEL, prompt="x", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "Hello world"

    play_openai(text, talk)


def test_wrong_requests_are_refused_in_openais_words(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        chat = client.chat.completions.create
        with pytest.raises(openai.NotFoundError) as missing:
            await chat(model="nobody", messages=USER)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            await chat(model=MODEL, messages=[{"role": "user", "content": "word " * 5000}])
        assert long.value.code == "context_length_exceeded"
        for wrong in (
            {"temperature": -1},
            {"n": 0},
            {"top_p": 0},
            {"stop": ["x"] * 17},
            {"logit_bias": {"x": 1}},
            {"max_tokens": 0},
        ):
            with pytest.raises(openai.BadRequestError) as refused:
                await chat(model=MODEL, messages=USER, **wrong)
            assert refused.value.param == next(iter(wrong))
        with pytest.raises(openai.BadRequestError) as typed:
            await chat(model=MODEL, messages=USER, temperature="hot")
        assert typed.value.param == "temperature"
        for wrong in ({"suffix": "x"}, {"best_of": 3}, {"prompt": [99999999]}, {"prompt": ""}):
            with pytest.raises(openai.BadRequestError):
                await client.completions.create(**{"model": MODEL, "prompt": "x", **wrong})
        assert served.driver.turns == []

    play_openai(text, talk)


def test_a_body_that_is_no_json_or_too_large(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        async with httpx.AsyncClient(base_url=served.url) as raw:
            malformed = await raw.post("/v1/chat/completions", content=b'{"model": ')
            assert malformed.status_code == 400
            assert malformed.json()["error"]["code"] == "invalid_json"
            assert (await raw.post("/v1/chat/completions", content=b"x" * 2000)).status_code == 413

            async def pieces():
                for _ in range(4):
                    yield b"x" * 500

            assert (await raw.post("/v1/chat/completions", content=pieces())).status_code == 413

    play_openai(text, talk, body_bytes_max=1500)


def test_keys_stand_for_tenants(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        await client.chat.completions.create(model=MODEL, messages=USER)
        async with httpx.AsyncClient(base_url=served.url) as raw:
            body = {"model": MODEL, "messages": USER}
            assert (await raw.post("/v1/chat/completions", json=body, headers={"x-api-key": "sk-other"})).status_code == 200
            refused = await raw.post("/v1/chat/completions", json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert (await raw.get("/v1/models")).status_code == 401
        first, second = served.driver.turns
        assert [first.tenant, second.tenant] == ["acme", "globex"]
        assert first.prompt.tokens == second.prompt.tokens
        assert first.prompt.hash_root != second.prompt.hash_root

    play_openai(text, talk, key="sk-good", tenants=TENANTS)


def test_tenants_without_keys_open_no_door(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        async with httpx.AsyncClient(base_url=served.url) as raw:
            assert (await raw.get("/v1/models")).status_code == 401
            assert (await raw.get("/v1/models", headers={"authorization": "Bearer closed"})).status_code == 401

    play_openai(text, talk, tenants=(TenantConfig("closed"),))


def test_a_bad_key_is_an_authentication_error(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        with pytest.raises(openai.AuthenticationError) as refused:
            await client.chat.completions.create(model=MODEL, messages=USER)
        assert refused.value.code == "invalid_api_key"

    play_openai(text, talk, key="sk-bad", tenants=TENANTS)


@pytest.mark.parametrize("status", [429, 503, 504, 529])
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_keep_their_status_and_say_when_to_come_back(text: ModelText, status: int, stream: bool) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        failure = TurnFailed(status, "too_busy", "come back later", retry_after_s=2.2)
        served.driver.script = lambda turn: Script((), failure=failure)
        with pytest.raises(openai.APIStatusError) as refused:
            await client.chat.completions.create(model=MODEL, messages=USER, stream=stream)
        assert refused.value.status_code == status
        assert refused.value.response.headers["retry-after"] == "2"
        assert refused.value.code == "too_busy"

    play_openai(text, talk)


def test_a_failure_after_the_first_token_ends_the_stream_with_an_error(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        served.driver.script = lambda turn: Script(["some"], failure=TurnFailed(500, "node_lost", "the node is gone"))
        stream = await client.chat.completions.create(model=MODEL, messages=USER, stream=True)
        seen = []

        async def listen() -> None:
            async for chunk in stream:
                seen.append(chunk.choices[0].delta.content or "")

        with pytest.raises(openai.APIError, match="the node is gone"):
            await listen()
        assert "some" in "".join(seen)

    play_openai(text, talk)


def test_models_and_aliases(text: ModelText) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        assert [model.id async for model in client.models.list()] == [MODEL, "gpt-4o"]
        assert (await client.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("nobody")
        for name in ("gpt-4o", "claude-opus-9"):
            answer = await client.chat.completions.create(model=name, messages=USER)
            assert answer.model == name
        assert [turn.model for turn in served.driver.turns] == [MODEL, MODEL]

    play_openai(text, talk)
