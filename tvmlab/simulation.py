"""Compare tuners in seconds without a device: replay of template spaces of which every point was measured.

The idea is Kernel Tuner's simulation mode: a tuner asks, the table answers, the recorded time is charged, and a
candidate that is not in the table is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tvmlab.core import Candidate, InputError, RecordError, TaskInfo, Trial, TrialStatus
from tvmlab.datafiles import data_dir
from tvmlab.experiment import AutoTVM
from tvmlab.past_records import past_of
from tvmlab.reuse import PAST, Plan, planned
from tvmlab.search.allocate import Allocator, fit_template_batches
from tvmlab.search.droplet import Droplet
from tvmlab.search.walkable import Numbered
from tvmlab.strategies import TUNERS
from tvmlab.testing import RecordedSpace, spend

__all__ = ["ReplaySpace", "descend", "recorded_space", "recorded_spaces", "simulate", "simulate_steps"]


@dataclass(frozen=True)
class ReplaySpace:
    """A recorded space and what is known of its recording: `about` (operator, CPU or device, versions, date).

    `build_s[i]` and `run_s[i]` are the seconds that measuring point i took, NaN where that was not recorded.
    """

    name: str
    space: RecordedSpace
    about: dict[str, Any]
    build_s: np.ndarray
    run_s: np.ndarray

    @property
    def label(self) -> str:
        """What has to stand at a figure: what was measured, on what, when, with which TVM."""
        about = self.about
        when = f" {about['recorded']}" if "recorded" in about else ""
        where = about.get("cpu") or about["device"]
        return f"{about['operator']}; recorded{when} on {where}; TVM {about['apache-tvm']}"

    def frame(self) -> pd.DataFrame:
        """One row a point: one column a knob, status ("not valid" where no kernel can be made), latency_us."""
        answers = [self.space.answer(index) for index in range(len(self.space))]
        return pd.DataFrame([self.space[index] for index in range(len(self.space))]).assign(
            status=[_status(answer) for answer in answers],
            latency_us=[answer * 1e6 if isinstance(answer, float) else np.nan for answer in answers],
        )

    @property
    def least_us(self) -> float:
        """The latency of the fastest point there is."""
        return float(self.frame()["latency_us"].min())

    def without_starts(self) -> ReplaySpace:
        """The same space for a tuner that shall not be told where its template would begin."""
        blind = copy(self.space)
        blind._starts = ()
        return replace(self, space=blind)

    def measure(self, candidates: Sequence[Candidate], strategy: str = "replay") -> list[Trial]:
        """The recorded trials of candidates, each beside its rival's. Raises RecordError for what is not recorded."""
        for candidate in candidates:
            for asked in (candidate, candidate.rival):
                if asked is not None and not self._holds(asked):
                    raise RecordError(
                        f"candidate {asked.key} of task {asked.task_key} is not in the recorded space {self.name}",
                        remedy="search the recorded space itself, or record the space that you search",
                    )
        return [self._beside(candidate, strategy) for candidate in candidates]

    def _beside(self, candidate: Candidate, strategy: str) -> Trial:
        (trial,) = self.space.measure([candidate], strategy)
        if candidate.rival is None or not trial.ok:
            return trial
        (rival,) = self.space.measure([candidate.rival])
        return replace(trial, rival=candidate.rival.key, rival_latencies_s=rival.latencies_s)

    def _holds(self, candidate: Candidate) -> bool:
        point = candidate.decisions[0] if len(candidate.decisions) == 1 else None
        if candidate.task_key != self.space.task_key or not isinstance(point, int):
            return False
        return 0 <= point < len(self.space) and self.space.answer(point) is not None

    def charged_s(self, trial: Trial) -> float:
        """Seconds that the trial took when it was recorded; NaN if that is not known."""
        point = trial.decisions[0]
        return float(self.build_s[point] + self.run_s[point])


def _status(answer: float | TrialStatus | None) -> str:
    return "not valid" if answer is None else str(answer) if isinstance(answer, TrialStatus) else "ok"


def recorded_spaces() -> pd.DataFrame:
    """The spaces in data/recorded_spaces, by name: operator, points, valid, best_us, times (if time is charged)."""
    rows = []
    for path in sorted(data_dir("recorded_spaces").glob("*.json")):
        found = recorded_space(path)
        points = found.frame()
        valid = points["status"] != "not valid"
        row = {"name": found.name, "operator": found.about["operator"], "points": len(points), "valid": valid.sum()}
        times = bool(np.isfinite(found.run_s[valid.to_numpy()]).all())
        rows.append(row | {"best_us": points["latency_us"].min(), "times": times})
    return pd.DataFrame(rows, columns=["name", "operator", "points", "valid", "best_us", "times"]).set_index("name")


