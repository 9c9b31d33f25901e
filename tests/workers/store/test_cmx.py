"""Segments in a folder and in a bucket: what was written is read, what is damaged is a counted reason and never other bytes."""

import os
import resource
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from random import Random

import obstore
import pytest

from orchestrator.core.config import ConfigError
from orchestrator.core.types import BlockHash
from orchestrator.wire import store_pb2
from orchestrator.wire.buckets import SECRET_PATH, Bucket, BucketLimits, kept_secret, open_bucket
from workers.store import cmx
from workers.store.cmx import HEADER_BYTES, Cmx, CmxFailed, Damage, model_key, open_folder

BLOCK_BYTES, BLOCKS = 4096, 8
KEY = model_key("weights", "float32", 64, BLOCK_BYTES, BLOCKS)
SEGMENT, OTHER = BlockHash(bytes(range(16))), BlockHash(bytes(range(16, 32)))
DATA = Random(1).randbytes(BLOCKS * BLOCK_BYTES)


def never() -> bool:
    return False


def opened(bucket: Bucket, key: bytes = KEY, block_bytes: int = BLOCK_BYTES) -> Cmx:
    return Cmx(bucket, cmx.ModelKey(key), block_bytes, BLOCKS, 10.0)


def slabs_of(data: bytes | bytearray, cuts: tuple[int, ...] = ()) -> list[memoryview]:
    """Return the parts of a segment's memory between cuts, in blocks."""
    view, ends = memoryview(data), [0, *(cut * BLOCK_BYTES for cut in cuts), len(data)]
    return [view[start:end] for start, end in pairwise(ends)]


def read(store: Cmx, segment: BlockHash = SEGMENT, cuts: tuple[int, ...] = ()) -> bytes:
    memory = bytearray(len(DATA))
    store.read(segment, slabs_of(memory, cuts), never)
    return bytes(memory)


def failure(call: Callable[[], object]) -> Damage:
    with pytest.raises(CmxFailed) as caught:
        call()
    return caught.value.reason


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    return open_bucket(f"file://{tmp_path / 'cmx'}", "store.cmx")


@pytest.fixture
def store(bucket: Bucket) -> Cmx:
    return opened(bucket)


def place(tmp_path: Path, segment: BlockHash = SEGMENT) -> Path:
    return tmp_path / "cmx" / "v1" / KEY.hex() / segment.hex()[:2] / segment.hex()


@pytest.mark.parametrize("cuts", [(), (1,), (3, 4), tuple(range(1, BLOCKS))])
def test_what_was_written_is_read_however_memory_is_cut(store: Cmx, cuts: tuple[int, ...]) -> None:
    store.write(SEGMENT, slabs_of(DATA, cuts))
    assert read(store) == DATA
    assert read(store, cuts=cuts) == DATA


@pytest.mark.parametrize("piece", [1000, BLOCK_BYTES, 3 * BLOCK_BYTES + 1, len(DATA), 2 * len(DATA)])
def test_it_is_read_in_pieces_of_any_size(store: Cmx, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cmx, "PIECE_BYTES", piece)
    monkeypatch.setattr(cmx, "FILE_PIECE_BYTES", piece)
    store.write(SEGMENT, slabs_of(DATA))
    assert read(store, cuts=(2, 5)) == DATA


def flip(at: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return damage


def cut(size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, size)


def instead(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(Path.unlink, Damage.MISSING, id="missing"),
        pytest.param(cut(0), Damage.TRUNCATED, id="empty"),
        pytest.param(cut(HEADER_BYTES - 1), Damage.TRUNCATED, id="within the header"),
        pytest.param(cut(HEADER_BYTES), Damage.TRUNCATED, id="without blocks"),
        pytest.param(cut(HEADER_BYTES + len(DATA) - 1), Damage.TRUNCATED, id="without its last byte"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes() + b"\0"), Damage.TRUNCATED, id="with a byte too many"),
        pytest.param(flip(HEADER_BYTES), Damage.CORRUPT, id="first byte flipped"),
        pytest.param(flip(-1), Damage.CORRUPT, id="last byte flipped"),
        pytest.param(flip(HEADER_BYTES - 1), Damage.CORRUPT, id="checksum flipped"),
        pytest.param(flip(0), Damage.FOREIGN, id="magic flipped"),
        pytest.param(flip(40), Damage.FOREIGN, id="count of blocks flipped"),
        pytest.param(instead(bytes(HEADER_BYTES + len(DATA))), Damage.FOREIGN, id="zeros"),
    ],
)
@pytest.mark.parametrize("piece", [BLOCK_BYTES, len(DATA)])
def test_each_damage_has_its_reason(
    store: Cmx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], reason: Damage, piece: int
) -> None:
    monkeypatch.setattr(cmx, "PIECE_BYTES", piece)
    monkeypatch.setattr(cmx, "FILE_PIECE_BYTES", piece)
    store.write(SEGMENT, slabs_of(DATA))
    damage(place(tmp_path))
    assert failure(lambda: read(store)) is reason
    store.write(SEGMENT, slabs_of(DATA))
    assert read(store) == DATA


