"""Quantised checkpoints: the tokens are those that `transformers` writes with what the weights mean; the unknown is refused."""

import json
import random
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.core.commands import Slice
from orchestrator.core.config import ConfigError, EngineConfig, WeightFormat
from orchestrator.core.types import BlockId, RequestId, Sampling
from orchestrator.profiles.fields import CheckpointError
from tests.oracle import first_decided, oracle
from tests.quantised import WAYS, write_quantised
from workers.engines.checkpoint import create_checkpoint, fingerprint
from workers.engines.eager import EagerEngine
from workers.engines.quantised import QuantisedMatrix, columns
from workers.engines.shape import read_architecture
from workers.engines.weights import Weights

BLOCK_TOKENS = 16
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN_PROJ = "model.layers.0.mlp.down_proj.weight"
#: More experts, and of a width that no block of 128 divides.
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"layers": 2},
    "qwen3": {"layers": 2, "head_dim": 64, "intermediate": 208},
    "qwen3_moe": {"layers": 2, "moe_intermediate": 80},
    "deepseek_v3": {"layers": 2},
}

#: On every run, one of each number format and kind of MLP; the others are slow.
OFTEN = (("modelopt-nvfp4", "llama"), ("deepseek-fp8", "deepseek_v3"), (WeightFormat.NVFP4, "qwen3_moe"))


def grid(ways: Iterable[str]) -> list[Any]:
    """Return all pairs of ways and families."""
    pairs = [(way, family) for way in ways for family in SIZES]
    return [pytest.param(*pair, marks=() if pair in OFTEN else pytest.mark.slow) for pair in pairs]


GRID = grid(WAYS)
LOADED = grid((WeightFormat.FP8, WeightFormat.NVFP4))


def engine_of(path: Path, weights: WeightFormat = WeightFormat.AUTO) -> EagerEngine:
    config = EngineConfig(device="cpu", dtype="float32", block_tokens=BLOCK_TOKENS, blocks=64, weights=weights)
    return EagerEngine(path, config, sequences_max=4, step_tokens_max=256)


