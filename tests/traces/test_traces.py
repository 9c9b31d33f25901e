"""Tests of the trace reader: each form means what it should, and each fault is one line that names file, line and field."""

import gzip
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from orchestrator.sim.names import PRIVATE_NAMES
from orchestrator.traces import TimeUnit, TracedTurn, TraceError, interleaved, is_per_session_clock, read_trace
from tests.builders import some

LINE = {"timestamp": 0, "session": "a", "id": 0, "input_length": 130, "output_length": 9, "block_size": 64, "hash_ids": [7, 8]}
ROOT = Path(__file__).parents[2]


def written(path: Path, lines: Sequence[Mapping[str, Any] | str]) -> Path:
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(path: Path, *lines: Mapping[str, Any] | str, unit: TimeUnit | None = None) -> list[TracedTurn]:
    return list(read_trace(written(path / "trace.jsonl", lines), unit))


def problem(path: Path, *lines: Mapping[str, Any] | str, unit: TimeUnit | None = None) -> str:
    """Return what the error says, without the file's folder."""
    with pytest.raises(TraceError) as raised:
        read(path, *lines, unit=unit)
    assert "\n" not in str(raised.value)
    return str(raised.value).removeprefix(f"{path}/")


# --- Weft's own lines -------------------------------------------------------------------------------------------------


def test_a_line_of_ours_keeps_all_that_agents_do(tmp_path: Path) -> None:
    more = {"id": 5, "timestamp": 2500, "agent": "sub", "deps": [0], "gap_ms": 40, "model": "m", "tenant": "t", "seam": True}
    first, second = read(tmp_path, LINE, "\n", {**LINE, **more, "stop": "tool_use", "of_tomorrow": [1]})
    assert first == TracedTurn(0, "a", "main", 0.0, (), 0.0, 130, 9, 64, ((7, 2),))
    assert second == TracedTurn(5, "a", "sub", 2.5, (0,), 0.04, 130, 9, 64, ((7, 2),), "m", "t", True, True)
    assert [read(tmp_path, {**LINE, "stop": stop})[0].calls for stop in ("end_turn", "length", "")] == [False, None, None]
    assert second.blocks == [7, 8]


def test_ids_that_are_no_small_numbers_become_small(tmp_path: Path) -> None:
    dates = [1_760_000_000_000 + 7 * number for number in (3, 1, 2)]
    lines = [{**LINE, "id": date, "deps": dates[:number]} for number, date in enumerate(dates)]
    zero, *turns = read(tmp_path, {**LINE, "id": 0}, *lines)
    first = turns[0].id
    assert [(turn.id - first, turn.after) for turn in turns] == [(0, ()), (1, (first,)), (2, (first, first + 1))]
    # An answer's blocks have names counted from a turn's id: 64 bits must hold them, and those of a thousand copies.
    assert zero.id == 0 < 1000 * (first + 2) * PRIVATE_NAMES < 2**63
    # What is wrong is told in the file's own words.
    assert problem(tmp_path, *lines, lines[2]) == f"trace.jsonl:4: id: {dates[2]} was used before; every request needs its own"
    early = [lines[0], {**lines[1], "deps": [dates[2]]}, lines[2]]
    assert problem(tmp_path, *early) == f"trace.jsonl:2: deps: a cycle: {dates[1]} waits for {dates[2]} waits for {dates[1]}"


def test_ranges_and_lists_of_blocks_mean_the_same(tmp_path: Path) -> None:
    ranges = {**LINE, "id": 1, "hash_ranges": [[7, 1], [8, 1]]}
    del ranges["hash_ids"]
    first, second = read(tmp_path, LINE, ranges)
    assert first.block_runs == second.block_runs == ((7, 2),)


def test_a_block_that_is_part_filled_is_dropped(tmp_path: Path) -> None:
    (turn,) = read(tmp_path, {**LINE, "hash_ids": [7, 8, 3]})
    assert turn.block_runs == ((7, 2),)


