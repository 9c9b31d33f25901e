"""Every path says what may be done with it: methods, trailing slashes, pages of other origins, what is not served; and tokens."""

from importlib.metadata import version
from typing import Any

import httpx
import pytest

from orchestrator.live.text.models import ModelText
from tests.live.scripted import MODEL, TENANTS, Served, play

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hi there"}]
GET = {"GET", "HEAD"}
#: What each path may be asked by.
METHODS: dict[str, set[str]] = {
    CHAT: {"POST"},
    TEXT: {"POST"},
    "/tokenize": {"POST"},
    "/detokenize": {"POST"},
    "/weft.cache.v1.CacheControl/Lookup": {"POST"},
    "/v1/models": GET,
    f"/v1/models/{MODEL}": GET,
    "/live": GET,
    "/health": GET,
    "/ready": GET,
    "/ping": GET | {"POST"},
    "/metrics": GET,
    "/status": GET,
    "/version": GET,
}


def test_another_method_is_refused_with_those_that_there_are(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        for path, allowed in METHODS.items():
            for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - allowed:
                answer = await client.request(method, path)
                assert (method, path, answer.status_code) == (method, path, 405)
                assert answer.headers["allow"] == ", ".join(sorted(allowed))
                assert method == "HEAD" or answer.json()["error"]["code"] == "method_not_allowed"

    play(text, talk)


def test_what_can_be_got_can_be_looked_at_without_a_body(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        for path in (path for path, allowed in METHODS.items() if "HEAD" in allowed):
            whole, head = await client.get(path), await client.head(path)
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-type"] == whole.headers["content-type"]

    play(text, talk)


def test_a_slash_at_the_end_changes_nothing(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        bodies = {CHAT: {"messages": USER}, TEXT: {"prompt": "Hi"}, "/tokenize": {"prompt": "Hi"}, "/detokenize": {"tokens": [5]}}
        for path, allowed in METHODS.items():
            if "GET" in allowed:
                assert (await client.get(f"{path}/")).status_code == 200
            elif path in bodies:
                assert (await client.post(f"{path}/", json={"model": MODEL, **bodies[path]})).status_code == 200
        # Counted as what they are.
        page = served.metrics.render().decode()
        assert f'endpoint="{CHAT}",model="{MODEL}",status="200"' in page
        assert '/"' not in page

    play(text, talk)


def test_pages_of_named_origins_may_ask_every_path(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        for path, allowed in METHODS.items():
            for method in allowed:
                ask = {
                    "Origin": "https://app.test",
                    "Access-Control-Request-Method": method,
                    "Access-Control-Request-Headers": "authorization, content-type, x-session-id",
                }
                answer = await client.options(path, headers=ask)
                assert answer.status_code == 200
                assert answer.headers["access-control-allow-origin"] == "https://app.test"
                assert method in answer.headers["access-control-allow-methods"]
                assert "x-session-id" in answer.headers["access-control-allow-headers"]

    play(text, talk, cors_origins=("https://app.test",))


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("/v1/embeddings", "embeddings"),
        ("/v1/audio/transcriptions", "speech"),
        ("/v1/audio/speech", "speech"),
        ("/v1/images/generations", "images"),
        ("/v1/moderations", "moderations"),
        ("/v1/files", "files"),
        ("/v1/files/file-1/content", "files"),
        ("/v1/batches", "batches"),
        ("/v1/fine_tuning/jobs", "fine-tuning"),
        ("/v1/rerank", "rankings"),
        ("/v2/rerank", "rankings"),
        ("/score", "scores"),
    ],
)
def test_what_others_serve_and_we_do_not_is_said_so(text: ModelText, path: str, what: str) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        for answer in (await client.post(path, json={"model": MODEL, "input": "x"}), await client.get(path)):
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (404, "not_served")
            assert path in error["message"]
            assert what in error["message"]

    play(text, talk)


def test_the_version_is_told(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        assert (await client.get("/version")).json() == {"version": version("weft")}
        served.driver.ready = False
        assert (await client.post("/ping")).status_code == 503

    play(text, talk)


@pytest.mark.parametrize(
    "asked",
    [
        {"messages": USER},
        {"messages": USER, "add_generation_prompt": False},
        {
            "messages": [*USER, {"role": "assistant", "content": "well"}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
        {"messages": USER, "tools": [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]},
    ],
)
def test_a_conversation_has_the_tokens_that_it_is_asked_with(text: ModelText, asked: dict[str, Any]) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        found = (await client.post("/tokenize", json={"model": MODEL, **asked})).json()
        assert (await client.post(CHAT, json={"model": MODEL, **asked})).status_code == 200
        tokens = list(memoryview(served.driver.turns[0].prompt.tokens).cast("I"))
        expected = {"tokens": tokens, "count": len(tokens), "max_model_len": text.context_tokens_max, "token_strs": None}
        assert found == expected
        assert (await client.post("/detokenize", json={"tokens": tokens})).json() == {
            "prompt": text.tokenizer.decode(tokens, skip_special_tokens=False)
        }

    play(text, talk)


def test_a_text_has_its_tokens_and_they_have_names(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        long = "a word " * text.context_tokens_max
        for prompt in ("Hello wörld", long, ""):
            encoded = text.tokenizer.encode(prompt)
            found = (await client.post("/tokenize", json={"prompt": prompt, "return_token_strs": True})).json()
            assert (found["tokens"], found["count"]) == (encoded.ids, len(encoded.ids))
            assert found["token_strs"] == encoded.tokens
            assert (await client.post("/detokenize", json={"model": "gpt-4o", "tokens": encoded.ids})).json()["prompt"] == prompt

    play(text, talk)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {}, "messages"),
        ("/tokenize", {"prompt": "x", "messages": USER}, "prompt"),
        ("/tokenize", {"messages": USER, "chat_template": "x"}, "chat_template"),
        ("/detokenize", {"tokens": [1 << 20]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {}, None),
    ],
)
def test_what_has_no_tokens_is_refused_by_name(text: ModelText, path: str, body: dict[str, Any], param: str | None) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        answer = await client.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        unknown = await client.post(path, json={"model": "nobody's", "prompt": "x", "tokens": [5]})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")

    play(text, talk)


def test_tokens_are_told_to_those_who_have_a_key(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [5]})):
            assert (await client.post(path, json=body)).status_code == 401
            assert (await client.post(path, json=body, headers={"authorization": "Bearer sk-good"})).status_code == 200

    play(text, talk, tenants=TENANTS)
