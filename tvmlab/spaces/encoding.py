"""Points of a task's sketches as vectors for a model: what two sketches have in common is in the same columns.

The sketches of a task mostly have the same loops to tile, and differ in what is fused or cached. A model that has their
knobs in columns of their own learns each sketch from nothing (docs/decisions/0003-two-stage-evolution.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tvmlab.spaces.knobs import Axis, Tile

__all__ = ["Encoding"]

_Slot = tuple[Any, int]  # a kind of knob, and which of these in its sketch


class Encoding:
    """Encodes points of sketches, of which `sketches` has the knobs.

    The columns: which sketch it is; each knob's value, of a tile the logarithms of its sizes; of a tile of more than
    two parts the iterations from each part inwards; and, level by level, those of all tiles with as many parts, which
    say how large the register tile is, or what a cache must hold. All but the first are linear in the logarithms, so
    many points are encoded by one product of matrices.
    """

    def __init__(self, sketches: Sequence[Sequence[Axis]]) -> None:
        self._knobs = sketches
        self._slots = [list(_slots(knobs)) for knobs in sketches]
        columns: dict[tuple[Any, ...], int] = {}
        entries = []  # of each sketch: the row of a raw value, and the column that it counts in
        for number, (knobs, slots) in enumerate(zip(sketches, self._slots, strict=True)):
            for row, names in enumerate(_columns(knobs, slots)):
                entries += [(number, row, columns.setdefault(name, len(columns))) for name in names]
        self.width = len(sketches) + len(columns)
        self._maps = [np.zeros((sum(map(_parts, knobs)), self.width), dtype="float32") for knobs in sketches]
        for number, row, column in entries:
            self._maps[number][row, len(sketches) + column] = 1
        self._sizes = [np.array([isinstance(k, Tile) for k in knobs for _ in range(_parts(k))]) for knobs in sketches]

    def encode(self, points: Sequence[tuple[int, Sequence[Any]]]) -> Any:
        """The points, each a sketch's number and its decisions, as a float32 array of shape (len(points), width)."""
        vectors = np.zeros((len(points), self.width), dtype="float32")
        for sketch in {sketch for sketch, _ in points}:
            mine = [index for index, point in enumerate(points) if point[0] == sketch]
            if len(self._sizes[sketch]):
                raw = np.array([_flat(self._knobs[sketch], points[index][1]) for index in mine], dtype="float32")
                sizes = self._sizes[sketch]
                raw[:, sizes] = np.log2(raw[:, sizes])
                vectors[mine] = raw @ self._maps[sketch]
            vectors[mine, sketch] = 1
        return vectors

    def elsewhere(self, point: tuple[int, Sequence[Any]]) -> list[tuple[int, list[Any]]]:
        """The same decisions in each of the other sketches that have the same knobs, in whatever order."""
        sketch, decisions = point
        known = dict(zip(self._slots[sketch], decisions, strict=True))
        return [
            (other, [known[slot] for slot in slots])
            for other, slots in enumerate(self._slots)
            if other != sketch and known.keys() == set(slots)
        ]


def _slots(knobs: Sequence[Axis]) -> Iterator[_Slot]:
    """What tells the knobs of a sketch apart: tiles by the loop's extent and their parts, others by their kind."""
    seen: Counter[Any] = Counter()
    for knob in knobs:
        kind = (knob.extent, knob.parts) if isinstance(knob, Tile) else type(knob).__name__
        yield kind, seen[kind]
        seen[kind] += 1


def _columns(knobs: Sequence[Axis], slots: Sequence[_Slot]) -> Iterator[list[tuple[Any, ...]]]:
    """For each raw value of a sketch's points the columns that it counts in."""
    for knob, slot in zip(knobs, slots, strict=True):
        parts = _parts(knob)
        for part in range(parts):
            inwards = [(slot, "from", first) for first in range(1, part + 1) if first < parts - 1]
            level = [("all", parts, part)] if isinstance(knob, Tile) else []
            yield [(slot, part), *inwards, *level]


def _parts(knob: Axis) -> int:
    return knob.parts if isinstance(knob, Tile) else len(knob.encode(0))


def _flat(knobs: Sequence[Axis], decisions: Sequence[Any]) -> list[float]:
    pairs = zip(knobs, decisions, strict=True)
    return [x for knob, value in pairs for x in (value if isinstance(knob, Tile) else knob.encode(value))]
