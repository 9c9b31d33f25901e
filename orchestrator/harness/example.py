"""A scripted agent that programs its cache, against any cluster that serves: `python -m orchestrator.harness.example --help`.

    main      o-o-o-o-o-+            +-o-o-o-o-# compacted: -o-o-o-o  end
                        ├ helper o-o-o end
                        └ helper o-o-o end

Between its turns the agent runs tools, and other sessions ask the same nodes, so that contexts that nobody speaks for sink or are
forgotten. What it says is made up, the same for the same seed; what the model answers is appended whatever it is.

What it tells the cluster, and when:

    pin             its system prompt, which all of its agents begin with, before its first turn
    tool_started    as a turn is over: how long the tool takes; tool_finished as it is back
    prefetch        as a tool is about to return
    fork            before its helpers' first turns, which begin with its context
    supersede       once it is compacted: the rest of its former context is dead; evict: and let go of at once
    end_session     as an agent is done
"""

import argparse
import asyncio
import json
import random
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import openai
from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table

from orchestrator.harness import words
from orchestrator.harness.channels import CacheError
from orchestrator.harness.client import AsyncCacheClient
from orchestrator.harness.sessions import AsyncSession
from orchestrator.harness.words import Effect, Price, Result, Tier

Message = dict[str, str]

TOOL, JOIN = "bash", "sub-agents"
_VERBS = ("list", "read", "count", "compare", "search", "check", "build", "measure", "move", "print")
_NOUNS = ("loom", "shuttle", "warp", "weft", "reed", "heddle", "bobbin", "cloth", "pattern", "thread", "fringe", "selvage")


@dataclass(frozen=True, slots=True)
class Script:
    """How long all of it is."""

    model: str = "default"
    #: Of what is said: another one, and no cache knows any of it.
    seed: str = ""
    #: Turns of the main agent; after which of them its helpers begin, and which of them is the one that compacts.
    turns: int = 30
    fork_turn: int = 10
    compact_turn: int = 20
    helpers: int = 2
    helper_turns: int = 5
    #: Words of the system prompt, of what a tool returns, of what others ask.
    system_words: int = 160
    tool_words: int = 36
    other_words: int = 240
    #: Tokens of an answer.
    answer_tokens: int = 24
    #: Seconds that a tool takes.
    tool_s: float = 0.2
    #: Requests of other sessions while a tool of the main agent runs.
    others: int = 2
    #: Seconds that the system prompt is pinned.
    pin_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn, as the client saw it."""

    agent: str
    number: int
    prompt_tokens: int
    cached_tokens: int
    #: Seconds to the first token.
    ttft_s: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What came of it."""

    turns: list[Turn]
    #: Each action by its verb, in order, and what became of it.
    results: list[tuple[str, Result]]
    #: What actions have earned.
    effects: list[Effect]
    #: What the pin comes to, and what it saves a turn.
    price: Price


class Told(AsyncCacheClient):
    """A client that keeps what became of each action, and what it has earned."""

    def __init__(self, address: str, key: str = "", certificates: bytes | None = None) -> None:
        super().__init__(address, key, certificates)
        self.results: list[tuple[str, Result]] = []
        #: By message and action.
        self.effects: dict[tuple[str, str], Effect] = {}

    async def apply(self, *actions: words.Action, message_id: str = "") -> list[Result]:
        """Have actions done; keep their results."""
        results = await super().apply(*actions, message_id=message_id)
        self.results += zip((str(action.WhichOneof("verb")) for action in actions), results, strict=True)
        return results

    async def look(self, target: words.Target) -> None:
        """Take in what actions on a target have earned so far."""
        (residency,) = await self.lookup(target)
        self.effects |= {(effect.message_id, effect.action_id): effect for effect in residency.effects}


