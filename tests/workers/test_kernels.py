"""Compiled products with quantised weights: exactly what the formats say, on every kind of processor that this one can play."""

from dataclasses import replace
from fractions import Fraction

import llvmlite.binding as llvm
import pytest
import torch
from torch import Tensor

from orchestrator.core.config import WeightFormat
from tests.workers.test_number_formats import E2M1, E4M3
from workers.engines import linear
from workers.engines.kernels import UNIT, Kernels, Machine, kernels_for, machine_of, this_machine, tile
from workers.engines.linear import make_linear
from workers.engines.quantised import QuantisedMatrix, encode

CPU = torch.device("cpu")
FORMATS = (WeightFormat.NVFP4, WeightFormat.FP8)


def machines() -> dict[str, Machine]:
    """Return this processor, and those of which it can do all that they can."""
    host = this_machine()
    if host is None:
        return {}
    features = {
        name: on and not name.startswith(("avx512", "avx10", "amx", "evex512"))
        for name, on in dict(llvm.get_host_cpu_features()).items()
    }
    older = machine_of("haswell", features)
    assert older is not None
    assert older.lanes == 8
    return {"host": host, "host-without-bfloat16": replace(host, rounds=False), "avx2": older}


MACHINES = machines()
pytestmark = pytest.mark.skipif(not MACHINES, reason="no kernels for this processor")
KERNELS = {(name, one): Kernels(one, machine) for name, machine in MACHINES.items() for one in FORMATS}


@pytest.fixture(params=list(KERNELS), ids="-".join)
def kernels(request: pytest.FixtureRequest) -> tuple[WeightFormat, Kernels]:
    return request.param[1], KERNELS[request.param]


