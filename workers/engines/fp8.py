"""FP8: a byte a value, in E4M3, and a float32 scale a row of values.

E4M3 is sign, four bits of exponent (bias 7), three of mantissa: 0, subnormals from 2^-9, normals up to 448, one NaN of either
sign and no infinities (OCP 8-bit Floating Point Specification 1.0, section 5; torch calls it `float8_e4m3fn`). A row's scale maps
its largest magnitude to 448, so no row saturates. Values are rounded to the nearest code, ties to the even one.
"""

import functools
import math

import torch
from torch import Tensor

from workers.engines.base import NotEncodable

#: The largest E4M3.
E4M3_MAX = 448.0
#: Rows of less than this have their scale: it and all that is computed with it are far from where float32 loses digits.
SCALE_MIN = 2.0**-100
#: A little under float32's largest number, so that the largest code times its scale is never infinite.
_VALUE_MAX = torch.finfo(torch.float32).max * (1 - 2**-22)


def scales_of(magnitudes: Tensor, code_max: float) -> Tensor:
    """Return the float32 scale of each row: what maps its largest value to `code_max`. Shape [..., 1].

    Args:
        magnitudes: [..., n], no value negative.
        code_max: the largest value that can be encoded.

    Raises:
        NotEncodable: if there is a NaN or an infinity.
    """
    largest = magnitudes.amax(-1, keepdim=True).float()
    if not math.isfinite(largest.max().item()):
        raise NotEncodable(f"{int((~torch.isfinite(largest)).sum())} of {largest.numel()} rows have a NaN or an infinity")
    # Not divided: by a number, CUDA multiplies with its reciprocal, and the same block would have other bytes there.
    return largest.mul_(1 / code_max).clamp_(SCALE_MIN, _VALUE_MAX / code_max)


def to_e4m3(values: Tensor) -> Tensor:
    """Return the nearest E4M3 of each value, as bytes; what is beyond 448 becomes 448, NaN stays NaN."""
    return _to_e4m3(values.clone())


def from_e4m3(codes: Tensor) -> Tensor:
    """Return the values of E4M3 codes (bytes) in float32: exact."""
    return torch.index_select(_values(codes.device), 0, codes.reshape(-1).int()).view(codes.shape)


def encode(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (bytes [..., n]) and scales (float32 [..., 1]) of rows [..., n]. Raises `NotEncodable`."""
    values = values.to(torch.float32, copy=True)
    scales = scales_of(values.abs(), E4M3_MAX)
    return _to_e4m3(values.div_(scales)), scales


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the values of `encode`'s codes and scales in float32."""
    return from_e4m3(codes).mul_(scales)


def _to_e4m3(values: Tensor) -> Tensor:
    return values.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


@functools.cache
def _values(device: torch.device) -> Tensor:
    """Return what each code means. A table: torch's own conversion takes a CPU seven times as long."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)
