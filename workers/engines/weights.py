"""Reads a checkpoint's tensors, one file or sharded, each once and only when asked for."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from orchestrator.profiles.fields import CheckpointError
from workers.engines.checkpoint import weight_files

#: Tensors that old checkpoints keep although they follow from config.json.
DERIVED = (".rotary_emb.inv_freq",)
TENSORS_NAMED_MAX = 5


class Weights:
    """The tensors of one checkpoint by name, mapped from disk: `take` copies what it is asked for."""

    def __init__(self, directory: Path) -> None:
        self._files: dict[str, tuple[Path, safe_open]] = {}
        for path in weight_files(directory):
            try:
                file = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(path, f"not a readable safetensors file: {error}") from None
            self._files |= dict.fromkeys(file.keys(), (path, file))
        self._directory = directory
        self._taken: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self._files

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor as float32 on the CPU. Raises `CheckpointError` if it is missing or of another shape."""
        if name not in self._files:
            raise CheckpointError(self._directory, f"tensor {name} is missing from its safetensors files")
        self._taken.add(name)
        path, file = self._files[name]
        tensor = file.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(path, f"tensor {name} must have shape {shape}, has {tuple(tensor.shape)}")
        return tensor.to(torch.float32)

    def leave(self, *names: str) -> None:
        """Note tensors that another process takes."""
        self._taken.update(names)

    def leave_all(self, prefix: str) -> None:
        """Note that all tensors whose names begin so are taken and checked by another process, or by none."""
        self._taken.update(name for name in self._files if name.startswith(prefix))

    def check_all_taken(self, within: str = "") -> None:
        """Raise `CheckpointError` for tensors that nothing asked for: the model that they belong to is another one.

        Only those are looked at that have `within` in their names.
        """
        left = [name for name in self._files if within in name and name not in self._taken and not name.endswith(DERIVED)]
        if left:
            named = ", ".join(left[:TENSORS_NAMED_MAX]) + (", ..." if len(left) > TENSORS_NAMED_MAX else "")
            raise CheckpointError(self._directory, f"{len(left)} tensors are no part of the model in config.json: {named}")
