"""LoRA adapters of a model, all in memory at once: one step computes rows of several of them and of the model itself.

    y = x W^T  +  (x A^T) (scale B)^T        the second part for the rows of one adapter, with that adapter's A and B

A step's rows are runs of neighbours (`AdaptedRun`). A stretch of a prompt has one adapter. Rows that decode have one each: they
are multiplied with all the run's adapters at once, and what another one than a row's own made of it is put to 0 before the
second product, so that the number of products does not grow with that of adapters. A row without adapter is in no run, or gets
0 added.

Weights of the products that one product here is made of (`Part`) are stacked over adapters, those of smaller rank filled up with
zeros. See also `peft.py`, what may be in an adapter's directory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from orchestrator.core.config import ModelConfig
from orchestrator.core.types import AdapterName
from orchestrator.profiles.fields import CheckpointError
from workers.engines.linear import Linear
from workers.engines.peft import BEFORE, DOWN, UP, WEIGHTS, read_adapter

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAMED_MAX = 5


@dataclass(frozen=True, slots=True)
class AdaptedRun:
    """Neighbouring rows of a step, [first, end), and the adapters they have, by number, ascending."""

    first: int
    end: int
    adapters: tuple[int, ...]
    #: [rows, adapters, 1], true where a row has not that one; None if all rows have the only one.
    foreign: Tensor | None


#: The runs of a step's rows, in order; rows that are in none have no adapter.
AdaptedRows = tuple[AdaptedRun, ...]
#: A row's number for having none.
PLAIN = -1


def adapted_rows(adapters: NDArray[np.int64], mixed: int, to_device: Callable[[NDArray[np.bool_]], Tensor]) -> AdaptedRows:
    """Return the runs of rows whose adapters have these numbers: the first `mixed` as one, of the others each stretch."""
    starts = np.flatnonzero(np.diff(adapters[mixed:], prepend=PLAIN - 1)) + mixed
    edges = [*([0] if mixed else []), *starts.tolist(), len(adapters)]
    runs: list[AdaptedRun] = []
    for first, end in pairwise(edges):
        own = adapters[first:end]
        present = np.unique(own[own != PLAIN])
        if len(present):
            foreign = own[:, None, None] != present[:, None]
            runs.append(AdaptedRun(first, end, tuple(present.tolist()), to_device(foreign) if foreign.any() else None))
    return tuple(runs)


@dataclass(frozen=True, slots=True)
class Part:
    """One product of the checkpoint that is a part of one here: its outputs stand side by side with the other parts'."""

    name: str
    outputs: int
    #: In which order its outputs are here; None: as they are there.
    order: Tensor | None = None


class LowRank:
    """What all adapters add to one product.

    Args:
        downs: for each part, [adapters, rank, in].
        ups: for each part, [adapters, rank, out], scaled.
        places: the parts' outputs.
    """

    __slots__ = ("_downs", "_places", "_rank", "_ups")

    def __init__(self, downs: Sequence[Tensor], ups: Sequence[Tensor], places: Sequence[slice]) -> None:
        self._rank = downs[0].shape[1]
        #: [adapters, parts x rank, in]
        self._downs = torch.cat(list(downs), dim=1)
        self._ups = tuple(ups)
        self._places = tuple(places)

    def add(self, result: Tensor, rows: Tensor, adapted: AdaptedRows) -> None:
        """Add to a product's result [rows, out] what the rows' adapters make of `rows` [rows, in]."""
        for run in adapted:
            downs = _chosen(self._downs, run.adapters)
            low = torch.mm(rows[run.first : run.end], downs.flatten(0, 1).t()).view(run.end - run.first, len(downs), -1)
            if run.foreign is not None:
                low.masked_fill_(run.foreign, 0)
            for part, (up, place) in enumerate(zip(self._ups, self._places, strict=True)):
                narrow = low[:, :, part * self._rank : (part + 1) * self._rank].flatten(1)
                _add_product(result[run.first : run.end, place], narrow, _chosen(up, run.adapters).flatten(0, 1))


def _chosen(stacked: Tensor, adapters: tuple[int, ...]) -> Tensor:
    """Return the adapters of these numbers, without copying where one or all are meant."""
    if len(adapters) == len(stacked):
        return stacked
    return stacked[adapters[0] : adapters[0] + 1] if len(adapters) == 1 else stacked[list(adapters)]


def _add_product(result: Tensor, one: Tensor, other: Tensor) -> None:
    # The residual stream is float32 in every dtype; of these two a copy takes less than one of their product.
    result.addmm_(one.to(result.dtype), other.to(result.dtype))


class AdaptedLinear:
    """A product, and what adapters add to it, if any change it."""

    __slots__ = ("_linear", "_low_rank")

    def __init__(self, linear: Linear, low_rank: LowRank | None = None) -> None:
        self._linear = linear
        self._low_rank = low_rank

    def __call__(self, rows: Tensor, adapted: AdaptedRows = ()) -> Tensor:
        """Return [rows, out] for [rows, in]."""
        result = self._linear(rows)
        if self._low_rank is not None:
            self._low_rank.add(result, rows, adapted)
        return result

    def add_to(self, residual: Tensor, rows: Tensor, adapted: AdaptedRows = ()) -> Tensor:
        """Return residual + y, which may be `residual` itself, changed."""
        residual = self._linear.add_to(residual, rows)
        if self._low_rank is not None:
            self._low_rank.add(residual, rows, adapted)
        return residual


