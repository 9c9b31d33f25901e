"""Writes a configuration as a cluster file: only what differs from the defaults, in the order of the known tables."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import StrEnum
from typing import Any

from orchestrator.core.config import ClusterConfig

#: Characters that TOML has in no comment; a line's end would end it.
_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


def cluster_text(config: ClusterConfig, comments: Sequence[str], notes: Mapping[str, str]) -> str:
    """Return a cluster file that reads back as `config`; `comments` stand at its top, `notes` under a table's heading."""
    head = [f"# {_CONTROLS.sub(' ', line)}".rstrip() for line in comments]
    return "\n".join([*head, *_table(config, "", notes)]) + "\n"


def _table(value: Any, name: str, notes: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of a table's own keys, then those of the tables in it."""
    changed = [(item.name, getattr(value, item.name)) for item in fields(value) if _differs(item, getattr(value, item.name))]
    if name in notes:
        yield f"# {notes[name]}"
    for key, entry in changed:
        if not _is_table(entry):
            yield f"{key} = {_literal(entry)}"
    for key, entry in changed:
        if _is_table(entry):
            yield from _inner(entry, f"{name}.{key}" if name else key, notes)


def _inner(entry: Any, name: str, notes: Mapping[str, str]) -> Iterator[str]:
    if isinstance(entry, tuple):
        for one in entry:
            yield from ("", f"[[{name}]]")
            yield from _table(one, name, notes)
    elif isinstance(entry, Mapping):
        for key, one in entry.items():
            yield from ("", f"[{name}.{_key(key)}]")
            yield from _table(one, f"{name}.{key}", notes)
    else:
        yield from ("", f"[{name}]")
        yield from _table(entry, name, notes)


def _differs(item: Field[Any], value: Any) -> bool:
    if item.default is not MISSING:
        return value != item.default
    return item.default_factory is MISSING or value != item.default_factory()


def _is_table(value: Any) -> bool:
    """Tell whether a value is written as tables of its own: a dataclass, or several by position or by name."""
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else (value,)
    return any(is_dataclass(entry) for entry in entries)


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, StrEnum | str):
        return _text(str(value))
    if isinstance(value, tuple):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{_key(key)} = {_literal(entry)}' for key, entry in value.items())} }}"
    return repr(value)


def _key(key: str) -> str:
    return key if key.replace("-", "").replace("_", "").isalnum() and key.isascii() else _text(key)


def _text(text: str) -> str:
    """Return a quoted text: as JSON has it, but that TOML knows no surrogates and wants a delete escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
