"""FP8 and NVFP4 against slow oracles that know nothing but the formats' definitions: fractions, nearest, ties to even."""

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from workers.engines import fp8, nvfp4
from workers.engines.base import NotEncodable


def magnitude(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> Fraction:
    """Return what a code without its sign means, by IEEE 754's rule with subnormals."""
    exponent, mantissa = code >> mantissa_bits, code & (1 << mantissa_bits) - 1
    assert exponent < 1 << exponent_bits
    if exponent == 0:
        return Fraction(mantissa, 1 << mantissa_bits) * Fraction(2) ** (1 - bias)
    return (1 + Fraction(mantissa, 1 << mantissa_bits)) * Fraction(2) ** (exponent - bias)


#: The code 127 is NaN.
E4M3 = [magnitude(code, 4, 3, 7) for code in range(127)]
E2M1 = [magnitude(code, 2, 1, 1) for code in range(8)]


def nearest(value: float, magnitudes: list[Fraction]) -> int:
    """Return the code of the nearest magnitude, the even one of two; what is beyond the last is the last."""
    wanted = abs(Fraction(float(value)))
    return min(range(len(magnitudes)), key=lambda code: (abs(magnitudes[code] - wanted), code & 1))


def e4m3(value: float) -> int:
    return nearest(value, E4M3) | (0x80 if math.copysign(1, value) < 0 else 0)


def around(magnitudes: list[Fraction]) -> Tensor:
    """Return all codes' values, the middles between neighbours, and what float32 has just beside each of these; both signs."""
    points = [*magnitudes, *((low + high) / 2 for low, high in pairwise(magnitudes)), 2 * magnitudes[-1]]
    exact = np.array([float(point) for point in points], dtype=np.float32)
    beside = [np.nextafter(exact, np.float32(limit)) for limit in (-np.inf, np.inf)]
    values = np.concatenate([exact, *beside])
    return torch.from_numpy(np.concatenate([values, -values]))


def random_rows(seed: int, rows: int, size: int, spread: float = 3.0) -> Tensor:
    """Return rows whose values, and rows, are of very different sizes."""
    source = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, size, generator=source) * torch.exp(spread * torch.randn(rows, size, generator=source))
    return values * torch.exp(spread * torch.randn(rows, 1, generator=source))


def test_every_e4m3_code_means_what_the_format_says() -> None:
    values = fp8.from_e4m3(torch.arange(256, dtype=torch.uint8))
    for code in range(128):
        found = values[code].item(), values[code | 128].item()
        if code == 127:
            assert [math.isnan(one) for one in found] == [True, True]
        else:
            assert [Fraction(abs(one)) for one in found] == [E4M3[code]] * 2
            assert [math.copysign(1, one) for one in found] == [1, -1]
    assert float(E4M3[-1]) == fp8.E4M3_MAX


def test_values_become_the_nearest_e4m3_ties_to_even_and_saturate() -> None:
    values = torch.cat((around(E4M3), torch.tensor([math.inf, -math.inf, 1e30, 1e-30])))
    expected = [e4m3(value) if math.isfinite(value) else e4m3(math.copysign(1e38, value)) for value in values.tolist()]
    assert fp8.to_e4m3(values).tolist() == expected
    assert math.isnan(fp8.from_e4m3(fp8.to_e4m3(torch.tensor([math.nan]))).item())


def test_fp8_rows_are_scaled_to_their_largest_and_rounded_to_nearest() -> None:
    rows = random_rows(1, 6, 64)
    codes, scales = fp8.encode(rows)
    assert codes.dtype is torch.uint8
    for row, found, scale in zip(rows.numpy(), codes, scales, strict=True):
        wanted = np.abs(row).max() * np.float32(1 / 448)
        assert scale.item() == wanted
        assert found.tolist() == [e4m3(value / wanted) for value in row]
    expected = [[float(E4M3[code & 127]) * (-1 if code & 128 else 1) for code in row] for row in codes.tolist()]
    assert torch.equal(fp8.decode(codes, scales), torch.tensor(expected) * scales)


