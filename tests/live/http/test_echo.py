"""Prompts told beside answers: echoed by completions, with log probabilities, and scored as vLLM has it."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from orchestrator.live.intake import PROMPT_SCORES_MAX
from orchestrator.live.text.models import ModelText
from tests.live.scripted import MODEL, Script, Served, serve

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PROMPT = "Hi thére <|im_start|>, you"
BODY: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 9}
TALK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi there"}]}


def play(text: ModelText, talk: Callable[[httpx.AsyncClient, Served], Awaitable[None]]) -> None:
    async def run() -> None:
        async with serve(text) as served, httpx.AsyncClient(base_url=served.url) as client:
            served.driver.script = lambda turn: Script(["Hello", " world"])
            await talk(client, served)

    asyncio.run(run())


def prompt_of(served: Served, place: int = 0) -> list[int]:
    return list(memoryview(served.driver.turns[place].prompt.tokens).cast("I"))


async def choices_of(client: httpx.AsyncClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a completion's choices, those of a stream put together."""
    answer = await client.post(TEXT, json=body)
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        return answer.json()["choices"]
    whole: dict[int, dict[str, Any]] = {}
    for line in answer.text.split("\n\n"):
        for choice in json.loads(line[6:])["choices"] if line.startswith("data: {") else ():
            one = whole.setdefault(choice["index"], {"text": "", "logprobs": None, "finish_reason": None})
            one["text"] += choice["text"]
            one["finish_reason"] = choice["finish_reason"] or one["finish_reason"]
            if choice["logprobs"] is not None:
                told = one["logprobs"] or {name: [] for name in choice["logprobs"]}
                one["logprobs"] = {name: told[name] + values for name, values in choice["logprobs"].items()}
    return [whole[index] for index in sorted(whole)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_echoed_to_the_letter(text: ModelText, stream: bool) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        prompts = [PROMPT, served.driver.tokens("as tokens")]
        choices = await choices_of(client, {**BODY, "prompt": prompts, "echo": True, "n": 2, "stream": stream})
        assert [choice["text"] for choice in choices] == [f"{PROMPT}Hello world"] * 2 + ["as tokensHello world"] * 2
        assert {choice["logprobs"] for choice in choices} == {None}
        assert {turn.sampling.prompt_logprobs for turn in served.driver.turns} == {None}  # nobody asked for any
        [plain] = await choices_of(client, {**BODY, "echo": False, "stream": stream})
        assert plain["text"] == "Hello world"

    play(text, talk)


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_echoed_has_log_probabilities_as_what_is_generated_has(text: ModelText, stream: bool) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        [choice] = await choices_of(client, {**BODY, "echo": True, "logprobs": 2, "stream": stream})
        [turn] = served.driver.turns
        assert turn.sampling.prompt_logprobs == turn.sampling.logprobs == 2
        prompt, generated = prompt_of(served), [*served.driver.tokens("Hello"), *served.driver.tokens(" world")]
        told = choice["logprobs"]
        assert len(told["tokens"]) == len(prompt) + len(generated)
        assert told["token_logprobs"] == [None, *(-place for place in range(1, len(prompt))), *[-0.5] * len(generated)]
        assert told["top_logprobs"][0] is None
        assert [len(top) for top in told["top_logprobs"][1:]] == [2] * (len(told["tokens"]) - 1)
        # Every token begins where it says.
        assert choice["text"] == f"{PROMPT}Hello world"
        assert told["text_offset"] == sorted(told["text_offset"])
        for name, offset in zip(told["tokens"], told["text_offset"], strict=True):
            assert name.startswith("bytes:") or choice["text"][offset:].startswith(name)

    play(text, talk)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("more", [{}, {"logprobs": 1}])
def test_only_the_prompt_is_told_where_no_tokens_are_wanted(text: ModelText, stream: bool, more: dict[str, Any]) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        [choice] = await choices_of(client, {**BODY, **more, "echo": True, "max_tokens": 0, "stream": stream})
        assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
        assert choice["logprobs"] is None or len(choice["logprobs"]["tokens"]) == len(prompt_of(served))
        assert (choice["logprobs"] is not None) == bool(more)
        assert served.driver.turns[0].output_tokens_max == 1
        answer = (await client.post(TEXT, json={**BODY, "echo": True, "max_tokens": 0})).json()
        assert answer["usage"]["completion_tokens"] == 0

    play(text, talk)


@pytest.mark.parametrize(("path", "body"), [(CHAT, TALK), (TEXT, BODY)])
def test_prompts_are_scored_in_vllms_words(text: ModelText, path: str, body: dict[str, Any]) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        answer = (await client.post(path, json={**body, "prompt_logprobs": 1})).json()
        told = answer["prompt_logprobs"] if path == CHAT else answer["choices"][0]["prompt_logprobs"]
        prompt = prompt_of(served)
        assert told[0] is None
        assert [list(one) for one in told[1:]] == [[str(token)] for token in prompt[1:]]
        assert told[3][str(prompt[3])] == {
            "logprob": -3.0,
            "rank": 1,
            "decoded_token": text.vocabulary.token_bytes(prompt[3]).decode(errors="replace"),
        }
        none = (await client.post(path, json={**body, "prompt_logprobs": 0})).json()
        assert len(none["prompt_logprobs"] if path == CHAT else none["choices"][0]["prompt_logprobs"]) == len(prompt)
        assert "prompt_logprobs" not in (await client.post(path, json=body)).text

    play(text, talk)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {**TALK, "echo": True}, "echo"),
        (CHAT, {**TALK, "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (TEXT, {**BODY, "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (TEXT, {**BODY, "prompt_logprobs": 21}, "prompt_logprobs"),
        (TEXT, {**BODY, "prompt_logprobs": -1}, "prompt_logprobs"),
        (TEXT, {**BODY, "max_tokens": 0}, "max_tokens"),
        (TEXT, {**BODY, "echo": "yes"}, "echo"),
        (TEXT, {**BODY, "prompt": [5] * 4000, "prompt_logprobs": 20, "n": 1}, None),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(text: ModelText, path: str, body: dict[str, Any], param: str | None) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        answer = await client.post(path, json=body)
        if param is None:  # much, and not too much
            assert len(body["prompt"]) * 21 < PROMPT_SCORES_MAX
            assert answer.status_code == 200
            return
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert not served.driver.turns

    play(text, talk)


def test_more_log_probabilities_than_one_request_may_have_are_refused(text: ModelText, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.live.intake.PROMPT_SCORES_MAX", 30)

    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        for count, status in ((10, 200), (11, 400)):
            answer = await client.post(TEXT, json={**BODY, "prompt": [5] * count, "prompt_logprobs": 2})
            assert answer.status_code == status
        assert answer.json()["error"]["param"] == "prompt_logprobs"

    play(text, talk)
