"""Reads the files of a checkpoint folder with checked access: every problem is one line with file, field and what would be right.

Whoever reads a checkpoint's JSON reads it here: catalog, planner, gateways and engines. See also: `model_config.py`, what
config.json means.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from orchestrator.core.config import shown

#: More than anything in a model: beyond it a number is a mistake.
COUNT_MAX = 1 << 32


class CheckpointError(ValueError):
    """A checkpoint folder lacks something, or has something that is not supported; `path` is the file or folder."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem

    def __reduce__(self) -> tuple[type["CheckpointError"], tuple[Path, str]]:
        """Let it cross processes: it is raised in a node's and told by the command."""
        return type(self), (self.path, self.problem)


class Fields:
    """One JSON object with checked access. A field that is null is taken as missing."""

    __slots__ = ("_inside", "path", "values")

    def __init__(self, path: Path, values: Mapping[str, Any], inside: str = "") -> None:
        """Wrap the object of a file; `inside` says where in it the object lies, such as `rope_scaling`."""
        self.path = path
        self.values = values
        self._inside = inside

    def place(self, name: str) -> str:
        """Return what a field is called in the whole file, such as `rope_scaling.factor`."""
        return f"{self._inside}.{name}" if self._inside else name

    def error(self, name: str, problem: str) -> CheckpointError:
        """Return the error for a field."""
        return CheckpointError(self.path, f"{self.place(name)}: {problem}")

    def given(self, name: str) -> bool:
        """Tell whether a field is there."""
        return self.values.get(name) is not None

    def count(self, name: str, default: int | None = None, least: int = 1, most: int = COUNT_MAX) -> int:
        """Return a whole number from `least` to `most`; 4096.0 is one too. Without a default it must be there."""
        value = self._value(name, default)
        number = whole(value)
        if number is None or number < least:
            raise self.error(name, f"must be a whole number of {least} or more, is {shown(value)}")
        if number > most:
            raise self.error(name, f"must be at most {most}, is {shown(value)}")
        return number

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number over 0. Without a default it must be there."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(name, f"must be a number over 0, is {shown(value)}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return a truth value."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, is {shown(value)}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """Return a text. Without a default it must be there."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self.error(name, f"must be a text, is {shown(value)}")
        return value

    def entries(self, name: str) -> list[Any]:
        """Return a list; missing, an empty one."""
        value = self._value(name, cast("list[Any]", []))
        if not isinstance(value, list):
            raise self.error(name, f"must be a list, is {shown(value)}")
        return cast("list[Any]", value)

    def objects(self, name: str) -> list["Fields"]:
        """Return a list of objects; missing, none."""
        entries = self.entries(name)
        if not all(isinstance(entry, dict) for entry in entries):
            raise self.error(name, f"must be a list of objects, is {shown(entries)}")
        return [Fields(self.path, entry, self.place(f"{name}[{number}]")) for number, entry in enumerate(entries)]

    def object(self, name: str) -> "Fields":
        """Return an object; missing, an empty one."""
        value = self._value(name, cast("dict[str, Any]", {}))
        if not isinstance(value, dict):
            raise self.error(name, f"must be an object, is {shown(value)}")
        return Fields(self.path, cast("dict[str, Any]", value), self.place(name))

    def token_text(self, name: str) -> str | None:
        """Return what a token is called, written as text or as an object that has it as `content`; None if it is missing."""
        found = self.values.get(name)
        if found is None or isinstance(found, str):
            return found
        return self.object(name).text("content")

    def token_ids(self, name: str, size: int) -> frozenset[int]:
        """Return one token id or a list of them, all below `size`; missing, none."""
        found = self.values.get(name)
        entries = cast("list[Any]", found) if isinstance(found, list) else [] if found is None else [found]
        ids = [whole(entry) for entry in entries]
        known = [one for one in ids if one is not None and 0 <= one < size]
        if len(known) < len(ids):
            raise self.error(name, f"must be token ids from 0 to {size - 1}, is {shown(self.values[name])}")
        return frozenset(known)

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise self.error(name, "is missing")
        return value


def read_fields(path: Path, needed: bool = True) -> Fields:
    """Return a JSON file's object; an empty one if the file is missing and not needed. Raises `CheckpointError`."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        if not needed:
            return Fields(path, {})
        raise CheckpointError(path, "missing; a Hugging Face checkpoint directory has it") from None
    except OSError as error:
        raise CheckpointError(path, error.strerror or str(error)) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(path, f"must hold a JSON object, holds {shown(cast('object', value))}")
    return Fields(path, cast("dict[str, Any]", value))


def read_text(path: Path) -> str:
    """Return a text file's text, without a byte order mark. Raises `CheckpointError`."""
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise CheckpointError(path, error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(path, f"is not UTF-8: {error}") from None


def whole(value: object) -> int | None:
    """Return a whole number, also one written as 2.0; None if it is none."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
