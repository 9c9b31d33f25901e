"""Vector instructions that a compiler does not find by itself: products of queries with keys, and weighted sums of values.

They are written for 16 float32 at once; where registers are narrower, LLVM takes several. Values of the pool are float32, or
bfloat16 as uint16, which is a float32's upper half.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

#: Values of a vector.
LANES = 16
#: Tokens that are read together.
TOKENS = 4
#: Bytes that memory is read in.
LINE_BYTES = 64

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
#: What it makes is called without the first argument, which type checkers are not told.
_in_place: Any = intrinsic


@_in_place
def dots(
    context: Any, like: Any, first: Any, second: Any, keys: Any, stride: Any, dims: Any, into_first: Any, into_second: Any
) -> Any:
    """Write the products of two queries with four keys that are `stride` values apart, to two places, four float32 each.

    All but `like`, an array of the keys' type, `stride` and `dims`, a multiple of `LANES`, are addresses.
    """

    def generate(codegen: Any, builder: Any, _: Any, arguments: Any) -> Any:
        _like, first, second, keys, stride, dims, into_first, into_second = arguments
        size = like.dtype.bitwidth // 8
        zero = ir.Constant(_FLOATS, [0.0] * LANES)
        sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(TOKENS)] for _ in range(2)]
        with cgutils.for_range(builder, builder.udiv(dims, _count(LANES))) as loop:
            place = builder.mul(loop.index, _count(LANES))
            queries = [_read(builder, query, place, 4) for query in (first, second)]
            for token in range(TOKENS):
                where = builder.add(place, builder.mul(stride, _count(token)))
                key = _read(builder, keys, where, size)
                for query, row in zip(queries, sums, strict=True):
                    builder.store(_multiply_add(builder, query, key, builder.load(row[token])), row[token])
        for row, into in zip(sums, (into_first, into_second), strict=True):
            _write(builder, into, _lanes_added(builder, [builder.load(part) for part in row]))
        return codegen.get_dummy_value()

    return types.none(like, *[types.int64] * 7), generate


@_in_place
def fetch(context: Any, address: Any, count: Any) -> Any:
    """Ask for bytes that will be read soon: those at an address and as many behind it as `count` says."""

    def generate(codegen: Any, builder: Any, _: Any, arguments: Any) -> Any:
        address, count = arguments
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, flag, flag, flag])
        ask = builder.module.declare_intrinsic("llvm.prefetch.p0", fnty=kind)
        with cgutils.for_range(builder, builder.udiv(count, _count(LINE_BYTES))) as loop:
            line = builder.inttoptr(_address(builder, address, loop.index, LINE_BYTES), cgutils.voidptr_t)
            builder.call(ask, [line, flag(0), flag(2), flag(1)])
        return codegen.get_dummy_value()

    return types.none(types.int64, types.int64), generate


@_in_place
def add_weighted(
    context: Any, like: Any, queries: Any, weights: Any, pitch: Any, values: Any, stride: Any, dims: Any, sums: Any, width: Any
) -> Any:
    """Add to each of some queries' sums its weights times four values that are `stride` apart.

    Args:
        context: the compiler's.
        like: an array of the values' type.
        queries: how many, 1, 2 or 4; known when this is compiled.
        weights: address of the first query's four.
        pitch: weights between two queries'.
        values: address of the first.
        stride: values between two tokens'.
        dims: a multiple of `LANES`.
        sums: address of the first query's.
        width: sums between two queries'.
    """
    if not isinstance(queries, types.IntegerLiteral):
        return None
    count = queries.literal_value

    def generate(codegen: Any, builder: Any, _: Any, arguments: Any) -> Any:
        _like, _queries, weights, pitch, values, stride, dims, sums, width = arguments
        size = like.dtype.bitwidth // 8
        spread = [
            [_spread(builder, weights, builder.add(builder.mul(pitch, _count(query)), _count(token))) for token in range(TOKENS)]
            for query in range(count)
        ]
        with cgutils.for_range(builder, builder.udiv(dims, _count(LANES))) as loop:
            place = builder.mul(loop.index, _count(LANES))
            read = [
                _read(builder, values, builder.add(place, builder.mul(stride, _count(token))), size) for token in range(TOKENS)
            ]
            for query in range(count):
                where = _address(builder, sums, builder.add(place, builder.mul(width, _count(query))), 4)
                total = builder.load(builder.inttoptr(where, _FLOATS.as_pointer()), align=4)
                for weight, value in zip(spread[query], read, strict=True):
                    total = _multiply_add(builder, weight, value, total)
                _write(builder, where, total)
        return codegen.get_dummy_value()

    return types.none(like, queries, *[types.int64] * 7), generate


def _count(number: int) -> Any:
    return ir.Constant(ir.IntType(64), number)


def _address(builder: Any, base: Any, place: Any, size: int) -> Any:
    return builder.add(base, builder.mul(place, _count(size)))


def _read(builder: Any, base: Any, place: Any, size: int) -> Any:
    """Return 16 values as float32; those of two bytes are the upper halves."""
    where = _address(builder, base, place, size)
    if size == 4:
        return builder.load(builder.inttoptr(where, _FLOATS.as_pointer()), align=4)
    halves = ir.VectorType(ir.IntType(16), LANES)
    words = ir.VectorType(ir.IntType(32), LANES)
    found = builder.zext(builder.load(builder.inttoptr(where, halves.as_pointer()), align=2), words)
    return builder.bitcast(builder.shl(found, ir.Constant(words, [16] * LANES)), _FLOATS)


def _spread(builder: Any, base: Any, place: Any) -> Any:
    """Return 16 times the float32 at a place."""
    one = builder.load(builder.inttoptr(_address(builder, base, place, 4), ir.FloatType().as_pointer()), align=4)
    first = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), one, ir.Constant(ir.IntType(32), 0))
    return _shuffled(builder, first, first, [0] * LANES)


def _write(builder: Any, where: Any, vector: Any) -> None:
    builder.store(vector, builder.inttoptr(where, vector.type.as_pointer()), align=4)


def _multiply_add(builder: Any, left: Any, right: Any, total: Any) -> Any:
    name, kind = f"llvm.fmuladd.v{LANES}f32", ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    return builder.call(builder.module.declare_intrinsic(name, fnty=kind), [left, right, total])


def _shuffled(builder: Any, left: Any, right: Any, lanes: Sequence[int]) -> Any:
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))
    return builder.shuffle_vector(left, right, mask)


def _lanes_added(builder: Any, parts: Sequence[Any]) -> Any:
    """Return the sums of four vectors' lanes: their halves are added side by side, until each has one lane left."""
    a, b, c, d = parts
    pair, other = _halved(builder, a, b, 8), _halved(builder, c, d, 8)
    quarters = _halved(builder, pair, other, 4)
    eighths = _halved(builder, quarters, None, 2)
    return _halved(builder, eighths, None, 1)


def _halved(builder: Any, left: Any, right: Any, half: int) -> Any:
    """Add the lower to the upper `half` lanes of every run of twice as many, in one vector or two."""
    count = left.type.count * (1 if right is None else 2)
    lower = [lane for lane in range(count) if lane // half % 2 == 0]
    right = left if right is None else right
    return builder.fadd(_shuffled(builder, left, right, lower), _shuffled(builder, left, right, [lane + half for lane in lower]))
