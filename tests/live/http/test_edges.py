"""What is wrong, unserved or odd in a request gets one clear error that names the place; nothing is ignored silently."""

import json
from typing import Any

import httpx
import pytest

from orchestrator.live.text.models import ModelText
from tests.live.scripted import MODEL, Script, Served, play

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "x"}]
CHAT_BODY = {"model": MODEL, "messages": USER, "max_tokens": 4}
TEXT_BODY = {"model": MODEL, "prompt": "x", "max_tokens": 4}
NOW = {"type": "function", "function": {"name": "now"}}


def check_error(answer: httpx.Response, status: int) -> dict[str, Any]:
    """Return the error of an answer, which is well-formed and says which request it was."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


#: Bodies with a place for what is nested, and how deeply.
DEEP = {
    "unknown field": ('{"model":"MODEL","messages":[{"role":"user","content":"x"}],"unknown":DEEP}', 5000),
    "served field": ('{"model":"MODEL","messages":[{"role":"user","content":DEEP}]}', 5000),
    "tool": (
        '{"model":"MODEL","messages":[{"role":"user","content":"x"}],'
        '"tools":[{"type":"function","function":{"name":"x","parameters":{"a":DEEP}}}]}',
        985,
    ),
    "template variable": ('{"model":"MODEL","messages":[{"role":"user","content":"x"}],"chat_template_kwargs":{"a":DEEP}}', 2000),
    "whole body": ("DEEP", 100_000),
}

INNER = {"properties": {"a": {"items": {"anyOf": [{"type": "string"}, {"type": "array", "uniqueItems": True}]}}}}


def strictly(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}


def named(schema: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


@pytest.mark.parametrize(("body", "levels"), DEEP.values(), ids=DEEP)
def test_what_is_nested_too_deeply_is_a_bad_request(text: ModelText, body: str, levels: int) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        check_error(await client.post(CHAT, content=body.replace("MODEL", MODEL).replace("DEEP", nested(levels))), 400)
        assert (await client.post(CHAT, json=CHAT_BODY)).status_code == 200

    play(text, talk)


def test_arguments_of_earlier_calls_may_be_anything_a_model_wrote(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        for arguments in (nested(3000), "{", "", "null", "[1]", '{"a": 1}'):
            call = {"id": "c", "function": {"name": "x", "arguments": arguments}}
            messages = [{"role": "assistant", "content": None, "tool_calls": [call]}, *USER]
            answer = await client.post(CHAT, json={**CHAT_BODY, "messages": messages})
            assert answer.status_code == 200 or check_error(answer, 400), arguments

    play(text, talk)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": [{"type": "function", "function": -1}]}, "tools[0].function"),
        ({"tools": [NOW, {"type": "function"}]}, "tools[1].function"),
        ({"tools": [{"function": {"name": 3}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"name": "x", "parameters": "y"}}]}, "tools[0].function.parameters"),
        ({"tools": [3]}, "tools[0]"),
        ({"tools": {"a": 1}}, "tools"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": 1}]}]}, "messages[0].tool_calls[0].function"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"stream_options": 1}, "stream_options"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"1": "x"}}, "logit_bias[...]"),
        ({"nvext": {"agent_hints": 1}}, "nvext.agent_hints"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "structural_tag", "structures": [], "triggers": []}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
        ({"response_format": named(None)}, "response_format.json_schema.schema"),
        ({"response_format": named({"type": "quaternion"})}, "response_format.json_schema.schema"),
        ({"response_format": named(INNER)}, "response_format.json_schema.schema.properties.a.items.anyOf[1]"),
        ({"response_format": 3}, "response_format"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 2, "max_tokens": 9}, "min_tokens"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", 3]}, "guided_choice"),
        ({"guided_grammar": "start: <|im_end|>"}, "guided_grammar"),
        ({"guided_grammar": "root ::= gone"}, "guided_grammar"),
        ({"guided_json": '{"type": '}, "guided_json"),
        ({"guided_json": [1]}, "guided_json"),
        ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "zzz"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [strictly({"not": {}})], "tool_choice": "required"}, "tools[0].function.parameters"),
        ({"tools": [NOW, strictly({"properties": {"a": {"not": {}}}})]}, "tools[1].function.parameters.properties.a"),
        ({"tools": [NOW], "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        ({"tool_choice": "bogus"}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": [NOW], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"logits_processors": ["x"]}, "logits_processors"),
        ({"suffix": "x"}, "suffix"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"allowed_token_ids": [1 << 20]}, "allowed_token_ids"),
        ({"echo": True}, "echo"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"continue_final_message": True, "messages": [{"role": "assistant", "content": " "}]}, "continue_final_message"),
        ({"n": 129}, "n"),
        ({"max_tokens": 4.5}, "max_tokens"),
        ({"max_tokens": "4"}, "max_tokens"),
    ],
)
def test_a_wrong_or_unserved_field_is_named(text: ModelText, changes: dict[str, Any], param: str) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        error = check_error(await client.post(CHAT, json={**CHAT_BODY, **changes}), 400)
        assert error["param"] == param
        assert param in error["message"] or param == "n"
        assert not served.driver.turns

    play(text, talk)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": 4.0},
        {"n": 2.0, "seed": 7.0, "stop_token_ids": [5.0]},
        {"response_format": {"type": "text"}, "parallel_tool_calls": True, "tool_choice": "auto", "echo": False},
        {"tools": [NOW, {"type": "web_search"}], "tool_choice": "none"},
        {"repetition_penalty": 1.0, "min_tokens": 0, "modalities": ["text"], "skip_special_tokens": True},
        {"reasoning_effort": "low", "store": True, "metadata": {"a": "b"}, "user": "u", "nobody_knows": [[1]]},
    ],
)
def test_what_asks_for_what_happens_anyway_is_served(text: ModelText, changes: dict[str, Any]) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        answer = await client.post(CHAT, json={**CHAT_BODY, **changes})
        assert answer.status_code == 200, answer.text

    play(text, talk)


def test_a_byte_order_mark_is_read_over(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        for path, body in ((CHAT, CHAT_BODY), (TEXT, TEXT_BODY)):
            answer = await client.post(path, content=b"\xef\xbb\xbf" + json.dumps(body).encode())
            assert answer.status_code == 200

    play(text, talk)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_other_methods_are_refused(text: ModelText, path: str) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        for method in ("GET", "PUT", "DELETE", "OPTIONS"):
            answer = await client.request(method, path)
            check_error(answer, 405)
            assert answer.headers["allow"] == "POST"

    play(text, talk)


def test_the_last_message_is_gone_on_with(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        messages = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "one two"}]
        body = {**CHAT_BODY, "messages": messages, "continue_final_message": True, "add_generation_prompt": False}
        assert (await client.post(CHAT, json=body)).status_code == 200
        [turn] = served.driver.turns
        tokens = list(memoryview(turn.prompt.tokens).cast("I"))
        assert served.driver.text.tokenizer.decode(tokens, skip_special_tokens=False).endswith("assistant\none two")

    play(text, talk)


def test_web_pages_may_call_from_the_origins_that_are_named(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        ask = {"Origin": "https://app.test", "Access-Control-Request-Method": "POST"}
        answer = await client.options(CHAT, headers=ask)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://app.test"
        assert "POST" in answer.headers["access-control-allow-methods"]
        answer = await client.post(CHAT, json=CHAT_BODY, headers={"Origin": "https://app.test"})
        assert answer.headers["access-control-allow-origin"] == "https://app.test"
        other = await client.options(CHAT, headers={**ask, "Origin": "https://evil.test"})
        assert "access-control-allow-origin" not in other.headers

    play(text, talk, cors_origins=("https://app.test",))


def test_a_request_of_too_many_generations_starts_none(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        error = check_error(await client.post(TEXT, json={**TEXT_BODY, "prompt": ["x"] * 5, "n": 2}), 400)
        assert error["code"] == "too_many_generations"
        check_error(await client.post(CHAT, json={**CHAT_BODY, "n": 9}), 400)
        assert not served.driver.turns
        assert (await client.post(TEXT, json={**TEXT_BODY, "prompt": ["x"] * 4, "n": 2})).status_code == 200
        assert len(served.driver.turns) == 8

    play(text, talk, generations_max=8)


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_ours_ends_one_request_with_a_well_formed_error(
    text: ModelText, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        def broken(turn: object) -> Script:
            raise ZeroDivisionError("a fault")

        served.driver.script = broken
        answer = await client.post(CHAT, json={**CHAT_BODY, "stream": stream}, headers={"x-request-id": "find-me"})
        error = check_error(answer, 500)
        assert "a fault" not in error["message"]
        assert [record for record in caplog.records if record.exc_info and vars(record)["request"] == "find-me"]
        assert 'status="500"' in served.metrics.render().decode()
        served.driver.script = lambda turn: Script(["fine"])
        assert (await client.post(CHAT, json=CHAT_BODY)).status_code == 200

    play(text, talk)


def test_every_answer_names_its_request_and_errors_are_counted(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        for path in ("/v1/models", "/v1/models/nothing", "/v1/nothing", "/ready", "/metrics", "/status", "/"):
            answer = await client.get(path, headers={"x-request-id": "mine"})
            assert answer.headers["x-request-id"] == "mine", path
            if answer.status_code >= 400:
                check_error(answer, 404)
        page = served.metrics.render().decode()
        assert 'weft_requests_total{endpoint="/v1/models",model="unknown",status="404",tenant="default"} 1.0' in page
        assert 'weft_requests_total{endpoint="unknown",model="unknown",status="404",tenant="default"} 2.0' in page
        assert 'endpoint="/ready"' not in page  # probes come every few seconds

    play(text, talk)
