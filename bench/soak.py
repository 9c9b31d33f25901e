"""Memory of every process of a cluster over many requests in many sessions, once all caches are full.

    python -m bench.soak [--requests 50000] [--sessions 2000] [--json FILE]

Agent sessions whose contexts grow turn by turn, chat over HTTP, on nodes that compute nothing, with a store below them. What is
kept of sessions, prompts and blocks, in every tier, is bounded far below what all of them need, so that everything is full before
half of the requests are answered; from then on no process may grow over 1.1 times its memory. Exit code 1 says that one did, or
that a request failed.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from bench.model import make_tiny_model
from bench.servers import family, resident, weft_server

CLUSTER = """
[gateway]
prompts_cached_max = 512
prompt_chars_cached_max = 4194304
chain_blocks_max = 20000
[limits]
sessions_max = 500
[store]
cpu_bytes = 2097152
cmx = "file://{folder}/cmx"
cmx_bytes = 4194304
[models.tiny]
[[pools]]
name = "prefill"
model = "tiny"
kind = "prefill"
nodes = 1
engine = {{ name = "profiled", block_tokens = 16, blocks = 8192 }}
[[pools]]
name = "decode"
model = "tiny"
kind = "decode"
nodes = 2
engine = {{ name = "profiled", block_tokens = 16, blocks = 8192 }}
"""
TOGETHER, ANSWER_S_MAX = 32, 60.0
#: Words of a turn's message, and of what a session starts with; a session starts anew after so many turns.
TURN_WORDS, START_WORDS, TURNS = 24, 120, 25
GROWTH_MAX = 1.1
#: Times that memory is read, evenly spaced.
READINGS = 10


@dataclass(frozen=True, slots=True)
class Memory:
    """One process's resident memory."""

    process: str
    #: MiB after each tenth of the requests.
    readings: Sequence[float]

    @property
    def growth(self) -> float:
        """The end over the middle."""
        return self.readings[-1] / self.readings[len(self.readings) // 2 - 1]


class Agents:
    """Sessions at different points of their lives, all from one seed."""

    def __init__(self, sessions: int, words: Sequence[str]) -> None:
        self._chance = random.Random(5)
        self._words = words
        self._messages = [self._past(self._chance.randrange(TURNS)) for _ in range(sessions)]
        self._busy: set[int] = set()

    def _past(self, turns: int) -> list[dict[str, str]]:
        """Return a conversation of so many turns: contexts are as long in the beginning as later on."""
        return [
            {"role": role, "content": " ".join(self._chance.choices(self._words, k=words))}
            for turn in range(turns)
            for role, words in (("user", TURN_WORDS if turn else START_WORDS), ("assistant", 8))
        ]

    def next_turn(self) -> tuple[int, list[dict[str, str]]]:
        """Return a session that has no turn under way, and its conversation with one more message."""
        session = self._chance.randrange(len(self._messages))
        while session in self._busy:
            session = (session + 1) % len(self._messages)
        self._busy.add(session)
        messages = self._messages[session]
        if len(messages) >= 2 * TURNS:
            messages.clear()
        words = TURN_WORDS if messages else START_WORDS
        messages.append({"role": "user", "content": " ".join(self._chance.choices(self._words, k=words))})
        return session, messages

    def answered(self, session: int, text: str) -> None:
        """Let a session go on with an answer."""
        self._messages[session].append({"role": "assistant", "content": text})
        self._busy.remove(session)


async def _turns(client: httpx.AsyncClient, agents: Agents, turns: int, failures: list[str]) -> None:
    left = turns

    async def work() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            session, messages = agents.next_turn()
            body = {"model": "tiny", "messages": messages, "max_tokens": 8}
            answer = await client.post("/v1/chat/completions", json=body, headers={"x-session-id": f"agent-{session}"})
            if answer.status_code == 200:
                agents.answered(session, answer.json()["choices"][0]["message"]["content"])
            else:
                failures.append(answer.text[:200])
                agents.answered(session, "")

    await asyncio.gather(*(work() for _ in range(TOGETHER)))


async def soak(url: str, pids: Sequence[int], requests: int, agents: Agents) -> tuple[list[Memory], list[str]]:
    """Send the requests; return every process's memory, and what failed."""
    failures: list[str] = []
    readings: dict[int, list[float]] = {pid: [] for root in pids for pid in family(root)}
    limits = httpx.Limits(max_connections=TOGETHER)
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_S_MAX, limits=limits, trust_env=False) as client:
        for reading in range(READINGS):
            await _turns(client, agents, requests // READINGS, failures)
            for pid, sizes in readings.items():
                sizes.append(resident(pid) / 2**20)
            if sys.stderr.isatty():
                print(f"\r{(reading + 1) * requests // READINGS} of {requests} requests", end="", file=sys.stderr, flush=True)
    return [Memory(_name(pid), sizes) for pid, sizes in readings.items() if min(sizes) > 0], failures


def _name(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
    return next((word for word in words if word.startswith("ray::")), Path(words[0]).name if words else str(pid))


def main(arguments: Sequence[str]) -> int:
    """Soak, print the table, write JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=50_000, help="requests in all (default 50,000)")
    parser.add_argument("--sessions", type=int, default=2_000, help="sessions they belong to (default 2,000)")
    parser.add_argument("--json", type=Path, help="write the readings here")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        model, words = make_tiny_model(Path(folder) / "tiny")
        agents = Agents(options.sessions, words)
        with weft_server(CLUSTER.format(folder=folder), model) as server:
            memories, failures = asyncio.run(soak(server.url, server.pids, options.requests, agents))
    shown = Table(
        "process", "MiB after 10%", "50%", "100%", "growth", title=f"{options.requests} requests, {options.sessions} sessions"
    )
    for one in memories:
        sizes = one.readings
        shown.add_row(one.process, *(f"{sizes[place]:.1f}" for place in (0, READINGS // 2 - 1, -1)), f"{one.growth:.3f}")
    Console(width=110).print(shown)
    for failure in failures[:3]:
        print(f"failed: {failure}", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps({"failures": len(failures), "processes": [asdict(one) for one in memories]}, indent=1))
    return 1 if failures or any(one.growth > GROWTH_MAX for one in memories) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
