"""Lanes between hosts: the same tokens, ends that are seen at once, and nobody heard but the cluster's own."""

import json
import queue
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.core.config import SplitConfig
from orchestrator.core.types import RankName
from orchestrator.wire.trust import Caller, Trust, read_trust
from tests.live.test_trust import certificates
from tests.oracle import oracle
from tests.workers.beat.beating import beat_engine, lpx_pool
from tests.workers.beat.test_beat_identity import OUTPUT_TOKENS, decode
from tests.workers.conductor import Conductor, engine_of, prompts_of, without_ties
from tests.workers.split.test_split_identity import ranks_of
from workers.engines import greetings
from workers.engines.base import EngineLost, NetworkPlace, SplitPlaces
from workers.engines.checkpoint import FAMILIES, create_checkpoint
from workers.engines.eager import EagerEngine
from workers.engines.greetings import framed, place_of
from workers.engines.inlet import Inlet
from workers.engines.split.lanes import ROWS_MAX, Header, LaneLayout, RankLost
from workers.engines.split.network import NetworkLink, network_door
from workers.engines.split.rank import FfnRank
from workers.ranks import BeatFfnServer, open_rank

CPU = torch.device("cpu")
TRUST = Trust(b"the cluster's")
#: Seconds that nothing here takes unless it hangs.
LONG_S = 20.0
PLAIN, MUTUAL = "plain", "mutual TLS"
Reach = Callable[[FfnRank, int], str]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=[PLAIN, MUTUAL])
def trust(request: pytest.FixtureRequest, tmp_path: Path) -> Trust:
    return certified(tmp_path / "tls") if request.param == MUTUAL else TRUST


def certified(folder: Path) -> Trust:
    """Return the same cluster with certificates of an authority of its own."""
    return read_trust("the cluster's", certificates(folder))


def over_network(rank: FfnRank, number: int) -> str:
    assert rank.network_address is not None
    return rank.network_address


def second_over_network(rank: FfnRank, number: int) -> str:
    return over_network(rank, number) if number else rank.address


def attention_of(
    path: Path, ranks: Sequence[FfnRank], trust: Trust, reach: Reach = over_network, spare_slots: int = 0, microbatches: int = 0
) -> EagerEngine:
    addresses = tuple(reach(rank, number) for number, rank in enumerate(ranks))
    return engine_of(path, split=SplitPlaces(addresses, spare_slots, microbatches, LONG_S, trust=trust))


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("ffn", "spare", "microbatches"), [(1, 0, 1), (2, 1, 2)])
def test_tokens_are_those_of_transformers(tmp_path: Path, family: str, ffn: int, spare: int, microbatches: int) -> None:
    path = tmp_path / "model"
    create_checkpoint(path, family, 11, layers=2)
    prompts, expected = without_ties(oracle(path), prompts_of(1, [1, 16, 17, 90]), 12)
    with ranks_of(path, ffn, spare, TRUST) as ranks:
        engine = attention_of(path, ranks, TRUST, spare_slots=spare, microbatches=microbatches)
        assert Conductor(engine, engine_of(path), seed=4).run(prompts, 12, 4) == expected
        assert engine.split is not None
        assert engine.split.times.rows > 0
        engine.close()


@pytest.mark.slow
def test_two_attention_ranks_share_two_ffn_ranks_in_either_way_while_experts_move(tmp_path: Path, trust: Trust) -> None:
    path = tmp_path / "model"
    create_checkpoint(path, "qwen3_moe", 12, layers=2)
    prompts, expected = without_ties(oracle(path), prompts_of(2, [30, 31, 32]), 12)
    found: dict[int, list[list[int]]] = {}
    with ranks_of(path, 2, 1, trust) as ranks:
        engines = [attention_of(path, ranks, trust, reach, 1, 2) for reach in (over_network, second_over_network)]

        def run(number: int) -> None:
            found[number] = Conductor(engines[number], engine_of(path), seed=number).run(prompts, 12, 3)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for layer in range(2):
            for rank in ranks:
                rank.prepare(layer, 1, ((0, 1, 2, 3, 4), (3, 4, 5, 6, 7)))
            for engine in engines:
                assert engine.split is not None
                engine.split.use(layer, 1, ((0, 1, 2, 3, 4), (3, 4, 5, 6, 7)))
        for thread in threads:
            thread.join()
        for engine in engines:
            engine.close()
    assert found == {0: expected, 1: expected}


