"""All points in order."""

from __future__ import annotations

from collections.abc import Iterable

from tvmlab.search.tuner import Tuner

__all__ = ["Grid"]


class Grid(Tuner):
    """The points from index 0 upwards, after the space's starting points (AutoTVM's GridSearchTuner)."""

    name = "grid"
    _next = 0

    def _propose(self, count: int) -> Iterable[int]:
        while self._next < len(self._space):
            self._next += 1
            yield self._next - 1
