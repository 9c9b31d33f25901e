"""A driver whose turns say what the test wrote, and a gateway served over real sockets on top of it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from openai import AsyncOpenAI

from orchestrator.core.config import ClusterConfig, GatewayConfig, ModelConfig, PoolConfig, TenantConfig
from orchestrator.core.types import FinishReason, GatewayId, ModelName, PoolKind, RequestId, SessionId, TenantId
from orchestrator.live.http.gateway import Gateway
from orchestrator.live.intake import Intake, Keep
from orchestrator.live.metrics import Metrics
from orchestrator.live.text.models import ModelText
from orchestrator.live.turns import Delta, PromptScores, TokenLogprob, Turn, TurnFailed
from workers.engines.vocabulary import write_json, write_tokenizer

MODEL = ModelName("tiny")
VOCABULARY = 1024


@dataclass
class Script:
    """What a turn brings: text, token ids, or `None` to wait until cancelled; then an end."""

    steps: Sequence[str | Sequence[int] | None] = ("Hello", " world")
    finish: FinishReason = FinishReason.STOP
    cached_tokens: int = 0
    failure: TurnFailed | None = None


class ScriptedStream:
    """One turn's script being read."""

    def __init__(self, driver: "ScriptedDriver", request: RequestId, turn: Turn, script: Script) -> None:
        self.request = request
        self.turn = turn
        self.cancelled = asyncio.Event()
        self.waiting = asyncio.Event()
        #: What the model was understood to wait for at its end.
        self.wanted: str | None = None
        self._driver = driver
        self._script = script
        self._steps = [driver.tokens(step) for step in script.steps]
        self._prompt_scores = _prompt_scores(turn)

    async def read(self) -> Delta:
        """Return the next step's tokens."""
        await asyncio.sleep(0)
        if self._steps:
            tokens = self._steps.pop(0)
            if tokens is None:
                self.waiting.set()
                await asyncio.Event().wait()
            wanted = self.turn.sampling.logprobs is not None
            scores = [self._logprob(token) for token in tokens or ()] if wanted else []
            told, self._prompt_scores = self._prompt_scores, None
            return Delta(list(tokens or ()), scores, cached_tokens=self._script.cached_tokens, prompt_scores=told)
        if self._script.failure is not None:
            raise self._script.failure
        return Delta([], [], self._script.finish, self._script.cached_tokens)

    def answered(self, tool: str) -> None:
        """Note what the model waits for."""
        self.wanted = tool

    def cancel(self) -> None:
        """Say that nobody wants more."""
        self.cancelled.set()

    def _logprob(self, token: int) -> TokenLogprob:
        top = [(token, -0.5), (token + 1, -1.5), (token + 2, -2.5)]
        return TokenLogprob(-0.5, top[: self.turn.sampling.logprobs or 0])


def _prompt_scores(turn: Turn) -> PromptScores | None:
    """Return scores of a turn's prompt, if they are wanted: each token as likely as its place in the prompt is early."""
    tops = turn.sampling.prompt_logprobs
    if tops is None:
        return None
    scores = PromptScores(turn.prompt.count, tops)
    for place, token in enumerate(memoryview(turn.prompt.tokens).cast("I")):
        if place:
            top = [(token + number, -place - number / 8) for number in range(tops)]
            scores.add(place, [-place], [1], [one for one, _ in top], [value for _, value in top])
    return scores


@dataclass
class ScriptedDriver:
    """Takes turns and plays scripts."""

    text: ModelText
    script: Callable[[Turn], Script] = lambda turn: Script()
    streams: list[ScriptedStream] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    ready: bool = True

    def start(self, turn: Turn) -> ScriptedStream:
        """Play the script for this turn."""
        stream = ScriptedStream(self, RequestId(len(self.streams)), turn, self.script(turn))
        self.streams.append(stream)
        self.started.set()
        return stream

    def tokens(self, step: str | Sequence[int] | None) -> Sequence[int] | None:
        """Return a step's token ids."""
        return self.text.tokenizer.encode(step, add_special_tokens=False).ids if isinstance(step, str) else step

    @property
    def turns(self) -> list[Turn]:
        """Everything asked for."""
        return [stream.turn for stream in self.streams]


