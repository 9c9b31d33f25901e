"""Reenacts agent sessions against a gateway over HTTP, closed loop: a turn starts when those before it have ended.

Used by the demo and by measurements. Prompts are token ids, so that lengths and shared prefixes are exactly those of the trace.
Agents may tell the gateway's cache API what simulated ones tell: that a tool runs and for how long, and when they are through.
"""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from orchestrator.harness import words
from orchestrator.harness.channels import CacheError
from orchestrator.harness.client import AsyncCacheClient
from orchestrator.harness.sessions import SESSION_HEADER
from orchestrator.sim.hints import Agents, HintProgram, Pause
from orchestrator.traces import TracedTurn, read_trace

TURN_S_MAX = 120.0


@dataclass(frozen=True, slots=True)
class ScaledTurn:
    """One turn of a trace with its lengths scaled and its blocks turned into tokens."""

    id: int
    session: str
    agent: str
    after: tuple[int, ...]
    gap_s: float
    prompt: tuple[int, ...] = field(repr=False)
    output_tokens: int
    #: The class that is asked for; empty: none.
    service_tier: str = ""

    @property
    def arrival_s(self) -> float:
        """Seconds after the start at which it comes if it waits for none."""
        return self.gap_s


@dataclass(frozen=True, slots=True)
class TurnResult:
    """How one turn went."""

    turn: ScaledTurn
    #: Seconds since the start.
    started_s: float
    ended_s: float
    ttft_s: float
    output_tokens: int
    cached_tokens: int
    #: Empty if it went well.
    failure: str = ""
    #: Seconds between the pieces of its answer as they came: one a token, but for tokens that end no character.
    gaps_s: tuple[float, ...] = field(default=(), repr=False)

    @property
    def itl_s(self) -> float | None:
        """Mean seconds between tokens, None with fewer than two."""
        if self.output_tokens < 2:
            return None
        return (self.ended_s - self.started_s - self.ttft_s) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Scale:
    """How a trace is made small enough for this machine."""

    #: Tokens of one trace block in the reenactment; the trace's own is usually 64.
    block_tokens: int
    #: Reenacted tokens a recorded output token.
    output: float
    #: Reenacted seconds a recorded second of tool or user time.
    gap: float
    #: Token ids are drawn from [first, first + count): ordinary tokens of the served model's vocabulary.
    token_first: int
    token_count: int
    gap_s_max: float = 2.0


def scaled_turns(path: Path, scale: Scale) -> list[ScaledTurn]:
    """Read a trace and scale it. A block's tokens depend on its id alone, so that equal ids give equal prefixes."""
    return [scaled(turn, scale) for turn in read_trace(path)]


def scaled(turn: TracedTurn, scale: Scale) -> ScaledTurn:
    """Scale one turn."""
    prompt = [token for block in turn.blocks for token in block_tokens(block, scale)]
    tail_tokens = (turn.input_tokens % turn.block_tokens) * scale.block_tokens // turn.block_tokens
    prompt += block_tokens(-turn.id - 1, scale)[: max(tail_tokens, 1)]
    return ScaledTurn(
        id=turn.id,
        session=f"{turn.session}/{turn.agent}",
        agent=turn.agent,
        after=turn.after,
        gap_s=min(turn.gap_s * scale.gap, scale.gap_s_max),
        prompt=tuple(prompt),
        output_tokens=max(1, round(turn.output_tokens * scale.output)),
    )


def block_tokens(block: int, scale: Scale) -> list[int]:
    """Return the tokens that stand for a trace block."""
    chance = random.Random(block)
    return [scale.token_first + chance.randrange(scale.token_count) for _ in range(scale.block_tokens)]


@dataclass(frozen=True, slots=True)
class Harness:
    """What agents tell of themselves, and the gateway's gRPC address that they tell it to."""

    address: str
    program: HintProgram


class Reenactment:
    """One closed-loop reenactment; `run` may be called once. Without a harness agents tell nothing."""

    def __init__(
        self,
        url: str,
        model: str,
        turns: Sequence[ScaledTurn],
        on_end: Callable[[TurnResult], None],
        harness: Harness | None = None,
    ) -> None:
        self._url = url
        self._model = model
        self._turns = turns
        self._on_end = on_end
        self._harness = harness
        self._cache: AsyncCacheClient | None = None
        self._agents = Agents(turns, harness.program if harness is not None else HintProgram.NONE)
        self._begins = {turn.id: asyncio.Event() for turn in turns}
        self._started_at = 0.0

    async def run(self) -> list[TurnResult]:
        """Reenact all turns and return their results in the trace's order."""
        limits = httpx.Limits(max_connections=256)
        async with contextlib.AsyncExitStack() as stack:
            client = httpx.AsyncClient(base_url=self._url, timeout=TURN_S_MAX, limits=limits, trust_env=False)
            await stack.enter_async_context(client)
            if self._harness is not None:
                self._cache = await stack.enter_async_context(AsyncCacheClient(self._harness.address))
            self._started_at = time.perf_counter()
            return await asyncio.gather(*(self._turn(client, turn) for turn in self._turns))

    async def _turn(self, client: httpx.AsyncClient, turn: ScaledTurn) -> TurnResult:
        if turn.after:
            await self._begins[turn.id].wait()
        await asyncio.sleep(turn.gap_s)
        try:
            result = await self._request(client, turn)
        except httpx.HTTPError as error:
            result = self._failed(turn, repr(error))
        coming = self._agents.end(turn)
        problem = await self._tell(turn, coming)
        for other in coming:
            self._begins[other.id].set()
        result = replace(result, failure=result.failure or problem)
        self._on_end(result)
        return result

    async def _tell(self, turn: ScaledTurn, coming: Sequence[ScaledTurn]) -> str:
        """Tell what comes after a turn, as agents do before their tools run; return what was wrong with it, empty for nothing."""
        actions = [
            words.tool_started(told.turn.session, told.tool, told.expected_s or 0.0, model=self._model)
            if isinstance(told, Pause)
            else words.end_session(told.turn.session, self._model)
            for told in self._agents.told(turn, coming, time.perf_counter() - self._started_at)
        ]
        if self._cache is None or not actions:
            return ""
        try:
            results = await self._cache.apply(*actions)
        except CacheError as error:
            return f"what its agent told: {error}"
        refused = next((one for one in results if not one.done), None)
        return f"what its agent told: {refused.outcome}, {refused.message}" if refused is not None else ""

    async def _request(self, client: httpx.AsyncClient, turn: ScaledTurn) -> TurnResult:
        body = {"model": self._model, "prompt": list(turn.prompt), "max_tokens": turn.output_tokens, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
        if turn.service_tier:
            body["service_tier"] = turn.service_tier
        started = time.perf_counter()
        came_s: list[float] = []
        usage: dict[str, Any] = {}
        async with client.stream("POST", "/v1/completions", json=body, headers={SESSION_HEADER: turn.session}) as answer:
            if answer.status_code != httpx.codes.OK:
                return self._failed(turn, f"{answer.status_code}: {(await answer.aread())[:200]!r}")
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                now = time.perf_counter()
                event = json.loads(line[6:])
                if "error" in event:
                    return self._failed(turn, str(event["error"]))
                usage = event.get("usage") or usage
                if any(choice["text"] for choice in event["choices"]):
                    came_s.append(now)
        ended = time.perf_counter()
        return TurnResult(
            turn=turn,
            started_s=started - self._started_at,
            ended_s=ended - self._started_at,
            ttft_s=(came_s[0] if came_s else ended) - started,
            output_tokens=int(usage.get("completion_tokens", 0)),
            cached_tokens=int(usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)),
            gaps_s=tuple(after - before for before, after in pairwise(came_s)),
        )

    def _failed(self, turn: ScaledTurn, failure: str) -> TurnResult:
        now = time.perf_counter() - self._started_at
        return TurnResult(turn, started_s=now, ended_s=now, ttft_s=0.0, output_tokens=0, cached_tokens=0, failure=failure)
