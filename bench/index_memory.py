"""What a gateway's indices take in memory: filled in a process of its own from messages' bytes, measured by what it has.

Run by bench/index.py: `python -m bench.index_memory segments|blocks COUNT` prints one JSON object.
"""

import gc
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from orchestrator.core.blocks import HASH_BYTES, split_hashes
from orchestrator.core.cluster.kvindex import KvIndex
from orchestrator.core.cluster.segments import SegmentIndex
from orchestrator.core.types import BlockHash, KvBatch, NodeId, StoredRun, StoreId

#: Hashes a batch brings.
BATCH_HASHES = 4096
#: Blocks of a context whose segments are looked up, and how often.
CONTEXT_BLOCKS = 6250
LOOKUPS = 200


def resident_bytes() -> int:
    """Return what this process has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def fill_segments(index: SegmentIndex, count: int) -> tuple[BlockHash, ...]:
    """Let two stores tell of so many segments by turns; return the names of the last batch."""
    generator = random.Random(3)
    stores = StoreId("a"), StoreId("b")
    for store in stores:
        index.add_store(store)
        index.apply(store, KvBatch(0, cleared=True))
    names: tuple[BlockHash, ...] = ()
    for number, start in enumerate(range(0, count, BATCH_HASHES)):
        names = split_hashes(generator.randbytes(HASH_BYTES * min(BATCH_HASHES, count - start)))
        index.apply(stores[number % 2], KvBatch(1 + number // 2, segments_stored=names))
    return names


def fill_blocks(index: KvIndex, count: int) -> None:
    """Let eight nodes tell of so many blocks by turns, in chains of a batch each."""
    generator = random.Random(3)
    nodes = [NodeId(str(number)) for number in range(8)]
    for node in nodes:
        index.add_node(node, blocks_max=count)
        index.apply(node, KvBatch(0, cleared=True))
    for number, start in enumerate(range(0, count, BATCH_HASHES)):
        names = split_hashes(generator.randbytes(HASH_BYTES * min(BATCH_HASHES, count - start)))
        index.apply(nodes[number % 8], KvBatch(1 + number // 8, (StoredRun(None, names),)))


def measure_segments(blocks: int, segment_blocks: int) -> dict[str, Any]:
    """Return bytes a block of an index of segments, and what a lookup of a context that is all there takes, microseconds."""
    before = resident_bytes()
    index = SegmentIndex(segments_max=blocks)
    names = fill_segments(index, blocks // segment_blocks)
    gc.collect()
    held = resident_bytes() - before
    ends = (names * (1 + CONTEXT_BLOCKS // len(names)))[: CONTEXT_BLOCKS // segment_blocks]
    chain = tuple(name for name in ends for _ in range(segment_blocks))
    times: list[float] = []
    for _ in range(LOOKUPS):
        start = time.perf_counter()
        found = index.blocks(chain, segment_blocks)
        times.append((time.perf_counter() - start) * 1e6)
        assert found == len(chain), f"{found} blocks found of {len(chain)}"
    assert index.segments == blocks // segment_blocks, f"{index.segments} segments"
    row = {"case": "segments", "blocks": blocks, "segment_blocks": segment_blocks, "bytes_per_block": held / blocks}
    return row | {"context_blocks": len(chain), "p50_us": statistics.median(times)}


def measure_blocks(blocks: int) -> dict[str, Any]:
    """Return bytes a block of an index of nodes' blocks."""
    before = resident_bytes()
    index = KvIndex()
    fill_blocks(index, blocks)
    gc.collect()
    return {"case": "blocks", "blocks": index.blocks, "bytes_per_block": (resident_bytes() - before) / blocks}


def main() -> None:
    kind, count = sys.argv[1], int(sys.argv[2])
    row = measure_segments(count, int(sys.argv[3])) if kind == "segments" else measure_blocks(count)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
