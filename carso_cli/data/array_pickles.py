"""Pickles that hold arrays in plain containers, read without running any code in them.

CIFAR is published as such files. Whatever else a pickle asks for, a function to call or a class to build, is
refused: the names below are all that is ever looked up.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

_RECONSTRUCT: Callable[..., Any] = np.empty(0).__reduce__()[0]  # type: ignore[assignment]  # untyped in numpy
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401  (what pickle asks for)
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is neither an array nor a plain container")
        return _ALLOWED[module, name]


def load(stream: BinaryIO, *, encoding: str = "ASCII") -> Any:  # noqa: ANN401  (as `pickle.load`)
    """Read one pickle, as `pickle.load` does.

    Args:
        stream: The file.
        encoding: How 8-bit texts of Python 2 are decoded.

    Raises:
        pickle.UnpicklingError: If it asks for anything but arrays.
    """
    return _ArraysOnly(stream, encoding=encoding).load()
