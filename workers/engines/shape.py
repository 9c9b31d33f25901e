"""What a checkpoint's config.json means: the sizes and switches of one decoder-only model, checked. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.engines.checkpoint import FAMILIES, CheckpointError, read_json


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: plain, or stretched as Llama 3 does (wavelengths over a limit are divided by `factor`)."""

    theta: float
    #: 1.0 leaves frequencies as they are.
    factor: float = 1.0
    #: Only set for the llama3 kind; `factor` then applies to low frequencies only.
    low_frequency_factor: float | None = None
    high_frequency_factor: float | None = None
    original_context_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture-of-experts part of a model."""

    count: int
    per_token: int
    intermediate: int
    #: Weights of a token's experts are scaled to sum to 1.
    normalised: bool
    #: Layers that have experts; the others have an ordinary MLP.
    layers: frozenset[int]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """One model's sizes."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    context_tokens_max: int
    norm_epsilon: float
    #: Output weights are the embedding's.
    tied: bool
    rope: Rope
    experts: Experts | None
    #: The checkpoint's own dtype: float32, bfloat16 or float16.
    dtype: str
    #: From generation_config.json and config.json together.
    eos_token_ids: tuple[int, ...]

    @property
    def queries_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def normed_heads(self) -> bool:
        """True when queries and keys are normalised per head before they are rotated."""
        return self.family != "llama"


def read_shape(directory: Path) -> ModelShape:
    """Return the shape of the model in a checkpoint directory. Raises `CheckpointError` naming the file and the field."""
    config = _Config(directory / "config.json")
    family = config.text("model_type")
    if family not in FAMILIES:
        raise config.error("model_type", f"must be one of {', '.join(FAMILIES)}, is {family!r}")
    _refuse_unsupported(config)
    heads, hidden = config.count("num_attention_heads"), config.count("hidden_size")
    head_dim = config.count("head_dim", hidden // heads)
    kv_heads = config.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.error("num_attention_heads", f"must be a multiple of num_key_value_heads ({kv_heads}), is {heads}")
    if head_dim % 2:
        raise config.error("head_dim", f"must be even, is {head_dim}")
    layers = config.count("num_hidden_layers")
    context_tokens_max = config.count("max_position_embeddings", 2048)
    return ModelShape(
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=config.count("intermediate_size"),
        vocabulary=config.count("vocab_size"),
        context_tokens_max=context_tokens_max,
        norm_epsilon=config.number("rms_norm_eps", 1e-6),
        tied=config.switch("tie_word_embeddings", False),
        rope=_rope(config, context_tokens_max),
        experts=_experts(config, layers) if family == "qwen3_moe" else None,
        dtype=str(config.fields.get("torch_dtype") or config.fields.get("dtype") or "float32"),
        eos_token_ids=eos_token_ids(directory),
    )


class _Config:
    """config.json with checked access."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fields = read_json(path)

    def error(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(self.path, f"{name}: {problem}")

    def _value(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        value = default if value is None else value
        if value is None:
            raise self.error(name, "is missing")
        return value

    def text(self, name: str) -> str:
        return str(self._value(name, None))

    def switch(self, name: str, default: bool) -> bool:
        return bool(self._value(name, default))

    def number(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, f"must be a number, is {value!r}")
        return float(value)

    def count(self, name: str, default: int | None = None) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(name, f"must be a whole number of 1 or more, is {value!r}")
        return value


def _refuse_unsupported(config: _Config) -> None:
    """Raise `CheckpointError` for switches that would make results silently wrong."""
    activation = config.fields.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise config.error("hidden_act", f"must be silu, is {activation!r}")
    if config.fields.get("quantization_config"):
        raise config.error("quantization_config", "quantised checkpoints are not supported; use the original weights")
    if config.fields.get("use_sliding_window"):
        raise config.error("use_sliding_window", "sliding windows are not supported; must be false")
    if config.fields.get("partial_rotary_factor", 1.0) not in (None, 1.0, 1):
        raise config.error("partial_rotary_factor", f"must be 1.0, is {config.fields['partial_rotary_factor']!r}")


def _rope(config: _Config, context_tokens_max: int) -> Rope:
    """Read rope_parameters (transformers 5) or rope_theta and rope_scaling (before)."""
    settings = config.fields.get("rope_parameters") or config.fields.get("rope_scaling") or {}
    if not isinstance(settings, dict):
        raise config.error("rope_scaling", f"must be an object, is {settings!r}")
    theta = float(settings.get("rope_theta") or config.fields.get("rope_theta") or 10000.0)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "default":
        return Rope(theta)
    if kind not in ("linear", "llama3"):
        raise config.error("rope_scaling", f"rope_type must be default, linear or llama3, is {kind!r}")
    try:
        factor = float(settings["factor"])
        if kind == "linear":
            return Rope(theta, factor)
        low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
    except KeyError as missing:
        raise config.error("rope_scaling", f"{missing.args[0]} is missing") from None
    original = int(settings.get("original_max_position_embeddings") or context_tokens_max)
    return Rope(theta, factor, low, high, original)


def _experts(config: _Config, layers: int) -> Experts:
    dense = set(config.fields.get("mlp_only_layers") or ())
    every = config.count("decoder_sparse_step", 1)
    experts = Experts(
        count=config.count("num_experts"),
        per_token=config.count("num_experts_per_tok"),
        intermediate=config.count("moe_intermediate_size"),
        normalised=config.switch("norm_topk_prob", False),
        layers=frozenset(layer for layer in range(layers) if layer not in dense and (layer + 1) % every == 0),
    )
    if experts.per_token > experts.count:
        raise config.error("num_experts_per_tok", f"must be at most num_experts ({experts.count}), is {experts.per_token}")
    return experts


def eos_token_ids(directory: Path) -> tuple[int, ...]:
    """Return all end-of-sequence ids of a checkpoint: generation_config.json's, if it has one, and config.json's."""
    generation = directory / "generation_config.json"
    sources = [read_json(generation)] if generation.exists() else []
    found: dict[int, None] = {}
    for source in (*sources, read_json(directory / "config.json")):
        value = source.get("eos_token_id")
        found |= dict.fromkeys([value] if isinstance(value, int) else value or ())
    return tuple(found)
