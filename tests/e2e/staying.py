"""A cluster that outlives the commands: `weft up` and what operators do to it, as child processes."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.served import ROOT

COMMAND_S = 180.0


class Staying:
    """Commands on one machine whose clusters are noted in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._environment = os.environ | {"XDG_STATE_HOME": str(folder)}

    def weft(self, *arguments: str, code: int = 0) -> str:
        """Run a command and return its standard output; its exit code must be `code`. For a failure: its standard error."""
        command = [sys.executable, "-m", "orchestrator.cli.main", *arguments]
        ended = subprocess.run(
            command, cwd=ROOT, env=self._environment, capture_output=True, text=True, timeout=COMMAND_S, check=False
        )
        assert ended.returncode == code, f"{arguments}: {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        return ended.stderr if code else ended.stdout

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command and return its process."""
        command = [sys.executable, "-m", "orchestrator.cli.main", *arguments]
        return subprocess.Popen(command, cwd=ROOT, env=self._environment, stdout=subprocess.PIPE, text=True)

    def up(self, cluster: Path, *arguments: str) -> dict[str, Any]:
        """Start a cluster, or apply its file; return where it is."""
        return json.loads(self.weft("up", "--cluster", str(cluster), "--json", *arguments))

    def status(self) -> dict[str, Any]:
        return json.loads(self.weft("status", "--json"))

    def states(self) -> dict[str, str]:
        return {one["process"]: one["state"] for one in self.status()["processes"]}

    def down(self) -> None:
        """End whatever runs."""
        for note in (Path(self._environment["XDG_STATE_HOME"]) / "weft").glob("*.json"):
            self.weft("down", "--now", "--name", note.stem)


class Load:
    """Streams that never stop asking: each request goes to another gateway if one refuses it before its first byte."""

    def __init__(self, urls: list[str], streams: int, tokens: int) -> None:
        self.urls = urls
        self.streams = streams
        self.tokens = tokens
        self.done = 0
        #: Requests that another gateway had to take.
        self.moved = 0
        self.failures: list[str] = []
        self._ended = asyncio.Event()
        #: Set once a request of each stream has been answered, or one has failed.
        self._begun = asyncio.Event()

    async def during(self, work: Callable[[], Any]) -> Any:
        """Keep asking while `work` runs in a thread; return what it returns."""
        limits = httpx.Limits(max_connections=2 * self.streams)
        async with httpx.AsyncClient(trust_env=False, timeout=60, limits=limits) as client:
            tasks = [asyncio.create_task(self._stream(client, number)) for number in range(self.streams)]
            try:
                await self._begun.wait()
                return await asyncio.to_thread(work)
            finally:
                self._ended.set()
                await asyncio.gather(*tasks)

    async def _stream(self, client: httpx.AsyncClient, number: int) -> None:
        turn = 0
        while not self._ended.is_set():
            turn += 1
            if self.done >= self.streams or self.failures:
                self._begun.set()
            prompt = [64 + (number * 37 + index * (turn + 1)) % 400 for index in range(100)]
            body = {"model": "default", "prompt": prompt, "max_tokens": self.tokens, "ignore_eos": True, "stream": True}
            headers = {"x-session-id": f"agent-{number}"}
            for attempt in range(10):
                url = self.urls[(number + attempt) % len(self.urls)]
                try:
                    if await self._ask(client, url, body, headers):
                        break
                except httpx.HTTPError as error:
                    self.failures.append(f"agent-{number}: {error!r}")
                    break
                self.moved += 1
                await asyncio.sleep(0.2 * (attempt // len(self.urls)))
            else:
                self.failures.append(f"agent-{number}: no gateway took it")

    async def _ask(self, client: httpx.AsyncClient, url: str, body: dict[str, Any], headers: dict[str, str]) -> bool:
        """Ask one gateway. Returns False if it drains or is gone before its first byte; whatever else goes wrong is a failure."""
        request = client.build_request("POST", f"{url}/v1/completions", json=body, headers=headers)
        try:
            answer = await client.send(request, stream=True)
        except (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError):
            return False
        async with contextlib.aclosing(answer):
            text = (await answer.aread()).decode()
        if answer.status_code == 503 and "draining" in text:
            return False
        whole = answer.status_code == 200 and text.rstrip().endswith("data: [DONE]") and 'data: {"error"' not in text
        if whole:
            self.done += 1
        else:
            wrong = text.find('{"error"')
            self.failures.append(f"{url}: {answer.status_code} {text[max(wrong, 0) :][:300]} ... {text[-100:]}")
        return True
