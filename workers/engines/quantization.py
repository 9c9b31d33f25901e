"""What a checkpoint says of its quantised weights: which of the known ways it is, or one line that names the field. No torch.

    who writes it         where it says so                                    weights   their scales
    ModelOpt              hf_quant_config.json, or quantization_config with   NVFP4     weight_scale, weight_scale_2
                          quant_method "modelopt"                             FP8       weight_scale (a tensor's)
    compressed-tensors    quantization_config with quant_method               NVFP4     weight_scale, weight_global_scale
                          "compressed-tensors"                                FP8       weight_scale (tensor, channel, block)
    DeepSeek, Qwen        quantization_config with quant_method "fp8"         FP8       weight_scale_inv (block), weight_scale

Which weights are quantised is told by the tensors that are there (`weights.py`): a list of excluded modules says the same again.
Scales of activations and of KV are no part of it: products take activations as they are, which is more exact.
"""

from dataclasses import dataclass
from pathlib import Path

from orchestrator.core.config import WeightFormat
from orchestrator.profiles.fields import Fields, read_fields

#: Values that share a scale in NVFP4.
_NVFP4_GROUP = 16
#: A block of FP8 has its scale's place found by a shift, and no unit of 16 columns lies in two.
_BLOCK_MIN = 16
_MODELOPT = {"NVFP4": WeightFormat.NVFP4, "FP8": WeightFormat.FP8}
_COMPRESSED = {"nvfp4-pack-quantized": WeightFormat.NVFP4, "float-quantized": WeightFormat.FP8}
_STRATEGIES = ("tensor", "channel", "block")


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a checkpoint's weights are quantised."""

    format: WeightFormat
    #: Rows and columns of FP8 that share a scale, if blocks do.
    block: tuple[int, int] | None = None


def read_quantization(directory: Path, config: Fields) -> Quantization | None:
    """Return how a checkpoint's weights are quantised, None if they are not.

    Raises:
        CheckpointError: naming the field of what is not known.
    """
    if "quantization_config" in config.values:
        found = config.object("quantization_config")
        method = found.text("quant_method", "modelopt" if found.given("quantization") else None)
        match method:
            case "modelopt" | "modelopt_fp4":
                return _modelopt(found.object("quantization") if found.given("quantization") else found)
            case "compressed-tensors":
                return _compressed(found)
            case "fp8":
                return _fp8(found)
            case _:
                raise found.error("quant_method", f"must be modelopt, compressed-tensors or fp8, is {method!r}")
    beside = read_fields(directory / "hf_quant_config.json", needed=False)
    return _modelopt(beside.object("quantization")) if beside.values else None


def _modelopt(found: Fields) -> Quantization:
    name = found.text("quant_algo")
    if name not in _MODELOPT:
        raise found.error("quant_algo", f"must be one of {', '.join(_MODELOPT)}, is {name!r}")
    if name == "NVFP4":
        _check_group(found)
    return Quantization(_MODELOPT[name])


def _compressed(found: Fields) -> Quantization:
    """Return what all groups of compressed-tensors' config say: they differ in which modules they are for."""
    for name in ("transform_config", "sparsity_config"):
        inside = found.object(name)
        if inside.values and inside.values.get("format") != "dense":
            raise found.error(name, "is not supported; must be left out")
    groups = found.object("config_groups")
    ways: dict[Quantization, str] = {}
    for name in groups.values:
        group = groups.object(name)
        written = group.text("format", found.text("format", ""))
        if written not in _COMPRESSED:
            raise group.error("format", f"must be one of {', '.join(_COMPRESSED)}, is {written!r}")
        ways.setdefault(_group(_COMPRESSED[written], group.object("weights")), name)
    if len(ways) != 1:
        problem = f"must all quantise alike, {' and '.join(ways.values())} differ" if ways else "must have a group"
        raise found.error("config_groups", problem)
    return next(iter(ways))


def _group(weight_format: WeightFormat, weights: Fields) -> Quantization:
    kind, bits = weights.text("type", "float"), weights.count("num_bits")
    wanted = 4 if weight_format is WeightFormat.NVFP4 else 8
    if (kind, bits) != ("float", wanted):
        raise weights.error("num_bits", f"must be {wanted} of type float, is {bits} of type {kind}")
    if not weights.flag("symmetric", True):
        raise weights.error("symmetric", "must be true")
    strategy = weights.text("strategy")
    if weight_format is WeightFormat.NVFP4:
        if strategy != "tensor_group":
            raise weights.error("strategy", f"must be tensor_group, is {strategy!r}")
        _check_group(weights)
        return Quantization(weight_format)
    if strategy not in _STRATEGIES:
        raise weights.error("strategy", f"must be one of {', '.join(_STRATEGIES)}, is {strategy!r}")
    return Quantization(weight_format, _block(weights, "block_structure") if strategy == "block" else None)


def _fp8(found: Fields) -> Quantization:
    kind = found.text("fmt", "e4m3")
    if kind != "e4m3":
        raise found.error("fmt", f"must be e4m3, is {kind!r}")
    return Quantization(WeightFormat.FP8, _block(found, "weight_block_size") if found.given("weight_block_size") else None)


def _block(found: Fields, name: str) -> tuple[int, int]:
    sizes = found.entries(name)
    if len(sizes) != 2 or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise found.error(name, f"must be two whole numbers of 1 or more, is {sizes}")
    rows, columns = sizes
    if columns < _BLOCK_MIN or columns & (columns - 1):
        raise found.error(name, f"must have a power of 2 of {_BLOCK_MIN} or more for columns, has {columns}")
    return rows, columns


def _check_group(found: Fields) -> None:
    size = found.count("group_size", _NVFP4_GROUP)
    if size != _NVFP4_GROUP:
        raise found.error("group_size", f"must be {_NVFP4_GROUP}, is {size}")