def test_requests_without_id_session_or_blocks_get_what_they_lack(tmp_path: Path) -> None:
    bare = {"timestamp": 0, "session": None, "input_length": 3, "output_length": 0, "hash_ids": [], "block_size": 0}
    first, second = read(tmp_path, bare, bare)
    assert (first.id, second.id) == (0, 1)
    assert first.session != second.session
    assert (first.block_tokens, first.block_runs) == (0, ())


def test_names_that_are_no_small_numbers_become_dense(tmp_path: Path) -> None:
    other = {**LINE, "id": 1, "input_length": 192, "hash_ids": ["aa", 2**63, "b"]}
    first, second = read(tmp_path, {**LINE, "hash_ids": ["aa", 2**63]}, other)
    (run,), (longer,) = first.block_runs, second.block_runs
    assert (run[0], run[1], longer[1]) == (longer[0], 2, 3)


def test_dates_become_times_since_the_first_arrival(tmp_path: Path) -> None:
    turns = read(tmp_path, *({**LINE, "id": number, "timestamp": 1_760_000_000_000 + 500 * number} for number in range(3)))
    assert [turn.arrival_s for turn in turns] == [0.0, 0.5, 1.0]


def test_gzip_is_told_by_content_and_by_name(tmp_path: Path) -> None:
    packed = written(tmp_path / "trace.gz", [LINE])
    assert len(list(read_trace(packed))) == 1
    assert len(list(read_trace(packed.rename(tmp_path / "trace.jsonl")))) == 1


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_pipe_is_read_like_a_file(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    other = dynamo("a", 1, 1, "s"), dynamo("b", 3, 1, "s")
    mooncake = [{"timestamp": 5, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]}]
    for lines, found in (([LINE, {**LINE, "id": 1}], 2), (other, 2), (mooncake, 1), ([LINE, {**LINE, "id": 1, "deps": [2]}], 0)):
        pipe = tmp_path / f"pipe{len(list(tmp_path.iterdir()))}"
        os.mkfifo(pipe)
        content = pack("".join(json.dumps(line) + "\n" for line in lines).encode())
        writer = Thread(target=pipe.write_bytes, args=(content,))
        writer.start()
        if found:
            assert len(list(read_trace(pipe))) == found
        else:
            with pytest.raises(TraceError, match="deps: 2 is no request of this file"):
                list(read_trace(pipe))
        writer.join()


@pytest.mark.parametrize("name", ["orchestrator/cli/data/agent_session.jsonl", "bench/data/agent_mix.jsonl.gz"])
def test_shipped_traces_are_readable(name: str) -> None:
    assert all(turn.block_runs for turn in some(read_trace(ROOT / name)))


# --- others' lines ----------------------------------------------------------------------------------------------------


def test_mooncake_lines_are_requests_in_blocks_of_512(tmp_path: Path) -> None:
    first = {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}
    one, two = read(tmp_path, first, {**first, "timestamp": 3000, "hash_ids": [0, 1, 9]})
    assert (one.block_tokens, one.block_runs, two.arrival_s) == (512, ((0, 2),), 3.0)
    assert one.after == two.after == ()
    assert one.session != two.session


def test_mooncake_sessions_wait_for_the_turn_before(tmp_path: Path) -> None:
    first = {"session_id": "s", "created_time": 100, "input_tokens": 64, "output_tokens": 5, "hash_ids": list(range(4))}
    later = {"session_id": "s", "delay_ms": 50, "input_length": 96, "output_length": 5, "hash_ids": list(range(6))}
    other = {**first, "session_id": "t", "created_time": 120}
    turns = read(tmp_path, first, later, other)
    assert [(turn.session, turn.arrival_s, turn.after, turn.gap_s) for turn in turns] == [
        ("s", 0.1, (), 0.0),
        ("t", 0.12, (), 0.0),
        ("s", pytest.approx(0.15), (0,), 0.05),
    ]
    assert turns[0].block_tokens == 16


