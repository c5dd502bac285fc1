"""Points at random: what every guided search must beat."""

from __future__ import annotations

from collections.abc import Iterable

from tvmlab.search.tuner import Tuner

__all__ = ["RandomSearch"]


class RandomSearch(Tuner):
    """Random points, none twice, after the space's starting points (AutoTVM's RandomTuner)."""

    name = "random"

    def _propose(self, count: int) -> Iterable[int]:
        return ()
