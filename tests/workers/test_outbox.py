"""What waits for a gateway: what counts as pending, how much goes into a frame, in which order, and when the writer wakes."""

import asyncio
from collections.abc import Callable

import pytest

from orchestrator.core.types import GatewayId, KvBatch, Load, RequestId
from orchestrator.wire import codec, node_pb2
from tests.live.virtual import run_virtually
from workers.engines.base import TokenLogprobs
from workers.outbox import HEARTBEAT_S_MIN, LOGPROB_BYTES, LOGPROBS_BYTES, TOKEN_BYTES, Outbox

HASH = 16
FIRST = node_pb2.FirstToken(request=1)
ENDED = node_pb2.Ended(request=1)
MOVE = node_pb2.Move(bytes=5)
LOAD = Load(running=2, queued_tokens=9)


def removed(sequence: int, hashes: int = 1) -> node_pb2.KvBatch:
    return node_pb2.KvBatch(sequence=sequence, removed=bytes(HASH * hashes))


def outbox() -> Outbox:
    return Outbox(GatewayId(3), 7)


def with_tokens(*tokens: int) -> Outbox:
    box = outbox()
    box.requests.append(1)
    box.counts.append(len(tokens))
    box.tokens.extend(tokens)
    return box


def sequences(frame: node_pb2.NodeFrame) -> list[int]:
    return [batch.sequence for batch in frame.kv]


async def is_awake(box: Outbox) -> bool:
    """Tell whether the writer would go on now; it is asleep again then."""
    waiting = asyncio.ensure_future(box.awake())
    await asyncio.sleep(0)
    return waiting.done() or not waiting.cancel()


def test_nothing_waits_at_first_and_an_empty_frame_says_so() -> None:
    box = outbox()
    assert (box.pending, box.telling, box.urgent, box.full, box.unsent) == (False, False, False, False, 0)
    assert box.take(None, draining=False) == node_pb2.NodeFrame()
    assert box.next_sealed() is None


@pytest.mark.parametrize(
    ("add", "pending", "telling", "urgent"),
    [
        (lambda box: box.requests.append(1), True, False, False),
        (lambda box: box.add_first_token(FIRST), True, True, True),
        (lambda box: box.add_ended(ENDED), True, True, True),
        (lambda box: box.add_kv([removed(1)]), True, True, False),
        (lambda box: box.start_over([KvBatch(1)]), True, True, False),
        (lambda box: box.add_move(MOVE), True, False, False),
        (lambda box: box.seal(node_pb2.NodeFrame()), True, False, False),
        # What is no change is nothing to tell.
        (lambda box: box.add_kv([]), False, False, False),
        (lambda box: box.start_over([]), False, False, False),
        (lambda box: box.add_logprobs(RequestId(1), []), False, False, False),
    ],
)
def test_what_must_go_out_and_what_somebody_waits_for(
    add: Callable[[Outbox], None], pending: bool, telling: bool, urgent: bool
) -> None:
    box = outbox()
    add(box)
    assert (box.pending, box.telling, box.urgent) == (pending, telling, urgent)
    box.next_sealed()
    box.take(None, draining=False)
    assert (box.pending, box.telling, box.urgent, box.unsent) == (False, False, False, 0)


def test_all_that_waits_goes_out_as_one_frame_and_once() -> None:
    box = with_tokens(4, 5)
    box.add_logprobs(RequestId(1), [TokenLogprobs(-0.5, ((4, -0.5), (9, -2.0))), TokenLogprobs(-1.0, ())])
    box.add_first_token(FIRST)
    box.add_ended(ENDED)
    box.add_kv([removed(1), removed(2)])
    box.add_move(MOVE)
    assert box.take(LOAD, draining=True, refused_calls=6) == node_pb2.NodeFrame(
        requests=[1],
        counts=[2],
        tokens=[4, 5],
        logprobs=[
            node_pb2.TokenLogprobs(request=1, logprob=-0.5, top_tokens=[4, 9], top_logprobs=[-0.5, -2.0]),
            node_pb2.TokenLogprobs(request=1, logprob=-1.0),
        ],
        first_tokens=[FIRST],
        ended=[ENDED],
        kv=[removed(1), removed(2)],
        moves=[MOVE],
        load=codec.load_message(LOAD),
        draining=True,
        refused_calls=6,
    )
    assert box.take(None, draining=False) == node_pb2.NodeFrame()


def test_refused_calls_come_with_the_load_only() -> None:
    assert outbox().take(None, draining=False, refused_calls=6) == node_pb2.NodeFrame()


def test_a_frame_that_went_out_does_not_change_with_what_comes_after_it() -> None:
    box = with_tokens(4)
    frame = box.take(None, draining=False)
    box.tokens.append(5)
    assert (list(frame.tokens), box.tokens) == ([4], [5])


def test_what_waits_is_counted_in_tokens_and_hashes() -> None:
    box = with_tokens(4, 5)
    stored = node_pb2.KvBatch(
        sequence=2, stored=[node_pb2.StoredRun(hashes=bytes(HASH * 3)), node_pb2.StoredRun(hashes=bytes(HASH))]
    )
    box.add_kv([removed(1, 5), stored])
    assert box.unsent == 2 + 5 + 4
    box.seal(node_pb2.NodeFrame(tokens=[1, 2, 3]))
    assert box.unsent == 14
    # Another snapshot makes up for changes that wait, and does not count.
    box.start_over([KvBatch(3, removed=(b"x" * HASH,) * 100)])  # type: ignore[arg-type]
    assert box.unsent == 5
    box.next_sealed()
    box.take(None, draining=False)
    assert box.unsent == 0


