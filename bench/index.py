"""Measures the KV index: longest-prefix lookups and events applied, beside Dynamo's RadixTree when it is there.

    python -m bench.index [--quick] [--json FILE]

DYNAMO_PYTHON names the python of an environment with ai-dynamo-runtime; without it only our side is measured. Both sides take
what their Python interface takes: ours decoded batches (and, as a second figure, packed hashes as they come off the wire),
Dynamo's JSON. Lookups are timed by the wall clock; events by the CPU time of all threads, since Dynamo's tree has one of its
own: blocks a second are per core. The two sides run one after the other, so nothing else should. Below are the bytes that a block
takes in memory, measured in processes of their own: of nodes' blocks, and of blocks in the shared storage by segments of eight.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.index_cases import Plan, apply_cases, find_cases, plan_fields
from orchestrator.core.blocks import pack_hashes, split_hashes
from orchestrator.core.cluster.kvindex import KvIndex, Matches
from orchestrator.core.types import BlockHash, KvBatch, NodeId, StoredRun


class OurIndex:
    """`KvIndex`, fed with decoded batches."""

    def __init__(self) -> None:
        self.index = KvIndex()
        self.sequences: list[int] = []

    def clear(self, nodes: int) -> None:
        self.index = KvIndex()
        self.sequences = [0] * nodes
        for node in range(nodes):
            self.index.add_node(NodeId(str(node)), blocks_max=1 << 40)
            self.index.apply(NodeId(str(node)), KvBatch(0, cleared=True))

    def _number(self, node: int) -> int:
        self.sequences[node] += 1
        return self.sequences[node]

    def stored(self, node: int, parent: bytes | None, blocks: list[bytes]) -> Any:
        run = StoredRun(None if parent is None else BlockHash(parent), tuple(map(BlockHash, blocks)))
        return KvBatch(self._number(node), stored=(run,))

    def removed(self, node: int, blocks: list[bytes]) -> Any:
        return KvBatch(self._number(node), removed=tuple(BlockHash(bytes(bytearray(block))) for block in blocks))

    def apply(self, node: int, event: Any) -> None:
        self.index.apply(NodeId(str(node)), event)

    def query(self, blocks: list[bytes]) -> tuple[BlockHash, ...]:
        return tuple(map(BlockHash, blocks))

    def find(self, query: tuple[BlockHash, ...]) -> Matches:
        return self.index.find(query)

    def held(self, found: Matches) -> list[int]:
        return sorted((blocks for blocks in found.by_column(self.index.columns) if blocks), reverse=True)


class OurIndexFromBytes(OurIndex):
    """`KvIndex`, fed with packed hashes: splitting them is part of what is timed."""

    def stored(self, node: int, parent: bytes | None, blocks: list[bytes]) -> Any:
        return self._number(node), parent, pack_hashes([BlockHash(block) for block in blocks]), b""

    def removed(self, node: int, blocks: list[bytes]) -> Any:
        return self._number(node), None, b"", pack_hashes([BlockHash(block) for block in blocks])

    def apply(self, node: int, event: Any) -> None:
        number, parent, stored, removed = event
        runs = (StoredRun(parent, split_hashes(stored)),) if stored else ()
        self.index.apply(NodeId(str(node)), KvBatch(number, runs, split_hashes(removed)))


def dynamo_rows(python: str, quick: bool) -> dict[str, Any]:
    """Run Dynamo's side in its own environment and return what it printed."""
    command = [python, str(Path(__file__).with_name("index_dynamo.py")), *(["--quick"] if quick else [])]
    environment = os.environ | {"DYN_LOG": "error"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout)


def memory_rows(quick: bool) -> list[dict[str, Any]]:
    """Measure each index in a process of its own and return what it printed."""
    cases = (
        (("segments", "100000", "8"), ("blocks", "10000")) if quick else (("segments", "10000000", "8"), ("blocks", "1000000"))
    )
    rows: list[dict[str, Any]] = []
    for case in cases:
        done = subprocess.run([sys.executable, "-m", "bench.index_memory", *case], check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout))
    return rows


def show_memory(rows: list[dict[str, Any]]) -> None:
    """Print what a block takes."""
    for row in rows:
        name = f"in segments of {row['segment_blocks']}" if row["case"] == "segments" else "on nodes"
        lookup = f"; {row['context_blocks']:,} blocks looked up in {row['p50_us']:.1f} us" if "p50_us" in row else ""
        print(f"{row['blocks']:,} blocks {name}: {row['bytes_per_block']:.1f} bytes a block{lookup}")


def show(ours: list[dict[str, Any]], from_bytes: list[dict[str, Any]], dynamo: list[dict[str, Any]] | None) -> None:
    """Print the table; a ratio over 1 means that we are faster."""
    print(f"{'case':<34}{'ours':>14}{'from bytes':>14}{'Dynamo':>14}{'ratio':>10}{'bytes':>10}")
    for row, packed, theirs in zip(ours, from_bytes, dynamo or [{}] * len(ours), strict=True):
        if row["case"] == "find":
            name = f"find {row['blocks']:,} x {row['nodes']} {row['shape']}"
            _line(name, "p50_us", "us", row, {}, theirs)
        else:
            for verb in ("stored", "removed"):
                held = f", held by {row['shared_by']}" if row["shared_by"] > 1 else ""
                _line(f"{verb}, {row['event_blocks']} an event{held}", f"{verb}_per_s", "/s", row, packed, theirs)


def _line(name: str, field: str, unit: str, ours: dict[str, Any], packed: dict[str, Any], theirs: dict[str, Any]) -> None:
    cells = [f"{side[field]:,.{1 if unit == 'us' else 0}f} {unit}" if field in side else "-" for side in (ours, packed, theirs)]
    ratios = ["-", "-"]
    for place, side in enumerate((ours, packed)):
        if field in theirs and field in side:
            ratio = theirs[field] / side[field] if unit == "us" else side[field] / theirs[field]
            ratios[place] = f"{ratio:.2f}x"
    print(f"{name:<34}{cells[0]:>14}{cells[1]:>14}{cells[2]:>14}{ratios[0]:>10}{ratios[1]:>10}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="a small run that shows that it works")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    plan = Plan.of(arguments.quick)
    found = find_cases(OurIndex(), plan)
    ours = found + apply_cases(OurIndex(), plan)
    from_bytes = found + apply_cases(OurIndexFromBytes(), plan)
    python = os.environ.get("DYNAMO_PYTHON")
    dynamo = dynamo_rows(python, arguments.quick) if python else None
    print(f"Dynamo: ai-dynamo-runtime {dynamo['version']}" if dynamo else "Dynamo: not measured, DYNAMO_PYTHON is not set")
    show(ours, from_bytes, dynamo["rows"] if dynamo else None)
    memory = memory_rows(arguments.quick)
    show_memory(memory)
    if arguments.json:
        figures = {"python": sys.version, "plan": plan_fields(plan), "ours": ours, "from_bytes": from_bytes, "dynamo": dynamo}
        figures["memory"] = memory
        Path(arguments.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
