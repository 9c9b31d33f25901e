"""The data and the clockwork of the KV index measurement, shared by our side and the peer's: standard library only.

Both sides run the same cases over the same seeded hashes and print one JSON object a case, so that the peer's can live in an
environment of its own.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

#: Blocks that a `stored` event of the lookup cases brings.
RUN_BLOCKS = 500
APPLY_NODES = 64
APPLY_BLOCKS = 1024
#: Events of chains that nodes hold alone, and of chains that so many hold alike.
SHARED_BY = (1, 16)


@dataclass(frozen=True)
class Plan:
    """How much to measure."""

    depth_blocks: int
    nodes: tuple[int, ...]
    queries: int
    repetitions: int

    @staticmethod
    def of(quick: bool) -> "Plan":
        """Return the whole measurement, or one that only shows that it runs."""
        return Plan(2_000, (8, 64), 20, 1) if quick else Plan(25_000, (8, 64, 512), 100, 5)


class Index(Protocol):
    """One index under test. Blocks are 16 random bytes each; events are made outside the timer."""

    def clear(self, nodes: int) -> None: ...
    def stored(self, node: int, parent: bytes | None, blocks: list[bytes]) -> Any: ...
    def removed(self, node: int, blocks: list[bytes]) -> Any: ...
    def apply(self, node: int, event: Any) -> None: ...
    def query(self, blocks: list[bytes]) -> Any: ...
    def find(self, query: Any) -> Any: ...
    def held(self, found: Any) -> list[int]:
        """Return the blocks found of each node, most first."""
        ...


def chain_of(generator: random.Random, count: int) -> list[bytes]:
    """Return fresh block hashes."""
    return [generator.randbytes(16) for _ in range(count)]


def find_cases(index: Index, plan: Plan) -> list[dict[str, Any]]:
    """Time longest-prefix lookups: every node holds the whole chain, or each a different length of it."""
    rows: list[dict[str, Any]] = []
    for nodes in plan.nodes:
        for shape in ("full", "staggered"):
            blocks = chain_of(random.Random(7), plan.depth_blocks)
            runs = -(-len(blocks) // RUN_BLOCKS)
            lengths = [runs if shape == "full" else max(1, round(runs * (node + 1) / nodes)) for node in range(nodes)]
            index.clear(nodes)
            for node, length in enumerate(lengths):
                _store_chain(index, node, blocks[: length * RUN_BLOCKS], RUN_BLOCKS)
            query = index.query([bytes(bytearray(block)) for block in blocks])
            held = index.held(index.find(query))
            expected = sorted((min(length * RUN_BLOCKS, len(blocks)) for length in lengths), reverse=True)
            assert held == expected, f"found {held[:4]}..., expected {expected[:4]}..."
            times = [_seconds(index.find, query) * 1e6 for _ in range(plan.queries * plan.repetitions)]
            row = {"case": "find", "nodes": nodes, "shape": shape, "blocks": plan.depth_blocks}
            rows.append(row | {"p50_us": statistics.median(times), "p99_us": statistics.quantiles(times, n=100)[-1]})
    return rows


def apply_cases(index: Index, plan: Plan) -> list[dict[str, Any]]:
    """Time events: chains on every node, its own or shared, stored run by run over all nodes, then removed from their ends."""
    rows: list[dict[str, Any]] = []
    for run, shared_by in ((run, shared_by) for shared_by in SHARED_BY for run in (16, 64, 256)):
        stored: list[float] = []
        removed: list[float] = []
        for repetition in range(plan.repetitions):
            generator = random.Random(repetition)
            index.clear(APPLY_NODES)
            chains = [chain_of(generator, APPLY_BLOCKS) for _ in range(APPLY_NODES // shared_by)] * shared_by
            stores = [_stores(index, node, chain, run) for node, chain in enumerate(chains)]
            removes = [_removes(index, node, chain, run) for node, chain in enumerate(chains)]
            stored.append(APPLY_NODES * APPLY_BLOCKS / _apply_seconds(index, stores))
            removed.append(APPLY_NODES * APPLY_BLOCKS / _apply_seconds(index, removes))
        row = {"case": "apply", "event_blocks": run, "shared_by": shared_by}
        rows.append(row | {"stored_per_s": statistics.median(stored), "removed_per_s": statistics.median(removed)})
    return rows


def plan_fields(plan: Plan) -> dict[str, Any]:
    """Return a plan as it is written to JSON."""
    return asdict(plan)


def _stores(index: Index, node: int, chain: list[bytes], run: int) -> list[Any]:
    starts = range(0, len(chain), run)
    return [index.stored(node, chain[start - 1] if start else None, chain[start : start + run]) for start in starts]


def _removes(index: Index, node: int, chain: list[bytes], run: int) -> list[Any]:
    backwards = chain[::-1]
    return [index.removed(node, backwards[start : start + run]) for start in range(0, len(chain), run)]


def _store_chain(index: Index, node: int, chain: list[bytes], run: int) -> None:
    for event in _stores(index, node, chain, run):
        index.apply(node, event)


def _apply_seconds(index: Index, events: list[list[Any]]) -> float:
    """Apply the nodes' first events, then their second ones, and so on; a lookup at the end waits for all of them.

    Returns CPU seconds of all threads, so that a rate is one per core, whoever has how many threads.
    """
    order = [(node, mine[turn]) for turn in range(len(events[0])) for node, mine in enumerate(events)]
    nothing = index.query([b"\1" * 16])
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        for node, event in order:
            index.apply(node, event)
        index.find(nothing)
        return time.process_time() - start
    finally:
        gc.enable()


def _seconds(function: Callable[[Any], Any], argument: Any) -> float:
    start = time.perf_counter()
    function(argument)
    return time.perf_counter() - start