def test_delta_turns_become_whole_prompts(tmp_path: Path) -> None:
    first = {"session_id": "s", "timestamp": 0, "input_length": 64, "output_length": 16, "hash_ids": [0, 1, 2, 3]}
    later = {"session_id": "s", "delay": 50, "input_length": 32, "output_length": 5, "hash_ids": [4, 5]}
    one, two, three = read(tmp_path, first, later, {**later, "hash_ids": [6, 7]})
    assert (two.input_tokens, three.input_tokens) == (112, 149)
    assert two.block_runs[0] == (0, 4)
    assert len(set(three.blocks)) == 9
    assert three.blocks[:7] == two.blocks, "what came before is the prefix of what follows"
    assert one.blocks == [0, 1, 2, 3]


def test_agentic_mooncake_waits_for_requests_by_name(tmp_path: Path) -> None:
    base = {"input_length": 64, "output_length": 5, "hash_ids": [0]}
    root = {**base, "request_id": "r", "session_id": "s", "timestamp": 10, "wait_for": [], "branches": ["x"]}
    sub = {**base, "request_id": "x", "session_id": "sub", "wait_for": ["r"], "delay": 5, "tool_wait_ms": 20, "tool_events": [{}]}
    join = {**base, "request_id": "j", "session_id": "s", "wait_for": ["r", "x"], "delay": 1, "prefix_reset": True}
    turns = read(tmp_path, root, sub, join)
    assert [(turn.after, turn.gap_s) for turn in turns] == [((), 0.0), ((0,), 0.025), ((0, 1), 0.001)]
    assert [turn.seam for turn in turns] == [False, False, True]


def dynamo(name: str, received: int, took: int, session: str | None, parent: str | None = None) -> dict[str, Any]:
    replay = {"trace_block_size": 16, "input_length": 40, "input_sequence_hashes": [2**60, 2**61]}
    request = {"request_id": name, "model": "m", "output_tokens": 3, "request_received_ms": received, "total_time_ms": took}
    event = {"schema": "dynamo.request.trace.v1", "event_type": "request_end", "request": {**request, "replay": replay}}
    if session is not None:
        event["agent_context"] = {"session_id": session, "parent_session_id": parent}
    return {"timestamp": received + took, "event": event}


def test_dynamo_requests_wait_for_what_had_ended_when_they_came(tmp_path: Path) -> None:
    tool = {"event": {"schema": "dynamo.request.trace.v1", "event_type": "tool_end", "tool": {"tool_call_id": "t"}}}
    turns = read(
        tmp_path,
        dynamo("one", 1000, 100, "s"),
        tool,
        dynamo("sub", 1150, 200, "child", "s"),
        dynamo("alone", 1160, 10, None),
        dynamo("join", 1400, 50, "s")["event"],
    )
    assert [(turn.agent, turn.arrival_s, turn.after, round(turn.gap_s, 6)) for turn in turns] == [
        ("main", 0.0, (), 0.0),
        ("child", 0.15, (0,), 0.05),
        ("main", 0.16, (), 0.0),
        ("main", 0.4, (0, 1), 0.05),
    ]
    assert turns[0].session == turns[1].session == turns[3].session == "s"
    assert turns[0].block_runs == turns[1].block_runs
    assert len(turns[0].blocks) == 2


def test_many_requests_of_one_dynamo_session_wait_for_the_last_that_had_ended(tmp_path: Path) -> None:
    # Every request ends long after the next ones have come: each waits for the one 500 before it.
    lines = [dynamo(str(number), 1000 * number, 500_000, "s") for number in range(3000)]
    turns = read(tmp_path, *lines)
    assert [turn.after for turn in turns[499:502]] == [(), (0,), (1,)]
    assert turns[-1].after == (2499,)


