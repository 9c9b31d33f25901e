"""An agent of thirty turns with two helpers and a compaction over Anthropic's API: its usage is right on every turn.

    main      o-o-o-o-o-+            +-o-o-o-o-# compacted: -o-o-o-o
                        ├ helper, goes on from main's context: o-o-o-o-o
                        └ helper, begins anew with the same system prompt: o-o-o-o-o

Each turn's messages are kept twice, as the API has them and as the chat template does, so that what must be cached is worked out
from prompts that `transformers` renders. Answers have one token, which nothing is computed upon.
"""

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from anthropic import AsyncAnthropic
from transformers import AutoTokenizer

from orchestrator.core.config import ClusterConfig
from orchestrator.core.types import PoolKind
from orchestrator.harness.example import text
from tests.harness.overheard import Exchange, Reckoned, reckon
from tests.harness.test_example import BLOCK_TOKENS, cluster_of
from tests.live.serving import run
from tests.live.test_hints import Gateway, gateways, session
from workers.engines.checkpoint import default_model_path

TURNS, FORK_TURN, COMPACT_TURN, HELPER_TURNS = 30, 10, 20, 5
SHORT: Any = {"type": "ephemeral"}
LONG: Any = {"type": "ephemeral", "ttl": "1h"}
SYSTEM = f"You weave. {text('system', 60)}"
SCHEMA = {"type": "object", "properties": {"command": {"type": "string"}}}
TOOL: Any = {"name": "bash", "description": "Runs a command.", "input_schema": SCHEMA}
TOOL_SHOWN: Any = {"type": "function", "function": {"name": "bash", "description": "Runs a command.", "parameters": SCHEMA}}


@dataclass
class Heard:
    """Everything that was asked and answered."""

    exchanges: list[Exchange] = field(default_factory=list)
    usages: list[Any] = field(default_factory=list)
    serial: int = 0

    def count(self) -> int:
        self.serial += 1
        return self.serial


@dataclass
class Agent:
    """One agent: what has been said, as the API has it and as the template does."""

    name: str
    client: AsyncAnthropic
    heard: Heard
    parent: str = ""
    messages: list[Any] = field(default_factory=list)
    shown: list[dict[str, Any]] = field(default_factory=lambda: [{"role": "system", "content": SYSTEM}])
    turns: int = 0

    def say(self, words: str) -> None:
        self.messages.append({"role": "user", "content": [{"type": "text", "text": words}]})
        self.shown.append({"role": "user", "content": words})

    async def turn(self) -> None:
        """Have a turn served, and a tool called: the last message is marked, as harnesses do."""
        self.turns += 1
        exchange = Exchange([*self.shown], self.heard.count(), tools=[TOOL_SHOWN])
        self.heard.exchanges.append(exchange)
        place = len(self.heard.usages)
        self.heard.usages.append(None)
        *before, last = self.messages
        marked = {**last, "content": [*last["content"][:-1], {**last["content"][-1], "cache_control": SHORT}]}
        named = {"x-claude-code-agent-id": self.name} | ({"x-claude-code-parent-agent-id": self.parent} if self.parent else {})
        answer = await self.client.messages.create(
            model="default",
            max_tokens=1,
            system=[{"type": "text", "text": SYSTEM, "cache_control": LONG}],
            messages=[*before, marked],
            tools=[TOOL],
            extra_headers=named,
        )
        exchange.ended = self.heard.count()
        usage = self.heard.usages[place] = answer.usage
        exchange.cached_tokens = usage.cache_read_input_tokens or 0
        parts = (usage.input_tokens, usage.cache_creation_input_tokens or 0, exchange.cached_tokens)
        exchange.prompt_tokens = sum(parts)
        self._call([block.text for block in answer.content if block.type == "text"])

    def _call(self, said: list[str]) -> None:
        """Append what was answered, and a call as a model would make it with its result."""
        call, command = f"{self.name}-{self.turns}", text(f"{self.name} {self.turns}", 4)
        result = text(f"{call} result", 24)
        texts = [{"type": "text", "text": one} for one in said]
        arguments = {"command": command}
        self.messages.append(
            {"role": "assistant", "content": [*texts, {"type": "tool_use", "id": call, "name": "bash", "input": arguments}]}
        )
        self.messages.append({"role": "user", "content": [{"type": "tool_result", "tool_use_id": call, "content": result}]})
        made = {"id": call, "type": "function", "function": {"name": "bash", "arguments": arguments}}
        self.shown.append({"role": "assistant", "content": "".join(said), "tool_calls": [made]})
        self.shown.append({"role": "tool", "content": result, "tool_call_id": call})

    def compact(self) -> None:
        """Go on from a summary."""
        self.messages, self.shown = [], self.shown[:1]
        self.say(f"So far: {text('summary', 40)}")


