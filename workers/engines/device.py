"""Which device and which number format an engine computes on and in."""

import torch

from orchestrator.core.config import ConfigError
from orchestrator.profiles.model_config import Architecture
from workers.engines.stored import pool_dtype


def dtype_of(name: str, shape: Architecture) -> torch.dtype:
    """Return the dtype of `engine.dtype`: auto is the checkpoint's."""
    return getattr(torch, pool_dtype(name, shape))


def device_of(name: str) -> torch.device:
    """Return the device of `engine.device`: auto is the first GPU, if any. Raises `ConfigError` for one that is not there."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError("engine.device", f"must be auto, cpu, cuda or cuda:N, is {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError("engine.device", f"is {name}, but this machine has {torch.cuda.device_count()} CUDA devices")
    return device
