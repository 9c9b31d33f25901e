"""Grammars and budgets of thoughts are kept in every way in which tokens are computed, and the tokens are those of one engine.

Beside each other, on nodes whose blocks do not suffice for all; prompts begin alike, so that some are found in caches.
"""

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from tokenizers import Tokenizer

from bench.quoting import cut_checkpoint
from orchestrator.core.config import EngineConfig
from orchestrator.core.types import Sampling, ServiceClass, ThoughtsLimit
from orchestrator.live.asked import Constraint, ConstraintKind
from orchestrator.live.text.checks import keepable
from orchestrator.live.text.grammars import Thoughts, answer_part, whole
from orchestrator.live.turns import Delta
from tests.decided import Decided, first_decided
from tests.live.serving import Cluster, finish, run, turn
from tests.live.ways import READ_S, WAY_S, WAYS, Drafts, Way, draft_always, serving
from workers.engines.checkpoint import create_checkpoint
from workers.engines.eager import EagerEngine

pytestmark = pytest.mark.slow

VOCABULARY = 512
END = VOCABULARY - 1
#: Special tokens of the random model that stand for tags here; it writes neither by itself.
BEGIN, CLOSE = END - 2, END - 1
#: Tokens of thoughts, and of an answer with them.
BUDGET, OUTPUT_TOKENS = 11, 100
SCHEMA = {"type": "array", "items": {"enum": ["again and again", "once more"]}, "minItems": 3, "maxItems": 5}
ASKED = 24
#: Of those on a beat, each of whose tokens takes one.
BEATING = 12
#: Blocks of all nodes that generate: fewer than eight answers need.
BLOCKS = 32
FREE = {"stop_token_ids": (END,), "logit_bias": {CLOSE: -100.0}}
KINDS: dict[str, Callable[[int, str, str], Sampling]] = {
    "a form": lambda seed, form, _: Sampling(grammar=form, **FREE),
    "a form, drawn": lambda seed, form, _: Sampling(1.0, seed=seed, grammar=form, **FREE),
    "thoughts": lambda *_: Sampling(thoughts=ThoughtsLimit(BUDGET, CLOSE), **FREE),
    "thoughts, drawn": lambda seed, *_: Sampling(
        0.8, seed=seed, frequency_penalty=0.5, thoughts=ThoughtsLimit(BUDGET, CLOSE), **FREE
    ),
    "thoughts and a form": lambda seed, _, both: Sampling(grammar=both, thoughts=ThoughtsLimit(BUDGET, CLOSE), **FREE),
    "thoughts and a form, drawn": lambda seed, _, both: Sampling(
        1.0, seed=seed, grammar=both, thoughts=ThoughtsLimit(BUDGET, CLOSE), **FREE
    ),
}


def grammars(tokenizer: Tokenizer) -> list[str]:
    """Return a grammar for an answer in a form, and one for thoughts before it."""
    marks = {tokenizer.id_to_token(token): token for token in (BEGIN, CLOSE)}
    part = answer_part(Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(SCHEMA), "response_format"))
    found = [
        keepable(whole("@answer", (), (part,), part.field, Thoughts(), {})),
        keepable(whole("@answer", (), (part,), part.field, Thoughts(tuple(marks), opened=True), marks)),
    ]
    texts = [one for one in found if isinstance(one, str)]
    assert texts == found
    return texts


def asked(forms: list[str]) -> Iterator[tuple[tuple[int, ...], Sampling]]:
    """Yield prompts, every third of which begins like the one before it, with each kind of wish in turn."""
    source = random.Random(5)
    last: list[int] = []
    kinds = list(KINDS.values())
    number = 0
    while True:
        length = source.randint(20, 70)
        shared = last[: 2 * length // 3] if number % 3 == 2 else []
        last = shared + [source.randrange(256) for _ in range(length - len(shared))]
        yield tuple(last), kinds[number % len(kinds)](number, *forms)
        number += 1


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Decided]]:
    """A checkpoint, what is asked of it, and what it answers."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("model") / request.param
    create_checkpoint(path, request.param, 7, layers=2, hidden=64, intermediate=96, dtype="float32")
    cut_checkpoint(path, path.with_name("draft"), 1)
    forms = grammars(Tokenizer.from_file(str(path / "tokenizer.json")))
    engine = EagerEngine(path, EngineConfig(device="cpu", dtype="float32", block_tokens=16, blocks=64, threads=1), 1, 256)
    answers = first_decided(engine, asked(forms), ASKED, OUTPUT_TOKENS)
    engine.close()
    return path, answers


#: One family with experts, one without.
CASES = [
    (family, name) for family in ("qwen3", "qwen3_moe") for name, way in WAYS.items() if family == "qwen3_moe" or not way.spare
]


@pytest.mark.parametrize("model", ["qwen3"], indirect=True)
def test_one_engine_keeps_to_them(model: tuple[Path, list[Decided]]) -> None:
    path, answers = model
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    for one in answers:
        start = 0
        if one.sampling.thoughts is not None:
            assert one.tokens.index(CLOSE) == BUDGET
            start = BUDGET + 1
        assert CLOSE not in one.tokens[start:]
        if one.sampling.grammar:
            assert one.tokens[-1] == END, tokenizer.decode(one.tokens)
            jsonschema.validate(json.loads(tokenizer.decode(one.tokens[start:])), SCHEMA)


@pytest.mark.timeout(WAY_S + 60)
@pytest.mark.parametrize(("model", "name"), CASES, indirect=["model"])
def test_answers_are_kept_to_what_they_must_be(
    model: tuple[Path, list[Decided]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, answers = model
    way = WAYS[name]
    way = way.with_blocks(BLOCKS // way.pool.nodes)
    answers = answers[:BEATING] if way.service_class is ServiceClass.CADENCE else answers
    draft_always(way, {one.prompt: one.tokens for one in answers}, monkeypatch)
    torch.set_num_threads(1)

    async def scenario() -> None:
        async with serving(way, path, path.with_name("draft")) as (served, _):
            most = OUTPUT_TOKENS if way.service_class is not ServiceClass.CADENCE else way.tokens
            done = await write(served, way, answers, most)
            pairs = list(zip(answers, done, strict=True))
            differing = [one.sampling for one, delta in pairs if delta.tokens != one.tokens[:most]]
            assert differing == [], f"{len(differing)} of {len(answers)} answers differ"
            await served.idle()
            preempted = sum(load.preemptions for load in served.observed.loads.values())
            crowded = way.together > 1 and way.service_class is not ServiceClass.CADENCE
            assert (preempted > 0) == crowded, f"{preempted} preemptions"
            if way.drafts is not Drafts.NONE:
                loads = [served.observed.loads[way.pool.node_id(number)] for number in range(way.pool.nodes)]
                drafted, accepted = sum(load.drafted_tokens for load in loads), sum(load.accepted_tokens for load in loads)
                assert drafted > accepted > 0, f"{drafted} tokens were drafted, {accepted} were right"

    run(scenario, WAY_S)


async def write(served: Cluster, way: Way, answers: list[Decided], most: int) -> list[Delta]:
    """Ask for everything, so many at a time."""
    places = asyncio.Semaphore(way.together)

    async def one(wish: Decided) -> Delta:
        async with places:
            wanted = replace(turn(wish.prompt, most, wish.sampling), service_class=way.service_class)
            return await finish(served.driver.start(wanted), READ_S)

    return await asyncio.gather(*[one(wish) for wish in answers])
