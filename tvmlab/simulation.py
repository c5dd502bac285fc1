"""Compare tuners in seconds without a device: replay of template spaces of which every point was measured.

The idea is Kernel Tuner's simulation mode: a tuner asks, the table answers, the recorded time is charged, and a
candidate that is not in the table is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tvmlab.core import Candidate, InputError, RecordError, Trial, TrialStatus
from tvmlab.datafiles import data_dir
from tvmlab.search.droplet import Droplet, Numbered
from tvmlab.strategies import TUNERS
from tvmlab.testing import RecordedSpace, spend

__all__ = ["ReplaySpace", "descend", "recorded_space", "recorded_spaces", "simulate"]


@dataclass(frozen=True)
class ReplaySpace:
    """A recorded space and what is known of its recording: `about` (operator, CPU, versions, date).

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
        return f"{about['operator']}; recorded{when} on {about['cpu']}; TVM {about['apache-tvm']}"

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


def descend(
    space: str | Path | ReplaySpace, start: int | None = None, *, trials: int = 200, seed: int = 0
) -> list[Trial]:
    """The trials of a droplet search of a recorded space, as the step `Droplet()` does it: to a local minimum.

    It begins at point `start`, or at one that the seed draws of those that run. A table knows no noise, so whatever is
    faster is a move. `tvmlab.descent.of_trials(trials, space)` tells it step by step. Raises InputError if the start
    does not run.

    >>> space = recorded_space("conv3x3_64x28")
    >>> found = descend(space, seed=1)
    >>> min(trial.latency_s for trial in found if trial.ok) * 1e6 < 1.2 * space.least_us
    True
    """
    replay = recorded_space(space)
    runs = [index for index in range(len(replay.space)) if isinstance(replay.space.answer(index), float)]
    point = int(np.random.default_rng(seed).choice(runs)) if start is None else start
    if point not in runs:
        raise InputError(f"point {point} of {replay.name} did not run", remedy="start at one that has a latency")
    first = replay.space.realize(point)
    strategy = Droplet(Numbered(replay.space), first, p_value=0.05, seed=seed)
    found = spend(strategy, trials, lambda asked: replay.measure(asked, strategy.name))
    return [replace(trial, trial=number) for number, trial in enumerate(found, start=1)]


def _search(replay: ReplaySpace, name: str, trials: int, seed: int) -> pd.DataFrame:
    found = spend(TUNERS[name](replay.space, seed=seed), trials, replay.measure)
    latency_us = np.array([np.nan if trial.latency_s is None else trial.latency_s * 1e6 for trial in found])
    return pd.DataFrame(
        {
            "tuner": name,
            "seed": seed,
            "trial": np.arange(1, len(found) + 1),
            "point": [trial.decisions[0] for trial in found],
            "status": [str(trial.status) for trial in found],
            "latency_us": latency_us,
            "best_us": np.fmin.accumulate(latency_us),
            "elapsed_s": np.cumsum([replay.charged_s(trial) for trial in found]),
        }
    )