@pytest.mark.slow
def test_a_beat_is_kept_over_halves_on_two_hosts(tmp_path: Path) -> None:
    path = tmp_path / "model"
    create_checkpoint(path, "qwen3_moe", 11)
    prompts, expected = without_ties(oracle(path), prompts_of(5, [5, 60, 200]), OUTPUT_TOKENS)
    pool = lpx_pool(split=SplitConfig(imbalance_max=0.0, threads=1, across_hosts=True))
    ended: queue.Queue[BaseException] = queue.Queue()
    rank = open_rank(pool, path, 0, ended.put, NetworkPlace("127.0.0.1", TRUST))
    assert isinstance(rank, BeatFfnServer)
    assert rank.network_address is not None
    target = beat_engine(path, places=SplitPlaces((rank.network_address,), trust=TRUST))
    assert decode(engine_of(path), target, prompts, OUTPUT_TOKENS) == expected
    assert target.halves is not None
    assert (target.halves.links_shared, target.halves.links_network) == (0, 1)
    target.close()
    rank._child.end()
    assert isinstance(ended.get(timeout=LONG_S), EngineLost)


# --- ends -------------------------------------------------------------------------------------------------------------


def test_a_rank_that_ends_ends_the_step(tmp_path: Path, trust: Trust) -> None:
    path = tmp_path / "model"
    create_checkpoint(path, "llama", 14, layers=1)
    with ranks_of(path, 1, trust=trust) as ranks:
        engine = attention_of(path, ranks, trust)
    with pytest.raises(RankLost, match="is gone: "):
        Conductor(engine, engine_of(path), seed=1).run(prompts_of(1, [5]), 2, 1)
    engine.close()
    with pytest.raises(RankLost, match="does not take a connection"):
        attention_of(path, ranks, trust)


def test_a_rank_of_another_model_is_refused(tmp_path: Path, trust: Trust) -> None:
    create_checkpoint(tmp_path / "one", "llama", 14, layers=1)
    create_checkpoint(tmp_path / "other", "llama", 14, layers=1, hidden=64)
    with (
        ranks_of(tmp_path / "one", 1, trust=trust) as ranks,
        pytest.raises(RankLost, match=r"does not take a connection: refused: its rows are .*64.*, here they are .*128"),
    ):
        attention_of(tmp_path / "other", ranks, trust)


# --- lanes by themselves ----------------------------------------------------------------------------------------------

LAYOUT = LaneLayout(lanes=2, rows_max=8, hidden=16, picks=2, dtype=torch.bfloat16)


@contextmanager
def doubling(trust: Trust, layout: LaneLayout = LAYOUT) -> Iterator[str]:
    """Have an inlet serve whose sums are the rows twice; yields its address."""
    address, door = network_door("127.0.0.1", trust, layout, CPU)
    inlet = Inlet([door])

    def serve() -> None:
        for peer, (header, lane) in inlet.messages():
            lane.sums[: header.rows] = lane.rows[: header.rows].float() * 2
            inlet.answer(peer, header.done(7))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield address
    finally:
        inlet.close()
        thread.join()


def linked(address: str, trust: Trust, layout: LaneLayout = LAYOUT, silent_s: float = LONG_S) -> NetworkLink:
    return NetworkLink(address, layout, silent_s, trust, CPU)


def post(link: NetworkLink, rows: int, value: float) -> None:
    """Fill and send a lane."""
    number, lane = link.take()
    lane.rows[:rows] = value
    lane.weights[:rows], lane.picks[:rows] = 1.0, 0
    link.post(Header(number, 0, 0, rows))


def doubled(link: NetworkLink, rows: int, value: float) -> bool:
    """Tell whether the oldest message's answer is its rows twice."""
    header, lane = link.wait()
    link.give(header.lane)
    return bool((lane.sums[:rows] == 2 * value).all()) and (header.rows, header.busy_ns) == (rows, 7)


def works(address: str, trust: Trust) -> bool:
    """Tell whether an inlet takes and serves an attention rank."""
    link = linked(address, trust)
    post(link, 3, 1.5)
    fine = doubled(link, 3, 1.5)
    link.close()
    return fine


def test_messages_under_way_together_are_answered_in_their_order(trust: Trust) -> None:
    with doubling(trust) as address:
        link = linked(address, trust)
        for turn in range(20):
            post(link, 1 + turn % 8, turn)
            post(link, 8, turn + 0.5)
            assert doubled(link, 1 + turn % 8, turn)
            assert doubled(link, 8, turn + 0.5)
        link.close()


@pytest.mark.slow
def test_neither_side_waits_for_the_other_to_read(trust: Trust) -> None:
    # Both messages and both answers are more than connections hold: each side is still sending when the other one wants to.
    large = LaneLayout(lanes=2, rows_max=8192, hidden=512, picks=0, dtype=torch.float32)
    with doubling(trust, large) as address:
        link = linked(address, trust, large)
        post_only_rows(link, 8192, 1.0)
        post_only_rows(link, 8192, 2.0)
        assert doubled(link, 8192, 1.0)
        assert doubled(link, 8192, 2.0)
        link.close()


