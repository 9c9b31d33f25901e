"""A host's memory for KV: one arena that all nodes of the host map, parted among the models that they serve.

    [part of model a: slot 0, slot 1, ...] [part of model b: ...] ... [cookie]

Parts begin at whole pages and are as large as the cluster file says; a slot holds one block in its stored form. What lies in
which slot is the core's to know (`orchestrator/core/store/`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.core.config import ConfigError, StoreConfig
from orchestrator.core.types import ModelName, SlotId
from orchestrator.wire import store_pb2
from workers.memory import SharedArena
from workers.transports import runs

PAGE_BYTES = 4096
#: Memory taken at a time.
POPULATE_BYTES = 32 * 1024 * 1024
#: Slots of one model at most: what is kept in memory of each is some hundred bytes.
SLOTS_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """One model's part of the arena."""

    first_byte: int
    block_bytes: int
    slots: int


def parts_of(config: StoreConfig, block_bytes: Mapping[ModelName, int]) -> dict[ModelName, Part]:
    """Return how the arena is parted among models with blocks of these sizes.

    Raises `ConfigError` if a model's part has no room for a segment.
    """
    parts: dict[ModelName, Part] = {}
    place = 0
    for model, size in block_bytes.items():
        part_bytes = config.part_bytes(model, block_bytes) // PAGE_BYTES * PAGE_BYTES
        slots = min(part_bytes // size, SLOTS_MAX)
        if slots < config.segment_blocks:
            needed = config.segment_blocks * size
            problem = (
                f"leaves model {model} {part_bytes} bytes, which hold no segment of {config.segment_blocks} blocks ({needed})"
            )
            raise ConfigError("store.cpu_bytes", problem)
        parts[model] = Part(place, size, slots)
        place += -(-slots * size // PAGE_BYTES) * PAGE_BYTES
    return parts


class Arena:
    """The memory itself; gone with the process and the last node that maps it."""

    def __init__(self, parts: Mapping[ModelName, Part]) -> None:
        self._parts = dict(parts)
        size = max(part.first_byte + part.slots * part.block_bytes for part in parts.values())
        self._memory = SharedArena(-(-size // PAGE_BYTES) * PAGE_BYTES)

    def place(self, model: ModelName) -> store_pb2.Arena:
        """Return where a model's slots lie, for a node that is to map them."""
        part = self._parts[model]
        return store_pb2.Arena(memory=self._memory.place(()), first_byte=part.first_byte, slots=part.slots)

    def slabs(self, model: ModelName, slots: Sequence[SlotId]) -> list[memoryview]:
        """Return these slots' bytes in their order, neighbours together."""
        part, view = self._parts[model], self._memory.view
        found: list[memoryview] = []
        for slot, _, count in runs(slots, range(len(slots))):
            first = part.first_byte + slot * part.block_bytes
            found.append(view[first : first + count * part.block_bytes])
        return found

    def populate(self, stopped: Callable[[], bool]) -> None:
        """Take all of the memory, some at a time: writing to what was never touched takes three times as long as copying.

        Raises `OSError` if there is less than was asked for. May run in a thread of its own beside all else.
        """
        for start in range(0, self._memory.size, POPULATE_BYTES):
            if stopped() or not self._memory.populate(start, min(POPULATE_BYTES, self._memory.size - start)):
                return

    def close(self) -> None:
        """Give the memory up."""
        self._memory.close()
