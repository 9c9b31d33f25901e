"""Random checkpoints are reproducible and loadable; broken ones are refused with the file and what would be right."""

import json
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from orchestrator.core.config import EngineConfig
from orchestrator.profiles.fields import CheckpointError
from tests.builders import some
from workers.engines.checkpoint import FAMILIES, create_checkpoint, default_model_path, fingerprint
from workers.engines.eager import EagerEngine
from workers.engines.shape import read_architecture
from workers.engines.vocabulary import build_tokenizer

TOOLS = [{"type": "function", "function": {"name": "look", "description": "Look", "parameters": {"type": "object"}}}]
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Look "}, {"type": "text", "text": "around."}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "function": {"name": "look", "arguments": {"where": "here"}}},
            {"type": "function", "function": {"name": "look", "arguments": '{"where": "there"}'}},
        ],
    },
    {"role": "tool", "content": "a lamp"},
    {"role": "assistant", "content": "There is a lamp."},
    {"role": "user", "content": "Thanks"},
]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    create_checkpoint(tmp_path / "model", "qwen3", 1, layers=1, hidden=32, heads=2, kv_heads=1, intermediate=32, vocabulary=300)
    return tmp_path / "model"


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_same_arguments_give_the_same_bytes(tmp_path: Path, family: str) -> None:
    for name, seed in (("first", 3), ("second", 3), ("other", 4)):
        create_checkpoint(tmp_path / name, family, seed, layers=2, hidden=32, heads=2)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert fingerprint(tmp_path / "first") == fingerprint(tmp_path / "second")
    assert fingerprint(tmp_path / "first") != fingerprint(tmp_path / "other")


