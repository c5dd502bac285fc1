"""What the tuners over an enumerated space share: what was tried, what is known, when a space is exhausted."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from tvmlab.core import Candidate, EnumeratedSpace, Trial

__all__ = ["Tuner", "digits_of", "index_of", "shuffled"]

_MISSES = 512  # points refused in a row before a space counts as exhausted: each costs a schedule
_RECORDS = 256  # trials of earlier runs that a search learns, the fastest first; and as many that failed
_SPARE = 16  # points drawn for each that is wanted near a past one


class Tuner:
    """A strategy over an EnumeratedSpace; a subclass says which indices are wanted next.

    The space's `starts()` are asked for alone, before anything else, so that there is something to learn from; then
    what `_propose` names; then, where that is not enough, the points not tried yet in random order. So every point of
    a small space is asked for once. A point that `realize` refuses, or whose program was proposed before, is not
    tried again; after 512 of these in a row a space counts as exhausted.

    `known` are trials that count as this search's own (of this run, before it was resumed, and of its earlier steps):
    they are learned and not asked for again. `earlier` are trials of other runs: the fastest and the last that failed
    are learned, and the very fastest is asked for first, because its latency is of another day (unless it is known:
    then it was measured again); none is asked for otherwise. They are left out if the space has changed since.

    `exhausted` is the size of the space once it had nothing more to give, 0 before.
    """

    name: str
    exhausted = 0

    def __init__(
        self, space: EnumeratedSpace, *, seed: int, known: Sequence[Trial] = (), earlier: Sequence[Trial] = ()
    ) -> None:
        self._space = space
        # A resumed search goes on with other random numbers: the same ones would name the points that are known.
        self._rng = np.random.default_rng([seed, zlib.crc32(space.task_key.encode()), len(known)])
        self._tried: set[int] = set()
        self._keys = {trial.key for trial in known}
        self._known: list[tuple[int, float | None]] = []  # index and latency in seconds, in the order told
        self._past: list[int] = []  # points of `earlier` that ran
        self._drawn: list[int] = []  # points near past ones drawn at random, in the order asked for
        self._restarts = self._restarted = self._asked = self._spread = 0
        self._rest = shuffled(len(space), self._rng)
        for trial in known:
            self._remember(trial)
        self._starts = iter([*self._learn_from(earlier), *space.starts()])

    def ask(self, count: int) -> list[Candidate]:
        """Up to `count` new candidates; an empty list when the space has no more to give."""
        found = self._take(self._starts, count)
        if found:
            return found
        due = min(self._due(count), count)  # more are due where an earlier batch found too few
        found = self._take(self._near_past(due), due)
        self._restarted += len(found)
        self._drawn += [candidate.decisions[0] for candidate in found]
        wanted = self._guided(count - len(found))
        found += self._take(self._propose(wanted), wanted)
        found += self._take(self._rest, count - len(found))
        if not found and count:
            self.exhausted = len(self._space)
        return found

    def start_at_random(self, count: int, of: int) -> None:
        """Of the next `of` candidates, `count` are points one or two knobs away from past ones drawn at random.

        However slow these were: so a search leaves the surroundings of the best. A guided search goes on from the last
        of them too (`_afar`). Without `earlier` trials nothing changes.
        """
        self._restarts, self._spread = (count if self._past else 0), of

    def tell(self, candidates: Sequence[Candidate], trials: Sequence[Trial]) -> None:
        """Learn how the candidates did."""
        for candidate, trial in zip(candidates, trials, strict=True):
            self._learn(candidate.decisions[0], trial.latency_s)

    def _due(self, count: int) -> int:
        """How many of a batch are to start at random: they are spread evenly over the search."""
        if not self._restarts:
            return 0
        self._asked += count
        return min(self._restarts, round(self._asked * self._restarts / self._spread)) - self._restarted

    def _near_past(self, count: int) -> Iterator[int]:
        """Points one or two knobs away from earlier ones drawn at random; many for each wanted, as some are known."""
        radices: Any = np.array(self._space.radices)
        free = np.flatnonzero(radices > 1)
        for _ in range(_SPARE * count if len(free) else 0):
            point = digits_of([self._rng.choice(self._past)], self._space.radices)
            knobs = self._rng.permutation(free)[: self._rng.integers(1, 3)]
            point[0, knobs] = (point[0, knobs] + self._rng.integers(1, radices[knobs])) % radices[knobs]
            yield index_of(point, self._space.radices)[0]

    def _propose(self, count: int) -> Iterable[int]:
        """Indices wanted next, the most wanted first; some may have been tried."""
        raise NotImplementedError

    def _guided(self, count: int) -> int:
        """How many of a batch `_propose` may choose; the others are drawn at random."""
        return count

    def _learn(self, index: int, latency_s: float | None) -> None:
        """A point was measured, or failed (None)."""
        self._known.append((index, latency_s))

    def _refused(self, index: int) -> None:
        """A point turned out not to be valid."""

    def _take(self, indices: Iterable[int], count: int) -> list[Candidate]:
        """The candidates of the first `count` indices that are new and valid."""
        found: list[Candidate] = []
        remaining, misses = iter(indices), 0
        while len(found) < count and misses < _MISSES and (index := next(remaining, None)) is not None:
            if index in self._tried:
                continue
            self._tried.add(index)
            candidate = self._space.realize(index)
            if candidate is None:
                self._refused(index)
            if candidate is None or candidate.key in self._keys:
                misses += 1
                continue
            misses = 0
            self._keys.add(candidate.key)
            found.append(candidate)
        return found

    def _ranked(self) -> list[int]:
        """The points that ran, the fastest first."""
        ran = [(latency, index) for index, latency in self._known if latency is not None]
        return [index for _, index in sorted(ran)]

    def _afar(self, most: int) -> list[int]:
        """The last points near past ones drawn at random that ran, the newest first."""
        ran = {index for index, latency in self._known if latency is not None} if self._drawn else set()
        return [index for index in reversed(self._drawn) if index in ran][:most]

    def _learn_from(self, earlier: Sequence[Trial]) -> list[int]:
        """Learn trials of other runs; the points to measure again."""
        mine = [trial for trial in earlier if self._index(trial) is not None]
        ran = sorted((trial for trial in mine if trial.latency_s is not None), key=_latency)
        failed = [trial for trial in mine if trial.latency_s is None]
        first = next(iter([*ran, *failed]), None)
        candidate = self._space.realize(first.decisions[0]) if first else None
        if first is None or candidate is None or candidate.key != first.key:
            return []  # the template has changed: its indices mean other points now
        is_known = first.key in self._keys
        for trial in [*ran[:_RECORDS], *failed[-_RECORDS:]]:
            self._remember(trial)
        self._past = [trial.decisions[0] for trial in ran]
        self._tried.update(trial.decisions[0] for trial in mine)
        self._keys.update(trial.key for trial in mine)  # another point may make the same program
        if is_known or not ran:
            return []
        self._tried.discard(first.decisions[0])
        self._keys.discard(first.key)
        return [first.decisions[0]]

    def _remember(self, trial: Trial) -> None:
        index = self._index(trial)
        if index is not None and index not in self._tried:
            self._tried.add(index)
            self._learn(index, trial.latency_s)

    def _index(self, trial: Trial) -> int | None:
        """The point a recorded trial measured; None if it is not of this space."""
        if len(trial.decisions) != 1 or not isinstance(trial.decisions[0], int):
            return None
        index = trial.decisions[0]
        return index if 0 <= index < len(self._space) else None


def shuffled(size: int, rng: np.random.Generator) -> Iterator[int]:
    """The numbers below `size` in random order, each once, drawn one at a time.

    Fisher and Yates's shuffle; only the entries that were moved are kept, so that `size` may be 10^9.

    >>> sorted(shuffled(5, np.random.default_rng(0)))
    [0, 1, 2, 3, 4]
    """
    moved: dict[int, int] = {}
    for position in range(size):
        drawn = int(rng.integers(position, size))
        yield moved.get(drawn, drawn)
        moved[drawn] = moved.pop(position, position)


def digits_of(indices: Any, radices: Sequence[int]) -> Any:
    """Mixed-radix digits of indices of shape (n,), int64 of shape (n, knobs); the first knob changes fastest.

    >>> digits_of([0, 1, 2, 5], (2, 3)).tolist()
    [[0, 0], [1, 0], [0, 1], [1, 2]]
    """
    return np.asarray(indices, dtype="int64")[:, None] // _strides(radices) % np.array(radices, dtype="int64")


def index_of(digits: Any, radices: Sequence[int]) -> list[int]:
    """The inverse of `digits_of`.

    >>> index_of([[0, 0], [1, 0], [0, 1], [1, 2]], (2, 3))
    [0, 1, 2, 5]
    """
    return [int(index) for index in np.asarray(digits) @ _strides(radices)]


def _strides(radices: Sequence[int]) -> Any:
    return np.cumprod([1, *radices[:-1]], dtype="int64")


def _latency(trial: Trial) -> float:
    assert trial.latency_s is not None
    return trial.latency_s
