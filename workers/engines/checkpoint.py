"""Hugging Face checkpoint directories: checks and names them, and writes small random ones.

No torch in here: the command line, the gateway and the profiled engine use it too. See also `vocabulary.py` (tokenizer and chat
template), `shape.py` (what of config.json the eager engine can do) and `weights.py` (how tensors are read).
"""

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.core.config import WeightFormat
from orchestrator.profiles.fields import CheckpointError, read_fields
from workers.engines.vocabulary import CHAT_TEMPLATE, CORPUS, SPECIAL_TOKENS, write_json, write_tokenizer

FAMILIES = ("llama", "qwen3", "qwen3_moe", "deepseek_v3")
#: The checkpoint that is made when a cluster file names none.
DEFAULT_FAMILY = "qwen3"
DEFAULT_SEED = 20260
#: Counts changes in how weights are drawn, so that a cached default model of an older version is not taken for a new one.
WEIGHTS_VERSION = 1
#: Pieces of a weights file that go into its fingerprint, and bytes of each.
SAMPLES = 16
SAMPLE_BYTES = 4096

#: Logits of tokens that are no text by themselves are scaled by this: a random model then writes readable text and seldom ends.
RARE_TOKEN_SCALE = 0.05


def weight_files(directory: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a checkpoint, in order of names. Raises `CheckpointError` if there are none."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        single = directory / "model.safetensors"
        if not single.exists():
            raise CheckpointError(single, "missing; neither it nor model.safetensors.index.json is there")
        return (single,)
    places = read_fields(index).object("weight_map")
    if not places.values:
        raise CheckpointError(index, "must map tensor names to files under weight_map")
    files = tuple(directory / name for name in sorted({places.text(tensor) for tensor in places.values}))
    for file in files:
        if not file.exists():
            raise CheckpointError(file, f"missing; {index.name} names it")
    return files


def fingerprint(directory: Path, weights: WeightFormat = WeightFormat.AUTO) -> str:
    """Return 32 hex digits that name weights, as they are computed with, and tokenizer; the same for every copy of a checkpoint.

    Hashed are config.json, tokenizer.json, and of each safetensors file its name, size, header (names, shapes and dtypes of the
    tensors) and 16 pieces of 4 KiB spread evenly over its data: a second at most, whatever the size, and weights that were
    trained or drawn differently differ in every piece. A directory without any weights, which is all that an engine needs
    that computes nothing, is named by the first two alone. Raises `CheckpointError`.
    """
    digest = hashlib.blake2b(digest_size=16)
    if weights is not WeightFormat.AUTO:
        digest.update(weights.encode())
    for name in ("config.json", "tokenizer.json"):
        digest.update(json.dumps(read_fields(directory / name).values, sort_keys=True).encode())
    for path in weight_files(directory) if any(directory.glob("*.safetensors*")) else ():
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= size - 8:
                raise CheckpointError(path, f"not a safetensors file: header of {header_bytes} bytes in a file of {size}")
            digest.update(f"{path.name} {size} ".encode() + file.read(header_bytes))
            data = 8 + header_bytes
            for piece in range(SAMPLES):
                file.seek(data + (size - data) * piece // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def default_model_path() -> Path:
    """Return the directory of the built-in random model, made on first use (a second or two).

    It lies under `$XDG_CACHE_HOME/weft/models` (`~/.cache` if unset) and appears there complete or not at all, however many
    processes ask at once.
    """
    recipe = (DEFAULT_FAMILY, DEFAULT_SEED, WEIGHTS_VERSION, _config(DEFAULT_FAMILY, {}, 0), CORPUS, CHAT_TEMPLATE)
    version = hashlib.blake2b(repr(recipe).encode(), digest_size=6).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = cache / "weft" / "models" / f"random-{DEFAULT_FAMILY}-{version}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        create_checkpoint(unfinished, DEFAULT_FAMILY, DEFAULT_SEED)
        unfinished.chmod(0o755)
        unfinished.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def create_checkpoint(directory: Path, family: str, seed: int, **overrides: int | bool | str) -> None:
    """Write a random checkpoint that `transformers` and the eager engine load; the same bytes for the same arguments.

    Args:
        directory: made if missing; files of the same names are replaced.
        family: llama, qwen3, qwen3_moe or deepseek_v3.
        seed: of the weights.
        overrides: layers, hidden, heads, intermediate, vocabulary, context_tokens_max, tied (embeddings and output share
            weights), dtype (float32, bfloat16); kv_heads, head_dim (not deepseek_v3); experts, experts_per_token,
            moe_intermediate (the last two families); of deepseek_v3, query_rank (0: queries are not compressed), kv_rank,
            nope_dim, rope_dim, value_dim, groups, groups_per_token, shared_experts and dense_layers.

    Raises:
        ValueError: for a family, an override or a value that is not supported.
    """
    config = _config(family, overrides, seed)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(directory, config["vocab_size"], config["max_position_embeddings"])
    config["eos_token_id"] = tokenizer.token_to_id("<|im_end|>")
    config["pad_token_id"] = tokenizer.token_to_id("<|endoftext|>")
    write_json(directory / "config.json", config)
    endings = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    generation = {"eos_token_id": endings, "pad_token_id": config["pad_token_id"], "do_sample": False}
    write_json(directory / "generation_config.json", generation)
    rare = [index for index in range(config["vocab_size"]) if not _is_text(tokenizer.decode([index]))]
    _write_safetensors(directory / "model.safetensors", config, seed, rare)


def _is_text(text: str) -> bool:
    return bool(text) and text not in SPECIAL_TOKENS and text.isascii() and (text.isprintable() or text == "\n")


_HEADED = ("llama", "qwen3", "qwen3_moe")
_ROUTED = ("qwen3_moe", "deepseek_v3")
_LATENT = ("deepseek_v3",)
#: What an override is called in config.json, its default, and the families that have it.
_OVERRIDES: dict[str, tuple[str, int | bool | str | None, tuple[str, ...]]] = {
    "layers": ("num_hidden_layers", 4, FAMILIES),
    "hidden": ("hidden_size", 128, FAMILIES),
    "heads": ("num_attention_heads", 4, FAMILIES),
    "kv_heads": ("num_key_value_heads", 2, _HEADED),
    "head_dim": ("head_dim", None, _HEADED),
    "intermediate": ("intermediate_size", 256, FAMILIES),
    "experts": ("num_experts", 8, _ROUTED),
    "experts_per_token": ("num_experts_per_tok", 2, _ROUTED),
    "moe_intermediate": ("moe_intermediate_size", 64, _ROUTED),
    "vocabulary": ("vocab_size", 512, FAMILIES),
    "context_tokens_max": ("max_position_embeddings", 262144, FAMILIES),
    "tied": ("tie_word_embeddings", False, FAMILIES),
    "dtype": ("torch_dtype", "float32", FAMILIES),
    "query_rank": ("q_lora_rank", 48, _LATENT),
    "kv_rank": ("kv_lora_rank", 32, _LATENT),
    "nope_dim": ("qk_nope_head_dim", 32, _LATENT),
    "rope_dim": ("qk_rope_head_dim", 16, _LATENT),
    "value_dim": ("v_head_dim", 32, _LATENT),
    "groups": ("n_group", 4, _LATENT),
    "groups_per_token": ("topk_group", 2, _LATENT),
    "shared_experts": ("n_shared_experts", 1, _LATENT),
    "dense_layers": ("first_k_dense_replace", 1, _LATENT),
}
#: Overrides that may be 0.
_NONE_ALLOWED = ("query_rank", "shared_experts", "dense_layers")
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}


def _config(family: str, overrides: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return config.json for a family, without token ids."""
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, is {family!r}")
    known = [name for name, (_, _, families) in _OVERRIDES.items() if family in families]
    for name, value in overrides.items():
        if name not in known:
            raise ValueError(f"{name!r} is no setting of {family}; there are: {', '.join(known)}")
        least = 0 if name in _NONE_ALLOWED else 1
        if not isinstance(value, str) and value is not False and value < least:
            raise ValueError(f"{name} must be {least} or more, is {value}")
    config: dict[str, Any] = {"architectures": [_CLASSES[family]], "model_type": family, "initializer_seed": seed}
    config |= {_field(name, family): overrides.get(name, _OVERRIDES[name][1]) for name in known}
    if config["torch_dtype"] not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, is {config['torch_dtype']!r}")
    config |= _latent_fields(config) if family in _LATENT else _head_fields(config)
    if family in _ROUTED:
        config |= _routed_fields(config, config[_field("experts", family)], config["num_experts_per_tok"])
    fixed = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "attention_bias": False, "use_cache": True}
    return config | fixed


def _field(name: str, family: str) -> str:
    """Return what an override is called in a family's config.json."""
    return "n_routed_experts" if (name, family) == ("experts", "deepseek_v3") else _OVERRIDES[name][0]


def _head_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return what follows from the settings of a family whose heads have keys and values of their own."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["head_dim"] or config["hidden_size"] // heads
    if heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, are {heads} and {kv_heads}")
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, is {head_dim}")
    return {"head_dim": head_dim}


def _latent_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return what follows from the settings of a family with latent attention."""
    if config["qk_rope_head_dim"] % 2:
        raise ValueError(f"rope_dim must be even, is {config['qk_rope_head_dim']}")
    given = {"num_key_value_heads": config["num_attention_heads"], "q_lora_rank": config["q_lora_rank"] or None}
    return given | {"rope_interleave": True}


def _routed_fields(config: dict[str, Any], experts: int, per_token: int) -> dict[str, Any]:
    """Return what follows from the settings of a family with experts."""
    if per_token > experts:
        raise ValueError(f"experts_per_token must be at most {experts}, is {per_token}")
    if config["model_type"] == "qwen3_moe":
        return {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    groups, chosen = config["n_group"], config["topk_group"]
    if experts % groups or experts < 2 * groups:
        raise ValueError(f"groups must cut {experts} experts into equal ones of 2 or more, is {groups}")
    if chosen > groups or chosen * (experts // groups) < per_token:
        problem = f"must be at most {groups} and have {per_token} experts together, is {chosen}"
        raise ValueError(f"groups_per_token {problem}")
    return {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5}


#: One tensor: its name, its shape, and the function that draws it.
_Draw = Callable[[np.random.Generator, tuple[int, ...]], NDArray[np.float32]]
_Tensor = tuple[str, tuple[int, ...], _Draw]


def _matrix(gain: float) -> _Draw:
    """Draw weights that keep a vector's scale, times `gain`."""

    def draw(generator: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
        return generator.standard_normal(shape, dtype=np.float32) * np.float32(gain / shape[-1] ** 0.5)

    return draw


def _norm(scale: float) -> _Draw:
    def draw(generator: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
        return np.float32(scale) * (1 + np.float32(0.1) * generator.standard_normal(shape, dtype=np.float32))

    return draw


def _vocabulary_rows(scale: float, rare: list[int]) -> _Draw:
    def draw(generator: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
        rows = generator.standard_normal(shape, dtype=np.float32) * np.float32(scale)
        rows[rare] *= np.float32(RARE_TOKEN_SCALE)
        return rows

    return draw


def _tensors(config: dict[str, Any], rare: list[int]) -> Iterator[_Tensor]:
    """Yield every tensor of a model, in the file's order.

    Scales: attention is sharp enough to single tokens out, and what layers add outweighs the token's own embedding, so that
    the next token depends on the whole context and greedy output does not run into a cycle.
    """
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    embedding = "model.embed_tokens.weight"
    yield embedding, (vocabulary, hidden), _vocabulary_rows(4 / hidden**0.5 if config["tie_word_embeddings"] else 1.0, rare)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,), _norm(1.0)
        yield from (_latent_tensors if "kv_lora_rank" in config else _attention_tensors)(config, prefix + "self_attn.")
        yield prefix + "post_attention_layernorm.weight", (hidden,), _norm(1.0)
        if layer < config.get("first_k_dense_replace", 0 if config["model_type"] in _ROUTED else config["num_hidden_layers"]):
            yield from _projections(hidden, config["intermediate_size"], prefix + "mlp.")
        else:
            yield from _expert_tensors(config, prefix + "mlp.")
    yield "model.norm.weight", (hidden,), _norm(1.0)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocabulary, hidden), _vocabulary_rows(4 / hidden**0.5, rare)


def _attention_tensors(config: dict[str, Any], prefix: str) -> Iterator[_Tensor]:
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    normed = config["model_type"] != "llama"
    sharp = 1.0 if normed else 1.5
    yield prefix + "q_proj.weight", (queries, hidden), _matrix(sharp)
    yield prefix + "k_proj.weight", (keys, hidden), _matrix(sharp)
    yield prefix + "v_proj.weight", (keys, hidden), _matrix(2.0)
    yield prefix + "o_proj.weight", (hidden, queries), _matrix(1.0)
    if normed:
        yield prefix + "q_norm.weight", (head_dim,), _norm(1.5)
        yield prefix + "k_norm.weight", (head_dim,), _norm(1.5)


def _latent_tensors(config: dict[str, Any], prefix: str) -> Iterator[_Tensor]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    plain, turned, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    queries, rank = config["q_lora_rank"], config["kv_lora_rank"]
    if queries is None:
        yield prefix + "q_proj.weight", (heads * (plain + turned), hidden), _matrix(1.5)
    else:
        yield prefix + "q_a_proj.weight", (queries, hidden), _matrix(1.0)
        yield prefix + "q_a_layernorm.weight", (queries,), _norm(1.0)
        yield prefix + "q_b_proj.weight", (heads * (plain + turned), queries), _matrix(1.5)
    yield prefix + "kv_a_proj_with_mqa.weight", (rank + turned, hidden), _matrix(1.5)
    yield prefix + "kv_a_layernorm.weight", (rank,), _norm(1.0)
    yield prefix + "kv_b_proj.weight", (heads * (plain + value), rank), _matrix(1.5)
    yield prefix + "o_proj.weight", (hidden, heads * value), _matrix(1.5)


def _expert_tensors(config: dict[str, Any], prefix: str) -> Iterator[_Tensor]:
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    grouped = "n_group" in config
    count = config[_field("experts", config["model_type"])]
    yield prefix + "gate.weight", (count, hidden), _matrix(2.0)
    if grouped:
        yield prefix + "gate.e_score_correction_bias", (count,), _matrix(0.5)
    for expert in range(count):
        yield from _projections(hidden, width, f"{prefix}experts.{expert}.")
    if grouped and config["n_shared_experts"]:
        yield from _projections(hidden, width * config["n_shared_experts"], prefix + "shared_experts.")


def _projections(hidden: int, intermediate: int, prefix: str) -> Iterator[_Tensor]:
    yield prefix + "gate_proj.weight", (intermediate, hidden), _matrix(1.5)
    yield prefix + "up_proj.weight", (intermediate, hidden), _matrix(1.5)
    yield prefix + "down_proj.weight", (hidden, intermediate), _matrix(1.5)


def _write_safetensors(path: Path, config: dict[str, Any], seed: int, rare: list[int]) -> None:
    """Write all tensors one after the other: memory for one, whatever the model's size."""
    wide = config["torch_dtype"] == "float32"
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, _ in _tensors(config, rare):
        end = offset + int(np.prod(shape)) * (4 if wide else 2)
        header[name] = {"dtype": "F32" if wide else "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape, draw in _tensors(config, rare):
            values = draw(np.random.default_rng([seed, zlib.crc32(name.encode())]), shape)
            file.write((values if wide else _bfloat16(values)).astype("<f4" if wide else "<u2", copy=False).data)


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the nearest bfloat16 (ties to even) as its bits."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
