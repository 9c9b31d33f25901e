"""Ray on this machine for clusters that outlive the command: `ray start --head --block` in its own session, and a note of it.

The note is a file in the user's state folder, one a cluster name; beside it is the token that Ray asks for, so that other users
of the machine cannot run code in it. A head whose process is gone is none.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any, cast

from ray._raylet import Config  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]

from orchestrator.fleet.fleet import LOCAL_SETTINGS, LOCAL_STORE_BYTES, FleetFailed
from orchestrator.fleet.vital import end_here, started_at

#: Seconds that Ray gets to start, and to end all its processes.
START_S = 60.0
END_S = 30.0
LOOK_EVERY_S = 0.1
#: Lines of Ray's log that go into the message when it does not start.
_LOG_CHARS_MAX = 300


@dataclass(frozen=True, slots=True)
class Head:
    """A Ray cluster on this machine."""

    address: str
    pid: int
    #: When that process started: see `vital.py`.
    started: str
    log: str
    #: File with the token that Ray asks for.
    token: str


def find_head(name: str) -> Head | None:
    """Return the Ray that was started here for a cluster of that name and still runs."""
    note = _note(name)
    try:
        head = Head(**json.loads(note.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    if started_at(head.pid) == head.started:
        return head
    note.unlink(missing_ok=True)
    return None


def heads() -> list[str]:
    """Return the names of the clusters for which a Ray runs here."""
    return sorted(note.stem for note in _folder().glob("*.json") if find_head(note.stem) is not None)


def start_head(name: str, cpus: int) -> Head:
    """Start Ray for a cluster of that name. Raises `FleetFailed`."""
    scratch = Path(tempfile.mkdtemp(prefix="weft-ray-"))
    log, note = scratch / "start.log", _note(name)
    note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    token = note.with_suffix(".token")
    with open(token, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        file.write(token_hex(32))
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats",
        "--port=0", "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", "--include-dashboard=false",
        f"--object-store-memory={LOCAL_STORE_BYTES}", f"--temp-dir={scratch}", f"--system-config={json.dumps(LOCAL_SETTINGS)}",
    ]  # fmt: skip
    # By its settings Ray keeps to the loopback address only where it believes that it cannot form a cluster.
    environment = os.environ | {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    address = _address(process, scratch, log)
    head = Head(address, process.pid, started_at(process.pid), str(log), str(token))
    note.write_text(json.dumps(asdict(head)))
    return head


def end_head(name: str, head: Head) -> None:
    """End a Ray that was started here, with everything in it. Raises `FleetFailed` if it does not end."""
    end_here(head.pid, head.started, signal.SIGTERM)
    until = time.monotonic() + END_S
    while started_at(head.pid) == head.started:
        if time.monotonic() > until:
            raise FleetFailed(f"Ray's process {head.pid} does not end")
        time.sleep(LOOK_EVERY_S)
    _note(name).unlink(missing_ok=True)
    Path(head.token).unlink(missing_ok=True)


def carry_token_to(address: str) -> None:
    """Have this process show the token of the head at an address to Ray, if one that was started here is there."""
    for head in map(find_head, heads()):
        if head is not None and head.address == address:
            carry_token(head)


def carry_token(head: Head) -> None:
    """Have this process show a head's token to Ray, which has read its settings from the environment already."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": head.token}
    cast(Any, Config).initialize("")


def _address(process: subprocess.Popen[bytes], scratch: Path, log: Path) -> str:
    """Wait until Ray says where it is. Raises `FleetFailed`, and leaves nothing."""
    until = time.monotonic() + START_S
    told = scratch / "ray_current_cluster"
    # Ray writes the address first and says that it runs when all its processes do.
    while "Ray runtime started" not in log.read_text() or not told.is_file():
        if process.poll() is not None or time.monotonic() > until:
            process.terminate()
            process.wait(END_S)
            said = re.sub(r"\x1b\[[0-9;]*m", "", " ".join(log.read_text().split()))
            raise FleetFailed(f"Ray cannot be started here: ...{said[-_LOG_CHARS_MAX:]} (see {log})")
        time.sleep(LOOK_EVERY_S)
    return told.read_text().strip()


def _note(name: str) -> Path:
    return _folder() / f"{re.sub('[^A-Za-z0-9_.-]', '_', name)}.json"


def _folder() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "weft"
