"""Reads a Hugging Face config.json (or the built-in shapes, which use its field names) into a `ModelShape`."""

from collections.abc import Mapping
from typing import Any, cast

from orchestrator.core.config import shown
from orchestrator.core.cost.shapes import Latent, ModelShape, context_tokens_of


class ShapeError(ValueError):
    """A model's configuration lacks a field or describes something that the cost model does not know; one line."""


#: Kinds of layers whose cost is known, as `layer_types` names them.
_WINDOWED = "sliding_attention"
_LAYER_KINDS = ("full_attention", _WINDOWED)
#: Every so many layers one sees all of the context, where neither `layer_types` nor `sliding_window_pattern` says it: the
#: defaults of https://github.com/huggingface/transformers (src/transformers/models, configuration_*.py).
_PATTERNS: Mapping[str, int] = {"gpt_oss": 2, "gemma2": 2, "gemma3_text": 6, "cohere2": 4}
#: Fields of models whose layers differ in ways that are not known here, and what they stand for.
_UNKNOWN: Mapping[str, str] = {
    "index_topk": "attention to chosen tokens only",
    "full_attention_interval": "linear attention between layers of full attention",
    "linear_attn_config": "linear attention between layers of full attention",
    "attention_chunk_size": "attention within chunks",
    "interleave_moe_layer_step": "dense FFNs of another width between layers of experts",
    "intermediate_size_mlp": "dense FFNs of another width between layers of experts",
    "compress_ratios": "compressed attention",
    "hybrid_override_pattern": "state-space layers",
}
#: More than anything in a model, and more layers than any has: beyond them a number is a mistake.
_COUNT_MAX = 1 << 32
_LAYERS_MAX = 1 << 12
#: The same count under the names that model families gave it.
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")


class _Fields:
    """Typed reading of one configuration; every problem is a `ShapeError` naming the field."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    @property
    def all(self) -> Mapping[str, Any]:
        return self._values

    def has(self, name: str) -> bool:
        """Tell whether a field is there and means something."""
        return bool(self._values.get(name))

    def count(self, name: str, default: int | None = None, most: int = _COUNT_MAX) -> int:
        """Return a whole number from 0 to `most`; `default` stands for a missing or null field; without it that is an error."""
        value = self._values.get(name)
        if value is None:
            if default is None:
                raise ShapeError(f"{name}: is missing")
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ShapeError(f"{name}: must be a whole number of 0 or more, is {shown(value)}")
        if value > most:
            raise ShapeError(f"{name}: must be at most {most}, is {shown(value)}")
        return value

    def positive(self, name: str, default: int | None = None, most: int = _COUNT_MAX) -> int:
        """Return a whole number from 1 to `most`."""
        value = self.count(name, default, most)
        if value < 1:
            raise ShapeError(f"{name}: must be 1 or more, is {value}")
        return value

    def first(self, names: tuple[str, ...]) -> int:
        """Return the first of the fields that is there, or 0."""
        return next((self.count(name) for name in names if self._values.get(name) is not None), 0)

    def text(self, name: str) -> str:
        """Return a text; a missing or null field is an empty one."""
        value = self._values.get(name) or ""
        if not isinstance(value, str):
            raise ShapeError(f"{name}: must be a text, is {shown(value)}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Return a truth value."""
        value = self._values.get(name, default)
        if not isinstance(value, bool):
            raise ShapeError(f"{name}: must be true or false, is {shown(value)}")
        return value

    def entries(self, name: str) -> list[Any]:
        """Return a list; a missing or null field is an empty one."""
        value: object = self._values.get(name) or []
        if not isinstance(value, list):
            raise ShapeError(f"{name}: must be a list, is {shown(value)}")
        return cast(list[Any], value)


