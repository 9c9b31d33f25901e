"""Sequences of a step that compute few rows after a long context: what a way of attending for them is told, and what it does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodeSequence:
    """One sequence's rows in a step."""

    first_row: int
    #: Rows; each sees those before it.
    count: int
    #: Tokens before them.
    start: int
    #: Its blocks; what lies behind the last one needed is void.
    table: NDArray[np.int64]

    @property
    def context(self) -> int:
        """Tokens that its last row sees."""
        return self.start + self.count


class Decodes(Protocol):
    """A step's decodes, ready to be attended for in every layer."""

    def attend(self, queries: Tensor, attended: Tensor, layer: int, scale: float) -> None:
        """Attend to the pool in one layer, after the step's own keys and values were stored there.

        Args:
            queries: [rows, query heads x head dimension and perhaps more], those of a KV head side by side.
            attended: [rows, query heads, value dimension], contiguous, of the same dtype; these sequences' rows are written.
            layer: whose keys and values are read.
            scale: of the products of queries and keys.
        """
        ...


class DecodeWay(Protocol):
    """One of the ways of attending: through block tables in place, or by gathering contexts."""

    @property
    def rows_max(self) -> int:
        """Rows of a sequence up to which this is for it; longer chunks of prompts are attended for one by one."""
        ...

    def plan(self, sequences: Sequence[DecodeSequence]) -> Decodes:
        """Prepare a step: at least one sequence, their rows one after the other from row 0 on, those of one row first, longest
        contexts first among these."""
        ...