def test_transformers_tokenises_and_renders_it(small: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    text = "def main():\n    print('é 你好 🙂')"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    rendered = tokenizer.apply_chat_template(CONVERSATION, tools=TOOLS, add_generation_prompt=True, tokenize=False)
    assert json.dumps(TOOLS[0]) in rendered
    assert rendered.startswith("<|im_start|>system\nBe brief.\n\n# Tools")
    assert '<tool_call>\n{"name": "look", "arguments": {"where": "here"}}\n</tool_call>\n<tool_call>' in rendered
    assert "<|im_start|>user\n<tool_response>\na lamp\n</tool_response><|im_end|>\n" in rendered
    assert rendered.endswith("<|im_start|>user\nThanks<|im_end|>\n<|im_start|>assistant\n")


def test_a_turn_is_rendered_without_looking_at_later_ones(small: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    rendered = [tokenizer.apply_chat_template(CONVERSATION[:count], tools=TOOLS, tokenize=False) for count in range(1, 7)]
    for earlier, later in pairwise(rendered):
        assert later.startswith(earlier)


def test_vocabulary_is_exactly_as_asked() -> None:
    for size in (259, 512, 1000):
        assert build_tokenizer(size).get_vocab_size() == size
    with pytest.raises(ValueError, match="at least 259 tokens, is 258"):
        build_tokenizer(258)


def test_the_default_model_is_made_once_however_many_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        paths = {future.result() for future in [pool.submit(default_model_path) for _ in range(3)]}
    [path] = paths
    assert path == default_model_path()
    assert list((tmp_path / "weft" / "models").iterdir()) == [path]
    assert read_architecture(path).context_tokens_max >= 131072


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "gpt2"}, "model_type: must be one of llama, qwen3, qwen3_moe, deepseek_v3, is 'gpt2'"),
        ({"hidden_size": None}, "hidden_size: is missing"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers: must be a whole number of 1 or more, is 'two'"),
        ({"num_key_value_heads": 3}, "num_attention_heads: must be a multiple of num_key_value_heads"),
        ({"hidden_act": "gelu"}, "hidden_act: must be silu, is 'gelu'"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config.quant_method: must be modelopt, compressed-tens",
        ),
        ({"quantization_config": {}}, "quantization_config.quant_method: is missing"),
        ({"use_sliding_window": True}, "use_sliding_window: sliding windows are not supported"),
        ({"model_type": "llama", "sliding_window": 64}, "sliding_window: sliding windows are not supported; must be null"),
        ({"kv_lora_rank": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}, "qwen3 has no latent attention"),
        ({"index_topk": 64}, "index_topk: attention to chosen tokens only is not known here"),
        ({"text_config": {"hidden_size": 32}}, "text_config: multimodal checkpoints are not supported"),
        ({"mlp_bias": True}, "mlp_bias: qwen3 has none; must be false"),
        ({"attention_bias": "yes"}, "attention_bias: must be true or false, is 'yes'"),
        ({"dtype": "float8_e4m3fn"}, "dtype: must be one of float32, bfloat16, float16, is 'float8_e4m3fn'"),
        ({"num_local_experts": 4, "num_experts_per_tok": 1}, "num_experts: qwen3 has no experts; must be left out"),
        ({"model_type": "qwen3_moe"}, "num_experts: is missing"),
        (
            {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 5},
            r"num_experts_per_tok: must be at most the number of experts \(4\), is 5",
        ),
        (
            {"model_type": "qwen3_moe", "num_local_experts": 4, "num_experts_per_tok": 1, "n_shared_experts": 1},
            "n_shared_experts: qwen3_moe has no shared experts",
        ),
        ({"rope_theta": 1}, "rope_theta: must be over 1, is 1"),
        (
            {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2}},
            "rope_scaling: differs from rope_parameters; only one of them may be there",
        ),
        ({"head_dim": 15}, "head_dim: must be even, is 15"),
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            "rope_scaling.rope_type: must be default, linear, dynamic, llama3 or yarn, is 'longrope'",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4}}, "rope_scaling.low_freq_factor: is missing"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling.factor: is missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "rope_scaling.factor: must be a number over 0, is '4'"),
        ({"rope_scaling": ["yarn"]}, r"rope_scaling: must be an object, is \['yarn'\]"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor: must be 1.0, is 0.5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "must be full_attention throughout"),
        ({"num_hidden_layers": 1.5}, "must be a whole number of 1 or more, is 1.5"),
        ({"attention_bias": True}, "tensor model.layers.0.self_attn.q_proj.bias is missing"),
        ({"hidden_size": 64}, r"must have shape \(300, 64\), has \(300, 32\)"),
        ({"num_hidden_layers": 2}, "tensor model.layers.1.input_layernorm.weight is missing"),
    ],
)
def test_unusable_configurations_are_refused(small: Path, changes: dict[str, object], problem: str) -> None:
    change_config(small, **changes)
    with pytest.raises(CheckpointError, match=problem):
        EagerEngine(small, EngineConfig(device="cpu", blocks=4), 1, 16)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"kv_lora_rank": None}, "kv_lora_rank: is missing"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim: must be even, is 15"),
        ({"v_head_dim": None}, "v_head_dim: is missing"),
        ({"num_key_value_heads": 1}, r"num_key_value_heads: must be num_attention_heads \(2\), whose latents are the same, is 1"),
        ({"head_dim": 48}, r"head_dim: must be qk_rope_head_dim \(16\), is 48"),
        ({"scoring_func": "softmax"}, "scoring_func: must be sigmoid, is 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method: must be noaux_tc, is 'greedy'"),
        ({"n_routed_experts": None}, "n_routed_experts: is missing"),
        ({"n_group": 3}, r"n_group: must cut the experts \(8\) into equal groups of 2 or more, is 3"),
        ({"n_group": 8}, r"n_group: must cut the experts \(8\) into equal groups of 2 or more, is 8"),
        ({"topk_group": 5}, "topk_group: must be from 1, for 2 experts a token, to 4, is 5"),
        ({"num_experts_per_tok": 5}, "topk_group: must be from 3, for 5 experts a token, to 4, is 2"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor: must be a number over 0, is 0"),
        ({"rope_interleave": 1}, "rope_interleave: must be true or false, is 1"),
        ({"mlp_bias": True}, "mlp_bias: deepseek_v3 has none; must be false"),
        ({"q_lora_rank": None}, "tensor model.layers.0.self_attn.q_proj.weight is missing"),
        ({"attention_bias": True}, "tensor model.layers.0.self_attn.q_a_proj.bias is missing"),
        ({"n_shared_experts": 2}, r"shared_experts.gate_proj.weight must have shape \(128, 32\), has \(64, 32\)"),
        ({"n_shared_experts": 0}, "3 tensors are no part of the model in config.json"),
        ({"first_k_dense_replace": 0}, "tensor model.layers.0.mlp.gate.weight is missing"),
    ],
)
def test_unusable_latent_configurations_are_refused(tmp_path: Path, changes: dict[str, object], problem: str) -> None:
    create_checkpoint(tmp_path, "deepseek_v3", 1, layers=2, hidden=32, heads=2, intermediate=32, vocabulary=300)
    change_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=problem):
        EagerEngine(tmp_path, EngineConfig(device="cpu", blocks=4), 1, 16)


def test_layers_that_guess_further_tokens_are_left_out(tmp_path: Path) -> None:
    create_checkpoint(tmp_path, "deepseek_v3", 1, layers=2, hidden=32, heads=2, intermediate=32, vocabulary=300)
    guessing = {"model.layers.2.enorm.weight": torch.zeros(2), "model.layers.3.eh_proj.weight": torch.zeros(2)}
    save_file(load_file(tmp_path / "model.safetensors") | guessing, tmp_path / "model.safetensors", metadata={"format": "pt"})
    change_config(tmp_path, num_nextn_predict_layers=2)
    EagerEngine(tmp_path, EngineConfig(device="cpu", blocks=4), 1, 16).close()
    change_config(tmp_path, num_nextn_predict_layers=1)
    with pytest.raises(CheckpointError, match=r"1 tensors are no part of the model in config.json: model.layers.3.eh_proj"):
        EagerEngine(tmp_path, EngineConfig(device="cpu", blocks=4), 1, 16)


