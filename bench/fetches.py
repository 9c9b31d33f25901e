"""Measures how fast a prompt's KV blocks come from another node, over the transport that nodes of one host use.

A prefill and a decode node serve prompts twice, one after the other. The second time the prefill node has them cached, and the
decode node, whose pool holds little more than one, has forgotten them: it fetches every block, of which all but the last ones are
there at once. What counts is the time from the order to fetch to the event with which those are present, in the decode node's
journal; its slope over the bytes is the bandwidth, its start the latency.
"""

import asyncio
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean

import msgspec
import numpy as np

from bench.servers import weft_server
from orchestrator.cli.reenact import Reenactment, ScaledTurn, TurnResult
from orchestrator.core.commands import Fetch
from orchestrator.core.events import FetchEnded, FetchProgressed
from orchestrator.core.types import RequestId
from orchestrator.wire.journal import SUFFIX, Entry, NodeHeader, read_journal

#: Prompts of so many tokens, each this often and once to fill the prefill node's cache.
LENGTHS = (1200, 2500, 5000, 8000)
ROUNDS = 4
#: Blocks at a prompt's end that are computed anew and come later.
BLOCKS_LATE_MAX = 2


def cluster_text(journal: Path, block_tokens: int, threads: int) -> str:
    """Return a cluster file with a prefill node that keeps all prompts and a decode node that keeps about one."""
    all_blocks, one = sum(LENGTHS) // block_tokens * 2, max(LENGTHS) // block_tokens + 64
    text = f'[cluster]\njournal = "{journal}"\n\n[router]\ndisaggregation_tokens_min = 0\n\n[models.default]\n\n'
    for kind, blocks in (("prefill", all_blocks), ("decode", one)):
        engine = f"engine = {{ threads = {threads}, block_tokens = {block_tokens}, blocks = {blocks} }}"
        scheduler = "scheduler = { step_tokens_max = 512, sequences_max = 8 }"
        text += f'[[pools]]\nname = "{kind}"\nkind = "{kind}"\n{engine}\n{scheduler}\n\n'
    return text


def prompts(token_first: int, token_count: int) -> list[ScaledTurn]:
    """Return each length's prompt again and again, in rounds, one after the other."""
    chance = random.Random(9)
    made = [tuple(token_first + chance.randrange(token_count) for _ in range(length)) for length in LENGTHS]
    turns: list[ScaledTurn] = []
    for _ in range(ROUNDS + 1):
        for prompt in made:
            after = (len(turns) - 1,) if turns else ()
            turns.append(ScaledTurn(len(turns), f"s{len(turns)}", "main", after, 0.05, prompt, 2))
    return turns


def measure_fetches(model: Path, block_tokens: int, threads: int, token_first: int, token_count: int) -> tuple[float, float]:
    """Return the bytes a second and the seconds before the first of them."""
    turns = prompts(token_first, token_count)
    with tempfile.TemporaryDirectory() as folder:
        with weft_server(cluster_text(Path(folder), block_tokens, threads), model) as server:
            asyncio.run(Reenactment(server.url, "default", turns, _must_go_well).run())
        (path,) = Path(folder).glob(f"node-decode-*{SUFFIX}")
        journal = read_journal(path)
        assert isinstance(journal.header, NodeHeader), f"{path} is a node's journal"
        spec = journal.header.spec
        arrivals = list(arrived(journal.entries, spec.block_tokens, spec.block_bytes))
    return line(arrivals[len(LENGTHS) :])


def arrived(entries: Iterable[Entry], block_tokens: int, block_bytes: int) -> Iterator[tuple[int, float]]:
    """Yield bytes and seconds of each fetch until all but its last blocks were there, in order."""
    decoder = msgspec.msgpack.Decoder(Fetch)
    running: dict[RequestId, tuple[float, Fetch]] = {}
    for entry in entries:
        if isinstance(entry.event, FetchProgressed | FetchEnded) and entry.event.request in running:
            began, fetch = running[entry.event.request]
            blocks = entry.event.tokens // block_tokens - fetch.first_block
            if blocks >= len(fetch.blocks) - BLOCKS_LATE_MAX:
                del running[entry.event.request]
                yield blocks * block_bytes, entry.now - began
        for name, command in entry.commands or ():
            if name == Fetch.__name__:
                fetch = decoder.decode(command)
                running[fetch.request] = entry.now, fetch


def line(arrivals: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return bandwidth and latency of the line through the mean times of each size."""
    sizes = sorted({size for size, _ in arrivals})
    means = [fmean(seconds for other, seconds in arrivals if other == size) for size in sizes]
    slope, start = np.polyfit(sizes, means, 1)
    return 1.0 / max(float(slope), 1e-12), max(float(start), 0.0)


def _must_go_well(result: TurnResult) -> None:
    if result.failure:
        raise RuntimeError(f"turn {result.turn.id}: {result.failure}")