def post_only_rows(link: NetworkLink, rows: int, value: float) -> None:
    number, lane = link.take()
    lane.rows[:rows] = value
    link.post(Header(number, 0, 0, rows))


@pytest.mark.slow
def test_an_attention_rank_that_reads_nothing_or_ends_halfway_holds_up_nobody(trust: Trust) -> None:
    large = LaneLayout(lanes=2, rows_max=8192, hidden=512, picks=0, dtype=torch.float32)
    with doubling(trust, large) as address:
        deaf, dying, other = (linked(address, trust, large) for _ in range(3))
        post_only_rows(deaf, 8192, 1.0)
        dying._stream.drain([memoryview(Header(0, 0, 0, 5).pack()), memoryview(bytes(100))])
        post_only_rows(other, 4, 3.0)
        assert doubled(other, 4, 3.0)
        dying.close()
        deaf.close()
        post_only_rows(other, 8192, 4.0)
        assert doubled(other, 8192, 4.0)
        other.close()


def test_a_rank_that_is_silent_is_lost(trust: Trust) -> None:
    address, door = network_door("127.0.0.1", trust, LAYOUT, CPU)
    inlet = Inlet([door])  # takes connections, and nobody serves
    link = linked(address, trust, silent_s=0.05)
    post(link, 3, 1.0)
    with pytest.raises(RankLost, match=r"has not answered for 0\.05 s"):
        link.wait()
    link.close()
    inlet.close()
    assert list(inlet.messages()) == []


# --- strangers --------------------------------------------------------------------------------------------------------


def hello_of(address: str, trust: Trust = TRUST, **changes: object) -> bytes:
    """Return a hello with some of what it says changed."""
    said = greetings.hello_of(address, Caller.RANK, LAYOUT.said, trust, "00") | changes
    return framed(json.dumps({key: value for key, value in said.items() if value is not None}).encode())


def answer_to(address: str, data: bytes) -> bytes:
    """Say something to a door and return what it says before it ends the connection."""
    with socket.create_connection(place_of(address), LONG_S) as connection:
        connection.sendall(data)
        answer = b""
        with suppress(ConnectionResetError):  # it was not read to its end
            while piece := connection.recv(4096):
                answer += piece
        return answer


HELLOS: dict[str, Callable[[str], bytes]] = {
    "nobody": lambda address: hello_of(address, metadata=[]),
    "without metadata": lambda address: hello_of(address, metadata=None),
    "metadata of no text": lambda address: hello_of(address, metadata=[["weft-token", 5], [], 7, [["a"], "b"]]),
    "of another cluster": lambda address: hello_of(address, Trust(b"guessed")),
    "for another rank": lambda address: hello_of("weft-ffn-1-00000000@x"),
    "of a gateway": lambda address: hello_of(
        address, metadata=TRUST.metadata(Caller.GATEWAY, RankName(address.partition("@")[0]))
    ),
    "of another protocol": lambda address: hello_of(
        address, metadata=[*TRUST.metadata(Caller.RANK, RankName(address.partition("@")[0])), ("weft-protocol", "1")]
    ),
    "surrogates": lambda address: hello_of(address, metadata=[["weft-token", "\ud800"]]),
    "no number": lambda address: hello_of(address, nonce=None),
    "a number without end": lambda address: hello_of(address, nonce="0" * 65),
    "no text": lambda address: framed(b"\xff\xfe\x00{}"),
    "brackets": lambda address: framed(b"[" * 4000),
    "a list": lambda address: framed(b"[]"),
    "too long": lambda address: struct.pack("<I", 1 << 31) + bytes(64),
    "HTTP": lambda address: b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
}


@pytest.mark.parametrize("hello", HELLOS.values(), ids=HELLOS)
def test_whoever_has_no_token_is_nobody(hello: Callable[[str], bytes]) -> None:
    with doubling(TRUST) as address:
        assert answer_to(address, hello(address)) == b""
        assert works(address, TRUST)


@pytest.mark.parametrize(
    "changes",
    [{"lanes": 0}, {"lanes": 5}, {"lanes": True}, {"lanes": None}, {"rows_max": ROWS_MAX + 1}, {"rows_max": -1},
     {"rows_max": 1.0}, {"hidden": 8}, {"picks": None}, {"dtype": "float32"}, {"bytes": "big"}],
    ids=str,
)  # fmt: skip
def test_lanes_that_are_none_of_the_groups_are_refused(changes: dict[str, object]) -> None:
    with doubling(TRUST) as address:
        answer = answer_to(address, hello_of(address, **changes))
        said = TRUST.unsealed(answer[4:])
        assert said is not None
        assert len(said) > len("00")
        assert works(address, TRUST)


