"""A little of `python -m bench.fuzz` on every run, from a fixed seed, and inputs that were once answered wrongly."""

import asyncio
import random
from collections import Counter
from itertools import islice
from pathlib import Path

import httpx
import pytest

from bench.frames import Victim
from bench.fuzz import VICTIMS, problem_of
from bench.mutations import hostile_bodies, hostile_frames, mangled
from orchestrator.live.text.models import ModelText
from tests.live.scripted import MODEL, make_model, serve
from workers.engines.checkpoint import default_model_path

#: Bodies that were once answered with a fault of ours.
CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.json"))
BODIES, FRAMES = 400, 400


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    return make_model(tmp_path_factory.mktemp("model"))


def answered(text: ModelText, bodies: list[tuple[str, bytes]]) -> list[str]:
    """Return what is wrong with the answers to some bodies."""

    async def run() -> list[str]:
        wrong: list[str] = []
        async with serve(text) as served, httpx.AsyncClient(base_url=served.url, timeout=20) as client:
            for path, body in bodies:
                problem = problem_of(await client.post(path, content=body))
                wrong += [f"{problem}: {path} {body[:400]!r}"] if problem else []
            assert served.gateway.ready
        return wrong

    return asyncio.run(run())


def test_hostile_bodies_are_answered_in_form(text: ModelText) -> None:
    assert answered(text, list(islice(hostile_bodies(7, MODEL), BODIES))) == []


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_what_was_once_answered_wrongly_is_not_any_more(text: ModelText, path: Path) -> None:
    body = path.read_bytes().replace(b'"M"', f'"{MODEL}"'.encode())
    where = "/v1/completions" if b'"prompt"' in body else "/v1/chat/completions"
    assert answered(text, [(where, body)]) == []


@pytest.mark.parametrize("victim", VICTIMS, ids=lambda victim: victim.__name__)
def test_hostile_frames_end_no_more_than_their_stream(victim: type[Victim], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.live.links.RETRY_S_MIN", 0.001)

    async def run() -> None:
        answers: Counter[str] = Counter()
        async with victim(default_model_path()) as one:
            await one.take(list(islice(hostile_frames(3, one.good), FRAMES)), answers)
            assert await one.works()
            assert one.failures == []
        assert answers.total() > 0

    asyncio.run(asyncio.wait_for(run(), 60))


def test_the_same_seed_gives_the_same_inputs() -> None:
    first, second = (list(islice(hostile_bodies(5, MODEL), 50)) for _ in range(2))
    assert first == second
    assert len({body for _, body in first}) > 40


def test_canary_a_fault_is_told_from_an_answer() -> None:
    good = {"x-request-id": "r"}
    assert problem_of(httpx.Response(400, json={"error": {"message": "no"}}, headers=good)) == ""
    assert problem_of(httpx.Response(500, json={"error": {"message": "no"}}, headers=good)) == "status 500"
    assert problem_of(httpx.Response(400, text="Bad", headers=good)) == "status 400 without an error body"
    assert problem_of(httpx.Response(200, text="{}")) == "no x-request-id"
    assert problem_of(httpx.Response(200, text="data: {", headers=good)) == "an unfinished answer"
    assert mangled(random.Random(1), b"abc") != b"abc"
