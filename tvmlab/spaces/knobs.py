"""The knobs of a trace: the values a sampling instruction may take, and how to draw, change and encode them.

Plain numbers only, so that thousands of points can be made without touching TVM; `SketchSpace.realize` turns a
chosen one into a schedule.

A step along a knob has a direction, which is plain data too: the same step can be taken again from where it led.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import numpy as np

__all__ = ["Axis", "Choice", "Direction", "Index", "Knob", "Location", "Tile", "directions", "prime_factors", "stepped"]

Value = Any  # a list of tile sizes, or an integer
Way = Any  # plain data that can be a key: a knob's own name for one of its directions
Direction = tuple[int, Way]  # which coordinate of a point, and which way along it


class Axis(Protocol):
    """A coordinate that one can take steps along."""

    def directions(self, value: Value) -> list[Way]:
        """The ways to a neighbour of this value, both of an axis; not all need lead to one (see `step`)."""
        ...

    def step(self, value: Value, direction: Way) -> Value | None:
        """The neighbour in a direction; None where the axis ends."""
        ...

    def encode(self, value: Value) -> list[float]:
        """The value as features of a fixed length."""
        ...


class Knob(Axis, Protocol):
    """One coordinate of a point of a sketch."""

    @property
    def plain(self) -> Value:
        """The value to begin with where nothing is known."""
        ...

    def random(self, rng: np.random.Generator) -> Value:
        """A value drawn at random."""
        ...

    def mutate(self, value: Value, rng: np.random.Generator) -> Value:
        """Another value near this one (the same one where the knob has no other)."""
        ...


@dataclass(frozen=True)
class Tile:
    """A loop of `extent` iterations split into `parts` loops; the last part is at most `max_innermost` (0: any).

    >>> knob = Tile(extent=12, parts=2, max_innermost=4)
    >>> knob.mutate([4, 3], np.random.default_rng(0)) in ([2, 6], [12, 1], [4, 3], [6, 2])
    True
    >>> knob.encode([4, 3])[0]
    2.0
    """

    extent: int
    parts: int
    max_innermost: int

    @property
    def plain(self) -> list[int]:
        """Not tiled: all in the first part."""
        return [self.extent, *[1] * (self.parts - 1)]

    def random(self, rng: np.random.Generator) -> list[int]:
        """Hand each prime factor to a random part (those that make the last part too large to another)."""
        sizes = [1] * self.parts
        for prime in prime_factors(self.extent):
            part = int(rng.integers(self.parts))
            if part == self.parts - 1 and self._too_large(sizes[part] * prime):
                part = int(rng.integers(self.parts - 1)) if self.parts > 1 else part
            sizes[part] *= prime
        return sizes

    def mutate(self, value: list[int], rng: np.random.Generator) -> list[int]:
        """Move one prime factor from one part to another (Ansor section 5.1, tile size mutation)."""
        sources = [part for part, size in enumerate(value) if size > 1]
        if not sources or self.parts == 1:
            return value
        for _ in range(8):
            source = sources[int(rng.integers(len(sources)))]
            destination = int(rng.integers(self.parts - 1))
            destination += destination >= source
            primes = prime_factors(value[source])
            prime = primes[int(rng.integers(len(primes)))]
            moved = list(value)
            moved[source] //= prime
            moved[destination] *= prime
            if not self._too_large(moved[-1]):
                return moved
        return value

    def encode(self, value: list[int]) -> list[float]:
        """Binary logarithms of the sizes."""
        return [math.log2(size) for size in value]

    def directions(self, value: list[int]) -> list[Way]:
        """From which part a prime factor goes to which: (source, destination, prime), each prime once."""
        return [
            (source, destination, prime)
            for source, size in enumerate(value)
            for prime in sorted(set(prime_factors(size)))
            for destination in range(self.parts)
            if destination != source
        ]

    def step(self, value: list[int], direction: tuple[int, int, int]) -> list[int] | None:
        """Move the prime factor; None where the source lacks it, or the last part becomes too large.

        >>> Tile(12, 2, 4).step([4, 3], (0, 1, 2)), Tile(12, 2, 4).step([4, 3], (1, 0, 3))
        (None, [12, 1])
        """
        source, destination, prime = direction
        if value[source] % prime:
            return None
        moved = list(value)
        moved[source] //= prime
        moved[destination] *= prime
        return None if destination == self.parts - 1 and self._too_large(moved[-1]) else moved

    def _too_large(self, innermost: int) -> bool:
        return 0 < self.max_innermost < innermost


@dataclass(frozen=True)
class Choice:
    """One of `count` listed values, by index."""

    count: int
    plain: ClassVar[int] = 0

    def random(self, rng: np.random.Generator) -> int:
        """Any of them."""
        return int(rng.integers(self.count))

    def mutate(self, value: int, rng: np.random.Generator) -> int:
        """Any other one."""
        if self.count == 1:
            return value
        other = int(rng.integers(self.count - 1))
        return other + (other >= value)

    def encode(self, value: int) -> list[float]:
        """The index: the values TVM lists are in order of size."""
        return [float(value)]

    def directions(self, value: int) -> list[Way]:
        """Down and up."""
        return [-1, 1]

    def step(self, value: int, direction: int) -> int | None:
        """The value beside this one; None beyond the first and the last."""
        moved = value + direction
        return moved if 0 <= moved < self.count else None


@dataclass(frozen=True)
class Location:
    """The loop under which a block is computed: -2 inlined, -1 at the root, else the loop's index, outermost first.

    Which loops are valid depends on the other knobs; TVM moves an invalid one, so `highest` is only what was seen.
    """

    highest: int
    plain: ClassVar[int] = -1

    def random(self, rng: np.random.Generator) -> int:
        """Any location seen so far."""
        return int(rng.integers(-2, self.highest + 1))

    def mutate(self, value: int, rng: np.random.Generator) -> int:
        """Any location, the neighbours as often as all others together."""
        if rng.random() < 0.5:
            return max(-2, value + (1 if rng.random() < 0.5 else -1))
        return self.random(rng)

    def encode(self, value: int) -> list[float]:
        """The index."""
        return [float(value)]

    def directions(self, value: int) -> list[Way]:
        """Outwards and inwards."""
        return [-1, 1]

    def step(self, value: int, direction: int) -> int | None:
        """The location beside this one; whether there is such a loop, only TVM knows."""
        moved = value + direction
        return moved if moved >= -2 else None


@dataclass(frozen=True)
class Index:
    """The number of a point of an enumerated space (`tvmlab.core.EnumeratedSpace`); a step changes one of its knobs.

    >>> Index((3, 4)).step(5, (1, 1)), Index((3, 4)).step(5, (0, 1))
    (8, None)
    """

    radices: tuple[int, ...]

    def directions(self, value: int) -> list[Way]:
        """Down and up the values of each knob: (knob, -1 or 1)."""
        return [(knob, way) for knob in range(len(self.radices)) for way in (-1, 1)]

    def step(self, value: int, direction: tuple[int, int]) -> int | None:
        """The point whose knob has the value beside this one's; None beyond the first and the last."""
        knob, way = direction
        stride = math.prod(self.radices[:knob])
        return value + way * stride if 0 <= value // stride % self.radices[knob] + way < self.radices[knob] else None


