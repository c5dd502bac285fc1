"""Points between and around the fastest that are known, which the models of the knobs expect to be as fast.

A single step from a fast schedule is seldom a gain once a search has been there, and what a longer search ends with
lies several knobs away: of the tile of a convolution's rows a factor moves inwards, and of that of its channels one
outwards, say, and together they gain far more than one of them does. So children take each knob over from one of two
fast points (uniform crossover; Syswerda, "Uniform Crossover in Genetic Algorithms", ICGA 1989) and go some steps from
there, for some generations, and a model chooses which are worth a build: the evolution of Ansor (OSDI 2020, section
5.1), in any space with knobs to take steps along. The twins of a fast point are tried too: the same decisions in
another sketch.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import numpy as np

from tvmlab.core import Candidate, Trial
from tvmlab.search.outlook import Outlook
from tvmlab.search.scout import name_of
from tvmlab.spaces.knobs import Axis, directions, stepped

__all__ = ["Offspring"]

_PARENTS = 32  # the fastest points, of any sketch
_POPULATION = 256
_GENERATIONS = 3
_STEPS = 3  # at most, that a child goes from what it inherited
_SELECTION = 4  # parents are drawn by this power of their speed

_Point = tuple[int, list[Any]]  # a sketch's number, and the values of its knobs


class Offspring:
    """The children of the fastest points told, of the sketches of which a candidate and its knobs are known."""

    def __init__(
        self, known: Sequence[tuple[Candidate, Sequence[Axis]]], outlook: Outlook, seed: Sequence[int]
    ) -> None:
        self._known = {candidate.sketch: (candidate, knobs) for candidate, knobs in reversed(known)}
        self._outlook = outlook
        self._rng = np.random.default_rng(seed)
        self._told: dict[str, tuple[float, _Point]] = {}

    def tell(self, trial: Trial) -> None:
        """Learn how a point of the task did; later readings count."""
        if trial.latency_s is not None and self._outlook.knows(trial.sketch, trial.decisions):
            point = (trial.sketch, list(trial.decisions))
            self._told[name_of(*point)] = (trial.latency_s, point)

    def born(self, tried: Container[str]) -> list[tuple[Candidate, list[Any]]]:
        """New points, the most promising first: for each the candidate to vary, and the decisions."""
        fastest = sorted(self._told.values(), key=lambda told: told[0])[:_PARENTS]
        if not fastest:
            return []
        generation = [point for _, point in fastest]
        scores = np.array([fastest[0][0] / latency for latency, _ in fastest])
        twins = [twin for _, point in fastest for twin in self._outlook.elsewhere(*point)]
        pool = {name_of(*twin): twin for twin in twins}
        for _ in range(_GENERATIONS):
            chances = scores**_SELECTION / (scores**_SELECTION).sum()
            drawn = self._rng.choice(len(generation), size=(_POPULATION, 2), p=chances)
            generation = [self._child(generation[one], generation[other]) for one, other in drawn]
            scores = self._scores(generation)
            pool.update((name_of(*point), point) for point in generation)
        new = [point for name, point in pool.items() if name not in tried and name not in self._told]
        order = np.argsort(-self._scores(new), kind="stable")
        return [(self._known[new[index][0]][0], new[index][1]) for index in order]

    def _child(self, one: _Point, other: _Point) -> _Point:
        """Each knob of either, and some steps from there; of the first alone if the two are of different sketches."""
        sketch, values = one
        if other[0] == sketch:
            picks = self._rng.integers(2, size=len(values))
            values = [pair[pick] for pair, pick in zip(zip(*(one[1], other[1]), strict=True), picks, strict=True)]
        knobs = self._known[sketch][1]
        for _ in range(self._rng.integers(_STEPS + 1)):
            ways = directions(knobs, values)
            if ways:
                values = stepped(knobs, values, [ways[self._rng.integers(len(ways))]]) or values
        return sketch, list(values)

    def _scores(self, points: Sequence[_Point]) -> Any:
        """Expected speeds, as shares of the fastest point's."""
        scores = np.empty(len(points))
        for sketch in {sketch for sketch, _ in points}:
            mine = [index for index, point in enumerate(points) if point[0] == sketch]
            scores[mine] = self._outlook.scores(sketch, [points[index][1] for index in mine])
        return np.maximum(scores, 1e-3)
