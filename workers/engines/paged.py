"""Decode attention that reads the KV pool where it lies, by block tables: one call of a compiled kernel for a layer of a step.

Memory is what bounds decoding, so keys and values are read once: for all query heads that share them, for all rows that a
sequence has in the step, a block at a time, with the softmax's sums carried along. Contexts are cut into parts, which threads
compute apart; whoever finishes a sequence's last part merges them, in their order. Which thread does what, and what else is in
the batch, changes nothing in a row's arithmetic.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, njit, types  # pyright: ignore[reportPrivateImportUsage]
from numba.extending import overload
from numpy.typing import NDArray
from torch import Tensor

from workers.engines import threads, tiles, vectors
from workers.engines.decodes import DecodeSequence
from workers.engines.kvpool import KvPool
from workers.engines.stored import Slab
from workers.engines.threads import Kernel, compiled, pointer, take
from workers.engines.tiles import pack_query, place_of, to_bfloat16
from workers.engines.vectors import LANES, LINE_BYTES, TOKENS, add_weighted, dots, fetch

#: Rows of one sequence in a step up to which this is for it: a longer chunk of a prompt is bounded by arithmetic, not memory.
ROWS_MAX = 16
#: Tokens of a context that one thread reads at a time, but for whole blocks.
PART_TOKENS = 2048
#: Bytes of keys and values of one layer from which they are worth several threads: what one reads in about 50 microseconds.
SHARED_BYTES_MIN = 1 << 20
#: What may be reordered in sums. Infinities and NaNs keep their meaning: a row that has them must show them.
REORDERED = {"reassoc", "contract", "nsz", "arcp"}
FLOAT_BYTES = 4
#: Query heads to a KV head from which tiles are faster than vectors: 7 take a quarter of the time from caches, 2 the same.
TILED_SHARED_MIN = 4
#: Of a query there are its values' sum, its highest score, its weights' sum, and what fills a line of memory.
KEPT = 16
#: A score below any.
LOWEST = np.float32(-1e30)
EXP2 = tuple(np.float32(term) for term in tiles.EXP2)

#: What a kernel is told; addresses, sizes and strides, these in values.
RECORD = np.dtype(
    [
        ("next", np.int64),
        # [blocks, rows of a slab, tokens of a block, head dimension]; the layer's first rows of keys and values; heads of each.
        ("pool", np.int64),
        ("blocks", np.int64),
        ("slab_rows", np.int64),
        ("block_tokens", np.int64),
        ("head_dim", np.int64),
        ("key_row", np.int64),
        ("value_row", np.int64),
        ("heads", np.int64),
        # Dimensions of a value, the first ones of its row in the pool; query heads that share a KV head.
        ("value_dim", np.int64),
        ("shared", np.int64),
        # [rows, at least heads x shared x head dimension], and [rows, at least heads x shared x value dimension].
        ("rows", np.int64),
        ("queries", np.int64),
        ("queries_stride", np.int64),
        ("attended", np.int64),
        ("attended_stride", np.int64),
        ("scale", np.float64),
        # Of each sequence: its first row, its rows, tokens before them, parts, where its partial sums begin; its blocks.
        ("sequences", np.int64),
        ("facts", np.int64),
        ("tables", np.int64),
        ("table_width", np.int64),
        # Queries of a sequence and a KV head at most, filled up to what the kernel takes at a time.
        ("each", np.int64),
        # Each part: its sequence, and its place in that.
        ("parts", np.int64),
        ("part_list", np.int64),
        ("part_tokens", np.int64),
        # Sums of the parts of sequences that have several: [parts, heads, queries, value dimension + `KEPT`].
        ("partials", np.int64),
        ("partial_parts", np.int64),
        # Parts that are done: [sequences, heads].
        ("done", np.int64),
    ]
)


class PagedWay:
    """The kernel, for pools in host memory."""

    rows_max = ROWS_MAX

    def __init__(self, pool: KvPool, threads: int) -> None:
        """Compile for the pool's dtype, which takes seconds, once a machine; `threads` may compute a layer together."""
        self._pool = pool
        self._threads = threads
        for tiled in {False, _tiled(pool.slab, TILED_SHARED_MIN, pool.slab.head_dim)}:
            _kernel(pool.slab.dtype, tiled)

    def plan(self, sequences: Sequence[DecodeSequence]) -> "PagedDecodes":
        """See `DecodeWay.plan`."""
        return PagedDecodes(self._pool, sequences, self._threads)