# --- Bailian's lines --------------------------------------------------------------------------------------------------


def chat(identity: int, parent: int, timestamp: float, names: Sequence[int] = (), **more: Any) -> dict[str, Any]:
    """Return a line as Bailian's traces have them; its prompt fills its blocks, but for the last one."""
    tokens = max(1, 16 * len(names) - 6)
    line = {"chat_id": identity, "parent_chat_id": parent, "timestamp": timestamp, "input_length": tokens, "output_length": 7}
    return {**line, "type": "text", "turn": 1, "hash_ids": list(names), **more} if names else {**line, **more}


def test_bailian_chats_continue_each_other_in_seconds(tmp_path: Path) -> None:
    turns = read(
        tmp_path,
        chat(0, -1, 0.0, [0, 1, 2], type="file"),
        chat(7, -1, 1.25, [0, 1, 5]),
        chat(8, 0, 61.5, [0, 1, 2, 3], turn=2),
        chat(9, 0, 70.0, [0, 1, 2, 4], turn=2),
        chat(10, 8, 71.0, [0, 1, 2, 3, 6], turn=3, type="search"),
        chat(11, 3, 72.0, [9, 10]),  # what it continues came before the recording began
    )
    assert [(turn.session, turn.arrival_s, turn.after, turn.gap_s) for turn in turns] == [
        ("chat 0", 0.0, (), 0.0),
        ("chat 7", 1.25, (), 0.0),
        ("chat 0", 61.5, (0,), 61.5),
        ("chat 0", 70.0, (0,), 70.0),
        ("chat 0", 71.0, (2,), 9.5),
        ("chat 11", 72.0, (), 0.0),
    ]
    assert {turn.block_tokens for turn in turns} == {16}
    # The last block is part filled.
    assert [turn.blocks for turn in turns] == [[0, 1], [0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2, 3], [9]]
    assert (turns[0].input_tokens, turns[0].output_tokens) == (42, 7)


def test_bailian_names_may_be_of_blocks_or_of_prefixes(tmp_path: Path) -> None:
    first, second, third, fourth = read(
        tmp_path,
        chat(0, -1, 0, [4, 4, 4, 5, 0]),  # a text that repeats itself
        chat(1, -1, 0, [4, 4, 6, 4, 5, 0]),
        chat(2, -1, 0, [8, 5, 0]),  # a block that was seen after another prefix
        chat(3, -1, 0, [4, 4, 4, 5, 7, 0]),
    )
    assert first.blocks[0] == 4
    assert [len(set(turn.blocks)) for turn in (first, second, third, fourth)] == [4, 5, 2, 5]
    assert second.blocks[:2] == first.blocks[:2]
    assert not {*second.blocks[2:]} & {*first.blocks}
    assert not {*third.blocks} & {*first.blocks, *second.blocks}
    assert fourth.blocks[:4] == first.blocks


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"timestamp": -1}, "timestamp: expected `float` >= 0.0, is -1"),
        ({"timestamp": None}, "timestamp: expected `float`, is None"),
        ({"timestamp": 1e12}, "timestamp: 1000000000000 s is beyond any date; --time-unit ms reads it as milliseconds"),
        ({"chat_id": 0}, "chat_id: 0 was on line 1 before"),
        ({"chat_id": None}, "chat_id: expected `int | str`, is None"),
        ({"parent_chat_id": [0]}, "parent_chat_id: expected `int | str`, is [0]"),
        ({"parent_chat_id": 5}, "parent_chat_id: a cycle: 5 waits for 5"),
        ({"parent_chat_id": 6}, "parent_chat_id: 6 is not an earlier request, but that of line 3"),
        ({"timestamp": 3.5}, "timestamp: 3.5 is before 4, when the request came that this one continues"),
        ({"input_length": 0}, "input_length: expected `int` >= 1, is 0"),
        ({"output_length": 1.5}, "output_length: expected `int`, is 1.5"),
        ({"hash_ids": [1]}, "hash_ids: names 1 blocks, but 42 tokens fill 2 blocks of 16"),
        ({"hash_ids": None}, "hash_ids: missing, but earlier lines have them"),
    ],
)
def test_a_malformed_line_of_bailian_is_named(tmp_path: Path, line: Mapping[str, Any], said: str) -> None:
    lines = [chat(0, -1, 4.0, [0, 1, 2]), {**chat(5, 0, 5.0, [0, 1, 2]), **line}, chat(6, 0, 6.0, [0, 1, 2])]
    assert problem(tmp_path, *lines).startswith(f"trace.jsonl:2: {said}")