async def work(gateway: Gateway) -> Heard:
    """Run the agent."""
    heard = Heard()
    async with AsyncAnthropic(base_url=str(gateway.http.base_url), api_key="none", max_retries=0) as client:
        main = Agent("main", client, heard)
        main.say("Weave a cloth.")
        for number in range(1, TURNS + 1):
            await main.turn()
            if number == FORK_TURN:
                forked = Agent("forked", client, heard, "main", [*main.messages], [*main.shown])
                fresh = Agent("fresh", client, heard, "main")
                forked.say("Look at the warp.")
                fresh.say("Look at the weft.")
                await asyncio.gather(*(_help(helper) for helper in (forked, fresh)))
            elif number == COMPACT_TURN:
                main.compact()
    return heard


async def _help(helper: Agent) -> None:
    for _ in range(HELPER_TURNS):
        await helper.turn()


def system_tokens(exchange: Exchange) -> int:
    """Return how many tokens of a prompt lie before the end of its system prompt."""
    tokenizer: Any = AutoTokenizer.from_pretrained(default_model_path())
    prompt = tokenizer.apply_chat_template(exchange.messages, tools=exchange.tools, add_generation_prompt=True, tokenize=False)
    end = prompt.index(SYSTEM) + len(SYSTEM)
    offsets = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return sum(stop <= end for _, stop in offsets)


def check(reckoned: list[Reckoned], heard: Heard) -> None:
    """See that every turn read what a cache had, created what is new before its breakpoints, and that this adds up."""
    assert len(reckoned) == TURNS + 2 * HELPER_TURNS
    assert [one for one in reckoned if not one.least_tokens <= one.cached_tokens <= one.most_tokens] == []
    assert sum(not one.certain for one in reckoned) <= 2
    system = system_tokens(heard.exchanges[0]) // BLOCK_TOKENS * BLOCK_TOKENS
    for exchange, usage in zip(heard.exchanges, heard.usages, strict=True):
        read, whole = exchange.cached_tokens, exchange.prompt_tokens // BLOCK_TOKENS * BLOCK_TOKENS
        created = usage.cache_creation
        assert created.ephemeral_1h_input_tokens == max(0, system - read)
        assert created.ephemeral_5m_input_tokens == whole - max(read, system)
        assert usage.input_tokens == exchange.prompt_tokens - whole


def roomy(*kinds: PoolKind) -> ClusterConfig:
    """Return a cluster in which leases have room for all that three agents mark."""
    config = cluster_of(*kinds)
    pools = tuple(replace(pool, engine=replace(pool.engine, blocks=4096)) for pool in config.pools)
    return replace(config, pools=pools)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [roomy(PoolKind.AGGREGATED), roomy(PoolKind.PREFILL, PoolKind.DECODE)],
    ids=["one node", "prefill and decode"],
)
def test_usage_is_right_on_every_turn(config: ClusterConfig) -> None:
    async def scenario() -> None:
        async with gateways(config=config) as (_, (gateway,)):
            heard = await work(gateway)
            check(reckon(heard.exchanges, default_model_path(), BLOCK_TOKENS), heard)
            for name in ("main", "forked", "fresh"):
                held = (await gateway.lookup(session(name))).leases
                assert {lease.ttl_s > 300 for lease in held if lease.session == name} == {True, False}

    run(scenario)
