"""Reads the numbers of chips, links and practice from this folder, each with its source, and lets any of them be overridden.

A file is a table of numbers, `{ value, unit, source }` for a published one and `{ value, low, high, unit, why }` for one that
nobody has published: an assumption. A number's name is `FILE.KEY`, such as `lp30.tdp_w`.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any, cast

from orchestrator.core.config import Precision
from orchestrator.core.machines import Chip, Coupling, Link, Practice
from orchestrator.core.shapes import ModelShape
from orchestrator.profiles.model_config import ShapeError, shape_of

_FOLDER = Path(__file__).parent
_PUBLISHED = {"value", "unit", "source"}
_ASSUMED = {"value", "low", "high", "unit", "why"}


class CatalogError(ValueError):
    """A profile, an override or a model's configuration cannot be used; one line with file, key and problem."""


@dataclass(frozen=True, slots=True)
class Assumption:
    """A number that nobody has published: what is used, the range it may be in, and why."""

    name: str
    value: float
    low: float
    high: float
    unit: str
    why: str


@dataclass(frozen=True, slots=True)
class Number:
    """A published number and where."""

    name: str
    value: float
    unit: str
    source: str


class Catalog:
    """All profiles, with overrides applied."""

    def __init__(self, numbers: Mapping[str, Number | Assumption], words: Mapping[str, str]) -> None:
        self._numbers = numbers
        self._words = words

    @staticmethod
    def load(overrides: Mapping[str, float] | None = None) -> "Catalog":
        """Return the packaged profiles with some numbers replaced. Raises `CatalogError`."""
        numbers: dict[str, Number | Assumption] = {}
        words: dict[str, str] = {}
        for path in sorted(_FOLDER.glob("*.toml")):
            for key, entry in _read(path).items():
                name = f"{path.stem}.{key}"
                if isinstance(entry, str):
                    words[name] = entry
                else:
                    numbers[name] = _number(path.name, key, name, entry)
        return Catalog(numbers, words).overridden(overrides or {})

    def overridden(self, overrides: Mapping[str, float]) -> "Catalog":
        """Return the same profiles with some numbers replaced. Raises `CatalogError`."""
        return Catalog({**self._numbers, **{name: self._replaced(name, value) for name, value in overrides.items()}}, self._words)

    @property
    def assumptions(self) -> tuple[Assumption, ...]:
        """Every number that nobody has published, by name."""
        return tuple(number for number in self._numbers.values() if isinstance(number, Assumption))

    @property
    def names(self) -> tuple[str, ...]:
        """Every number's name: what may be overridden."""
        return tuple(self._numbers)

    @property
    def chips(self) -> tuple[str, ...]:
        """The names that `chip` knows."""
        return tuple(
            name.removesuffix(".kind") for name, word in self._words.items() if word == "chip" and name.endswith(".kind")
        )

    @property
    def shapes(self) -> tuple[str, ...]:
        """The built-in models that `shape` knows."""
        return tuple(path.stem for path in sorted((_FOLDER / "models").glob("*.toml")))

    def number(self, name: str) -> float:
        """Return a number's value. Raises `CatalogError` if there is none."""
        if name not in self._numbers:
            raise CatalogError(f"{name}: no such number{_nearest(name, self.names)}")
        return self._numbers[name].value

    def assumptions_in(self, files: frozenset[str]) -> tuple[str, ...]:
        """Return the names of the assumptions that some profiles make; a network card's switch counts as part of it."""
        files |= {self._words[f"{file}.switch"] for file in files if f"{file}.switch" in self._words}
        return tuple(assumption.name for assumption in self.assumptions if assumption.name.partition(".")[0] in files)

    def chip(self, name: str) -> Chip:
        """Return a chip. Raises `CatalogError` if no profile has that name."""
        if name not in self.chips:
            raise CatalogError(f"{name}: no such chip; there are: {', '.join(self.chips)}")
        rates = {kind: self._optional(f"{name}.{kind.value}_flops") for kind in Precision}
        practice = self._words[f"{name}.practice"]
        floor_s, unit = ("latency_s", "hops") if practice == "lpx" else ("kernel_s", "kernels")
        floor = self.number(f"{practice}.{floor_s}")
        rental = self.number("economics.rental")
        return Chip(
            name=name,
            is_gpu=practice != "lpx",
            memory_bytes=self.number(f"{name}.memory_bytes"),
            memory_bytes_per_s=self.number(f"{name}.memory_bytes_per_s"),
            flops={kind: rate for kind, rate in rates.items() if rate},
            memory_efficiency=self.number(f"{practice}.memory_efficiency"),
            matmul_efficiency={kind: self._matmul_efficiency(practice, kind) for kind in Precision},
            attention_efficiency=self.number(f"{practice}.attention_efficiency"),
            attention_floor_s=floor * self.number(f"{practice}.attention_{unit}"),
            ffn_floor_s=floor * self.number(f"{practice}.ffn_{unit}"),
            domain_chips=int(self.number(f"{name}.domain_chips")),
            scale_up=self.link(self._words[f"{name}.scale_up"]),
            scale_out=self.link(self._words[f"{name}.scale_out"]),
            host=self._optional_link(f"{name}.host"),
            storage=self._optional_link(f"{name}.storage"),
            kw=self._kw(name),
            usd_per_hour=(1 - rental) * self.number(f"{name}.owner_usd_per_hour")
            + rental * self.number(f"{name}.rental_usd_per_hour"),
        )

    def link(self, name: str) -> Link:
        """Return a link; a network card's latency and share of its rate are its switch's. Raises `CatalogError`."""
        shared = self._words.get(f"{name}.switch", name)
        return Link(
            name=name,
            bytes_per_s=self.number(f"{name}.bytes_per_s"),
            efficiency=self.number(f"{shared}.efficiency"),
            latency_s=self.number(f"{shared}.latency_s"),
            dispatch_floor_s=self._optional(f"{shared}.dispatch_floor_s"),
            dispatch_base_s=self._optional(f"{shared}.dispatch_base_s"),
            combine_floor_s=self._optional(f"{shared}.combine_floor_s"),
            combine_base_s=self._optional(f"{shared}.combine_base_s"),
        )

    @property
    def practice(self) -> Practice:
        """What holds for all chips."""
        names = ("collective_s", "expert_imbalance", "reserve_bytes")
        return Practice(*(self.number(f"practice.{name}") for name in names))

    @property
    def coupling(self) -> Coupling:
        """The way between GPUs and an LPX rack."""
        link = Link(
            "lpx.link", self.number("lpx.link_bytes_per_s"), self.number("lpx.efficiency"), self.number("lpx.link_latency_s")
        )
        return Coupling(link, self.number("lpx.draft_parameters"), self.number("lpx.draft_layers"))

    def shape(self, name: str) -> ModelShape:
        """Return a built-in model's shape, or that in a config.json or in the folder that holds one. Raises `CatalogError`."""
        packaged = _FOLDER / "models" / f"{name}.toml"
        path = packaged if name in self.shapes else Path(name)
        if path.is_dir():
            path /= "config.json"
        if not path.is_file():
            raise CatalogError(f"{name}: neither a config.json nor a built-in shape; those are: {', '.join(self.shapes)}")
        try:
            return shape_of(name, _read(path))
        except ShapeError as error:
            raise CatalogError(f"{path.name}: {error}") from None

    def _replaced(self, name: str, value: float) -> Number | Assumption:
        self.number(name)
        if not isfinite(value) or value < 0:
            raise CatalogError(f"{name}: must be a number of 0 or more, is {value}")
        source = {} if isinstance(self._numbers[name], Assumption) else {"source": "overridden"}
        return replace(self._numbers[name], value=float(value), **source)

    def _optional(self, name: str) -> float:
        return self.number(name) if name in self._numbers else 0.0

    def _optional_link(self, name: str) -> Link | None:
        return self.link(self._words[name]) if name in self._words else None

    def _matmul_efficiency(self, practice: str, precision: Precision) -> float:
        """Return the share of its rate that a precision reaches; one for all, unless it has its own."""
        own = f"{practice}.{precision.value}_matmul_efficiency"
        return self.number(own if own in self._numbers else f"{practice}.matmul_efficiency")

    def _kw(self, chip: str) -> float:
        """Return a chip's power with its share of everything around it; where only the chip's own is assumed, times a ratio."""
        if f"{chip}.kw" in self._numbers:
            return self.number(f"{chip}.kw")
        return self.number(f"{chip}.tdp_w") * self.number("economics.all_in_per_tdp") / 1000


