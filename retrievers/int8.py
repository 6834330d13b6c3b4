"""The product of two int8 matrices, exact, on one core."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


class Int8Product:
    """Rows [b, d] times rows [m, d], int8 without -128, to int32 [b, m], by torch.

    Sums of integers are the same in any order, so there is nothing to round. But torch keeps this operation half
    private, and processors without 8-bit dot products have been made to saturate: `find` tries it first.
    """

    def __init__(self, torch: Any, openmp: Any) -> None:
        self._torch = torch
        self._openmp = openmp

    @classmethod
    def find(cls, dimension: int) -> Self | None:
        """The product for vectors this wide, or None where torch is absent, lacks it, or gets it wrong."""
        try:
            import torch

            made = cls(torch, ctypes.CDLL(str(torch._C.__file__)))  # also finds what it is linked to: its OpenMP
            with made.one_thread():
                right = all(made._right(*shape, dimension) for shape in ((1, 100), (5, 1000), (16, 33), (33, 257)))
        except (ImportError, AttributeError, OSError, RuntimeError):
            return None
        return made if right else None

    def __call__(self, queries: NDArray[np.int8], rows: NDArray[np.int8]) -> NDArray[np.int32]:
        """The product; both contiguous. Call it inside `one_thread`."""
        product = self._torch._int_mm(self._torch.from_numpy(queries), self._torch.from_numpy(rows).T)
        values: NDArray[np.int32] = product.numpy()
        return values

    @contextmanager
    def one_thread(self) -> Iterator[None]:
        """This thread's products have one OpenMP thread meanwhile.

        torch.set_num_threads would also be heeded by every thread that turns to torch later: the model's, perhaps.
        """
        self._torch.get_num_threads()  # a new thread takes torch's number once, at its first question; that is now past
        before = self._openmp.omp_get_max_threads()
        self._openmp.omp_set_num_threads(1)
        try:
            yield
        finally:
            self._openmp.omp_set_num_threads(before)

    def _right(self, b: int, m: int, d: int) -> bool:
        random = np.random.default_rng(0)
        queries, rows = random.choice(np.array([-127, 127, 90, -3], np.int8), size=(2, max(b, m), d))[:, :, :]
        queries, rows = np.ascontiguousarray(queries[:b]), np.ascontiguousarray(rows[:m])
        queries[0], rows[0] = 127, 127  # the largest sum there is
        true = (queries.astype(np.float64) @ rows.T.astype(np.float64)).astype(np.int64)
        return np.array_equal(self(queries, rows), true)