class PagedDecodes:
    """A step's decodes, longest context first, so that no thread is left with that at the end."""

    __slots__ = ("_arrays", "_bytes", "_count_max", "_partial_parts", "_pool", "_record", "_threads")

    def __init__(self, pool: KvPool, sequences: Sequence[DecodeSequence], threads: int) -> None:
        self._pool = pool
        self._threads = threads
        self._count_max = max(sequence.count for sequence in sequences)
        sequences = sorted(sequences, key=lambda sequence: -sequence.context)
        blocks_each = [-(-sequence.context // pool.block_tokens) for sequence in sequences]
        table = np.zeros((len(sequences), blocks_each[0]), dtype=np.int64)
        for row, (sequence, count) in enumerate(zip(sequences, blocks_each, strict=True)):
            table[row, :count] = sequence.table[:count]
        facts = np.array([(sequence.first_row, sequence.count, sequence.start) for sequence in sequences], dtype=np.int64)
        part_blocks = max(1, PART_TOKENS // pool.block_tokens)
        parts = np.array([-(-count // part_blocks) for count in blocks_each], dtype=np.int64)
        several = np.where(parts > 1, parts, 0)
        owners = np.repeat(np.arange(len(parts)), parts)
        part_list = np.column_stack((owners, np.arange(len(owners)) - np.repeat(np.cumsum(parts) - parts, parts)))
        self._arrays = {
            "facts": np.column_stack((facts, parts, np.cumsum(several) - several)),
            "tables": table,
            "part_list": part_list,
        }
        self._partial_parts = int(several.sum())
        self._bytes = sum(blocks_each) * pool.block_bytes // pool.slab.layers
        self._record: NDArray[np.void] | None = None

    def attend(self, queries: Tensor, attended: Tensor, layer: int, scale: float) -> None:
        """See `Decodes.attend`."""
        slab = self._pool.slab
        if self._record is None:
            self._record = self._describe(attended, scale)
        record = self._record
        record["key_row"] = first = layer * slab.layer_rows
        record["value_row"] = first if slab.latent else first + slab.kv_heads
        record["queries"], record["queries_stride"] = queries.data_ptr(), queries.stride(0)
        record["attended"] = attended.data_ptr()
        assert queries.stride(1) == 1, queries.stride()
        assert attended.is_contiguous(), attended.stride()
        kernel = _kernel(slab.dtype, _tiled(slab, attended.shape[1] // slab.kv_heads, attended.shape[2]))
        kernel.run(record, self._threads if self._bytes >= SHARED_BYTES_MIN else 1)

    def _describe(self, attended: Tensor, scale: float) -> NDArray[np.void]:
        """Return the record with all that is the same in every layer."""
        slab, facts, part_list = self._pool.slab, self._arrays["facts"], self._arrays["part_list"]
        rows, heads, value_dim = attended.shape
        shared = heads // slab.kv_heads
        each = -(-self._count_max * shared // tiles.ROWS) * tiles.ROWS
        sums = self._partial_parts * slab.kv_heads * each * (value_dim + KEPT)
        self._arrays["partials"] = np.empty(sums, dtype=np.float32)
        self._arrays["done"] = np.zeros((len(facts), slab.kv_heads), dtype=np.int64)
        record = np.zeros(1, dtype=RECORD)
        known = {
            "pool": self._pool.slabs.data_ptr(),
            "blocks": len(self._pool.slabs),
            "slab_rows": slab.rows,
            "block_tokens": slab.block_tokens,
            "head_dim": slab.head_dim,
            "heads": slab.kv_heads,
            "value_dim": value_dim,
            "shared": shared,
            "rows": rows,
            "sequences": len(facts),
            "table_width": self._arrays["tables"].shape[1],
            "each": each,
            "parts": len(part_list),
            "part_tokens": max(1, PART_TOKENS // slab.block_tokens) * slab.block_tokens,
            "partial_parts": self._partial_parts,
        }
        known |= {name: array.ctypes.data for name, array in self._arrays.items()}
        for name, value in known.items():
            record[name] = value
        record["scale"] = scale * math.log2(math.e)
        return record


def _tiled(slab: Slab, shared: int, value_dim: int) -> bool:
    """Whether a pool's blocks are read by tiles."""
    sizes = (slab.block_tokens, slab.head_dim, value_dim)
    return slab.dtype == "bfloat16" and shared >= TILED_SHARED_MIN and tiles.fit(*sizes) and tiles.usable()


@cache
def _kernel(dtype: str, tiled: bool) -> Kernel:
    """Return the kernel for a pool's dtype: compiled once, and kept beside this file or in the user's cache directory."""
    return compiled(_entry(np.float32 if dtype == "float32" else np.uint16, True if tiled else None, _sources()))


def _sources() -> int:
    """Return a number that changes with the other files that a kernel is made of."""
    return zlib.crc32(b"".join(Path(str(module.__file__)).read_bytes() for module in (threads, tiles, vectors)))


def _entry(dtype: Any, tiled: bool | None, sources: int) -> Callable[[int], None]:
    """Return what is compiled, with tiles unless `tiled` is None, which is a type of its own where functions are chosen by types.

    Numba's cache sees when this file changes; of others it sees what the function closes over.
    """

    def entry(address: int) -> None:
        _work(address, dtype, tiled, sources)

    return entry


def _wide(value: Any) -> Any:
    """Return a pool's value as float32; bfloat16 comes as uint16."""


@overload(_wide)
def _wide_of(value):
    if value == types.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


def _narrow(value, like):
    """Return a float32 as what the pool has, rounded to even."""


@overload(_narrow)
def _narrow_of(value, like):
    if like == types.uint16:
        return lambda value, like: to_bfloat16(value)
    return lambda value, like: value


_compiled = njit(fastmath=REORDERED, error_model="numpy")


@_compiled
def _work(address, dtype, tiled, _sources):
    """Take pieces, a head in a part of a sequence each, until there are none."""
    known = carray(pointer(address), 1, RECORD)[0]  # pyright: ignore[reportCallIssue]
    pool = carray(pointer(known.pool), (known.blocks, known.slab_rows, known.block_tokens, known.head_dim), dtype)
    queries = carray(pointer(known.queries), (known.rows, known.queries_stride), dtype)
    attended = carray(pointer(known.attended), (known.rows, known.heads * known.shared, known.value_dim), dtype)
    facts = carray(pointer(known.facts), (known.sequences, 5), np.int64)
    tables = carray(pointer(known.tables), (known.sequences, known.table_width), np.int64)
    part_list = carray(pointer(known.part_list), (known.parts, 2), np.int64)
    done = carray(pointer(known.done), (known.sequences, known.heads), np.int64)
    pitch = known.value_dim + KEPT
    partials = carray(pointer(known.partials), (known.partial_parts, known.heads, known.each, pitch), np.float32)
    own = _lines((1, known.each, pitch))[0]
    scratch = _begun(tiled, known)
    while True:
        piece = take(address)
        if piece >= known.parts * known.heads:
            break
        sequence, part = part_list[piece // known.heads]
        head = piece % known.heads
        row, count, start, parts, partial = facts[sequence]
        sums = own if parts == 1 else partials[partial + part, head]
        begin = part * known.part_tokens
        end = min(begin + known.part_tokens, start + count)
        of_head = queries[row : row + count, head * known.shared * known.head_dim :]
        _read(tiled, known, of_head, pool, tables[sequence], head, begin, end, start, scratch, sums)
        if parts > 1:
            if take(done[sequence, head:].ctypes.data) < parts - 1:
                continue
            done[sequence, head] = 0
            _merge(partials[partial : partial + parts, head], count * known.shared, own)
        for query in range(count * known.shared):
            place = attended[row + query // known.shared, head * known.shared + query % known.shared]
            share = np.float32(1) / own[query, known.value_dim + 1]
            for dim in range(known.value_dim):
                place[dim] = _narrow(own[query, _summed(tiled, dim)] * share, place[dim])
    _ended(tiled)


def _begun(tiled, known):
    """Return memory for pieces."""


@overload(_begun)
def _begun_of(tiled, known):
    return _begun_vectors if isinstance(tiled, types.NoneType) else _begun_tiles


def _read(tiled, known, queries, pool, table, head, begin, end, start, scratch, sums):
    """Attend to the tokens from begin to end. Leaves of each query its values' sum, its highest score, its weights' sum.

    `queries` has a row for each of the sequence's, whose first values are those of the query heads that share `head`.
    """


@overload(_read)
def _read_of(tiled, known, queries, pool, table, head, begin, end, start, scratch, sums):
    return _read_by_vectors if isinstance(tiled, types.NoneType) else _read_by_tiles


def _summed(tiled, dim):
    """Return where a dimension's sum is."""


@overload(_summed)
def _summed_of(tiled, dim):
    return (lambda tiled, dim: dim) if isinstance(tiled, types.NoneType) else (lambda tiled, dim: place_of(dim))


def _ended(tiled):
    """Leave the thread as it was."""


@overload(_ended)
def _ended_of(tiled):
    return (lambda tiled: None) if isinstance(tiled, types.NoneType) else (lambda tiled: tiles.end())


def _begun_vectors(tiled, known):
    scaled = np.empty((known.each, known.head_dim), np.float32)
    return scaled, np.empty((known.shared, known.block_tokens), np.float32)


def _read_by_vectors(tiled, known, queries, pool, table, head, begin, end, start, scratch, sums):
    scaled, scores = scratch
    shared, size, count = known.shared, known.block_tokens, len(queries)
    for query in range(count * shared):
        first = query % shared * known.head_dim
        for dim in range(known.head_dim):
            scaled[query, dim] = _wide(queries[query // shared, first + dim]) * np.float32(known.scale)
    _clear(sums[: count * shared])
    keys, values = known.key_row + head, known.value_row + head
    for first in range(begin, end, size):
        block = table[first // size]
        following = table[first // size + 1] if first + size < end else block
        ahead = pool[following, keys].ctypes.data, pool[following, values].ctypes.data
        for row in range(count):
            tokens = min(first + size, start + row + 1) - first
            if tokens > 0:
                part = slice(row * shared, row * shared + shared)
                _read_block(scaled[part], pool[block, keys], pool[block, values], tokens, scores, sums[part], ahead)


def _begun_tiles(tiled, known):
    tiles.begin()
    packed = _lines((known.each // tiles.ROWS * known.head_dim // tiles.DEPTH, tiles.ROWS, tiles.ROWS)).view(np.uint32)
    states = _lines((known.each // tiles.ROWS, 3, tiles.ROWS))
    weights = _lines((tiles.ROWS, tiles.TOKENS // 2, 1))
    return packed, states, _lines((tiles.TOKENS, tiles.ROWS, 1)), weights, _lines((tiles.TOKENS // 2, known.value_dim, 1))


def _read_by_tiles(tiled, known, queries, pool, table, head, begin, end, start, scratch, sums):
    packed, states, scores, weights, paired = scratch
    shared, dims, width, count = known.shared, known.head_dim, known.value_dim, len(queries)
    depths, row_bytes = dims // tiles.DEPTH, 2 * dims
    tile_count = (count * shared + tiles.ROWS - 1) // tiles.ROWS
    packed[:] = 0
    for query in range(count * shared):
        first = query % shared * dims
        pack_query(queries[query // shared, first : first + dims], query % tiles.ROWS, packed[query // tiles.ROWS * depths :])
    sums[:, :width] = np.float32(0)
    states[:, 0], states[:, 1] = LOWEST, np.float32(0)
    keys, values = known.key_row + head, known.value_row + head
    for first in range(begin, end, tiles.TOKENS):
        key_place, value_place = _places(pool, table, keys, values, first)
        if first + tiles.TOKENS < end:
            next_keys, next_values = _places(pool, table, keys, values, first + tiles.TOKENS)
            fetch(next_keys, tiles.TOKENS * row_bytes)
            fetch(next_values, tiles.TOKENS * row_bytes)
        tiles.pair_values(value_place, row_bytes, width, paired.ctypes.data)
        for tile in range(tile_count):
            lowest = tile * tiles.ROWS
            several = min(count * shared - lowest, tiles.ROWS)
            tiles.score(key_place, row_bytes, depths, packed[tile * depths :].ctypes.data, scores.ctypes.data)
            if first + tiles.TOKENS > start + 1:
                for query in range(several):
                    for token in range(max(0, start + (lowest + query) // shared + 1 - first), tiles.TOKENS):
                        scores[token, query] = -np.inf
            tiles.weigh(scores.ctypes.data, np.float32(known.scale), states[tile].ctypes.data, weights.ctypes.data)
            for query in range(several):
                if states[tile, 2, query] != np.float32(1):
                    for dim in range(width):
                        sums[lowest + query, dim] *= states[tile, 2, query]
            tiles.add_weighted(weights.ctypes.data, paired.ctypes.data, width, sums[lowest:].ctypes.data, sums.strides[0])
    for query in range(count * shared):
        sums[query, width : width + 2] = states[query // tiles.ROWS, :2, query % tiles.ROWS]


@_compiled
def _places(pool, table, keys, values, token):
    """Return where keys and values of a token are."""
    block, place = table[token // pool.shape[2]], token % pool.shape[2]
    return pool[block, keys, place:].ctypes.data, pool[block, values, place:].ctypes.data


@_compiled
def _lines(shape):
    """Return memory that begins with a line."""
    memory = np.empty(shape[0] * shape[1] * shape[2] + LINE_BYTES // FLOAT_BYTES, np.float32)
    first = -memory.ctypes.data % LINE_BYTES // FLOAT_BYTES
    return memory[first:][: shape[0] * shape[1] * shape[2]].reshape(shape)


@_compiled
def _clear(sums):
    width = sums.shape[1] - KEPT
    for query in range(len(sums)):
        sums[query, :width] = np.float32(0)
        sums[query, width] = LOWEST
        sums[query, width + 1] = np.float32(0)


@_compiled
def _read_block(queries, keys, values, tokens, scores, sums, ahead):
    """Attend one row's queries to the first tokens of a block; `ahead` is where the next one's keys and values are."""
    width = sums.shape[1] - KEPT
    if len(keys) % TOKENS == 0 and queries.shape[1] % LANES == 0 and width % LANES == 0:
        _read_block_by_vectors(queries, keys, values, tokens, scores, sums, ahead)
        return
    for query in range(len(queries)):
        for token in range(tokens):
            score = np.float32(0)
            for dim in range(queries.shape[1]):
                score += queries[query, dim] * _wide(keys[token, dim])
            scores[query, token] = score
        _weigh(scores[query, :tokens], sums[query], width)
        for token in range(tokens):
            for dim in range(width):
                sums[query, dim] += scores[query, token] * _wide(values[token, dim])


@_compiled
def _read_block_by_vectors(queries, keys, values, tokens, scores, sums, ahead):
    """Do the same four tokens at a time, by addresses; of keys those behind the last one are read, and go nowhere."""
    count, dims, width = len(queries), queries.shape[1], sums.shape[1] - KEPT
    stride, pitch, row = keys.shape[1], scores.shape[1], sums.shape[1]
    query_place, key_place, score_place = queries.ctypes.data, keys.ctypes.data, scores.ctypes.data
    step = TOKENS * keys.strides[0]
    for query in range(0, count, 2):
        second = min(query + 1, count - 1)
        first_query, second_query = query_place + FLOAT_BYTES * dims * query, query_place + FLOAT_BYTES * dims * second
        first_score, second_score = score_place + FLOAT_BYTES * pitch * query, score_place + FLOAT_BYTES * pitch * second
        for four in range((tokens + TOKENS - 1) // TOKENS):
            if query == 0:
                fetch(ahead[0] + step * four, step)
            done = FLOAT_BYTES * TOKENS * four
            key = key_place + step * four
            dots(keys, first_query, second_query, key, stride, dims, first_score + done, second_score + done)
    for query in range(count):
        _weigh(scores[query, :tokens], sums[query], width)
    value_place, sum_place = values.ctypes.data, sums.ctypes.data
    for four in range(tokens // TOKENS):
        fetch(ahead[1] + step * four, step)
        value, weight = value_place + step * four, score_place + FLOAT_BYTES * TOKENS * four
        query = 0
        while query + 4 <= count:
            into = sum_place + FLOAT_BYTES * row * query
            add_weighted(values, 4, weight + FLOAT_BYTES * pitch * query, pitch, value, stride, width, into, row)
            query += 4
        while query + 2 <= count:
            into = sum_place + FLOAT_BYTES * row * query
            add_weighted(values, 2, weight + FLOAT_BYTES * pitch * query, pitch, value, stride, width, into, row)
            query += 2
        if query < count:
            into = sum_place + FLOAT_BYTES * row * query
            add_weighted(values, 1, weight + FLOAT_BYTES * pitch * query, pitch, value, stride, width, into, row)
    for token in range(tokens // TOKENS * TOKENS, tokens):
        for query in range(count):
            for dim in range(width):
                sums[query, dim] += scores[query, token] * _wide(values[token, dim])


@_compiled
def _weigh(scores, sums, width):
    """Turn scores into weights against the highest score so far, and what was summed so far as well."""
    before = sums[width]
    highest = _highest(scores, before)
    total = np.float32(0)
    for token in range(len(scores)):
        weight = _exp2(scores[token] - highest)
        scores[token] = weight
        total += weight
    rest = _exp2(before - highest)
    sums[width] = highest
    sums[width + 1] = sums[width + 1] * rest + total
    if before != highest:
        for dim in range(width):
            sums[dim] *= rest


@njit(fastmath=REORDERED | {"nnan"}, error_model="numpy")
def _highest(scores, highest):
    """Return the highest of scores; which one, if one is not a number, does not matter: its weight will not be one either."""
    for token in range(len(scores)):
        highest = max(highest, scores[token])
    return highest


@_compiled
def _merge(parts, queries, merged):
    """Add up a sequence's parts, in their order."""
    width = merged.shape[1] - KEPT
    for query in range(queries):
        highest = LOWEST
        for part in range(len(parts)):
            score = parts[part, query, width]
            highest = highest if score <= highest else score
        merged[query, : width + 2] = np.float32(0)
        for part in range(len(parts)):
            sums = parts[part, query]
            share = _exp2(sums[width] - highest)
            for dim in range(width):
                merged[query, dim] += sums[dim] * share
            merged[query, width + 1] += sums[width + 1] * share


@njit(fastmath=REORDERED, error_model="numpy")
def _exp2(exponent):
    """Return 2 to a power of at most 0, to float32's precision; a NaN stays one. Without a call, so that loops are vectorised."""
    limited = np.float32(-126) if exponent < np.float32(-126) else exponent
    whole = np.floor(limited)  # math's floor is an integer, and what follows would be float64
    rest = limited - whole - np.float32(0.5)
    power = EXP2[6]
    power = power * rest + EXP2[5]
    power = power * rest + EXP2[4]
    power = power * rest + EXP2[3]
    power = power * rest + EXP2[2]
    power = power * rest + EXP2[1]
    power = power * rest + EXP2[0]
    return power * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
