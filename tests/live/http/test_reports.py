"""What clients may ask to be told beside an answer's text, and how: tokens, usage as it grows, special tokens, what ended it."""

import json
from typing import Any

import httpx
import pytest

from orchestrator.core.types import FinishReason
from orchestrator.live.http.openai.answers import PADDED_BYTES
from orchestrator.live.text.models import ModelText
from tests.builders import some
from tests.live.scripted import MODEL, Script, Served, play

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": MODEL, "messages": [{"role": "user", "content": "Hi there"}]},
    TEXT: {"model": MODEL, "prompt": "Hi there", "max_tokens": 100},
}
WRITTEN = ("Hello", " wörld ", "日", "本!")


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    assert answer.text.endswith("data: [DONE]\n\n")
    return [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]


def said(path: str, choice: dict[str, Any]) -> str:
    """Return the text of a choice of an event or of a whole answer."""
    return choice["text"] if path == TEXT else (choice["delta"] if "delta" in choice else choice["message"]).get("content", "")


def steps_of(served: Served) -> list[list[int]]:
    """Return a text's tokens in steps, a character cut between two of them."""
    first, second, cut, last = (list(served.driver.tokens(part) or ()) for part in WRITTEN)
    assert len(cut) > 1
    return [first, second, cut[:1], cut[1:], last]


def tokens_of(served: Served) -> list[int]:
    return [token for step in steps_of(served) for token in step]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("more", [{}, {"logprobs": 1}, {"stop": ["@"]}], ids=["plain", "scored", "stops"])
def test_tokens_are_told_beside_their_text(text: ModelText, path: str, more: dict[str, Any]) -> None:
    if path == CHAT and "logprobs" in more:
        more = {"logprobs": True}

    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        served.driver.script = lambda turn: Script(steps_of(served))
        body = {**BODIES[path], **more, "return_token_ids": True, "n": 2}
        whole = (await client.post(path, json=body)).json()
        events = events_of(await client.post(path, json={**body, "stream": True}))
        prompt = list(memoryview(served.driver.turns[0].prompt.tokens).cast("I"))
        for index, choice in enumerate(whole["choices"]):
            mine = [(event, one) for event in events for one in event["choices"] if one["index"] == index]
            assert choice["token_ids"] == tokens_of(served)
            assert [token for _, one in mine for token in one.get("token_ids", ())] == choice["token_ids"]
            assert "".join(said(path, one) for _, one in mine) == said(path, choice) == "".join(WRITTEN)
            told = [one.get("prompt_token_ids") or event.get("prompt_token_ids") for event, one in mine]
            assert [ids for ids in told if ids] == [prompt]
            # Text comes with the tokens that it is made of, not before them.
            assert next(one for _, one in mine if said(path, one))["token_ids"]
        assert (whole.get("prompt_token_ids") or whole["choices"][1]["prompt_token_ids"]) == prompt
        plain = (await client.post(path, json=BODIES[path])).json()
        assert "token_ids" not in json.dumps(plain)

    play(text, talk)


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_behind_a_stop_string_are_not_told(text: ModelText, stream: bool) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        served.driver.script = lambda turn: Script(["one", [*(served.driver.tokens("STOP") or ()), 5, 6, 7], "x"])
        answer = await client.post(TEXT, json={**BODIES[TEXT], "stop": "STOP", "return_token_ids": True, "stream": stream})
        choices = [one for event in events_of(answer) for one in event["choices"]] if stream else answer.json()["choices"]
        tokens = [token for one in choices for token in one.get("token_ids", ())]
        assert text.tokenizer.decode(tokens) == "oneSTOP"
        assert "".join(one["text"] for one in choices) == "one"

    play(text, talk)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_usage_may_come_with_each_event(text: ModelText, path: str) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        served.driver.script = lambda turn: Script(steps_of(served), cached_tokens=2)
        options = {"include_usage": True, "continuous_usage_stats": True}
        events = events_of(await client.post(path, json={**BODIES[path], "stream": True, "stream_options": options, "n": 2}))
        usages = [event["usage"] for event in events if event["usage"] is not None]
        counts = [usage["completion_tokens"] for usage in usages]
        assert counts == sorted(counts)
        assert len(set(counts)) > len(WRITTEN)
        assert {usage["prompt_tokens"] for usage in some(usages)} <= {0, served.driver.turns[0].prompt.count}
        assert all(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] for usage in some(usages))
        *_, before, last = usages
        assert before["completion_tokens"] == last["completion_tokens"] == 2 * len(tokens_of(served))

    play(text, talk)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_events_may_be_padded_to_one_size(text: ModelText, path: str) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        served.driver.script = lambda turn: Script(steps_of(served))
        for more in ({}, {"return_token_ids": True}):
            body = {**BODIES[path], **more, "stream": True, "stream_options": {"include_obfuscation": True}}
            answer = await client.post(path, json=body)
            texts = [choice for event in events_of(answer) for choice in event["choices"] if said(path, choice)]
            assert len(texts) > 2
            padded = [line for line in answer.content.split(b"\n\n") if b"obfuscation" in line]
            assert len(padded) >= len(texts)
            assert len({len(line) % PADDED_BYTES for line in padded}) == 1
        plain = await client.post(path, json={**body, "stream_options": {"include_obfuscation": False}})
        assert b"obfuscation" not in plain.content

    play(text, talk)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("skipped", "expected"), [(None, "ab"), (True, "ab"), (False, "a<|im_start|>b")])