def test_another_segment_under_the_name_and_another_models_are_foreign(store: Cmx, bucket: Bucket, tmp_path: Path) -> None:
    store.write(OTHER, slabs_of(DATA))
    place(tmp_path).parent.mkdir(exist_ok=True)
    place(tmp_path, OTHER).rename(place(tmp_path))
    assert failure(lambda: read(store)) is Damage.FOREIGN
    other = opened(bucket, model_key("weights", "bfloat16", 64, BLOCK_BYTES, BLOCKS))
    assert failure(lambda: read(other)) is Damage.MISSING
    store.write(SEGMENT, slabs_of(DATA))
    theirs = place(tmp_path).parents[2] / other._model.hex() / SEGMENT.hex()[:2]
    theirs.mkdir(parents=True)
    place(tmp_path).rename(theirs / SEGMENT.hex())
    assert failure(lambda: read(other)) is Damage.FOREIGN


@pytest.mark.parametrize("part", range(5))
def test_a_models_name_covers_all_that_its_bytes_mean(part: int) -> None:
    ours: list[str | int] = ["weights", "float32", 64, BLOCK_BYTES, BLOCKS]
    theirs = [*ours[:part], f"{ours[part]}1" if part < 2 else 1, *ours[part + 1 :]]
    assert model_key(*theirs) != model_key(*ours) == KEY  # type: ignore[arg-type]


def test_a_full_disk_leaves_nothing_behind(store: Cmx, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        store.write(SEGMENT, slabs_of(DATA))
        reason = None
    except CmxFailed as error:
        reason = error.reason
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert reason is Damage.FULL
    assert failure(lambda: read(store)) is Damage.MISSING
    assert [path.name for path in (tmp_path / "cmx").rglob("*") if path.is_file()] == []


def test_a_read_that_nobody_wants_any_more_ends_between_pieces(store: Cmx, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cmx, "PIECE_BYTES", BLOCK_BYTES)
    monkeypatch.setattr(cmx, "FILE_PIECE_BYTES", BLOCK_BYTES)
    store.write(SEGMENT, slabs_of(DATA))
    asked: list[bool] = []

    def stopped() -> bool:
        asked.append(len(asked) == 2)
        return asked[-1]

    assert failure(lambda: store.read(SEGMENT, slabs_of(bytearray(len(DATA))), stopped)) is Damage.STOPPED
    assert asked == [False, False, True]


def test_a_read_that_takes_too_long_is_given_up(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cmx, "PIECE_BYTES", BLOCK_BYTES)
    monkeypatch.setattr(cmx, "FILE_PIECE_BYTES", BLOCK_BYTES)
    store = Cmx(bucket, KEY, BLOCK_BYTES, BLOCKS, -1.0)
    store.write(SEGMENT, slabs_of(DATA))
    assert failure(lambda: store.read(SEGMENT, slabs_of(bytearray(len(DATA))), never)) is Damage.LATE


def test_what_is_there_is_listed_and_what_is_none_of_ours_is_not(store: Cmx, tmp_path: Path) -> None:
    assert list(store.found()) == []
    for segment in (SEGMENT, OTHER):
        store.write(segment, slabs_of(DATA))
    cut(100)(place(tmp_path, OTHER))
    (place(tmp_path).parent / "notes.txt").write_text("not a segment")
    found = [one for page in store.found() for one in page]
    assert [(one.segment, one.size) for one in found] == [(SEGMENT, store.segment_bytes)]
    assert 0.0 <= found[0].age_s < 60.0


def test_what_is_deleted_is_gone_and_deleting_it_again_is_no_error(store: Cmx) -> None:
    store.write(SEGMENT, slabs_of(DATA))
    store.delete([OTHER, SEGMENT])
    store.delete([SEGMENT])
    assert failure(lambda: read(store)) is Damage.MISSING
    assert [one for page in store.found() for one in page] == []


def test_half_written_files_of_killed_writers_are_not_found_and_swept_when_old(store: Cmx, tmp_path: Path) -> None:
    store.write(SEGMENT, slabs_of(DATA))
    old, new = (place(tmp_path).with_name(f"{SEGMENT.hex()}#{number}") for number in (1, 2))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    assert [one.segment for page in store.found() for one in page] == [SEGMENT]
    assert store.sweep() == 1
    assert (old.exists(), new.exists(), place(tmp_path).exists()) == (False, True, True)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("/srv/cmx", "must be file:///path or s3://bucket/prefix"),
        ("gs://bucket/x", "must be file:///path or s3://bucket/prefix"),
        ("file://relative/path", "must be file:// and an absolute path"),
        ("file:///dev/null/cmx", "Not a directory"),
        ("s3:///prefix", "names no bucket"),
        ("s3://bucket/x?region=eu", "has more than a path"),
    ],
)
def test_a_url_that_names_no_place_is_one_clear_error(url: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=r"store\.cmx.*" + problem):
        open_bucket(url, "store.cmx")


