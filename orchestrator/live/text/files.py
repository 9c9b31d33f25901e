"""Reads the JSON files of a checkpoint folder; every problem is one line that names the file and the field."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from orchestrator.core.config import shown


class ModelUnusable(ValueError):
    """A checkpoint folder lacks something or holds something wrong; the message names the file."""


class Fields:
    """One JSON object with checked access. A field that is null is taken as missing."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    def error(self, name: str, problem: str) -> ModelUnusable:
        """Return the error for a field."""
        return ModelUnusable(f"{self.path}: {name}: {problem}")

    def count(self, name: str, default: int) -> int:
        """Return a whole number of 1 or more; 4096.0 is one too."""
        value = self.values.get(name)
        number = default if value is None else whole(value)
        if number is None or number < 1:
            raise self.error(name, f"must be a whole number of 1 or more, is {shown(value)}")
        return number

    def objects(self, name: str) -> list["Fields"]:
        """Return a list of objects; missing, none."""
        found = self.values.get(name)
        entries = cast(list[Any], found) if isinstance(found, list) else [] if found is None else [found]
        if not isinstance(found, list | None) or not all(isinstance(entry, dict) for entry in entries):
            raise self.error(name, f"must be a list of objects, is {shown(self.values[name])}")
        return [Fields(self.path, entry) for entry in entries]

    def object(self, name: str) -> "Fields":
        """Return an object; missing, an empty one."""
        found = self.values.get(name)
        if not isinstance(found, dict | None):
            raise self.error(name, f"must be an object, is {shown(self.values[name])}")
        return Fields(self.path, cast(dict[str, Any], found) or {})

    def text(self, name: str) -> str:
        """Return a text that must be there."""
        found = self.values.get(name)
        if not isinstance(found, str):
            raise self.error(name, "is missing" if found is None else f"must be a text, is {shown(found)}")
        return found

    def token_text(self, name: str) -> str | None:
        """Return what a token is called, written as text or as an object that has it as `content`; None if it is missing."""
        found = self.values.get(name)
        if found is None or isinstance(found, str):
            return found
        return self.object(name).text("content")

    def token_ids(self, name: str, size: int) -> frozenset[int]:
        """Return one token id or a list of them, all below `size`; missing, none."""
        found = self.values.get(name)
        entries = cast(list[Any], found) if isinstance(found, list) else [] if found is None else [found]
        ids = [whole(entry) for entry in entries]
        known = [one for one in ids if one is not None and 0 <= one < size]
        if len(known) < len(ids):
            raise self.error(name, f"must be token ids from 0 to {size - 1}, is {shown(self.values[name])}")
        return frozenset(known)


def read_fields(path: Path, needed: bool = True) -> Fields:
    """Return a JSON file's object; an empty one if the file is missing and not needed. Raises `ModelUnusable`."""
    if not needed and not path.is_file():
        return Fields(path, {})
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelUnusable(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelUnusable(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelUnusable(f"{path}: must hold an object, holds {shown(value)}")
    return Fields(path, cast(dict[str, Any], value))


def read_text(path: Path) -> str:
    """Return a text file's text, without a byte order mark. Raises `ModelUnusable`."""
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise ModelUnusable(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ModelUnusable(f"{path}: is not UTF-8: {error}") from error


def whole(value: object) -> int | None:
    """Return a whole number, also one written as 2.0; None if it is none."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