class Adapters:
    """The adapters of one model, being loaded: whoever lays out a product asks for what they add to it."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        """Read all that a model's table names. Raises `CheckpointError` for one that is incomplete, damaged or not served."""
        self._adapters = [_Adapter(Path(adapter.path), model.adapter_rank_max) for adapter in model.adapters.values()]
        self._numbers = {AdapterName(name): number for number, name in enumerate(model.adapters)}
        self._dtype = dtype
        self._device = device

    def number(self, name: AdapterName) -> int | None:
        """Return what rows know an adapter by; None if there is none of that name."""
        return self._numbers.get(name)

    def low_rank(self, parts: Sequence[Part], inputs: int, gain: Tensor | None) -> LowRank | None:
        """Return what they add to the product made of these parts; `gain` is what its inputs have to be multiplied by."""
        found: list[tuple[Tensor, Tensor, slice]] = []
        first = 0
        for part in parts:
            place = slice(first, first + part.outputs)
            first = place.stop
            if any(adapter.changes(part.name) for adapter in self._adapters):
                found.append((*self._stacked(part, inputs, gain), place))
        if not found:
            return None
        downs, ups, places = zip(*found, strict=True)
        return LowRank(downs, ups, places)

    def check_all_taken(self) -> None:
        """Raise `CheckpointError` for products that adapters change and nobody has asked for."""
        for adapter in self._adapters:
            adapter.check_all_taken()

    def _stacked(self, part: Part, inputs: int, gain: Tensor | None) -> tuple[Tensor, Tensor]:
        rank = max(adapter.rank for adapter in self._adapters)
        down = torch.zeros(len(self._adapters), rank, inputs)
        up = torch.zeros(len(self._adapters), rank, part.outputs)
        for number, adapter in enumerate(self._adapters):
            if adapter.changes(part.name):
                low, high = adapter.take(part.name, inputs, part.outputs)
                down[number, : len(low)] = low if gain is None else (low.double() * gain).float()
                up[number, : len(low)] = (high if part.order is None else high[part.order]).t()
        return down.to(self._device, self._dtype), up.to(self._device, self._dtype)


class _Adapter:
    """One adapter's tensors by the products that they change."""

    def __init__(self, directory: Path, rank_max: int) -> None:
        self._described = read_adapter(directory)
        self._path = directory / WEIGHTS
        try:
            with safe_open(self._path, framework="pt", device="cpu") as file:
                self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(self._path, f"not a readable safetensors file: {error}") from None
        if not self._tensors:
            raise CheckpointError(self._path, "has no tensors")
        self._modules = {name.removeprefix(BEFORE).removesuffix(DOWN) for name in self._tensors if name.endswith(DOWN)}
        ranks = {module: self._described.rank_of(module) for module in self._modules}
        #: The greatest of its products'.
        self.rank = max(ranks.values(), default=0)
        if self.rank > rank_max:
            raise CheckpointError(directory, f"has rank {self.rank}; adapter_rank_max of its model is {rank_max}")

    def changes(self, module: str) -> bool:
        return module in self._modules

    def take(self, module: str, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
        """Return a product's A [rank, in] and B [out, rank], scaled, in float32."""
        rank = self._described.rank_of(module)
        low = self._take(f"{BEFORE}{module}{DOWN}", (rank, inputs))
        high = self._take(f"{BEFORE}{module}{UP}", (outputs, rank))
        return low, high * self._described.scale_of(module)

    def check_all_taken(self) -> None:
        if self._tensors:
            left = sorted(self._tensors)
            named = ", ".join(left[:NAMED_MAX]) + (", ..." if len(left) > NAMED_MAX else "")
            problem = (
                f"{len(left)} tensors change what cannot be adapted: {named}. What can are q_proj, k_proj, v_proj and o_proj of "
                "grouped attention, and gate_proj, up_proj and down_proj of dense FFNs that a node computes itself"
            )
            raise CheckpointError(self._path, problem)

    def _take(self, name: str, shape: tuple[int, int]) -> Tensor:
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            raise CheckpointError(self._path, f"tensor {name} is missing")
        if tuple(tensor.shape) != shape:
            raise CheckpointError(self._path, f"tensor {name} must have shape {shape}, has {tuple(tensor.shape)}")
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(self._path, f"tensor {name} must be F32, BF16 or F16, is {tensor.dtype}")
        tensor = tensor.float()
        if not bool(torch.isfinite(tensor).all()):
            # Rows of other adapters are multiplied by 0, which would be no number then.
            raise CheckpointError(self._path, f"tensor {name} has a value that is no finite number")
        return tensor
