"""The knobs of a trace: the values a sampling instruction may take, and how to draw, change and encode them.

Plain numbers only, so that thousands of points can be made without touching TVM; `SketchSpace.realize` turns a
chosen one into a schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

__all__ = ["Choice", "Knob", "Location", "Tile", "prime_factors"]

Value = Any  # a list of tile sizes, or an integer


class Knob(Protocol):
    """One coordinate of a point."""

    def random(self, rng: np.random.Generator) -> Value:
        """A value drawn at random."""
        ...

    def mutate(self, value: Value, rng: np.random.Generator) -> Value:
        """Another value near this one (the same one where the knob has no other)."""
        ...

    def encode(self, value: Value) -> list[float]:
        """The value as features of a fixed length."""
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

    def _too_large(self, innermost: int) -> bool:
        return 0 < self.max_innermost < innermost


@dataclass(frozen=True)
class Choice:
    """One of `count` listed values, by index."""

    count: int

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


@dataclass(frozen=True)
class Location:
    """The loop under which a block is computed: -2 inlined, -1 at the root, else the loop's index, outermost first.

    Which loops are valid depends on the other knobs; TVM moves an invalid one, so `highest` is only what was seen.
    """

    highest: int

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
