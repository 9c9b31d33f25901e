"""What every engine promises its node, checked on each of them."""

import gc
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from mmap import mmap
from pathlib import Path
from types import FunctionType, ModuleType

import numpy as np
import pytest
import torch

from orchestrator.core.commands import Slice
from orchestrator.core.config import EngineConfig, KvFormat, SpeculationConfig, SpeculationMethod
from orchestrator.core.types import BlockId, CostProfile, RequestId, Sampling
from tests.workers.beat.beating import beat_engine
from workers.engines.base import Engine, SliceOutput, broken_promise
from workers.engines.beat.engine import BeatEngine
from workers.engines.checkpoint import create_checkpoint
from workers.engines.eager import EagerEngine
from workers.engines.profiled import ProfiledEngine

BLOCK_TOKENS = 16
BLOCKS = 96
GREEDY = Sampling()


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of both kinds of attention."""
    torch.set_num_threads(1)
    found: dict[str, Path] = {}
    for family in ("qwen3", "deepseek_v3"):
        found[family] = tmp_path_factory.mktemp(family)
        create_checkpoint(found[family], family, 7, layers=2, hidden=64, intermediate=96)
    return found


Make = Callable[..., Engine]


@pytest.fixture(params=["eager", "eager-latent", "profiled", pytest.param("beat", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model_dir(kind: str, model_dirs: dict[str, Path]) -> Path:
    return model_dirs["deepseek_v3" if kind == "eager-latent" else "qwen3"]


@pytest.fixture
def make(kind: str, model_dir: Path) -> Iterator[Make]:
    """Makes engines of one kind over the same checkpoint."""
    processes: list[BeatEngine] = []

    def open_engine(stored: KvFormat = KvFormat.PLAIN) -> Engine:
        sizes = {"block_tokens": BLOCK_TOKENS, "blocks": BLOCKS}
        if kind == "beat":
            processes.append(beat_engine(model_dir, kv_format_stored=stored, blocks=BLOCKS))
            return processes[-1]
        name = kind.partition("-")[0]
        config = EngineConfig(name=name, device="cpu", dtype="float32", kv_format_stored=stored, **sizes)
        if name == "eager":
            return EagerEngine(model_dir, config, sequences_max=8, step_tokens_max=256)
        return ProfiledEngine(model_dir, config, CostProfile())

    yield open_engine
    for process in processes:
        with suppress(AttributeError):  # a test may have closed it
            process.close()


@pytest.fixture
def engine(make: Make) -> Engine:
    return make()


def prompt(seed: int, count: int) -> "array[int]":
    source = random.Random(seed)
    return array("I", [source.randrange(500) for _ in range(count)])


def blocks_for(tokens: int, first: int = 0) -> tuple[BlockId, ...]:
    return tuple(BlockId(first + index) for index in range(-(-tokens // BLOCK_TOKENS)))


def prefill(engine: Engine, request: int, count: int, blocks: Sequence[BlockId], chunk: int, start: int = 0) -> SliceOutput:
    """Compute tokens [start, count) in chunks; the last one samples. All blocks are told with the first slice."""
    places = list(range(start, count, chunk))
    output = SliceOutput()
    for place in places:
        size = min(chunk, count - place)
        told = tuple(blocks) if place == start else ()
        [output] = engine.step([Slice(RequestId(request), place, size, 0, told, place + size == count)])
    return output


def generate(
    engine: Engine,
    request: int,
    tokens: "array[int]",
    count: int,
    sampling: Sampling = GREEDY,
    chunk: int = 256,
    first: int = 0,
) -> list[int]:
    """Return `count` tokens, or fewer if the sequence stops; forgets the request."""
    engine.add(RequestId(request), tokens, sampling)
    output = prefill(engine, request, len(tokens), blocks_for(len(tokens) + count, first), chunk)
    found = list(output.tokens)
    while len(found) < count and not output.stopped:
        [output] = engine.step([Slice(RequestId(request), len(tokens) + len(found) - 1, 1, 0, (), True)])
        found.extend(output.tokens)
    engine.forget(RequestId(request))
    return found


def test_description_agrees_with_configuration(engine: Engine) -> None:
    known = engine.description
    assert (known.blocks, known.block_tokens, known.vocabulary) == (BLOCKS, BLOCK_TOKENS, 512)
    assert known.block_bytes > 0
    assert known.context_tokens_max >= 131072 or isinstance(engine, BeatEngine)
    assert known.computes != isinstance(engine, ProfiledEngine)
    assert (engine.beats is not None) == isinstance(engine, BeatEngine)
    assert engine.pool is not None
    assert engine.pool.nbytes >= known.blocks * known.block_bytes


def test_fingerprint_is_the_same_for_all_engines_of_a_model(make: Make) -> None:
    assert make().description.fingerprint == make().description.fingerprint


def test_output_does_not_depend_on_chunks(engine: Engine) -> None:
    tokens = prompt(1, 75)
    expected = generate(engine, 1, tokens, 12)
    for chunk in (1, 7, BLOCK_TOKENS, 33):
        assert generate(engine, 1, tokens, 12, chunk=chunk) == expected


def test_output_does_not_depend_on_the_batch(engine: Engine) -> None:
    prompts = [prompt(seed, length) for seed, length in enumerate((1, 16, 40, 75, 3))]
    alone = [generate(engine, 1, tokens, 8) for tokens in prompts]
    for request, tokens in enumerate(prompts):
        engine.add(RequestId(request), tokens, GREEDY)
    found: list[list[int]] = [[] for _ in prompts]
    # Each sequence starts one step after the one before it, so that prompts and decodes meet in a step.
    for step in range(len(prompts) + 8):
        slices = [
            Slice(RequestId(request), 0, len(tokens), 0, blocks_for(len(tokens) + 8, request * 6), True)
            if step == request
            else Slice(RequestId(request), len(tokens) + len(found[request]) - 1, 1, 0, (), True)
            for request, tokens in enumerate(prompts)
            if request <= step and len(found[request]) < 8
        ]
        for piece, output in zip(slices, engine.step(slices), strict=True):
            found[piece.request].extend(output.tokens)
    assert found == alone


def test_slices_that_do_not_sample_bring_nothing(engine: Engine) -> None:
    engine.add(RequestId(1), prompt(1, 20), GREEDY)
    assert engine.step([Slice(RequestId(1), 0, 10, 0, blocks_for(20), False)]) == [SliceOutput()]


def generate_drafted(engine: Engine, request: int, tokens: "array[int]", count: int, draft_max: int) -> tuple[list[int], int]:
    """Return `count` tokens of which up to `draft_max` may be drafted in each step, and the steps that they took."""
    engine.add(RequestId(request), tokens, GREEDY)
    found = list(prefill(engine, request, len(tokens), blocks_for(len(tokens) + count), 256).tokens)
    steps = 0
    while len(found) < count:
        most = min(draft_max, count - len(found) - 1)
        part = Slice(RequestId(request), len(tokens) + len(found) - 1, 1, 0, (), True, most)
        [output] = engine.step([part])
        assert broken_promise(engine, part, output) is None
        found.extend(output.tokens)
        steps += 1
    engine.forget(RequestId(request))
    return found, steps


@pytest.mark.parametrize("draft_max", [1, 8])
def test_drafts_change_no_token_and_save_steps(engine: Engine, draft_max: int) -> None:
    saved = 0
    for tokens in (array("I", [7] * 24), prompt(1, 40), array("I", [*prompt(2, 20), *prompt(2, 20)])):
        expected = generate(engine, 1, tokens, 60)
        found, steps = generate_drafted(engine, 2, tokens, 60, draft_max)
        assert found == expected
        saved += 59 - steps
    assert saved > 0  # even a random model's text repeats itself here and there, which is what can be guessed


def test_blocks_hold_the_same_whether_tokens_were_drafted_or_not(engine: Engine) -> None:
    tokens, size = prompt(5, 20), engine.description.block_bytes
    slabs: list[bytes] = []
    for draft_max in (0, 5):
        generate_drafted(engine, 1, tokens, 45, draft_max)
        into = memoryview(bytearray(4 * size))
        engine.read_blocks(blocks_for(64), into)
        slabs.append(bytes(into))
    plain, drafted = (
        np.frombuffer(data, dtype=np.uint8 if engine.description.device == "none" else np.float32) for data in slabs
    )
    assert np.allclose(plain, drafted, rtol=0, atol=1e-5)


def test_a_slice_that_samples_brings_one_token(engine: Engine) -> None:
    engine.add(RequestId(1), array("I", [7] * 24), GREEDY)  # what repeats itself is what could be guessed several tokens ahead
    places = [(0, 10, False), (10, 14, True), *((24 + step, 1, True) for step in range(8))]
    for start, count, sample in places:
        part = Slice(RequestId(1), start, count, 0, blocks_for(32) if start == 0 else (), sample)
        [output] = engine.step([part])
        assert broken_promise(engine, part, output) is None


@pytest.mark.parametrize(("sample", "tokens"), [(True, (1, 2, 3)), (True, ()), (False, (1,))])
def test_canary_another_number_of_tokens_is_named(engine: Engine, sample: bool, tokens: tuple[int, ...]) -> None:
    problem = broken_promise(engine, Slice(RequestId(1), 5, 10, 0, (), sample), SliceOutput(tokens))
    slice_ = "request 1, tokens 5 to 15"
    must = int(sample)
    assert problem == f"{type(engine).__name__} brought {len(tokens)} tokens for a slice ({slice_}); it must bring {must}"
    assert broken_promise(engine, Slice(RequestId(1), 5, 10, 0, (), sample), SliceOutput(failure="no number")) is None


@pytest.mark.parametrize(
    ("tokens", "drafted", "problem"),
    [
        ((1,), 0, None),
        ((1,), 2, None),
        ((1, 2, 3), 2, None),
        ((), 2, "0 tokens and 2 drafted"),
        ((1, 2), 0, "2 tokens"),
        ((1, 2, 3, 4), 2, "4 tokens and 2 drafted"),
        ((1, 2), 3, "2 tokens and 3 drafted"),
    ],
)
def test_canary_more_than_what_was_drafted_right_is_named(
    engine: Engine, tokens: tuple[int, ...], drafted: int, problem: str | None
) -> None:
    named = broken_promise(engine, Slice(RequestId(1), 5, 1, 0, (), True, 2), SliceOutput(tokens, drafted=drafted))
    place = "for a slice (request 1, tokens 5 to 6); it must bring 1 to 3"
    assert named == (problem and f"{type(engine).__name__} brought {problem} {place}")


def test_a_preempted_sequence_continues_as_if_nothing_had_happened(engine: Engine) -> None:
    tokens = prompt(2, 30)
    expected = generate(engine, 1, tokens, 12)
    engine.add(RequestId(2), tokens, GREEDY)
    found = list(prefill(engine, 2, 30, blocks_for(42), 256).tokens)
    while len(found) < 5:
        found.extend(engine.step([Slice(RequestId(2), 29 + len(found), 1, 0, (), True)])[0].tokens)
    # Another sequence takes its blocks; it starts over from block 0 elsewhere, prompt and output in chunks.
    generate(engine, 3, prompt(3, 40), 2)
    found.extend(prefill(engine, 2, 30 + len(found), blocks_for(42, first=40), 11).tokens)
    while len(found) < 12:
        found.extend(engine.step([Slice(RequestId(2), 29 + len(found), 1, 0, (), True)])[0].tokens)
    assert found == expected


def test_blocks_told_later_extend_the_table(engine: Engine) -> None:
    tokens = prompt(4, 40)
    expected = generate(engine, 1, tokens, 1)
    engine.add(RequestId(2), tokens, GREEDY)
    engine.step([Slice(RequestId(2), 0, 16, 0, (BlockId(50),), False)])
    engine.step([Slice(RequestId(2), 16, 16, 1, (BlockId(9),), False)])
    assert list(engine.step([Slice(RequestId(2), 32, 8, 2, (BlockId(70),), True)])[0].tokens) == expected


def test_exported_blocks_work_in_another_engine(make: Make) -> None:
    source, target = make(), make()
    tokens = prompt(5, 75)
    expected = generate(source, 1, tokens, 6)
    # The last block is part filled: 64 + 8 of the 75 tokens go across, the rest is computed there.
    exported = bytearray(5 * source.description.block_bytes)
    source.read_blocks(blocks_for(75), memoryview(exported))
    imported = tuple(BlockId(block) for block in (80, 3, 41, 17, 62, 63))
    target.write_blocks(imported[:5], memoryview(bytes(exported)))
    again = bytearray(len(exported))
    target.read_blocks(imported[:5], memoryview(again))
    assert again == exported
    target.add(RequestId(9), tokens, GREEDY)
    found = list(prefill(target, 9, 75, imported, 256, start=72).tokens)
    while len(found) < 6:
        found.extend(target.step([Slice(RequestId(9), 74 + len(found), 1, 0, (), True)])[0].tokens)
    assert found == expected


def test_a_plain_stored_form_is_the_slab(engine: Engine) -> None:
    generate(engine, 1, prompt(6, 40), 1)
    known = engine.description
    assert known.stored_bytes == known.block_bytes
    slabs, stored = bytearray(2 * known.block_bytes), bytearray(2 * known.stored_bytes)
    engine.read_blocks([BlockId(2), BlockId(0)], memoryview(slabs))
    engine.encode_blocks([BlockId(2), BlockId(0)], memoryview(stored))
    assert stored == slabs


@pytest.mark.parametrize("stored", list(KvFormat))
def test_stored_blocks_work_in_another_engine(make: Make, stored: KvFormat) -> None:
    source, target = make(stored), make(stored)
    known = source.description
    assert known.stored_layout == target.description.stored_layout
    tokens = prompt(5, 75)
    expected = generate(source, 1, tokens, 1)
    kept = bytearray(4 * known.stored_bytes)
    source.encode_blocks(blocks_for(64), memoryview(kept))
    places = tuple(BlockId(block) for block in (80, 3, 41, 17, 62, 63))
    target.decode_blocks(places[:4], memoryview(bytes(kept)))
    again = bytearray(len(kept))
    target.encode_blocks(places[:4], memoryview(again))
    third = make(stored)
    third.decode_blocks(places[:4], memoryview(again))
    target.add(RequestId(9), tokens, GREEDY)
    # One token: further ones may differ where the form is not exact, and this prompt's first is not a close call.
    assert list(prefill(target, 9, 75, places, 256, start=64).tokens) == expected
    slabs, others = bytearray(4 * known.block_bytes), bytearray(4 * known.block_bytes)
    target.read_blocks(places[:4], memoryview(slabs))
    third.read_blocks(places[:4], memoryview(others))
    if stored is KvFormat.PLAIN or isinstance(source, ProfiledEngine):
        assert slabs == others
    else:
        kinds = np.frombuffer(slabs, np.float32), np.frombuffer(others, np.float32)
        assert np.allclose(*kinds, rtol=1e-6, atol=0)


def test_compressed_forms_are_smaller_and_are_not_taken_for_each_other(make: Make) -> None:
    known = [make(stored).description for stored in (KvFormat.PLAIN, KvFormat.FP8, KvFormat.NVFP4)]
    sizes = [one.stored_bytes for one in known]
    assert sizes == sorted(set(sizes), reverse=True)
    assert len({one.stored_layout for one in known}) == 3
    assert len({one.fingerprint for one in known}) == 1


def test_the_pool_holds_what_is_exported(engine: Engine) -> None:
    generate(engine, 1, prompt(6, 40), 1)
    size = engine.description.block_bytes
    slabs = bytearray(2 * size)
    engine.read_blocks([BlockId(2), BlockId(0)], memoryview(slabs))
    assert engine.pool is not None
    assert slabs == bytes(engine.pool[2 * size : 3 * size]) + bytes(engine.pool[:size])


def test_blocks_of_different_prefixes_differ(engine: Engine) -> None:
    generate(engine, 1, prompt(7, 32), 1)
    generate(engine, 2, prompt(8, 32), 1, first=10)
    size = engine.description.block_bytes
    slabs = bytearray(4 * size)
    engine.read_blocks([BlockId(block) for block in (0, 1, 10, 11)], memoryview(slabs))
    pieces = {bytes(slabs[place * size : (place + 1) * size]) for place in range(4)}
    assert len(pieces) == 4


def test_allocated_memory_is_the_pool(kind: str, model_dir: Path) -> None:
    given: list[bytearray] = []

    def allocate(size: int) -> memoryview:
        given.append(bytearray(size))
        return memoryview(given[0])

    if kind == "beat":
        pytest.skip("its memory is that which two processes share")
    config = EngineConfig(name="eager", device="cpu", dtype="float32", block_tokens=BLOCK_TOKENS, blocks=BLOCKS)
    if kind.startswith("eager"):
        engine: Engine = EagerEngine(model_dir, config, 8, 256, allocate)
    else:
        engine = ProfiledEngine(model_dir, config, CostProfile(), allocate)
    assert len(given[0]) == engine.description.blocks * engine.description.block_bytes
    generate(engine, 1, prompt(1, 16), 1)
    assert any(given[0][: engine.description.block_bytes])


def test_forgotten_requests_leave_nothing_behind(engine: Engine) -> None:
    expected = generate(engine, 1, prompt(9, 20), 4)
    generate(engine, 1, prompt(10, 33), 4)
    assert generate(engine, 1, prompt(9, 20), 4) == expected
    engine.forget(RequestId(1))
    engine.forget(RequestId(12345))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=5),
        Sampling(temperature=0.7, top_p=0.9, top_k=40, min_p=0.01, seed=5),
        Sampling(temperature=1.3, presence_penalty=0.5, frequency_penalty=0.5, seed=2**63),
    ],
)
@pytest.mark.parametrize("company", [Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.9), GREEDY])
def test_a_seed_fixes_the_output(engine: Engine, sampling: Sampling, company: Sampling) -> None:
    tokens = prompt(11, 20)
    expected = generate(engine, 1, tokens, 10, sampling)
    assert generate(engine, 77, tokens, 10, sampling, chunk=6) == expected
    engine.add(RequestId(1), tokens, sampling)
    engine.add(RequestId(2), prompt(12, 20), company)
    found = list(prefill(engine, 1, 20, blocks_for(30), 256).tokens)
    engine.step([Slice(RequestId(2), 0, 20, 0, blocks_for(30, first=20), True)])
    for step in range(9):
        slices = [Slice(RequestId(2), 20 + step, 1, 0, (), True), Slice(RequestId(1), 20 + step, 1, 0, (), True)]
        found.extend(engine.step(slices)[1].tokens)
    assert found == expected


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        Sampling(temperature=1.0, seed=5),
        Sampling(temperature=0.9, seed=6, presence_penalty=1.5, frequency_penalty=0.5),
        Sampling(presence_penalty=0.5, frequency_penalty=1.5),
        Sampling(repetition_penalty=1.5, output_tokens_min=30, forbidden_runs=((7,), (5, 9)), allowed_token_ids=(*range(400),)),
    ],
)
def test_another_engine_goes_on_with_what_would_have_come(make: Make, sampling: Sampling) -> None:
    tokens = prompt(11, 20)
    expected = generate(make(), 1, tokens, 24, sampling)
    for count in (1, 12, 23):
        engine = make()
        given = tokens + array("I", expected[:count])
        engine.add(RequestId(7), given, sampling, count)
        found = list(prefill(engine, 7, len(given), blocks_for(44), 256).tokens)
        while count + len(found) < 24:
            [output] = engine.step([Slice(RequestId(7), len(given) + len(found) - 1, 1, 0, (), True)])
            found.extend(output.tokens)
        assert expected[:count] + found == expected


def test_a_prompt_is_scored_once_however_it_is_cut(engine: Engine) -> None:
    tokens = prompt(11, 50)
    for chunks in ((50,), (49, 1), (20, 30), (1, 1, 48)):
        engine.add(RequestId(1), tokens, Sampling(prompt_logprobs=2))
        start, places = 0, list[int]()
        for size in chunks:
            told = blocks_for(60) if start == 0 else ()
            [output] = engine.step([Slice(RequestId(1), start, size, 0, told, start + size == 50)])
            scores, start = output.scores, start + size
            if scores is not None:
                places += range(scores.first, scores.first + len(scores))
                assert len(scores.ranks) == len(scores.logprobs) == len(scores.top_tokens) // 2 == len(scores.top_logprobs) // 2
        assert places == list(range(1, 50))
        [output] = engine.step([Slice(RequestId(1), 50, 1, 0, (), True)])
        assert output.scores is None
        engine.forget(RequestId(1))


def test_stop_tokens_end_a_sequence_and_are_included(engine: Engine) -> None:
    tokens = prompt(13, 20)
    free = generate(engine, 1, tokens, 8)
    stopped = generate(engine, 1, tokens, 8, Sampling(stop_token_ids=(free[3],)))
    assert stopped == free[: free.index(free[3]) + 1]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_logprobs_have_the_shape_asked_for(engine: Engine, count: int) -> None:
    engine.add(RequestId(1), prompt(14, 20), Sampling(logprobs=count))
    output = prefill(engine, 1, 20, blocks_for(21), 256)
    [report] = output.logprobs
    assert report.logprob <= 0
    assert len(report.top) == count
    assert list(report.top) == sorted(report.top, key=lambda pair: -pair[1])
    if count:
        assert report.top[0] == (output.tokens[0], report.logprob)


def test_no_logprobs_unless_asked(engine: Engine) -> None:
    engine.add(RequestId(1), prompt(14, 20), GREEDY)
    assert prefill(engine, 1, 20, blocks_for(21), 256).logprobs == ()


def test_pause_is_zero_without_costs(engine: Engine) -> None:
    assert engine.pause_s([Slice(RequestId(1), 0, 20, 0, (), True)], 0) == 0.0


def reachable_bytes(root: object) -> int:
    """Return the bytes of all tensors, buffers and maps that can be reached from an object."""
    seen, waiting, total = {id(root)}, [root], 0
    while waiting:
        one = waiting.pop()
        match one:
            case torch.Tensor() | memoryview() | np.ndarray():
                total += one.nbytes
            case bytearray() | mmap():
                total += len(one)
            case _:
                pass
        for other in gc.get_referents(one):
            if id(other) not in seen and not isinstance(other, (type, ModuleType, FunctionType)):
                seen.add(id(other))
                waiting.append(other)
    return total


def test_nothing_is_held_after_close(engine: Engine) -> None:
    generate(engine, 1, prompt(1, 4), 1)
    engine.add(RequestId(2), prompt(2, 4), GREEDY)
    pool_bytes = BLOCKS * engine.description.block_bytes
    assert reachable_bytes(engine) >= pool_bytes
    engine.close()
    assert reachable_bytes(engine) < engine.description.block_bytes


def test_a_profiled_step_takes_longer_for_its_drafts_and_brings_as_many_as_the_settings_say(model_dir: Path) -> None:
    profile = CostProfile(step_s=0.01, sequence_s=0.001, prefill_token_s=0.0001)
    speculation = SpeculationConfig(SpeculationMethod.PROMPT_LOOKUP, acceptance=0.7)
    config = EngineConfig(name="profiled", block_tokens=BLOCK_TOKENS, blocks=BLOCKS, speculation=speculation)
    engine = ProfiledEngine(model_dir, config, profile)
    assert engine.pause_s([Slice(RequestId(1), 20, 1, 0, (), True, 3)], 1) == pytest.approx(0.0113)
    _, steps = generate_drafted(engine, 1, prompt(1, 20), 1000, 4)
    # Of four drafts 0.7 + 0.49 + 0.343 + 0.24 are right on average.
    assert 999 / steps == pytest.approx(2.77, abs=0.2)


def test_a_profiled_draft_model_takes_a_pass_for_each_token_of_the_longest_draft(model_dir: Path) -> None:
    profile = CostProfile(step_s=0.01, sequence_s=0.001, prefill_token_s=0.0001, draft_step_s=0.002)
    speculation = SpeculationConfig(SpeculationMethod.DRAFT_MODEL, acceptance=0.7)
    config = EngineConfig(name="profiled", block_tokens=BLOCK_TOKENS, blocks=BLOCKS, speculation=speculation)
    engine = ProfiledEngine(model_dir, config, profile)
    slices: list[Slice] = []
    for number, most in enumerate((3, 1, 0)):
        engine.add(RequestId(number), prompt(1, 20), GREEDY)
        engine.step([Slice(RequestId(number), 0, 20, 0, blocks_for(40), False)])
        slices.append(Slice(RequestId(number), 19, 1, 0, (), True, 2, most))  # nothing is ever looked up: there is no text
    assert engine.pause_s(slices, 3) == pytest.approx(0.01 + 0.003 + 0.0004 + 3 * 0.002)
    outputs = engine.step(slices)
    assert [output.drafted for output in outputs] == [3, 1, 0]
    assert [output.drafting_s for output in outputs] == [pytest.approx(0.0045), pytest.approx(0.0015), None]
