"""Attention and FFN apart write the same tokens as `transformers`, whatever the ranks, copies of experts and micro-batches."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from orchestrator.core.config import AdapterConfig, ModelConfig, SpeculationConfig
from orchestrator.core.types import AdapterName, Sampling
from orchestrator.profiles.fields import CheckpointError
from orchestrator.wire.trust import Trust
from tests.adapters import ATTENTION, SHARED_EXPERTS, merge, write_adapter
from tests.oracle import oracle
from tests.quantised import write_quantised
from tests.workers.conductor import Conductor, engine_of, prompts_of, without_ties
from workers.engines.base import NetworkPlace, SplitPlaces
from workers.engines.checkpoint import FAMILIES, create_checkpoint
from workers.engines.eager import EagerEngine
from workers.engines.split.lanes import RankLost
from workers.engines.split.rank import FfnRank


@contextmanager
def ranks_of(path: Path, count: int, spare_slots: int = 0, trust: Trust | None = None) -> Iterator[list[FfnRank]]:
    """Have FFN ranks serve, each in a thread of its own; with `trust` over the network as well."""
    network = NetworkPlace("127.0.0.1", trust) if trust is not None else None
    ranks = [FfnRank(path, "float32", "cpu", rank, count, spare_slots, network=network) for rank in range(count)]
    threads = [threading.Thread(target=rank.serve) for rank in ranks]
    for thread in threads:
        thread.start()
    try:
        yield ranks
    finally:
        for rank, thread in zip(ranks, threads, strict=True):
            rank.close()
            thread.join()


def attention_of(
    path: Path,
    ranks: list[FfnRank],
    spare_slots: int = 0,
    microbatches: int = 0,
    model: ModelConfig | None = None,
    speculation: SpeculationConfig | None = None,
) -> EagerEngine:
    places = SplitPlaces(tuple(rank.address for rank in ranks), spare_slots, microbatches)
    return engine_of(path, split=places, model=model, speculation=speculation)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("ffn", "spare", "microbatches"), [(1, 0, 1), (2, 0, 2), (3, 2, 0)])
def test_tokens_are_those_of_transformers(tmp_path: Path, family: str, ffn: int, spare: int, microbatches: int) -> None:
    path = tmp_path / "model"
    create_checkpoint(path, family, 11, layers=2)
    prompts, expected = without_ties(oracle(path), prompts_of(1, [1, 15, 16, 17, 90, 201]), 12)
    with ranks_of(path, ffn, spare) as ranks:
        engine, donor = attention_of(path, ranks, spare, microbatches), engine_of(path)
        assert Conductor(engine, donor, seed=4).run(prompts, 12, 4) == expected
        assert engine.split is not None
        load = engine.split.load
        assert engine.split.times.rows > 0
        assert min(load.attention_s, load.ffn_s) > 0.0
        assert load.ffn_ranks == ffn
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "targets"), [("qwen3", ATTENTION), ("qwen3_moe", ATTENTION), ("deepseek_v3", SHARED_EXPERTS)])
def test_attention_ranks_compute_adapters_of_what_is_theirs(tmp_path: Path, family: str, targets: tuple[str, ...]) -> None:
    path = tmp_path / "model"
    create_checkpoint(path, family, 11, layers=2)
    adapter = write_adapter(tmp_path / "a", path, 1, targets)
    model = ModelConfig(adapters={"a": AdapterConfig(str(adapter))})
    plain, plain_tokens = without_ties(oracle(path), prompts_of(1, [1, 17, 90, 201]), 12)
    # PEFT takes an adapter of DeepSeek-V3's shared experts for one of all its experts.
    merged = oracle(merge(path, adapter, tmp_path / "merged"))
    adapted, adapted_tokens = without_ties(merged, prompts_of(1, [1, 17, 90, 201]), 12)
    assert adapted_tokens != plain_tokens
    samplings = [Sampling()] * len(plain) + [Sampling(adapter=AdapterName("a"))] * len(adapted)
    with ranks_of(path, 2) as ranks:
        engine = attention_of(path, ranks, microbatches=2, model=model)
        conductor = Conductor(engine, engine_of(path, model=model), seed=4)
        assert conductor.run(plain + adapted, 12, 5, samplings=samplings) == plain_tokens + adapted_tokens
        engine.close()


def test_adapters_of_what_ffn_ranks_compute_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    create_checkpoint(path, "llama", 11, layers=1)
    model = ModelConfig(adapters={"a": AdapterConfig(str(write_adapter(tmp_path / "a", path, 1)))})
    with ranks_of(path, 1) as ranks, pytest.raises(CheckpointError, match=r"6 tensors change .*mlp.*that a node computes itself"):
        attention_of(path, ranks, model=model)


@pytest.mark.parametrize(
    ("way", "family", "ffn"),
    [("modelopt-nvfp4", "qwen3_moe", 2), ("deepseek-fp8", "deepseek_v3", 2), ("compressed-nvfp4", "llama", 3)],
)
def test_quantised_weights_are_spread_as_others_are(tmp_path: Path, way: str, family: str, ffn: int) -> None:
    quantised, meant = write_quantised(tmp_path, way, family, layers=2)
    prompts, expected = without_ties(oracle(meant), prompts_of(1, [1, 17, 40]), 8)
    with ranks_of(quantised, ffn) as ranks:
        engine, donor = attention_of(quantised, ranks), engine_of(quantised)
        assert Conductor(engine, donor, seed=4).run(prompts, 8, 3) == expected
        engine.close()


def test_attention_ranks_share_ffn_ranks(tmp_path: Path) -> None:
    path = tmp_path / "model"
    create_checkpoint(path, "qwen3_moe", 12, layers=2)
    prompts, expected = without_ties(oracle(path), prompts_of(2, [30, 31, 32, 33]), 12)
    found: dict[int, list[list[int]]] = {}
    with ranks_of(path, 2) as ranks:
        engines = [attention_of(path, ranks) for _ in range(2)]

        def run(number: int) -> None:
            found[number] = Conductor(engines[number], engine_of(path), seed=number).run(prompts, 12, 4)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for engine in engines:
            engine.close()
    assert found == {0: expected, 1: expected}


def test_experts_move_while_tokens_are_written(tmp_path: Path) -> None:
    path = tmp_path / "model"
    create_checkpoint(path, "qwen3_moe", 13, layers=2)
    prompts, expected = without_ties(oracle(path), prompts_of(3, [40, 50]), 12)
    with ranks_of(path, 2, 1) as ranks:
        engine = attention_of(path, ranks, 1)
        assert engine.split is not None
        for version, placement in enumerate((((0, 1, 2, 3, 4), (3, 4, 5, 6, 7)), ((7, 6, 5, 0, 1), (0, 1, 2, 3, 4))), start=1):
            for layer in range(2):
                for rank in ranks:
                    rank.prepare(layer, version, placement)
                engine.split.use(layer, version, placement)
            assert Conductor(engine, engine_of(path), seed=version).run(prompts, 12, 2) == expected
        assert sum(map(sum, engine.split.take_picks())) > 0
        assert sum(map(sum, engine.split.take_picks())) == 0
        engine.close()


def test_a_rank_that_ends_ends_the_step(tmp_path: Path) -> None:
    path = tmp_path / "model"
    create_checkpoint(path, "llama", 14, layers=1)
    with ranks_of(path, 1) as ranks:
        engine = attention_of(path, ranks)
    with pytest.raises(RankLost, match=r"is gone|has ended"):
        Conductor(engine, engine_of(path), seed=1).run(prompts_of(1, [5]), 2, 1)
    engine.close()
    with pytest.raises(RankLost, match="does not take a connection"):
        attention_of(path, ranks)


def test_a_rank_of_another_model_is_refused(tmp_path: Path) -> None:
    create_checkpoint(tmp_path / "one", "llama", 14, layers=1)
    create_checkpoint(tmp_path / "other", "llama", 14, layers=1, hidden=64)
    with (
        ranks_of(tmp_path / "one", 1) as ranks,
        pytest.raises(RankLost, match=r"refuses the connection: its rows are .*64.*, here they are .*128"),
    ):
        attention_of(tmp_path / "other", ranks)
