"""Dynamo's side of the KV index measurement: run by bench/index.py with the python named by DYNAMO_PYTHON.

Needs ai-dynamo-runtime and nothing of this repository but `index_cases.py` beside it.
"""

import json
import sys
from importlib.metadata import version
from typing import Any

from dynamo._core import RadixTree  # pyright: ignore[reportMissingImports]
from index_cases import Plan, apply_cases, find_cases


class DynamoIndex:
    """`RadixTree`, fed with the JSON events that its Python interface takes; a block is named by its first 8 bytes."""

    def __init__(self) -> None:
        self.tree = RadixTree()
        self.events = 0

    def clear(self, nodes: int) -> None:
        self.tree = RadixTree()

    def stored(self, node: int, parent: bytes | None, blocks: list[bytes]) -> bytes:
        names = [number(block) for block in blocks]
        entries = [{"block_hash": name, "tokens_hash": name} for name in names]
        return self._event({"stored": {"parent_hash": None if parent is None else number(parent), "blocks": entries}})

    def removed(self, node: int, blocks: list[bytes]) -> bytes:
        return self._event({"removed": {"block_hashes": [number(block) for block in blocks]}})

    def _event(self, data: dict[str, Any]) -> bytes:
        self.events += 1
        return json.dumps({"event_id": self.events, "dp_rank": 0, "data": data}, separators=(",", ":")).encode()

    def apply(self, node: int, event: bytes) -> None:
        self.tree.apply_event(node, event)

    def query(self, blocks: list[bytes]) -> list[int]:
        return [number(block) for block in blocks]

    def find(self, query: list[int]) -> Any:
        return self.tree.find_matches(query).scores

    def held(self, found: Any) -> list[int]:
        return sorted(found.values(), reverse=True)


def number(block: bytes) -> int:
    """Return a block's name as Dynamo wants it: an integer below 2**63."""
    return int.from_bytes(block[:8], "little") >> 1


def main() -> None:
    plan = Plan.of(quick="--quick" in sys.argv)
    index = DynamoIndex()
    rows = find_cases(index, plan) + apply_cases(index, plan)
    print(json.dumps({"version": version("ai-dynamo-runtime"), "rows": rows}))


if __name__ == "__main__":
    main()