def nvfp4_codes(codes: Tensor) -> list[list[int]]:
    """Return nibbles in order: the lower one of a byte first."""
    return [[nibble for byte in row for nibble in (byte & 15, byte >> 4)] for row in codes.tolist()]


def test_every_e2m1_code_means_what_the_format_says() -> None:
    # All pairs of codes: 256 bytes, of which eight share a scale.
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    scales = torch.full((1, 32), e4m3(1.0), dtype=torch.uint8)
    values = nvfp4.decode(codes, scales, torch.ones(1, 1))[0].tolist()
    for code, value in zip(nvfp4_codes(codes)[0], values, strict=True):
        assert Fraction(abs(value)) == E2M1[code & 7]
        assert value == 0 or (value < 0) == (code >= 8)
    assert float(E2M1[-1]) == nvfp4.E2M1_MAX


def test_values_become_the_nearest_e2m1_ties_to_even_and_saturate() -> None:
    # One group a value, so that with 6 in it and a tensor scale of 1 its scale is 1 and the value is rounded as it is.
    values = around(E2M1).clamp(-6, 6)
    groups = torch.zeros(len(values), 16)
    groups[:, 0], groups[:, 1] = 6.0, values
    codes, scales, _ = nvfp4.encode(groups, torch.ones(1, 1))
    assert set(scales.flatten().tolist()) == {e4m3(1.0)}
    found = [row[1] for row in nvfp4_codes(codes)]
    assert [code & 7 for code in found] == [nearest(value, E2M1) for value in values.tolist()]
    signed = [(code >= 8, value < 0) for code, value in zip(found, values.tolist(), strict=True) if code & 7]
    assert [negative for negative, _ in signed] == [negative for _, negative in signed]


def oracle(row: np.ndarray) -> tuple[np.float32, list[int], list[int]]:
    """Return a row's tensor scale, its groups' scales and its values' codes, one number after the other."""
    tensor_scale = np.abs(row).max() * np.float32(1 / (6 * 448))
    scales, codes = [], []
    for group in row.reshape(-1, 16):
        scale = max(1, nearest(np.abs(group).max() / (np.float32(6) * tensor_scale), E4M3))
        divisor = np.float32(E4M3[scale]) * tensor_scale
        scales.append(scale)
        codes.extend(nearest(value / divisor, E2M1) | (8 if value < 0 else 0) for value in group)
    return tensor_scale, scales, codes


