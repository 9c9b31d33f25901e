"""Reads the numbers of chips, links and practice from this folder, each with its source, and lets any of them be overridden.

A file is a table of numbers, `{ value, unit, source }` for a published one and `{ value, low, high, unit, why }` for one that
nobody has published: an assumption. A number's name is `FILE.KEY`, such as `lp30.tdp_w`.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from orchestrator.core.config import DecodeMode, Precision
from orchestrator.core.cost.machines import AllToAll, Chip, Coupling, Line, Link, Practice
from orchestrator.core.cost.shapes import ModelShape
from orchestrator.profiles.fields import CheckpointError, Fields, read_fields
from orchestrator.profiles.model_config import architecture_of, model_fields

_FOLDER = Path(__file__).parent
_PUBLISHED = {"value", "unit", "source"}
_ASSUMED = {"value", "low", "high", "unit", "why"}
#: Units of what something is divided by: never 0.
_DIVISORS = {"B", "B/s", "FLOP/s", "chips", "ratio", "share"}
#: Units of what is a part of a whole, or lies between two ways to count: 1 at most.
_SHARES = {"share", "chance", "switch"}
#: Nothing is larger, and nothing that is divided by is smaller; beyond them results would no longer be numbers.
_LARGEST, _SMALLEST = 1e24, 1e-24


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
        """Return the names of the assumptions that some profiles make, and those that they refer to for their numbers."""
        names = (f"{file}.{word}" for file in files for word in ("switch", "exchange", "practice"))
        files |= {self._words[name] for name in names if name in self._words}
        return tuple(assumption.name for assumption in self.assumptions if assumption.name.partition(".")[0] in files)

    def chip(self, name: str, together: int = 1) -> Chip:
        """Return a chip, of which so many work together. Raises `CatalogError` if no profile has that name."""
        if name not in self.chips:
            raise CatalogError(f"{name}: no such chip; there are: {', '.join(self.chips)}")
        rates = {kind: self._optional(f"{name}.{kind.value}_flops") for kind in Precision}
        practice = self._words[f"{name}.practice"]
        is_gpu = practice != "lpx"
        floor_s, unit = (self.number(f"{practice}.kernel_s"), "kernels") if is_gpu else (self._fabric_s(together), "hops")
        rental = self.number("economics.rental")
        return Chip(
            name=name,
            is_gpu=is_gpu,
            memory_bytes=self.number(f"{name}.memory_bytes"),
            memory_bytes_per_s=self.number(f"{name}.memory_bytes_per_s"),
            flops={kind: rate for kind, rate in rates.items() if rate},
            memory_efficiency=self.number(f"{practice}.memory_efficiency"),
            matmul_efficiency=self._efficiencies(name, "matmul"),
            expert_efficiency=self._efficiencies(name, "expert"),
            attention_efficiency=self.number(f"{practice}.attention_efficiency"),
            attention_floor_s=floor_s * self.number(f"{practice}.attention_{unit}"),
            ffn_floor_s=floor_s * self.number(f"{practice}.ffn_{unit}"),
            domain_chips=int(self.number(f"{name}.domain_chips")),
            scale_up=self.link(self._words[f"{name}.scale_up"], together),
            scale_out=self.link(self._words[f"{name}.scale_out"], together),
            host=self._optional_link(f"{name}.host"),
            storage=self._optional_link(f"{name}.storage"),
            kw=self._kw(name),
            usd_per_hour=(1 - rental) * self.number(f"{name}.owner_usd_per_hour")
            + rental * self.number(f"{name}.rental_usd_per_hour"),
        )

    def link(self, name: str, together: int = 1) -> Link:
        """Return a link; a network card's latency and share of its rate are its switch's. Raises `CatalogError`."""
        shared = self._words.get(f"{name}.switch", name)
        link = Link(
            name=name,
            bytes_per_s=self.number(f"{name}.bytes_per_s"),
            efficiency=self.number(f"{shared}.efficiency"),
            latency_s=self._fabric_s(together) if name == "lpx" else self.number(f"{shared}.latency_s"),
            capacity_bytes=self._optional(f"{name}.capacity_bytes"),
        )
        near, wide = (
            AllToAll(self._line(link, shared, size, "dispatch"), self._line(link, shared, size, "combine"))
            for size in ("near_", "")
        )
        return replace(link, near=near, wide=wide)

    def _line(self, link: Link, shared: str, size: str, way: str) -> Line:
        """Return one way of a link's all-to-all; where it is another link's, with its own fixed times and at its own rate."""
        measured = self._words.get(f"{shared}.exchange", shared)
        longer, usual = self._optional(f"{shared}.exchange_time", otherwise=1.0), self.number(f"{measured}.efficiency")

        def number(key: str, otherwise: float) -> float:
            return self._optional(f"{measured}.{size}{way}_{key}", f"{measured}.{way}_{key}", otherwise=otherwise)

        return Line(
            longer * number("floor_s", 0.0), longer * number("base_s", 0.0), link.rate * number("efficiency", usual) / usual
        )

    def _fabric_s(self, chips: int) -> float:
        """Return the seconds from one chip's memory to another's over the LPX fabric, where so many chips can be reached."""
        racks = chips / self.number("lpx.rack_chips")
        inside = self.number("lpx.latency_s") + self.number("lpx.rack_latency_s") * min(racks, 1.0)
        return inside + self.number("lpx.racks_latency_s") * max(racks - 1.0, 0.0)

    def efficiency_name(self, chip: str, precision: Precision, kind: str) -> str:
        """Return the name of the share of its rate that a chip reaches in a kind of matrices, `matmul` or `expert`.

        There is one for all precisions, unless a precision has its own; and one for both kinds, unless experts have their own.
        """
        practice = self._words[f"{chip}.practice"]
        names = (f"{practice}.{own}_efficiency" for own in (f"{precision.value}_{kind}", kind))
        return next((name for name in names if name in self._numbers), f"{practice}.matmul_efficiency")

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
        try:
            path = path / "config.json" if path.is_dir() else path
            is_there = path.is_file()
        except OSError as error:
            raise CatalogError(f"{name}: {error.strerror}") from None
        if not is_there:
            raise CatalogError(f"{name}: neither a config.json nor a built-in shape; those are: {', '.join(self.shapes)}")
        try:
            config = Fields(path, _read(path)) if path == packaged else read_fields(path)
            return architecture_of(model_fields(config)).shape(name)
        except CheckpointError as error:
            raise CatalogError(f"{error.path.name}: {error.problem}") from None

    def _replaced(self, name: str, value: float) -> Number | Assumption:
        self.number(name)
        unit = self._numbers[name].unit
        # A part of a chip is none.
        least = 1.0 if unit == "chips" else _SMALLEST if unit in _DIVISORS else 0.0
        most = 1.0 if unit in _SHARES else _LARGEST
        if not least <= value:
            wanted = "over 0" if least == _SMALLEST else f"of {least:g} or more"
            raise CatalogError(f"{name}: must be a number {wanted}, is {value}")
        if value > most:
            raise CatalogError(f"{name}: must be at most {most:g}, is {value:g}")
        source = {} if isinstance(self._numbers[name], Assumption) else {"source": "overridden"}
        return replace(self._numbers[name], value=float(value), **source)

    def _optional(self, *names: str, otherwise: float = 0.0) -> float:
        """Return the first number that there is."""
        return next((self.number(name) for name in names if name in self._numbers), otherwise)

    def _optional_link(self, name: str) -> Link | None:
        return self.link(self._words[name]) if name in self._words else None

    def _efficiencies(self, chip: str, kind: str) -> dict[Precision, float]:
        return {precision: self.number(self.efficiency_name(chip, precision, kind)) for precision in Precision}

    def _kw(self, chip: str) -> float:
        """Return a chip's power with its share of everything around it; where only the chip's own is assumed, times a ratio."""
        if f"{chip}.kw" in self._numbers:
            return self.number(f"{chip}.kw")
        return self.number(f"{chip}.tdp_w") * self.number("economics.all_in_per_tdp") / 1000


def acceptance_name(mode: DecodeMode) -> str:
    """Return the name of the chance that a drafted token is accepted: from another chip's drafter, or from one more layer."""
    return "lpx.acceptance" if mode is DecodeMode.DRAFTER else "practice.acceptance"


def _read(path: Path) -> dict[str, Any]:
    """Return a TOML file's top table. Raises `CatalogError`."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CatalogError(f"{path.name}: {error.strerror}") from None
    except ValueError as error:
        raise CatalogError(f"{path.name}: cannot be read: {error}") from None


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
