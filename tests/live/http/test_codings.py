"""Bodies come plain or compressed, whole or in pieces, and none gets larger than it may; who waits for a word to send gets it."""

import asyncio
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence

import httpx
import pytest

from orchestrator.live.http.codings import reader
from orchestrator.live.http.errors import HttpError
from orchestrator.live.text.models import ModelText
from tests.live.scripted import MODEL, Served, play

CHAT = "/v1/chat/completions"
BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hi there " * 50}]}).encode()
MOST = 1 << 16


def bare(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


WAYS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "plain": ("identity", bytes),
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("X-GZip", gzip.compress),
    "gzip members": ("gzip", lambda data: gzip.compress(data[:100]) + gzip.compress(b"") + gzip.compress(data[100:])),
    "deflate": ("deflate", zlib.compress),
    "bare deflate": ("deflate", bare),
}


def read(coding: str, pieces: Sequence[bytes], most: int = MOST) -> bytes:
    reading = reader(coding.encode(), most)
    found = b"".join([reading.add(piece) for piece in pieces])
    reading.finish()
    return found


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[place : place + size] for place in range(0, len(data), size)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 7, MOST])
def test_a_body_is_what_it_was_however_it_is_cut(way: str, size: int) -> None:
    coding, pack = WAYS[way]
    assert read(coding, cut(pack(BODY), size)) == BODY


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 1000, MOST])
def test_a_body_may_be_as_large_as_it_may_be_and_no_larger(way: str, size: int) -> None:
    coding, pack = WAYS[way]
    most = 5000
    assert read(coding, cut(pack(bytes(most)), size), most) == bytes(most)
    with pytest.raises(HttpError) as caught:
        read(coding, cut(pack(bytes(most + 1)), size), most)
    assert caught.value.status == 413


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("deflate", bare)])
def test_a_bomb_is_noticed_before_it_goes_off(coding: str, pack: Callable[[bytes], bytes]) -> None:
    bomb = pack(bytes(1 << 26))
    reading = reader(coding.encode(), 1000)
    with pytest.raises(HttpError) as caught:
        reading.add(bomb)
    assert caught.value.status == 413
    assert len(bomb) < 1 << 18


@pytest.mark.parametrize("way", [way for way in WAYS if way != "plain"])
def test_what_is_not_what_it_says_is_a_bad_request(way: str) -> None:
    coding, pack = WAYS[way]
    whole = pack(BODY)
    wrong = [BODY, whole[:-1], whole[: len(whole) // 2], b"", whole[:1], whole + b"more"]
    for data in wrong:
        with pytest.raises(HttpError) as caught:
            read(coding, [data])
        assert (caught.value.status, caught.value.code) == (400, "invalid_encoding")


@pytest.mark.parametrize("way", WAYS)
def test_compressed_requests_are_served(text: ModelText, way: str) -> None:
    coding, pack = WAYS[way]

    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        headers = {"content-encoding": coding}
        for path, body in ((CHAT, BODY), ("/tokenize", json.dumps({"prompt": "Hi"}).encode())):
            assert (await client.post(path, content=pack(body), headers=headers)).status_code == 200
        assert (await client.post(CHAT, content=pack(bytes(5000)), headers=headers)).status_code == 413
        assert len(served.driver.turns) == 1

    play(text, talk, body_bytes_max=4000)


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip", "gzip;q=1"])
def test_what_is_compressed_otherwise_is_refused_with_what_is_read(text: ModelText, coding: str) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        for path in (CHAT, "/tokenize"):
            answer = await client.post(path, content=BODY, headers={"content-encoding": coding})
            assert answer.status_code == 415
            assert answer.headers["accept-encoding"] == "gzip, deflate"
            assert answer.json()["error"]["code"] == "unsupported_content_encoding"

    play(text, talk)


def test_a_client_that_waits_for_a_word_sends_its_body_after_it(text: ModelText) -> None:
    async def ask(url: str, method: str) -> tuple[bytes, bytes]:
        """Return the first line that comes before the body is sent, and the first one after it."""
        address = httpx.URL(url)
        stream, writer = await asyncio.open_connection(address.host, address.port)
        headers = {"host": "x", "expect": "100-continue", "content-length": len(BODY), "connection": "close"}
        lines = [f"{method} {CHAT} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        writer.write("\r\n".join(lines).encode())
        first = await asyncio.wait_for(stream.readline(), 10)
        writer.write(BODY)
        rest = await asyncio.wait_for(stream.read(), 10)
        writer.close()
        return first, next((line for line in _lines(rest) if line.startswith(b"HTTP/1.1")), b"")

    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        assert await ask(served.url, "POST") == (b"HTTP/1.1 100 Continue\r\n", b"HTTP/1.1 200 OK")
        # What is refused for its head alone need not be sent.
        assert (await ask(served.url, "PUT"))[0] == b"HTTP/1.1 405 Method Not Allowed\r\n"

    play(text, talk)


def _lines(data: bytes) -> Iterator[bytes]:
    yield from data.split(b"\r\n")
