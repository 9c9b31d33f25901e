"""Makes LoRA adapters as PEFT writes them, and asks PEFT what a model writes with one."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
from safetensors.torch import load_file, save_file

from tests.oracle import Oracle, oracle
from workers.engines.peft import create_adapter

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
SHARED_EXPERTS = tuple(f"shared_experts.{name}" for name in FFN)


def write_adapter(
    folder: Path, model: Path, seed: int, targets: tuple[str, ...] = ATTENTION + FFN, rank: int = 4, **config: Any
) -> Path:
    """Write an adapter of all products that can be adapted, unless told otherwise."""
    create_adapter(folder, model, seed, targets, rank, **config)
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
