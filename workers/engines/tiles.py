"""AMX, for kernels: products of whole tiles of bfloat16 with sums in float32, on processors that have them.

A tile is 16 rows of 64 bytes. In decode attention 64 tokens of a head meet up to 16 queries at a time:

    scores [64 tokens, 16 queries]  keys [tokens, dimensions], as they lie in the pool, times queries [pairs of dimensions, 16, 2]
    sums [16 queries, dimensions]   weights [queries, tokens], rounded to bfloat16, times values [pairs of tokens, dimensions, 2]

Values lie in the pool a token after the other, so pairs of tokens are put together first, which is all that is copied. Of 32
dimensions the 16 even ones come out first (`place_of`): so a pair is made by masks and shifts of whole words.
"""

import ctypes
import math
import sys
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types  # pyright: ignore[reportPrivateImportUsage]
from numba.core import cgutils
from numba.extending import intrinsic

#: Rows of a tile, and float32 or pairs of bfloat16 in one of its rows.
ROWS = 16
#: Tokens that are attended to at a time: four tiles of scores, so that products need not wait for each other.
TOKENS = 64
#: Dimensions, and tokens, that one product of tiles goes along.
DEPTH = 32
#: Bytes of a tile's row, and of a tile.
ROW_BYTES = 64
TILE_BYTES = ROWS * ROW_BYTES
_GROUPS = TOKENS // ROWS
#: `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`: a process has to ask Linux for tiles, once.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18
#: What the eight tiles are: palette 1, bytes of a row as 16 bits each from byte 16 on, rows from byte 48 on.
_CONFIG = bytes([1, *[0] * 15, *[ROW_BYTES, 0] * 8, *[0] * 16, *[ROWS] * 8, *[0] * 8])

#: Chebyshev's interpolation of 2 to the x + 1/2 on [-1/2, 1/2], off by 2.5e-9 at most, constant term first.
EXP2 = (1.41421356, 0.98025818, 0.33973159, 0.07849348, 0.01360199, 0.00189511, 0.00021866)
#: What is 2 to a lower power is 0: subnormal numbers are slow.
_LOWEST_POWER = -126.0
_FLOATS = ir.VectorType(ir.FloatType(), ROWS)
_WORDS = ir.VectorType(ir.IntType(32), ROWS)
_in_place: Any = intrinsic


@cache
def usable() -> bool:
    """Whether this processor has tiles of bfloat16, and the system lets this process use them."""
    if not sys.platform.startswith("linux") or not llvm.get_process_triple().startswith("x86_64"):
        return False
    features = llvm.get_host_cpu_features()
    if not (features.get("amx-tile") and features.get("amx-bf16") and features.get("avx512f")):
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0


def fit(block_tokens: int, head_dim: int, value_dim: int) -> bool:
    """Whether blocks of these sizes are whole tiles."""
    return block_tokens % TOKENS == 0 and head_dim % DEPTH == 0 and value_dim % DEPTH == 0


@_in_place
def begin(context: Any) -> Any:
    """Set this thread's tiles up."""

    def generate(codegen: Any, builder: Any, _: Any, __: Any) -> Any:
        config = cgutils.global_constant(
            builder, "tiles", ir.Constant(ir.ArrayType(ir.IntType(8), len(_CONFIG)), bytearray(_CONFIG))
        )
        _call(builder, "ldtilecfg", builder.bitcast(config, cgutils.voidptr_t))
        return codegen.get_dummy_value()

    return types.none(), generate


@_in_place
def end(context: Any) -> Any:
    """Give this thread's tiles up, so that the system need not keep them for it."""

    def generate(codegen: Any, builder: Any, _: Any, __: Any) -> Any:
        _call(builder, "tilerelease")
        return codegen.get_dummy_value()

    return types.none(), generate


@_in_place
def score(context: Any, keys: Any, stride: Any, depths: Any, queries: Any, scores: Any) -> Any:
    """Write the products of 64 tokens' keys with 16 queries: float32 [tokens, queries].

    Args:
        context: the compiler's.
        keys: address of the first token's.
        stride: bytes between two tokens'.
        depths: tiles that a key is long.
        queries: address of as many tiles.
        scores: where they go.
    """

    def generate(codegen: Any, builder: Any, _: Any, arguments: Any) -> Any:
        keys, stride, depths, queries, scores = arguments
        for group in range(_GROUPS):
            _call(builder, "tilezero", _tile(group))
        with cgutils.for_range(builder, depths) as loop:
            _load(builder, 4, _behind(builder, queries, loop.index, TILE_BYTES), _number(ROW_BYTES))
            first = _behind(builder, keys, loop.index, ROW_BYTES)
            for group in range(_GROUPS):
                _load(builder, 5 + group % 3, _behind(builder, first, stride, group * ROWS), stride)
                _call(builder, "tdpbf16ps", _tile(group), _tile(5 + group % 3), _tile(4))
        for group in range(_GROUPS):
            _store(builder, group, _behind(builder, scores, _number(group), TILE_BYTES), _number(ROW_BYTES))
        return codegen.get_dummy_value()

    return types.none(*[types.int64] * 5), generate