def _read(path: Path) -> dict[str, Any]:
    """Return a TOML or JSON file's top table. Raises `CatalogError`."""
    try:
        text = path.read_text(encoding="utf-8")
        table: object = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise CatalogError(f"{path.name}: {error.strerror}") from None
    except ValueError as error:
        raise CatalogError(f"{path.name}: cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise CatalogError(f"{path.name}: must hold a table, holds {type(table).__name__}")
    return cast(dict[str, Any], table)


def _number(file: str, key: str, name: str, entry: Any) -> Number | Assumption:
    """Return one entry of a profile, published or assumed. Raises `CatalogError`."""
    where = f"{file}: {key}"
    found: dict[str, Any] = cast(dict[str, Any], entry) if isinstance(entry, dict) else {}
    if set(found) not in (_PUBLISHED, _ASSUMED):
        raise CatalogError(f"{where}: must be {{ value, unit, source }} or {{ value, low, high, unit, why }}")
    for part in {"value", "low", "high"} & set(found):
        if not isinstance(found[part], int | float) or isinstance(found[part], bool) or not found[part] >= 0:
            raise CatalogError(f"{where}: {part} must be a number of 0 or more, is {found[part]!r}")
    for part in {"unit", "source", "why"} & set(found):
        if not isinstance(found[part], str) or not found[part]:
            raise CatalogError(f"{where}: {part} must be a text, is {found[part]!r}")
    if set(found) == _PUBLISHED:
        return Number(name, float(found["value"]), found["unit"], found["source"])
    low, value, high = float(found["low"]), float(found["value"]), float(found["high"])
    if not low <= value <= high:
        raise CatalogError(f"{where}: {value:g} is not between {low:g} and {high:g}")
    return Assumption(name, value, low, high, found["unit"], found["why"])


def _nearest(name: str, known: tuple[str, ...]) -> str:
    near = get_close_matches(name, known, n=3)
    return f"; near it: {', '.join(near)}" if near else ""
