"""NVFP4: four and a half bits a value: E2M1 codes, an E4M3 scale for every 16 of them, and a float32 scale above those.

A value is code x scale x tensor scale. E2M1 is sign, two bits of exponent, one of mantissa:

    code    0    1    2    3    4    5    6    7     8 to 15: the same, negative
    value   0   0.5   1   1.5   2    3    4    6

Three tensors, in the layout of checkpoints, so that experts' weights decode as they lie in the file:

                    here [..., n]     ModelOpt                   compressed-tensors
    codes           bytes [..., n/2]  weight                     weight_packed          the even value in the lower four bits
    scales          bytes [..., n/16] weight_scale               weight_scale           E4M3, groups along the last dimension
    tensor scale    float32           weight_scale_2             1 / weight_global_scale

(NVIDIA Model Optimizer's `NVFP4QTensor`; the `nvfp4-pack-quantized` format of compressed-tensors; NVIDIA's "Introducing NVFP4
for Efficient and Accurate Low-Precision Inference" for what the numbers mean). Encoding is ModelOpt's recipe: a tensor scale that
maps the largest magnitude to 6 x 448, a group's scale that maps the group's to 6, both rounded before they divide; to the nearest
code, ties to the even one. A group whose scale would round to 0 has the smallest one; ModelOpt gives one of zeros the scale 1.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from workers.engines.fp8 import E4M3_MAX, from_e4m3, scales_of, to_e4m3

#: Values that share a scale.
GROUP = 16
#: The largest E2M1.
E2M1_MAX = 6.0
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: What the 16 codes mean.
VALUES = (*_MAGNITUDES, *(-one for one in _MAGNITUDES))
#: The smallest E4M3 over 0.
_SCALE_MIN = 2.0**-9
#: Where in their table two codes of 0 are.
_PAIR_ZERO = 128


def encode(values: Tensor, tensor_scales: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (bytes [..., n/2]), scales (bytes [..., n/16]) and tensor scales (float32) of values [..., n].

    Args:
        values: n is a multiple of 16.
        tensor_scales: float32, broadcast against [..., 1]; None: one a row, by its largest magnitude. Values beyond 6 x 448
            times it saturate.

    Raises:
        NotEncodable: if there is a NaN or an infinity and no tensor scale is given.
    """
    groups = values.to(torch.float32, copy=True, memory_format=torch.contiguous_format).unflatten(-1, (-1, GROUP))
    magnitudes = groups.abs()
    # Pooling: a maximum over a short last dimension takes twice as long as any other way.
    largest = functional.max_pool1d(magnitudes.view(1, -1), GROUP).view(groups.shape[:-1])
    if tensor_scales is None:
        tensor_scales = scales_of(largest, E2M1_MAX * E4M3_MAX)
    scales = to_e4m3((largest / (E2M1_MAX * tensor_scales)).clamp_(min=_SCALE_MIN))
    codes = _codes(groups.div_((from_e4m3(scales) * tensor_scales).unsqueeze(-1)), magnitudes)
    return codes.view(*values.shape[:-1], -1), scales, tensor_scales


def decode(codes: Tensor, scales: Tensor, tensor_scales: Tensor) -> Tensor:
    """Return the values of such three tensors in float32, [..., n]; `tensor_scales` broadcast against [..., 1]."""
    pairs = torch.index_select(_pairs(codes.device), 0, codes.reshape(-1).int())
    groups = pairs.view(torch.float32).view(*scales.shape, GROUP)
    return groups.mul_((from_e4m3(scales) * tensor_scales).unsqueeze(-1)).flatten(-2)


def _codes(values: Tensor, scratch: Tensor) -> Tensor:
    """Return the nearest codes, two a byte. What is in both tensors is lost.

    Up to 2 the values of codes are 1/2 apart, up to 4 they are 1 apart, up to 6 they are 2 apart. A value is cut into its parts
    in these three; each is rounded in its own steps, ties to even, and the differences are exact.
    """
    near = torch.clamp(values, -2.0, 2.0, out=scratch)
    far = values.clamp_(-E2M1_MAX, E2M1_MAX).sub_(near)
    middle = far.clamp(-2.0, 2.0)
    far.sub_(middle)
    numbers = near.mul_(2.0).round_().add_(middle.round_()).add_(far.mul_(0.5).round_()).view(-1, 2)
    pairs = torch.add(numbers[:, 0], numbers[:, 1], alpha=GROUP).add_(_PAIR_ZERO)
    return torch.index_select(_packed(values.device), 0, pairs.to(torch.int32))


@functools.cache
def _packed(device: torch.device) -> Tensor:
    """Return the byte of each two codes, by their numbers (-7 to 7): first + 16 x second + 128."""
    numbers = torch.arange(-_PAIR_ZERO, _PAIR_ZERO)
    first = ((numbers + 8) & 15) - 8
    return (_nibbles(first) | _nibbles((numbers - first) >> 4) << 4).to(torch.uint8).to(device)


def _nibbles(numbers: Tensor) -> Tensor:
    return numbers.abs() | (numbers < 0) * 8


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """Return what each byte of two codes means: two float32 in one 64-bit number."""
    values = torch.tensor(VALUES)
    byte = torch.arange(256)
    return torch.stack((values[byte & 15], values[byte >> 4]), dim=1).view(torch.int64).view(-1).to(device)