@pytest.mark.parametrize("missing", ["chat_id", "parent_chat_id", "timestamp", "input_length", "output_length"])
def test_a_line_of_bailian_that_lacks_something_is_named(tmp_path: Path, missing: str) -> None:
    line = {name: value for name, value in chat(0, -1, 4.0, [0, 1]).items() if name != missing}
    assert problem(tmp_path, line) == f"trace.jsonl:1: {missing}: missing"


# --- seconds and milliseconds -----------------------------------------------------------------------------------------


def plain(*times: float) -> list[dict[str, Any]]:
    return [{"timestamp": time, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]} for time in times]


S, MS = TimeUnit.SECONDS, TimeUnit.MILLISECONDS
RARE = [500 * number for number in range(200)]  # 200 requests in 100 s, or in 28 hours
DENSE = [number // 3 for number in range(200)]  # 200 requests in 66 s, or in 66 ms
SESSION = [{**line, "session_id": "s"} for line in plain(1, 3)]
WAITING = [*SESSION, {"session_id": "s", "delay": 4, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]}]
WAITING_MS = [*SESSION, {"session_id": "s", "delay_ms": 4, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]}]


@pytest.mark.parametrize(
    ("lines", "unit", "latest_s"),
    [
        (plain(0, 27482), None, 27.482),
        (plain(0, 27482.0), None, 27.482),
        (plain(0, 27482), MS, 27.482),
        (plain(0, 27482), S, 27482.0),
        (plain(0, 61.114), S, 61.114),
        (plain(0, 61.114), MS, pytest.approx(0.061114)),
        (plain(*RARE), None, 99.5),
        (plain(*DENSE), S, 66.0),
        (plain(*DENSE), MS, 0.066),
        (plain(*[5.0] * 200), None, 0.005),  # all at once, in whatever unit
        (SESSION, None, 0.003),
        (SESSION, S, 3.0),
        (WAITING, None, pytest.approx(0.007)),
        (WAITING, S, 7.0),
        (WAITING_MS, S, 3.004),
        ([chat(0, -1, 0.0, [1, 2]), chat(1, -1, 61.114, [1, 2])], None, 61.114),
        ([chat(0, -1, 0, [1, 2]), chat(1, -1, 61, [1, 2])], None, 61.0),
        ([chat(0, -1, 0, [1, 2]), chat(1, -1, 61, [1, 2])], S, 61.0),
        ([chat(0, -1, 0, [1, 2]), chat(1, -1, 61, [1, 2])], MS, 0.061),
        ([LINE, {**LINE, "id": 1, "timestamp": 61.114}], None, pytest.approx(0.061114)),
        ([LINE, {**LINE, "id": 1, "timestamp": 61.114}], MS, pytest.approx(0.061114)),
    ],
)
def test_times_are_in_the_unit_that_the_form_or_the_caller_says(
    tmp_path: Path, lines: Sequence[Mapping[str, Any]], unit: TimeUnit | None, latest_s: float
) -> None:
    assert max(turn.arrival_s for turn in read(tmp_path, *lines, unit=unit)) == latest_s