@pytest.mark.parametrize("extra", ["model.layers.0.self_attn.q_proj.bias", "model.layers.7.mlp.up_proj.weight", "visual.patch"])
def test_tensors_that_no_part_of_the_model_reads_are_named(small: Path, extra: str) -> None:
    tensors = load_file(small / "model.safetensors") | {extra: torch.zeros(2)}
    save_file(tensors, small / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"1 tensors are no part of the model in config.json: {extra}"):
        EagerEngine(small, EngineConfig(device="cpu", blocks=4), 1, 16)


def test_tensors_that_follow_from_config_json_may_be_there(small: Path) -> None:
    derived = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    save_file(load_file(small / "model.safetensors") | derived, small / "model.safetensors", metadata={"format": "pt"})
    EagerEngine(small, EngineConfig(device="cpu", blocks=4), 1, 16).close()


@pytest.mark.parametrize(
    ("scaling", "positions", "limit"),
    [
        (None, 2048, 2048),
        ({"rope_type": "linear", "factor": 4.0}, 2048, 2048),
        ({"rope_type": "dynamic", "factor": 4.0}, 2048, 2048),  # beyond, keys hang on what comes after them
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072, 131072),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 40960, 131072),  # Qwen3's cards
        ({"type": "yarn", "factor": 4.0}, 32768, 131072),
    ],
)
def test_contexts_are_as_long_as_their_rotations_reach(
    small: Path, scaling: dict[str, Any] | None, positions: int, limit: int
) -> None:
    change_config(small, rope_scaling=scaling, max_position_embeddings=positions)
    assert read_architecture(small).context_tokens_max == limit


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("config.json", None, "config.json: missing"),
        ("config.json", b"{", "config.json: not readable as JSON"),
        ("config.json", b"[]", "config.json: must hold a JSON object, holds \\[\\]"),
        ("model.safetensors", None, "model.safetensors: missing"),
        ("model.safetensors", b"no tensors", "model.safetensors: not a readable safetensors file"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "part-1.safetensors"}}', "part-1.safetensors: missing"),
        ("tokenizer.json", None, "tokenizer.json: missing"),
    ],
)
def test_broken_files_are_named(small: Path, name: str, content: bytes | None, problem: str) -> None:
    if content is None:
        (small / name).unlink()
    else:
        (small / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=problem):
        EagerEngine(small, EngineConfig(device="cpu", blocks=4), 1, 16)


@pytest.mark.parametrize(
    ("family", "overrides", "problem"),
    [
        ("gpt2", {}, "family must be one of llama, qwen3, qwen3_moe, deepseek_v3, is 'gpt2'"),
        ("llama", {"experts": 4}, "'experts' is no setting of llama"),
        ("llama", {"layers": 0}, "layers must be 1 or more, is 0"),
        ("llama", {"heads": 4, "kv_heads": 3}, "multiple of kv_heads, are 4 and 3"),
        ("llama", {"dtype": "int8"}, "dtype must be float32 or bfloat16, is 'int8'"),
        ("qwen3_moe", {"experts": 2, "experts_per_token": 3}, "experts_per_token must be at most 2, is 3"),
        ("qwen3_moe", {"kv_rank": 8}, "'kv_rank' is no setting of qwen3_moe"),
        ("deepseek_v3", {"kv_heads": 2}, "'kv_heads' is no setting of deepseek_v3"),
        ("deepseek_v3", {"kv_rank": 0}, "kv_rank must be 1 or more, is 0"),
        ("deepseek_v3", {"query_rank": -1}, "query_rank must be 0 or more, is -1"),
        ("deepseek_v3", {"rope_dim": 7}, "rope_dim must be even, is 7"),
        ("deepseek_v3", {"groups": 3}, "groups must cut 8 experts into equal ones of 2 or more, is 3"),
        ("deepseek_v3", {"groups": 8}, "groups must cut 8 experts into equal ones of 2 or more, is 8"),
        ("deepseek_v3", {"groups_per_token": 5}, "groups_per_token must be at most 4 and have 2 experts together, is 5"),
        (
            "deepseek_v3",
            {"experts_per_token": 5, "groups_per_token": 2},
            "groups_per_token must be at most 4 and have 5 experts together, is 2",
        ),
    ],
)
def test_impossible_orders_are_refused(tmp_path: Path, family: str, overrides: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        create_checkpoint(tmp_path, family, 1, **overrides)


def test_bfloat16_weights_are_the_rounded_float32_ones(tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        create_checkpoint(tmp_path / dtype, "llama", 1, layers=1, hidden=32, heads=2, kv_heads=1, dtype=dtype)
    wide, narrow = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / dtype, dtype="auto").state_dict()
        for dtype in ("float32", "bfloat16")
    )
    assert all(torch.equal(tensor.to(torch.bfloat16), narrow[name]) for name, tensor in some(wide.items()))
