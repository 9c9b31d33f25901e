"""LoRA adapters in the eager engine: tokens are those of `transformers` with PEFT, for several adapters and none in one batch."""

import json
import random
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.core.commands import Slice
from orchestrator.core.config import AdapterConfig, EngineConfig, ModelConfig, WeightFormat
from orchestrator.core.types import AdapterName, BlockId, RequestId, Sampling
from orchestrator.profiles.fields import CheckpointError
from tests.adapters import ATTENTION, FFN, adapted_oracle, merge, write_adapter
from tests.oracle import Oracle, oracle
from tests.workers.conductor import BLOCK_TOKENS, GREEDY, Conductor, prompts_of, without_ties
from workers.engines.adapters import PLAIN, adapted_rows
from workers.engines.checkpoint import create_checkpoint
from workers.engines.eager import EagerEngine
from workers.engines.peft import adapter_fingerprint

OUTPUT_TOKENS = 12
LENGTHS = [1, 15, 17, 90, 201]


def with_adapters(path: Path, adapters: dict[str, Path], rank_max: int = 64, **engine: Any) -> EagerEngine:
    model = ModelConfig(adapters={name: AdapterConfig(str(one)) for name, one in adapters.items()}, adapter_rank_max=rank_max)
    config = EngineConfig(**{"device": "cpu", "dtype": "float32", "block_tokens": BLOCK_TOKENS, "blocks": 512} | engine)
    return EagerEngine(path, config, sequences_max=8, step_tokens_max=2048, model=model)


def using(adapter: str | None, sampling: Sampling = GREEDY) -> Sampling:
    return replace(sampling, adapter=AdapterName(adapter)) if adapter is not None else sampling


def generate(engine: EagerEngine, requests: list[tuple[list[int], Sampling]], count: int) -> list[list[int] | str]:
    """Return so many tokens of each request, or why it failed; all of them are in every step."""
    blocks = engine.description.blocks // len(requests)
    done: list[list[int] | str] = [[] for _ in requests]
    for number, (prompt, sampling) in enumerate(requests):
        engine.add(RequestId(number), array("I", prompt), sampling)
    for place in range(count):
        slices: list[Slice] = []
        for number, (prompt, _) in enumerate(requests):
            tables = tuple(BlockId(block) for block in range(number * blocks, (number + 1) * blocks)) if not place else ()
            start = len(prompt) + place - 1 if place else 0
            slices.append(Slice(RequestId(number), start, 1 if place else len(prompt), 0, tables, True))
        slices = [piece for piece, output in zip(slices, done, strict=True) if not isinstance(output, str)]
        for piece, output in zip(slices, engine.step(slices), strict=True):
            written = done[piece.request]
            assert not isinstance(written, str)
            done[piece.request] = output.failure if output.failure is not None else [*written, *output.tokens]
    return done


def expected_of(oracles: dict[str | None, Oracle]) -> tuple[list[list[int]], list[Sampling], list[list[int]]]:
    """Return prompts, each asked of everyone, in an order that mixes them; and what follows."""
    rows: list[tuple[list[int], Sampling, list[int]]] = []
    for name, generate in oracles.items():
        prompts, expected = without_ties(generate, prompts_of(1, LENGTHS), OUTPUT_TOKENS)
        rows += [(prompt, using(name), tokens) for prompt, tokens in zip(prompts, expected, strict=True)]
    random.Random(4).shuffle(rows)
    prompts, samplings, expected = (list(column) for column in zip(*rows, strict=True))
    return prompts, samplings, expected


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_one_batch_has_the_tokens_of_each_adapter_and_of_the_model(tmp_path: Path, family: str) -> None:
    path = tmp_path / family
    create_checkpoint(path, family, 11, layers=2)
    adapters = {
        "all": write_adapter(tmp_path / "all", path, 1, lora_alpha=8),
        "attention": write_adapter(tmp_path / "attention", path, 2, ("q_proj", "v_proj", "o_proj"), rank=2, use_rslora=True),
        "uneven": write_adapter(
            tmp_path / "uneven", path, 3, rank=3, rank_pattern={"up_proj": 7}, alpha_pattern={"layers.1.self_attn.k_proj": 5}
        ),
    }
    oracles: dict[str | None, Oracle] = {name: adapted_oracle(path, adapter) for name, adapter in adapters.items()}
    prompts, samplings, expected = expected_of(oracles | {None: oracle(path)})
    assert len({tuple(tokens) for tokens in expected}) == len(expected), "adapters change nothing"
    for together in (1, 6):
        engine, donor = with_adapters(path, adapters), with_adapters(path, adapters)
        written = Conductor(engine, donor, seed=together).run(prompts, OUTPUT_TOKENS, together, samplings=samplings)
        assert written == expected


