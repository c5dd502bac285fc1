"""Seeded inputs for a kernel, and whether two results are the same. Needs numpy only."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["TOLERANCE", "difference", "make_input"]

# Largest allowed error, relative to the largest magnitude of the reference. float32 sums of 25,000 normal products
# in another order differ by about 1e-5; one product left out of them by 1e-3.
TOLERANCE = {"float64": 1e-10, "float32": 2e-4, "float16": 2e-2, "bfloat16": 1e-1}


def make_input(task_key: str, index: int, shape: Sequence[int], dtype: str) -> Any:
    """The input a kernel of this task is measured with: the same in every process and every run.

    Floats are standard normal, so that a term left out of a sum shows in the result; integers are 0 or 1, so that
    they are valid as an index.
    """
    rng = np.random.default_rng(zlib.crc32(f"{task_key}/{index}".encode()))
    if dtype in TOLERANCE:
        return rng.standard_normal(shape, dtype=np.float32 if dtype != "float64" else np.float64).astype(dtype)
    return rng.integers(0, 2, size=shape).astype(dtype)


def difference(result: Any, reference: Any) -> str:
    """Empty if a kernel's result is right, else what is wrong with it.

    >>> difference(np.ones(3, "float32"), np.ones(3, "float32"))
    ''
    >>> difference(np.array([1, 2], "float32"), np.array([1, 3], "float32"))
    'max error / max output 0.333 > 0.0002'
    """
    if result.dtype.name not in TOLERANCE:
        return "" if np.array_equal(result, reference) else "integer results differ"
    bound = TOLERANCE[result.dtype.name]
    if _is_close(result, reference, bound):
        return ""
    if not np.array_equal(np.isnan(result), np.isnan(reference)):
        return "NaN where the reference has none, or an element never written"
    finite = np.isfinite(reference)
    if not np.array_equal(result[~finite & ~np.isnan(reference)], reference[~finite & ~np.isnan(reference)]):
        return "infinite where the reference is not"
    if not finite.any():
        return ""
    scale = float(np.abs(reference[finite]).max()) or 1.0
    error = float(np.abs(result[finite] - reference[finite]).max()) / scale
    # `not <=` also catches a NaN error, which an infinite result gives.
    return f"max error / max output {error:.3g} > {bound:g}" if not error <= bound else ""


def _is_close(result: Any, reference: Any, bound: float) -> bool:
    """Whether a finite result is right, in few passes; False where that needs a closer look."""
    if not result.size:
        return False
    with np.errstate(invalid="ignore"):
        error, scale = np.abs(result - reference).max(), np.abs(reference).max()
    return bool(np.isfinite(scale) and error <= bound * scale)  # NaN fails every comparison
