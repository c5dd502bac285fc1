"""What the knobs of a point say of its speed, before it is built: a model of all sketches of a task.

Of the neighbours of a fast schedule most are slower, some many times, and building one takes as long as building any.
A descent looks first at those that the trials so far do not speak against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tvmlab.core import Candidate, Trial
from tvmlab.search.costmodel import KnobModel
from tvmlab.spaces.encoding import Encoding
from tvmlab.spaces.knobs import Axis

__all__ = ["Outlook"]

_PROMISING = 0.7  # of the speed expected where one stands


class Outlook:
    """Scores of points, from the trials learnt. A sketch is known by a candidate of it, and that candidate's knobs.

    One model has all of them, and what sketches have in common in the same columns (`tvmlab.spaces.encoding`). Points
    of a sketch that is not known, or without a trial, score 1: nothing speaks against them.
    """

    def __init__(self, known: Sequence[tuple[Candidate, Sequence[Axis]]], seed: int) -> None:
        sketches = {candidate.sketch: (candidate, knobs) for candidate, knobs in reversed(known)}
        self._names = list(sketches)
        self._shapes = [_shape(candidate.decisions) for candidate, _ in sketches.values()]
        self._encoding = Encoding([knobs for _, knobs in sketches.values()])
        self._model = KnobModel(seed)
        self._learnt: set[int] = set()  # sketches, by their place in the encoding

    def knows(self, sketch: int, decisions: Sequence[Any]) -> bool:
        """Whether the decisions are of a known sketch's knobs."""
        return self._place(sketch, decisions) is not None

    def learn(self, trial: Trial, latency_s: float | None) -> None:
        """Take in how a point did (None: it failed), if its decisions are of a known sketch's knobs."""
        place = self._place(trial.sketch, trial.decisions)
        if place is not None:
            self._learnt.add(place)
            self._model.add(self._encoding.encode([(place, trial.decisions)])[0], latency_s)

    def scores(self, sketch: int, points: Sequence[Sequence[Any]]) -> Any:
        """How fast each point is expected to be, as a share of the fastest known of any sketch; shape (n,)."""
        place = self._place(sketch, points[0]) if points else None
        if place not in self._learnt:
            return np.ones(len(points))
        return self._model.predict(self._encoding.encode([(place, point) for point in points]))

    def promising(self, sketch: int, here: Sequence[Any], points: Sequence[Sequence[Any]]) -> list[bool]:
        """Which points are not expected to be far slower than `here`."""
        floor = _PROMISING * self.scores(sketch, [here])[0]
        return [bool(score >= floor) for score in self.scores(sketch, points)]

    def elsewhere(self, sketch: int, decisions: Sequence[Any]) -> list[tuple[int, list[Any]]]:
        """The same decisions in each of the other sketches with the same knobs; not all are valid."""
        place = self._place(sketch, decisions)
        found = [] if place is None else self._encoding.elsewhere((place, decisions))
        return [(self._names[number], point) for number, point in found]

    def _place(self, sketch: int, decisions: Sequence[Any]) -> int | None:
        """Where the encoding has a sketch; None if it is not known, or the decisions are of other knobs than its.

        Traces that come of no sketch of the task all have the number -1.
        """
        place = self._names.index(sketch) if sketch in self._names else None
        return place if place is not None and self._shapes[place] == _shape(decisions) else None


def _shape(decisions: Sequence[Any]) -> list[int]:
    """What the decisions of one trace have in common: the number of parts of each, 0 for a plain number."""
    return [len(decision) if isinstance(decision, Sequence) else 0 for decision in decisions]
