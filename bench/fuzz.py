"""Throws hostile input at a cluster: bodies at a gateway, frames at the wires inside; counts answers, deaths and memory.

    python -m bench.fuzz [--bodies 100000] [--frames 100000] [--seed N] [--json FILE]

Every body must be answered with a well-formed error or result, every link must be up at the end, and no process may have grown
over 1.2 times its memory. Exit code 1 says that something of it does not hold.
"""

import argparse
import asyncio
import json
import logging
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from bench.draft_frames import DraftVictim
from bench.frames import GatewayVictim, NodeVictim, SourceVictim, Victim
from bench.lane_frames import DoorVictim, RankVictim
from bench.model import make_tiny_model
from bench.mutations import hostile_bodies, hostile_frames
from bench.servers import family, resident, weft_server
from bench.store_frames import AdvisedVictim, StoreVictim

CLUSTER = """
[gateway]
generations_max = 16
responses_max = 100
[[pools]]
name = "all"
kind = "aggregated"
[pools.engine]
name = "profiled"
block_tokens = 16
blocks = 4096
# Ends the answers of those that ask for as many tokens as there can be: they took nine tenths of the time.
context_tokens_max = 4096
[pools.profile]
"""
#: Ends of wires that frames are thrown at.
VICTIMS: tuple[type[Victim], ...] = (
    NodeVictim, SourceVictim, GatewayVictim, StoreVictim, AdvisedVictim, RankVictim, DoorVictim, DraftVictim,
)  # fmt: skip
#: Bodies under way at once, and seconds in which each must be answered.
TOGETHER, ANSWER_S_MAX = 16, 30.0
#: Inputs before memory is read for the first time: caches are full then.
WARM = 5_000
GROWTH_MAX = 1.2
#: How the stream of a response or of a message ends, whatever became of it.
_LAST_EVENT = re.compile(r"event: (response\.(completed|incomplete|failed)|message_stop|error)\ndata: .*\n\n\Z")


@dataclass(slots=True)
class Outcome:
    """What came of one kind of input."""

    what: str
    inputs: int
    answers: Counter[str] = field(default_factory=Counter[str])
    #: What must not be, with an example.
    wrong: list[str] = field(default_factory=list[str])
    growth: float = 1.0

    @property
    def holds(self) -> bool:
        """Tell whether nothing went wrong."""
        return not self.wrong and self.growth <= GROWTH_MAX


def problem_of(answer: httpx.Response) -> str:
    """Return what is wrong with an answer's form, empty if nothing is."""
    if answer.status_code >= 500 and answer.status_code not in (503, 504, 529):
        return f"status {answer.status_code}"
    if "x-request-id" not in answer.headers:
        return "no x-request-id"
    if answer.status_code == 200:
        finished = answer.text.endswith(("}", "data: [DONE]\n\n")) or _LAST_EVENT.search(answer.text) is not None
        return "" if finished else "an unfinished answer"
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status_code} without an error body"
    return "" if isinstance(error.get("message"), str) and error["message"] else "an error without a message"


async def throw_bodies(url: str, bodies: Iterator[tuple[str, bytes]], outcome: Outcome) -> None:
    """Send bodies, some at a time, and look at every answer."""
    limits = httpx.Limits(max_connections=TOGETHER)
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_S_MAX, limits=limits, trust_env=False) as client:

        async def throw() -> None:
            for path, body in bodies:
                try:
                    answer = await client.post(path, content=body, headers={"content-type": "application/json"})
                except httpx.HTTPError as error:
                    outcome.wrong.append(f"{type(error).__name__} for {body[:300]!r}")
                    continue
                outcome.answers[str(answer.status_code)] += 1
                if problem := problem_of(answer):
                    outcome.wrong.append(f"{problem} for {path} {body[:600]!r}")

        await asyncio.gather(*(throw() for _ in range(TOGETHER)))


def fuzz_bodies(count: int, seed: int) -> Outcome:
    """Throw bodies at `weft serve`."""
    outcome = Outcome("bodies", count)
    with tempfile.TemporaryDirectory() as folder:
        model, _ = make_tiny_model(Path(folder) / "tiny")
        with weft_server(CLUSTER, model) as server:
            pids = [pid for root in server.pids for pid in family(root)]
            bodies = hostile_bodies(seed, "default")
            asyncio.run(throw_bodies(server.url, islice(bodies, min(WARM, count)), outcome))
            before = {pid: resident(pid) for pid in pids}
            asyncio.run(throw_bodies(server.url, islice(bodies, max(0, count - WARM)), outcome))
            grown = {pid: resident(pid) / size for pid, size in before.items() if size}
            outcome.growth = max(grown.values(), default=1.0)
            outcome.wrong += [f"process {pid} is gone" for pid, ratio in grown.items() if not ratio]
            ready = httpx.get(f"{server.url}/ready", trust_env=False).status_code
            outcome.wrong += [] if ready == 200 else [f"/ready says {ready} at the end"]
    return outcome


async def fuzz_wire(victim: Victim, count: int, seed: int) -> Outcome:
    """Throw frames at one end of a wire, then see that it still does its work."""
    outcome = Outcome(victim.what, count)
    frames = hostile_frames(seed, victim.good)
    async with victim:
        warm = min(WARM, count // 2)
        await victim.take(list(islice(frames, warm)), outcome.answers)
        before, left = resident(victim.pid), count - warm
        while left > 0:
            await victim.take(list(islice(frames, min(WARM, left))), outcome.answers)
            left -= WARM
        outcome.growth = resident(victim.pid) / before if before else 1.0
        if not await victim.works():
            outcome.wrong.append("it does not work any more")
        outcome.wrong += victim.failures
    return outcome


def fuzz_wires(count: int, seed: int) -> list[Outcome]:
    """Throw frames at every end."""
    with tempfile.TemporaryDirectory() as folder:
        model, _ = make_tiny_model(Path(folder) / "tiny")
        return [asyncio.run(fuzz_wire(victim(model), count, seed)) for victim in VICTIMS if count]


def main() -> int:
    """Fuzz, print a table; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bodies", type=int, default=100_000, help="bodies (%(default)s)")
    parser.add_argument("--frames", type=int, default=100_000, help="frames for each end of a wire (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write what came of it here")
    options = parser.parse_args()
    # What is said of hostile input is put into words, which may go wrong as well, and read by nobody.
    logging.basicConfig(filename=os.devnull)
    outcomes = [fuzz_bodies(options.bodies, options.seed)] if options.bodies else []
    outcomes += fuzz_wires(options.frames, options.seed)
    table = Table("input", "how many", "how it ended", "memory", "holds")
    for one in outcomes:
        ended = ", ".join(f"{count:,} x {answer}" for answer, count in one.answers.most_common())
        table.add_row(one.what, f"{one.inputs:,}", ended, f"{one.growth:.2f}x", "yes" if one.holds else "NO")
    Console(width=140).print(table)
    for one in outcomes:
        for wrong in one.wrong[:10]:
            print(f"{one.what}: {wrong}")
    if options.json:
        options.json.write_text(
            json.dumps([{each.name: getattr(one, each.name) for each in fields(one)} for one in outcomes], indent=1)
        )
    return 0 if all(one.holds for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
