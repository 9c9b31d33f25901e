"""Frozen dataclasses that are made fast: the same in every way but the price."""

import copy
import pickle
from dataclasses import dataclass, field, replace
from inspect import signature

import pytest

from orchestrator.core.making import quickly_made
from orchestrator.core.types import Load


@dataclass(frozen=True, slots=True)
class Plain:
    name: str
    count: int = 3
    parts: tuple[int, ...] = ()


@quickly_made
@dataclass(frozen=True, slots=True)
class Quick:
    name: str
    count: int = 3
    parts: tuple[int, ...] = ()


def test_it_is_made_like_any_other() -> None:
    assert Quick("a") == Quick(name="a", count=3, parts=())
    assert str(signature(Quick)) == str(signature(Plain))
    assert repr(Quick("a", parts=(1,))) == "Quick(name='a', count=3, parts=(1,))"
    assert hash(Quick("a")) == hash(Plain("a"))
    assert Quick("a") != Quick("b")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'name'"):
        Quick()  # type: ignore[call-arg]


def test_it_is_made_without_a_call_for_each_field() -> None:
    assert Quick.__setattr__ is object.__setattr__
    assert type(Quick("a")) is Quick
    with pytest.raises(AttributeError):
        Quick("a").other = 4  # type: ignore[attr-defined]


def test_defaults_that_are_made_are_each_ones_own() -> None:
    @quickly_made
    @dataclass(frozen=True, slots=True)
    class Counts:
        by_name: dict[str, int] = field(default_factory=lambda: {})

    assert Counts().by_name is not Counts().by_name


def test_it_is_replaced_copied_and_pickled() -> None:
    assert replace(Quick("a"), count=5) == Quick("a", 5)
    assert copy.copy(Quick("a")) == Quick("a")
    load = Load(running=2)
    assert pickle.loads(pickle.dumps(load)) == load


def test_what_it_cannot_make_is_refused() -> None:
    @dataclass(frozen=True, slots=True)
    class Late:
        made: int = 1

        def __post_init__(self) -> None:
            assert self.made

    with pytest.raises(AssertionError, match="Late checks itself"):
        quickly_made(Late)

    @dataclass(frozen=True, slots=True)
    class Further(Plain):
        more: int = 0

    with pytest.raises(AssertionError, match="Further is of a class that guards itself"):
        quickly_made(Further)
