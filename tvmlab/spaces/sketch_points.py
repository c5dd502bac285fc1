"""The points of a sketch space by number, with the surface of a template space: knobs by name, any point, why not.

A search does not need the numbers; they are for looking at a space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pandas as pd

from tvmlab.compat import to_plain
from tvmlab.core import Candidate
from tvmlab.spaces.schedules import divisors
from tvmlab.spaces.sketch import Point, SketchSpace

__all__ = ["SketchPoints", "tiling", "tilings"]


@dataclass(frozen=True)
class _Tile:
    """A loop split into `parts` loops, of which the last is at most `most` long (0: any)."""

    name: str
    extent: int
    parts: int
    most: int

    def __len__(self) -> int:
        return tilings(self.extent, self.parts, self.most)

    def decision(self, index: int) -> list[int]:
        return list(tiling(index, self.extent, self.parts, self.most))

    shown = decision

    @property
    def about(self) -> str:
        limit = f", the innermost at most {self.most}" if self.most else ""
        return f"{self.extent} split into {self.parts} loops{limit}"


@dataclass(frozen=True)
class _Choice:
    """One of a few listed values."""

    name: str
    values: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.values)

    def decision(self, index: int) -> int:
        return index

    def shown(self, index: int) -> Any:
        return self.values[index]

    @property
    def about(self) -> str:
        return "one of " + ", ".join(map(str, self.values))


@dataclass(frozen=True)
class _Location:
    """The loop under which a block is computed, outermost first; -2 inlined, -1 at the root."""

    name: str
    loops: int

    def __len__(self) -> int:
        return self.loops + 2

    def decision(self, index: int) -> int:
        return index - 2

    shown = decision

    @property
    def about(self) -> str:
        return f"inlined (-2), at the root (-1), or under one of at most {self.loops} loops"


_Knob = _Tile | _Choice | _Location


class SketchPoints:
    """The points of a sketch space: those of the first sketch, then those of the next one, and so on.

    Within a sketch the first knob changes fastest. Which compute locations exist depends on the other knobs, so not
    all points are valid; `why_not` says whether one is, by making its schedule.
    """

    def __init__(self, space: SketchSpace) -> None:
        self._space = space
        self._sketches = [_knobs_of(sketch) for sketch in space.sketches]

    @property
    def sketches(self) -> int:
        """How many sketches there are."""
        return len(self._sketches)

    def __len__(self) -> int:
        return sum(map(_points_of, self._sketches))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sketch and the values of its knobs at a point. Raises IndexError beyond the last point."""
        sketch, positions = self._place(index)
        knobs = self._sketches[sketch]
        shown = {knob.name: knob.shown(position) for knob, position in zip(knobs, positions, strict=True)}
        return {"sketch": sketch, **shown}

    def point(self, index: int) -> Point:
        """The sketch and its decisions at a point, as a SketchSpace has them."""
        sketch, positions = self._place(index)
        knobs = self._sketches[sketch]
        return sketch, [knob.decision(position) for knob, position in zip(knobs, positions, strict=True)]

    def realize(self, index: int) -> Candidate | None:
        """The candidate at a point; None where TVM does not accept it as it is."""
        candidate = self._space.realize(self.point(index))
        return candidate if candidate and (candidate.sketch, candidate.decisions) == self.point(index) else None

    def why_not(self, index: int) -> str:
        """Why a point is not valid; an empty string if it is."""
        candidate = self._space.realize(self.point(index))
        if candidate is None:
            return "TVM's schedule or one of its postprocessors refuses it"
        if (candidate.sketch, candidate.decisions) != self.point(index):
            return "not all of its compute locations exist: TVM moves them"
        return ""

    def frame(self, limit: int = 20) -> pd.DataFrame:
        """The first `limit` points: one column a knob (empty where a sketch lacks it), and `why_not`."""
        rows = [{**self[index], "why_not": self.why_not(index)} for index in range(min(limit, len(self)))]
        return pd.DataFrame(rows, index=pd.RangeIndex(len(rows), name="point"))

    def knobs(self) -> pd.DataFrame:
        """One row a sketch and knob: how many values it has, and which."""
        rows = [(number, k.name, len(k), k.about) for number, knobs in enumerate(self._sketches) for k in knobs]
        return pd.DataFrame(rows, columns=["sketch", "knob", "values", "about"])

    def _place(self, index: int) -> tuple[int, list[int]]:
        if not 0 <= index < len(self):
            raise IndexError(f"point {index} of a space of {len(self)}")
        sketch = 0
        while index >= _points_of(self._sketches[sketch]):
            index -= _points_of(self._sketches[sketch])
            sketch += 1
        positions = []
        for knob in self._sketches[sketch]:
            index, position = divmod(index, len(knob))
            positions.append(position)
        return sketch, positions


