"""Ansor's search over generated sketches: random samples first, then evolution guided by learned cost models.

Zheng et al., "Ansor: Generating High-Performance Tensor Programs for Deep Learning", OSDI 2020: sampling after
section 4.2, evolution after section 5. One thing differs. TVM's EvolutionarySearch applies every individual of every
generation to a schedule and extracts its features: 25 CPU-ms each, half a second for every trial. Here a generation
is ranked by a model on the knobs alone, which costs microseconds, and only the best few are applied and ranked again
by the model on program features. docs/decisions/0003-two-stage-evolution.md has the measurements.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from tvmlab.compat import load_meta_schedule
from tvmlab.core import Candidate, Trial
from tvmlab.search.costmodel import CostModel, KnobModel
from tvmlab.spaces.sketch import Point, SketchSpace

__all__ = ["Evolution"]

_EPSILON = 0.1  # share of a batch drawn at random (Ansor section 5: a small constant; TVM takes 0.05)
_APPLIED = 1.25  # points applied to a schedule for each one measured
_PARENTS = 48
_LEADERS = 4  # measured points whose neighbourhood is searched too
_ENOUGH = 8  # measured points before a model of them is worth following
_MISSES = 64  # samples without a new program before a space counts as used up


class Evolution:
    """The strategy of the Ansor step for one task.

    `known` are keys of candidates that were measured before (by this run, before it was resumed): they are not
    proposed again. `records` are measured traces with their latencies in seconds, fastest first, to start from.

    `sketches_exhausted` says that the last `ask` found no new program.
    """

    name = "evolution"
    sketches_exhausted = False

    def __init__(
        self,
        space: SketchSpace,
        *,
        seed: int,
        population: int,
        generations: int,
        cost_model: CostModel,
        known: Sequence[str] = (),
        records: Sequence[tuple[Any, float]] = (),
    ) -> None:
        self._space = space
        # A resumed search must not draw the samples again that are known: it would take the space for exhausted.
        self._rng = np.random.default_rng([seed, zlib.crc32(space.task_key.encode()), len(known)])
        self._population = population
        self._generations = generations
        self._cost_model = cost_model
        self._knob_model = KnobModel(seed)
        self._proposed = set(known)
        self._seen_points: set[str] = set()
        self._measured: list[tuple[float, Point]] = []
        self._first: list[Candidate] = []
        self._twins: list[Point] = []  # of points that were the fastest, in the other sketches
        self._rows: dict[str, Any] = {}  # features of candidates proposed and not told yet
        self._next_sketch = 0
        self._learn_records(records)

    def ask(self, count: int) -> list[Candidate]:
        """Up to `count` new candidates; an empty list when the space has no more to give."""
        asked, self._first = self._first[:count], self._first[count:]
        if len(self._measured) >= _ENOUGH:
            asked += self._evolve(count - len(asked))
        asked += self._sample(count - len(asked), 2 * len(self._space) + 4)
        if not asked and count:  # it is for good, so chance is given another chance
            asked = self._sample(1, _MISSES)
        self.sketches_exhausted = not asked
        return asked

    def tell(self, candidates: Sequence[Candidate], trials: Sequence[Trial]) -> None:
        """Learn how the candidates did."""
        if not candidates:
            return
        before = self._measured[:1]
        latencies = [trial.latency_s for trial in trials]
        for candidate, latency in zip(candidates, latencies, strict=True):
            if candidate.sketch >= 0:
                point = (candidate.sketch, candidate.decisions)
                self._knob_model.add(self._space.encode([point])[0], latency)
                if latency is not None:
                    self._measured.append((latency, point))
        self._measured.sort(key=lambda item: item[0])
        if self._measured[:1] != before:
            self._twins += self._space.twins(self._measured[0][1])
        self._cost_model.update(self._space.task_key, self._features(candidates), latencies)
        for candidate in candidates:
            del self._rows[candidate.key]

    def _sample(self, count: int, most_misses: int) -> list[Candidate]:
        """Random candidates, taking the sketches in turn; fewer when new ones no longer turn up."""
        found: list[Candidate] = []
        misses = 0
        while len(self._space) and len(found) < count and misses < most_misses:
            candidate = self._space.sample(self._next_sketch, self._rng)
            self._next_sketch = (self._next_sketch + 1) % len(self._space)
            if candidate is not None and self._is_new(candidate):
                found.append(candidate)
                misses = 0
            else:
                misses += 1
        return found

    def _evolve(self, count: int) -> list[Candidate]:
        """The batch's guided part: twins, then evolve points, apply the best, keep those whose programs look best."""
        guided = count - int(np.ceil(count * _EPSILON))
        twins = self._in_other_sketches(guided)
        return twins + self._evolved(guided - len(twins))

    def _in_other_sketches(self, count: int) -> list[Candidate]:
        """Up to `count` twins of what was the fastest: the models know little of a sketch that looked slow at first."""
        found: list[Candidate] = []
        while self._twins and len(found) < count:
            point = self._twins.pop(0)
            candidate = None if _text(point) in self._seen_points else self._space.realize(point)
            if candidate is not None and candidate.sketch >= 0 and self._is_new(candidate):
                found.append(candidate)
        return found

    def _evolved(self, guided: int) -> list[Candidate]:
        if guided <= 0:
            return []
        applied: list[Candidate] = []
        for point in self._evolve_points():
            if len(applied) >= guided * _APPLIED:
                break
            candidate = self._space.realize(point)
            if candidate is not None and candidate.sketch >= 0 and self._is_new(candidate):
                applied.append(candidate)
            else:
                self._seen_points.add(_text(point))  # it is refused, or TVM repairs it to a known one, every time
        if not applied:
            return []
        # Both models judge: the knobs know this task, the program features know the other tasks too.
        scores = self._scores([(item.sketch, item.decisions) for item in applied])
        if self._cost_model.trained:
            scores += self._cost_model.predict(self._features(applied))
        order = [applied[position] for position in np.argsort(-scores, kind="stable")]
        for passed_over in order[guided:]:  # they may be proposed again, when more is known
            self._proposed.discard(passed_over.key)
            self._seen_points.discard(_text((passed_over.sketch, passed_over.decisions)))
            self._rows.pop(passed_over.key, None)
        return order[:guided]

    def _evolve_points(self) -> list[Point]:
        """New points, the most promising first, none of them tried before."""
        space, rng = self._space, self._rng
        pool: dict[str, Point] = {}
        generation = [point for _, point in self._measured[:_PARENTS]]
        generation += [space.random(index % len(space), rng) for index in range(_PARENTS)]
        scores = self._scores(generation)
        for _ in range(self._generations):
            weights = np.maximum(scores, 1e-3)
            picked = rng.choice(len(generation), size=self._population, p=weights / weights.sum())
            generation = [space.mutate(generation[index], rng) for index in picked]
            pool.update((_text(point), point) for point in generation)
            scores = self._scores(generation)
        return _in_turns(self._rank(pool), self._rank(self._near_best()))

    def _near_best(self) -> dict[str, Point]:
        """Points one or two knobs away from the fastest measured ones.

        The models are least wrong where they interpolate, and descent from a good point is what finishes a search
        (Canesche et al., "Explore as a Storm, Exploit as a Raindrop", 2024).
        """
        space, rng = self._space, self._rng
        pool: dict[str, Point] = {}
        for _, point in self._measured[:_LEADERS]:
            for _ in range(self._population // 2):
                near = space.mutate(point, rng)
                if rng.random() < 0.5:
                    near = space.mutate(near, rng)
                pool[_text(near)] = near
        return pool

    def _rank(self, pool: dict[str, Point]) -> list[Point]:
        """The points of a pool that were not tried before, the most promising first."""
        new = [point for text, point in pool.items() if text not in self._seen_points]
        if not new:
            return []
        return [new[index] for index in np.argsort(-self._scores(new), kind="stable")]

    def _scores(self, points: Sequence[Point]) -> Any:
        return self._knob_model.predict(self._space.encode(points))

    def _features(self, candidates: Sequence[Candidate]) -> list[Any]:
        """The program features of candidates, extracted once each."""
        missing = [candidate for candidate in candidates if candidate.key not in self._rows]
        rows = self._cost_model.features(self._space.context, [_tvm_candidate(item) for item in missing])
        self._rows.update((candidate.key, row) for candidate, row in zip(missing, rows, strict=True))
        return [self._rows[candidate.key] for candidate in candidates]

    def _is_new(self, candidate: Candidate) -> bool:
        """Whether this program was not proposed before; remembers it and its point."""
        self._seen_points.add(_text((candidate.sketch, candidate.decisions)))
        if candidate.key in self._proposed:
            return False
        self._proposed.add(candidate.key)
        return True

    def _learn_records(self, records: Sequence[tuple[Any, float]]) -> None:
        """Start from earlier measurements. The fastest is measured again first: its latency is of another day."""
        replayed = [(self._space.replay(trace), latency) for trace, latency in records]
        found = [(candidate, latency) for candidate, latency in replayed if candidate is not None]
        if not found:
            return
        for candidate, latency in found:
            if candidate.sketch >= 0:
                point = (candidate.sketch, candidate.decisions)
                self._measured.append((latency, point))
                self._knob_model.add(self._space.encode([point])[0], latency)
                self._seen_points.add(_text(point))
        self._measured.sort(key=lambda item: item[0])
        known = [candidate for candidate, _ in found]
        self._cost_model.update(self._space.task_key, self._features(known), [latency for _, latency in found])
        self._rows.clear()
        if self._measured:
            self._twins += self._space.twins(self._measured[0][1])
        if self._is_new(found[0][0]):
            self._first.append(found[0][0])


def _tvm_candidate(candidate: Candidate) -> Any:
    meta_schedule = load_meta_schedule()
    schedule = candidate.payload
    arguments = meta_schedule.arg_info.ArgInfo.from_entry_func(schedule.mod, remove_preproc=True)
    return meta_schedule.search_strategy.MeasureCandidate(schedule, arguments)


def _in_turns(first: list[Point], second: list[Point]) -> list[Point]:
    """Both lists merged, one from each in turn; a point that is in both comes once."""
    mixed = [point for pair in zip_longest(first, second) for point in pair if point is not None]
    return list({_text(point): point for point in mixed}.values())


def _text(point: Point) -> str:
    return json.dumps(point, separators=(",", ":"))