def directions(knobs: Sequence[Axis], values: Sequence[Value]) -> list[Direction]:
    """The directions to the neighbours of a point: both ways along each of its coordinates.

    >>> directions([Choice(3), Tile(4, 2, 0)], [0, [2, 2]])
    [(0, 1), (1, (0, 1, 2)), (1, (1, 0, 2))]
    """
    return [
        (position, way)
        for position, (knob, value) in enumerate(zip(knobs, values, strict=True))
        for way in knob.directions(value)
        if knob.step(value, way) is not None
    ]


def stepped(knobs: Sequence[Axis], values: Sequence[Value], ways: Sequence[Direction]) -> list[Value] | None:
    """The point after one step in each of the directions, in turn; None where one of them leads nowhere.

    >>> stepped([Choice(3), Tile(4, 2, 0)], [0, [2, 2]], [(0, 1), (1, (0, 1, 2))])
    [1, [1, 4]]
    """
    moved = list(values)
    for position, way in ways:
        step = knobs[position].step(moved[position], way)
        if step is None:
            return None
        moved[position] = step
    return moved


@lru_cache(maxsize=4096)
def prime_factors(number: int) -> tuple[int, ...]:
    """Prime factors in rising order.

    >>> prime_factors(56)
    (2, 2, 2, 7)
    """
    factors, divisor = [], 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return (*factors, number) if number > 1 else tuple(factors)