@pytest.mark.parametrize(
    ("lines", "unit", "said"),
    [
        (plain(0, 61.114), None, "trace.jsonl:2: timestamp: 61.114 is no whole number, as milliseconds of this form are; say "),
        (plain(0.5), None, "trace.jsonl:1: timestamp: 0.5 is no whole number"),
        ([{**line, "session_id": 1} for line in plain(0, 0.25)], None, "trace.jsonl:2: timestamp: 0.25 is no whole number"),
        (
            plain(*DENSE),
            None,
            "trace.jsonl: timestamp: 200 requests would come within 0.066 s if times were milliseconds; say --time-unit s if "
            "they are seconds, --time-unit ms if not",
        ),
        (plain(1.5e12), S, "trace.jsonl:1: timestamp: 1500000000000 s is beyond any date; --time-unit ms reads it"),
        (plain(3, 1.5), S, "trace.jsonl:2: timestamp: 1.5 comes after 3; lines must be sorted by time"),
        ([LINE], S, "trace.jsonl: times of Weft's own lines are milliseconds by definition; leave --time-unit out"),
        ([dynamo("a", 1, 1, None)], S, "trace.jsonl: times of dynamo.request.trace are milliseconds by definition"),
    ],
)
def test_times_that_could_be_either_or_are_not_what_was_said_are_refused(
    tmp_path: Path, lines: Sequence[Mapping[str, Any]], unit: TimeUnit | None, said: str
) -> None:
    assert problem(tmp_path, *lines, unit=unit).startswith(said)


@pytest.mark.parametrize(
    ("whole", "floating"),
    [
        (LINE, {**LINE, "id": 0.0, "input_length": 130.0, "output_length": 9.0, "block_size": 64.0, "hash_ids": [7.0, 8.0]}),
        (chat(3, -1, 2, [4, 5]), chat(3, -1, 2.0, [4, 5], input_length=26.0, chat_id=3.0, hash_ids=[4.0, 5.0])),
        (plain(5)[0], {"timestamp": 5.0, "input_length": 6e2, "output_length": 1.0, "hash_ids": [1.0, 2.0]}),
        (dynamo("a", 1, 1, None), json.loads(json.dumps(dynamo("a", 1, 1, None)).replace(": 40", ": 40.0"))),
    ],
)
def test_whole_numbers_may_be_written_as_floats(tmp_path: Path, whole: Mapping[str, Any], floating: Mapping[str, Any]) -> None:
    assert read(tmp_path, whole) == read(tmp_path, floating)


@pytest.mark.parametrize("line", [LINE, plain(5)[0], chat(3, -1, 2, [4, 5]), dynamo("a", 1, 1, None)])
@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path, name: str, line: Mapping[str, Any]) -> None:
    path = written(tmp_path / name, ["\ufeff" + json.dumps(line) + "\n"])
    assert len(list(read_trace(path))) == 1


# --- clocks -----------------------------------------------------------------------------------------------------------


def test_sessions_with_clocks_of_their_own_are_told_and_interleaved(tmp_path: Path) -> None:
    lines = [{**LINE, "id": 2 * n + m, "session": f"s{n}", "timestamp": 1000 * m} for n in range(20) for m in range(2)]
    turns = read(tmp_path, *lines)
    assert is_per_session_clock(turns)
    mixed = interleaved(turns, 2.0, seed=1)
    assert mixed == interleaved(turns, 2.0, seed=1) != interleaved(turns, 2.0, seed=2)
    assert [turn.arrival_s for turn in mixed] == sorted(turn.arrival_s for turn in mixed)
    assert not is_per_session_clock(mixed)
    starts = {turn.session: turn.arrival_s for turn in reversed(mixed)}
    assert all(turn.arrival_s - starts[turn.session] in (0.0, pytest.approx(1.0)) for turn in some(mixed))
    assert not is_per_session_clock(read(tmp_path, LINE, {**LINE, "id": 1, "session": "b"}))


# --- faults -----------------------------------------------------------------------------------------------------------


