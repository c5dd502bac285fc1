"""What further trials of a task bring, and what ending a search or a trial early costs, of searches that were made.

A frame of searches has one row a trial: search (its name), trial (of the task, from 1), best_us (the best latency so
far; NaN: none yet) and exhausted (whether the search ended because its space has no more valid points). Nothing here
needs TVM.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tvmlab import frames, published
from tvmlab.core import DEFAULT_TIMEOUT_FACTOR, IMPROVED, InputError

__all__ = ["budgets", "doublings", "early_stops", "of_replay", "of_report", "of_runs", "timeouts"]

_COLUMNS = ["search", "trial", "best_us", "exhausted"]
_FEWEST = 8  # trials of a task, from which on doubling them is looked at
# What each time-out limits, and how many times as long a default kernel has.
_TIMEOUTS = {"build_timeout_s": ("build_s", 1.0), "run_timeout_s": ("run_s", DEFAULT_TIMEOUT_FACTOR)}


def of_runs(runs: Any) -> pd.DataFrame:
    """The searches of the tasks of runs (as in tvmlab.frames); the default schedule counts as the first best."""
    curve = frames.curve(runs, task="all")
    curve = curve[curve["trial"] > 0].assign(search=curve["run"].astype(str) + " " + curve["task"].astype(str))
    return _searches(curve)


def of_replay(found: pd.DataFrame, exhausted: bool = False) -> pd.DataFrame:
    """The searches of a frame of `tvmlab.simulate` or `simulate_steps`; `exhausted` says that no trial is left."""
    kind = "arm" if "arm" in found else "tuner"
    return _searches(found.assign(search=found[kind] + " " + found["seed"].astype(str)), exhausted)


def of_report() -> pd.DataFrame:
    """The searches of the published report by Ansor: those of resnet50 and alexnet, whose logs there are."""
    trials = published.table("trials").query("phase == 'ansor'").sort_values("trial", kind="stable")
    trials["search"] = trials["run"] + " " + trials["model"] + " " + trials["workload_index"].astype(str)
    trials["best_us"] = trials.groupby("search")["latency_s"].cummin().groupby(trials["search"]).ffill() * 1e6
    return _searches(trials)


def _searches(found: pd.DataFrame, exhausted: bool = False) -> pd.DataFrame:
    number = found.groupby("search", sort=False).cumcount() + 1
    return found.assign(trial=number, exhausted=exhausted)[_COLUMNS].reset_index(drop=True)


def doublings(searches: pd.DataFrame, least: float = 0.01) -> pd.DataFrame:
    """What twice the trials gain, one row a number of trials, 8, 16, 32 and so on, as far as any search goes.

    Only a search counts that had twice the trials (or the whole space) and a latency by then: one that ended earlier
    says nothing. Columns: trials, searches (how many count), gaining (in how many the latency fell by the share `least`
    or more), share (gaining / searches), median_gain and largest_gain (shares of the latency).
    """
    rows = []
    found = [_Search(part) for _, part in searches.groupby("search", sort=False)]
    longest = max((search.trials for search in found), default=0)
    trials = _FEWEST
    while trials < longest:
        gains = np.array([gain for search in found if (gain := search.gain(trials, 2 * trials)) is not None])
        if len(gains):
            gaining = int((gains >= least).sum())
            row = {"trials": trials, "searches": len(gains), "gaining": gaining, "share": gaining / len(gains)}
            rows.append(row | {"median_gain": np.median(gains), "largest_gain": gains.max()})
        trials *= 2
    columns = ["trials", "searches", "gaining", "share", "median_gain", "largest_gain"]
    return pd.DataFrame(rows, columns=columns)


def budgets(curve: pd.DataFrame, trials: Sequence[int]) -> pd.DataFrame:
    """The model estimate that searches of several seeds had after so many trials each, one row a number of trials.

    `curve` is that of `tvmlab.frames.curve`. Columns: trials, seeds (searches that went so far and had an estimate),
    estimate_ms (their median), least_ms, largest_ms (NaN where none did), gain (the share by which the median fell
    since the row before).
    """
    reach = curve.groupby("run")["trial"].max()
    rows = []
    for number in trials:
        far = curve[curve["run"].isin(reach.index[reach >= number]) & (curve["trial"] <= number)]
        found = far.groupby("run")["estimate_ms"].last().dropna()
        rows.append((number, len(found), found.median(), found.min(), found.max()))
    table = pd.DataFrame(rows, columns=["trials", "seeds", "estimate_ms", "least_ms", "largest_ms"])
    return table.assign(gain=1 - table["estimate_ms"] / table["estimate_ms"].shift())


def early_stops(searches: pd.DataFrame, thresholds: Iterable[int]) -> pd.DataFrame:
    """Where each search would have ended by early stopping, and what that would have cost, one row each.

    Columns: threshold (trials without an improvement), search, trials (at which it ends), share (of all its trials),
    loss (how much slower it ends than without, as a share). A real run ends a batch or two later. In a run of several
    tasks the trials that one gives up are spent on others, which this leaves out. Raises InputError for a threshold
    below 1.
    """
    rows = []
    numbers = list(thresholds)
    if any(number < 1 for number in numbers):
        raise InputError(f"a search cannot stop after {min(numbers)} trials", remedy="give thresholds of at least 1")
    for name, part in searches.groupby("search", sort=False):
        search = _Search(part)
        for threshold in numbers:
            end = search.stop(threshold)
            loss = search.best[end - 1] / search.best[-1] - 1
            row = {"threshold": threshold, "search": name, "trials": end, "share": end / search.trials}
            rows.append(row | {"loss": loss})
    return pd.DataFrame(rows, columns=["threshold", "search", "trials", "share", "loss"])


def timeouts(trials: pd.DataFrame, limits_s: Sequence[float]) -> pd.DataFrame:
    """What a time-out of so many seconds would have cost the searches that were made, one row a knob and time-out.

    `trials` is of `tvmlab.frames.trials`. Columns: knob (of `Measure`), limit_s, trials (valid ones, default kernels
    not counted), lost (how many of these took longer), share (lost / trials), tasks (of all runs), changed (how many
    lose their best schedule), loss (how much slower the worst of them ends, as a share; inf: nothing of it is left).

    A task whose default kernel takes too long loses all its trials. `run_s` has the timed repeats, which the time-out
    leaves out: its rows are what is lost at the most, and far from it where candidates were timed in turns (Droplet).
    A real search goes on elsewhere instead of a trial that it loses. Raises InputError for a time-out of 0 or less.

    >>> found = {"trial": [0, 1, 2], "latency_us": [90.0, 50.0, 40.0], "build_s": [0.2, 0.3, 3.0], "run_s": 0.1}
    >>> trials = pd.DataFrame({"run": "a", "task": "dense", "step": 0, "key": ["", "x", "y"], **found})
    >>> timeouts(trials, [1, 5]).query("knob == 'build_timeout_s'")[["limit_s", "lost", "changed", "loss"]].values
    array([[1.  , 1.  , 1.  , 0.25],
           [5.  , 0.  , 0.  , 0.  ]])
    """
    if any(not limit_s > 0 for limit_s in limits_s):
        raise InputError(f"no trial ends within {min(limits_s):g} s", remedy="give time-outs above 0 s")
    valid = trials.dropna(subset="latency_us")
    # Of what a step measured again the later reading counts, as in tvmlab.frames.
    valid = valid.drop_duplicates(["run", "task", "step", "key"], keep="last")
    rows = [
        {"knob": knob, "limit_s": limit_s, **_cost(valid, valid[column] > limit_s * _leeway(valid, factor))}
        for knob, (column, factor) in _TIMEOUTS.items()
        for limit_s in limits_s
    ]
    return pd.DataFrame(rows, columns=["knob", "limit_s", "trials", "lost", "share", "tasks", "changed", "loss"])


def _leeway(trials: pd.DataFrame, factor: float) -> pd.Series:
    return (trials["trial"] == 0).map({True: factor, False: 1.0})


def _cost(valid: pd.DataFrame, late: pd.Series) -> dict[str, Any]:
    """What is lost with the trials that are late."""
    task = [valid["run"].astype(str), valid["task"].astype(str)]
    late = late | (late & (valid["trial"] == 0)).groupby(task).transform("any")
    searched = valid["trial"] > 0
    best = valid.groupby(task)["latency_us"].min()
    left = valid["latency_us"].mask(late).groupby(task).min().fillna(np.inf)
    lost, count = int((late & searched).sum()), int(searched.sum())
    return {
        "trials": count,
        "lost": lost,
        "share": lost / count if count else 0.0,
        "tasks": len(best),
        "changed": int((left > best).sum()),
        "loss": float((left / best - 1).max()) if len(best) else 0.0,
    }


class _Search:
    """The best latency after each trial of a search."""

    def __init__(self, part: pd.DataFrame) -> None:
        self.best = part.sort_values("trial")["best_us"].to_numpy()
        self.trials = len(self.best)
        self._exhausted = bool(part["exhausted"].iloc[0])

    def gain(self, fewer: int, more: int) -> float | None:
        """The share by which the latency falls; None where that is not known."""
        if self.trials < (1 if self._exhausted else more):
            return None
        before, after = (self.best[min(trials, self.trials) - 1] for trials in (fewer, more))
        return float(1 - after / before) if np.isfinite(before) else None

    def stop(self, threshold: int) -> int:
        """The number of trials at which a task is finished (tvmlab.search.allocate)."""
        least, since = np.inf, 0
        for number, best in enumerate(self.best, start=1):
            since = 0 if best < least * IMPROVED else since + 1
            least = min(least, best) if np.isfinite(best) else least
            if since >= threshold:
                return number
        return self.trials
