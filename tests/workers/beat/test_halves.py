"""A beat over two halves: the same tokens, FFN ranks in processes of their own, and an end of one is the engine's end."""

import queue
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.core.commands import Slice
from orchestrator.core.config import BeatConfig, ConfigError, PoolConfig, SplitConfig
from orchestrator.core.types import BlockId, RequestId
from tests.oracle import oracle
from tests.workers.beat.beating import SLOTS, beat_engine, lpx_pool
from tests.workers.beat.test_beat_identity import OUTPUT_TOKENS, decode
from tests.workers.conductor import GREEDY, engine_of, prompts_of, without_ties
from workers.engines.base import EngineLost, SplitPlaces
from workers.engines.checkpoint import create_checkpoint
from workers.ranks import BeatFfnServer, open_rank

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

#: Seconds in which a process that ends is seen to; and of a beat, many times what a step takes where others want the processors.
END_S, BEAT_S = 20.0, 0.6


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    create_checkpoint(tmp_path / "model", "qwen3_moe", 7, layers=2)
    return tmp_path / "model"


def split_pool(ffn: int, beat: BeatConfig | None = None, device: str = "cpu") -> PoolConfig:
    split = SplitConfig(ffn=ffn, imbalance_max=0.0, threads=1)
    return lpx_pool(split=split, beat=beat, device=device)


@contextmanager
def ranks_of(path: Path, pool: PoolConfig, ended: "queue.Queue[BaseException] | None" = None) -> Iterator[list[BeatFfnServer]]:
    """Have a group's FFN ranks serve, each in a process of its own; `ended` is told of those that end before the group does."""
    assert pool.split is not None
    tell = (ended or queue.Queue()).put
    ranks: list[BeatFfnServer] = []
    try:
        for rank in range(pool.split.ffn):
            server = open_rank(pool, path, rank, tell)
            assert isinstance(server, BeatFfnServer)
            ranks.append(server)
        yield ranks
    finally:
        for server in ranks:
            server._child.end()


def places_of(ranks: list[BeatFfnServer]) -> SplitPlaces:
    return SplitPlaces(tuple(rank.address for rank in ranks), microbatches=2)


@pytest.mark.parametrize(("family", "ffn"), [("llama", 2), ("qwen3_moe", 1), ("deepseek_v3", 2)])
def test_tokens_are_those_of_transformers(family: str, ffn: int, tmp_path: Path) -> None:
    path = tmp_path / family
    create_checkpoint(path, family, 11)
    lengths = [1 + (37 * number) % 300 for number in range(10)]
    prompts, expected = without_ties(oracle(path), prompts_of(5, lengths), OUTPUT_TOKENS)
    with ranks_of(path, split_pool(ffn)) as ranks:
        target = beat_engine(path, BEAT_S, places=places_of(ranks))
        try:
            assert decode(engine_of(path), target, prompts, OUTPUT_TOKENS) == expected
            counts, halves = target.beats, target.halves
        finally:
            target.close()
    assert counts is not None
    assert counts.beats > len(prompts) * OUTPUT_TOKENS / SLOTS
    assert halves is not None
    assert min(halves.attention_s, halves.ffn_s) > 0.0
    assert halves.ffn_ranks == ffn


def test_an_engine_whose_rank_is_gone_is_lost_and_whoever_started_the_rank_hears_of_it(model_dir: Path) -> None:
    ended: queue.Queue[BaseException] = queue.Queue()
    with ranks_of(model_dir, split_pool(2), ended) as ranks:
        engine = beat_engine(model_dir, BEAT_S, places=places_of(ranks))
        engine.add(RequestId(1), array("I", [1, 2]), GREEDY)
        [output] = engine.step([Slice(RequestId(1), 0, 2, 0, (BlockId(0),), True)])
        assert len(output.tokens) == 1
        ranks[0]._child.process.kill()
        with pytest.raises(EngineLost, match=r"the process that keeps the beat .* is lost: exit code 1"):
            engine.step([Slice(RequestId(1), 2, 1, 0, (), True)])
        assert "the process of FFN rank 0" in str(ended.get(timeout=END_S))
        engine.close()


def test_a_rank_ends_with_whoever_started_it(model_dir: Path) -> None:
    with ranks_of(model_dir, split_pool(1)) as ranks:
        process = ranks[0]._child.process
    assert process.returncode == 0


def test_cores_that_are_not_there_and_other_devices_are_refused(model_dir: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"pools\.lpx\.beat\.ffn_cores: must be cores that this process may run on, .*\[9999\]"),
        ranks_of(model_dir, split_pool(1, beat=BeatConfig(ffn_cores=(9999,)))),
    ):
        pass
    with (
        pytest.raises(ConfigError, match=r"pools\.lpx\.engine\.device: must be auto or cpu, is 'cuda'"),
        ranks_of(model_dir, split_pool(1, device="cuda")),
    ):
        pass


def test_ranks_that_are_not_there_are_an_error_at_start(model_dir: Path) -> None:
    with pytest.raises(RuntimeError, match=r"RankLost: FFN rank .*nobody.* does not take a connection"):
        beat_engine(model_dir, places=SplitPlaces(("nobody",)))


def test_rows_go_to_the_experts_that_are_tried(model_dir: Path) -> None:
    with ranks_of(model_dir, split_pool(2)) as ranks:
        engine = engine_of(model_dir, split=places_of(ranks))
        assert engine.split is not None
        engine.add(RequestId(1), array("I", range(40)), GREEDY)
        tried = (1, 4, 6)
        with engine.routed(tried):
            engine.step([Slice(RequestId(1), 0, 33, 0, (BlockId(0), BlockId(1), BlockId(2)), False)])
        first, *_ = engine.split.take_picks()
        assert {expert for expert, count in enumerate(first) if count} == set(tried)
        assert max(first) - min(first[expert] for expert in tried) <= 1
        engine.step([Slice(RequestId(1), 33, 7, 2, (BlockId(2),), False)])
        first, *_ = engine.split.take_picks()
        assert {expert for expert, count in enumerate(first) if count} != set(tried)
        engine.close()
