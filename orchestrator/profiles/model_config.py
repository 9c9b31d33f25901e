"""What a model's config.json means: the one description that catalog, planner, gateways and engines go by.

Rule for editors: what a config.json asks for is in the description or refused with its field's name, never left out. What an
engine cannot do although it is described is for the engine to refuse. See also: `fields.py` (checked access), `positions.py`
(rotary embedding, length of contexts).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.core.config import shown
from orchestrator.core.cost.shapes import Latent, ModelShape
from orchestrator.profiles.fields import Fields, read_fields
from orchestrator.profiles.positions import Rope, context_tokens_of, rope_of

#: Kinds of layers that are known, as `layer_types` names them.
FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"
_LAYER_KINDS = (FULL_ATTENTION, SLIDING_ATTENTION)
#: What a missing field stands for, by `model_type`, where that is not the same for all. `sliding_window_pattern`: every so many
#: layers one sees all of the context. All are the defaults of https://github.com/huggingface/transformers 5
#: (src/transformers/models, configuration_*.py), and tests hold them against it.
FAMILY_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "qwen2": {"max_position_embeddings": 32768, "use_sliding_window": False, "max_window_layers": 28},
    "qwen2_moe": {"max_position_embeddings": 32768, "use_sliding_window": False, "max_window_layers": 28},
    "qwen3": {"max_position_embeddings": 32768, "head_dim": 128, "use_sliding_window": False, "max_window_layers": 28},
    "qwen3_moe": {"max_position_embeddings": 32768, "use_sliding_window": False},
    "gpt_oss": {"max_position_embeddings": 131072, "head_dim": 64, "sliding_window_pattern": 2},
    "gemma2": {"max_position_embeddings": 8192, "head_dim": 256, "sliding_window_pattern": 2, "tie_word_embeddings": True},
    "gemma3_text": {"max_position_embeddings": 131072, "head_dim": 256, "sliding_window_pattern": 6, "tie_word_embeddings": True},
    "deepseek_v3": {
        "max_position_embeddings": 4096,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "rope_interleave": True,
    },
    "cohere2": {"max_position_embeddings": 8192, "sliding_window_pattern": 4, "tie_word_embeddings": True},
}
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
#: More layers than any model has.
_LAYERS_MAX = 1 << 12
#: The same count under the names that model families gave it. Those that used the last give experts the FFNs' width.
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")


#: Families that choose experts as `GroupedRouting` says.
_GROUPED = ("deepseek_v3",)
#: Experts whose scores together say how good a group of them is.
GROUP_BEST = 2


@dataclass(frozen=True, slots=True)
class GroupedRouting:
    """DeepSeek-V3's way of choosing a token's experts (arXiv 2412.19437, 2.1.2): by sigmoids of scores, in the best groups.

    A learnt bias takes part in choosing and not in weights. The groups whose two best experts have the highest sum stay.
    """

    groups: int
    groups_per_token: int
    #: Multiplies the weights of a token's experts.
    scale: float


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture-of-experts part of a model."""

    count: int
    per_token: int
    #: Width of one routed expert, and of the experts that every token visits, together.
    intermediate: int
    shared_intermediate: int
    #: Weights of a token's experts are scaled to sum to 1.
    normalised: bool
    #: Layers that have experts; the others have a dense FFN.
    layers: frozenset[int]
    #: None: a token's experts are those with the highest scores, their weights a softmax over all scores.
    grouped: GroupedRouting | None = None


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder-only transformer with gated FFNs, as its config.json describes it."""

    #: `model_type`; empty if there is none.
    family: str
    layers: int
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    #: Width of the dense FFNs; 0 if there are none.
    intermediate: int
    context_tokens_max: int
    norm_epsilon: float
    #: Output weights are the embedding's.
    tied: bool
    #: The checkpoint's own dtype, as torch calls it.
    dtype: str
    #: The FFNs' products have a bias, and so do attention's.
    mlp_bias: bool
    attention_bias: bool
    rope: Rope
    latent: Latent | None = None
    #: Dimensions that turn together lie side by side in the checkpoint; otherwise half a head apart.
    interleaved: bool = False
    #: Layers behind the others that guess further tokens ahead: in the checkpoint, and no part of what it answers.
    guessing_layers: int = 0
    experts: Experts | None = None
    #: Layers that attend to the last `window_tokens` tokens only.
    windowed_layers: int = 0
    window_tokens: int = 0

    @property
    def dense_layers(self) -> int:
        """Layers with one dense FFN; all others route to experts."""
        return self.layers - (len(self.experts.layers) if self.experts is not None else 0)

    @property
    def rotated_dim(self) -> int:
        """Dimensions of a head that turn with its position."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    @property
    def queries_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * (self.head_dim if self.latent is None else self.latent.nope_dim + self.latent.rope_dim)

    @property
    def keys_width(self) -> int:
        """Width of all key heads together, which is that of the values too, where attention is not latent."""
        return self.kv_heads * self.head_dim

    @property
    def attended_width(self) -> int:
        """Width of what all heads bring together."""
        return self.queries_width if self.latent is None else self.heads * self.latent.value_dim

    @property
    def score_scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        sharpness = 1.0 if self.latent is None else self.rope.latent_sharpness
        return sharpness * (self.queries_width // self.heads) ** -0.5

    def shape(self, name: str) -> ModelShape:
        """Return what time and memory depend on."""
        experts = self.experts
        return ModelShape(
            name=name,
            layers=self.layers,
            hidden=self.hidden,
            vocab=self.vocabulary,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            context_tokens_max=self.context_tokens_max,
            latent=self.latent,
            windowed_layers=self.windowed_layers,
            window_tokens=self.window_tokens,
            dense_layers=self.dense_layers,
            dense_intermediate=self.intermediate,
            experts=experts.count if experts is not None else 0,
            experts_per_token=experts.per_token if experts is not None else 0,
            expert_intermediate=experts.intermediate if experts is not None else 0,
            shared_intermediate=experts.shared_intermediate if experts is not None else 0,
            tied_embeddings=self.tied,
        )


def read_config(folder: Path) -> Fields:
    """Return the fields of a checkpoint folder's config.json; see `model_fields`. Raises `CheckpointError`."""
    return model_fields(read_fields(folder / "config.json"))


def model_fields(config: Fields) -> Fields:
    """Return what a config.json says of the language model: of a multimodal one its `text_config`, before what is beside it.

    Fields that the file leaves out have their family's defaults.
    """
    given = {name: value for name, value in config.values.items() if value is not None}
    given |= {name: value for name, value in config.object("text_config").values.items() if value is not None}
    family = Fields(config.path, given).text("model_type", "")
    return Fields(config.path, {**FAMILY_DEFAULTS.get(family, {}), **given})


def architecture_of(config: Fields) -> Architecture:
    """Return the model that some `model_fields` describe. Raises `CheckpointError` naming the field."""
    _refuse_unknown(config)
    layers, hidden = config.count("num_hidden_layers", most=_LAYERS_MAX), config.count("hidden_size")
    heads = config.count("num_attention_heads")
    kv_heads = config.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.error("num_attention_heads", f"must be a multiple of num_key_value_heads ({kv_heads}), is {heads}")
    windowed, window = _windows(config, layers)
    experts = _experts(config, layers)
    all_routed = experts is not None and len(experts.layers) == layers
    return Architecture(
        family=config.text("model_type", ""),
        layers=layers,
        hidden=hidden,
        vocabulary=config.count("vocab_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=config.count("head_dim", hidden // heads),
        intermediate=0 if all_routed else config.count("intermediate_size"),
        context_tokens_max=context_tokens_of(config),
        norm_epsilon=config.number("rms_norm_eps", 1e-6),
        tied=config.flag("tie_word_embeddings", False),
        dtype=config.text("dtype", config.text("torch_dtype", "float32")),
        mlp_bias=config.flag("mlp_bias", False),
        attention_bias=config.flag("attention_bias", False),
        rope=rope_of(config),
        latent=_latent(config),
        interleaved=config.flag("rope_interleave", False),
        guessing_layers=config.count("num_nextn_predict_layers", 0, least=0),
        experts=experts,
        windowed_layers=windowed,
        window_tokens=window,
    )


def _refuse_unknown(config: Fields) -> None:
    """Raise `CheckpointError` for a model that would be computed or counted wrongly."""
    for field, meaning in _UNKNOWN.items():
        if config.values.get(field):
            raise config.error(field, f"{meaning} is not known here; it must be left out")


def _latent(config: Fields) -> Latent | None:
    """Return the widths of latent attention, which a model with `kv_lora_rank` has."""
    rank = config.count("kv_lora_rank", 0, least=0)
    if not rank:
        return None
    return Latent(
        query_rank=config.count("q_lora_rank", 0, least=0),
        kv_rank=rank,
        nope_dim=config.count("qk_nope_head_dim"),
        rope_dim=config.count("qk_rope_head_dim"),
        value_dim=config.count("v_head_dim"),
    )


def _windows(config: Fields, layers: int) -> tuple[int, int]:
    """Return how many layers see a window only, and its tokens."""
    kinds = config.entries("layer_types")
    if kinds:
        unknown = [kind for kind in kinds if kind not in _LAYER_KINDS]
        if unknown:
            raise config.error("layer_types", f"{shown(unknown[0])} is not known here; known: {', '.join(_LAYER_KINDS)}")
        if len(kinds) != layers:
            raise config.error("layer_types", f"must have an entry a layer ({layers}), has {len(kinds)}")
        windowed = kinds.count(SLIDING_ATTENTION)
        return (windowed, config.count("sliding_window")) if windowed else (0, 0)
    if not config.flag("use_sliding_window", config.count("sliding_window", 0, least=0) > 0):
        return 0, 0
    window, pattern = config.count("sliding_window"), config.count("sliding_window_pattern", 0, least=0)
    if pattern:
        return layers - layers // pattern, window
    windowed = max(0, layers - config.count("max_window_layers", 0, least=0))
    return (windowed, window) if windowed else (0, 0)


def _experts(config: Fields, layers: int) -> Experts | None:
    """Return the experts of a model that has any."""
    named = [name for name in _EXPERTS if config.given(name)]
    counts = [config.count(name, least=0) for name in named]
    if not any(counts):
        return None
    if min(counts) != max(counts):
        raise config.error(named[1], f"differs from {named[0]} ({counts[0]}), is {counts[1]}")
    per_token, routed = config.count("num_experts_per_tok"), _expert_layers(config, layers)
    if per_token > counts[0]:
        raise config.error("num_experts_per_tok", f"must be at most the number of experts ({counts[0]}), is {per_token}")
    if not routed:
        return None
    as_wide = named[-1] == _EXPERTS[-1] and not config.given("moe_intermediate_size")
    intermediate = config.count("intermediate_size" if as_wide else "moe_intermediate_size")
    shared = config.count("n_shared_experts", 0, least=0) * intermediate
    return Experts(
        count=counts[0],
        per_token=per_token,
        intermediate=intermediate,
        shared_intermediate=shared + config.count("shared_expert_intermediate_size", 0, least=0),
        normalised=config.flag("norm_topk_prob", False),
        layers=routed,
        grouped=_grouped(config, counts[0], per_token) if config.text("model_type", "") in _GROUPED else None,
    )


def _grouped(config: Fields, experts: int, per_token: int) -> GroupedRouting:
    groups, chosen = config.count("n_group"), config.count("topk_group")
    size = experts // groups
    if experts % groups or size < GROUP_BEST:
        problem = f"must cut the experts ({experts}) into equal groups of {GROUP_BEST} or more, is {groups}"
        raise config.error("n_group", problem)
    if chosen > groups or chosen * size < per_token:
        least = -(-per_token // size)
        raise config.error("topk_group", f"must be from {least}, for {per_token} experts a token, to {groups}, is {chosen}")
    return GroupedRouting(groups, chosen, config.number("routed_scaling_factor"))


def _expert_layers(config: Fields, layers: int) -> frozenset[int]:
    """Return the layers of a model with experts that have no dense FFN instead: DeepSeek counts from 0, Qwen from 1."""
    first, frequency = config.count("first_k_dense_replace", 0, least=0), config.count("moe_layer_freq", 1)
    every, dense = config.count("decoder_sparse_step", 1), config.entries("mlp_only_layers")
    wrong = [layer for layer in dense if not isinstance(layer, int)]
    if wrong:
        raise config.error("mlp_only_layers", f"must be whole numbers, has {shown(wrong[0])}")
    return frozenset(
        layer for layer in range(first, layers) if layer not in dense and layer % frequency == 0 and (layer + 1) % every == 0
    )