@pytest.mark.slow
def test_attention_of_a_model_with_experts_is_adapted(tmp_path: Path) -> None:
    path = tmp_path / "moe"
    create_checkpoint(path, "qwen3_moe", 11, layers=2)
    adapters = {"a": write_adapter(tmp_path / "a", path, 1, ATTENTION)}
    prompts, samplings, expected = expected_of({"a": adapted_oracle(path, adapters["a"]), None: oracle(path)})
    conductor = Conductor(with_adapters(path, adapters), with_adapters(path, adapters), 2)
    assert conductor.run(prompts, OUTPUT_TOKENS, 6, samplings=samplings) == expected


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "llama"
    create_checkpoint(path, "llama", 11, layers=2)
    return path


def test_drawn_and_drafted_tokens_are_those_of_the_merged_model(tmp_path: Path, llama: Path) -> None:
    adapters = {name: write_adapter(tmp_path / name, llama, seed) for seed, name in enumerate(("a", "b"))}
    drawn = Sampling(temperature=0.8, top_p=0.95, seed=7)
    prompts = prompts_of(2, LENGTHS)
    expected: list[list[int]] = []
    for name, adapter in adapters.items():
        merged = with_adapters(merge(llama, adapter, tmp_path / f"merged-{name}"), {})
        expected += Conductor(merged, merged, 1).run(prompts, OUTPUT_TOKENS, 1, samplings=[drawn] * len(prompts))
    samplings = [using(name, drawn) for name in adapters for _ in prompts]
    conductor = Conductor(with_adapters(llama, adapters), with_adapters(llama, adapters), 3)
    assert conductor.run(prompts * 2, OUTPUT_TOKENS, 5, guesses=expected, samplings=samplings) == expected


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{"dtype": "bfloat16"}, {"weights": WeightFormat.FP8}])
def test_other_rows_are_as_without_adapters_in_every_format(tmp_path: Path, llama: Path, engine: dict[str, Any]) -> None:
    adapters = {"a": write_adapter(tmp_path / "a", llama, 1), "b": write_adapter(tmp_path / "b", llama, 2)}
    prompts = prompts_of(5, [40] * 6)
    expected = generate(with_adapters(llama, {}, **engine), [(prompt, GREEDY) for prompt in prompts], 4)
    samplings = [using(name) for name in (None, "a", None, "b", None, "a")]
    written = generate(with_adapters(llama, adapters, **engine), list(zip(prompts, samplings, strict=True)), 4)
    same = [tokens == wanted for tokens, wanted in zip(written, expected, strict=True)]
    assert same == [True, False, True, False, True, False]


def test_rows_are_runs_of_neighbours() -> None:
    def to_device(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values)

    runs = adapted_rows(np.array([2, PLAIN, 0, 2, 1, 1, PLAIN, 1, 0]), 4, to_device)
    assert [(run.first, run.end, run.adapters) for run in runs] == [(0, 4, (0, 2)), (4, 6, (1,)), (7, 8, (1,)), (8, 9, (0,))]
    assert runs[0].foreign is not None
    assert runs[0].foreign[:, :, 0].tolist() == [[True, False], [True, True], [False, True], [True, False]]
    assert [run.foreign for run in runs[1:]] == [None, None, None]
    assert [run.adapters for run in adapted_rows(np.array([1, 1]), 2, to_device) if run.foreign is None] == [(1,)]
    assert adapted_rows(np.array([PLAIN, PLAIN, PLAIN]), 2, to_device) == ()


def test_an_adapter_that_is_not_there_fails_its_request_alone(tmp_path: Path, llama: Path) -> None:
    engine = with_adapters(llama, {"a": write_adapter(tmp_path / "a", llama, 1)})
    good, failed = generate(engine, [([1, 2, 3], using("a")), ([1, 2, 3], using("b"))], 2)
    assert len(good) == 2
    assert failed == "this node has no adapter 'b'"


@pytest.mark.slow
def test_what_is_not_finite_stays_with_its_own_rows(tmp_path: Path, llama: Path) -> None:
    huge = write_adapter(tmp_path / "huge", llama, 1)
    tensors = load_file(huge / "adapter_model.safetensors")
    save_file({name: tensor * 1e30 for name, tensor in tensors.items()}, huge / "adapter_model.safetensors")
    adapters = {"a": write_adapter(tmp_path / "a", llama, 2), "huge": huge}
    prompts, samplings, expected = expected_of({"a": adapted_oracle(llama, adapters["a"]), None: oracle(llama)})
    requests = list(zip(prompts, samplings, strict=True))
    *written, broken = generate(with_adapters(llama, adapters), [*requests, (prompts[0], using("huge"))], OUTPUT_TOKENS)
    assert written == expected
    assert isinstance(broken, str)


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def setting(**fields: Any) -> Change:
    return lambda config, tensors: config.update(fields)


