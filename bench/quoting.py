"""Makes checkpoints that quote, and ones that follow: Llamas of any size whose answers are written by hand into a few weights.

A quoting one finds what followed the last two tokens before, and says it again.

Random weights never quote, and small trained models are not at hand; so that drafts are right or wrong for a model's own reasons,
two layers are written by hand (an induction head, https://arxiv.org/abs/2209.11895) into a random model of any size:

    layer 0   two heads look one and two tokens back, whatever these are: rotary embedding tells places apart by itself
    layer 1   one head looks for the place before which the last two tokens stood, and copies the token there
    others    random, and as dear as any; what they write is not read by those

It is so sure of what it says that at temperature 1 it leaves its text about once in twenty tokens, and goes on from somewhere
else: as agents do who quote a file with changes. Greedily it quotes without an error.

A following one says after each token the one that comes next in an order of all tokens, which its embedding knows: nothing comes
twice, so that nothing can be looked up, but a model of its first layer (`cut_checkpoint`) says the same.
"""

import json
import math
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from workers.engines.checkpoint import create_checkpoint

#: Width of a token's code, and where in the residual stream are the codes of the token itself, of those before it, of the answer.
CODE = 40
ITSELF, BEFORE, TWO_BEFORE, ANSWER = (slice(place * CODE, (place + 1) * CODE) for place in range(4))
#: The place that holds the same number for every token, and that number.
CONSTANT, CONSTANT_VALUE = 4 * CODE, 4.0
HEAD_DIM = 128
#: So high that half of a head's pairs hardly turn over some thousand tokens, and can hold what tokens are.
ROPE_THETA = 1e12
#: Pairs that turn fast, for telling places apart; and the first of those that hardly do.
FAST_PAIRS = 12
FIRST_SLOW_PAIR = 24
#: How much sharper than the next best the heads are; and how sure of the answer.
PLACE_SHARPNESS = 420.0
MATCH_SHARPNESS = 15.0
SURENESS = 0.33