def shape_of(name: str, config: Mapping[str, Any]) -> ModelShape:
    """Return the shape a configuration describes; multimodal ones by their `text_config`. Raises `ShapeError`."""
    text = config.get("text_config")
    values = _Fields(cast(Mapping[str, Any], text) if isinstance(text, Mapping) else config)
    _refuse_unknown(values)
    layers, hidden, heads = (
        values.positive("num_hidden_layers", most=_LAYERS_MAX),
        values.positive("hidden_size"),
        values.positive("num_attention_heads"),
    )
    windowed, window = _windows(values, layers)
    experts = values.first(_EXPERTS)
    dense = _dense_layers(values, layers) if experts else layers
    expert_width = values.positive("moe_intermediate_size", values.count("intermediate_size", 0)) if experts else 0
    shared = values.count("n_shared_experts", 0) * expert_width + values.count("shared_expert_intermediate_size", 0)
    per_token = values.positive("num_experts_per_tok") if experts else 0
    if per_token > experts:
        raise ShapeError(f"num_experts_per_tok: must be at most the number of experts ({experts}), is {per_token}")
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        vocab=values.positive("vocab_size"),
        heads=heads,
        kv_heads=values.positive("num_key_value_heads", heads),
        head_dim=values.positive("head_dim", hidden // heads),
        context_tokens_max=context_tokens_of(values.positive("max_position_embeddings"), values.all),
        latent=_latent(values),
        windowed_layers=windowed,
        window_tokens=window,
        dense_layers=dense,
        dense_intermediate=values.positive("intermediate_size") if dense else 0,
        experts=experts,
        experts_per_token=per_token,
        expert_intermediate=expert_width,
        shared_intermediate=shared if experts else 0,
        tied_embeddings=values.flag("tie_word_embeddings", False),
    )


def _refuse_unknown(values: _Fields) -> None:
    """Raise `ShapeError` for a model that would be counted wrongly."""
    for field, meaning in _UNKNOWN.items():
        if values.has(field):
            raise ShapeError(f"{field}: the cost of {meaning} is not known")


def _latent(values: _Fields) -> Latent | None:
    """Return the widths of latent attention, which a model with `kv_lora_rank` has."""
    rank = values.count("kv_lora_rank", 0)
    if not rank:
        return None
    return Latent(
        query_rank=values.count("q_lora_rank", 0),
        kv_rank=rank,
        nope_dim=values.positive("qk_nope_head_dim"),
        rope_dim=values.positive("qk_rope_head_dim"),
        value_dim=values.positive("v_head_dim"),
    )


def _windows(values: _Fields, layers: int) -> tuple[int, int]:
    """Return how many layers see a window only, and its tokens."""
    window = values.count("sliding_window", 0)
    kinds = values.entries("layer_types")
    if kinds:
        unknown = [kind for kind in kinds if kind not in _LAYER_KINDS]
        if unknown:
            raise ShapeError(f"layer_types: the cost of {shown(unknown[0])} is not known; known: {', '.join(_LAYER_KINDS)}")
        if len(kinds) != layers:
            raise ShapeError(f"layer_types: must have an entry a layer ({layers}), has {len(kinds)}")
        windowed = kinds.count(_WINDOWED)
        return (windowed, values.positive("sliding_window")) if windowed else (0, 0)
    if not window or not values.flag("use_sliding_window", True):
        return 0, 0
    pattern = values.count("sliding_window_pattern", _PATTERNS.get(values.text("model_type"), 0))
    if pattern:
        return layers - layers // pattern, window
    return max(0, layers - values.count("max_window_layers", 0)), window


def _dense_layers(values: _Fields, layers: int) -> int:
    """Return how many layers of a model with experts have a dense FFN instead."""
    first, every = values.count("first_k_dense_replace", 0), values.positive("decoder_sparse_step", 1)
    named = values.entries("mlp_only_layers")
    wrong = [layer for layer in named if not isinstance(layer, int)]
    if wrong:
        raise ShapeError(f"mlp_only_layers: must be whole numbers, has {shown(wrong[0])}")
    named = set(named)
    return sum(1 for layer in range(layers) if layer < first or layer in named or (layer + 1) % every)
