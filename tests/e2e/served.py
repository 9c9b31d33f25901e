"""Whole clusters as a user starts them: `weft serve` as a child process on free ports, and what can be asked of it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
START_S = 120.0


class NotServing(Exception):
    """It ended without serving: its exit code and what it wrote on standard error."""

    def __init__(self, code: int, errors: str) -> None:
        super().__init__(code, errors)
        self.code = code
        self.errors = errors


class Served:
    """A running `weft serve`.

    Args:
        cluster: cluster file.
        arguments: further ones.
        log: file for its standard error.

    Raises:
        NotServing: it ended instead.
    """

    def __init__(self, cluster: Path, arguments: tuple[str, ...], log: Path) -> None:
        self.log = log
        command = [
            sys.executable,
            "-m",
            "orchestrator.cli.main",
            "serve",
            "--cluster",
            str(cluster),
            "--http-port",
            "0",
            "--grpc-port",
            "0",
        ]
        with log.open("w") as errors:
            self.process = subprocess.Popen([*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert self.process.stdout is not None
        # One line, once it serves; the end of the stream if it cannot.
        line = self.process.stdout.readline()
        self.urls = tuple(line.partition(" at ")[2].strip().split(", "))
        if not line:
            self.process.communicate(timeout=START_S)
            raise NotServing(self.process.returncode, log.read_text())

    @property
    def url(self) -> str:
        return self.urls[0]

    def status(self, url: str = "") -> dict[str, Any]:
        """Return what a gateway shows, the first unless another is named."""
        return httpx.get(f"{url or self.url}/status", trust_env=False).raise_for_status().json()

    def node(self, name: str) -> dict[str, Any]:
        return next(node for node in self.status()["nodes"] if node["node"] == name)

    def until(self, holds: Callable[[dict[str, Any]], bool], within_s: float, url: str = "") -> float:
        """Ask a gateway for the status until there is one and something holds. Returns how long that took."""
        started = time.monotonic()
        while True:
            try:
                status = self.status(url)
            except httpx.TransportError as error:
                status = {"error": str(error)}
            if "error" not in status and holds(status):
                return time.monotonic() - started
            assert time.monotonic() - started < within_s, status
            time.sleep(0.1)

    def until_idle(self, within_s: float = 10.0) -> None:
        """Wait until no node has a request or a used block."""

        def idle(status: dict[str, Any]) -> bool:
            loads = [(node["running"], node["waiting"], node["blocks"]["used"]) for node in status["nodes"]]
            counts = [(model["running"], model["waiting"]) for model in status["requests"].values()]
            return all(load == (0, 0, 0) for load in loads) and all(count == (0, 0) for count in counts)

        self.until(idle, within_s)
        for node in self.status()["nodes"]:
            blocks = node["blocks"]
            assert blocks["free"] + blocks["cached"] == blocks["total"], node

    def stop(self, within_s: float = 60.0) -> int:
        """Send SIGTERM and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=within_s)
        return self.process.returncode

    def kill(self) -> None:
        """End it however it is; Ray's own processes notice and follow."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def owner_of_port(port: int) -> int:
    """Return the process that listens on a loopback port."""
    inodes = {
        fields[9]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for fields in map(str.split, Path(table).read_text().splitlines()[1:])
        if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port
    }
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and inodes & _sockets(process):
            return int(process.name)
    raise AssertionError(f"nobody listens on port {port}")


def _sockets(process: Path) -> set[str]:
    found: set[str] = set()
    try:
        for descriptor in (process / "fd").iterdir():
            target = os.readlink(descriptor)
            if target.startswith("socket:["):
                found.add(target[8:-1])
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        pass
    return found


def descendants(root: int) -> list[int]:
    """Return the processes below `root`."""
    parents: dict[int, list[int]] = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                stat = (process / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(process.name))
    found: list[int] = []
    wanted = [root]
    while wanted:
        children = parents.get(wanted.pop(), [])
        found += children
        wanted += children
    return found


def command_of(process: int) -> str:
    """Return a process's command line, empty if it is gone."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
