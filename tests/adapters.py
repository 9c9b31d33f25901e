"""Makes LoRA adapters as PEFT writes them, and asks PEFT what a model writes with one."""

import json
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file

from tests.oracle import Oracle, oracle

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")


def write_adapter(
    folder: Path, model: Path, seed: int, targets: tuple[str, ...] = ATTENTION + FFN, rank: int = 4, **config: Any
) -> Path:
    """Write an adapter of the products of a checkpoint that end so, large enough to change what is written."""
    folder.mkdir(parents=True)
    ranks = config.get("rank_pattern", {})
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith(targets):
            continue
        own = next((value for key, value in ranks.items() if module.endswith(key)), rank)
        source = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        outputs, inputs = weight.shape
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(own, inputs, generator=source) / inputs**0.5
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, own, generator=source) * 0.7
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    written = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": list(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(written | {"base_model_name_or_path": str(model)} | config))
    return folder


def adapted_oracle(model: Path, adapter: Path) -> Oracle:
    """Load a checkpoint into `transformers` and an adapter of it into PEFT."""

    def adapted(plain: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for what the next one will call otherwise
            return peft.PeftModel.from_pretrained(plain, str(adapter))

    return oracle(model, adapted)


def merge(model: Path, adapter: Path, into: Path) -> Path:
    """Write a checkpoint with an adapter of PEFT's default scale merged into its weights: W + (alpha / r) B A."""
    shutil.copytree(model, into)
    config = json.loads((adapter / "adapter_config.json").read_text())
    added = load_file(adapter / "adapter_model.safetensors")
    tensors = load_file(into / "model.safetensors")
    for name in [name for name in added if ".lora_A." in name]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        change = added[name.replace("lora_A", "lora_B")].double() @ added[name].double()
        weight = tensors[f"{module}.weight"]
        tensors[f"{module}.weight"] = (weight.double() + config["lora_alpha"] / config["r"] * change).to(weight.dtype)
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    return into
