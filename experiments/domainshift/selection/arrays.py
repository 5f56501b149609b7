"""Checks of arrays, each of which names the argument, what it is and what is allowed."""

from __future__ import annotations

from typing import Any

import numpy as np

from domainshift.errors import BadInput


class SelectionError(BadInput):
    """An array, a score or a candidate cannot be used to choose a model."""


def matrix(name: str, values: Any, columns: int = 1, rows: int = 1) -> np.ndarray:
    """Values as float64 (n, k). Raises SelectionError.

    Args:
        name: of the argument, for the error.
        values: numbers of any real dtype, all finite.
        columns: the least k that is allowed.
        rows: the least n that is allowed.
    """
    array = _finite(name, values)
    if array.ndim != 2 or len(array) < rows or array.shape[1] < columns:
        raise SelectionError(
            f"{name}: shape {array.shape} is not allowed; allowed: (n, k), n >= {rows}, k >= {columns}"
        )
    return array


def vector(name: str, values: Any, least: int = 1) -> np.ndarray:
    """Values as float64 (n,), n at least `least`, all finite. Raises SelectionError."""
    array = _finite(name, values)
    if array.ndim != 1 or len(array) < least:
        raise SelectionError(
            f"{name}: shape {array.shape} is not allowed; allowed: (n,), n >= {least}"
        )
    return array


def classes_of(name: str, values: Any, rows: int, classes: int) -> np.ndarray:
    """Labels as int64 (rows,), from 0 to classes - 1. Raises SelectionError."""
    array = np.asarray(values)
    if array.shape != (rows,):
        raise SelectionError(f"{name}: shape {array.shape} is not allowed; allowed: ({rows},)")
    if array.dtype.kind not in "iu":
        raise SelectionError(f"{name}: dtype {array.dtype} is not allowed; allowed: integers")
    outside = (array < 0) | (array >= classes)
    if outside.any():
        raise SelectionError(
            f"{name}: class {array[outside][0]} is not allowed; allowed: 0 to {classes - 1}"
        )
    return array.astype(np.int64)


def same_width(name: str, array: np.ndarray, other_name: str, other: np.ndarray) -> None:
    """Raises SelectionError unless both arrays have as many columns."""
    if array.shape[1] != other.shape[1]:
        raise SelectionError(
            f"{name}: {array.shape[1]} columns are not allowed; "
            f"allowed: {other.shape[1]}, as {other_name} has"
        )


def _finite(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "fiu":
        raise SelectionError(f"{name}: dtype {array.dtype} is not allowed; allowed: real numbers")
    array = array.astype(np.float64)
    bad = ~np.isfinite(array)
    if bad.any():
        raise SelectionError(
            f"{name}: {array[bad][0]} ({bad.sum()} of {bad.size} values) is not allowed; "
            "allowed: finite values"
        )
    return array
