"""What further trials of a task bring: searches as curves, what doubling the trials gains, early stopping afterwards.

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
from tvmlab.core import IMPROVED, InputError

__all__ = ["budgets", "doublings", "early_stops", "of_replay", "of_report", "of_runs"]

_COLUMNS = ["search", "trial", "best_us", "exhausted"]
_FEWEST = 8  # trials of a task, from which on doubling them is looked at


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