def make_model(folder: Path, context_tokens: int = 4096) -> ModelText:
    """Return the text side of a small checkpoint without weights."""
    tokenizer = write_tokenizer(folder, VOCABULARY, context_tokens)
    write_json(folder / "config.json", {"max_position_embeddings": context_tokens})
    write_json(folder / "generation_config.json", {"eos_token_id": tokenizer.token_to_id("<|im_end|>")})
    return ModelText.load(folder, "scripted")


def make_config(tenants: tuple[TenantConfig, ...] = (), **gateway: object) -> ClusterConfig:
    """Return a configuration with one model and two aliases."""
    models = {MODEL: ModelConfig(aliases=("gpt-4o", "claude-*"))}
    pools = (PoolConfig("pool", PoolKind.AGGREGATED, model=MODEL),)
    return ClusterConfig(gateway=GatewayConfig(**gateway), models=models, pools=pools, tenants=tenants)  # type: ignore[arg-type]


TENANTS = (TenantConfig("acme", ("sk-good",)), TenantConfig("globex", ("sk-other",)))


@dataclass
class Lives:
    """Keeps all that it is asked to, up to so many blocks of each, and remembers what that was."""

    blocks_max: int = 1 << 30
    asked: list[Keep] = field(default_factory=list)
    #: Sessions and what they forked from.
    begun: list[tuple[SessionId, SessionId]] = field(default_factory=list)

    def begins(self, model: ModelName, tenant: TenantId, session: SessionId, parent: SessionId) -> None:
        """Take note of it."""
        self.begun.append((session, parent))

    def kept(self, model: ModelName, tenant: TenantId, session: SessionId | None, keep: Keep) -> int:
        """Keep some of it."""
        self.asked.append(keep)
        return min(len(keep.hashes), self.blocks_max)

    def ends(self, model: ModelName, tenant: TenantId, session: SessionId) -> None:
        """Take note of nothing."""


@dataclass
class Served:
    """A gateway that listens."""

    gateway: Gateway
    intake: Intake
    driver: ScriptedDriver
    metrics: Metrics
    url: str
    lives: Lives


@asynccontextmanager
async def serve(
    text: ModelText, number: int = 0, tenants: tuple[TenantConfig, ...] = (), **gateway: object
) -> AsyncIterator[Served]:
    """Serve a gateway on a free port."""
    metrics = Metrics(GatewayId(number), number + 1, {})
    driver = ScriptedDriver(text)
    config, lives = make_config(tenants, **gateway), Lives()
    intake = Intake(config, {MODEL: text}, b"secret")
    one = Gateway(config, GatewayId(number), intake, driver, metrics, metrics.render, lambda: {"nodes": []}, lives=lambda: lives)
    port = await one.start("127.0.0.1", 0)
    try:
        yield Served(one, intake, driver, metrics, f"{'https' if gateway.get('cert') else 'http'}://127.0.0.1:{port}", lives)
    finally:
        await one.stop()


def play(text: ModelText, talk: Callable[[httpx.AsyncClient, Served], Awaitable[None]], **gateway: object) -> None:
    """Serve a gateway while `talk` asks it as any program does."""

    async def run() -> None:
        async with serve(text, **gateway) as served, httpx.AsyncClient(base_url=served.url) as client:
            await talk(client, served)

    asyncio.run(run())


def play_openai(
    text: ModelText, talk: Callable[[AsyncOpenAI, Served], Awaitable[None]], key: str = "sk-any", **gateway: object
) -> None:
    """Serve a gateway while `talk` asks it through OpenAI's client."""

    async def run() -> None:
        async with (
            serve(text, **gateway) as served,
            AsyncOpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0) as client,
        ):
            await talk(client, served)

    asyncio.run(run())
