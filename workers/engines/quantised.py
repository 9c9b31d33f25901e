"""A weight that stays quantised in memory: codes, their scales, and what the whole of it means.

A weight is code x scale x row scale, for both formats; a row's scale is what a projection's tensor has, or a row.

    nvfp4   codes [rows, columns/2], two E2M1 a byte     scales [rows, columns/16], E4M3
    fp8     codes [rows, columns], E4M3                  scales [rows, blocks], float32

Every tensor has the weight's rows first, so that rows are chosen, reordered and put together without a code being touched.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.core.config import WeightFormat
from workers.engines import fp8, nvfp4


@dataclass(frozen=True, slots=True)
class QuantisedMatrix:
    """A weight [rows, columns] in one of the formats."""

    format: WeightFormat
    columns: int
    #: Bytes.
    codes: Tensor
    #: Bytes (nvfp4) or float32 (fp8).
    scales: Tensor
    #: float32 [rows, 1].
    row_scales: Tensor
    #: Columns that share a scale: 16, the size of FP8's blocks, or as many as there are or more.
    block: int

    @property
    def bytes(self) -> int:
        """Bytes of memory."""
        return sum(part.numel() * part.element_size() for part in (self.codes, self.scales, self.row_scales))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), self.columns

    def __getitem__(self, rows: Tensor | slice) -> "QuantisedMatrix":
        """Return some rows, by numbers or as a range, in that order."""
        return QuantisedMatrix(self.format, self.columns, self.codes[rows], self.scales[rows], self.row_scales[rows], self.block)

    def columns_of(self, part: slice) -> "QuantisedMatrix | None":
        """Return some columns; None if they begin or end within some that share a scale."""
        start, stop, _ = part.indices(self.columns)
        if start == 0 and stop == self.columns:
            return self
        one_scale = self.format is WeightFormat.FP8 and self.scales.shape[1] == 1
        if not one_scale and (start % self.block or (stop % self.block and stop != self.columns)):
            return None
        each = 2 if self.format is WeightFormat.NVFP4 else 1
        scales = self.scales if one_scale else self.scales[:, start // self.block : -(-stop // self.block)]
        codes = self.codes[:, start // each : stop // each]
        return QuantisedMatrix(self.format, stop - start, codes, scales, self.row_scales, self.block)

    def to(self, device: torch.device) -> "QuantisedMatrix":
        codes, scales, row_scales = (part.to(device) for part in (self.codes, self.scales, self.row_scales))
        return QuantisedMatrix(self.format, self.columns, codes, scales, row_scales, self.block)

    def decode(self) -> Tensor:
        """Return the weight in float32."""
        if self.format is WeightFormat.NVFP4:
            return nvfp4.decode(self.codes, self.scales, self.row_scales)
        scales = self.scales if self.scales.shape[1] == 1 else self.scales.repeat_interleave(self.block, 1)[:, : self.columns]
        return fp8.decode(self.codes, scales * self.row_scales)


#: A weight [rows, columns]: float32 or quantised.
Matrix = Tensor | QuantisedMatrix


def encode(weight: Tensor, weight_format: WeightFormat) -> QuantisedMatrix:
    """Return a float32 weight in a format: NVFP4 with one scale above all others, FP8 with one a row.

    Raises:
        NotEncodable: for a NaN or an infinity.
        ValueError: for columns that NVFP4 cannot group.
    """
    rows, columns = weight.shape
    ones = torch.ones(rows, 1, device=weight.device)
    if weight_format is WeightFormat.FP8:
        codes, scales = fp8.encode(weight)
        return QuantisedMatrix(weight_format, columns, codes, ones, scales, 1 << (columns - 1).bit_length())
    assert weight_format is WeightFormat.NVFP4, "auto is no format"
    if columns % nvfp4.GROUP:
        raise ValueError(f"{columns} columns are no multiple of {nvfp4.GROUP}")
    whole = fp8.scales_of(weight.abs().amax(-1).unsqueeze(0), nvfp4.E2M1_MAX * fp8.E4M3_MAX)
    codes, scales, _ = nvfp4.encode(weight, whole)
    return QuantisedMatrix(weight_format, columns, codes, scales, ones * whole, nvfp4.GROUP)


def columns(weight: Matrix, part: slice) -> Matrix:
    """Return some columns of a weight; in float32 if they begin or end within columns that share a scale."""
    if isinstance(weight, Tensor):
        return weight[:, part]
    return weight.columns_of(part) or weight.decode()[:, part]


def stack(weights: Sequence[Matrix]) -> Matrix:
    """Return weights of the same columns as one, rows under rows; in float32 if they are not all quantised alike."""
    alike = [one for one in weights if isinstance(one, QuantisedMatrix)]
    if len(alike) < len(weights) or len({(one.format, one.block) for one in alike}) > 1:
        return torch.cat([one.decode() if isinstance(one, QuantisedMatrix) else one for one in weights])
    codes, scales = torch.cat([one.codes for one in alike]), torch.cat([one.scales for one in alike])
    row_scales = torch.cat([one.row_scales for one in alike])
    return QuantisedMatrix(alike[0].format, alike[0].columns, codes, scales, row_scales, alike[0].block)