def test_without_a_certificate_of_the_clusters_nothing_is_heard(tmp_path: Path) -> None:
    ours, theirs = certified(tmp_path / "ours"), certified(tmp_path / "theirs")
    with doubling(ours) as address:
        for outsider in (TRUST, theirs):
            with pytest.raises(RankLost, match="does not take a connection"):
                linked(address, outsider)
        assert works(address, ours)


def test_certificates_may_bear_their_hosts_addresses(tmp_path: Path) -> None:
    trust = read_trust("the cluster's", replace(certificates(tmp_path / "tls"), name=""))
    with doubling(trust) as address:
        assert works(address, trust)


def test_nothing_is_sent_to_a_rank_that_is_not_the_clusters() -> None:
    """A listener that says yes to everybody learns a token, and no activation."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def agree() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(framed(bytes(40)))

        thread = threading.Thread(target=agree)
        thread.start()
        with pytest.raises(RankLost, match="it is none of this cluster's"):
            linked(f"weft-ffn@127.0.0.1:{listener.getsockname()[1]}", TRUST)
        thread.join()


def test_strangers_who_say_nothing_hold_up_nobody() -> None:
    with doubling(TRUST) as address:
        silent = [socket.create_connection(place_of(address), LONG_S) for _ in range(4)]
        silent[0].sendall(struct.pack("<I", 100) + b"{")
        assert works(address, TRUST)
        for one in silent:
            one.close()


# --- frames that mean nothing -----------------------------------------------------------------------------------------

ROW = LAYOUT.hidden * 2 + LAYOUT.picks * 12
FRAMES: dict[str, bytes] = {
    "no such lane": Header(2, 0, 0, 1).pack() + bytes(ROW),
    "no rows": Header(0, 0, 0, 0).pack(),
    "too many rows": Header(0, 0, 0, 9).pack() + bytes(9 * ROW),
    "a lane twice": (Header(0, 0, 0, 1).pack() + bytes(ROW)) * 2,
    "a slot below 0": Header(0, 0, 0, 1).pack() + bytes(LAYOUT.hidden * 2 + LAYOUT.picks * 4) + b"\xff" * LAYOUT.picks * 8,
}


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
def test_a_message_that_means_nothing_ends_its_connection_alone(frame: bytes) -> None:
    address, door = network_door("127.0.0.1", TRUST, LAYOUT, CPU)
    inlet = Inlet([door])
    with linked_pair(inlet, address) as (other, hostile):
        hostile._stream.drain([memoryview(frame)])
        hostile._sent.append(Header(0, 0, 0, 1))
        with pytest.raises(RankLost, match="is gone: "):
            hostile.wait()
        post(other, 2, 4.0)
        assert doubled(other, 2, 4.0)


@contextmanager
def linked_pair(inlet: Inlet, address: str) -> Iterator[tuple[NetworkLink, NetworkLink]]:
    """Have an inlet that answers the messages of one rank alone; yields its link and another one."""
    served, ignored = linked(address, TRUST), linked(address, TRUST)

    def serve() -> None:
        for peer, (header, lane) in inlet.messages():
            if header.rows > 1:
                lane.sums[: header.rows] = lane.rows[: header.rows].float() * 2
                inlet.answer(peer, header.done(7))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield served, ignored
    finally:
        inlet.close()
        thread.join()
        served.close()
        ignored.close()


@pytest.mark.parametrize(("layer", "version"), [(2, 0), (0, 1), (1 << 31, 1 << 31)])
def test_a_layer_or_a_placement_that_a_rank_has_not_ends_the_asker_alone(tmp_path: Path, layer: int, version: int) -> None:
    path = tmp_path / "model"
    create_checkpoint(path, "qwen3_moe", 11, layers=2)
    prompts, expected = without_ties(oracle(path), prompts_of(1, [5]), 4)
    with ranks_of(path, 1, trust=TRUST) as ranks:
        engine, lost = attention_of(path, ranks, TRUST), attention_of(path, ranks, TRUST)
        assert lost.split is not None
        [link] = lost.split.links
        number, _ = link.take()
        link.post(Header(number, layer, version, 1))
        with pytest.raises(RankLost, match="is gone: "):
            link.wait()
        assert Conductor(engine, engine_of(path), seed=1).run(prompts, 4, 1) == expected
        engine.close()
        lost.close()


def test_an_answer_to_something_else_is_none() -> None:
    address, door = network_door("127.0.0.1", TRUST, LAYOUT, CPU)
    inlet = Inlet([door])

    def serve() -> None:
        for peer, (header, _) in inlet.messages():
            inlet.answer(peer, Header(header.lane, header.layer + 1, header.version, header.rows))

    thread = threading.Thread(target=serve)
    thread.start()
    link = linked(address, TRUST)
    post(link, 2, 1.0)
    with pytest.raises(RankLost, match=r"has answered Header\(.*layer=1.*asked was Header\(.*layer=0"):
        link.wait()
    link.close()
    inlet.close()
    thread.join()
