"""The FFN half of a layer: what `Ffn` is, and the dense one."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

from torch import Tensor
from torch.nn import functional

from workers.engines.adapters import AdaptedLinear, AdaptedRows

#: Adds what an FFN made of its rows to the residual stream, in place if it can; waits for what is made elsewhere.
Finish = Callable[[Tensor], Tensor]


class Ffn(Protocol):
    """One layer's second half, computed here or by other processes."""

    def begin(self, rows: Tensor, adapted: AdaptedRows) -> Finish:
        """Take normalised rows [rows, hidden], which nobody changes until the finish is called: once, before the next layer."""
        ...


class GatedMlp:
    """down(silu(gate(x)) * up(x))."""

    __slots__ = ("_down", "_gate_up", "_width")

    def __init__(self, gate_up: AdaptedLinear, down: AdaptedLinear, width: int) -> None:
        self._gate_up = gate_up
        self._down = down
        self._width = width

    def begin(self, rows: Tensor, adapted: AdaptedRows) -> Finish:
        """See `Ffn.begin`: computes when finished, where the last product adds as it goes."""
        return partial(self.add_to, rows=rows, adapted=adapted)

    def add_to(self, state: Tensor, rows: Tensor, adapted: AdaptedRows = ()) -> Tensor:
        """Return state + mlp(rows)."""
        both = self._gate_up(rows, adapted)
        return self._down.add_to(state, functional.silu(both[:, : self._width]).mul_(both[:, self._width :]), adapted)