def test_special_tokens_show_where_that_is_asked_for(text: ModelText, stream: bool, skipped: bool | None, expected: str) -> None:
    start, end = (text.tokenizer.encode(name).ids[0] for name in ("<|im_start|>", "<|im_end|>"))

    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        served.driver.script = lambda turn: Script(["a", [start], "b", [end]])
        for path in (CHAT, TEXT):
            for more, whole in (
                ({}, expected),
                ({"include_stop_str_in_output": True}, expected + "<|im_end|>" * (skipped is False)),
            ):
                body = {**BODIES[path], "skip_special_tokens": skipped, "stream": stream, **more}
                answer = await client.post(path, json=body)
                choices = [one for event in events_of(answer) for one in event["choices"]] if stream else answer.json()["choices"]
                assert "".join(said(path, one) for one in choices) == whole

    play(text, talk)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"stop": "END"}, "one two END three "),
        ({"stop": "END", "include_stop_str_in_output": True}, "one two END three END"),
        ({"stop": ["three E", "three"], "include_stop_str_in_output": True}, "one two END three"),
    ],
)
def test_a_stop_string_ends_an_answer_not_before_there_is_enough_and_may_be_part_of_it(
    text: ModelText, stream: bool, more: dict[str, Any], expected: str
) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        written = "one two END three END four"
        least = len(served.driver.tokens("one two END") or ())
        served.driver.script = lambda turn: Script([[token] for token in served.driver.tokens(written) or ()])
        answer = await client.post(TEXT, json={**BODIES[TEXT], **more, "min_tokens": least, "stream": stream})
        choices = [one for event in events_of(answer) for one in event["choices"]] if stream else answer.json()["choices"]
        assert "".join(one["text"] for one in choices) == expected
        assert choices[-1]["finish_reason"] == "stop"
        assert served.driver.turns[0].sampling.output_tokens_min == least

    play(text, talk)


def test_log_probabilities_may_name_tokens_by_their_numbers(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        tokens = served.driver.tokens("Hello world") or ()
        more = {"return_tokens_as_token_ids": True}
        chat = await client.post(CHAT, json={**BODIES[CHAT], "logprobs": True, "top_logprobs": 1, **more})
        plain = await client.post(TEXT, json={**BODIES[TEXT], "logprobs": 1, **more})
        names = [f"token_id:{token}" for token in tokens]
        content = chat.json()["choices"][0]["logprobs"]["content"]
        assert [entry["token"] for entry in content] == [entry["top_logprobs"][0]["token"] for entry in content] == names
        assert plain.json()["choices"][0]["logprobs"]["tokens"] == names
        assert [list(top) for top in plain.json()["choices"][0]["logprobs"]["top_logprobs"]] == [[name] for name in names]

    play(text, talk)


def test_what_a_model_must_not_write_reaches_its_turn_as_tokens(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        await client.post(
            CHAT, json={**BODIES[CHAT], "bad_words": ["the", "zebra"], "allowed_token_ids": [7, 9], "temperature": 0}
        )
        sampling = served.driver.turns[0].sampling
        encoded = [tuple(served.driver.tokens(word) or ()) for word in ("the", " the", "zebra", " zebra")]
        assert encoded[0] in sampling.forbidden_runs
        assert encoded[2] in sampling.forbidden_runs
        assert set(sampling.forbidden_runs) <= set(encoded)
        assert (encoded[1] in sampling.forbidden_runs) == (len(encoded[1]) == len(encoded[0]))
        assert sampling.allowed_token_ids == (7, 9)

    play(text, talk)


@pytest.mark.parametrize(
    ("more", "kept"),
    [
        ({}, 30),
        ({"truncate_prompt_tokens": 30}, 30),
        ({"truncate_prompt_tokens": 12}, 12),
        ({"truncate_prompt_tokens": 1000}, 30),
        ({"truncate_prompt_tokens": -1, "max_tokens": 4080}, 16),
        ({"truncate_prompt_tokens": -1, "max_tokens": 4096}, 1),
        ({"truncate_prompt_tokens": -1, "max_tokens": 9999}, 1),
    ],
)
def test_a_prompt_keeps_its_end(text: ModelText, more: dict[str, Any], kept: int) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        prompt = list(range(100, 130))
        answer = await client.post(TEXT, json={**BODIES[TEXT], "prompt": prompt, **more})
        assert answer.json()["usage"]["prompt_tokens"] == kept
        [turn] = served.driver.turns
        assert list(memoryview(turn.prompt.tokens).cast("I")) == prompt[-kept:]

    play(text, talk)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_more_tokens_than_the_context_has_room_for_are_as_many_as_it_has(text: ModelText, path: str) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        served.driver.script = lambda turn: Script(finish=FinishReason.LENGTH)
        answer = await client.post(path, json={**BODIES[path], "max_tokens": 10**9})
        [turn] = served.driver.turns
        assert turn.output_tokens_max == text.context_tokens_max - turn.prompt.count
        assert answer.json()["choices"][0]["finish_reason"] == "length"

    play(text, talk)