def recorded_space(name: str | Path | ReplaySpace) -> ReplaySpace:
    """A space of data/recorded_spaces by name, or one that benchmarks/record_space.py wrote, by path.

    Raises InputError for an unknown name or a file that holds no recorded space.

    >>> len(recorded_space("conv3x3_64x28").space)
    864
    """
    if isinstance(name, ReplaySpace):
        return name
    path = Path(name) if str(name).endswith(".json") else data_dir("recorded_spaces") / f"{name}.json"
    if not path.is_file():
        known = sorted(found.stem for found in data_dir("recorded_spaces").glob("*.json"))
        raise InputError(f"there is no recorded space {str(name)!r}", remedy=f"there are {', '.join(known)}")
    space = RecordedSpace.load(path)
    found = json.loads(path.read_text())
    seconds = found.get("seconds") or [None] * len(space)
    build_s, run_s = np.array([item or (np.nan, np.nan) for item in seconds], dtype=float).T
    return ReplaySpace(path.stem, space, found["about"], build_s, run_s)


def simulate(
    space: str | Path | ReplaySpace,
    tuners: str | Sequence[str],
    trials: int = 96,
    seeds: int | Iterable[int] = 0,
    *,
    starts: bool = True,
) -> pd.DataFrame:
    """Search a recorded space with tuners, each with each seed: one row a trial.

    They begin with the points that the template names, as in a real run; with `starts=False` where each likes.

    Columns: tuner, seed, trial (from 1), point, status, latency_us (NaN: failed), best_us (so far), elapsed_s (the
    recorded seconds of building and running, added up one candidate after the other; NaN where they were not recorded).
    The same arguments give the same frame. Raises InputError for an unknown space, tuner or number of trials.

    >>> found = simulate("conv3x3_64x28", ["random", "grid"], trials=8, seeds=range(2))
    >>> len(found), found["best_us"].is_monotonic_decreasing
    (32, False)
    """
    replay = recorded_space(space) if starts else recorded_space(space).without_starts()
    names = [tuners] if isinstance(tuners, str) else list(tuners)
    for name in names:
        if name not in TUNERS:
            raise InputError(f"there is no tuner {name!r}", remedy=f"there are {', '.join(TUNERS)}")
    if trials < 1:
        raise InputError(f"{trials} trials show nothing", remedy="ask for at least 1")
    numbers = [seeds] if isinstance(seeds, int) else list(seeds)
    parts = [_search(replay, name, trials, seed) for name in names for seed in numbers]
    return pd.concat(parts, ignore_index=True)