def weight_of(weight_format: WeightFormat, rows: int, columns: int, block: int | None = None) -> QuantisedMatrix:
    """Return a weight whose rows are of different sizes; with FP8 scales for blocks of columns if asked for."""
    source = torch.Generator().manual_seed(rows * columns)
    found = encode(torch.randn(rows, columns, generator=source) * torch.randn(rows, 1, generator=source).exp(), weight_format)
    if block is None:
        return found
    scales = torch.rand(rows, -(-columns // block), generator=source) + 0.1
    return replace(found, scales=scales, block=block)


SIZES = [(16, 16, None), (40, 80, 32), (17, 48, 16), (8, 144, 128), (100, 256, None)]


@pytest.mark.parametrize(("rows", "columns", "block"), SIZES)
def test_products_are_those_with_the_decoded_weight(
    kernels: tuple[WeightFormat, Kernels], rows: int, columns: int, block: int | None
) -> None:
    weight_format, compiled = kernels
    weight = weight_of(weight_format, rows, columns, block if weight_format is WeightFormat.FP8 else None)
    tiled = tile(weight, compiled.lanes)
    source = torch.Generator().manual_seed(1)
    for count in (1, 2, 3, 4, 7, 8, 9, 23):
        given = torch.randn(count, columns, generator=source)
        expected = given.double() @ weight.decode().double().t()
        found = compiled.multiply(tiled, given)
        assert found.shape == (count, rows)
        # A few roundings of float32 for each sum, whose size is that of its largest terms.
        bound = given.double().abs() @ weight.decode().double().abs().t() * 2**-22
        assert bool(((found - expected).abs() <= bound).all())


@pytest.mark.parametrize(("rows", "columns", "block"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoded_pieces_are_the_decoded_weight(
    kernels: tuple[WeightFormat, Kernels], rows: int, columns: int, block: int | None, dtype: torch.dtype
) -> None:
    weight_format, compiled = kernels
    weight = weight_of(weight_format, rows, columns, block if weight_format is WeightFormat.FP8 else None)
    tiled = tile(weight, compiled.lanes)
    for first, count in ((0, tiled.tiles), (tiled.tiles - 1, 1)):
        into = torch.full((tiled.units * UNIT, count * compiled.lanes), torch.nan, dtype=dtype)
        compiled.decode(tiled, first, count, into)
        unscaled = replace(weight, row_scales=torch.ones(rows, 1)).decode()
        expected = unscaled[first * compiled.lanes : (first + count) * compiled.lanes]
        assert torch.equal(into.t()[: len(expected), :columns], expected.to(dtype))
        if weight.format is WeightFormat.NVFP4 or block is None:
            assert torch.equal(expected.to(dtype).float(), expected)


@pytest.mark.parametrize("count", [1, 5, 8])
def test_products_of_whole_numbers_are_exact(kernels: tuple[WeightFormat, Kernels], count: int) -> None:
    # No sum needs more than float32's 24 bits here: whatever the order, nothing may be rounded.
    weight_format, compiled = kernels
    rows, columns = 19, 64
    source = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=source)
    if weight_format is WeightFormat.NVFP4:
        codes = codes[:, : columns // 2]
        scales = torch.randint(0x30, 0x50, (rows, columns // 16), dtype=torch.uint8, generator=source)
        meant = nvfp4_meant(codes, scales)
        weight = QuantisedMatrix(weight_format, columns, codes, scales, torch.full((rows, 1), 0.5), 16)
    else:
        codes = codes & 0x80 | torch.randint(0x20, 0x50, (rows, columns), dtype=torch.uint8, generator=source)
        meant = [[signed(E4M3[code & 127], code & 128) for code in row] for row in codes.tolist()]
        weight = QuantisedMatrix(weight_format, columns, codes, torch.full((rows, 1), 2.0), torch.full((rows, 1), 0.25), 64)
    given = torch.randint(-8, 9, (count, columns), generator=source)
    found = compiled.multiply(tile(weight, compiled.lanes), given.float())
    for place, numbers in enumerate(given.tolist()):
        for row, values in enumerate(meant):
            exact = sum(value * number for value, number in zip(values, numbers, strict=True)) / 2
            assert Fraction(found[place, row].item()) == exact


def nvfp4_meant(codes: Tensor, scales: Tensor) -> list[list[Fraction]]:
    nibbles = [[nibble for byte in row for nibble in (byte & 15, byte >> 4)] for row in codes.tolist()]
    return [
        [signed(E2M1[nibble & 7], nibble & 8) * E4M3[row_scales[place // 16]] for place, nibble in enumerate(row)]
        for row, row_scales in zip(nibbles, scales.tolist(), strict=True)
    ]


def signed(value: Fraction, sign: int) -> Fraction:
    return -value if sign else value


@pytest.mark.parametrize("way", ["codes", "pieces", "without-kernels"])
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_layers_are_the_same_whatever_the_way(
    monkeypatch: pytest.MonkeyPatch, way: str, weight_format: WeightFormat, dtype: torch.dtype, biased: bool
) -> None:
    monkeypatch.setattr(linear, "direct_rows_max", lambda *_: 1000 if way == "codes" else 0)
    monkeypatch.setattr(linear, "PIECE_BYTES_CPU", 4096)
    monkeypatch.setattr(linear, "PIECE_VALUES_CPU", 4096)
    if way == "without-kernels":
        monkeypatch.setattr(linear, "kernels_for", lambda _: None)
    weight = weight_of(weight_format, 72, 96)
    source = torch.Generator().manual_seed(3)
    bias = torch.randn(72, generator=source).to(dtype) if biased else None
    given, state = torch.randn(6, 192, generator=source).to(dtype)[:, 40:136], torch.randn(6, 72, generator=source)
    layer = make_linear(weight, bias, dtype, CPU)
    expected = given.float() @ weight.decode().t() + (0 if bias is None else bias.float())
    # Roundings of each term, and of the sum, to the dtype.
    bound = (given.float().abs() @ weight.decode().abs().t() + 3 + state.abs()) * (2**-7 if dtype is torch.bfloat16 else 2**-20)
    assert layer(given).dtype is dtype
    assert bool(((layer(given).float() - expected).abs() <= bound).all())
    assert bool(((layer.add_to(state.clone(), given) - state - expected).abs() <= bound).all())


@pytest.mark.slow
@pytest.mark.parametrize("weight_format", FORMATS)
def test_how_many_rows_meet_the_codes_is_measured_once(weight_format: WeightFormat) -> None:
    found = linear.direct_rows_max(weight_format, torch.float32)
    assert 8 <= found <= 512
    assert linear.direct_rows_max(weight_format, torch.float32) is found
    assert kernels_for(weight_format) is kernels_for(weight_format)


def test_processors_that_lack_what_kernels_need_have_none() -> None:
    assert machine_of("x86-64", {"avx2": True, "fma": True, "f16c": False}) is None
    assert machine_of("x86-64", {"avx512f": True, "avx512bw": True}) is None
    assert machine_of("x86-64", {}) is None
