"""One reader of config.json: what it makes of every family, for planner and engine alike, and what it refuses."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from orchestrator.core.config import ConfigError
from orchestrator.core.cost.shapes import Latent, ModelShape
from orchestrator.profiles.fields import CheckpointError, Fields, read_fields
from orchestrator.profiles.model_config import (
    FAMILY_DEFAULTS,
    Architecture,
    Experts,
    GroupedRouting,
    architecture_of,
    model_fields,
    read_config,
)
from orchestrator.profiles.positions import Llama3Rope, Rope, YarnRope, context_tokens_of, limited, rope_of

PATH = Path("config.json")


def fields(config: dict[str, Any]) -> Fields:
    return model_fields(Fields(PATH, config))


def described(config: dict[str, Any]) -> Architecture:
    return architecture_of(fields(config))


SMALL: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 500,
    "max_position_embeddings": 512,
}
PLAIN = Architecture(
    family="",
    layers=4,
    hidden=64,
    vocabulary=500,
    heads=8,
    kv_heads=2,
    head_dim=8,
    intermediate=96,
    context_tokens_max=512,
    norm_epsilon=1e-6,
    tied=False,
    dtype="float32",
    mlp_bias=False,
    attention_bias=False,
    rope=Rope(10000.0),
)
COUNTED = ModelShape("m", 4, 64, 500, 8, 2, 8, 512, dense_layers=4, dense_intermediate=96)
#: Family, what its config.json has beside or instead of `SMALL`, what an engine is to build, what a planner is to count.
FAMILIES: dict[str, tuple[dict[str, Any], Architecture, ModelShape]] = {
    # https://huggingface.co/meta-llama/Llama-3.1-8B, made small.
    "llama": (
        {
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "mlp_bias": True,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        replace(
            PLAIN,
            family="llama",
            dtype="bfloat16",
            norm_epsilon=1e-5,
            mlp_bias=True,
            rope=Rope(500000.0, 8.0, Llama3Rope(1.0, 4.0, 64), kind="llama3", field="rope_scaling.rope_type"),
        ),
        COUNTED,
    ),
    # https://huggingface.co/Qwen/Qwen3-0.6B: heads wider than the model divided by their number, windows that are off.
    "qwen3": (
        {
            "model_type": "qwen3",
            "head_dim": None,
            "tie_word_embeddings": True,
            "sliding_window": 32,
            "max_window_layers": 2,
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        },
        replace(PLAIN, family="qwen3", head_dim=128, tied=True, rope=Rope(1e6)),
        replace(COUNTED, head_dim=128, tied_embeddings=True),
    ),
    # https://huggingface.co/Qwen/Qwen3-30B-A3B, with the name that transformers 5 gives the count of experts.
    "qwen3_moe": (
        {
            "model_type": "qwen3_moe",
            "num_local_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
        },
        replace(PLAIN, family="qwen3_moe", experts=Experts(16, 4, 24, 0, True, frozenset({3}))),
        replace(COUNTED, dense_layers=3, experts=16, experts_per_token=4, expert_intermediate=24),
    ),
    # https://huggingface.co/deepseek-ai/DeepSeek-V3.
    "deepseek_v3": (
        {
            "model_type": "deepseek_v3",
            "num_key_value_heads": 8,
            "q_lora_rank": 48,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 4,
            "v_head_dim": 10,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 24,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "n_group": 4,
            "topk_group": 2,
            "num_nextn_predict_layers": 1,
            "norm_topk_prob": True,
            "rope_scaling": {
                "type": "yarn",
                "factor": 8,
                "original_max_position_embeddings": 128,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
        replace(
            PLAIN,
            family="deepseek_v3",
            kv_heads=8,
            latent=Latent(48, 16, 12, 4, 10),
            interleaved=True,
            guessing_layers=1,
            experts=Experts(16, 4, 24, 48, True, frozenset({1, 2, 3}), GroupedRouting(4, 2, 2.5)),
            context_tokens_max=1024,
            rope=Rope(
                10000.0,
                8.0,
                YarnRope(128, 32, 1, True, 1.0),
                latent_sharpness=1.4591290795886054,  # (0.1 ln 8 + 1) squared
                kind="yarn",
                field="rope_scaling.rope_type",
            ),
        ),
        replace(
            COUNTED,
            kv_heads=8,
            context_tokens_max=1024,
            latent=Latent(48, 16, 12, 4, 10),
            dense_layers=1,
            experts=16,
            experts_per_token=4,
            expert_intermediate=24,
            shared_intermediate=48,
        ),
    ),
    # https://huggingface.co/openai/gpt-oss-120b: every other layer sees a window, experts are as wide as FFNs are.
    "gpt_oss": (
        {
            "model_type": "gpt_oss",
            "num_local_experts": 16,
            "num_experts_per_tok": 4,
            "sliding_window": 32,
            "attention_bias": True,
        },
        replace(
            PLAIN,
            family="gpt_oss",
            head_dim=64,
            intermediate=0,
            attention_bias=True,
            experts=Experts(16, 4, 96, 0, False, frozenset(range(4))),
            windowed_layers=2,
            window_tokens=32,
        ),
        replace(
            COUNTED,
            head_dim=64,
            dense_layers=0,
            dense_intermediate=0,
            experts=16,
            experts_per_token=4,
            expert_intermediate=96,
            windowed_layers=2,
            window_tokens=32,
        ),
    ),
    # https://huggingface.co/google/gemma-3-27b-it: multimodal; what is beside `text_config` is the whole's.
    "gemma3": (
        {
            "model_type": "gemma3",
            "dtype": "bfloat16",
            "text_config": {
                "model_type": "gemma3_text",
                "num_hidden_layers": 12,
                "sliding_window": 32,
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                },
            },
        },
        replace(
            PLAIN,
            family="gemma3_text",
            layers=12,
            head_dim=256,
            tied=True,
            dtype="bfloat16",
            windowed_layers=10,
            window_tokens=32,
            rope=Rope(1e6, 8.0, kind="linear", field="rope_parameters.full_attention.rope_type"),
        ),
        replace(
            COUNTED,
            layers=12,
            dense_layers=12,
            head_dim=256,
            tied_embeddings=True,
            windowed_layers=10,
            window_tokens=32,
        ),
    ),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_each_family_is_described_once_for_engine_and_planner(family: str) -> None:
    config, engine, planner = FAMILIES[family]
    found = described({**SMALL, **config})
    assert found == engine
    assert found.shape("m") == planner


@pytest.mark.parametrize("family", list(FAMILY_DEFAULTS))
def test_what_a_family_leaves_out_is_what_transformers_takes(family: str) -> None:
    theirs = CONFIG_MAPPING[family]()
    for name, value in FAMILY_DEFAULTS[family].items():
        if name == "sliding_window_pattern":
            assert theirs.layer_types.index("full_attention") + 1 == value
        else:
            assert getattr(theirs, name) == value, name


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"model_type": "llama"}, 2048),
        ({"model_type": "qwen3", "max_position_embeddings": None}, 32768),
        ({"max_position_embeddings": 4096.0}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": None}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "longrope", "factor": 4}}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "linear", "factor": 4}}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "yarn", "factor": 4}}, 16384),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "yarn", "factor": 2.5}}, 10240),
        (
            {
                "max_position_embeddings": 4096,
                "rope_parameters": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 512},
            },
            4096,
        ),
        # Both names, as transformers 5 writes for older readers.
        (
            {
                "max_position_embeddings": 4096,
                "rope_parameters": {"type": "yarn", "factor": 4},
                "rope_scaling": {"type": "yarn", "factor": 4},
            },
            16384,
        ),
        ({"max_position_embeddings": 4096, "text_config": {"max_position_embeddings": 8192}}, 8192),
    ],
)
def test_how_long_a_context_is(config: dict[str, Any], tokens: int) -> None:
    assert context_tokens_of(fields(config)) == tokens


def test_a_pool_may_have_shorter_contexts_than_its_model_and_no_longer_ones() -> None:
    assert [limited(4096, limit) for limit in (0, 1, 4096)] == [4096, 1, 4096]
    with pytest.raises(ConfigError, match=r"^engine\.context_tokens_max: must be at most the model's 4096, is 4097"):
        limited(4096, 4097)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("rope", "amplitude"),
    [
        ({}, 1.138629436111989),  # 0.1 ln 4 + 1
        ({"attention_factor": 1.5}, 1.5),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 0.0}, 1.138629436111989),  # 0 is none
        ({"factor": 0.5}, 1.0),
        ({"factor": None}, 1.2079441541679836),  # 512 / 64
    ],
)
def test_how_much_yarn_sharpens_scores(rope: dict[str, Any], amplitude: float) -> None:
    way = rope_of(fields({"max_position_embeddings": 512, "rope_scaling": YARN | rope})).way
    assert isinstance(way, YarnRope)
    assert way.amplitude == pytest.approx(amplitude)


@pytest.mark.parametrize(
    ("rope", "sharpness"),
    [
        ({}, 1.0),
        ({"mscale_all_dim": 0.0}, 1.0),
        ({"mscale_all_dim": 1.0}, 1.2964769926846953),  # (0.1 ln 4 + 1) squared
        ({"mscale_all_dim": 0.5}, 1.1434339564986577),
        ({"mscale_all_dim": 1.0, "attention_factor": 2.0}, 1.2964769926846953),
        ({"mscale_all_dim": 1.0, "factor": 0.5}, 1.0),
        ({"mscale_all_dim": 1.0, "rope_type": "linear"}, 1.2964769926846953),
        ({"mscale_all_dim": 1.0, "rope_type": "dynamic"}, 1.2964769926846953),
        ({"mscale_all_dim": 1.0, "rope_type": "default"}, 1.0),
    ],
)
def test_how_much_latent_attention_sharpens_scores(rope: dict[str, Any], sharpness: float) -> None:
    latent = {"kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 10}
    config = {**SMALL, "num_key_value_heads": 8, "rope_scaling": YARN | rope}
    assert described({**config, **latent}).score_scale == pytest.approx(sharpness / 4)
    assert described(config).score_scale == pytest.approx(8**-0.5)


def test_a_model_without_experts_in_any_layer_has_none() -> None:
    config = {**SMALL, "num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": [0, 1, 2, 3]}
    assert described(config) == described({**SMALL, "num_experts": 0}) == PLAIN


@pytest.mark.parametrize(
    ("windows", "windowed"),
    [
        ({"sliding_window": None}, 0),
        ({"sliding_window": 0}, 0),
        ({"sliding_window": 32, "use_sliding_window": False}, 0),
        ({"sliding_window": 32}, 4),
        ({"sliding_window": 32, "max_window_layers": 3}, 1),
        ({"sliding_window": 32, "max_window_layers": 9}, 0),
        ({"sliding_window": 32, "sliding_window_pattern": 2}, 2),
        ({"sliding_window": 32, "layer_types": ["full_attention"] * 4}, 0),
        ({"sliding_window": 32, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, 1),
    ],
)
def test_how_many_layers_see_a_window(windows: dict[str, Any], windowed: int) -> None:
    found = described({**SMALL, **windows})
    assert (found.windowed_layers, found.window_tokens) == (windowed, 32 if windowed else 0)


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
#: What is refused, by what kind of mistake it is.
REFUSED: dict[str, list[tuple[dict[str, Any], str]]] = {
    "missing": [
        ({"hidden_size": None}, "hidden_size: is missing"),
        ({"max_position_embeddings": None}, "max_position_embeddings: is missing"),
        ({**EXPERTS, "num_experts_per_tok": None}, "num_experts_per_tok: is missing"),
        ({**EXPERTS, "moe_intermediate_size": None}, "moe_intermediate_size: is missing"),
        ({"intermediate_size": None}, "intermediate_size: is missing"),
        ({"kv_lora_rank": 16}, "qk_nope_head_dim: is missing"),
        ({"use_sliding_window": True}, "sliding_window: is missing"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding_window: is missing"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: is missing"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2}}, "rope_parameters.low_freq_factor: is missing"),
    ],
    "of another type": [
        ({"num_hidden_layers": "four"}, "num_hidden_layers: must be a whole number of 1 or more, is 'four'"),
        ({"num_hidden_layers": True}, "num_hidden_layers: must be a whole number of 1 or more, is True"),
        ({"num_attention_heads": 1.5}, "num_attention_heads: must be a whole number of 1 or more, is 1.5"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: must be true or false, is 'no'"),
        ({"attention_bias": 1}, "attention_bias: must be true or false, is 1"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps: must be a number over 0, is 'small'"),
        ({"model_type": 3}, "model_type: must be a text, is 3"),
        ({"dtype": ["float32"]}, "dtype: must be a text, is ['float32']"),
        ({"layer_types": "full_attention"}, "layer_types: must be a list, is 'full_attention'"),
        ({"rope_scaling": ["yarn"]}, "rope_scaling: must be an object, is ['yarn']"),
        ({"rope_scaling": False}, "rope_scaling: must be an object, is False"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "rope_scaling.factor: must be a number over 0, is '4'"),
        ({"rope_scaling": {"type": 4}}, "rope_scaling.type: must be a text, is 4"),
        ({"rope_parameters": {**YARN, "truncate": 0}}, "rope_parameters.truncate: must be true or false, is 0"),
        ({"text_config": 5}, "text_config: must be an object, is 5"),
        ({**EXPERTS, "mlp_only_layers": [1.5]}, "mlp_only_layers: must be whole numbers, has 1.5"),
        ({**EXPERTS, "moe_layer_freq": [0, 1]}, "moe_layer_freq: must be a whole number of 1 or more, is [0, 1]"),
    ],
    "out of bounds": [
        ({"vocab_size": 0}, "vocab_size: must be a whole number of 1 or more, is 0"),
        ({"hidden_size": 1 << 40}, "hidden_size: must be at most 4294967296, is 1099511627776"),
        ({"num_hidden_layers": 5000}, "num_hidden_layers: must be at most 4096, is 5000"),
        ({"sliding_window": -1}, "sliding_window: must be a whole number of 0 or more, is -1"),
        ({"head_dim": 0}, "head_dim: must be a whole number of 1 or more, is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: must be a number over 0, is nan"),
        ({"rope_theta": 0.5}, "rope_theta: must be over 1, is 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "rope_scaling.factor: must be a number over 0, is -2"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 1e30}},
            "rope_scaling.rope_type: yarn must give contexts of at most 4294967296 tokens, gives 5.12e+32",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 1e300, "original_max_position_embeddings": 1e300}},
            "rope_scaling.rope_type: yarn must give contexts of at most 4294967296 tokens, gives inf",
        ),
    ],
    "at odds": [
        ({"num_key_value_heads": 3}, "num_attention_heads: must be a multiple of num_key_value_heads (3), is 8"),
        ({**EXPERTS, "num_experts_per_tok": 9}, "num_experts_per_tok: must be at most the number of experts (8), is 9"),
        ({**EXPERTS, "num_local_experts": 4}, "num_local_experts: differs from num_experts (8), is 4"),
        ({"layer_types": ["full_attention"]}, "layer_types: must have an entry a layer (4), has 1"),
        ({"num_attention_heads": 128}, "head_dim: must be a whole number of 1 or more, is 0"),
        (
            {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2}},
            "rope_scaling: differs from rope_parameters; only one of them may be there",
        ),
    ],
    "unknown": [
        ({"index_topk": 64}, "index_topk: attention to chosen tokens only is not known here; it must be left out"),
        ({"attention_chunk_size": 64}, "attention_chunk_size: attention within chunks is not known here; it must be left out"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types: 'linear_attention' is not known here; known: full_attention, "),
        ({"layer_types": [None] * 4}, "layer_types: None is not known here; known: full_attention, sliding_attention"),
    ],
}


@pytest.mark.parametrize("kind", list(REFUSED))
def test_what_cannot_be_meant_is_refused_with_file_and_field(kind: str) -> None:
    for change, problem in REFUSED[kind]:
        with pytest.raises(CheckpointError) as refused:
            described({**SMALL, **change})
        assert str(refused.value).startswith(f"config.json: {problem}")


def test_a_file_is_read_with_its_familys_defaults_and_named_when_it_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "qwen3", "vocab_size": 7}), encoding="utf-8-sig")
    assert read_config(tmp_path).count("max_position_embeddings") == 32768
    assert read_fields(tmp_path / "generation_config.json", needed=False).values == {}
    for content, problem in (
        ("[1]", "must hold a JSON object, holds [1]"),
        ("{", "not readable as JSON: "),
        ("[" * 10**5, "not "),
    ):
        path.write_text(content)
        with pytest.raises(CheckpointError) as refused:
            read_config(tmp_path)
        assert str(refused.value).startswith(f"{path}: {problem}")
    with pytest.raises(CheckpointError, match="Is a directory"):
        read_fields(tmp_path)


def test_an_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(Fields(PATH, {}).error("vocab_size", "is missing")))
    assert (error.path, error.problem, str(error)) == (PATH, "vocab_size: is missing", "config.json: vocab_size: is missing")
