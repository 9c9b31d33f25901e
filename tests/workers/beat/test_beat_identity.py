"""What keeps a beat writes the tokens of `transformers`, from KV that another engine computed, whoever comes and goes beside."""

import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.core.commands import Slice
from orchestrator.core.config import BeatConfig, ConfigError
from orchestrator.core.types import BlockId, RequestId
from tests.oracle import oracle
from tests.workers.beat.beating import BEAT_S, BLOCK_TOKENS, SLOTS, beat_engine
from tests.workers.conductor import GREEDY, engine_of, prompts_of, without_ties
from workers.engines.base import Engine, EngineLost
from workers.engines.beat.engine import BeatEngine
from workers.engines.checkpoint import create_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FAMILIES = ("llama", "qwen3", "qwen3_moe", "deepseek_v3")
PROMPTS, OUTPUT_TOKENS = 20, 12


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    create_checkpoint(tmp_path / "model", "qwen3", 7, layers=2)
    return tmp_path / "model"


@pytest.fixture
def beating(model_dir: Path) -> Iterator[BeatEngine]:
    engine = beat_engine(model_dir)
    yield engine
    engine.close()


class _Slot:
    """A sequence whose prompt is complete but for its last token."""

    def __init__(self, prompt: list[int]) -> None:
        self.request = RequestId(0)
        self.prompt = prompt
        self.output: list[int] = []
        self.blocks: tuple[BlockId, ...] = ()

    @property
    def next_slice(self) -> Slice:
        told = () if self.output else self.blocks
        return Slice(self.request, len(self.prompt) + len(self.output) - 1, 1, 0, told, True)


def bring(source: Engine, target: BeatEngine, slot: _Slot) -> None:
    """Have one engine compute a prompt but for its last token, and copy the blocks into the other's pool."""
    computed = len(slot.prompt) - 1
    places = tuple(BlockId(place) for place in range(-(-computed // BLOCK_TOKENS)))
    if computed:
        source.add(RequestId(0), array("I", slot.prompt), GREEDY)
        source.step([Slice(RequestId(0), 0, computed, 0, places, False)])
        source.forget(RequestId(0))
        slabs = memoryview(bytearray(len(places) * source.description.block_bytes))
        source.read_blocks(places, slabs)
        target.write_blocks(slot.blocks[: len(places)], slabs)
    target.add(slot.request, array("I", slot.prompt), GREEDY)


def decode(source: Engine, target: BeatEngine, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Return `count` tokens of each prompt; two come at a beat as long as there are slots."""
    waiting = [_Slot(prompt) for prompt in prompts]
    everybody, slots = list(waiting), list[_Slot]()
    free = [BlockId(block) for block in range(target.description.blocks)]
    for number, slot in enumerate(waiting):
        slot.request = RequestId(number)
    while waiting or slots:
        while waiting and len(slots) < SLOTS and sum(not slot.output for slot in slots) < 2:
            new = waiting.pop(0)
            needed = -(-(len(new.prompt) + count) // BLOCK_TOKENS)
            new.blocks, free = tuple(free[:needed]), free[needed:]
            bring(source, target, new)
            slots.append(new)
        for slot, output in zip(slots, target.step([slot.next_slice for slot in slots]), strict=True):
            assert output.failure is None
            slot.output += output.tokens
        for slot in [slot for slot in slots if len(slot.output) == count]:
            target.forget(slot.request)
            free += slot.blocks
            slots.remove(slot)
    return [slot.output for slot in everybody]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    path = tmp_path / family
    create_checkpoint(path, family, 11)
    lengths = [1 + (37 * number) % 300 for number in range(PROMPTS)]
    prompts, expected = without_ties(oracle(path), prompts_of(5, lengths), OUTPUT_TOKENS)
    target = beat_engine(path)
    try:
        assert decode(engine_of(path), target, prompts, OUTPUT_TOKENS) == expected
        counts = target.beats
        assert counts is not None
        assert counts.beats > len(prompts) * OUTPUT_TOKENS / SLOTS
    finally:
        target.close()


def test_a_beat_that_cannot_be_kept_is_refused_with_what_would_be(model_dir: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        beat_engine(model_dir, beat_s=1e-6)
    assert refused.value.where == "pools.lpx.profile.beat_s"
    assert "a step of 8 sequences of 1024 tokens takes" in refused.value.problem


def test_cores_that_are_not_there_are_refused(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"pools\.lpx\.beat\.cores: must be cores that this process may run on, .*\[9999\]"):
        beat_engine(model_dir, beat=BeatConfig(cores=(9999,)))


def test_another_device_is_refused(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"pools\.lpx\.engine\.device: must be auto or cpu, is 'cuda'"):
        beat_engine(model_dir, device="cuda")


def test_a_checkpoint_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"config\.json"):
        beat_engine(tmp_path)


def test_an_engine_whose_process_is_gone_is_lost(beating: BeatEngine) -> None:
    beating.add(RequestId(1), array("I", [1, 2]), GREEDY)
    beating._child.process.kill()
    with pytest.raises(EngineLost, match="is lost: exit code -9"):
        beating.step([Slice(RequestId(1), 0, 2, 0, (BlockId(0),), True)])
    with pytest.raises(EngineLost):
        beating.step([Slice(RequestId(1), 0, 2, 0, (BlockId(0),), True)])


def test_a_step_that_fails_is_told_and_the_next_one_goes_on(beating: BeatEngine) -> None:
    beating.add(RequestId(1), array("I", [1, 2]), GREEDY)
    with pytest.raises(Exception, match="KeyError"):
        beating.step([Slice(RequestId(7), 0, 2, 0, (BlockId(0),), True)])
    [output] = beating.step([Slice(RequestId(1), 0, 2, 0, (BlockId(0),), True)])
    assert len(output.tokens) == 1


def test_steps_are_a_beat_apart(beating: BeatEngine) -> None:
    beating.add(RequestId(1), array("I", [1, 2]), GREEDY)
    began = time.monotonic()
    for place, told in ((0, (BlockId(0),)), (1, ()), (2, ())):
        beating.step([Slice(RequestId(1), place, 1, 0, told, place > 0)])
    # The first may have begun late in its beat.
    assert time.monotonic() - began > BEAT_S
    assert beating.beats is not None
    assert beating.beats.beats == 3
