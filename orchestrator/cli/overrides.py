"""Understands `--set KEY=VALUE`: a number of the hardware profiles, or a field of the cluster file."""

import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_args, get_type_hints

from orchestrator.cli.cluster_file import UnusableInput, parsed
from orchestrator.core.config import ClusterConfig

#: Keys and list indices that lead to a field of a parsed cluster file.
FieldPath = tuple[str | int, ...]
MATCHES_MAX = 3


@dataclass(frozen=True, slots=True)
class Overrides:
    """What was set, sorted by what it changes."""

    #: Values of the hardware profiles' numbers by name.
    numbers: Mapping[str, float]
    #: Values of cluster fields by their dotted name, with the way to each.
    cluster: Mapping[str, tuple[FieldPath, Any]]


def parse_overrides(texts: Iterable[str], numbers: Collection[str], config: ClusterConfig | None) -> Overrides:
    """Return what `KEY=VALUE` texts set. Raises `UnusableInput` for a key that neither profiles nor the cluster know."""
    known = field_paths(config) if config else {}
    given: dict[str, float] = {}
    changes: dict[str, tuple[FieldPath, Any]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key or not value:
            raise UnusableInput(f"--set {text}: must be KEY=VALUE")
        if key in numbers:
            given[key] = _number(key, value)
        elif key in known:
            changes[key] = (known[key], _toml_value(key, value))
        else:
            raise UnusableInput(
                f"--set {key}: no such number of the profiles or field of the cluster{_matches(key, [*numbers, *known])}"
            )
    return Overrides(given, changes)


def _matches(key: str, known: Sequence[str]) -> str:
    near = get_close_matches(key, known, MATCHES_MAX)
    return f"; near it: {', '.join(near)}" if near else ""


def _number(key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UnusableInput(f"--set {key}: must be a number, is {value!r}") from None


def _toml_value(key: str, text: str) -> Any:
    """Return a value as it would stand in the file; what is not TOML is a text that needs no quotes here."""
    try:
        return parsed(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    except ValueError as error:
        raise UnusableInput(f"--set {key}: {str(error).partition(' (at line')[0].lower()}") from None


def field_paths(config: ClusterConfig) -> dict[str, FieldPath]:
    """Return every field of a cluster by its dotted name, such as `pools[0].engine.blocks`, and the way to it."""
    return dict(_paths(config, "", ()))


def _paths(value: Any, name: str, path: FieldPath) -> Iterator[tuple[str, FieldPath]]:
    if is_dataclass(value):
        for item in fields(value):
            entry = getattr(value, item.name)
            within = _absent_table(type(value), item.name) if entry is None else None
            yield from _paths(within or entry, f"{name}.{item.name}" if name else item.name, (*path, item.name))
    elif isinstance(value, Mapping) and any(is_dataclass(entry) for entry in value.values()):
        for key, entry in value.items():
            yield from _paths(entry, f"{name}.{key}", (*path, key))
    elif isinstance(value, tuple) and any(is_dataclass(entry) for entry in value):
        for index, entry in enumerate(value):
            yield from _paths(entry, f"{name}[{index}]", (*path, index))
    else:
        yield name, path


def _absent_table(table: type, name: str) -> Any:
    """Return a table with its defaults that a file may have and this one has not; None if the field is none, or one without."""
    for kind in get_args(get_type_hints(table)[name]):
        if isinstance(kind, type) and is_dataclass(kind) and not _needs_more(kind):
            return kind()
    return None


def _needs_more(table: type) -> bool:
    """Return whether a table has fields without defaults."""
    return any(item.default is MISSING and item.default_factory is MISSING for item in fields(table))


def set_field(mapping: dict[str, Any], path: FieldPath, value: Any) -> None:
    """Set a field of a parsed cluster file, making the tables that are not there yet."""
    place: Any = mapping
    for part in path[:-1]:
        if isinstance(part, str):
            place.setdefault(part, {})
        place = place[part]
    place[path[-1]] = value