@_in_place
def add_weighted(context: Any, weights: Any, values: Any, width: Any, sums: Any, stride: Any) -> Any:
    """Add 64 tokens' values times 16 queries' weights to these queries' sums.

    Args:
        context: the compiler's.
        weights: address of [queries, tokens].
        values: address of [pairs of tokens, width, 2].
        width: of values and sums, a multiple of 16.
        sums: address of the first query's.
        stride: bytes between two queries'.
    """

    def generate(codegen: Any, builder: Any, _: Any, arguments: Any) -> Any:
        weights, values, width, sums, stride = arguments
        row = builder.mul(width, _number(4))
        halves = (weights, builder.add(weights, _number(ROW_BYTES)))
        for tile, half in zip((4, 5), halves, strict=True):
            _load(builder, tile, half, _number(TOKENS * 2))
        with cgutils.for_range(builder, builder.udiv(width, _number(ROWS))) as loop:
            into = _behind(builder, sums, loop.index, ROW_BYTES)
            first = _behind(builder, values, loop.index, ROW_BYTES)
            _load(builder, 0, into, stride)
            _load(builder, 6, first, row)
            _load(builder, 7, _behind(builder, first, row, ROWS), row)
            _call(builder, "tdpbf16ps", _tile(0), _tile(4), _tile(6))
            _call(builder, "tdpbf16ps", _tile(0), _tile(5), _tile(7))
            _store(builder, 0, into, stride)
        return codegen.get_dummy_value()

    return types.none(*[types.int64] * 5), generate


