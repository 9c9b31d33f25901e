"""What a checkpoint's config.json means: the sizes and switches of one decoder-only model, checked. No torch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.core.cost.shapes import context_tokens_of
from workers.engines.checkpoint import FAMILIES, CheckpointError, read_json


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """Llama 3's way of stretching: wavelengths over a limit are divided, those between two limits partly."""

    low_frequency_factor: float
    high_frequency_factor: float
    original_context_tokens: int


@dataclass(frozen=True, slots=True)
class YarnRope:
    """YaRN's way (https://arxiv.org/abs/2309.00071): dimensions that turn seldom are divided, those that turn often are not.

    Between `low` and `high`, numbers of pairs of dimensions, both are mixed. `amplitude` multiplies sines and cosines.
    """

    low: float
    high: float
    amplitude: float


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: plain, or stretched by `factor` altogether or in one of two ways."""

    theta: float
    #: 1.0 leaves frequencies as they are.
    factor: float = 1.0
    way: Llama3Rope | YarnRope | None = None


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
class Architecture:
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
    #: The MLPs' products have a bias, and so do attention's.
    mlp_bias: bool
    attention_bias: bool

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


def read_shape(directory: Path) -> Architecture:
    """Return the shape of the model in a checkpoint directory. Raises `CheckpointError` naming the file and the field."""
    config = _Config(directory / "config.json")
    family = config.text("model_type")
    if family not in FAMILIES:
        raise config.error("model_type", f"must be one of {', '.join(FAMILIES)}, is {family!r}")
    _refuse_unsupported(config)
    heads, hidden = config.count("num_attention_heads"), config.count("hidden_size")
    # transformers' own default: 128 for Qwen3, whatever the width; Qwen3-MoE and Llama divide it.
    head_dim = config.count("head_dim", 128 if family == "qwen3" else hidden // heads)
    kv_heads = config.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.error("num_attention_heads", f"must be a multiple of num_key_value_heads ({kv_heads}), is {heads}")
    if head_dim % 2:
        raise config.error("head_dim", f"must be even, is {head_dim}")
    layers = config.count("num_hidden_layers")
    positions = config.count("max_position_embeddings", 2048)
    return Architecture(
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=config.count("intermediate_size"),
        vocabulary=config.count("vocab_size"),
        context_tokens_max=context_tokens_of(positions, config.fields),
        norm_epsilon=config.number("rms_norm_eps", 1e-6),
        tied=config.switch("tie_word_embeddings", False),
        rope=_rope(config, head_dim, positions),
        experts=_experts(config, layers) if family == "qwen3_moe" else None,
        dtype=str(config.fields.get("torch_dtype") or config.fields.get("dtype") or "float32"),
        mlp_bias=family == "llama" and config.switch("mlp_bias", False),
        attention_bias=config.switch("attention_bias", False),
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
        if isinstance(value, float) and value.is_integer():
            value = int(value)
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
    kinds = set(config.fields.get("layer_types") or ())
    if not kinds <= {"full_attention"}:
        raise config.error("layer_types", f"must be full_attention throughout, has {', '.join(sorted(map(str, kinds)))}")
    scaling = config.fields.get("rope_parameters") or config.fields.get("rope_scaling") or {}
    for fields in (config.fields, scaling if isinstance(scaling, dict) else {}):
        if fields.get("partial_rotary_factor", 1.0) not in (None, 1.0):
            raise config.error("partial_rotary_factor", f"must be 1.0, is {fields['partial_rotary_factor']!r}")


def _rope(config: _Config, head_dim: int, positions: int) -> Rope:
    """Read rope_parameters (transformers 5) or rope_theta and rope_scaling (before)."""
    settings = _Settings(config, "rope_parameters" if config.fields.get("rope_parameters") else "rope_scaling")
    theta = settings.number("rope_theta", config.number("rope_theta", 10000.0))
    kind = settings.fields.get("rope_type") or settings.fields.get("type") or "default"
    match kind:
        case "default":
            return Rope(theta)
        case "dynamic":
            # It changes with a sequence's length, but not up to `positions`. Beyond, keys would hang on what came after them and
            # no block could be shared: that is where contexts end.
            settings.number("factor")
            return Rope(theta)
        case "linear":
            return Rope(theta, settings.number("factor"))
        case "llama3":
            low, high = settings.number("low_freq_factor"), settings.number("high_freq_factor")
            original = int(settings.number("original_max_position_embeddings", positions))
            return Rope(theta, settings.number("factor"), Llama3Rope(low, high, original))
        case "yarn":
            return _yarn(settings, theta, head_dim, positions)
        case _:
            raise settings.error("rope_type", f"must be default, linear, dynamic, llama3 or yarn, is {kind!r}")


def _yarn(settings: "_Settings", theta: float, head_dim: int, positions: int) -> Rope:
    """Return YaRN's mixture of dimensions, as `transformers` has it."""
    original = settings.number("original_max_position_embeddings", positions)
    factor = settings.number("factor", positions / original)

    def turning(rotations: float) -> float:
        """The pair of dimensions that turns so many times over the original context."""
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turning(settings.number("beta_fast", 32.0)), turning(settings.number("beta_slow", 1.0))
    if settings.fields.get("truncate", True):
        low, high = float(math.floor(low)), float(math.ceil(high))
    way = YarnRope(max(low, 0.0), min(high, float(head_dim - 1)), _amplitude(settings, factor))
    return Rope(theta, factor, way)


def _amplitude(settings: "_Settings", factor: float) -> float:
    """Return what YaRN multiplies sines and cosines by: stated, or from the factor, since longer contexts need sharper scores."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0

    if settings.fields.get("attention_factor") is not None:
        return settings.number("attention_factor")
    if settings.fields.get("mscale") and settings.fields.get("mscale_all_dim"):
        return scale(settings.number("mscale")) / scale(settings.number("mscale_all_dim"))
    return scale(1.0)


class _Settings:
    """An object within config.json, with checked access."""

    def __init__(self, config: _Config, name: str) -> None:
        found = config.fields.get(name) or {}
        if not isinstance(found, dict):
            raise config.error(name, f"must be an object, is {found!r}")
        self._config, self._name = config, name
        self.fields: dict[str, Any] = found

    def error(self, name: str, problem: str) -> CheckpointError:
        return self._config.error(self._name, f"{name} {problem}")

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number over 0."""
        value = self.fields.get(name)
        value = default if value is None else value
        if value is None:
            raise self.error(name, "is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(name, f"must be a number over 0, is {value!r}")
        return float(value)


def _experts(config: _Config, layers: int) -> Experts:
    dense = set(config.fields.get("mlp_only_layers") or ())
    every = config.count("decoder_sparse_step", 1)
    experts = Experts(
        # transformers 5 writes the other name.
        count=config.count("num_experts", config.fields.get("num_local_experts")),
        per_token=config.count("num_experts_per_tok"),
        intermediate=config.count("moe_intermediate_size"),
        normalised=config.switch("norm_topk_prob", False),
        layers=frozenset(layer for layer in range(layers) if layer not in dense and (layer + 1) % every == 0),
    )
    if experts.per_token > experts.count:
        raise config.error("num_experts_per_tok", f"must be at most num_experts ({experts.count}), is {experts.per_token}")
    return experts
