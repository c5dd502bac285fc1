"""A genetic search over the knobs of an enumerated space, after AutoTVM's GATuner."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from tvmlab.search.tuner import Tuner, digits_of, index_of

__all__ = ["Genetic"]

_PARENTS = 16
_AFAR = 4  # parents that are the last points near past ones drawn at random, where there are some
_MUTATION = 0.1  # chance that a child takes a random value for a knob (GATuner: mutation_prob)
_CHILDREN = 16  # bred for each candidate that is wanted: many are points already tried


class Genetic(Tuner):
    """Children of two measured points: the first knobs of one, the others of the other, then mutations.

    GATuner (TVM, `autotvm/tuner/ga_tuner.py`) measures a whole generation of 100 before it breeds the next, whose
    parents are that generation and the best 3 of all. A task often has fewer than 100 trials in all, so here the
    parents are always the 16 fastest points known. As there, one is chosen in proportion to its speed.
    """

    name = "genetic"

    def _propose(self, count: int) -> Iterable[int]:
        parents = list(dict.fromkeys([*self._ranked()[:_PARENTS], *self._afar(_AFAR)]))
        if len(parents) < 2:
            return []  # nothing to cross yet
        latencies, radices = dict(self._known), self._space.radices
        speeds = np.array([1.0 / latency for index in parents if (latency := latencies[index])])
        genes = digits_of(parents, radices)
        shape = (count * _CHILDREN, 2)
        mothers, fathers = self._rng.choice(len(parents), size=shape, p=speeds / speeds.sum()).T
        children = self._crossed(genes[mothers], genes[fathers])
        mutated = self._rng.random(children.shape) < _MUTATION
        children[mutated] = self._rng.integers(np.broadcast_to(radices, children.shape))[mutated]
        return index_of(children, radices)

    def _crossed(self, mothers: Any, fathers: Any) -> Any:
        """One-point crossover: knobs before a random position from the one, the rest from the other."""
        count, knobs = mothers.shape
        positions = self._rng.integers(knobs, size=(count, 1))
        return np.where(np.arange(knobs) < positions, mothers, fathers)
