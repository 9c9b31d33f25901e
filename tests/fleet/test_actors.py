"""A process and its controller watch each other: who asks after whom, who is ended, and who ends itself."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError

from orchestrator.fleet import actors
from orchestrator.fleet.actors import Lookout
from orchestrator.fleet.processes import ProcessName
from orchestrator.fleet.vital import Vital
from tests.fleet.clusters import small

NAME = ProcessName("node-decode-0")
CONTROLLER = Vital(pid=1, started="0", host="here")
MINE = 7


class Ended(BaseException):
    """The process has ended itself: nothing runs on after this."""


class Controller:
    """Stands for Ray and the controller on it: answers, is silent, or is not there."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.answer = answer
        self.asked: list[Any] = []
        #: Processes that were killed by another one.
        self.killed: list[Vital] = []

    def get_actor(self, name: str, namespace: str) -> "Controller":
        self.asked.append((name, namespace))
        return self

    @property
    def incarnation_of(self) -> "Controller":
        return self

    def remote(self, name: ProcessName) -> "Controller":
        self.asked.append(name)
        return self

    def get(self, answer: "Controller", timeout: float) -> Any:
        assert answer is self
        assert timeout == small().cluster.hung_s
        return self.answer()


def silence() -> Any:
    raise GetTimeoutError("silent")


def absence() -> Any:
    raise ActorDiedError


def nothing() -> Any:
    raise ValueError("no actor of that name")


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Controller]:
    """Lets a process that has heard nothing for long ask after a controller once."""

    def ask(answer: Callable[[], Any], ends_controller: bool = False) -> Controller:
        controller = Controller(answer)
        monkeypatch.setattr(actors, "ray", controller)
        monkeypatch.setattr(actors, "end", controller.killed.append)
        lookout = Lookout(small(), NAME, MINE, ends_controller)
        lookout._controller = CONTROLLER
        lookout._heard = time.monotonic() - 60.0
        lookout.look()
        # Asked once, and heard of: there is no reason to ask again. Without an answer there is.
        lookout.look()
        return controller

    def end_self(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(actors.os, "_exit", end_self)
    return ask


def test_a_process_that_is_the_clusters_goes_on(watch: Callable[..., Controller]) -> None:
    controller = watch(lambda: MINE)
    assert controller.asked == [("weft/controller", "weft"), NAME]
    assert controller.killed == []


@pytest.mark.parametrize("current", [MINE + 1, None])
def test_a_process_that_was_replaced_or_is_not_wanted_ends_itself(watch: Callable[..., Controller], current: int | None) -> None:
    with pytest.raises(Ended):
        watch(lambda: current)


@pytest.mark.parametrize(("ends_controller", "killed"), [(True, [CONTROLLER, CONTROLLER]), (False, [])])
def test_a_controller_that_hangs_is_ended_by_gateways_alone(
    watch: Callable[..., Controller], ends_controller: bool, killed: list[Vital]
) -> None:
    assert watch(silence, ends_controller).killed == killed


@pytest.mark.parametrize("answer", [absence, nothing])
def test_a_controller_that_is_being_started_again_is_waited_for(
    watch: Callable[..., Controller], answer: Callable[[], Any]
) -> None:
    controller = watch(answer, True)
    assert controller.killed == []
    assert len(controller.asked) >= 2