@_in_place
def pair_values(context: Any, values: Any, stride: Any, width: Any, paired: Any) -> Any:
    """Put the values of 64 tokens, `stride` bytes apart, together: [pairs of tokens, width, 2] at the address `paired`."""

    def generate(codegen: Any, builder: Any, _: Any, arguments: Any) -> Any:
        values, stride, width, paired = arguments
        words = ir.VectorType(ir.IntType(32), ROWS)
        half, lower, upper = (ir.Constant(words, [number] * ROWS) for number in (16, 0xFFFF, 0xFFFF0000))
        with cgutils.for_range(builder, _number(TOKENS // 2)) as pairs:
            row = _behind(builder, values, builder.mul(pairs.index, stride), 2)
            into = _behind(builder, paired, builder.mul(pairs.index, width), 4)
            with cgutils.for_range(builder, builder.udiv(width, _number(DEPTH))) as loop:
                place = _behind(builder, row, loop.index, ROW_BYTES)
                first, second = (
                    builder.load(builder.inttoptr(address, words.as_pointer()), align=2)
                    for address in (place, builder.add(place, stride))
                )
                even = builder.or_(builder.and_(first, lower), builder.shl(second, half))
                odd = builder.or_(builder.lshr(first, half), builder.and_(second, upper))
                for number, made in enumerate((even, odd)):
                    target = builder.add(_behind(builder, into, loop.index, 2 * ROW_BYTES), _number(ROW_BYTES * number))
                    builder.store(made, builder.inttoptr(target, words.as_pointer()), align=4)
        return codegen.get_dummy_value()

    return types.none(*[types.int64] * 4), generate


@_in_place
def weigh(context: Any, scores: Any, scale: Any, state: Any, weights: Any) -> Any:
    """Turn scores into weights against the highest so far, a lane a query.

    Args:
        context: the compiler's.
        scores: address of float32 [64 tokens, 16 queries]; -inf where a query does not see a token. Changed.
        scale: of scores, float32, with the logarithm of e: weights are powers of 2.
        state: address of float32 [3, 16]: highest scores and sums of weights, and by what to multiply what was summed so far.
        weights: where they go, bfloat16 [16 queries, 64 tokens].
    """

    def generate(codegen: Any, builder: Any, _: Any, arguments: Any) -> Any:
        scores, scale, state, weights = arguments
        scale = _spread(builder, scale)
        highest, total, rest = (builder.add(state, _number(ROW_BYTES * place)) for place in range(3))
        before = _read(builder, highest)
        chains = [cgutils.alloca_once_value(builder, before) for _ in range(_GROUPS)]
        with cgutils.for_range(builder, _number(TOKENS // _GROUPS)) as loop:
            for number, chain in enumerate(chains):
                place = builder.add(_behind(builder, scores, loop.index, ROW_BYTES * _GROUPS), _number(ROW_BYTES * number))
                _keep_higher(builder, chain, builder.fmul(_read(builder, place), scale))
        for chain in chains[1:]:
            _keep_higher(builder, chains[0], builder.load(chain))
        most = builder.load(chains[0])
        sums = [cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, [0.0] * ROWS)) for _ in range(2)]
        with cgutils.for_range(builder, _number(TOKENS // 2)) as loop:
            rounded: list[Any] = []
            for number, part in enumerate(sums):
                place = builder.add(_behind(builder, scores, loop.index, 2 * ROW_BYTES), _number(ROW_BYTES * number))
                weight = _power(builder, builder.fsub(builder.fmul(_read(builder, place), scale), most))
                builder.store(builder.fadd(builder.load(part), weight), part)
                rounded.append(builder.add(builder.bitcast(weight, _WORDS), _words(0x8000)))
            pair = builder.or_(builder.lshr(rounded[0], _words(16)), builder.and_(rounded[1], _words(0xFFFF0000)))
            _write(builder, _behind(builder, scores, loop.index, ROW_BYTES), pair)
        share = _power(builder, builder.fsub(before, most))
        _write(builder, highest, most)
        _write(builder, rest, share)
        added = builder.fadd(builder.load(sums[0]), builder.load(sums[1]))
        _write(builder, total, builder.fadd(builder.fmul(_read(builder, total), share), added))
        for half in range(2):
            pairs = [_read(builder, builder.add(scores, _number(TILE_BYTES * half + ROW_BYTES * row))) for row in range(ROWS)]
            for row, turned in enumerate(_transposed(builder, pairs)):
                _write(builder, builder.add(weights, _number(2 * ROW_BYTES * row + ROW_BYTES * half)), turned)
        return codegen.get_dummy_value()

    return types.none(types.int64, types.float32, types.int64, types.int64), generate


@_in_place
def multiply(
    context: Any, blocks: Any, columns: Any, ahead: Any, rows: Any, stride: Any, weights: Any, step: Any, depths: Any, into: Any
) -> Any:
    """Write the products of blocks of 16 rows with some columns of tiles: float32, rows as long as a group of weights.

    Args:
        context: the compiler's.
        blocks: how many, 1 or 2, and
        columns: how many, 4 or 2, and
        ahead: bytes of weights that are asked for before they are needed, 0 if they are in caches: known when this is compiled.
        rows: address of the first.
        stride: bytes between two rows.
        weights: address of the columns' first tiles, side by side.
        step: bytes to their next ones.
        depths: tiles that a column is long.
        into: where products go.
    """
    known = (blocks, columns, ahead)
    if not all(isinstance(number, types.IntegerLiteral) for number in known):
        return None
    block_count, column_count, ahead_bytes = (number.literal_value for number in known)
    pairs = [(block, column) for block in range(block_count) for column in range(column_count)]

    def generate(codegen: Any, builder: Any, _: Any, arguments: Any) -> Any:
        rows, stride, weights, step, depths, into = arguments[len(known) :]
        width = _number(_GROUPS * ROW_BYTES)
        for number in range(len(pairs)):
            _call(builder, "tilezero", _tile(number))
        with cgutils.for_range(builder, depths) as loop:
            first = _behind(builder, rows, loop.index, ROW_BYTES)
            for block in range(block_count):
                _load(builder, 4 + block, _behind(builder, first, stride, block * ROWS), stride)
            first = builder.add(weights, builder.mul(step, loop.index))
            for column in range(column_count):
                place = builder.add(first, _number(TILE_BYTES * column))
                for line in range(0, TILE_BYTES if ahead_bytes else 0, ROW_BYTES):
                    _fetch(builder, builder.add(place, _number(ahead_bytes + line)))
                loaded = 6 + column % 2
                _load(builder, loaded, place, _number(ROW_BYTES))
                for block in range(block_count):
                    _call(builder, "tdpbf16ps", _tile(pairs.index((block, column))), _tile(4 + block), _tile(loaded))
        for number, (block, column) in enumerate(pairs):
            place = builder.add(_behind(builder, into, width, block * ROWS), _number(ROW_BYTES * column))
            _store(builder, number, place, width)
        return codegen.get_dummy_value()

    return types.none(*known, *[types.int64] * 6), generate


_compiled = njit(error_model="numpy")


@_compiled
def pack_query(row, column, tiles):
    """Put a query into its column of tiles [depths, pairs, 16]."""
    flat = tiles.reshape(-1, ROWS)
    for pair in range(len(row) // 2):
        flat[pair, column] = np.uint32(row[2 * pair]) | np.uint32(row[2 * pair + 1]) << np.uint32(16)


@_compiled
def to_bfloat16(value):
    """Return a float32 rounded to even, its upper half."""
    bits = np.float32(value).view(np.uint32)
    if math.isnan(value):
        return np.uint16(0x7FC0)
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@_compiled
def place_of(dim):
    """Return where a dimension of a value comes out."""
    return dim // DEPTH * DEPTH + dim % 2 * ROWS + dim % DEPTH // 2


def _number(value: int) -> Any:
    return ir.Constant(ir.IntType(64), value)


def _tile(number: int) -> Any:
    return ir.Constant(ir.IntType(8), number)


def _behind(builder: Any, address: Any, steps: Any, size: int) -> Any:
    return builder.add(address, builder.mul(steps, _number(size)))


def _load(builder: Any, tile: int, address: Any, stride: Any) -> None:
    _call(builder, "tileloadd64", _tile(tile), builder.inttoptr(address, cgutils.voidptr_t), stride)


def _store(builder: Any, tile: int, address: Any, stride: Any) -> None:
    _call(builder, "tilestored64", _tile(tile), builder.inttoptr(address, cgutils.voidptr_t), stride)


def _fetch(builder: Any, address: Any) -> None:
    flag = ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, flag, flag, flag])
    ask = builder.module.declare_intrinsic("llvm.prefetch.p0", fnty=kind)
    builder.call(ask, [builder.inttoptr(address, cgutils.voidptr_t), flag(0), flag(2), flag(1)])


def _call(builder: Any, name: str, *arguments: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


def _words(value: int) -> Any:
    return ir.Constant(_WORDS, [value] * ROWS)


def _floats(value: float) -> Any:
    return ir.Constant(_FLOATS, [float(np.float32(value))] * ROWS)


def _read(builder: Any, address: Any) -> Any:
    return builder.load(builder.inttoptr(address, _FLOATS.as_pointer()), align=4)


def _write(builder: Any, address: Any, vector: Any) -> None:
    builder.store(vector, builder.inttoptr(address, vector.type.as_pointer()), align=4)


def _spread(builder: Any, value: Any) -> Any:
    single = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(single, single, _words(0))


def _keep_higher(builder: Any, kept: Any, vector: Any) -> None:
    before = builder.load(kept)
    builder.store(builder.select(builder.fcmp_ordered(">", vector, before), vector, before), kept)


def _power(builder: Any, exponent: Any) -> Any:
    """Return 2 to a power of at most 0; a NaN stays one."""
    low = builder.fcmp_ordered("<", exponent, _floats(_LOWEST_POWER))
    exponent = builder.select(low, _floats(2 * _LOWEST_POWER), exponent)
    whole = _vector_call(builder, f"llvm.floor.v{ROWS}f32", exponent)
    rest = builder.fsub(builder.fsub(exponent, whole), _floats(0.5))
    power = _floats(EXP2[-1])
    for term in reversed(EXP2[:-1]):
        power = _vector_call(builder, f"llvm.fmuladd.v{ROWS}f32", power, rest, _floats(term))
    every, rounding = ir.Constant(ir.IntType(16), 0xFFFF), ir.Constant(ir.IntType(32), 4)
    return _vector_call(builder, "llvm.x86.avx512.mask.scalef.ps.512", power, whole, _floats(0), every, rounding)


def _vector_call(builder: Any, name: str, *arguments: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Return the columns of a square: its halves, quarters and so on change places."""
    for half in (8, 4, 2, 1):
        turned = list(rows)
        for row in (row for row in range(ROWS) if not row & half):
            for target, shift in ((row, 0), (row + half, half)):
                lanes = [(lane & ~half | shift) + (ROWS if lane & half else 0) for lane in range(ROWS)]
                mask = ir.Constant(_WORDS, lanes)
                turned[target] = builder.shuffle_vector(rows[row], rows[row + half], mask)
        rows = turned
    return rows