def test_a_frame_is_full_past_its_bytes_of_tokens_log_probabilities_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "FRAME_BYTES_MAX", 10 * TOKEN_BYTES)
    box = with_tokens(*range(10))
    assert not box.full
    box.tokens.append(10)
    assert box.full
    box.take(None, draining=False)
    assert not box.full
    entries = [TokenLogprobs(-1.0, ((1, -1.0), (2, -2.0)))] * 5
    assert 4 * (LOGPROBS_BYTES + 2 * LOGPROB_BYTES) <= codec.FRAME_BYTES_MAX < 5 * (LOGPROBS_BYTES + 2 * LOGPROB_BYTES)
    box.add_logprobs(RequestId(1), entries[:4])
    assert not box.full
    box.add_logprobs(RequestId(1), entries[4:])
    assert box.full
    box.take(None, draining=False)
    assert not box.full
    box.add_ended(node_pb2.Ended(message="e" * codec.FRAME_BYTES_MAX))
    assert box.full


def test_bytes_that_are_allowed_for_are_as_many_as_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    # Largest request, token and rank: a frame that is not full is no larger than it may be.
    largest = (1 << 32) - 1
    box = outbox()
    for _ in range(100):
        box.requests.append((1 << 63) - 1)
        box.counts.append(1)
        box.tokens.append(largest)
        box.add_logprobs(RequestId((1 << 63) - 1), [TokenLogprobs(-1.5, ((largest, -1.5),) * 20)])
    size = box.take(None, draining=False).ByteSize()
    allowed = 100 * (TOKEN_BYTES + LOGPROBS_BYTES + 20 * LOGPROB_BYTES)
    assert size <= allowed


def test_full_frames_go_first_and_in_order() -> None:
    async def scenario() -> None:
        box = with_tokens(9)
        frames = [node_pb2.NodeFrame(tokens=[number]) for number in (1, 2)]
        for frame in frames:
            box.seal(frame)
        assert not await is_awake(box)
        found = []
        while (sealed := box.next_sealed()) is not None:
            found.append(sealed)
            # Whatever is left, if only tokens that are not in a full frame, has the writer go on.
            assert await is_awake(box)
        assert found == frames
        assert not await is_awake(box)
        assert list(box.take(None, draining=False).tokens) == [9]

    run_virtually(scenario)


def test_changes_of_holdings_are_cut_by_bytes_one_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "FRAME_BYTES_MAX", 2 * removed(1).ByteSize())

    async def scenario() -> None:
        box = outbox()
        box.add_kv([removed(1), removed(2), removed(3), removed(4, 99), removed(5)])
        assert sequences(box.take(None, draining=False)) == [1, 2]
        assert (box.unsent, await is_awake(box)) == (101, True)
        assert sequences(box.take(None, draining=False)) == [3]
        # One that is larger than a frame should be goes alone.
        assert sequences(box.take(None, draining=False)) == [4]
        assert (box.unsent, await is_awake(box)) == (1, True)
        assert sequences(box.take(None, draining=False)) == [5]
        assert (box.unsent, box.pending, await is_awake(box)) == (0, False, False)

    run_virtually(scenario)


def test_pages_go_one_a_frame_and_the_last_with_what_came_after() -> None:
    async def scenario() -> None:
        box = outbox()
        box.start_over([KvBatch(1, cleared=True, snapshot=1, more=True), KvBatch(1, snapshot=1, page=1)])
        box.add_kv([removed(2)])
        first = box.take(None, draining=False)
        assert ([(batch.page, batch.more) for batch in first.kv], await is_awake(box)) == ([(0, True)], True)
        assert sequences(box.take(None, draining=False)) == [1, 2]
        assert (box.pending, await is_awake(box)) == (False, False)

    run_virtually(scenario)


def test_waking_is_remembered_once_and_replaces_the_timer() -> None:
    async def scenario() -> None:
        box = outbox()
        box.timer = asyncio.get_running_loop().call_later(1.0, box.wake)
        box.wake()
        box.wake()
        assert box.timer is None
        assert [await is_awake(box) for _ in range(2)] == [True, False]
        await asyncio.sleep(2.0)
        assert not await is_awake(box)
        box.cancel_timer()

    run_virtually(scenario)


def test_heartbeats_come_where_nothing_else_does() -> None:
    async def scenario() -> None:
        box, loop = outbox(), asyncio.get_running_loop()

        async def beats(seconds: float, each: float = 0.0) -> int:
            """Count how often the writer wakes; each time it sends a frame. Frames of another cause go out every `each`."""
            end, woken = loop.time() + seconds, 0
            while loop.time() < end:
                if each:
                    await asyncio.sleep(each)
                    box.frames_sent += 1
                    continue
                try:
                    await asyncio.wait_for(box.awake(), end - loop.time())
                except TimeoutError:
                    break
                woken += 1
                box.frames_sent += 1
            return woken + (await is_awake(box))

        box.start_beating(1.0)
        # A beat after one that sent a frame sees that frame: every other time is enough.
        assert await beats(20.5) == 10
        box.start_beating(1.0)
        assert await beats(20.5, each=0.9) == 0
        box.stop_beating()
        assert await beats(20.5) == 0
        box.start_beating(0.0)
        assert await beats(20.5) == 0
        box.start_beating(HEARTBEAT_S_MIN / 1000)
        assert 1 <= await beats(10 * HEARTBEAT_S_MIN) <= 10
        box.stop_beating()

    run_virtually(scenario)
