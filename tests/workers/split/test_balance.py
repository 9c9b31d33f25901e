"""Experts that are asked for most spread over FFN ranks while tokens are written, and those stay the tokens of one process."""

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.core.experts import ExpertBalancer, imbalance
from tests.workers.conductor import Conductor, engine_of, prompts_of
from tests.workers.split.test_split_identity import attention_of, ranks_of
from workers.engines.checkpoint import create_checkpoint
from workers.engines.shape import read_architecture
from workers.engines.split.places import first_placements, slots_of

RANKS, SPARE, EXPERTS, LAYERS = 4, 2, 32, 3
#: The last one sees only rows that are sampled, too few here to tell its load.
LOADED = range(LAYERS - 1)


def skewed(folder: Path) -> Path:
    """Make a model whose rows pick experts of the first rank alone: of each two with opposite weights one is always far ahead."""
    path = folder / "model"
    create_checkpoint(path, "qwen3_moe", 31, layers=LAYERS, experts=EXPERTS, experts_per_token=4)
    tensors = load_file(path / "model.safetensors")
    for layer in range(LAYERS):
        gate = tensors[f"model.layers.{layer}.mlp.gate.weight"]
        for first in range(0, EXPERTS, 2 * RANKS):
            gate[first] *= 20
            gate[first + RANKS] = -gate[first]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_a_skewed_load_is_levelled_while_tokens_are_written(tmp_path: Path) -> None:
    path = skewed(tmp_path)
    shape, prompts = read_architecture(path), prompts_of(5, [120, 90, 150, 200])
    expected = Conductor(engine_of(path), engine_of(path), seed=1).run(prompts, 16, 4)
    placements = dict(first_placements(shape, RANKS, SPARE))
    balancer = ExpertBalancer(placements, slots_of(EXPERTS, RANKS, SPARE), imbalance_max=0.05)
    found: list[list[list[int]]] = []
    with ranks_of(path, RANKS, SPARE) as ranks:
        engine = attention_of(path, ranks, SPARE)
        assert engine.split is not None
        Conductor(engine, engine_of(path), seed=2).run(prompts, 16, 4)
        picks = engine.split.take_picks()
        before = [imbalance(picks[layer], placements[layer]) for layer in LOADED]
        balancer.observe(picks)

        def write() -> None:
            found.append(Conductor(engine, engine_of(path), seed=3).run(prompts, 16, 4))

        writing = threading.Thread(target=write)
        writing.start()
        while (move := balancer.next_move()) is not None:
            for rank in ranks:
                rank.prepare(move.layer, move.version, move.placement)
            engine.split.use(move.layer, move.version, move.placement)
            balancer.moved(move)
            placements[move.layer] = move.placement
        writing.join()
        engine.split.take_picks()
        found.append(Conductor(engine, engine_of(path), seed=4).run(prompts, 16, 4))
        picks = engine.split.take_picks()
        engine.close()
    assert found == [expected, expected]
    assert min(before) > 1.5
    assert max(imbalance(picks[layer], placements[layer]) for layer in LOADED) < 0.15
