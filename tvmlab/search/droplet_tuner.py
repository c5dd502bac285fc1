"""Coordinate descent over a template space, as one of its tuners."""

from __future__ import annotations

from collections.abc import Iterable

from tvmlab.search.tuner import Tuner
from tvmlab.spaces.knobs import Index

__all__ = ["DropletTuner"]


class DropletTuner(Tuner):
    """Coordinate descent as a tuner of templates: it never ends before the space does.

    It asks for the neighbours of the fastest point measured; where none is left for those of the second fastest, and so
    on, so that a local minimum is left by the lowest pass. Latencies are compared by their medians. After the fastest
    comes the last point that was drawn near a random past one (`start_at_random`), if there is one.
    """

    name = "droplet"

    def _propose(self, count: int) -> Iterable[int]:
        axis = Index(self._space.radices)
        ranked = self._ranked()
        for index in [*ranked[:1], *self._afar(1), *ranked[1:]]:
            for way in axis.directions(index):
                neighbour = axis.step(index, way)
                if neighbour is not None:
                    yield neighbour