def simulate_steps(
    space: str | Path | ReplaySpace,
    arms: Mapping[str, AutoTVM],
    seeds: int | Iterable[int] = 0,
    past: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Carry out steps on a recorded space, each with each seed, as a run does with one task: one row a trial.

    `arms` are the steps by name. Batches, early stopping, exploration and random trials are those of a run, and so is
    what is made of earlier records: `past` is a frame of an earlier call, and the search with a seed knows its rows of
    that seed, which must be of one arm. A step that is left nothing to do has no rows.

    Columns: arm, strategy ("past": the best earlier schedule, measured again), and those of `simulate` but the tuner.
    Raises InputError for an unknown space, arms that are no AutoTVM steps, or begin with other runs (`warm_start`),
    and `past` of several arms.

    >>> few = simulate_steps("conv3x3_64x28", {"first": AutoTVM(kernel_trials=40)})
    >>> more = simulate_steps("conv3x3_64x28", {"second": AutoTVM(kernel_trials=60)}, past=few)
    >>> len(few), len(more), more["strategy"].iloc[0]
    (40, 21, 'past')
    """
    replay = recorded_space(space)
    if not arms or any(not isinstance(step, AutoTVM) or step.warm_start for step in arms.values()):
        raise InputError(
            f"arms {dict(arms)} cannot be replayed",
            remedy="pass a name and an AutoTVM step each; earlier records are passed as `past`, not as warm_start",
        )
    if past is not None and past["arm"].nunique() > 1:
        raise InputError("the past is of several arms", remedy="pass the rows of one")
    numbers = [seeds] if isinstance(seeds, int) else list(seeds)
    parts = []
    for name, step in arms.items():
        for seed in numbers:
            found = _carry_out(replay, step, seed, [] if past is None else _known(replay, past, seed))
            strategies = [trial.strategy for trial in found]
            parts.append(_frame(replay, found, seed).assign(arm=name, strategy=strategies))
    return pd.concat(parts, ignore_index=True)[["arm", *_COLUMNS[:2], "strategy", *_COLUMNS[2:]]]


def _known(replay: ReplaySpace, past: pd.DataFrame, seed: int) -> list[Trial]:
    """The trials of an earlier search, each schedule once."""
    points = past.loc[past["seed"] == seed, "point"].drop_duplicates()
    return replay.measure([made for point in points if (made := replay.space.realize(int(point)))], "earlier")


def _carry_out(replay: ReplaySpace, step: AutoTVM, seed: int, past: Sequence[Trial]) -> list[Trial]:
    """One task of a run: as in tvmlab.loop a batch is chosen before the answers to the one before it are known."""
    key, name = replay.space.task_key, replay.name
    past = past if step.reuse else []
    best = min((trial for trial in past if trial.ok), key=lambda trial: trial.latency_s or math.inf, default=None)
    again = [replace(best, strategy=PAST)] if best else []
    plan = planned(step, (), {key: past_of(past)}, {key} if best else set()) if past else Plan.afresh(step, [key])
    info = TaskInfo(key, name, name, weight=1, flops=0.0, bytes_moved=0.0, tunable=True)
    allocator = Allocator([info], {}, None, step.patience(1), plan.limits)
    for before, since in plan.begun.values():
        allocator.begun(key, before, since)
    trials = again[: plan.total]
    for trial in trials:
        allocator.again(key, trial.latency_s)
    tuner = TUNERS[step.tuner](replay.space, seed=seed, known=trials, earlier=past)
    tuner.start_at_random(step.random_trials, step.exploration_trials)
    first, later = (step.batch_size,) * 2 if step.batch_size else fit_template_batches(plan.total, tasks=1)
    left, under_way = plan.total - len(trials), list[Candidate]()
    while True:
        room = min(left, allocator.room(key)) if allocator.next_task() else 0
        following = tuner.ask(int(min(room, first if allocator.is_fresh(key) else later))) if room > 0 else []
        allocator.begin(key, len(following))
        left -= len(following)
        if under_way:
            answers = replay.measure(under_way, tuner.name)
            allocator.record(key, [trial.latency_s for trial in answers])
            tuner.tell(under_way, answers)
            trials += answers
        if not (following or under_way):
            return trials
        under_way = following


def descend(
    space: str | Path | ReplaySpace, start: int | None = None, *, trials: int = 200, starts: int = 1, seed: int = 0
) -> list[Trial]:
    """The trials of a droplet search of a recorded space, as the step `Droplet()` does it: to a local minimum.

    It begins at point `start`, or at one that the seed draws of those that run; with more `starts` than one, others are
    drawn that it goes on from. A table knows no noise, so whatever is faster is a move.
    `tvmlab.descent.of_trials(trials, space)` tells it step by step. Raises InputError if the start does not run, and
    for less than one of `starts`.

    >>> space = recorded_space("conv3x3_64x28")
    >>> found = descend(space, seed=1)
    >>> min(trial.latency_s for trial in found if trial.ok) * 1e6 < 1.2 * space.least_us
    True
    """
    if starts < 1:
        raise InputError(f"a descent cannot have {starts} starts", remedy="give it at least 1")
    replay = recorded_space(space)
    runs = [index for index in range(len(replay.space)) if isinstance(replay.space.answer(index), float)]
    rng = np.random.default_rng(seed)
    drawn = int(rng.choice(runs))
    point = drawn if start is None else start
    if point not in runs:
        raise InputError(f"point {point} of {replay.name} did not run", remedy="start at one that has a latency")
    further = rng.choice(runs, min(starts, len(runs)) - 1, replace=False)
    others = [(other, None) for index in further if (other := replay.space.realize(int(index)))]
    strategy = Droplet(Numbered(replay.space), replay.space.realize(point), p_value=0.05, seed=seed, others=others)
    found = spend(strategy, trials, lambda asked: replay.measure(asked, strategy.name))
    return [replace(trial, trial=number) for number, trial in enumerate(found, start=1)]


_COLUMNS = ["seed", "trial", "point", "status", "latency_us", "best_us", "elapsed_s"]


def _search(replay: ReplaySpace, name: str, trials: int, seed: int) -> pd.DataFrame:
    found = spend(TUNERS[name](replay.space, seed=seed), trials, replay.measure)
    return _frame(replay, found, seed).assign(tuner=name)[["tuner", *_COLUMNS]]


def _frame(replay: ReplaySpace, found: Sequence[Trial], seed: int) -> pd.DataFrame:
    latency_us = np.array(
        [np.nan if trial.latency_s is None else trial.latency_s * 1e6 for trial in found], dtype=float
    )
    return pd.DataFrame(
        {
            "seed": seed,
            "trial": np.arange(1, len(found) + 1),
            "point": [trial.decisions[0] for trial in found],
            "status": [str(trial.status) for trial in found],
            "latency_us": latency_us,
            "best_us": np.fmin.accumulate(latency_us),
            "elapsed_s": np.cumsum([replay.charged_s(trial) for trial in found]),
        },
        columns=_COLUMNS,
    )
