"""What a descent asks of a space: the knobs of a candidate, and the candidate beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tvmlab.core import Candidate, EnumeratedSpace
from tvmlab.spaces.knobs import Axis, Index

__all__ = ["Numbered", "Walkable"]


class Walkable(Protocol):
    """A space whose candidates have knobs to take steps along; `decisions[k]` is the value of knob k."""

    task_key: str

    def knobs(self, candidate: Candidate) -> Sequence[Axis]:
        """The knobs of a candidate; varying it does not change them."""
        ...

    def vary(self, candidate: Candidate, decisions: Sequence[Any]) -> Candidate | None:
        """The candidate with exactly these decisions instead; None where they are not valid."""
        ...

    def elsewhere(self, candidate: Candidate) -> Sequence[Candidate]:
        """The candidates with the same decisions in other sketches."""
        ...


@dataclass(frozen=True)
class _Points(Index):
    """The numbers of a space's points as an axis: each of the space's knobs is a pair of directions."""

    space: EnumeratedSpace

    def encode(self, value: int) -> list[float]:
        """As the space does."""
        return list(self.space.encode(value))


class Numbered:
    """An enumerated space to walk in: a point's only decision is its index."""

    def __init__(self, space: EnumeratedSpace) -> None:
        self._space = space
        self.radices = space.radices
        self.task_key = space.task_key

    def knobs(self, candidate: Candidate) -> Sequence[Axis]:
        """One axis, the index."""
        return [_Points(self._space.radices, self._space)]

    def holds(self, decisions: Sequence[Any]) -> bool:
        """Whether these are the decisions of a point."""
        return len(decisions) == 1 and isinstance(decisions[0], int) and 0 <= decisions[0] < len(self._space)

    def vary(self, candidate: Candidate, decisions: Sequence[Any]) -> Candidate | None:
        """The candidate of an index."""
        return self._space.realize(decisions[0])

    def elsewhere(self, candidate: Candidate) -> Sequence[Candidate]:
        """None: a template has no other sketch."""
        return []
