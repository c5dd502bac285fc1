"""Simulated annealing on a learned model of an enumerated space: AutoTVM's default tuner.

Chen et al., "Learning to Optimize Tensor Programs" (NeurIPS 2018), sections 3.1 (boosted trees on the knobs), 3.2
(parallel simulated annealing on the model, from where the last batch left it) and 3.3 (an epsilon-greedy batch); and
TVM's `autotvm/tuner/sa_model_optimizer.py`. Here half of the chains begin at the fastest points measured, and a
chain's temperature falls from a fifth of the best score, not from the whole of it: both find good points with far
fewer evaluations of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tvmlab.core import EnumeratedSpace, Trial
from tvmlab.search.costmodel import KnobModel
from tvmlab.search.tuner import Tuner, digits_of, index_of

__all__ = ["Annealing"]

_CHAINS = 64
_STEPS = 40
_TEMPERATURE = 0.2  # of the best score, which is 1
_EPSILON = 0.05  # share of a batch drawn at random (as in AutoTVM's ModelBasedTuner)
_ENOUGH = 8  # measured points before a model of them is worth following
_SPARE = 4  # points named for each one wanted: some are not valid
_AFAR = 8  # chains that begin at the last points near past ones drawn at random, where there are some


class Annealing(Tuner):
    """Candidates with the best predictions that parallel annealing chains come by."""

    name = "xgb"

    def __init__(
        self, space: EnumeratedSpace, *, seed: int, known: Sequence[Trial] = (), earlier: Sequence[Trial] = ()
    ) -> None:
        self._model = KnobModel(seed)
        self._rows: dict[int, Any] = {}
        self._chains: Any = None
        super().__init__(space, seed=seed, known=known, earlier=earlier)

    def _learn(self, index: int, latency_s: float | None) -> None:
        super()._learn(index, latency_s)
        self._model.add(self._row(index), latency_s)

    def _refused(self, index: int) -> None:
        self._model.add(self._row(index), None)

    def _guided(self, count: int) -> int:
        return count - int(self._rng.binomial(count, _EPSILON))

    def _propose(self, count: int) -> Iterable[int]:
        if len(self._known) < _ENOUGH:
            return []
        points, scores = self._begin()
        visited = dict(zip(index_of(points, self._space.radices), scores, strict=True))
        for temperature in np.linspace(_TEMPERATURE, 0, _STEPS, endpoint=False):
            moved = self._moved(points)
            moved_scores = self._scores(moved)
            visited.update(zip(index_of(moved, self._space.radices), moved_scores, strict=True))
            chance = np.exp(np.minimum((moved_scores - scores) / temperature, 0))
            accepted = self._rng.random(len(points)) < chance
            points[accepted], scores[accepted] = moved[accepted], moved_scores[accepted]
        self._chains = points
        new = [index for index in visited if index not in self._tried]
        return sorted(new, key=lambda index: (-visited[index], index))[: count * _SPARE]

    def _begin(self) -> tuple[Any, Any]:
        """The chains' first points, int64 of shape (chains, knobs), and their scores."""
        radices = self._space.radices
        if self._chains is None:
            self._chains = self._rng.integers(np.broadcast_to(radices, (_CHAINS, len(radices))))
        points = self._chains.copy()
        fastest = digits_of(self._ranked()[: _CHAINS // 2], radices)
        points[: len(fastest)] = fastest
        if afar := self._afar(_AFAR):
            points[len(points) - len(afar) :] = digits_of(afar, radices)
        return points, self._scores(points)

    def _moved(self, points: Any) -> Any:
        """Each point with one knob, chosen at random, at another value."""
        radices = np.array(self._space.radices)
        free = np.flatnonzero(radices > 1)
        if not len(free):
            return points.copy()
        moved, rows = points.copy(), np.arange(len(points))
        knobs = self._rng.choice(free, size=len(points))
        shift = self._rng.integers(1, radices[knobs])
        moved[rows, knobs] = (moved[rows, knobs] + shift) % radices[knobs]
        return moved

    def _scores(self, points: Any) -> Any:
        rows = [self._row(index) for index in index_of(points, self._space.radices)]
        return self._model.predict(np.array(rows))

    def _row(self, index: int) -> Any:
        if index not in self._rows:
            self._rows[index] = self._space.encode(index)
        return self._rows[index]