def without(field: str) -> dict[str, Any]:
    return {name: value for name, value in LINE.items() if name != field}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"timestamp": 0,', "trace.jsonl:2: not JSON: "),
        ("[1, 2]", "trace.jsonl:2: must be a JSON object"),
        (without("input_length"), "trace.jsonl:2: input_length: missing"),
        ({**LINE, "id": 1, "input_length": -5}, "trace.jsonl:2: input_length: expected `int` >= 1, is -5"),
        ({**LINE, "id": 1, "input_length": 2**40}, "trace.jsonl:2: input_length: expected `int` <= 4294967296, is 1099511627776"),
        ({**LINE, "id": 1, "output_length": "many"}, "trace.jsonl:2: output_length: expected `int`, is 'many'"),
        ({**LINE, "id": 1, "timestamp": None}, "trace.jsonl:2: timestamp: expected `float`, is None"),
        ({**LINE, "id": 1, "gap_ms": -1}, "trace.jsonl:2: gap_ms: expected `float` >= 0.0, is -1"),
        ({**LINE, "id": 0}, "trace.jsonl:2: id: 0 was used before"),
        (without("id"), "trace.jsonl:2: id: missing, but earlier lines have one"),
        ({**LINE, "id": 1, "deps": [9]}, "trace.jsonl:2: deps: 9 is no request of this file"),
        ({**LINE, "id": 1, "deps": [1]}, "trace.jsonl:2: deps: a cycle: 1 waits for 1"),
        ({**LINE, "id": 1, "deps": "0"}, "trace.jsonl:2: deps: expected `array | null`, is '0'"),
        ({**LINE, "id": 1, "hash_ids": [7]}, "trace.jsonl:2: hash_ids: names 1 blocks, but 130 tokens fill 2 blocks of 64"),
        ({**LINE, "id": 1, "hash_ids": [7, 7]}, "trace.jsonl:2: hash_ids: names block 7 twice"),
        ({**LINE, "id": 1, "hash_ranges": [[7, -2]]}, "trace.jsonl:2: hash_ranges[0][1]: expected `int` >= 1"),
        (
            {**LINE, "id": 1, "hash_ranges": [[2**63 - 1, 2]]},
            "trace.jsonl:2: hash_ranges[0][0]: expected `int` <= 281474976710655",
        ),
        # Deeper than anybody nests: in a field, beside them, in a field that is wrong besides.
        (json.dumps(LINE)[:-1] + ', "deps": ' + "[" * 9000, "trace.jsonl:2: lists or objects are nested too deeply"),
        (json.dumps(LINE)[:-1] + ', "other": ' + "[" * 9000, "trace.jsonl:2: lists or objects are nested too deeply"),
        ('{"timestamp": "x", "other": ' + '{"a":' * 9000, "trace.jsonl:2: lists or objects are nested too deeply"),
        ({**LINE, "id": 1, "block_size": 32}, "trace.jsonl:2: block_size: is 32, but earlier lines have 64"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: Mapping[str, Any] | str, said: str) -> None:
    assert problem(tmp_path, LINE, line).startswith(said)


def test_dependencies_on_later_lines_are_named(tmp_path: Path) -> None:
    two, three = {**LINE, "id": 1, "deps": [2]}, {**LINE, "id": 2, "deps": [0]}
    assert problem(tmp_path, LINE, two, three) == "trace.jsonl:2: deps: 2 is not an earlier request, but that of line 3"
    three["deps"] = [0, 1]
    assert problem(tmp_path, LINE, two, three) == "trace.jsonl:2: deps: a cycle: 1 waits for 2 waits for 1"


