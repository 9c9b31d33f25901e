"""Starts the servers that measurements load, ours and a peer's, looks at their memory, and stops them again."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

START_S_MAX = 90.0
STOP_S_MAX = 40.0
#: `--speedup-ratio 0` is documented as infinite but behaves like 1.0 in Dynamo 1.6.1; a million does it.
MOCKER_SPEEDUP = "1000000"


@dataclass(frozen=True, slots=True)
class Server:
    """A started server: where it answers, and the process whose descendants do its work."""

    name: str
    url: str
    pids: tuple[int, ...]
    #: Of ours: where the cache API is.
    grpc_address: str = ""


def resident(pid: int) -> int:
    """Return a process's resident bytes; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


def family(pid: int) -> list[int]:
    """Return a process and its descendants."""
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


def free_port() -> int:
    """Return a loopback port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def weft_server(cluster: str, model: Path | None = None) -> Iterator[Server]:
    """Run `weft serve` with a cluster file's text until the block ends."""
    port, grpc_port = free_port(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cluster.toml"
        file.write_text(cluster)
        arguments = ["serve", "--cluster", str(file), "--http-port", str(port), "--grpc-port", str(grpc_port)]
        arguments += ["--model", str(model)] if model else []
        command = [sys.executable, "-m", "orchestrator.cli.main", *arguments]
        with _running([(command, dict(os.environ))], Path(folder)) as pids:
            url = f"http://127.0.0.1:{port}"
            _wait_for(f"{url}/ready", pids, Path(folder))
            yield Server("weft", url, pids, f"127.0.0.1:{grpc_port}")


def dynamo_python() -> str | None:
    """Return the python of an environment with ai-dynamo, named by DYNAMO_PYTHON, or None."""
    return os.environ.get("DYNAMO_PYTHON") or None


@contextlib.contextmanager
def dynamo_server(python: str, model: Path, workers: int) -> Iterator[Server]:
    """Run Dynamo's frontend with KV routing and its mocker on loopback, without etcd or NATS, until the block ends.

    Its event sockets listen on all addresses, so run this inside `unshare --net` where only loopback exists.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        environment = _dynamo_environment(Path(folder))
        frontend = [python, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port), "--router-mode", "kv"]
        mocker = [python, "-m", "dynamo.mocker", "--model-path", str(model), "--model-name", model.name]
        mocker += ["--num-workers", str(workers), "--speedup-ratio", MOCKER_SPEEDUP, "--stagger-delay", "0", "--block-size", "16"]
        mocker += ["--num-gpu-blocks-override", "65536", "--max-num-seqs", "1024"]
        with _running([(frontend, environment), (mocker, environment)], Path(folder)) as pids:
            url = f"http://127.0.0.1:{port}"
            _wait_for(f"{url}/v1/models", pids, Path(folder), contains=model.name.encode())
            yield Server("dynamo", url, pids)


def _dynamo_environment(folder: Path) -> dict[str, str]:
    loopback = ("TCP_RPC", "HTTP_RPC", "SYSTEM", "EVENT_PLANE", "TCP_RESPONSE_STREAM")
    settings = {f"DYN_{name}_HOST": "127.0.0.1" for name in loopback}
    settings |= {"DYN_FILE_KV": str(folder / "kv"), "DYN_DISCOVERY_BACKEND": "file", "DYN_REQUEST_PLANE": "tcp"}
    settings |= {"DYN_EVENT_PLANE": "zmq", "DYN_LOG": "warn", "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
    return {**os.environ, **settings}


@contextlib.contextmanager
def _running(commands: Sequence[tuple[list[str], dict[str, str]]], folder: Path) -> Iterator[tuple[int, ...]]:
    """Run commands with their output in a file each; at the end interrupt them, then kill what is left."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for index, (command, environment) in enumerate(commands):
            with (folder / f"output{index}.log").open("wb") as output:
                processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
        yield tuple(process.pid for process in processes)
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(STOP_S_MAX)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(url: str, pids: Sequence[int], folder: Path, contains: bytes = b"") -> None:
    """Wait until a URL answers 200; raise with the servers' output when it does not, or one of them has ended."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + START_S_MAX
    while time.monotonic() < until:
        ended = [pid for pid in pids if not _alive(pid)]
        if ended:
            break
        try:
            with opener.open(url, timeout=2) as answer:
                if contains in answer.read():
                    return
        except (urllib.error.URLError, OSError):  # not listening yet, or not ready yet
            pass
        time.sleep(0.1)
    logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(folder.glob("output*.log")))
    raise RuntimeError(f"{url} did not answer\n{logs}")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def isolated() -> bool:
    """Return True inside a network namespace with loopback alone, where a peer may listen on all addresses."""
    return {name for _, name in socket.if_nameindex()} == {"lo"}


def reexecute_isolated(module: str, arguments: Sequence[str]) -> int | None:
    """Run a bench module again inside a namespace with loopback alone; None if this machine cannot make one."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return None
    script = f'ip link set lo up && exec "{sys.executable}" -m {module} "$@"'
    probe = subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True)
    if probe.returncode != 0:
        return None
    return subprocess.run(["unshare", "--net", "bash", "-c", script, module, *arguments], check=False).returncode
