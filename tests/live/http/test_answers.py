"""What comes out of the door is what the model wrote: spaces, bytes, thoughts and calls, whole as in a stream."""

from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from orchestrator.core.types import FinishReason
from orchestrator.live.text.models import ModelText
from tests.builders import some
from tests.live.scripted import MODEL, Script, Served, make_model, play_openai
from tests.live.text.vocabularies import byte_level, llama
from workers.engines.vocabulary import CHAT_TEMPLATE, write_json

THINKING = CHAT_TEMPLATE + "{# </think> #}"
OPENING = CHAT_TEMPLATE + "{% if add_generation_prompt %}<think>\n{% endif %}"
CODING = THINKING + "{# <tool_call><function= #}"
THOUGHT = '<think>I could write <tool_call>{"name":"no","arguments":{}}</tool_call> here</think>The answer'
CODE = "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"properties": {"city": {"type": "string"}}}}}
NULL = '<tool_call>{"name":"now","arguments":null}</tool_call>'


def chatting(folder: Path, template: str) -> ModelText:
    make_model(folder)
    (folder / "chat_template.jinja").write_text(template)
    return ModelText.load(folder, "scripted")


def sentencepiece(folder: Path) -> ModelText:
    llama().save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", {"max_position_embeddings": 4096})
    return ModelText.load(folder, "scripted")


async def answers(client: AsyncOpenAI, **request: Any) -> list[dict[str, Any]]:
    """Return what a whole answer and what a streamed one say; they must be alike."""
    request = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], **request}
    message = (await client.chat.completions.create(**request)).choices[0]
    found: list[dict[str, Any]] = [{"finish": message.finish_reason, **message.message.model_dump()}]
    streamed: dict[str, Any] = {"content": "", "reasoning_content": "", "reasoning": "", "calls": []}
    async for chunk in await client.chat.completions.create(**request, stream=True):
        delta = chunk.choices[0].delta.model_dump()
        for name in ("content", "reasoning_content", "reasoning"):
            streamed[name] += delta.get(name) or ""
        streamed["calls"] += delta.get("tool_calls") or []
        streamed["finish"] = chunk.choices[0].finish_reason or streamed.get("finish")
    whole = [(call["function"]["name"], call["function"]["arguments"]) for call in found[0]["tool_calls"] or []]
    found[0] = {name: found[0].get(name) or "" for name in ("content", "reasoning_content", "reasoning", "finish")} | {
        "calls": whole
    }
    calls = dict[int, tuple[str, str]]()
    for part in streamed["calls"]:
        # A name is told once, with the id, and what follows goes on with the arguments.
        assert ("id" in part and part["id"] is not None) == (part["index"] not in calls)
        name, arguments = calls.get(part["index"], (part["function"]["name"], ""))
        calls[part["index"]] = name, arguments + part["function"]["arguments"]
    streamed["calls"] = [calls[index] for index in sorted(calls)]
    return [found[0], streamed]


DEEPSEEK = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
CHANNELS = (
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>Well.<|end|>"
    '<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{"city":"Paris"}'
)


@pytest.mark.parametrize(
    ("template", "written", "thoughts", "content", "calls"),
    [
        (THINKING, THOUGHT, 'I could write <tool_call>{"name":"no","arguments":{}}</tool_call> here', "The answer", []),
        (OPENING, "so it is</think>\n\nYes", "so it is", "Yes", []),
        (OPENING, "it never ends", "it never ends", "", []),
        (CODING, f"<think>Paris?</think>{CODE}", "Paris?", "", [("get_weather", '{"city": "Paris"}')]),
        (CHAT_TEMPLATE, NULL, "", "", [("now", "{}")]),
        (
            "{{ messages[0].content }}{# <｜tool▁calls▁begin｜> #}",
            f"<think>Hm.</think>Well.{DEEPSEEK}",
            "Hm.",
            "Well.",
            [("now", "{}")],
        ),
        (f"{CHAT_TEMPLATE}{{# <|channel|> #}}", CHANNELS, "Hm.", "Well.", [("get_weather", '{"city":"Paris"}')]),
        (CHAT_TEMPLATE, "Shown: <think>no</think>", "", "Shown: <think>no</think>", []),
    ],
)
def test_thoughts_and_calls(
    tmp_path: Path, template: str, written: str, thoughts: str, content: str, calls: list[tuple[str, str]]
) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        # As pieces of tokens fall in a stream: two characters at a time.
        pieces = [written[place : place + 2] for place in range(0, len(written), 2)]
        served.driver.script = lambda turn: Script(pieces)
        finish = "tool_calls" if calls else "stop"
        expected = {"content": content, "reasoning_content": thoughts, "reasoning": thoughts, "finish": finish, "calls": calls}
        assert await answers(client, tools=[WEATHER]) == [expected] * 2
        assert [stream.wanted for stream in served.driver.streams] == [calls[0][0] if calls else ""] * 2

    play_openai(chatting(tmp_path, template), talk)


