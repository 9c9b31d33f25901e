"""The eager engine writes the same tokens as `transformers`, greedily and in float32, however its work is cut up.

Against float64 both are off by up to 3e-5 in a logit, so where the two largest logits are closer than that either token is
right: prompts that lead to such a tie (one in hundreds) are left out.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bench.quoting import cut_checkpoint
from orchestrator.core.config import SpeculationConfig, SpeculationMethod
from tests.oracle import Oracle, oracle
from tests.workers.conductor import Conductor, engine_of, prompts_of, without_ties
from workers.engines import latent
from workers.engines.checkpoint import create_checkpoint

#: Products of latent attention that may have a bias.
LATENT_BIASED = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")

LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
#: DeepSeek-V3's, with weights that make two things different.
LATENT_YARN = YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}
#: Family, overrides of the checkpoint, changes to config.json; None takes a field away.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "qwen3": ("qwen3", {}, {}),
    "qwen3_moe": ("qwen3_moe", {}, {}),
    "llama-rope3-tied": ("llama", {"tied": True, "layers": 2}, {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    "llama-linear-rope": (
        "llama",
        {"layers": 2, "heads": 4, "kv_heads": 4},
        {"rope_scaling": LINEAR},
    ),
    "qwen3-wide-heads": ("qwen3", {"layers": 2, "head_dim": 64, "heads": 8, "kv_heads": 1}, {}),
    "moe-many-experts": ("qwen3_moe", {"layers": 2, "experts": 32, "experts_per_token": 4, "moe_intermediate": 96}, {}),
    "moe-raw-weights": ("qwen3_moe", {"layers": 2}, {"norm_topk_prob": False}),
    "llama-mlp-bias": ("llama", {"layers": 2}, {"mlp_bias": True}),
    "llama-attention-bias": ("llama", {"layers": 2}, {"attention_bias": True}),
    "llama-all-biases": ("llama", {"layers": 2}, {"attention_bias": True, "mlp_bias": True}),
    "qwen3-attention-bias": ("qwen3", {"layers": 2}, {"attention_bias": True}),
    "moe-attention-bias": ("qwen3_moe", {"layers": 2}, {"attention_bias": True}),
    "qwen3-yarn": ("qwen3", {"layers": 2}, {"rope_scaling": YARN, "max_position_embeddings": 1024}),
    "llama-yarn-untruncated": ("llama", {"layers": 2}, {"rope_parameters": YARN | {"truncate": False, "beta_fast": 16}}),
    "llama-yarn-stated-factor": ("llama", {"layers": 2}, {"rope_parameters": YARN | {"attention_factor": 1.5}}),
    "llama-yarn-mscale": ("llama", {"layers": 2}, {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}),
    "llama-dynamic-rope": ("llama", {"layers": 2}, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "moe-local-experts": ("qwen3_moe", {"layers": 2}, {"num_local_experts": 8, "num_experts": None}),
    "qwen3-unsaid-head-dim": ("qwen3", {"layers": 2, "head_dim": 128}, {"head_dim": None}),
    "llama-unsaid-head-dim": ("llama", {"layers": 2}, {"head_dim": None}),
    "deepseek_v3": ("deepseek_v3", {}, {}),
    # Latents so wide that prompts after a context are expanded from some 40 tokens on.
    "deepseek-wide-latents": ("deepseek_v3", {"layers": 2, "kv_rank": 128}, {}),
    "deepseek-yarn": ("deepseek_v3", {"layers": 2}, {"rope_scaling": LATENT_YARN, "max_position_embeddings": 1024}),
    "deepseek-linear-rope": ("deepseek_v3", {"layers": 2}, {"rope_scaling": LINEAR | {"mscale_all_dim": 1.0}}),
    "deepseek-direct-queries": ("deepseek_v3", {"layers": 2, "query_rank": 0}, {}),
    "deepseek-halves": ("deepseek_v3", {"layers": 2}, {"rope_interleave": False}),
    "deepseek-halves-direct": ("deepseek_v3", {"layers": 2, "query_rank": 0}, {"rope_interleave": False}),
    "deepseek-attention-bias": ("deepseek_v3", {"layers": 2}, {"attention_bias": True, "rope_interleave": False}),
    "deepseek-direct-bias": ("deepseek_v3", {"layers": 2, "query_rank": 0}, {"attention_bias": True}),
    "deepseek-wide-values": ("deepseek_v3", {"layers": 2, "nope_dim": 6, "rope_dim": 4, "value_dim": 40, "kv_rank": 120}, {}),
    "deepseek-narrow-values": ("deepseek_v3", {"layers": 2, "nope_dim": 33, "rope_dim": 6, "value_dim": 9, "kv_rank": 96}, {}),
    "deepseek-many-experts": (
        "deepseek_v3",
        {"layers": 2, "experts": 32, "experts_per_token": 6, "groups": 8, "groups_per_token": 3, "shared_experts": 2},
        {"norm_topk_prob": False, "routed_scaling_factor": 0.7},
    ),
    "deepseek-one-group": ("deepseek_v3", {"layers": 2, "groups": 1, "groups_per_token": 1, "dense_layers": 0}, {}),
    "deepseek-dense": ("deepseek_v3", {"layers": 2, "dense_layers": 2}, {}),
}


def load(directory: Path, variant: str) -> tuple[Path, Oracle]:
    """Make a checkpoint; return it and what `transformers` writes with it."""
    family, overrides, changes = VARIANTS[variant]
    path = directory / variant
    create_checkpoint(path, family, 11, **overrides)
    config = path / "config.json"
    changed = json.loads(config.read_text()) | changes
    config.write_text(json.dumps({name: value for name, value in changed.items() if changes.get(name, 0) is not None}))
    for switch, part in (("attention_bias", "self_attn"), ("mlp_bias", "mlp")):
        if changes.get(switch):
            add_biases(path / "model.safetensors", part, LATENT_BIASED if family == "deepseek_v3" else ("_proj",))
    torch.set_num_threads(1)
    return path, oracle(path)


def add_biases(path: Path, part: str, products: tuple[str, ...]) -> None:
    """Give products in a part of each layer, by the ends of their names, a bias."""
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(3)
    for name, weight in list(tensors.items()):
        if f".{part}." in name and name.removesuffix(".weight").endswith(products):
            tensors[name.replace(".weight", ".bias")] = 0.5 * torch.randn(len(weight), generator=generator)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_tokens_are_those_of_transformers(tmp_path: Path, variant: str) -> None:
    path, generate = load(tmp_path, variant)
    prompts, expected = without_ties(generate, prompts_of(1, [1, 15, 16, 17, 90, 201]), 12)
    for together in (1, 4):
        assert Conductor(engine_of(path), engine_of(path), seed=together).run(prompts, 12, together) == expected


@pytest.mark.parametrize("limit", [1, 3000])
def test_latents_are_attended_a_few_heads_and_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(latent, "MASK_ENTRIES_MAX", limit)
    monkeypatch.setattr(latent, "EXPANDED_BYTES_MAX", 100 * limit)
    path, generate = load(tmp_path, "deepseek-wide-latents")
    prompts, expected = without_ties(generate, prompts_of(5, [16, 90, 201, 300]), 6)
    assert Conductor(engine_of(path), engine_of(path), seed=2).run(prompts, 6, 2) == expected


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["llama", "qwen3", "qwen3_moe", "deepseek_v3"])
def test_tokens_are_those_of_transformers_where_some_were_drafted(tmp_path: Path, variant: str) -> None:
    path, generate = load(tmp_path, variant)
    source = random.Random(5)
    prompts, expected = without_ties(generate, prompts_of(6, [source.randint(1, 400) for _ in range(20)]), 48)
    for together in (1, 6):
        conductor = Conductor(engine_of(path), engine_of(path), seed=together)
        assert conductor.run(prompts, 48, together, guesses=expected) == expected


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["llama", "qwen3", "qwen3_moe", "deepseek_v3"])
def test_tokens_are_those_of_transformers_where_some_were_drafted_by_a_model(tmp_path: Path, variant: str) -> None:
    path, generate = load(tmp_path, variant)
    cut_checkpoint(path, tmp_path / "small", 3)
    speculation = SpeculationConfig(
        SpeculationMethod.DRAFT_MODEL, draft_model=str(tmp_path / "small"), draft_context_tokens_max=200, draft_sequences_max=4
    )
    source = random.Random(5)
    prompts, expected = without_ties(generate, prompts_of(6, [source.randint(1, 400) for _ in range(20)]), 48)
    for together in (1, 6):
        conductor = Conductor(engine_of(path, speculation=speculation), engine_of(path), seed=together)
        assert conductor.run(prompts, 48, together, models=True) == expected
        assert conductor.modelled > conductor.right > 0


@pytest.mark.slow
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_tokens_are_those_of_transformers_for_many_prompts(tmp_path: Path, variant: str) -> None:
    path, generate = load(tmp_path, variant)
    source = random.Random(2)
    prompts, expected = without_ties(generate, prompts_of(3, [source.randint(1, 1500) for _ in range(30)]), 48)
    for together in (1, 8):
        for seed in range(3):
            conductor = Conductor(engine_of(path), engine_of(path), seed)
            assert conductor.run(prompts, 48, together) == expected, f"seed {seed}, {together} together"


def test_sharded_checkpoints_and_dense_layers_load(tmp_path: Path) -> None:
    path = tmp_path / "model"
    create_checkpoint(path, "qwen3_moe", 5, layers=3)
    tensors = load_file(path / "model.safetensors")
    dense = transformers.Qwen3MoeConfig(hidden_size=128, intermediate_size=256)
    # Layer 1 gets an ordinary MLP instead of experts.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.1.mlp.")}
    generator = torch.Generator().manual_seed(1)
    for name, shape in (("gate_proj", (256, 128)), ("up_proj", (256, 128)), ("down_proj", (128, 256))):
        tensors[f"model.layers.1.mlp.{name}.weight"] = torch.randn(shape, generator=generator) / dense.hidden_size**0.5
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
    (path / "model.safetensors").unlink()
    weight_map = {name: file for file, part in files.items() for name in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"mlp_only_layers": [1]}))
    torch.set_num_threads(1)
    prompts, expected = without_ties(oracle(path), prompts_of(4, [9, 40]), 12)
    assert Conductor(engine_of(path), engine_of(path), 1).run(prompts, 12, 2) == expected
