"""A process of this one that keeps a beat and does nothing else, at the other end of a socket: it ends when the socket does."""

import os
import socket
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import Connection

from orchestrator.core.config import ConfigError, PoolConfig, require
from workers.engines.base import EngineLost
from workers.engines.beat.messages import Unopened

#: Seconds in which it has to end once it is told so.
CLOSE_S = 5.0


def check_device(pool: PoolConfig) -> None:
    """Raise `ConfigError` for a pool on another device than what keeps a beat is on."""
    device, where = pool.engine.device, f"pools.{pool.name}.engine.device"
    require(device in ("auto", "cpu"), where, f"must be auto or cpu, is {device!r}: engines keep a beat on CPUs alone")


class Child:
    """Runs a module as a process and talks with it, one message after the other."""

    def __init__(self, module: str, name: str) -> None:
        """Start the module, with the descriptor of its end of the socket as its argument; `name` is what errors call it."""
        self._name = name
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-m", module, str(theirs.fileno())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)
        theirs.close()
        self._link: Connection[object, object] = Connection(os.dup(self._socket.fileno()))

    def send(self, message: object) -> None:
        """Say something. Raises `EngineLost`."""
        try:
            self._link.send(message)
        except OSError as error:
            raise self._lost(str(error)) from error

    def answer(self, seconds: float) -> object:
        """Return the next message. Raises `EngineLost` if it ends, or says nothing for so long."""
        try:
            if not self._link.poll(seconds):
                raise self._lost(f"no answer within {seconds:g} s")
            return self._link.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error

    def opened(self, seconds: float) -> object:
        """Return the next message of one that opens something.

        Raises:
            ConfigError: if what was asked for cannot be had.
            RuntimeError: if it cannot be opened for any other reason.
            EngineLost: as `answer`.
        """
        match self.answer(seconds):
            case Unopened(None, problem):
                raise RuntimeError(problem)
            case Unopened(where, problem) if where is not None:
                raise ConfigError(where, problem)
            case message:
                return message

    def await_end(self) -> EngineLost:
        """Wait until it ends, which it does not say; return that."""
        try:
            message = self._link.recv()
        except (EOFError, OSError):
            return self._ended()
        raise AssertionError(f"{message!r} from one that says nothing")

    def end(self) -> None:
        """Have it end; whoever waits for that hears of it."""
        with suppress(OSError):  # it has ended before
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        try:
            self.process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _ended(self) -> EngineLost:
        self.end()
        return self._lost(f"exit code {self.process.returncode}")

    def _lost(self, why: str) -> EngineLost:
        return EngineLost(f"{self._name} (pid {self.process.pid}) is lost: {why}")