@pytest.mark.parametrize(("finish", "asked"), [(FinishReason.LENGTH, {}), (FinishReason.STOP, {"stop": ["END"]})])
def test_what_did_not_end_by_itself_tells_nothing_of_what_the_model_waits_for(
    tmp_path: Path, finish: FinishReason, asked: dict[str, Any]
) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        served.driver.script = lambda turn: Script(["I look", " at itEND"], finish)
        [plain, _] = await answers(client, **asked)
        assert plain["content"].startswith("I look at it")
        assert [stream.wanted for stream in served.driver.streams] == [None, None]

    play_openai(chatting(tmp_path, THINKING), talk)


def test_thoughts_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        served.driver.script = lambda turn: Script([THOUGHT, " and more"])
        found = await answers(client, tools=[WEATHER], extra_body={"include_reasoning": False})
        assert [(one["reasoning"], one["content"], one["calls"]) for one in found] == [("", "The answer and more", [])] * 2

    play_openai(chatting(tmp_path, THINKING), talk)


def test_thoughts_are_counted(tmp_path: Path) -> None:
    text = chatting(tmp_path, THINKING)
    thought = "it may well be so"

    async def talk(client: AsyncOpenAI, served: Served) -> None:
        served.driver.script = lambda turn: Script(["<think>", thought, "</think>", "Yes"])
        messages: Any = [{"role": "user", "content": "Hi"}]
        usage = (await client.chat.completions.create(model=MODEL, messages=messages)).usage
        assert usage is not None
        assert usage.completion_tokens_details is not None
        counted = len(text.tokenizer.encode(thought).ids)
        assert counted <= (usage.completion_tokens_details.reasoning_tokens or 0) < usage.completion_tokens
        served.driver.script = lambda turn: Script(["Yes"])
        usage = (await client.chat.completions.create(model=MODEL, messages=messages)).usage
        assert usage is not None
        assert usage.completion_tokens_details is None

    play_openai(text, talk)


def test_a_message_that_is_continued_goes_on_thinking(tmp_path: Path) -> None:
    async def talk(client: AsyncOpenAI, served: Served) -> None:
        served.driver.script = lambda turn: Script([" is</think>", "Yes"])
        messages = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "<think>so it"}]
        extra = {"continue_final_message": True, "add_generation_prompt": False}
        found = await answers(client, messages=messages, extra_body=extra)
        assert [(one["reasoning"], one["content"]) for one in found] == [("is", "Yes")] * 2

    play_openai(chatting(tmp_path, THINKING), talk)


def test_a_completion_keeps_its_space_and_its_tokens_their_bytes(tmp_path: Path) -> None:
    text = sentencepiece(tmp_path)
    names = ["▁words", ",", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "▁w", "</s>"]
    tokens = [text.tokenizer.token_to_id(name) for name in names]

    async def talk(client: AsyncOpenAI, served: Served) -> None:
        served.driver.script = lambda turn: Script([[token] for token in tokens], FinishReason.STOP)
        asked: dict[str, Any] = {"model": MODEL, "prompt": "a b", "logprobs": 1}
        choice = (await client.completions.create(**asked)).choices[0]
        assert choice.text == " words,😀 w"
        assert choice.logprobs is not None
        partial = ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\x98", "bytes:\\x80"]
        assert choice.logprobs.tokens == [" words", ",", *partial, " w", "</s>"]
        assert choice.logprobs.text_offset == [0, 6, 7, 7, 7, 7, 8, 10]
        assert choice.logprobs.top_logprobs is not None
        assert [next(iter(top)) for top in choice.logprobs.top_logprobs] == choice.logprobs.tokens
        chunks = [chunk.choices[0] async for chunk in await client.completions.create(**asked, stream=True)]
        assert "".join(chunk.text for chunk in chunks) == choice.text
        offsets = [offset for chunk in chunks if chunk.logprobs is not None for offset in chunk.logprobs.text_offset or ()]
        assert offsets == choice.logprobs.text_offset

    play_openai(text, talk)


def test_bytes_in_a_chat_join_to_its_text(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "config.json", {"max_position_embeddings": 4096})
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": "{{ messages[0].content }}"})
    text = ModelText.load(tmp_path, "scripted")

    async def talk(client: AsyncOpenAI, served: Served) -> None:
        served.driver.script = lambda turn: Script(["plain 𐍈, 日本"])
        messages: Any = [{"role": "user", "content": "Hi"}]
        answer = await client.chat.completions.create(model=MODEL, messages=messages, logprobs=True, top_logprobs=2)
        assert answer.choices[0].logprobs is not None
        entries = answer.choices[0].logprobs.content or []
        assert bytes(byte for entry in entries for byte in entry.bytes or ()).decode() == "plain 𐍈, 日本"
        assert not any("\ufffd" in entry.token for entry in some(entries))
        assert any("\\x" in entry.token for entry in entries)

    play_openai(text, talk)