def create_quoting_checkpoint(directory: Path, seed: int, layers: int, hidden: int, intermediate: int, vocabulary: int) -> None:
    """Write such a checkpoint in float32; `hidden` is at least 256, `layers` at least 2."""
    tensors, codes = _create(directory, seed, layers, hidden, intermediate, vocabulary)
    _write_embeddings(tensors, codes, hidden, 4)
    _write_looking_back(tensors, "model.layers.0.self_attn.", hidden)
    _write_induction(tensors, "model.layers.1.self_attn.", hidden)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def create_following_checkpoint(
    directory: Path, seed: int, layers: int, hidden: int, intermediate: int, vocabulary: int, order: int = 0
) -> None:
    """Write a checkpoint that follows the order of tokens that is drawn from `order`."""
    tensors, codes = _create(directory, seed, layers, hidden, intermediate, vocabulary)
    _write_embeddings(tensors, codes, hidden, 2)
    circle = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(order))
    tensors["model.embed_tokens.weight"][circle, ANSWER] = codes[circle.roll(-1)]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _create(
    directory: Path, seed: int, layers: int, hidden: int, intermediate: int, vocabulary: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Write a random checkpoint; return its tensors, whose layers say nothing that is read, and a code for each token."""
    heads = max(2, hidden // HEAD_DIM)
    create_checkpoint(
        directory, "llama", seed, layers=layers, hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=heads // 2,
        head_dim=HEAD_DIM, vocabulary=vocabulary,
    )  # fmt: skip
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": ROPE_THETA}))
    tensors = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2, (vocabulary, CODE), generator=generator) * 2.0 - 1.0
    for layer in range(layers):
        _silence(tensors, f"model.layers.{layer}.")
    return tensors, codes


def cut_checkpoint(source: Path, directory: Path, layers: int) -> None:
    """Write a checkpoint of the first layers of another, with its embedding, head and tokenizer: a draft model for that one."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            shutil.copy(path, directory / path.name)
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    tensors = load_file(source / "model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if not _is_behind(name, layers)}
    save_file(left, directory / "model.safetensors", metadata={"format": "pt"})


def _is_behind(name: str, layers: int) -> bool:
    """Return whether a tensor belongs to a layer behind the first ones."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return found is not None and int(found[1]) >= layers


def _silence(tensors: dict[str, Tensor], prefix: str) -> None:
    """Let a random layer write, and little, only where nothing is read."""
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}{name}.weight"].fill_(1.0)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weight = tensors[f"{prefix}{name}.weight"]
        weight[: CONSTANT + 1] = 0.0
        weight.mul_(0.05)


def _norm(hidden: int, codes: int) -> float:
    """Return what normalisation multiplies by where so many codes are written."""
    return math.sqrt(hidden / (codes * CODE + CONSTANT_VALUE**2))


def _write_embeddings(tensors: dict[str, Tensor], codes: Tensor, hidden: int, parts: int) -> None:
    """Write each token's code where it is itself, and have the head read the answer, one of so many codes of a row."""
    embedding = tensors["model.embed_tokens.weight"].zero_()
    embedding[:, ITSELF] = codes
    embedding[:, CONSTANT] = CONSTANT_VALUE
    tensors["model.norm.weight"].fill_(1.0)
    head = tensors["lm_head.weight"].zero_()
    head[:, ANSWER] = codes * SURENESS / _norm(hidden, parts)


def _write_looking_back(tensors: dict[str, Tensor], prefix: str, hidden: int) -> None:
    """Heads 0 and 1 share keys and values: every place has the same key, and the query is turned by one place or by two."""
    query, key, value, output = (tensors[f"{prefix}{name}_proj.weight"] for name in "qkvo")
    scale = _norm(hidden, 1) * CONSTANT_VALUE
    query[: 2 * HEAD_DIM], key[:HEAD_DIM], value[:HEAD_DIM] = 0.0, 0.0, 0.0
    value[:CODE, ITSELF] = torch.eye(CODE)
    for pair in range(FAST_PAIRS):
        angle = ROPE_THETA ** (-2 * pair / HEAD_DIM)
        key[pair, CONSTANT] = 1.0 / scale
        for head in range(2):
            turn = angle * (head + 1)
            query[head * HEAD_DIM + pair, CONSTANT] = PLACE_SHARPNESS * math.cos(turn) / scale
            query[head * HEAD_DIM + HEAD_DIM // 2 + pair, CONSTANT] = -PLACE_SHARPNESS * math.sin(turn) / scale
    output[:, : 2 * HEAD_DIM] = 0.0
    output[BEFORE, :CODE] = torch.eye(CODE) / _norm(hidden, 1)
    output[TWO_BEFORE, HEAD_DIM : HEAD_DIM + CODE] = torch.eye(CODE) / _norm(hidden, 1)


def _write_induction(tensors: dict[str, Tensor], prefix: str, hidden: int) -> None:
    """Head 0 asks for this token and the one before it, in the places of the two tokens before another place."""
    query, key, value, output = (tensors[f"{prefix}{name}_proj.weight"] for name in "qkvo")
    scale = _norm(hidden, 3)
    slow = [*range(FIRST_SLOW_PAIR, HEAD_DIM // 2), *range(HEAD_DIM // 2 + FIRST_SLOW_PAIR, HEAD_DIM)]
    query[:HEAD_DIM], key[:HEAD_DIM], value[:HEAD_DIM] = 0.0, 0.0, 0.0
    for half, (asked, had) in enumerate(((ITSELF, BEFORE), (BEFORE, TWO_BEFORE))):
        places = slow[half * CODE : (half + 1) * CODE]
        query[places, asked] = torch.eye(CODE) * MATCH_SHARPNESS / scale
        key[places, had] = torch.eye(CODE) / scale
    value[:CODE, ITSELF] = torch.eye(CODE)
    output[:, :HEAD_DIM] = 0.0
    output[ANSWER, :CODE] = torch.eye(CODE) / scale
