"""Arguments that a kernel finds out of the caches, as in a whole model that is larger than they are.

TVM's own `cache_flush_cpu_non_first_arg` flushes line by line: 25 ms before each call where there are 9 MB of weights.
Copies that take turns cost nothing at a call, and drive each other out of the caches of all cores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np

__all__ = ["ColdArguments"]


class ColdArguments:
    """Lists of arguments that take turns: `turn()` is the next one.

    All lists share the first argument and those that the kernel writes (`outputs`); the others, the weights, are
    copied so often that all copies together fill the caches of `cache_bytes` and a quarter more. Weights that do so by
    themselves are not copied: a call reads them from memory anyway. `weight_bytes` is the size of one copy.
    """

    def __init__(self, tensors: Sequence[Any], host: Sequence[np.ndarray], outputs: Sequence[int]) -> None:
        self._tensors = tensors
        self._host = host
        self._weights = [index for index in range(1, len(host)) if index not in outputs]
        self.weight_bytes = sum(host[index].nbytes for index in self._weights)
        self._turns: Any = None

    def copy(self, cache_bytes: int, device: Any) -> int:
        """Make the copies, unless there are any; returns the bytes that were needed for them."""
        import tvm

        if self._turns is not None:
            return 0
        lists = [list(self._tensors)]
        for _ in range(math.ceil(1.25 * cache_bytes / max(self.weight_bytes, 1)) - 1 if self._weights else 0):
            copied = list(self._tensors)
            for index in self._weights:
                copied[index] = tvm.runtime.tensor(self._host[index], device)
            lists.append(copied)
        self._turns = cycle(lists)
        return self.weight_bytes * (len(lists) - 1)

    def turn(self) -> list[Any]:
        """The arguments for the next call."""
        return next(self._turns)
