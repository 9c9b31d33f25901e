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

from orchestrator.profiles.fields import CheckpointError, read_fields
from workers.engines.vocabulary import CHAT_TEMPLATE, CORPUS, SPECIAL_TOKENS, write_json, write_tokenizer

FAMILIES = ("llama", "qwen3", "qwen3_moe")
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


def fingerprint(directory: Path) -> str:
    """Return 32 hex digits that name weights and tokenizer; the same for every copy of a checkpoint.

    Hashed are config.json, tokenizer.json, and of each safetensors file its name, size, header (names, shapes and dtypes of the
    tensors) and 16 pieces of 4 KiB spread evenly over its data: a second at most, whatever the size, and weights that were
    trained or drawn differently differ in every piece. A directory without any weights, which is all that an engine needs
    that computes nothing, is named by the first two alone. Raises `CheckpointError`.
    """
    digest = hashlib.blake2b(digest_size=16)
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
        family: llama, qwen3 or qwen3_moe.
        seed: of the weights.
        overrides: layers, hidden, heads, kv_heads, head_dim, intermediate, experts, experts_per_token, moe_intermediate,
            vocabulary, context_tokens_max, tied (embeddings and output share weights), dtype (float32, bfloat16).

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


#: What an override is called in config.json, and its default.
_OVERRIDES: dict[str, tuple[str, int | bool | str | None]] = {
    "layers": ("num_hidden_layers", 4),
    "hidden": ("hidden_size", 128),
    "heads": ("num_attention_heads", 4),
    "kv_heads": ("num_key_value_heads", 2),
    "head_dim": ("head_dim", None),
    "intermediate": ("intermediate_size", 256),
    "experts": ("num_experts", 8),
    "experts_per_token": ("num_experts_per_tok", 2),
    "moe_intermediate": ("moe_intermediate_size", 64),
    "vocabulary": ("vocab_size", 512),
    "context_tokens_max": ("max_position_embeddings", 262144),
    "tied": ("tie_word_embeddings", False),
    "dtype": ("torch_dtype", "float32"),
}
_MOE_ONLY = ("experts", "experts_per_token", "moe_intermediate")
_CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}


def _config(family: str, overrides: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return config.json for a family, without token ids."""
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, is {family!r}")
    known = [name for name in _OVERRIDES if family == "qwen3_moe" or name not in _MOE_ONLY]
    for name, value in overrides.items():
        if name not in known:
            raise ValueError(f"{name!r} is no setting of {family}; there are: {', '.join(known)}")
        if not isinstance(value, str) and value is not False and value < 1:
            raise ValueError(f"{name} must be 1 or more, is {value}")
    config: dict[str, Any] = {"architectures": [_CLASSES[family]], "model_type": family, "initializer_seed": seed}
    config |= {_OVERRIDES[name][0]: overrides.get(name, _OVERRIDES[name][1]) for name in known}
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    config["head_dim"] = config["head_dim"] or hidden // heads
    if heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, are {heads} and {kv_heads}")
    if config["head_dim"] % 2:
        raise ValueError(f"head_dim must be even, is {config['head_dim']}")
    if config["torch_dtype"] not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, is {config['torch_dtype']!r}")
    if family == "qwen3_moe":
        if config["num_experts_per_tok"] > config["num_experts"]:
            raise ValueError(f"experts_per_token must be at most {config['num_experts']}, is {config['num_experts_per_tok']}")
        config |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    fixed = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "attention_bias": False, "use_cache": True}
    return config | fixed


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
        yield from _attention_tensors(config, prefix + "self_attn.")
        yield prefix + "post_attention_layernorm.weight", (hidden,), _norm(1.0)
        yield from _mlp_tensors(config, prefix + "mlp.")
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


def _mlp_tensors(config: dict[str, Any], prefix: str) -> Iterator[_Tensor]:
    if config["model_type"] != "qwen3_moe":
        yield from _projections(config["hidden_size"], config["intermediate_size"], prefix)
        return
    yield prefix + "gate.weight", (config["num_experts"], config["hidden_size"]), _matrix(2.0)
    for expert in range(config["num_experts"]):
        yield from _projections(config["hidden_size"], config["moe_intermediate_size"], f"{prefix}experts.{expert}.")


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
