"""A host's memory is parted among models, and a node that maps it finds its slots."""

import pytest

from orchestrator.core.config import ConfigError, StoreConfig
from orchestrator.core.types import ModelName, SlotId
from workers.memory import PeerUnmappable, map_memory
from workers.store.arena import PAGE_BYTES, SLOTS_MAX, Arena, parts_of

A, B = ModelName("a"), ModelName("b")


def test_parts_are_equal_unless_the_file_says_otherwise_and_begin_at_whole_pages() -> None:
    parts = parts_of(StoreConfig(cpu_bytes=100 * PAGE_BYTES), {A: 1000, B: 3000})
    assert [(part.first_byte, part.slots) for part in parts.values()] == [(0, 204), (50 * PAGE_BYTES, 68)]
    parts = parts_of(StoreConfig(cpu_bytes=100 * PAGE_BYTES, shares={"a": 3.0}), {A: 1000, B: 3000})
    assert [(part.first_byte, part.slots) for part in parts.values()] == [(0, 307), (75 * PAGE_BYTES, 34)]


def test_a_part_without_room_for_a_segment_is_refused_and_one_for_too_many_slots_is_cut() -> None:
    with pytest.raises(ConfigError, match=r"store\.cpu_bytes: leaves model b 49152 bytes, .* 8 blocks \(80000\)"):
        parts_of(StoreConfig(cpu_bytes=100_000), {A: 10, B: 10_000})
    assert parts_of(StoreConfig(cpu_bytes=1 << 40), {A: 64})[A].slots == SLOTS_MAX


def test_what_a_node_writes_into_its_slots_is_there_and_only_whom_it_is_said_to_can_map_it() -> None:
    arena = Arena(parts_of(StoreConfig(cpu_bytes=16 * PAGE_BYTES), {A: 1000, B: 512}))
    place = arena.place(B)
    mapped = map_memory(place.memory, writable=True)
    for slot in (3, 4, 9):
        first = place.first_byte + slot * 512
        mapped[first : first + 512] = bytes([slot]) * 512
    slabs = arena.slabs(B, [SlotId(slot) for slot in (9, 3, 4)])
    assert [len(slab) for slab in slabs] == [512, 1024]
    assert b"".join(slabs) == b"\x09" * 512 + b"\x03" * 512 + b"\x04" * 512
    assert bytes(arena.slabs(A, [SlotId(0)])[0]) == bytes(1000)
    arena.populate(lambda: True)  # a store that stops takes nothing more
    arena.populate(lambda: False)
    assert b"".join(slabs) == b"\x09" * 512 + b"\x03" * 512 + b"\x04" * 512
    with pytest.raises(TypeError, match="read-only"):
        map_memory(place.memory)[0:1] = b"x"
    place.memory.cookie = bytes(16)
    with pytest.raises(PeerUnmappable):
        map_memory(place.memory, writable=True)
    arena.close()