def magnitudes_and_signs(codes: list[int]) -> list[int]:
    """Return codes with one zero: which of the two a rounded value becomes says nothing."""
    return [0 if code == 8 else code for code in codes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_nvfp4_is_what_its_recipe_gives(dtype: torch.dtype, spread: float) -> None:
    rows = random_rows(2, 4, 128, spread).clamp(-6e4, 6e4).to(dtype)
    codes, scales, tensor_scales = nvfp4.encode(rows)
    assert codes.shape == (4, 64)
    assert scales.shape == (4, 8)
    for index, row in enumerate(rows.float().numpy()):
        tensor_scale, wanted_scales, wanted = oracle(row)
        assert tensor_scales[index].item() == tensor_scale
        assert scales[index].tolist() == wanted_scales
        assert magnitudes_and_signs(nvfp4_codes(codes)[index]) == magnitudes_and_signs(wanted)


def test_nvfp4_decodes_a_checkpoints_three_tensors_of_several_experts() -> None:
    experts, rows, size = 3, 2, 32
    source = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 256, (experts, rows, size // 2), dtype=torch.uint8, generator=source)
    scales = torch.randint(1, 127, (experts, rows, size // 16), dtype=torch.uint8, generator=source)
    tensor_scales = torch.rand(experts, 1, 1, generator=source) + 0.1
    found = nvfp4.decode(codes, scales, tensor_scales)
    assert found.shape == (experts, rows, size)
    for expert in range(experts):
        for row in range(rows):
            nibbles = nvfp4_codes(codes[expert])[row]
            for place, nibble in enumerate(nibbles):
                value = float(E2M1[nibble & 7]) * (-1 if nibble & 8 else 1)
                scale = np.float32(E4M3[int(scales[expert, row, place // 16])]) * tensor_scales[expert].numpy().item()
                assert found[expert, row, place].item() == pytest.approx(value * scale, rel=1e-6)


def test_a_given_tensor_scale_is_used_and_what_is_beyond_it_saturates() -> None:
    rows = torch.tensor([[0.5, -1e6, 2688.0, 0.0] * 8])
    codes, scales, tensor_scales = nvfp4.encode(rows, torch.tensor(1.0))
    assert tensor_scales.item() == 1.0
    assert nvfp4.decode(codes, scales, tensor_scales)[0, :4].tolist() == [0.0, -2688.0, 2688.0, 0.0]


Encoded = Callable[[Tensor], Tensor]


def through_fp8(rows: Tensor) -> Tensor:
    return fp8.decode(*fp8.encode(rows))


def through_nvfp4(rows: Tensor) -> Tensor:
    return nvfp4.decode(*nvfp4.encode(rows))


@pytest.mark.parametrize(("through", "share"), [(through_fp8, 2**-4), (through_nvfp4, 1 / 5)], ids=["fp8", "nvfp4"])
def test_no_value_is_further_off_than_half_a_step(through: Encoded, share: float) -> None:
    # FP8: half of 1/8 of the value, or half a subnormal's step. NVFP4: half of the widest step, 2 of 6, of its group's largest,
    # and what rounding the group's scale adds.
    rows = random_rows(4, 20, 256)
    error = (rows - through(rows)).abs()
    if through is through_fp8:
        bound = torch.maximum(rows.abs() * share, rows.abs().amax(-1, keepdim=True) / 448 * 2**-10)
    else:
        group = rows.abs().unflatten(-1, (-1, 16)).amax(-1, keepdim=True).expand(-1, -1, 16).flatten(-2)
        bound = torch.maximum(group * share, rows.abs().amax(-1, keepdim=True) / 2688 * 2**-9 * 6)
    assert bool((error <= bound * 1.000001).all())


@pytest.mark.parametrize("through", [through_fp8, through_nvfp4], ids=["fp8", "nvfp4"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinities_are_refused(through: Encoded, bad: float) -> None:
    rows = torch.ones(3, 32)
    rows[1, 7] = bad
    with pytest.raises(NotEncodable, match="1 of 3 rows have a NaN or an infinity"):
        through(rows)


@pytest.mark.parametrize("through", [through_fp8, through_nvfp4], ids=["fp8", "nvfp4"])
def test_zeros_stay_zeros_and_extremes_stay_finite(through: Encoded) -> None:
    assert torch.equal(through(torch.zeros(2, 32)), torch.zeros(2, 32))
    largest = torch.full((1, 32), torch.finfo(torch.float32).max)
    assert bool(torch.isfinite(through(largest)).all())
    assert through(largest)[0, 0].item() == pytest.approx(largest[0, 0].item(), rel=1e-5)
    tiny = torch.full((1, 32), 1e-42)  # a subnormal of float32: it may become 0, and nothing else
    assert bool((through(tiny).abs() <= 1e-30).all())


@pytest.mark.parametrize("number_format", [fp8, nvfp4], ids=["fp8", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_went_through_once_keeps_its_codes(number_format: ModuleType, dtype: torch.dtype) -> None:
    # Blocks may be stored, restored and stored again: their error must not grow.
    first = number_format.encode(random_rows(5, 40, 256, 1.0).to(dtype))
    second = number_format.encode(number_format.decode(*first).to(dtype))
    for one, other in zip(first[:-1], second[:-1], strict=True):
        assert torch.equal(one, other)
    assert torch.allclose(first[-1], second[-1], rtol=2**-8 if dtype is torch.bfloat16 else 2**-22, atol=0)
