"""Drafts of a pool: the same tokens, whoever asks, whatever becomes of the process that drafts."""

import random
import signal
import socket
import struct
import threading
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.quoting import cut_checkpoint
from orchestrator.core.config import DRAFT_TOKENS_MAX, ConfigError
from orchestrator.core.types import Sampling
from orchestrator.wire.trust import Caller, Trust, read_trust
from tests.builders import TRUST
from tests.live.test_trust import certificates
from tests.workers.drafts.drafting import CONFIG, LONG_S, Drafting, asking, drafting, drafting_pool, patient, reach
from tests.workers.test_drafter import Text
from tests.workers.test_eager import WISHES, outputs_of, tokens_of
from workers.drafting import DraftProcessServer
from workers.engines import drafter
from workers.engines.base import EngineLost, NetworkPlace
from workers.engines.checkpoint import create_checkpoint
from workers.engines.drafter import Asked, Drafted
from workers.engines.drafts import answering
from workers.engines.drafts.asking import SLOTLESS_STEPS, PoolDrafter
from workers.engines.drafts.links import Link
from workers.engines.drafts.messages import MESSAGE_BYTES_MAX, SAID, Answer, Ask, Incoming, Told, Welcome, packed, unpacked
from workers.engines.drafts.process import open_drafter
from workers.engines.eager import EagerEngine
from workers.engines.greetings import Stream, connected

