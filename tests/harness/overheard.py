"""What goes over HTTP between a client and a server, and how much of each prompt a cache can have: worked out from that alone.

A block is cached if an earlier request had all of its tokens, and all before them, in its prompt or its answer. Known of the
engine: only whole blocks are kept; an answer's last token is never computed upon, so that it is in no block; at least a prompt's
last token is computed.
"""

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from transformers import AutoTokenizer


@dataclass
class Exchange:
    """A request and its answer."""

    messages: list[dict[str, Any]]
    #: Where it began and ended in the order of all beginnings and ends.
    began: int
    ended: int | None = None
    #: Bytes of each of the answer's tokens.
    answer: list[bytes] = field(default_factory=list)
    whole: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    #: What the model is told that it may call, as the template has it.
    tools: list[dict[str, Any]] | None = None

    def read(self, lines: Sequence[str]) -> None:
        """Take in the events that it was answered with."""
        for line in lines:
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            for choice in chunk["choices"]:
                self.answer += [bytes(token["bytes"]) for token in (choice["logprobs"] or {"content": ()})["content"]]
                self.whole = self.whole or choice["finish_reason"] == "length"
            if chunk.get("usage"):
                self.prompt_tokens = chunk["usage"]["prompt_tokens"]
                self.cached_tokens = chunk["usage"]["prompt_tokens_details"]["cached_tokens"]


class Overheard(httpx.AsyncBaseTransport):
    """Passes chat requests on, has their tokens told as well, and keeps what was said."""

    def __init__(self) -> None:
        self._inner = httpx.AsyncHTTPTransport()
        self._serial = 0
        self.exchanges: list[Exchange] = []

    def count(self) -> int:
        self._serial += 1
        return self._serial

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(await request.aread())
        exchange = Exchange(body["messages"], self.count())
        self.exchanges.append(exchange)
        headers = [(name, value) for name, value in request.headers.items() if name != "content-length"]
        asked = httpx.Request(request.method, request.url, headers=headers, json={**body, "logprobs": True})
        asked.extensions.update(request.extensions)
        answer = await self._inner.handle_async_request(asked)
        answer.stream = _Ear(answer, exchange, self)
        return answer

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Ear(httpx.AsyncByteStream):
    def __init__(self, answer: httpx.Response, exchange: Exchange, overheard: Overheard) -> None:
        self._stream, self._exchange, self._overheard = answer.stream, exchange, overheard

    async def __aiter__(self) -> AsyncIterator[bytes]:
        heard = b""
        assert isinstance(self._stream, httpx.AsyncByteStream)
        async for part in self._stream:
            heard += part
            if b"data: [DONE]" in heard and self._exchange.ended is None:
                self._exchange.read(heard.decode().splitlines())
                self._exchange.ended = self._overheard.count()
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()  # type: ignore[union-attr]


@dataclass(frozen=True)
class Reckoned:
    """What an exchange was told of its cached tokens, and what they can have been."""

    cached_tokens: int
    #: By what had ended before it began; by that and what went on beside it.
    least_tokens: int
    most_tokens: int

    @property
    def certain(self) -> bool:
        """Whether there is but one right answer."""
        return self.least_tokens == self.most_tokens


def reckon(exchanges: Sequence[Exchange], model: Path, block_tokens: int) -> list[Reckoned]:
    """Return how many tokens of each prompt a cache that forgets nothing has; the count of each prompt's must be right."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    names = {_bytes(name): number for name, number in tokenizer.get_vocab().items()}
    prompts = [
        tokenizer.apply_chat_template(one.messages, tools=one.tools, add_generation_prompt=True, return_dict=True)["input_ids"]
        for one in exchanges
    ]
    assert [one.prompt_tokens for one in exchanges] == [len(prompt) for prompt in prompts]
    answers = [[names[token] for token in one.answer] for one in exchanges]
    # An answer that its end token ended has that one beside.
    present = [p + (a[:-1] if one.whole else a) for p, a, one in zip(prompts, answers, exchanges, strict=True)]

    def common(number: int, other: int) -> int:
        prompt, before = prompts[number], present[other]
        same = next(
            (place for place, (a, b) in enumerate(zip(prompt, before, strict=False)) if a != b), min(len(prompt), len(before))
        )
        return min(same, len(prompt) - 1) // block_tokens * block_tokens

    reckoned: list[Reckoned] = []
    for number, one in enumerate(exchanges):
        assert one.ended is not None, f"request {number} was not answered to its end"
        before = [other for other, that in enumerate(exchanges) if that.ended is not None and that.ended < one.began]
        beside = [other for other, that in enumerate(exchanges) if other != number and that.began < one.ended]
        least, most = (max((common(number, other) for other in others), default=0) for others in (before, beside))
        reckoned.append(Reckoned(one.cached_tokens, least, most))
    return reckoned


def _bytes(token: str) -> bytes:
    """Return what a token of a byte-level vocabulary stands for."""
    return bytes(_BYTES[letter] for letter in token) if all(letter in _BYTES for letter in token) else token.encode()


def _letters() -> dict[str, int]:
    """Return the byte that each letter of byte-level vocabularies stands for: itself if printable, else one from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _letters()
