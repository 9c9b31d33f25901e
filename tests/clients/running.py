"""Runs a client that is not ours, as its users do: a program of its own, told where the gateway is.

A program is a file in `python/` or `node/`. It gets the gateway's URL and further words as arguments; its last line is what it
understood, as one JSON value, which tests compare with what the model was made to write.
"""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from orchestrator.live.text.models import ModelText
from tests.live.scripted import Served, serve

_HERE = Path(__file__).parent
PYTHON = _HERE.parents[1] / ".venv-clients" / "bin" / "python"
#: By ending: the folder of programs, and what runs them.
_RUNNERS = {".py": ("python", str(PYTHON)), ".mjs": ("node", "node")}
#: Seconds until a program is ended.
_PROGRAM_S = 60.0
#: What programs see of this one's environment: nothing that leads them to another server or to somebody's settings.
_KEPT = ("PATH", "LANG", "LC_ALL", "TMPDIR")


async def run_program(name: str, *arguments: str, home: Path, environment: dict[str, str] | None = None) -> Any:
    """Run a program of `python/` or `node/` and return what it printed.

    Args:
        name: its file.
        arguments: its own.
        home: a folder for what it writes.
        environment: more than what everybody gets.

    Raises:
        AssertionError: it failed; with what it said.
    """
    folder, runner = _RUNNERS[Path(name).suffix]
    kept = {name: value for name in _KEPT if (value := os.environ.get(name))}
    program = await asyncio.create_subprocess_exec(
        runner,
        str(_HERE / folder / name),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**kept, "HOME": str(home), "NO_PROXY": "127.0.0.1", **(environment or {})},
    )
    try:
        out, err = await asyncio.wait_for(program.communicate(), _PROGRAM_S)
    finally:
        if program.returncode is None:
            program.kill()
    assert program.returncode == 0, f"{name} ended with {program.returncode}\n{out.decode()}\n{err.decode()}"
    return json.loads(out.strip().splitlines()[-1])


def play(text: ModelText, talk: Callable[[Served], Awaitable[None]], **gateway: object) -> None:
    """Serve a scripted gateway while `talk` runs."""

    async def run() -> None:
        async with serve(text, **gateway) as served:
            await talk(served)

    asyncio.run(run())
