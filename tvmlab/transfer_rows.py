"""transfer.json as rows of a frame: which schedules each task tried, where they came from, and how they did.

`tvmlab.frames.transfers(runs)` has them. Its columns: run, model, step, task, task_key, kernel_class; source_model,
source_run, source_task, source_key; distance (of the shapes, in doublings); key (of the adapted program; empty if there
is none), outcome ("tried", "measured before", "same as a nearer one", or why there is no program); status (of its
trial; empty: not measured), latency_us, untuned_us, is_best (whether the task's fastest schedule is this one).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import permutations
from math import nan
from typing import Any

import pandas as pd

from tvmlab.core import Trial, standing
from tvmlab.records import RunFolder
from tvmlab.sources import TRANSFER_FILE, model_of, origins, score

__all__ = ["TRANSFER_COLUMNS", "source_scores", "transfer_rows"]

TRANSFER_COLUMNS = (
    "run", "model", "step", "task", "task_key", "kernel_class", "source_model", "source_run", "source_task",
    "source_key", "distance", "key", "outcome", "status", "latency_us", "untuned_us", "is_best",
)  # fmt: skip


def transfer_rows(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """One row a task and schedule of a TransferTuning step; the columns of tvmlab.frames.transfers."""
    rows = folder.read_json(TRANSFER_FILE, missing={"rows": []})["rows"]
    trials = list(folder.trials()) if rows else []
    measured = {(trial.task_key, trial.key): trial for trial in trials}
    untuned = {trial.task_key: trial for trial in trials if trial.trial == 0}
    best: dict[str, Trial] = {}
    for trial in standing(trials):
        if trial.latency_s is not None and _us(trial) < _us(best.get(trial.task_key), missing=float("inf")):
            best[trial.task_key] = trial
    classes = {info.key: info.kernel_class for info in folder.tasks}
    models = {run: model_of(folder, run) for run in {row["source_run"] for row in rows}}
    for row in rows:
        found = measured.get((row["task_key"], row["key"]))
        fastest = best.get(row["task_key"])
        yield {
            **row,
            "run": folder.id,
            "model": folder.experiment.model,
            "kernel_class": classes.get(row["task_key"], ""),
            "source_model": models[row["source_run"]],
            "status": str(found.status) if found else "",
            "latency_us": _us(found),
            "untuned_us": _us(untuned.get(row["task_key"])),
            "is_best": fastest is not None and fastest.key == row["key"],
        }


def source_scores(runs: Iterable[RunFolder]) -> pd.DataFrame:
    """What each run of a set promises the models of the others: model, source, score, chosen; the best source first.

    `score` is the heuristic of the paper (tvmlab.sources.score); `TransferTuning("auto")` would take the `chosen` ones.
    The runs are finished, one a model.
    """
    rows: list[dict[str, Any]] = []
    for run, other in permutations(runs, 2):
        untuned_s = {trial.task_key: trial.latency_s or 0.0 for trial in run.trials() if trial.trial == 0}
        promised = score([origin.task for origin in origins(other)], run.tasks, untuned_s)
        rows.append({"model": run.experiment.model, "source": other.experiment.model, "score": promised})
    rows.sort(key=lambda row: -row["score"])
    found = pd.DataFrame(rows, columns=["model", "source", "score"])
    return found.assign(chosen=~found["model"].duplicated()).sort_values("model", kind="stable", ignore_index=True)


def _us(trial: Trial | None, missing: float = nan) -> float:
    return missing if trial is None or trial.latency_s is None else trial.latency_s * 1e6
