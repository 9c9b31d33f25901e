"""Reads a checkpoint's tensors, one file or sharded, each once and only when asked for.

Quantised weights are several tensors; which, `quantization.py` says. They are read as they lie (`take_matrix`), or decoded for
whoever wants numbers (`take`).
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from orchestrator.core.config import ConfigError, WeightFormat
from orchestrator.profiles.fields import CheckpointError
from orchestrator.profiles.model_config import read_config
from workers.engines.base import NotEncodable
from workers.engines.checkpoint import weight_files
from workers.engines.nvfp4 import GROUP
from workers.engines.quantised import Matrix, QuantisedMatrix, encode
from workers.engines.quantization import read_quantization

#: Tensors that old checkpoints keep although they follow from config.json.
DERIVED = (".rotary_emb.inv_freq",)
#: Scales of activations, and of keys and values, beside quantised weights: here neither is quantised.
READ_PAST = (".input_scale", ".input_global_scale", ".output_scale", ".q_scale", ".k_scale", ".v_scale")
#: What a quantised weight's tensors are called after its name.
PARTS = ("_packed", "_scale", "_scale_2", "_global_scale", "_scale_inv")
TENSORS_NAMED_MAX = 5
_FLOATS = ("F32", "BF16", "F16")
_NVFP4_CODES = "U8"
_E4M3 = "F8_E4M3"
#: E4M3's NaN, its sign aside: what is over it is negative.
_E4M3_NAN = 0x7F


class Weights:
    """The tensors of one checkpoint by name, mapped from disk: `take` copies what it is asked for."""

    def __init__(self, directory: Path, weights: WeightFormat = WeightFormat.AUTO) -> None:
        """Open a checkpoint; `weights` is what unquantised linear weights are rounded to.

        Raises:
            CheckpointError: for files that cannot be read, and a quantization that is not known.
            ConfigError: if the checkpoint is quantised otherwise.
        """
        self._files: dict[str, tuple[Path, safe_open]] = {}
        for path in weight_files(directory):
            try:
                file = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(path, f"not a readable safetensors file: {error}") from None
            self._files |= dict.fromkeys(file.keys(), (path, file))
        self._directory = directory
        self._taken: set[str] = set()
        self._wanted = weights
        self._quantization = read_quantization(directory, read_config(directory))
        if self._quantization is not None and weights not in (WeightFormat.AUTO, self._quantization.format):
            raise ConfigError(
                "engine.weights", f"is {weights}, but {directory} is quantised already, to {self._quantization.format}"
            )

    @property
    def quantised(self) -> bool:
        """Whether `take_matrix` may return quantised weights."""
        return self._quantization is not None or self._wanted is not WeightFormat.AUTO

    def has(self, name: str) -> bool:
        return name in self._files or f"{name}_packed" in self._files

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor as float32 on the CPU, decoded if it is quantised.

        Raises:
            CheckpointError: if it is missing, of another shape or of a type that is not known.
        """
        if (found := self._quantised(name, shape)) is not None:
            return found.decode()
        return self._floats(name, shape)

    def take_matrix(self, name: str, shape: tuple[int, int]) -> Matrix:
        """Return the weight of a linear layer: quantised if the checkpoint has it so or the engine shall, else in float32.

        Raises:
            CheckpointError: as `take`, and for a weight that cannot be quantised.
        """
        if (found := self._quantised(name, shape)) is not None:
            return found
        weight = self._floats(name, shape)
        if self._wanted is WeightFormat.AUTO or self._quantization is not None:
            return weight
        if self._wanted is WeightFormat.NVFP4 and shape[1] % GROUP:
            raise self._error(name, f"has {shape[1]} columns; engine.weights = nvfp4 needs a multiple of {GROUP}")
        try:
            return encode(weight, self._wanted)
        except NotEncodable as error:
            raise self._error(name, f"cannot be quantised: {error}") from None

    def leave(self, *names: str) -> None:
        """Note tensors that another process takes, quantised ones in all their parts."""
        self._taken.update(f"{name}{ending}" for name in names for ending in ("", *PARTS))

    def leave_all(self, prefix: str) -> None:
        """Note that all tensors whose names begin so are taken and checked by another process, or by none."""
        self._taken.update(name for name in self._files if name.startswith(prefix))

    def check_all_taken(self, within: str = "") -> None:
        """Raise `CheckpointError` for tensors that nothing asked for: the model that they belong to is another one.

        Only those are looked at that have `within` in their names.
        """
        passed = DERIVED if self._quantization is None else DERIVED + READ_PAST
        left = [name for name in self._files if within in name and name not in self._taken and not name.endswith(passed)]
        if left:
            named = ", ".join(left[:TENSORS_NAMED_MAX]) + (", ..." if len(left) > TENSORS_NAMED_MAX else "")
            raise CheckpointError(self._directory, f"{len(left)} tensors are no part of the model in config.json: {named}")

    def _quantised(self, name: str, shape: tuple[int, ...]) -> QuantisedMatrix | None:
        """Return a weight that the checkpoint has quantised."""
        packed = f"{name}_packed"
        dtype = self._dtype(packed if packed in self._files else name)
        if dtype not in (_NVFP4_CODES, _E4M3):
            return None
        if self._quantization is None:
            raise self._error(name, f"is {dtype}, and config.json has no quantization_config")
        rows, columns = shape
        if self._quantization.format is WeightFormat.NVFP4 and dtype == _NVFP4_CODES:
            return self._nvfp4(name, rows, columns)
        if self._quantization.format is WeightFormat.FP8 and dtype == _E4M3:
            return self._fp8(name, rows, columns, self._quantization.block)
        raise self._error(name, f"is {dtype}, and config.json says {self._quantization.format}")

    def _nvfp4(self, name: str, rows: int, columns: int) -> QuantisedMatrix:
        packed = f"{name}_packed" in self._files
        codes = self._stored(f"{name}_packed" if packed else name, (_NVFP4_CODES,))
        self._check_shape(name, codes, (rows, columns // 2))
        scales = self._stored(f"{name}_scale", (_E4M3,)).view(torch.uint8)
        self._check_shape(f"{name}_scale", scales, (rows, columns // GROUP))
        if bool((scales >= _E4M3_NAN).any()):
            raise self._error(f"{name}_scale", "has a value that is negative or no number")
        whole = self._scales(f"{name}_global_scale" if packed else f"{name}_scale_2").reshape(-1)
        self._check_shape(f"{name}'s scale above all", whole, (1,))
        if packed and not bool((whole > 0).all()):
            raise self._error(f"{name}_global_scale", "must be over 0")
        row_scales = (1 / whole if packed else whole).expand(rows, 1).contiguous()
        return QuantisedMatrix(WeightFormat.NVFP4, columns, codes, scales, row_scales, GROUP)

    def _fp8(self, name: str, rows: int, columns: int, block: tuple[int, int] | None) -> QuantisedMatrix:
        codes = self._stored(name, (_E4M3,)).view(torch.uint8)
        self._check_shape(name, codes, (rows, columns))
        if bool(((codes & _E4M3_NAN) == _E4M3_NAN).any()):
            raise self._error(name, "has a value that is no number")
        inverse = f"{name}_scale_inv"
        scales = self._scales(inverse if inverse in self._files else f"{name}_scale")
        ones = torch.ones(rows, 1)
        if block is not None:
            self._check_shape(f"{name}'s scales", scales, (-(-rows // block[0]), -(-columns // block[1])))
            scales = scales.repeat_interleave(block[0], 0)[:rows].contiguous()
            return QuantisedMatrix(WeightFormat.FP8, columns, codes, scales, ones, block[1])
        scales = scales.reshape(-1, 1)
        self._check_shape(f"{name}'s scales", scales, (1 if len(scales) == 1 else rows, 1))
        scales = scales.expand(rows, 1).contiguous()
        return QuantisedMatrix(WeightFormat.FP8, columns, codes, ones, scales, 1 << (columns - 1).bit_length())

    def _floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._stored(name, _FLOATS)
        self._check_shape(name, tensor, shape)
        return tensor.to(torch.float32)

    def _scales(self, name: str) -> Tensor:
        scales = self._stored(name, _FLOATS).float()
        if not bool(torch.isfinite(scales).all() & (scales >= 0).all()):
            raise self._error(name, "has a value that is negative or no number")
        return scales

    def _stored(self, name: str, dtypes: tuple[str, ...]) -> Tensor:
        """Return a tensor as it lies in its file."""
        dtype = self._dtype(name)
        if dtype is None:
            raise CheckpointError(self._directory, f"tensor {name} is missing from its safetensors files")
        if dtype not in dtypes:
            raise self._error(name, f"must be {' or '.join(dtypes)}, is {dtype}")
        self._taken.add(name)
        return self._files[name][1].get_tensor(name)

    def _dtype(self, name: str) -> str | None:
        """Return a tensor's type as safetensors names it; None: it is not there."""
        return self._files[name][1].get_slice(name).get_dtype() if name in self._files else None

    def _check_shape(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise self._error(name, f"must have shape {shape}, has {tuple(tensor.shape)}")

    def _error(self, name: str, problem: str) -> CheckpointError:
        path = self._files[name][0] if name in self._files else self._directory
        return CheckpointError(path, f"tensor {name} {problem}")