def test_time_that_runs_backwards_is_named(tmp_path: Path) -> None:
    later, new = {**LINE, "id": 1, "timestamp": 500}, {**LINE, "id": 2, "timestamp": 400, "session": "b"}
    said = "trace.jsonl:3: timestamp: 400 comes after 500; lines must be sorted by time"
    assert problem(tmp_path, LINE, later, {**new, "session": "a"}).startswith(said)
    assert problem(tmp_path, LINE, later, new).startswith(said)
    assert problem(tmp_path, LINE, later, {**new, "session": None}).startswith(said)
    restart = {**new, "timestamp": 0}
    assert len(read(tmp_path, LINE, later, restart)) == 3
    assert "session: 'a' came before" in problem(tmp_path, LINE, later, restart, {**LINE, "id": 3, "timestamp": 600})


MOONCAKE = {"timestamp": 5, "input_length": 6000, "output_length": 1, "hash_ids": list(range(12))}
GRAPH = {**MOONCAKE, "request_id": "a", "wait_for": []}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([MOONCAKE, {**MOONCAKE, "timestamp": 4}], "trace.jsonl:2: timestamp: 4 comes after 5"),
        ([MOONCAKE, {**MOONCAKE, "timestamp": None}], "trace.jsonl:2: timestamp: missing"),
        ([MOONCAKE, {**MOONCAKE, "hash_ids": [1, 2, 3]}], "trace.jsonl:2: hash_ids: names 3 blocks, but 6000 tokens"),
        ([{**MOONCAKE, "hash_ids": list(range(70))}], "trace.jsonl:1: hash_ids: 70 names for 6000 tokens"),
        (
            [{**MOONCAKE, "session_id": 1}, {**MOONCAKE, "session_id": 1, "timestamp": 1}],
            "trace.jsonl:2: timestamp: 1 comes after 5",
        ),
        ([GRAPH, GRAPH], "trace.jsonl:2: request_id: 'a' was used before"),
        (
            [{**GRAPH, "wait_for": ["b"]}, {**GRAPH, "request_id": "b", "wait_for": ["a"]}],
            "trace.jsonl:1: wait_for: a cycle: 'a'",
        ),
        ([{**GRAPH, "wait_for": ["z"]}], "trace.jsonl:1: wait_for: 'z' is no request of this file"),
        ([dynamo("a", 1, 1, None), dynamo("a", 1, 1, None)], "trace.jsonl:2: request.request_id: 'a' was on line 1 before"),
        ([{"event": {"event_type": "request_end", "request": {}}}], "trace.jsonl:1: request: request_id: missing"),
        ([{"timestamp": 1}], "trace.jsonl:1: input_length: missing"),
        (
            [{"schema": "dynamo.agentic_mooncake", "version": 2, "block_size": 64}],
            "trace.jsonl:1: schema: 'dynamo.agentic_mooncake'",
        ),
        ([], "trace.jsonl: holds no requests"),
        (["\n\n"], "trace.jsonl: holds no requests"),
    ],
)
def test_a_malformed_line_of_others_is_named(tmp_path: Path, lines: Sequence[Mapping[str, Any] | str], said: str) -> None:
    assert problem(tmp_path, *lines).startswith(said)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    good = gzip.compress("".join(json.dumps({**LINE, "id": n}) + "\n" for n in range(50)).encode())
    contents = {
        "plain.gz": (json.dumps(LINE).encode(), "is named .gz but holds no gzip data"),
        "cut.gz": (good[: len(good) - 20], "the gzip data ends in the middle"),
        "damaged.gz": (good[:20] + b"\xff\xff\xff" + good[23:], "the gzip data is damaged"),
        "latin.jsonl": (b'{"timestamp": 0, "session": "\xe9"}\n', "not UTF-8 text from byte 29 on"),
        "wide.jsonl": (json.dumps(LINE).encode("utf-16"), "not UTF-8 text from byte 0 on"),
    }
    for name, (content, said) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TraceError, match=f"^{tmp_path / name}:.*{said}"):
            list(read_trace(tmp_path / name))
    for path, said in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file")):
        with pytest.raises(TraceError, match=f"^{path}: cannot be read: {said}"):
            list(read_trace(path))