def generate(engine: EagerEngine, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Return greedy tokens after prompts that are computed together."""
    each = -(-(max(map(len, prompts)) + count) // BLOCK_TOKENS)
    requests = [RequestId(number) for number in range(len(prompts))]
    tables = [tuple(BlockId(request * each + place) for place in range(each)) for request in requests]
    for request, prompt in zip(requests, prompts, strict=True):
        engine.add(request, array("I", prompt), Sampling())
    outputs = engine.step([Slice(request, 0, len(prompts[request]), 0, tables[request], True) for request in requests])
    tokens = [list(output.tokens) for output in outputs]
    for step in range(count - 1):
        outputs = engine.step([Slice(request, len(prompts[request]) + step, 1, 0, (), True) for request in requests])
        for one, output in zip(tokens, outputs, strict=True):
            one += output.tokens
    return tokens


def prompts_of(seed: int) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(500) for _ in range(source.randint(3, 40))] for _ in range(8)]


def check_identity(quantised: EagerEngine, meant: Path, count: int, wanted: int) -> None:
    decided = first_decided(oracle(meant), prompts_of(3), wanted, count)
    assert generate(quantised, [list(prompt) for prompt in decided], count) == list(decided.values())


@pytest.mark.parametrize(("way", "family"), GRID)
def test_tokens_are_those_of_the_weights_that_are_meant(tmp_path: Path, way: str, family: str) -> None:
    quantised, meant = write_quantised(tmp_path, way, family, **SIZES[family])
    check_identity(engine_of(quantised), meant, count=6, wanted=4)


@pytest.mark.parametrize("way", list(WAYS))
def test_a_weight_is_read_as_it_lies_and_decoded_as_it_is_meant(tmp_path: Path, way: str) -> None:
    quantised, meant = write_quantised(tmp_path, way, "llama", **SIZES["llama"])
    expected = load_file(meant / "model.safetensors")[Q_PROJ]
    weights = Weights(quantised)
    found = weights.take_matrix(Q_PROJ, (128, 128))
    assert isinstance(found, QuantisedMatrix)
    torch.testing.assert_close(found.decode(), expected, rtol=2e-7, atol=0)
    torch.testing.assert_close(weights.take(Q_PROJ, (128, 128)), expected, rtol=2e-7, atol=0)
    share = 0.6 if found.format is WeightFormat.NVFP4 else 1.1
    assert found.bytes <= share * expected.numel()


@pytest.mark.parametrize(("weights", "family"), LOADED)
def test_weights_are_quantised_at_load_all_but_embedding_head_routers_and_norms(
    tmp_path: Path, family: str, weights: WeightFormat
) -> None:
    create_checkpoint(tmp_path / "plain", family, 5, **SIZES[family])
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    reader = Weights(tmp_path / "plain", weights)
    for name, tensor in tensors.items():
        # Latent attention takes kv_b_proj apart: it is no linear layer there.
        if "_proj" in name and name.endswith(".weight") and "kv_b_proj" not in name:
            found = reader.take_matrix(name, (tensor.shape[0], tensor.shape[1]))
            assert isinstance(found, QuantisedMatrix)
            tensors[name] = found.decode()
    create_checkpoint(tmp_path / "meant", family, 5, **SIZES[family])
    save_file(tensors, tmp_path / "meant" / "model.safetensors", metadata={"format": "pt"})
    check_identity(engine_of(tmp_path / "plain", weights), tmp_path / "meant", count=6, wanted=4)


def test_kv_of_weights_in_another_format_has_another_name(tmp_path: Path) -> None:
    create_checkpoint(tmp_path, "llama", 5, **SIZES["llama"])
    names = [engine_of(tmp_path, weights).description.fingerprint for weights in WeightFormat]
    assert names == [fingerprint(tmp_path, weights) for weights in WeightFormat]
    assert len(set(names)) == 3
    assert names[0] == fingerprint(tmp_path)


def compressed_config(changes: dict[str, Any], weights: dict[str, Any]) -> dict[str, Any]:
    way = WAYS["compressed-nvfp4"][1]
    assert way is not None
    changed = json.loads(json.dumps(way)) | changes
    changed["config_groups"]["group_0"]["weights"] |= weights
    return changed


TWO_WAYS = {"group_1": {"format": "float-quantized", "weights": {"num_bits": 8, "strategy": "channel"}}}


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo: must be one of NVFP4, FP8, is 'W4A8_AWQ'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "group_size: must be 16, is 32"),
        ({"quant_method": "modelopt"}, "quant_algo: is missing"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt: must be e4m3, is 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size: must be two whole numbers"),
        ({"quant_method": "fp8", "weight_block_size": [128, 96]}, "weight_block_size: must have a power of 2 of 16 or more"),
        (
            compressed_config({"format": "pack-quantized"}, {}),
            "config_groups.group_0.format: must be one of nvfp4-pack-quantized",
        ),
        (compressed_config({"transform_config": {"a": 1}}, {}), "transform_config: is not supported; must be left out"),
        (compressed_config({"sparsity_config": {"format": "sparse-24"}}, {}), "sparsity_config: is not supported"),
        ({"quant_method": "compressed-tensors"}, "config_groups: must have a group"),
        (compressed_config({}, {"num_bits": 8}), "weights.num_bits: must be 4 of type float, is 8 of type float"),
        (compressed_config({}, {"type": "int"}), "weights.num_bits: must be 4 of type float, is 4 of type int"),
        (compressed_config({}, {"symmetric": False}), "weights.symmetric: must be true"),
        (compressed_config({}, {"strategy": "group"}), "weights.strategy: must be tensor_group, is 'group'"),
        (compressed_config({}, {"group_size": 32}), "weights.group_size: must be 16, is 32"),
    ],
)
def test_what_is_not_known_is_refused_by_its_field(tmp_path: Path, config: dict[str, Any], problem: str) -> None:
    create_checkpoint(tmp_path, "llama", 5, **SIZES["llama"])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    with pytest.raises(CheckpointError) as refused:
        read_architecture(tmp_path)
    assert problem in str(refused.value)


def test_groups_that_quantise_differently_are_refused(tmp_path: Path) -> None:
    create_checkpoint(tmp_path, "llama", 5, **SIZES["llama"])
    config = compressed_config({}, {})
    config["config_groups"] |= TWO_WAYS
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    with pytest.raises(CheckpointError, match="config_groups: must all quantise alike, group_0 and group_1 differ"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("way", "ending", "value", "problem"),
    [
        ("modelopt-nvfp4", "_scale", None, "q_proj.weight_scale is missing"),
        ("modelopt-nvfp4", "_scale_2", None, "q_proj.weight_scale_2 is missing"),
        ("modelopt-nvfp4", "_scale", torch.full((128, 8), -1.0), "q_proj.weight_scale has a value that is negative or no number"),
        ("modelopt-nvfp4", "_scale", torch.ones(128, 4), r"weight_scale must have shape \(128, 8\), has \(128, 4\)"),
        ("compressed-nvfp4", "_global_scale", torch.zeros(1), "weight_global_scale must be over 0"),
        ("deepseek-fp8", "_scale_inv", torch.ones(2, 1), r"scales must have shape \(1, 1\), has \(2, 1\)"),
        ("compressed-fp8", "_scale", torch.ones(5, 1), r"scales must have shape \(128, 1\), has \(5, 1\)"),
        ("modelopt-fp8", "_scale", torch.tensor(torch.nan), "weight_scale has a value that is negative or no number"),
        ("modelopt-fp8", "", torch.full((128, 128), torch.nan), "q_proj.weight has a value that is no number"),
    ],
)
def test_damaged_tensors_are_refused(tmp_path: Path, way: str, ending: str, value: torch.Tensor | None, problem: str) -> None:
    path = write_quantised(tmp_path, way, "llama", **SIZES["llama"])[0] / "model.safetensors"
    tensors = load_file(path)
    if value is None:
        del tensors[Q_PROJ + ending]
    else:
        tensors[Q_PROJ + ending] = value.to(tensors[Q_PROJ + ending].dtype)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=problem):
        Weights(path.parent).take_matrix(Q_PROJ, (128, 128))


def test_quantised_tensors_without_a_word_of_it_are_refused(tmp_path: Path) -> None:
    for way in ("modelopt-nvfp4", "deepseek-fp8"):
        folder = write_quantised(tmp_path / way, way, "llama", **SIZES["llama"])[0]
        path = folder / "config.json"
        config = json.loads(path.read_text())
        said = config.pop("quantization_config")
        path.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"q_proj.weight is (U8|F8_E4M3), and config.json has no quantization_config"):
            Weights(folder).take(Q_PROJ, (128, 128))
        other = {"quant_method": "modelopt", "quant_algo": "FP8" if said["quant_method"] == "modelopt" else "NVFP4"}
        path.write_text(json.dumps(config | {"quantization_config": other}))
        with pytest.raises(CheckpointError, match=r"q_proj.weight is (U8|F8_E4M3), and config.json says"):
            Weights(folder).take(Q_PROJ, (128, 128))


def test_an_asked_format_must_be_the_checkpoints_if_that_is_quantised(tmp_path: Path) -> None:
    folder = write_quantised(tmp_path, "modelopt-nvfp4", "llama", **SIZES["llama"])[0]
    assert isinstance(Weights(folder, WeightFormat.NVFP4).take_matrix(Q_PROJ, (128, 128)), QuantisedMatrix)
    with pytest.raises(ConfigError, match=r"engine.weights: is fp8, but .* is quantised already, to nvfp4"):
        Weights(folder, WeightFormat.FP8)


def test_weights_that_cannot_be_quantised_are_refused(tmp_path: Path) -> None:
    create_checkpoint(tmp_path, "llama", 5, layers=1, intermediate=24)
    with pytest.raises(CheckpointError, match=r"down_proj.weight has 24 columns; engine.weights = nvfp4 needs a multiple of 16"):
        engine_of(tmp_path, WeightFormat.NVFP4)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors[Q_PROJ][3, 3] = torch.inf
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"q_proj.weight cannot be quantised: 1 of 128 rows have a NaN or an infinity"):
        engine_of(tmp_path, WeightFormat.FP8)


@pytest.mark.parametrize("way", list(WAYS))
def test_columns_of_a_weight_stay_quantised_where_no_scale_is_cut(tmp_path: Path, way: str) -> None:
    matrix = Weights(write_quantised(tmp_path, way, "llama", layers=1)[0]).take_matrix(DOWN_PROJ, (128, 256))
    assert isinstance(matrix, QuantisedMatrix)
    meant = matrix.decode()
    for part, kept in ((slice(0, 256), True), (slice(128, 256), True), (slice(0, 128), True), (slice(8, 250), False)):
        found = columns(matrix, part)
        assert isinstance(found, QuantisedMatrix) is (kept or matrix.scales.shape[1] == 1)
        assert torch.equal(found.decode() if isinstance(found, QuantisedMatrix) else found, meant[:, part])