def _points_of(knobs: list[_Knob]) -> int:
    return math.prod(map(len, knobs))


def _knobs_of(sketch: Any) -> list[_Knob]:
    """The knobs of a sketch's trace, by its sampling instructions, named after what they are applied to."""
    instructions, decisions = to_plain(sketch.as_json())
    names: dict[str, str] = {}  # of blocks and loops, by the trace's own names for them
    labels = {inputs[-1]: attrs[0] for kind, inputs, attrs, _ in instructions if kind == "Annotate"}
    decided = dict(map(tuple, decisions))
    made = {"GetLoops": 0, "Split": -1}  # a split loop is one no longer
    loops = sum(len(outputs) + made[kind] for kind, _, _, outputs in instructions if kind in made)
    found: list[_Knob] = []
    for number, (kind, inputs, attrs, outputs) in enumerate(instructions):
        of = names.get(inputs[0], "?") if inputs and isinstance(inputs[0], str) else ""
        if kind == "GetSBlock":
            names[outputs[0]] = str(attrs[0])
        elif kind == "GetLoops":
            names.update((loop, f"{of}[{axis}]") for axis, loop in enumerate(outputs))
        elif kind in ("SamplePerfectTile", "SamplePartitionedTile"):
            extent = math.prod(decided[number])
            found.append(_Tile(f"tile {of}", extent, int(attrs[0]), max(int(attrs[1]), 0)))
        elif kind == "SampleCategorical":
            label = str(labels.get(outputs[0], "choice")).removeprefix("meta_schedule.")
            found.append(_Choice(label, tuple(attrs[0])))
        elif kind == "SampleComputeLocation":
            found.append(_Location(f"location {of}", loops))
    return _distinct(found)


def _distinct(knobs: list[_Knob]) -> list[_Knob]:
    """The same knobs; a name that occurs again gets a number."""
    seen: dict[str, int] = {}
    found = []
    for knob in knobs:
        seen[knob.name] = count = seen.get(knob.name, 0) + 1
        found.append(knob if count == 1 else replace(knob, name=f"{knob.name} #{count}"))
    return found


@lru_cache(maxsize=65536)
def tilings(extent: int, parts: int, most: int = 0) -> int:
    """How many ways there are to split a loop into `parts` loops, in order, the last at most `most` long (0: any).

    >>> tilings(12, 2), tilings(12, 2, most=4), tilings(64, 4)
    (6, 4, 84)
    """
    if parts == 1:
        return int(not most or extent <= most)
    return sum(tilings(extent // size, parts - 1, most) for size in divisors(extent, extent))


def tiling(index: int, extent: int, parts: int, most: int = 0) -> tuple[int, ...]:
    """The split of a number, the first part rising.

    >>> [tiling(index, 12, 2, most=4) for index in range(4)]
    [(3, 4), (4, 3), (6, 2), (12, 1)]
    """
    if parts == 1:
        return (extent,)
    for size in divisors(extent, extent):
        below = tilings(extent // size, parts - 1, most)
        if index < below:
            return size, *tiling(index, extent // size, parts - 1, most)
        index -= below
    raise IndexError("beyond the last split")
