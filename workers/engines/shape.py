"""What of a checkpoint's config.json the eager engine can do: whatever else it asks for is refused. No torch."""

from pathlib import Path

from orchestrator.profiles.fields import Fields
from orchestrator.profiles.model_config import FULL_ATTENTION, Architecture, architecture_of, read_config
from orchestrator.profiles.positions import KINDS
from workers.engines.checkpoint import FAMILIES

#: Families that normalise queries and keys per head before they are rotated.
NORMED_HEADS = ("qwen3", "qwen3_moe")
_ROUTED = "qwen3_moe"
#: Families whose MLPs may have biases.
_BIASED_MLPS = ("llama",)
_DTYPES = ("float32", "bfloat16", "float16")


def read_architecture(directory: Path) -> Architecture:
    """Return the model in a checkpoint directory. Raises `CheckpointError` naming the file and the field."""
    config = read_config(directory)
    _refuse_other_models(config)
    found = architecture_of(config)
    _refuse_unsupported(config, found)
    return found


def _refuse_other_models(config: Fields) -> None:
    """Raise `CheckpointError` for a config.json of which not even the sizes mean what they mean here."""
    family = config.text("model_type")
    if config.given("text_config"):
        raise config.error("text_config", "multimodal checkpoints are not supported; use one of text alone")
    if family not in FAMILIES:
        raise config.error("model_type", f"must be one of {', '.join(FAMILIES)}, is {family!r}")
    activation = config.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise config.error("hidden_act", f"must be silu, is {activation!r}")
    if config.given("quantization_config"):
        raise config.error("quantization_config", "quantised checkpoints are not supported; use the original weights")
    if config.flag("use_sliding_window", False):
        raise config.error("use_sliding_window", "sliding windows are not supported; must be false")
    kinds = sorted({str(kind) for kind in config.entries("layer_types")})
    if kinds not in ([], [FULL_ATTENTION]):
        raise config.error("layer_types", f"must be {FULL_ATTENTION} throughout, has {', '.join(kinds)}")


def _refuse_unsupported(config: Fields, found: Architecture) -> None:
    """Raise `CheckpointError` for what would make results silently wrong."""
    if found.windowed_layers:
        raise config.error("sliding_window", "sliding windows are not supported; must be null")
    if found.latent is not None:
        raise config.error("kv_lora_rank", f"{found.family} has no latent attention; must be left out")
    if found.head_dim % 2:
        raise config.error("head_dim", f"must be even, is {found.head_dim}")
    if found.rope.kind not in KINDS:
        known = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"
        raise config.error(found.rope.field, f"must be {known}, is {found.rope.kind!r}")
    if found.rope.share != 1.0:
        raise config.error("partial_rotary_factor", f"must be 1.0, is {found.rope.share}")
    if found.mlp_bias and found.family not in _BIASED_MLPS:
        raise config.error("mlp_bias", f"{found.family} has none; must be false")
    if found.dtype not in _DTYPES:
        raise config.error("dtype", f"must be one of {', '.join(_DTYPES)}, is {found.dtype!r}")
    _refuse_experts(config, found)


def _refuse_experts(config: Fields, found: Architecture) -> None:
    """Raise `CheckpointError` for experts where the family has none, or has others."""
    experts = found.experts
    if experts is None and found.family == _ROUTED and not (config.given("num_experts") or config.given("num_local_experts")):
        raise config.error("num_experts", "is missing")
    if experts is not None and found.family != _ROUTED:
        raise config.error("num_experts", f"{found.family} has no experts; must be left out")
    if experts is not None and experts.shared_intermediate:
        name = "n_shared_experts" if config.given("n_shared_experts") else "shared_expert_intermediate_size"
        raise config.error(name, f"{found.family} has no shared experts; must be left out")
