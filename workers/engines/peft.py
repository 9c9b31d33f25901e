"""Reads what a LoRA adapter's directory says of itself, as PEFT writes it, names its contents, and writes small random ones.

Whatever could make an adapter another function than  y = x W^T + scale (x A^T) B^T  is refused: fields of adapter_config.json
that are not known here must be off. No torch in here: gateways use it too. See also `adapters.py`, which computes.
"""

import hashlib
import json
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from orchestrator.core.config import shown
from orchestrator.profiles.fields import CheckpointError, Fields, read_fields

Number = TypeVar("Number", int, float)

#: What is before and behind a product's name in those of its A and B.
BEFORE, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: Fields that say how an adapter was trained, where it came from, or which products it changes, as its tensors do.
_HARMLESS = (
    *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "inference_mode"),
    *("layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "megatron_core", "peft_version"),
    *("qalora_group_size", "revision", "runtime_config", "target_modules", "task_type"),
)
#: Fields that are read here.
_READ = (
    *("alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern"),
    "use_rslora",
)
#: How A and B may have been drawn; PEFT's other ways change the base model's weights as well.
_DRAWN = (True, False, "gaussian", "orthogonal", "eva")
#: Bytes that are hashed at a time.
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class AdapterDescription:
    """What an adapter's configuration says of every product that it changes."""

    path: Path
    rank: int
    alpha: float
    #: By regular expressions for the ends of products' names, before `rank` and `alpha`; the first that fits counts.
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    #: The scale is alpha by the rank's square root, not by the rank.
    stabilised: bool

    def rank_of(self, module: str) -> int:
        return _fitting(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        return _fitting(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.stabilised else rank)


def _fitting(patterns: Mapping[str, Number], module: str, default: Number) -> Number:
    """Return what is said of a module: PEFT's own rule."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_adapter(directory: Path) -> AdapterDescription:
    """Return what an adapter's directory says of itself. Raises `CheckpointError` for what is missing, wrong or not served."""
    fields = read_fields(directory / CONFIG)
    if (kind := fields.text("peft_type")) != "LORA":
        raise fields.error("peft_type", f"must be LORA, is {shown(kind)}")
    for name, value in fields.values.items():
        if name not in _HARMLESS and name not in _READ and value not in (None, False, [], {}, ""):
            raise fields.error(name, f"is {shown(value)}, which is not served: it may change what is computed; it must be off")
    if (bias := fields.text("bias", "none")) != "none":
        raise fields.error("bias", f"must be none, is {shown(bias)}: biases are not adapted")
    if fields.flag("fan_in_fan_out", False):
        raise fields.error("fan_in_fan_out", "must be false: weights are [out, in] here")
    if (drawn := fields.values.get("init_lora_weights", True)) not in _DRAWN:
        problem = f"is {shown(drawn)}, which changes the base model as well; convert the adapter to a plain one when saving it"
        raise fields.error("init_lora_weights", problem)
    return AdapterDescription(
        directory,
        fields.count("r"),
        fields.number("lora_alpha"),
        {key: fields.object("rank_pattern").count(key) for key in _patterns(fields, "rank_pattern")},
        {key: fields.object("alpha_pattern").number(key) for key in _patterns(fields, "alpha_pattern")},
        fields.flag("use_rslora", False),
    )


def _patterns(fields: Fields, name: str) -> Mapping[str, Any]:
    """Return a field's patterns, all of which are regular expressions."""
    patterns = fields.object(name)
    for key in patterns.values:
        try:
            re.compile(key)
        except re.error as error:
            raise patterns.error(key, f"is no regular expression: {error}") from None
    return patterns.values


def create_adapter(directory: Path, model: Path, seed: int, targets: tuple[str, ...], rank: int, **config: Any) -> None:
    """Write a random adapter of the products of a checkpoint that end so, large enough to change what is written.

    Args:
        directory: made; it must not be there.
        model: a checkpoint in one file.
        seed: of A and B.
        targets: ends of products' names, such as q_proj.
        rank: of all products but those that a `rank_pattern` in `config` names.
        config: further fields of adapter_config.json.
    """
    directory.mkdir(parents=True)
    written = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": list(targets)}
    (directory / CONFIG).write_text(json.dumps(written | {"base_model_name_or_path": str(model)} | config))
    described = read_adapter(directory)
    tensors: dict[str, NDArray[np.float32]] = {}
    with safe_open(model / "model.safetensors", framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118
            module = name.removesuffix(".weight")
            if module.endswith(targets):
                source = np.random.default_rng([seed, zlib.crc32(name.encode())])
                outputs, inputs = file.get_slice(name).get_shape()
                own = described.rank_of(module)
                down = source.standard_normal((own, inputs), dtype=np.float32) / np.float32(inputs**0.5)
                up = source.standard_normal((outputs, own), dtype=np.float32) * np.float32(0.7)
                tensors |= {f"{BEFORE}{module}{DOWN}": down, f"{BEFORE}{module}{UP}": up}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def adapter_fingerprint(model: str, directory: Path) -> str:
    """Return 32 hex digits that name a model with an adapter: the same for every copy of both, and for nothing else.

    Hashed are the model's fingerprint, adapter_config.json, and all of the weights. Raises `CheckpointError`.
    """
    digest = hashlib.blake2b(model.encode(), digest_size=16)
    digest.update(json.dumps(read_fields(directory / CONFIG).values, sort_keys=True).encode())
    path = directory / WEIGHTS
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError as error:
        raise CheckpointError(path, error.strerror or str(error)) from None
    return digest.hexdigest()
