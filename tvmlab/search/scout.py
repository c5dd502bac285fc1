"""Walks downhill from other fast schedules, once a descent has nothing left to try: a lower valley may be elsewhere.

A local minimum is the lowest point of one valley. Multi-start local search begins again in others (Lourenço, Martin and
Stützle, "Iterated Local Search", Handbook of Metaheuristics, 2003, section 2.2); TVM's `PostOpt` descends from the five
fastest records, which may lie side by side. Here the starts are apart.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvmlab.core import Candidate, Trial
from tvmlab.search.outlook import Outlook
from tvmlab.search.tuner import digits_of
from tvmlab.spaces.knobs import Axis, directions, stepped

__all__ = ["Scout", "Start", "apart", "name_of"]

_APART = 4  # knobs that two starts of one sketch differ in at least
_LOOKED_AT = 12  # neighbours of a point, the most promising first: most of the others are far slower, and each is built
_LOWER = 0.99  # of its latency has a neighbour that a walk goes on from; who is timed beside what stays exact anyway


@dataclass(frozen=True)
class Start:
    """Where a walk begins: a candidate, its knobs, and its latency in seconds (None: not measured in this run)."""

    candidate: Candidate
    knobs: Sequence[Axis]
    latency_s: float | None


class Scout:
    """The walks of one task, one start after another.

    It keeps no place: where a walk stands follows from what was told, so a resumed descent goes on where it was.
    """

    def __init__(self, starts: Sequence[Start], outlook: Outlook) -> None:
        self._starts = starts
        self._outlook = outlook
        self._told: dict[str, float] = {}

    def tell(self, trial: Trial) -> None:
        """Learn how a point of the task did."""
        if trial.latency_s is not None:
            self._told[name_of(trial.sketch, trial.decisions)] = trial.latency_s

    def ahead(self, tried: Container[str]) -> Iterator[tuple[Candidate, Sequence[Any]]]:
        """What to try next: neighbours of where the walks stand, each the candidate to vary and the decisions."""
        for start in self._starts:
            sketch = start.candidate.sketch
            itself = [start.candidate.decisions] if start.latency_s is None else []
            here, around = self._stands(start)
            new = [point for point in [*itself, *around] if name_of(sketch, point) not in tried]
            left = _LOOKED_AT - (len(itself) + len(around) - len(new))
            if new and left > 0:
                order = np.argsort(-self._outlook.scores(sketch, new), kind="stable")[:left]
                promising = self._outlook.promising(sketch, here, new)
                yield from ((start.candidate, new[index]) for index in order if promising[index])

    def _stands(self, start: Start) -> tuple[Sequence[Any], list[Sequence[Any]]]:
        """The lowest point that a walk has come to, and its neighbours."""
        sketch, here = start.candidate.sketch, list(start.candidate.decisions)
        latency = self._told.get(name_of(sketch, here), start.latency_s or np.inf)
        while True:
            steps = (stepped(start.knobs, here, [way]) for way in directions(start.knobs, here))
            around: list[Sequence[Any]] = [point for point in steps if point is not None]
            told = [(self._told.get(name_of(sketch, point), np.inf), point) for point in around]
            lowest, point = min(told, key=lambda item: item[0], default=(np.inf, here))
            if not lowest < _LOWER * latency:
                return here, around
            latency, here = lowest, list(point)


def apart(one: Trial, other: Trial, radices: Sequence[int] = ()) -> bool:
    """Whether two trials are of different sketches, or differ in enough knobs to lie in different valleys.

    For a space whose points are numbered, `radices` says how many values each knob has.
    """
    if one.sketch != other.sketch or len(one.decisions) != len(other.decisions):
        return True
    here, there = (digits_of(t.decisions, radices)[0] if radices else t.decisions for t in (one, other))
    return sum(a != b for a, b in zip(here, there, strict=True)) >= min(_APART, len(here))


def name_of(sketch: int, decisions: Sequence[Any]) -> str:
    """A point's name, which needs no schedule."""
    return f"{sketch} {json.dumps(list(decisions), separators=(',', ':'))}"
