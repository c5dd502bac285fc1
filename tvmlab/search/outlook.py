"""What the knobs of a point say of its speed, before it is built: a model for each sketch of a task.

Of the neighbours of a fast schedule most are slower, some many times, and building one takes as long as building any.
A descent looks first at those that the trials so far do not speak against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tvmlab.core import Candidate, Trial
from tvmlab.search.costmodel import KnobModel
from tvmlab.spaces.knobs import Axis

__all__ = ["Outlook"]

_PROMISING = 0.7  # of the speed expected where one stands


class Outlook:
    """Scores of points, from the trials learnt. A sketch is known by a candidate of it, and that candidate's knobs.

    Points of another sketch all score 1, as do those of a sketch without a trial: nothing speaks against them.
    """

    def __init__(self, known: Sequence[tuple[Candidate, Sequence[Axis]]], seed: int) -> None:
        self._knobs = {candidate.sketch: knobs for candidate, knobs in known}
        self._shapes = {candidate.sketch: _shape(candidate.decisions) for candidate, _ in known}
        self._models = {sketch: KnobModel(seed) for sketch in self._knobs}

    def learn(self, trial: Trial, latency_s: float | None) -> None:
        """Take in how a point did (None: it failed), if its decisions are of a known sketch's knobs."""
        if self._shapes.get(trial.sketch) == _shape(trial.decisions):
            self._models[trial.sketch].add(self._features(trial.sketch, trial.decisions), latency_s)

    def scores(self, sketch: int, points: Sequence[Sequence[Any]]) -> Any:
        """How fast each point is expected to be, as a share of the fastest known; shape (n,)."""
        if sketch not in self._models or not points:
            return np.ones(len(points))
        return self._models[sketch].predict(np.array([self._features(sketch, point) for point in points]))

    def promising(self, sketch: int, here: Sequence[Any], points: Sequence[Sequence[Any]]) -> list[bool]:
        """Which points are not expected to be far slower than `here`."""
        floor = _PROMISING * self.scores(sketch, [here])[0]
        return [bool(score >= floor) for score in self.scores(sketch, points)]

    def _features(self, sketch: int, decisions: Sequence[Any]) -> list[float]:
        return [x for knob, value in zip(self._knobs[sketch], decisions, strict=True) for x in knob.encode(value)]


def _shape(decisions: Sequence[Any]) -> list[int]:
    """What the decisions of one trace have in common: the number of parts of each, 0 for a plain number."""
    return [len(decision) if isinstance(decision, Sequence) else 0 for decision in decisions]
