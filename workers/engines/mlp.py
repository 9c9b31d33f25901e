"""The FFN half of a layer: what `Ffn` is, and the dense one."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

from torch import Tensor
from torch.nn import functional

from workers.engines.linear import Linear

#: Adds what an FFN made of its rows to the residual stream, in place if it can; waits for what is made elsewhere.
Finish = Callable[[Tensor], Tensor]


class Ffn(Protocol):
    """One layer's second half, computed here or by other processes."""

    def begin(self, rows: Tensor) -> Finish:
        """Take normalised rows [rows, hidden], which nobody changes until the finish is called: once, before the next layer."""
        ...


class GatedMlp:
    """down(silu(gate(x)) * up(x))."""

    __slots__ = ("_down", "_gate_up", "_width")

    def __init__(self, gate_up: Linear, down: Linear, width: int) -> None:
        self._gate_up = gate_up
        self._down = down
        self._width = width

    def begin(self, rows: Tensor) -> Finish:
        """See `Ffn.begin`: computes when finished, where the last product adds as it goes."""
        return partial(self.add_to, rows=rows)

    def add_to(self, state: Tensor, rows: Tensor) -> Tensor:
        """Return state + mlp(rows)."""
        both = self._gate_up(rows)
        return self._down.add_to(state, functional.silu(both[:, : self._width]).mul_(both[:, self._width :]))
