"""Reads a cluster file: TOML in, a checked configuration out, or one line that names file, line and field."""

import re
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.core.config import ClusterConfig, ConfigError

_PACKAGE = Path(__file__).parents[1]
#: The cluster files that come along: beside the packages in a checkout, within them once installed.
FOLDER = _PACKAGE / "deploy" if (_PACKAGE / "deploy").is_dir() else _PACKAGE.parent / "deploy"
LOCAL_CLUSTER = FOLDER / "local.toml"
#: The one with tiers below its nodes' memory.
TIERS_CLUSTER = FOLDER / "tiers.toml"
#: The one whose turns go their different ways: prefill, split decode, a beat.
AGENTS_CLUSTER = FOLDER / "agents.toml"
AGENT_SESSION = Path(__file__).parent / "data" / "agent_session.jsonl"

_TABLE = re.compile(r"^\s*(\[\[?)\s*([^\[\]]+?)\s*\]")
_KEY = re.compile(r"^\s*([A-Za-z0-9_\-\".]+)\s*=")
#: Digits of the longest number that Python reads; a number that long is a mistake.
_DIGITS_MAX = 4300
_LONG_NUMBER = re.compile(rf"\d[\d_]{{{_DIGITS_MAX},}}")
#: A cluster file that is larger is none.
_BYTES_MAX = 1 << 24


class UnusableInput(ValueError):
    """What the user gave cannot be used; the message is one line for them."""


def read_cluster(path: Path) -> ClusterConfig:
    """Return the configuration in a cluster file. Raises `UnusableInput`."""
    mapping = read_mapping(path)
    try:
        return ClusterConfig.from_mapping(mapping)
    except ConfigError as error:
        raise located(path, error) from None


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file as they stand there. Raises `UnusableInput`."""
    text = _text(path)
    try:
        return parsed(text)
    except ValueError as error:
        found = re.search(r"^(.*) \(at line (\d+)", str(error))
        problem, line = (found[1], found[2]) if found else (str(error), str(text.count("\n") + 1))
        raise UnusableInput(f"{path}:{line}: {problem[0].lower()}{problem[1:]}") from None


def parsed(text: str) -> dict[str, Any]:
    """Return the tables of a TOML text. Raises `TOMLDecodeError`, and another `ValueError` for what is beyond the parser."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError:
        depths = [line.count("[") + line.count("{") for line in text.split("\n")]
        raise ValueError(f"Lists or tables are nested too deeply (at line {1 + depths.index(max(depths))})") from None
    except ValueError:
        found = _LONG_NUMBER.search(text)
        line = text.count("\n", 0, found.start() if found else 0) + 1
        raise ValueError(f"A number has more than {_DIGITS_MAX} digits (at line {line})") from None


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_BYTES_MAX + 1)
    except OSError as error:
        raise UnusableInput(f"{path}: {error.strerror}") from None
    if len(content) > _BYTES_MAX:
        raise UnusableInput(f"{path}: is no cluster file: it has more than {_BYTES_MAX} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UnusableInput(f"{path}: is not UTF-8 text") from None


def check_file(option: str, path: Path) -> None:
    """Raise `UnusableInput` unless a file can be written at a path: in a folder that is there, and not over a folder."""
    if path == Path("-"):
        return
    if _is(Path.is_dir, path, option):
        raise UnusableInput(f"{option} {path}: is a folder; give a file in it")
    if not _is(Path.is_dir, path.parent, option):
        raise UnusableInput(f"{option} {path}: {path.parent} is no folder")


def write_file(option: str, path: Path, text: str) -> None:
    """Write a text to a file, or to standard output for `-`. Raises `UnusableInput`."""
    if path == Path("-"):
        print(text, end="")
        return
    try:
        # What was given on the command line need not be UTF-8.
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UnusableInput(f"{option} {path}: {error.strerror}") from None


def check_folder(option: str, path: Path) -> None:
    """Raise `UnusableInput` if a path cannot be made a folder because something else is there."""
    if _is(Path.exists, path, option) and not _is(Path.is_dir, path, option):
        raise UnusableInput(f"{option} {path}: is there already and not a folder")


def _is(kind: Callable[[Path], bool], path: Path, option: str) -> bool:
    """Ask what a path is. Raises `UnusableInput` where that cannot be found out: no permission, too long a name."""
    try:
        return kind(path)
    except OSError as error:
        raise UnusableInput(f"{option} {path}: {error.strerror}") from None


def located(path: Path, error: ConfigError) -> UnusableInput:
    """Return the one line that says where in a cluster file something is wrong."""
    return UnusableInput(f"{path}:{line_of(_text(path), error.where)}: {error}")


def with_model(config: ClusterConfig, directory: Path, where: str) -> ClusterConfig:
    """Return the configuration with its only model's checkpoint replaced. Raises `UnusableInput`."""
    if len(config.models) != 1:
        names = ", ".join(config.models)
        raise UnusableInput(f"--model: {where} has several models ({names}); give their paths there")
    if not _is(Path.is_file, directory / "config.json", "--model"):
        raise UnusableInput(f"--model: {directory} is no checkpoint directory: it has no config.json")
    (name, model), *_ = config.models.items()
    return replace(config, models={name: replace(model, path=str(directory.resolve()))})


def check_served(config: ClusterConfig, path: Path) -> None:
    """Raise `UnusableInput` if a model that has only a shape is to be computed: the built-in model would answer in its name."""
    for name, model in config.models.items():
        computes = any(pool.engine.name != "profiled" for pool in config.pools_of(name))
        if model.shape and not model.path and computes:
            problem = f"is empty, and a shape ({model.shape}) cannot be served; give a checkpoint directory here or with --model"
            raise located(path, ConfigError(f"models.{name}.path", problem))


def line_of(text: str, where: str) -> int:
    """Return the line of a field such as `pools[1].engine.blocks`, or of the table that should hold it; 1 if neither is there."""
    lines = _lines_by_field(text)
    parts = where.split(".")
    while parts:
        field = ".".join(parts)
        for candidate in (field, re.sub(r"\[\d+\]$", "", field)):
            if candidate in lines:
                return lines[candidate]
        parts.pop()
    return 1


def _lines_by_field(text: str) -> dict[str, int]:
    """Return the line of every table and key written in the usual one-per-line form."""
    lines: dict[str, int] = {}
    counts: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := _TABLE.match(line):
            table = _full_name(header[2].replace('"', ""), counts, header[1] == "[[")
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            name = key[1].replace('"', "")
            lines.setdefault(f"{table}.{name}" if table else name, number)
    return lines


def _full_name(name: str, counts: dict[str, int], is_entry: bool) -> str:
    """Return a table's name with the index of the list entry it is in: `pools.engine` becomes `pools[1].engine`."""
    if is_entry:
        counts[name] = counts.get(name, -1) + 1
    parts: list[str] = []
    plain: list[str] = []
    for part in name.split("."):
        plain.append(part)
        index = counts.get(".".join(plain))
        parts.append(part if index is None else f"{part}[{index}]")
    return ".".join(parts)
