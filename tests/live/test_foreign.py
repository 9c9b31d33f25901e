"""Nothing of a foreign prompt is found: not its blocks, not its tokens; and its owner finds both as before."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.core.config import ClusterConfig, SchedulerConfig, TenantConfig
from orchestrator.core.types import GatewayId, ModelName, TenantId
from orchestrator.live.http.gateway import Gateway
from orchestrator.live.intake import Intake
from orchestrator.live.metrics import Metrics
from orchestrator.live.text.models import ModelText
from tests.live.serving import BLOCK_TOKENS, cluster, together
from workers.engines.checkpoint import default_model_path

MODEL = ModelName("default")
TENANTS = (TenantConfig("acme", ("sk-acme",)), TenantConfig("globex", ("sk-globex",)))
PROMPT = " ".join(f"w{number * number}" for number in range(220))

#: Sends a prompt; returns its tokens, those of them that were cached, and the characters that were tokenised for it.
Ask = Callable[..., Awaitable[tuple[int, int, int]]]


@pytest.fixture(scope="module")
def folder() -> Path:
    return default_model_path()


@contextmanager
def counting(intake: Intake) -> Iterator[list[int]]:
    """Count the characters that any tenant's prompts are tokenised from."""
    seen: list[int] = []

    class Counting:
        def __init__(self, tokenizer: Any) -> None:
            self._tokenizer = tokenizer

        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> object:
            seen.extend(map(len, texts))
            return self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    for prompts in intake.models[MODEL].prompts.values():
        prompts._tokenizer = Counting(prompts._tokenizer)  # type: ignore[assignment]
    yield seen


def play(folder: Path, talk: Callable[[Ask, Intake], Awaitable[None]]) -> None:
    async def run() -> None:
        (pool,) = together().pools
        roomy = replace(pool, engine=replace(pool.engine, blocks=4096), scheduler=SchedulerConfig(step_tokens_max=4096))
        config = ClusterConfig(pools=(roomy,), tenants=TENANTS)
        async with cluster(config, folder) as wire:
            metrics = Metrics(GatewayId(0), 1, {})
            intake = Intake(config, {MODEL: ModelText.load(folder, "weights")}, b"secret")
            gateway = Gateway(config, GatewayId(0), intake, wire.driver, metrics, metrics.render, dict)
            url = f"http://127.0.0.1:{await gateway.start('127.0.0.1', 0)}"
            async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
                with counting(intake) as seen:

                    async def ask(key: str, prompt: str, **more: object) -> tuple[int, int, int]:
                        seen.clear()
                        body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "max_tokens": 1, **more}
                        answer = await client.post(
                            "/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}", "session-id": "same"}
                        )
                        usage = answer.json()["usage"]
                        return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"], sum(seen)

                    await talk(ask, intake)
            await gateway.stop()

    asyncio.run(asyncio.wait_for(run(), 20))


#: Who probes the prompts of "sk-acme" without a salt.
PROBERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sk-globex", {}),
    ("sk-globex", {"cache_salt": "salt"}),
    ("sk-acme", {"cache_salt": "salt"}),
    ("sk-acme", {"nvext": {"cache_salt": "another"}}),
)


def test_a_foreign_prompt_is_computed_and_tokenised_like_an_unknown_one(folder: Path) -> None:
    async def talk(ask: Ask, intake: Intake) -> None:
        for number, (key, more) in enumerate(PROBERS):
            prompt = f"{number} {PROMPT}"
            tokens, cached, tokenised = await ask("sk-acme", prompt)
            assert (cached, tokenised > len(prompt)) == (0, True)
            # The prober's work is that of the first to send it, and the same for what nobody has sent: nothing at all is found.
            assert await ask(key, prompt, **more) == (tokens, 0, tokenised)
            assert (await ask(key, prompt[::-1], **more))[1:] == (0, tokenised)
            # Its owner's blocks are all there, and so is its text.
            owners = await ask("sk-acme", prompt)
            assert owners == (tokens, (tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS, 0)
            # Only now does the prober find it, as its own.
            assert await ask(key, prompt, **more) == owners

    play(folder, talk)


def test_probing_pushes_no_prompt_of_others_out(folder: Path) -> None:
    async def talk(ask: Ask, intake: Intake) -> None:
        short = PROMPT[:1100]
        tokens, *_ = await ask("sk-acme", short)
        kept = intake.models[MODEL].prompts[TenantId("acme")]
        before = (len(kept), kept.chars)
        for number in range(8):
            assert (await ask("sk-globex", short if number == 4 else f"{number} {short}"[:40] + "x" * number))[1] == 0
        assert (len(kept), kept.chars) == before
        assert await ask("sk-acme", short) == (tokens, (tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS, 0)

    play(folder, talk)
