"""Reads the values of command-line options; argparse puts the option's name before what these raise."""

from argparse import ArgumentTypeError
from collections.abc import Sequence
from math import isfinite

#: More than anything is counted up to.
COUNT_MAX = 10**9


def count(text: str) -> int:
    """Return a whole number of 1 or more."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise ArgumentTypeError(f"must be a whole number of 1 or more, is {text!r}")
    if value > COUNT_MAX:
        raise ArgumentTypeError(f"must be at most {COUNT_MAX}, is {text!r}")
    return value


def pairs(text: str, known: Sequence[str]) -> dict[str, str]:
    """Return what `key=value,key=value` says."""
    found: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or key not in known:
            raise ArgumentTypeError(f"{part!r} must be KEY=VALUE with a key of {', '.join(known)}")
        if key in found:
            raise ArgumentTypeError(f"{key} is given twice")
        found[key] = value
    return found


def number(key: str, text: str) -> float:
    """Return a key's value if it is a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not isfinite(value):
        raise ArgumentTypeError(f"{key}: must be a number, is {text!r}")
    return value


def whole(key: str, text: str) -> int:
    """Return a key's value if it is a whole number."""
    value = number(key, text)
    if not value.is_integer():
        raise ArgumentTypeError(f"{key}: must be a whole number, is {text!r}")
    return int(value)


def positive(key: str, text: str) -> float:
    """Return a key's value if it is a finite number over 0."""
    value = number(key, text)
    if value <= 0:
        raise ArgumentTypeError(f"{key}: must be a number over 0, is {text!r}")
    return value