def replacing(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda config, tensors: tensors.update({name: change(tensors[name])})


def renaming(name: str, other: str) -> Change:
    return lambda config, tensors: tensors.update({other: tensors.pop(name)})


#: What is changed in a good adapter, and what is said of it.
REFUSED: dict[str, tuple[Change, str]] = {
    "another kind": (setting(peft_type="IA3"), "peft_type: must be LORA, is 'IA3'"),
    "dora": (setting(use_dora=True), "use_dora: is True, which is not served"),
    "saved modules": (setting(modules_to_save=["lm_head"]), r"modules_to_save: is \['lm_head'\], which is not served"),
    "an unknown field": (setting(some_way={"of": "its own"}), "some_way: is .*, which is not served"),
    "biases": (setting(bias="all"), "bias: must be none, is 'all'"),
    "turned weights": (setting(fan_in_fan_out=True), "fan_in_fan_out: must be false"),
    "a changed base": (setting(init_lora_weights="pissa"), "init_lora_weights: is 'pissa', which changes the base model"),
    "no rank": (setting(r=0), "r: must be a whole number of 1 or more, is 0"),
    "another rank": (setting(r=5), rf"{FIRST}\.lora_A\.weight must have shape \(5, 128\), has \(4, 128\)"),
    "a high rank": (setting(r=65), "has rank 65; adapter_rank_max of its model is 64"),
    "a pattern": (setting(rank_pattern={"(": 3}), r"rank_pattern\.\(: is no regular expression"),
    "another width": (
        replacing(f"{FIRST}.lora_B.weight", lambda tensor: tensor[1:].clone()),
        rf"{FIRST}\.lora_B\.weight must have shape \(128, 4\), has \(127, 4\)",
    ),
    "another type": (replacing(f"{FIRST}.lora_A.weight", lambda tensor: tensor.double()), "must be F32, BF16 or F16"),
    "no number": (replacing(f"{FIRST}.lora_B.weight", lambda tensor: tensor / 0), "a value that is no finite number"),
    "a half": (lambda config, tensors: tensors.__delitem__(f"{FIRST}.lora_B.weight"), r"lora_B\.weight is missing"),
    "another product": (
        renaming(f"{FIRST}.lora_A.weight", "base_model.model.lm_head.lora_A.weight"),
        r"2 tensors change what cannot be adapted: base_model\.model\.lm_head\.lora_A\.weight, .*What can are q_proj",
    ),
    "embeddings": (
        renaming(f"{FIRST}.lora_A.weight", "base_model.model.model.embed_tokens.lora_embedding_A"),
        "lora_embedding_A",
    ),
    "nothing": (lambda config, tensors: tensors.clear(), "has no tensors"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_would_be_served_wrong_is_refused(tmp_path: Path, llama: Path, case: str) -> None:
    change, problem = REFUSED[case]
    adapter = write_adapter(tmp_path / "a", llama, 1)
    config, tensors = json.loads((adapter / "adapter_config.json").read_text()), load_file(adapter / "adapter_model.safetensors")
    change(config, tensors)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=problem):
        with_adapters(llama, {"a": adapter})


def test_experts_are_not_adapted(tmp_path: Path) -> None:
    path = tmp_path / "moe"
    create_checkpoint(path, "qwen3_moe", 11, layers=1)
    with pytest.raises(CheckpointError, match=r"change what cannot be adapted: .*experts"):
        with_adapters(path, {"a": write_adapter(tmp_path / "a", path, 1, FFN)})


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_that_are_missing_or_torn_are_named(tmp_path: Path, llama: Path, name: str) -> None:
    adapter = write_adapter(tmp_path / "a", llama, 1)
    (adapter / name).write_bytes(b"{")
    with pytest.raises(CheckpointError, match=name):
        with_adapters(llama, {"a": adapter})
    (adapter / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        with_adapters(llama, {"a": adapter})
    with pytest.raises(CheckpointError, match=name):
        adapter_fingerprint("model", adapter)


def test_a_fingerprint_is_that_of_the_contents(tmp_path: Path, llama: Path) -> None:
    adapter, copy, other = (write_adapter(tmp_path / name, llama, seed) for name, seed in (("a", 1), ("copy", 1), ("b", 2)))
    assert adapter_fingerprint("model", adapter) == adapter_fingerprint("model", copy)
    assert adapter_fingerprint("model", adapter) != adapter_fingerprint("model", other)
    assert adapter_fingerprint("model", adapter) != adapter_fingerprint("another", adapter)
    config = copy / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 5'))
    assert adapter_fingerprint("model", adapter) != adapter_fingerprint("model", copy)
    weights = adapter / "adapter_model.safetensors"
    before = adapter_fingerprint("model", adapter)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    assert adapter_fingerprint("model", adapter) != before
