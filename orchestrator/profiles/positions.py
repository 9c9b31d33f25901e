"""How a model tells positions apart (rotary embedding), and how many tokens its context has: the one place that says so."""

import math
from dataclasses import dataclass, replace

from orchestrator.core.config import require
from orchestrator.profiles.fields import COUNT_MAX, Fields

#: Where config.json has its rotary embedding: transformers 5's name, and that of the versions before.
_NAMES = ("rope_parameters", "rope_scaling")
#: What `rope_parameters` is keyed by where kinds of layers turn differently; those that see everything set the context.
_FULL = "full_attention"
#: Ways of turning that are known, as `rope_type` names them.
KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """Llama 3's way of stretching: wavelengths over a limit are divided, those between two limits partly."""

    low_frequency_factor: float
    high_frequency_factor: float
    original_tokens: float


@dataclass(frozen=True, slots=True)
class YarnRope:
    """YaRN's way (https://arxiv.org/abs/2309.00071): dimensions that turn seldom are divided, those that turn often are not.

    Dimensions that turn `beta_fast` times over the original context and more are left alone, those that turn `beta_slow` times
    and less are divided; between them both are mixed, from whole pairs of dimensions on if `whole`.
    """

    original_tokens: float
    beta_fast: float
    beta_slow: float
    whole: bool
    #: Multiplies sines and cosines.
    amplitude: float


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: plain, or stretched by `factor` altogether or in one of two ways."""

    theta: float
    #: 1.0 leaves frequencies as they are.
    factor: float = 1.0
    way: Llama3Rope | YarnRope | None = None
    #: Share of a head's dimensions that turn.
    share: float = 1.0
    #: Multiplies the scores of latent attention, and of no other.
    latent_sharpness: float = 1.0
    #: What config.json calls the way, and the field that does; one that is not in `KINDS` is described by `theta` alone.
    kind: str = "default"
    field: str = "rope_parameters.rope_type"


def context_tokens_of(config: Fields) -> int:
    """Return the longest prompt plus output that a model's config.json allows, tokens.

    YaRN stretches the context that the model was first trained with; files say `max_position_embeddings` before or after that
    (https://huggingface.co/Qwen/Qwen3-8B has it before). All other ways are served as far as `max_position_embeddings` goes.

    Raises:
        CheckpointError: it does not say how long contexts are, or says it in a way that cannot be read.
    """
    positions, rope = config.count("max_position_embeddings"), rope_of(config)
    if not isinstance(rope.way, YarnRope):
        return positions
    stretched = rope.way.original_tokens * rope.factor
    if not stretched <= COUNT_MAX:
        raise config.error(rope.field, f"yarn must give contexts of at most {COUNT_MAX} tokens, gives {stretched:g}")
    return max(positions, int(stretched))


def limited(context_tokens_max: int, limit: int) -> int:
    """Return the longest prompt plus output of a pool: the model's, or the pool's own `engine.context_tokens_max` if not 0.

    Raises:
        ConfigError: the pool asks for more than the model has.
    """
    require(
        limit <= context_tokens_max, "engine.context_tokens_max", f"must be at most the model's {context_tokens_max}, is {limit}"
    )
    return limit or context_tokens_max


def rope_of(config: Fields) -> Rope:
    """Return the rotary embedding that a config.json describes, in either version's words. Raises `CheckpointError`."""
    name, settings = _settings(config)
    theta = settings.number("rope_theta", config.number("rope_theta", 10000.0))
    if theta <= 1.0:
        raise config.error("rope_theta", f"must be over 1, is {theta:g}")
    share = settings.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    kind = settings.text("rope_type", settings.text("type", "default"))
    found = _stretched(config, settings, kind, theta)
    sharpness = _latent_sharpness(settings, kind, found.factor)
    return replace(found, share=share, latent_sharpness=sharpness, kind=kind, field=f"{name}.rope_type")


def _stretched(config: Fields, settings: Fields, kind: str, theta: float) -> Rope:
    """Return how frequencies are changed for longer contexts."""
    match kind:
        case "dynamic":
            # It changes with a sequence's length, but not up to `max_position_embeddings`. Beyond, keys would hang on what came
            # after them and no block could be shared: that is where contexts end.
            settings.number("factor")
            return Rope(theta)
        case "linear":
            return Rope(theta, settings.number("factor"))
        case "llama3":
            low, high = settings.number("low_freq_factor"), settings.number("high_freq_factor")
            return Rope(theta, settings.number("factor"), Llama3Rope(low, high, _original(config, settings)))
        case "yarn":
            original = _original(config, settings)
            factor = settings.number("factor", config.count("max_position_embeddings") / original)
            return Rope(theta, factor, _yarn(settings, original, factor))
        case _:
            return Rope(theta)


def _settings(config: Fields) -> tuple[str, Fields]:
    """Return the object that describes the rotary embedding and its name; an empty one if there is none."""
    given = [name for name in _NAMES if config.given(name)]
    if len(given) > 1 and config.values[given[0]] != config.values[given[1]]:
        raise config.error(given[1], f"differs from {given[0]}; only one of them may be there")
    name = given[0] if given else _NAMES[0]
    settings = config.object(name)
    return (f"{name}.{_FULL}", settings.object(_FULL)) if settings.given(_FULL) else (name, settings)


def _original(config: Fields, settings: Fields) -> float:
    """Return the positions that a model was first trained with."""
    return settings.number("original_max_position_embeddings", config.count("max_position_embeddings"))


def _yarn(settings: Fields, original: float, factor: float) -> YarnRope:
    """Return YaRN's settings, with the defaults that `transformers` has."""
    fast, slow = settings.number("beta_fast", 32.0), settings.number("beta_slow", 1.0)
    return YarnRope(original, fast, slow, settings.flag("truncate", True), _amplitude(settings, factor))


def _amplitude(settings: Fields, factor: float) -> float:
    """Return what YaRN multiplies sines and cosines by: stated, or from the factor, since longer contexts need sharper scores."""
    if settings.given("attention_factor"):
        return settings.number("attention_factor")
    # A scale of 0 is no scale, as `transformers` has it.
    if settings.values.get("mscale") and settings.values.get("mscale_all_dim"):
        return _sharpening(factor, settings.number("mscale")) / _sharpening(factor, settings.number("mscale_all_dim"))
    return _sharpening(factor, 1.0)


def _latent_sharpness(settings: Fields, kind: str, factor: float) -> float:
    """Return what latent attention multiplies its scores by, beside what turning does: for all of a head's dimensions.

    That it holds for every way of stretching is how `transformers` has it.
    """
    if kind == "default" or not settings.values.get("mscale_all_dim"):
        return 1.0
    return _sharpening(settings.number("factor", factor), settings.number("mscale_all_dim")) ** 2


def _sharpening(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0
