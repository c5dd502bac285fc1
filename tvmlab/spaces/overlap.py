"""How much two tasks' tuning spaces overlap: the similarity rate of selective tuning (TVM issue 4188).

The RFC takes the share of points that two spaces have in common. Taken literally that is useless for generated
sketches: a point is a tuple of a dozen decisions, the outermost part of each tile names the loop's own extent, and so
nearly all pairs share nothing.
Here, knob by knob:

- The outermost part of a tile is left out, as AutoTVM's spaces leave it to be inferred: [7, 4, 2] and [14, 4, 2] are
  one value. Compute locations, whose values depend on the tiles, are left out too.
- A knob's rate is the number of values that both have over the number that either has (Jaccard); knobs where neither
  has a choice say nothing.
- The rate of two spaces is the geometric mean over the knobs. A product, which is what the share of points comes to,
  would fall with the number of knobs: one threshold could not serve templates of three and sketches of nine.

Spaces of different operators, templates, or sketches that sample other things, have rate 0: no schedule of the one can
be one of the other. The operator is the first of the kernel class, so that epilogues may differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from tvmlab.spaces.knobs import Choice, Location, Tile
from tvmlab.spaces.sketch import SketchSpace
from tvmlab.spaces.sketch_points import tilings
from tvmlab.spaces.template import TemplateSpace, template_for
from tvmlab.tasks import Task

__all__ = ["Outline", "outline", "rate", "rates"]

Values = Tile | frozenset[Any]
Part = tuple[tuple[str, Values], ...]  # the knobs of a template or of one sketch, by what must agree


@dataclass(frozen=True)
class Outline:
    """What of a task's space is compared: its operator, and the knobs of its template or of each of its sketches."""

    operator: str
    parts: tuple[Part, ...]


def outline(task: Task, target: Any, *, templates: bool) -> Outline:
    """The outline of the space that a task is searched in on a tvm.target.Target; `templates` prefers templates."""
    operator = task.info.kernel_class.partition("+")[0]
    if templates and template_for(task.module, target) is not None:
        template = TemplateSpace(task.key, task.module, target).template
        knobs = ((f"{template.name}.{name}", frozenset(values)) for name, values in template.knobs.items())
        return Outline(operator, (tuple(knobs),))
    sketches = SketchSpace(task.key, task.module, target)
    return Outline(operator, tuple(_part(sketches.axes(number)) for number in range(len(sketches))))


def _part(knobs: Sequence[Any]) -> Part:
    found: list[tuple[str, Values]] = []
    for knob in knobs:
        if isinstance(knob, Tile):
            found.append((f"tile in {knob.parts}, innermost {knob.max_innermost}", knob))
        elif isinstance(knob, Choice):
            found.append(("choice", frozenset(range(knob.count))))
        else:
            assert isinstance(knob, Location)
    return tuple(found)


def rates(outlines: Sequence[Outline]) -> np.ndarray:
    """The rate of every pair, float64 of shape (n, n), symmetric, with ones on the diagonal."""
    found = np.eye(len(outlines))
    for row, one in enumerate(outlines):
        for column in range(row):
            found[row, column] = found[column, row] = rate(one, outlines[column])
    return found


def rate(one: Outline, other: Outline) -> float:
    """Similarity of two spaces, 0 to 1; sketches that have no counterpart of the same structure count as 0.

    >>> spaces = [Outline("conv2d", ((("tile", Tile(extent, 2, 0)), ("unroll", frozenset({0, 16}))),))
    ...           for extent in (56, 28)]
    >>> round(rate(*spaces), 3)  # 28's 6 inner parts are among 56's 8; the other knob agrees
    0.866
    """
    if one.operator != other.operator:
        return 0.0
    left = list(other.parts)
    total = 0.0
    for part in one.parts:
        match = next((number for number, found in enumerate(left) if _labels(found) == _labels(part)), None)
        if match is not None:
            total += _rate_of_parts(part, left.pop(match))
    return 2 * total / max(len(one.parts) + len(other.parts), 1)


def _labels(part: Part) -> list[str]:
    return [label for label, _ in part]


def _rate_of_parts(one: Part, other: Part) -> float:
    shares = []
    for (_, ours), (_, theirs) in zip(one, other, strict=True):
        shared = _shared(ours, theirs)
        either = _size(ours) + _size(theirs) - shared
        if either > 1:  # else there is nothing to choose
            shares.append(shared / either)
    return math.prod(shares) ** (1 / len(shares)) if shares else 1.0


def _size(values: Values) -> int:
    return tilings(values.extent, values.parts, values.max_innermost) if isinstance(values, Tile) else len(values)


@lru_cache(maxsize=65536)
def _shared(one: Values, other: Values) -> int:
    """How many values two knobs share. The inner parts of a tile fit both loops if their product divides both."""
    if isinstance(one, Tile) and isinstance(other, Tile):
        return tilings(math.gcd(one.extent, other.extent), one.parts, one.max_innermost)
    assert isinstance(one, frozenset) and isinstance(other, frozenset)
    return len(one & other)