def test_a_drawn_secret_is_kept_and_the_first_one_counts(bucket: Bucket, tmp_path: Path) -> None:
    assert kept_secret(bucket, "drawn", "store.cmx") == "drawn"
    assert kept_secret(open_bucket(f"file://{tmp_path / 'cmx'}", "store.cmx"), "other", "store.cmx") == "drawn"
    (tmp_path / "cmx" / SECRET_PATH).write_bytes(b"")
    with pytest.raises(ConfigError, match="holds no secret"):
        kept_secret(bucket, "other", "store.cmx")


# --- a bucket ---------------------------------------------------------------------------------------------------------

REGION = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true"}
QUICK = BucketLimits(connect_s_max=0.5, request_s_max=2.0, retries_max=1, retry_s_max=1.0)


class S3:
    """A local S3 server with one bucket."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from moto.server import ThreadedMotoServer  # noqa: PLC0415 - slow to import, and only these tests need it

        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        for name, value in {**REGION, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            monkeypatch.setenv(name, value)
        import boto3  # noqa: PLC0415

        boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(Bucket="weft")

    def stop(self) -> None:
        self._server.stop()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    server = S3(monkeypatch)
    yield server
    server.stop()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_bucket_does_all_that_a_folder_does_and_a_stopped_server_is_unreachable(
    s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cmx, "PIECE_BYTES", 3 * BLOCK_BYTES)
    monkeypatch.setattr(cmx, "FILE_PIECE_BYTES", 3 * BLOCK_BYTES)
    bucket = open_bucket("s3://weft/deep/prefix", "store.cmx", QUICK)
    store = opened(bucket)
    assert list(store.found()) == []
    assert failure(lambda: read(store)) is Damage.MISSING
    store.write(SEGMENT, slabs_of(DATA, (3,)))
    assert read(store, cuts=(1, 6)) == DATA
    assert [one.segment for page in store.found() for one in page] == [SEGMENT]
    path = f"v1/{KEY.hex()}/{SEGMENT.hex()[:2]}/{SEGMENT.hex()}"
    whole = obstore.get(bucket, path).bytes().to_bytes()
    for damaged, reason in (
        (whole[:-1], Damage.TRUNCATED),
        (whole[:10], Damage.TRUNCATED),
        (whole[:-1] + bytes([whole[-1] ^ 1]), Damage.CORRUPT),
        (bytes(len(whole)), Damage.FOREIGN),
    ):
        obstore.put(bucket, path, damaged)
        assert failure(lambda: read(store)) is reason
    store.delete([SEGMENT, OTHER])
    assert list(store.found()) == []
    assert kept_secret(bucket, "drawn", "store.cmx") == "drawn"
    assert kept_secret(bucket, "other", "store.cmx") == "drawn"
    elsewhere = opened(open_bucket("s3://nobodys/prefix", "store.cmx", QUICK))
    assert failure(lambda: elsewhere.write(SEGMENT, slabs_of(DATA))) in (Damage.MISSING, Damage.DENIED)
    s3.stop()
    calls: list[Callable[[], object]] = [
        lambda: read(store),
        lambda: store.write(SEGMENT, slabs_of(DATA)),
        lambda: store.delete([SEGMENT]),
        lambda: list(store.found()),
    ]
    assert [failure(call) for call in calls] == [Damage.UNREACHABLE] * 4
    with pytest.raises(ConfigError, match="cannot be kept"):
        kept_secret(bucket, "other", "store.cmx")


def folder_of(store: Cmx, **changes: object) -> store_pb2.Folder:
    """Return where a store's folder is, as nodes are told of it, or something else."""
    place = store.place()
    assert place is not None
    for name, value in changes.items():
        setattr(place, name, value)
    return place


def opened_by_node(place: store_pb2.Folder, fingerprint: str = "weights") -> Cmx | None:
    return open_folder(place, fingerprint, "float32", 64, BLOCK_BYTES)


def test_a_node_reads_what_a_store_has_written_into_its_folder(store: Cmx) -> None:
    store.write(SEGMENT, slabs_of(DATA))
    found = opened_by_node(folder_of(store))
    assert found is not None
    assert read(found, cuts=(1, 5)) == DATA


def test_a_node_of_another_model_finds_nothing_in_a_folder(store: Cmx) -> None:
    store.write(SEGMENT, slabs_of(DATA))
    found = opened_by_node(folder_of(store), "other weights")
    assert found is not None
    assert failure(lambda: read(found)) is Damage.MISSING


@pytest.mark.parametrize(
    "changes",
    [{"inode": 1}, {"device": 1}, {"path": "/nowhere"}, {"path": "/proc/self/stat"}, {"path": "\0"}, {"segment_blocks": 0},
     {"move_s_max": 0.0}, {"move_s_max": float("nan")}],
    ids=str,
)  # fmt: skip
def test_a_node_leaves_a_folder_that_is_another_here_to_its_store(store: Cmx, changes: dict[str, object]) -> None:
    assert opened_by_node(folder_of(store, **changes)) is None


def test_a_node_leaves_a_folder_that_a_network_may_be_behind_to_its_store(store: Cmx, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cmx, "_LOCAL", frozenset(("nfs",)))
    assert opened_by_node(folder_of(store)) is None


def test_a_bucket_is_no_folder() -> None:
    assert opened(open_bucket("s3://somewhere", "store.cmx")).place() is None
