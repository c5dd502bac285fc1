"""What every strategy must hold, as test classes to inherit; and recorded measurements to test it on.

No device and no TVM: the answers come from a table in which every point of a space was measured once. The test of a
strategy is a subclass that says how to make one, as with the classes of Optuna's `optuna.testing`:

    class TestMine(TunerContract):
        guided = True

        def make(self, space, seed=0, known=(), earlier=()):
            return Mine(space, seed=seed, known=known, earlier=earlier)
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tvmlab.core import Candidate, InputError, Strategy, Trial, TrialStatus

__all__ = ["RecordedSpace", "StrategyContract", "TunerContract", "spend"]

Answer = float | TrialStatus | None  # latency in seconds, how the trial failed, or None for a point that is not valid


class RecordedSpace:
    """An enumerated space (`tvmlab.core.EnumeratedSpace`) whose measurements are known.

    `knobs` gives the values of each knob, `answer` what index i gives: a latency in seconds, the status of a failed
    trial, or None for a point that `realize` refuses. `features[i]` is what `encode` gives, the positions of the
    knobs' values where it is not given. `realized` counts the calls of `realize`.

    >>> space = RecordedSpace({"tile": (1, 2, 4), "unroll": (1, 8)}, lambda index: 1e-3 / (1 + index))
    >>> len(space), space[4], space.realize(4).decisions
    (6, {'tile': 2, 'unroll': 8}, [4])
    """

    def __init__(
        self,
        knobs: Mapping[str, Sequence[Any]],
        answer: Callable[[int], Answer],
        starts: Sequence[int] = (),
        task_key: str = "e" * 16,
        features: Sequence[Sequence[float]] | None = None,
    ) -> None:
        self.task_key = task_key
        self.radices = tuple(len(values) for values in knobs.values())
        self.realized = 0
        self.answer = answer
        self._knobs = knobs
        self._features = features
        self._starts = tuple(starts)

    @classmethod
    def load(cls, path: str | Path) -> RecordedSpace:
        """A space from a table that `benchmarks/record_space.py` wrote. Raises InputError if it is not one."""
        try:
            found = json.loads(Path(path).read_text())
            knobs, table = found["knobs"], [_answer(item) for item in found["table"]]
            whole = len(table) == len(found["features"]) == math.prod(map(len, knobs.values()))
            starts, features = found["starts"], found["features"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} holds no recorded space ({error})", remedy="record it again") from None
        if not whole:
            raise InputError(f"{path} lacks points of its space", remedy="record it again")
        return cls(knobs, table.__getitem__, starts, features=features)

    def __len__(self) -> int:
        return math.prod(self.radices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The values of the knobs at a point."""
        point = {}
        for name, values in self._knobs.items():
            index, digit = divmod(index, len(values))
            point[name] = values[digit]
        return point

    def realize(self, index: int) -> Candidate | None:
        """The candidate at a point, without a program; None where the point is not valid."""
        self.realized += 1
        if self.answer(index) is None:
            return None
        key = hashlib.sha256(f"{self.task_key} {index}".encode()).hexdigest()[:16]
        return Candidate(self.task_key, key, 0, [index])

    def encode(self, index: int) -> Any:
        """The point as float32, as the space that was recorded encodes it."""
        if self._features is not None:
            return np.array(self._features[index], dtype="float32")
        return np.array([list(self._knobs[name]).index(value) for name, value in self[index].items()], dtype="float32")

    def starts(self) -> Sequence[int]:
        """The points to try first, as recorded."""
        return self._starts

    def measure(self, candidates: Sequence[Candidate], strategy: str = "test") -> list[Trial]:
        """The trials that the table gives for candidates."""
        return [self._trial(candidate, strategy) for candidate in candidates]

    def _trial(self, candidate: Candidate, strategy: str) -> Trial:
        answer = self.answer(candidate.decisions[0])
        if answer is None:
            raise ValueError(f"point {candidate.decisions[0]} is not valid, so it cannot have been proposed")
        return Trial(
            task_key=self.task_key,
            step=0,
            strategy=strategy,
            trial=1,
            key=candidate.key,
            sketch=candidate.sketch,
            decisions=candidate.decisions,
            status=answer if isinstance(answer, TrialStatus) else TrialStatus.OK,
            latencies_s=[] if isinstance(answer, TrialStatus) else [answer],
        )