def text(seed: str, count: int) -> str:
    """Return so many words, the same for the same seed."""
    chance = random.Random(seed)
    lines = (f"{chance.choice(_VERBS)} the {chance.choice(_NOUNS)} {chance.randrange(1000)}" for _ in range(count // 4 + 1))
    return ", ".join(lines)


@dataclass
class Agent:
    """One agent: what has been said, and the session it was said in."""

    name: str
    session: AsyncSession
    cache: Told
    client: AsyncOpenAI
    script: Script
    messages: list[Message]
    #: Those of all agents, as they end.
    turns: list[Turn]
    number: int = 0

    async def ask(self, said: str, note: str = "") -> None:
        """Have one turn served: append what is said and what is answered."""
        self.number += 1
        self.messages.append({"role": "user", "content": said})
        turn, answer = await ask(self.session.riding(self.client), self.script, self.messages)
        self.messages.append({"role": "assistant", "content": answer})
        self.turns.append(Turn(self.name, self.number, *turn, note))

    @asynccontextmanager
    async def away(self, tool: str, expected_s: float) -> AsyncGenerator[None]:
        """Run a tool: tell that it runs and that it is back, and have the context near by then."""
        async with self.session.tool_call(tool, expected_s):
            yield
            await self.session.prefetch(Tier.HBM)

    async def end(self) -> None:
        """Tell that the agent is done, after a last look at what was told of it."""
        await self.cache.look(self.session.target)
        await self.session.end()


async def ask(client: AsyncOpenAI, script: Script, messages: Sequence[Message]) -> tuple[tuple[int, int, float], str]:
    """Have a prompt answered; return its tokens, those of them that were cached, the seconds to the first token, the answer."""
    started, first_s, answer = time.perf_counter(), 0.0, ""
    asked: Any = {"messages": list(messages), "stream_options": {"include_usage": True}}
    stream = await client.chat.completions.create(
        model=script.model, max_tokens=script.answer_tokens, temperature=0.0, stream=True, **asked
    )
    prompt_tokens = cached_tokens = 0
    async for chunk in stream:
        for choice in chunk.choices:
            if choice.delta.content:
                first_s = first_s or time.perf_counter() - started
                answer += choice.delta.content
        if chunk.usage is not None:
            details = chunk.usage.prompt_tokens_details
            prompt_tokens, cached_tokens = chunk.usage.prompt_tokens, (details.cached_tokens if details else None) or 0
    return (prompt_tokens, cached_tokens, first_s or time.perf_counter() - started), answer


async def run(script: Script, client: AsyncOpenAI, cache: Told) -> Report:
    """Run the agent. Raises `CacheError`, `openai.OpenAIError`."""
    system = {
        "role": "system",
        "content": f"Agent {script.seed}, you weave. {text(f'{script.seed} system', script.system_words)}",
    }
    pin = words.pin(words.conversation({"model": script.model, "messages": [system]}), ttl_s=script.pin_s)
    pinned = (await cache.apply(pin))[0]
    turns: list[Turn] = []
    main = Agent("main", AsyncSession(cache, model=script.model), cache, client, script, [system], turns)
    for number in range(1, script.turns + 1):
        if number == script.compact_turn:
            await main.ask("Sum up what has been done so far, and what is left.", "to compact")
            await _compact(main, system, pinned.tokens)
        else:
            await main.ask(_result(main.name, number, script))
        if number == script.fork_turn:
            await _help(main)
        elif number < script.turns:
            async with main.away(TOOL, script.tool_s):
                await asyncio.gather(asyncio.sleep(script.tool_s), *_others(number, client, script))
    (price,) = await cache.quote(pin)
    await main.end()
    if pinned.lease:
        await cache.look(words.lease(pinned.lease))
        await cache.apply(words.unpin(words.lease(pinned.lease)))
    return Report(turns, cache.results, list(cache.effects.values()), price)


def _result(name: str, number: int, script: Script) -> str:
    """Return what a turn begins with: what the tool returned that the one before has called."""
    return f"{name}, step {number}: the tool returned: {text(f'{script.seed} {name} {number}', script.tool_words)}. What is next?"


async def _compact(main: Agent, system: Message, kept_tokens: int) -> None:
    """Go on from a summary, and tell that of the former context only the beginning is used."""
    session = main.session
    rest = words.session(session.name, session.model, (kept_tokens, 0))
    await main.cache.apply(words.supersede(session.name, kept_tokens, session.model), words.evict(rest))
    summary = text(f"{main.script.seed} summary", main.script.tool_words)
    main.messages = [system, {"role": "user", "content": f"So far: {summary}"}, {"role": "assistant", "content": "Understood."}]


async def _help(main: Agent) -> None:
    """Let helpers go on from the agent's context, side by side, and take in what they found."""
    script = main.script
    async with main.away(JOIN, script.helper_turns * script.tool_s):
        sessions = await main.session.fork(script.helpers)
        helpers = [
            Agent(f"helper {number}", session, main.cache, main.client, script, list(main.messages), main.turns)
            for number, session in enumerate(sessions, 1)
        ]
        await asyncio.gather(*(_work(helper) for helper in helpers))
    found = ". ".join(f"{helper.name} found: {helper.messages[-1]['content']}" for helper in helpers)
    main.messages.append({"role": "user", "content": found})
    main.messages.append({"role": "assistant", "content": "Understood."})


async def _work(helper: Agent) -> None:
    for number in range(1, helper.script.helper_turns + 1):
        await helper.ask(_result(helper.name, number, helper.script), "forked" if number == 1 else "")
        if number < helper.script.helper_turns:
            async with helper.away(TOOL, helper.script.tool_s):
                await asyncio.sleep(helper.script.tool_s)
    await helper.end()


def _others(number: int, client: AsyncOpenAI, script: Script) -> list[Awaitable[Any]]:
    """Ask what other sessions ask meanwhile: nothing that anybody has asked before."""
    prompts = [text(f"{script.seed} other {number} {other}", script.other_words) for other in range(script.others)]
    return [ask(client, script, [{"role": "user", "content": prompt}]) for prompt in prompts]


# --- what came of it ------------------------------------------------------------------------------------------------------


def show(report: Report, out: Console) -> None:
    """Print each turn, and what became of what was told."""
    table = Table("agent", "turn", "prompt", "cached", "computed", "TTFT", "")
    for turn in report.turns:
        counts = (turn.prompt_tokens, turn.cached_tokens, turn.prompt_tokens - turn.cached_tokens)
        ttft = f"{1000 * turn.ttft_s:.0f} ms"
        table.add_row(turn.agent, str(turn.number), *(f"{count:,}" for count in counts), ttft, turn.note)
    out.print(table)
    prompts, cached = sum(turn.prompt_tokens for turn in report.turns), sum(turn.cached_tokens for turn in report.turns)
    out.print(f"{len(report.turns)} turns of {prompts:,} prompt tokens, {cached / max(prompts, 1):.1%} of them cached.")
    out.print(_hints(report))
    price = report.price
    if price.result.done:
        saved = f"after {1000 * price.ttft_cached_s:.0f} ms instead of {1000 * price.ttft_computed_s:.0f} ms"
        out.print(
            f"Predicted of the {price.result.tokens:,} pinned tokens: on an idle node what follows them begins {saved}.",
            soft_wrap=True,
        )


def _hints(report: Report) -> Table:
    """Return, by verb, how often something was told, what became of it, and what it has earned."""
    table = Table("told", "times", "became", "found", "earned", "saved")
    for verb in dict.fromkeys(verb for verb, _ in report.results):
        results = [result for told, result in report.results if told == verb]
        became = Counter(f"{result.outcome} ({result.reason})" if result.reason else result.outcome.value for result in results)
        effects = [effect for effect in report.effects if effect.verb == verb]
        found, earned = sum(effect.found_tokens for effect in effects), sum(effect.earned_tokens for effect in effects)
        saved_s = sum(effect.saved_s for effect in effects)
        outcomes = ", ".join(f"{count} {what}" for what, count in became.items())
        table.add_row(verb, str(len(results)), outcomes, f"{found:,}", f"{earned:,}", f"{1000 * saved_s:.0f} ms")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example; return its exit code."""
    usual = Script()
    parser = argparse.ArgumentParser(
        "python -m orchestrator.harness.example", description="a scripted agent that programs its cache"
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="a gateway's HTTP port (%(default)s)")
    parser.add_argument("--grpc", default="127.0.0.1:8001", metavar="HOST:PORT", help="its gRPC port (%(default)s)")
    parser.add_argument("--key", default="", help="a tenant's key, where one is asked for")
    parser.add_argument("--model", default=usual.model, help="model or alias (%(default)s)")
    parser.add_argument(
        "--others", type=int, default=usual.others, metavar="N", help="requests of others in each pause (%(default)s)"
    )
    parser.add_argument("--seed", help="of what is said (another one at each run, which no cache knows)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else uuid.uuid4().hex[:8]
    script = Script(model=options.model, seed=seed, others=options.others)
    try:
        report = asyncio.run(_main(script, options.url, options.grpc, options.key))
    except (CacheError, openai.OpenAIError) as error:
        print(f"example: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        show(report, Console(highlight=False))
    return 0


async def _main(script: Script, url: str, grpc_address: str, key: str) -> Report:
    async with Told(grpc_address, key) as cache, AsyncOpenAI(base_url=f"{url}/v1", api_key=key or "none") as client:
        return await run(script, client, cache)


if __name__ == "__main__":
    sys.exit(main())
