"""Writes quantised checkpoints the ways that others write them, and beside each the same weights in float32, for the oracle."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from workers.engines import fp8, nvfp4
from workers.engines.checkpoint import create_checkpoint

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Written:
    """One weight: its tensors by their endings, and what they mean in float32."""

    tensors: dict[str, Tensor]
    meant: Tensor


def whole_scale(weight: Tensor) -> Tensor:
    return (weight.abs().max() / (6 * 448)).float()


def modelopt_nvfp4(weight: Tensor) -> Written:
    codes, scales, whole = nvfp4.encode(weight, whole_scale(weight))
    tensors = {"weight": codes, "weight_scale": scales.view(E4M3), "weight_scale_2": whole, "input_scale": torch.tensor(0.5)}
    return Written(tensors, nvfp4.decode(codes, scales, whole))


def compressed_nvfp4(weight: Tensor) -> Written:
    upside_down = (1 / whole_scale(weight)).view(1)
    codes, scales, whole = nvfp4.encode(weight, 1 / upside_down)
    tensors = {"weight_packed": codes, "weight_scale": scales.view(E4M3), "weight_global_scale": upside_down}
    return Written(tensors | {"input_global_scale": torch.tensor([3.0])}, nvfp4.decode(codes, scales, whole))


def scaled_fp8(weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and what they mean with scales of the weight's shape."""
    codes = fp8.to_e4m3(weight / scales).view(E4M3)
    return codes, codes.float() * scales


def block_fp8(weight: Tensor, block: int = 128) -> Written:
    """DeepSeek's way: a scale for a square block, those at the edges smaller."""
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // block) * block, -(-columns // block) * block)
    padded[:rows, :columns] = weight
    scales = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block)).abs().amax((1, 3)) / 448
    codes, meant = scaled_fp8(weight, scales.repeat_interleave(block, 0).repeat_interleave(block, 1)[:rows, :columns])
    return Written({"weight": codes, "weight_scale_inv": scales}, meant)


def channel_fp8(weight: Tensor) -> Written:
    scales = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    codes, meant = scaled_fp8(weight, scales.float())
    return Written({"weight": codes, "weight_scale": scales}, meant)


def tensor_fp8(weight: Tensor) -> Written:
    scale = weight.abs().max() / 448
    codes, meant = scaled_fp8(weight, scale)
    return Written(
        {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.1), "k_scale": torch.tensor(1.0)}, meant
    )


def compressed(written: str, weights: dict[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "float", "symmetric": True, "dynamic": False, **weights}}
    return {"quant_method": "compressed-tensors", "format": written, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


MODELOPT = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head", "*.gate"]}
NVFP4_GROUPS = {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}
#: How weights are written, and what config.json says of it: its quantization_config, or None with ModelOpt's file beside it.
WAYS: dict[str, tuple[Callable[[Tensor], Written], dict[str, Any] | None]] = {
    "modelopt-nvfp4": (modelopt_nvfp4, {"quant_method": "modelopt", **MODELOPT}),
    "modelopt-nvfp4-beside": (modelopt_nvfp4, None),
    "compressed-nvfp4": (compressed_nvfp4, compressed("nvfp4-pack-quantized", NVFP4_GROUPS)),
    "deepseek-fp8": (
        block_fp8,
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    ),
    "compressed-fp8": (channel_fp8, compressed("float-quantized", {"num_bits": 8, "strategy": "channel"})),
    "modelopt-fp8": (tensor_fp8, {"quant_method": "modelopt", "quant_algo": "FP8"}),
}


def write_quantised(directory: Path, way: str, family: str, **overrides: Any) -> tuple[Path, Path]:
    """Write a random checkpoint with quantised linear layers, and one of what they mean; return both folders."""
    write, config = WAYS[way]
    meant, quantised = directory / "meant", directory / "quantised"
    for folder in (meant, quantised):
        create_checkpoint(folder, family, 7, **overrides)
    plain = load_file(meant / "model.safetensors")
    tensors = dict(plain)
    for name, weight in plain.items():
        if "_proj" in name and name.endswith(".weight"):
            written = write(weight.float())
            del tensors[name]
            tensors |= {name.removesuffix("weight") + ending: one.contiguous() for ending, one in written.tensors.items()}
            plain[name] = written.meant
    save_file(plain, meant / "model.safetensors", metadata={"format": "pt"})
    save_file(tensors, quantised / "model.safetensors", metadata={"format": "pt"})
    if config is None:
        beside = {"producer": {"name": "modelopt"}, "quantization": MODELOPT}
        (quantised / "hf_quant_config.json").write_text(json.dumps(beside))
    else:
        path = quantised / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return quantised, meant