def _answer(item: float | str | None) -> Answer:
    """What the table's file says of a point: microseconds, a status, or null."""
    return TrialStatus(item) if isinstance(item, str) else None if item is None else item * 1e-6


def spend(
    strategy: Strategy,
    total: int,
    measure: Callable[[list[Candidate]], list[Trial]],
    batch: int = 8,
) -> list[Trial]:
    """The trials of a search of at most `total` trials, in the order in which they were asked for."""
    trials: list[Trial] = []
    while len(trials) < total and (asked := strategy.ask(min(batch, total - len(trials)))):
        answers = measure(asked)
        strategy.tell(asked, answers)
        trials += answers
    return trials


def _keys(found: Sequence[Candidate | Trial]) -> list[str]:
    return [item.key for item in found]


class StrategyContract:
    """What a strategy over any space holds. `space()` and `make()` are the subclass's.

    The space needs a `measure(candidates)` that answers with trials, the same ones in every process, and at least
    64 valid points of which some fail.
    """

    def space(self) -> Any:
        """A new space."""
        raise NotImplementedError

    def make(self, space: Any, seed: int = 0, known: Sequence[Trial] = ()) -> Strategy:
        """A strategy over this space, `known` being the trials of the same search before it was interrupted."""
        raise NotImplementedError

    def test_it_has_a_name(self) -> None:
        name = self.make(self.space()).name
        assert name and name == name.lower().strip()

    def test_it_gives_at_most_what_was_asked_for(self) -> None:
        strategy, space = self.make(self.space()), self.space()
        for count in (1, 3, 16, 2):
            asked = strategy.ask(count)
            assert 1 <= len(asked) <= count
            strategy.tell(asked, space.measure(asked))

    def test_nothing_is_proposed_twice(self) -> None:
        space = self.space()
        trials = spend(self.make(space), 64, space.measure)
        assert len(trials) == 64 == len(set(_keys(trials)))

    def test_nothing_is_proposed_twice_while_answers_are_outstanding(self) -> None:
        """The loop asks for the next batch while the last one is measured."""
        space = self.space()
        strategy = self.make(space)
        under_way, seen = strategy.ask(8), []
        for _ in range(6):
            following = strategy.ask(8)
            seen += _keys(under_way)
            assert following and not set(_keys(following)) & set(seen)
            strategy.tell(under_way, space.measure(under_way))
            under_way = following

    def test_candidates_are_of_the_space(self) -> None:
        space = self.space()
        for candidate in self.make(space).ask(8):
            assert candidate.task_key == space.task_key

    def test_the_same_seed_gives_the_same_candidates(self) -> None:
        first, second = (spend(self.make(s), 48, s.measure) for s in (self.space(), self.space()))
        assert _keys(first) == _keys(second)

    def test_it_can_be_told_of_part_of_a_batch(self) -> None:
        """A stop leaves the rest of a batch unmeasured."""
        space = self.space()
        strategy = self.make(space)
        asked = strategy.ask(8)
        strategy.tell(asked[:1], space.measure(asked[:1]))
        strategy.tell([], [])
        assert not set(_keys(strategy.ask(8))) & set(_keys(asked))

    def test_it_goes_on_when_everything_fails(self) -> None:
        space = self.space()
        failed = spend(self.make(space), 48, lambda asked: [_failed(trial) for trial in space.measure(asked)])
        assert len(failed) == 48 == len(set(_keys(failed)))

    def test_a_resumed_search_repeats_nothing(self) -> None:
        space = self.space()
        before = spend(self.make(space), 24, space.measure)
        after = spend(self.make(space, known=before), 24, space.measure)
        assert len(after) == 24
        assert not set(_keys(before)) & set(_keys(after))


