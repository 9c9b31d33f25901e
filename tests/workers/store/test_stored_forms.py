"""A prompt that was computed, stored in each form and restored into another engine: the same tokens, or nearly as likely ones."""

import json
import random
from array import array
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from orchestrator.core.commands import Slice
from orchestrator.core.config import EngineConfig, KvFormat
from orchestrator.core.events import FetchEnded, OfferEnded
from orchestrator.core.types import BlockId, CostProfile, RequestId, Sampling
from tests.workers.store.hosts import BLOCK_TOKENS, BLOCKS, MODEL, SEGMENT, Host, host, objects, run, until
from workers.engines.base import TokenLogprobs
from workers.engines.checkpoint import create_checkpoint
from workers.engines.eager import EagerEngine
from workers.engines.profiled import ProfiledEngine
from workers.store.models import model_blocks

#: A prompt of ten whole blocks and a part of one, and the tokens after it.
PROMPT = array("I", [random.Random(5).randrange(500) for _ in range(10 * BLOCK_TOKENS + 2)])
WHOLE = 10
OUTPUT = 12
VOCABULARY = 512


@pytest.fixture(scope="module", params=["qwen3", "deepseek_v3"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of either kind of attention."""
    directory = tmp_path_factory.mktemp("model")
    create_checkpoint(directory, request.param, 7, layers=2, hidden=64, intermediate=96)
    return directory


def config_of(stored: KvFormat, dtype: str = "float32", name: str = "eager") -> EngineConfig:
    sizes = {"block_tokens": BLOCK_TOKENS, "blocks": BLOCKS}
    return EngineConfig(name=name, device="cpu", dtype=dtype, kv_format_stored=stored, **sizes)


def opened(model_dir: Path, stored: KvFormat, dtype: str = "float32") -> EagerEngine:
    return EagerEngine(model_dir, config_of(stored, dtype), sequences_max=2, step_tokens_max=256)


def written(engine: EagerEngine, present: int) -> tuple[list[int], list[TokenLogprobs]]:
    """Return what follows the prompt, of which the first blocks are present, and what was thought of it."""
    engine.add(RequestId(1), PROMPT, Sampling(logprobs=VOCABULARY))
    table = tuple(BlockId(number) for number in range(-(-(len(PROMPT) + OUTPUT) // BLOCK_TOKENS)))
    start = present * BLOCK_TOKENS
    tokens: list[int] = []
    thoughts: list[TokenLogprobs] = []
    while len(tokens) < OUTPUT:
        end = len(PROMPT) + len(tokens)
        [output] = engine.step([Slice(RequestId(1), start, end - start, 0, table, True)])
        tokens += output.tokens
        thoughts += output.logprobs
        start = end
    engine.forget(RequestId(1))
    return tokens, thoughts


def distance(one: TokenLogprobs, other: TokenLogprobs) -> float:
    """Return by how much the two differ in a token's log probability at most."""
    those = dict(other.top)
    return max(abs(logprob - those[token]) for token, logprob in one.top)


async def stored_and_loaded(there: Host, model_dir: Path, stored: KvFormat) -> tuple[EagerEngine, EagerEngine]:
    """Return an engine that computed the prompt, and another one that has its whole blocks from the store."""
    source, target = opened(model_dir, stored), opened(model_dir, stored)
    one, other = await there.node("one", engine=source), await there.node("other", engine=target)
    written(source, 0)
    assert await one.offer(0, WHOLE) == OfferEnded(1)
    ended = await other.load(0, WHOLE)
    assert ended == FetchEnded(ended.request, WHOLE * BLOCK_TOKENS)
    assert [move.bytes for move in (*one.moved, *other.moved)] == [WHOLE * source.description.stored_bytes] * 2
    return source, target


@pytest.mark.parametrize("stored", list(KvFormat))
def test_a_restored_prompt_goes_on_as_it_would_have(model_dir: Path, stored: KvFormat) -> None:
    found: list[tuple[EagerEngine, EagerEngine]] = []

    async def scenario() -> None:
        async with host(models=[model_blocks(MODEL, config_of(stored), model_dir)]) as there:
            found.append(await stored_and_loaded(there, model_dir, stored))

    run(scenario)
    [(source, target)] = found
    tokens, thoughts = written(source, WHOLE)
    restored, others = written(target, WHOLE)
    first = distance(thoughts[0], others[0])
    if stored is KvFormat.PLAIN:
        assert (restored, first) == (tokens, 0.0)
    else:
        # Rounded, but by no more than a fraction of what tells one token from another.
        spread = thoughts[0].top[0][1] - thoughts[0].top[-1][1]
        assert 0.0 < first < spread / (8 if stored is KvFormat.FP8 else 2)


def test_what_one_dtype_stored_another_goes_on_from(model_dir: Path, tmp_path: Path) -> None:
    """What is kept means the same in both: gains of normalisations, here far from 1, are in it or are not."""
    for file in model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    gains = [name for name in tensors if name.endswith(("k_norm.weight", "kv_a_layernorm.weight", "input_layernorm.weight"))]
    assert len(gains) == 4  # of two layers
    for name in gains:
        tensors[name] *= 2.0
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source, target = opened(tmp_path, KvFormat.FP8), opened(tmp_path, KvFormat.FP8, "bfloat16")
    written(source, 0)
    kept = memoryview(bytearray(WHOLE * source.description.stored_bytes))
    blocks = [BlockId(number) for number in range(WHOLE)]
    source.encode_blocks(blocks, kept)
    _, thoughts = written(target, 0)
    target.decode_blocks(blocks, kept)
    _, others = written(target, WHOLE)
    spread = thoughts[0].top[0][1] - thoughts[0].top[-1][1]
    assert distance(thoughts[0], others[0]) < spread / 8


def test_what_was_stored_in_one_form_is_not_read_as_another(model_dir: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with host(tmp_path, models=[model_blocks(MODEL, config_of(KvFormat.FP8), model_dir)]) as there:
            await stored_and_loaded(there, model_dir, KvFormat.FP8)
            await until(lambda: len(objects(tmp_path)) == WHOLE // SEGMENT)
        for stored, tokens in ((KvFormat.NVFP4, 0), (KvFormat.FP8, WHOLE // SEGMENT * SEGMENT * BLOCK_TOKENS)):
            async with host(tmp_path, models=[model_blocks(MODEL, config_of(stored), model_dir)]) as there:
                node = await there.node(engine=opened(model_dir, stored))
                assert (await node.load(0, WHOLE)).tokens == tokens

    run(scenario)


@pytest.mark.parametrize("stored", list(KvFormat))
@pytest.mark.parametrize("written_as", ["float32", "bfloat16", "float16"])
def test_a_store_knows_before_any_engine_what_engines_say(
    model_dir: Path, tmp_path: Path, stored: KvFormat, written_as: str
) -> None:
    for file in model_dir.iterdir():
        (tmp_path / file.name).symlink_to(file)
    shape = json.loads((model_dir / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**shape, "torch_dtype": written_as}))
    engines = (
        ("eager", opened(tmp_path, stored, "auto")),
        ("profiled", ProfiledEngine(tmp_path, config_of(stored, "auto", "profiled"), CostProfile())),
    )
    for name, engine in engines:
        said, known = model_blocks(MODEL, config_of(stored, "auto", name), tmp_path), engine.description
        expected: Sequence[object] = (known.fingerprint, known.stored_layout, known.block_tokens, known.stored_bytes)
        assert (said.fingerprint, said.layout, said.block_tokens, said.block_bytes) == expected