VOCABULARY = 500
#: As few as make a text of some hundred tokens begin anew.
CONTEXTS_KEPT = 2
Step = tuple[int, int] | None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint; beside it `draft`, its first layers."""
    directory = tmp_path_factory.mktemp("models")
    create_checkpoint(directory / "model", "llama", 7, layers=3, hidden=64, intermediate=96)
    cut_checkpoint(directory / "model", directory / "draft", 2)
    return directory / "model"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def served(model: Path) -> Iterator[Drafting]:
    with drafting(model, model.with_name("draft")) as serving:
        yield serving


def prompts_of(*lengths: int) -> list[list[int]]:
    source = random.Random(9)
    return [[source.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


def drafted_steps(text: Text, most: int = 4) -> Iterator[Step]:
    """Yield what steps draft, from the first on for which the text was read."""
    while True:
        done = text.step(most)
        if done != (0, 0):
            yield done


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("wish", list(WISHES))
def test_drafts_of_a_pool_change_neither_tokens_nor_their_probabilities(model: Path, served: Drafting, wish: str) -> None:
    prompts, sampling = prompts_of(3, 17, 30), WISHES[wish]
    plain = outputs_of(EagerEngine(model, CONFIG, 8, 256), prompts, sampling, None)
    engine = asking(model)
    reach(engine, served.address)
    drafted = outputs_of(engine, prompts, sampling, None, 5)
    assert [tokens_of(outputs) for outputs in drafted] == [tokens_of(outputs) for outputs in plain]
    assert sum(output.drafted for outputs in drafted for output in outputs) > 20
    for before, after in zip(plain, drafted, strict=True):
        chances = [[one.logprob for output in outputs for one in output.logprobs] for outputs in (before, after)]
        assert chances[0] == pytest.approx(chances[1], abs=1e-4)
    engine.close()


@pytest.mark.slow
def test_a_model_that_drafts_for_itself_is_always_right(model: Path) -> None:
    with drafting(model, model) as served:
        engine = asking(model)
        drafts = reach(engine, served.address)
        texts = [Text(engine, number, prompt) for number, prompt in enumerate(prompts_of(3, 12, 15))]
        steps = [[text.step(4) for _ in range(6)] for text in texts]
        assert steps == [[(4, 4)] * 6] * 3
        assert (drafts.load.answered, drafts.load.late, drafts.load.unreached, drafts.load.slotless) == (18, 0, 0, 0)
        assert (drafts.load.slots, drafts.load.slots_taken) == (8, 3)
        engine.close()


def test_a_long_text_is_read_between_questions_before_anything_is_drafted(model: Path) -> None:
    [prompt] = prompts_of(400)
    with drafting(model, model) as served:
        engine = asking(model)
        reach(engine, served.address)
        text = Text(engine, 0, prompt)
        assert text.step(4) == (0, 0)
        steps = drafted_steps(text)
        assert [next(steps) for _ in range(3)] == [(4, 4)] * 3
        engine.close()


@pytest.mark.slow
def test_a_text_that_is_longer_than_what_is_seen_is_drafted_for_all_the_same(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [prompt] = prompts_of(200)
    plain = Text(EagerEngine(model, CONFIG, 8, 512), 0, prompt)
    with drafting(model, model, context=128) as served:
        engine = asking(model)
        reach(engine, served.address)
        text = Text(engine, 0, prompt)
        monkeypatch.setattr(answering, "CONTEXTS_KEPT", CONTEXTS_KEPT)
        while len(text.tokens) < 400:
            done = text.step(6)
            assert done is not None, "its slot was lost"
            assert max(len(window.tokens) for window in served.drafter._windows.values()) <= 128 + DRAFT_TOKENS_MAX
            [known] = [sequence for peer in served.server._known.values() for _, sequence in peer.values()]
            assert len(known.tokens) <= CONTEXTS_KEPT * 128
        while len(plain.tokens) < 400:
            plain.step(0)
        assert text.tokens[:400] == plain.tokens
        engine.close()


@pytest.mark.slow
def test_what_is_drafted_ahead_is_what_would_have_been_drafted(model: Path, served: Drafting) -> None:
    # Sampled, so that most drafts are wrong: what was drafted ahead of them has to go.
    [prompt] = prompts_of(10)
    engine, alone = asking(model), EagerEngine(model.with_name("draft"), CONFIG, 8, 256)
    reach(engine, served.address)
    text = Text(engine, 0, prompt, Sampling(temperature=1.0, seed=4))
    lengths: set[int] = set()
    drafts: list[Sequence[int]] = []
    draft = served.drafter.draft_what_is_read

    def noted(asked: Sequence[Asked]) -> list[Drafted | None]:
        done = draft(asked)
        drafts.append(asked[0].sequence.tokens[-asked[0].sequence.drafted :].tolist())
        return done

    served.drafter.draft_what_is_read = noted
    for number in range(25):
        known = list(text.tokens)
        done = text.step(1 + number % 5)
        assert done is not None
        expected = Text(alone, 1, known)
        while len(expected.tokens) < len(known) + done[0]:
            expected.step(0)
        assert expected.tokens[len(known) :][: done[0]] == drafts[-1]
        alone.forget(expected.request)
        lengths.add(done[1])
    assert len(lengths) > 1, "all drafts were as right as each other"
    engine.close()


# --- several nodes, few slots -----------------------------------------------------------------------------------------


def test_nodes_that_call_different_texts_the_same_are_not_mixed_up(model: Path) -> None:
    with drafting(model, model) as served:
        engines = [asking(model) for _ in range(2)]
        for engine in engines:
            reach(engine, served.address)
        texts = [Text(engine, 0, prompt) for engine, prompt in zip(engines, prompts_of(9, 14), strict=True)]
        for _ in range(5):
            assert [text.step(4) for text in texts] == [(4, 4), (4, 4)]
        assert served.drafter.sequences == 2
        engines[0].close()
        assert texts[1].step(4) == (4, 4)
        engines[1].close()


def test_a_text_that_finds_no_slot_is_not_drafted_for_until_one_is_free(model: Path) -> None:
    with drafting(model, model, slots=2) as served:
        engine = asking(model)
        drafts = reach(engine, served.address)
        texts = [Text(engine, number, prompt) for number, prompt in enumerate(prompts_of(5, 6, 7))]
        assert [text.step(3) for text in texts] == [(3, 3), (3, 3), None]
        assert (drafts.load.slotless, drafts.load.slots_taken) == (1, 2)
        engine.forget(texts[0].request)
        asked = 0
        while texts[2].step(3) is None:
            assert texts[1].step(3) == (3, 3)
            asked += 1
        assert 0 < asked <= SLOTLESS_STEPS
        assert (drafts.load.slotless, drafts.load.slots_taken) == (1, 2)
        engine.close()


def test_a_text_that_was_not_asked_for_in_a_while_loses_its_slot_and_is_told_of_anew(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with drafting(model, model, slots=1) as served:
        engine = asking(model)
        drafts = reach(engine, served.address)
        texts = [Text(engine, number, prompt) for number, prompt in enumerate(prompts_of(5, 6))]
        assert texts[0].step(3) == (3, 3)
        steps = [texts[1].step(3) for _ in range(4 * SLOTLESS_STEPS)]
        assert steps == [None] * len(steps)
        monkeypatch.setattr(drafter, "IDLE_STEPS", 4)
        found = [texts[1].step(3) for _ in range(2 * SLOTLESS_STEPS)]
        assert found[-1] == (3, 3)
        slotless = drafts.load.slotless
        assert texts[0].step(3) is None
        assert drafts.load.slotless == slotless + 1
        engine.close()


# --- faults -----------------------------------------------------------------------------------------------------------


def test_a_node_goes_on_without_drafts_when_their_process_ends_and_has_them_again_when_it_is_back(model: Path) -> None:
    [prompt] = prompts_of(12)
    plain = Text(EagerEngine(model, CONFIG, 8, 256), 0, prompt)
    engine = asking(model)
    text = Text(engine, 0, prompt)
    assert text.step(3) is None  # nobody is there yet
    with drafting(model, model) as served:
        drafts = reach(engine, served.address)
        assert [text.step(3) for _ in range(2)] == [(3, 3)] * 2
    assert [text.step(3) for _ in range(3)] == [None] * 3
    assert (drafts.load.unreached, drafts.load.slots) == (3, 0)  # the first of them found out
    with drafting(model, model) as served:
        reach(engine, served.address)
        steps = drafted_steps(text)
        assert [next(steps) for _ in range(2)] == [(4, 4)] * 2
    while len(plain.tokens) < len(text.tokens):
        plain.step(0)
    assert text.tokens == plain.tokens
    engine.close()


def test_an_answer_that_is_late_is_dropped_and_nothing_is_asked_before_it_has_come(model: Path) -> None:
    with drafting(model, model) as served:
        draft, asked, go_on = served.drafter.draft_what_is_read, threading.Event(), threading.Event()

        def held(sequences: Sequence[Asked]) -> list[Drafted | None]:
            asked.set()
            assert go_on.wait(LONG_S)
            return draft(sequences)

        engine = asking(model)
        drafts = reach(engine, served.address)
        text = Text(engine, 0, prompts_of(12)[0])
        assert text.step(3) == (3, 3)
        served.drafter.draft_what_is_read = held
        PoolDrafter.stepped(drafts, 0.001)
        assert text.step(3) == (0, 0)  # it has waited, and that is told
        assert asked.wait(LONG_S)
        assert [text.step(3) for _ in range(2)] == [None, None]
        assert drafts.load.late == 3
        link = drafts._link
        assert link is not None
        patient(drafts)
        go_on.set()
        assert link.answer(LONG_S) is not None
        assert text.step(3) == (3, 3)
        assert (drafts.load.late, drafts.load.unreached) == (3, 0)
        engine.close()


def test_waiting_is_bounded_by_what_drafts_can_be_worth(model: Path, served: Drafting, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    answer = Link.answer

    def noted(link: Link, seconds: float) -> Answer | None:
        waits.append(seconds)
        return answer(link, seconds)

    engine = asking(model)
    drafts = reach(engine, served.address)
    text = Text(engine, 0, prompts_of(12)[0])
    monkeypatch.setattr(Link, "answer", noted)
    for most, steps in ((3, (5.0, 7.0)), (5, (9.0, 4.0))):
        for seconds in steps:
            PoolDrafter.stepped(drafts, seconds)
        text.step(most)
    assert waits == [3 * 5.0, 5 * 4.0]
    engine.close()


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(packed(Answer([None, None], 0)), id="for two sequences"),
        pytest.param(packed(Answer([array("I", [5000]).tobytes()], 0)), id="a token of no vocabulary"),
        pytest.param(packed(Answer([b"abc"], 0)), id="half a token"),
        pytest.param(struct.pack("<I", 5) + b"\xff\x00\x01\x02\x03", id="no message"),
        pytest.param(struct.pack("<I", MESSAGE_BYTES_MAX + 1), id="without end"),
    ],
)
def test_an_answer_that_means_nothing_ends_the_connection_and_no_step(model: Path, served: Drafting, answer: bytes) -> None:
    engine = asking(model)
    drafts = reach(engine, served.address)
    text = Text(engine, 0, prompts_of(12)[0])
    assert text.step(3) is not None
    link, (mine, theirs) = drafts._link, socket.socketpair()
    assert link is not None
    theirs.sendall(answer)
    mine.setblocking(False)
    link._connection.close()
    link._connection, link._stream = mine, Stream(mine)
    link._incoming = Incoming(link._stream)
    before = len(text.tokens)
    assert text.step(3) is None
    assert len(text.tokens) == before + 1
    assert drafts._link is None
    theirs.close()
    engine.close()


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(packed(Ask([Told(0, array("I", [5000]).tobytes(), 3, begins=True)], [])), id="a token of no vocabulary"),
        pytest.param(packed(Ask([Told(0, b"", 3, begins=True)], [])), id="no tokens"),
        pytest.param(packed(Ask([Told(0, b"abc", 3, begins=True)], [])), id="half a token"),
        pytest.param(packed(Ask([Told(0, bytes(4), 1000, begins=True)], [])), id="too many drafts"),
        pytest.param(struct.pack("<I", 5) + b"\xff\x00\x01\x02\x03", id="no message"),
        pytest.param(struct.pack("<I", MESSAGE_BYTES_MAX + 1), id="without end"),
    ],
)
def test_a_question_that_means_nothing_ends_its_connection_and_no_other(model: Path, served: Drafting, message: bytes) -> None:
    engine = asking(model)
    reach(engine, served.address)
    text = Text(engine, 0, prompts_of(12)[0])
    assert text.step(3) is not None
    with connected(served.address, Caller.DRAFTED, SAID, TRUST) as connection:
        connection.settimeout(LONG_S)
        incoming = Incoming(Stream(connection))
        data = incoming.next()
        assert data is not None
        assert unpacked(data, Welcome) == Welcome(512, 8)
        connection.sendall(message)
        assert connection.recv(1) == b""
    assert text.step(3) is not None
    engine.close()


def test_a_sequence_that_is_not_known_is_answered_with_nothing(served: Drafting) -> None:
    with connected(served.address, Caller.DRAFTED, SAID, TRUST) as connection:
        connection.settimeout(LONG_S)
        incoming = Incoming(Stream(connection))
        incoming.next()
        connection.sendall(packed(Ask([Told(7, bytes(4), 3)], [9])))
        data = incoming.next()
        assert data is not None
        assert unpacked(data, Answer) == Answer([None], 0)


@pytest.mark.parametrize("kept", ["plain", "mutual TLS"])
def test_nobody_is_drafted_for_but_the_clusters_own(model: Path, tmp_path: Path, kept: str) -> None:
    trust = TRUST if kept == "plain" else read_trust("the cluster's", certificates(tmp_path / "tls"))
    with drafting(model, model, trust=trust) as served:
        with pytest.raises((OSError, ValueError)):
            connected(served.address, Caller.DRAFTED, SAID, Trust(b"guessed"))
        with pytest.raises((OSError, ValueError)):
            connected(served.address, Caller.RANK, SAID, trust)
        with pytest.raises(ValueError, match="refused: it must speak as"):
            connected(served.address, Caller.DRAFTED, {**SAID, "bytes": "middle"}, trust)
        engine = asking(model, trust)
        reach(engine, served.address)
        assert Text(engine, 0, prompts_of(9)[0]).step(4) == (4, 4)
        engine.close()


# --- the process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draft", "field", "says"),
    [
        ({"vocabulary": 320}, "drafter.model", "has a vocabulary of 320 tokens"),
        ({"context_tokens_max": 100}, "drafter.model", "is for 100 tokens of context, which are too few"),
    ],
)
def test_a_draft_model_that_cannot_draft_is_refused(
    tmp_path: Path, model: Path, draft: dict[str, int], field: str, says: str
) -> None:
    create_checkpoint(tmp_path, "llama", 3, layers=1, hidden=32, intermediate=32, **draft)
    with pytest.raises(ConfigError) as raised:
        open_drafter(drafting_pool(tmp_path), model)
    assert raised.value.where == field
    assert says in raised.value.problem


def test_slots_for_which_there_is_no_memory_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.engines.eager.CPU_POOL_BYTES_MAX", 4 * 1024**2)
    with pytest.raises(ConfigError, match=r"^drafter\.sequences_max: must be at most \d+, is 4096: there is no memory"):
        open_drafter(drafting_pool(model.with_name("draft"), slots=4096), model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "hung_s", "said"), [(signal.SIGKILL, LONG_S, "drafts no more"), (signal.SIGSTOP, 0.5, "not answered")]
)
def test_a_process_drafts_until_it_ends_or_hangs_and_that_is_told(
    model: Path, end: signal.Signals, hung_s: float, said: str
) -> None:
    ends: list[BaseException] = []
    ended = threading.Event()

    def fatal(error: BaseException) -> None:
        ends.append(error)
        ended.set()

    server = DraftProcessServer(drafting_pool(model), model, NetworkPlace("127.0.0.1", TRUST), hung_s, fatal)
    engine = asking(model)
    drafts = reach(engine, server.address)
    text = Text(engine, 0, prompts_of(9)[0])
    assert [text.step(4) for _ in range(3)] == [(4, 4)] * 3
    server._child.process.send_signal(end)
    assert ended.wait(LONG_S)
    assert isinstance(ends[0], EngineLost)
    assert said in str(ends[0])
    assert server._child.process.poll() is not None, "it is still there"
    assert text.step(4) is None
    assert drafts.load.slots == 0
    engine.close()


@pytest.mark.slow
def test_a_process_that_cannot_have_what_it_is_to_says_which_field(model: Path) -> None:
    pool = drafting_pool(model.with_name("draft"))
    pool = replace(pool, beat=replace(pool.beat, cores=(100_000,)))
    with pytest.raises(ConfigError, match=r"^pools\.drafts\.beat\.cores: must be cores that this process may run on"):
        DraftProcessServer(pool, model, NetworkPlace("127.0.0.1", TRUST), LONG_S, lambda _: None)
