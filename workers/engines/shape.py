"""What of a checkpoint's config.json the eager engine can do: whatever else it asks for is refused. No torch."""

from pathlib import Path

from orchestrator.profiles.fields import Fields
from orchestrator.profiles.model_config import FULL_ATTENTION, Architecture, architecture_of, read_config
from orchestrator.profiles.positions import KINDS
from workers.engines.checkpoint import FAMILIES
from workers.engines.quantization import read_quantization

#: Families that normalise queries and keys per head before they are rotated.
NORMED_HEADS = ("qwen3", "qwen3_moe")
#: Families that have experts, and what they call their number; those that have experts that every token visits.
_ROUTED = {"qwen3_moe": "num_experts", "deepseek_v3": "n_routed_experts"}
_SHARED = ("deepseek_v3",)
#: Families whose attention is latent.
_LATENT = ("deepseek_v3",)
#: How the experts of `_LATENT` are chosen: the only ways that are known of them.
_ROUTING = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
#: Families whose MLPs may have biases.
_BIASED_MLPS = ("llama",)
_DTYPES = ("float32", "bfloat16", "float16")


def read_architecture(directory: Path) -> Architecture:
    """Return the model in a checkpoint directory. Raises `CheckpointError` naming the file and the field."""
    config = read_config(directory)
    _refuse_other_models(config)
    found = architecture_of(config)
    _refuse_unsupported(config, found)
    read_quantization(directory, config)
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
    if config.flag("use_sliding_window", False):
        raise config.error("use_sliding_window", "sliding windows are not supported; must be false")
    kinds = sorted({str(kind) for kind in config.entries("layer_types")})
    if kinds not in ([], [FULL_ATTENTION]):
        raise config.error("layer_types", f"must be {FULL_ATTENTION} throughout, has {', '.join(kinds)}")


def _refuse_unsupported(config: Fields, found: Architecture) -> None:
    """Raise `CheckpointError` for what would make results silently wrong."""
    if found.windowed_layers:
        raise config.error("sliding_window", "sliding windows are not supported; must be null")
    if found.family in _LATENT:
        _refuse_latent(config, found)
    elif found.latent is not None:
        raise config.error("kv_lora_rank", f"{found.family} has no latent attention; must be left out")
    elif found.head_dim % 2:
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


def _refuse_latent(config: Fields, found: Architecture) -> None:
    """Raise `CheckpointError` for latent attention that is none, or whose widths contradict each other."""
    if found.latent is None:
        raise config.error("kv_lora_rank", "is missing")
    if found.latent.rope_dim % 2:
        raise config.error("qk_rope_head_dim", f"must be even, is {found.latent.rope_dim}")
    if found.kv_heads != found.heads:
        problem = f"must be num_attention_heads ({found.heads}), whose latents are the same, is {found.kv_heads}"
        raise config.error("num_key_value_heads", problem)
    if config.given("head_dim") and found.head_dim != found.latent.rope_dim:
        raise config.error("head_dim", f"must be qk_rope_head_dim ({found.latent.rope_dim}), is {found.head_dim}")
    for name, way in _ROUTING.items():
        if config.text(name, way) != way:
            raise config.error(name, f"must be {way}, is {config.values[name]!r}")


def _refuse_experts(config: Fields, found: Architecture) -> None:
    """Raise `CheckpointError` for experts where the family has none, or has others."""
    experts, name = found.experts, _ROUTED.get(found.family)
    if experts is None and name is not None and not (config.given(name) or config.given("num_local_experts")):
        raise config.error(name, "is missing")
    if experts is not None and name is None:
        raise config.error("num_experts", f"{found.family} has no experts; must be left out")
    if experts is not None and experts.shared_intermediate and found.family not in _SHARED:
        name = "n_shared_experts" if config.given("n_shared_experts") else "shared_expert_intermediate_size"
        raise config.error(name, f"{found.family} has no shared experts; must be left out")