class TunerContract(StrategyContract):
    """What a strategy over an EnumeratedSpace holds besides. `seeded` and `guided` say what kind it is.

    A guided one must do better than random draws on `table()`: how much slower than the table's best its best is so
    far, averaged over its first `trials` trials and over seeds, is at most `share` of what it is with random draws.
    """

    seeded = True
    guided = False
    trials = 96
    share = 0.7

    def make(self, space: Any, seed: int = 0, known: Sequence[Trial] = (), earlier: Sequence[Trial] = ()) -> Strategy:
        """A strategy over this space; `earlier` are trials of other runs."""
        raise NotImplementedError

    def table(self) -> RecordedSpace:
        """The recorded measurements that a guided strategy is judged on."""
        raise NotImplementedError

    def space(self) -> RecordedSpace:
        """1,200 points; one in six is not valid, one in seven of the others fails."""
        knobs = {
            "a": (1, 2, 4, 8, 16),
            "b": (1, 2, 3, 4, 6, 8, 12, 24),
            "c": (0, 16, 64),
            "d": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10),
        }
        return RecordedSpace(knobs, _invented)

    def test_another_seed_gives_other_candidates(self) -> None:
        first, second = (
            spend(self.make(s, seed), 32, s.measure) for seed, s in enumerate((self.space(), self.space()))
        )
        assert (_keys(first) != _keys(second)) is self.seeded

    def test_small_spaces_are_exhausted_exactly(self) -> None:
        for knobs in ({"a": (1,)}, {"a": (1, 2, 4)}, {"a": (1, 2, 4, 8), "b": (1,), "c": (0, 1, 2, 3, 4, 5)}):
            space = RecordedSpace(knobs, _invented, starts=[0])
            trials = spend(self.make(space), 1000, space.measure, batch=5)
            valid = [index for index in range(len(space)) if _invented(index) is not None]
            assert sorted(trial.decisions[0] for trial in trials) == valid
            assert self.make(space, known=trials).ask(4) == []

    def test_a_space_without_a_valid_point_is_exhausted(self) -> None:
        space = RecordedSpace({"a": range(40)}, lambda index: None, starts=[3])
        assert self.make(space).ask(8) == []

    def test_a_point_that_is_not_valid_is_tried_once(self) -> None:
        space = RecordedSpace({"a": range(10), "b": range(10)}, lambda index: 1e-3 if index % 10 == 0 else None)
        assert len(spend(self.make(space), 1000, space.measure)) == 10
        assert space.realized == len(space)

    def test_a_huge_space_is_not_enumerated(self) -> None:
        """10^12 points of which one in a thousand is valid, then none at all."""
        knobs = {name: range(100) for name in "abcdef"}
        rare = RecordedSpace(knobs, lambda index: 1e-3 if index % 1009 == 0 else None, starts=[1009, 2018])
        strategy = self.make(rare)
        for _ in range(4):
            asked = strategy.ask(8)
            strategy.tell(asked, rare.measure(asked))
        assert rare.realized < 20_000
        none = RecordedSpace(knobs, lambda index: None)
        assert self.make(none).ask(8) == []
        assert none.realized < 5_000

    def test_two_points_with_one_program_are_measured_once(self) -> None:
        class Twins(RecordedSpace):
            def realize(self, index: int) -> Candidate | None:
                candidate = super().realize(index // 2)
                return candidate and Candidate(self.task_key, candidate.key, 0, [index])

        space = Twins({"a": range(20)}, lambda index: 1e-3)
        assert len(spend(self.make(space), 1000, space.measure)) == 10

    def test_the_starting_points_come_first_and_alone(self) -> None:
        space = RecordedSpace({"a": range(30), "b": range(30)}, _invented, starts=[700, 31, 6])
        strategy = self.make(space)
        assert [candidate.decisions for candidate in strategy.ask(2)] == [[700], [31]]
        assert [candidate.decisions for candidate in strategy.ask(8)] == [[6]]
        assert len(strategy.ask(8)) == 8

    def test_the_fastest_of_an_earlier_run_is_measured_first(self) -> None:
        space = self.space()
        earlier = spend(self.make(space, seed=1), 40, space.measure)
        fastest = min((trial for trial in earlier if trial.ok), key=_latency)
        strategy = self.make(space, earlier=earlier)
        (first,) = strategy.ask(8)
        assert first.key == fastest.key
        ran = {trial.key for trial in earlier if trial.ok}
        assert not ran & set(_keys(strategy.ask(40)))

    def test_an_earlier_run_of_another_template_is_left_out(self) -> None:
        space = self.space()
        other = RecordedSpace({"a": range(1200)}, lambda index: 1e-3, task_key="a" * 16)
        earlier = spend(self.make(other), 8, other.measure)
        assert _keys(self.make(space, earlier=earlier).ask(8)) == _keys(self.make(space).ask(8))

    def test_trials_of_another_space_are_not_taken_for_points_of_this_one(self) -> None:
        space = self.space()
        (candidate,) = self.make(space).ask(1)
        (trial,) = space.measure([candidate])
        foreign = [replace(trial, decisions=decisions) for decisions in ([[1, 2]], [1, 2], [], [10**9], [-1])]
        assert len(spend(self.make(space, known=foreign), 32, space.measure)) == 32

    def test_what_is_learned_changes_what_is_asked(self) -> None:
        """A guided one goes elsewhere when other points are fast, and away from what fails; the others do not."""
        plain, other = self.space(), self.space()
        other.answer = _reversed
        searched = [spend(self.make(space), 64, space.measure) for space in (plain, other)]
        valid = [[trial.decisions[0] for trial in trials] for trials in searched]
        assert (valid[0] != valid[1]) is self.guided

    def test_failures_are_learned_from(self) -> None:
        """Where half of the points fail by one knob, fewer than a third of what a guided one asks for does."""
        if not self.guided:
            return
        knobs = {"good": (1, 2, 4, 8), "b": range(1, 30), "c": range(1, 30)}
        space = RecordedSpace(knobs, lambda index: TrialStatus.RUN_ERROR if index % 4 < 2 else 1e-3 * (1 + index % 7))
        trials = spend(self.make(space), 96, space.measure)
        failed = [not trial.ok for trial in trials[32:]]
        assert sum(failed) < len(failed) / 3

    def test_a_guided_search_does_better_than_random_draws(self) -> None:
        if not self.guided:
            return
        excess = np.mean([self._excess(partial(self.make, seed=seed)) for seed in range(9)])
        by_chance = np.mean([self._excess(partial(_Draws, seed=seed)) for seed in range(50)])
        assert excess <= self.share * by_chance, f"{excess:.1%} slower than the best, random draws {by_chance:.1%}"

    def _excess(self, make: Callable[[RecordedSpace], Strategy]) -> float:
        """How much slower than the table's best a search's best is so far, averaged over its trials."""
        table = self.table()
        table._starts = ()
        ran = [answer for index in range(len(table)) if isinstance(answer := table.answer(index), float)]
        trials = spend(make(table), self.trials, table.measure)
        so_far = np.minimum.accumulate([trial.latency_s or max(ran) for trial in trials])
        return float(np.mean(so_far / min(ran) - 1))


class _Draws:
    """Random points, as plain as can be: what a guided search is compared with."""

    name = "draws"

    def __init__(self, space: RecordedSpace, seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(space))
        self._left = [found for index in order if (found := space.realize(int(index))) is not None]

    def ask(self, count: int) -> list[Candidate]:
        asked, self._left = self._left[:count], self._left[count:]
        return asked

    def tell(self, candidates: Sequence[Candidate], trials: Sequence[Trial]) -> None:
        pass


def _invented(index: int) -> Answer:
    """An answer that depends on the index alone: latencies with a valley, some failures, some invalid points."""
    if index % 6 == 5:
        return None
    return TrialStatus.RUN_ERROR if index % 7 == 6 else 1e-4 * (1 + abs(index - 640) / 64 + index % 3)


def _reversed(index: int) -> Answer:
    answer = _invented(index)
    return 1e-6 / answer if isinstance(answer, float) else answer


def _failed(trial: Trial) -> Trial:
    return replace(trial, status=TrialStatus.BUILD_ERROR, latencies_s=[])


def _latency(trial: Trial) -> float:
    assert trial.latency_s is not None
    return trial.latency_s
