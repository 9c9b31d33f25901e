"""Runs compiled kernels in torch's own team of threads: what kernels and the Python that starts them need to agree on.

A kernel is a compiled `void (*)(void *)` whose argument points to a record that begins with a counter. Every thread of the team
calls it with the same argument and takes pieces of work from the counter (`take`) until there are none, so that a thread that
the system has put off holds up nothing but the piece it is at. A second team beside torch's would be two sets of threads that
spin for each other's cores: measured to make a decode step of a small model ten times as long.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch  # noqa: F401  (loads the OpenMP library that is looked for here)
from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

#: `GOMP_parallel(function, argument, threads, flags)` of the OpenMP library that torch loaded, be it GNU's, LLVM's or Intel's.
_PARALLEL = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
if _PARALLEL is not None:
    _PARALLEL.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    _PARALLEL.restype = None


class Kernel:
    """A compiled function that threads share the work of."""

    __slots__ = ("_address", "_alone", "_keeper")

    def __init__(self, address: int, keeper: object) -> None:
        """Take a function's address and what keeps its code where it is."""
        self._address = address
        self._keeper = keeper
        self._alone: Callable[[int], None] = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)

    def run(self, record: NDArray[np.void], threads: int) -> None:
        """Do all work of a record of one element, whose first field is the counter; returns when it is done."""
        record["next"] = 0
        if threads > 1 and _PARALLEL is not None:
            _PARALLEL(self._address, record.ctypes.data, threads, 0)
        else:
            self._alone(record.ctypes.data)


def compiled(entry: Callable[[int], None]) -> Kernel:
    """Return a Python function of a record's address as a kernel; where nothing can be written, every process compiles it."""
    try:
        function: Any = cfunc(types.void(types.int64), cache=True, error_model="numpy")(entry)
    except RuntimeError:
        function = cfunc(types.void(types.int64), error_model="numpy")(entry)
    return Kernel(function.address, function)


@intrinsic
def take(context: Any, address: Any) -> Any:
    """Add 1 to the int64 at an address and return what it was; what other threads wrote before they did is seen afterwards."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "acq_rel")

    return types.int64(types.int64), generate


@intrinsic
def pointer(context: Any, address: Any) -> Any:
    """Return an address as what `numba.carray` takes."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate
