"""A strategy with another behind it, for a space that has nothing to give."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvmlab.core import Candidate, Strategy, Trial

__all__ = ["Fallback"]


class Fallback:
    """Asks `first`; if that has nothing at its first call, what `other` makes takes its place for good.

    On a GPU the sketches of some tasks have no valid point (large dense layers): TVM's tiles want more threads or more
    shared memory than there are.
    """

    def __init__(self, first: Strategy, other: Callable[[], Strategy]) -> None:
        self._now = first
        self._other: Callable[[], Strategy] | None = other
        self.name = first.name  # that of the strategy that is asked

    @property
    def ending(self) -> str:
        """How that strategy ended, where it can tell."""
        return str(getattr(self._now, "ending", ""))

    @property
    def exhausted(self) -> int:
        """The size of the space of the other strategy once it had nothing more to give, 0 before."""
        return int(getattr(self._now, "exhausted", 0))

    @property
    def sketches_exhausted(self) -> bool:
        """Whether the sketches have no new program; where another took their place, whether that has none either."""
        return bool(self.exhausted or getattr(self._now, "sketches_exhausted", False))

    def ask(self, count: int) -> list[Candidate]:
        """Up to `count` new candidates."""
        found = self._now.ask(count)
        if not found and self._other is not None:
            self._now = self._other()
            self.name = self._now.name
            found = self._now.ask(count)
        self._other = None
        return found

    def tell(self, candidates: Sequence[Candidate], trials: Sequence[Trial]) -> None:
        """Learn how the candidates did."""
        self._now.tell(candidates, trials)
