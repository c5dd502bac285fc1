"""The store of past runs, a runs folder: its records by task and target; runs to be deleted."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from tvmlab.core import InputError, RunError, TaskInfo
from tvmlab.earlier import is_of, past_frame, readable
from tvmlab.experiment import Experiment
from tvmlab.records import RunFolder, default_runs_dir
from tvmlab.reuse import PAST, REUSE_FILE, engines_that_reuse
from tvmlab.targets import Target
from tvmlab.targets import target as named_target
from tvmlab.tasks import Task

__all__ = ["delete_runs", "noted_frame", "past", "reused"]


def past(
    task: str | Task | TaskInfo | None = None,
    target: str | Target | None = None,
    runs_dir: str | Path | None = None,
) -> pd.DataFrame:
    """The trials of all runs in a runs folder, imported ones too: of every task or of one; of one target, if asked.

    `task` is a name, a key, or a task; `target` a name as `tvmlab.target` takes it: records of another device are left
    out, also of one with the same attributes. Each device's records stand together, in these each task's, the fastest
    first. Default schedules are left out, and readings that were refuted; what a fork has from its origin is the
    origin's alone.

    Columns: run, model, target (label), task, task_key, kernel_class, strategy, trial, status, latency_us (NaN:
    failed), key (of the program), when. Raises InputError for a task without records, for a name that several tasks
    have (each model counts its own), or an unknown target, RecordError for a damaged run.
    """
    wanted = named_target(target) if isinstance(target, str) else target
    runs = readable(Path(runs_dir) if runs_dir is not None else default_runs_dir())
    found = past_frame(run for run in runs if wanted is None or is_of(run, wanted))
    if task is None:
        return found
    name = task if isinstance(task, str) else task.key
    chosen = found[(found["task_key"] == name) | (found["task"] == name)]
    if chosen.empty:
        known = ", ".join(found["task"].dropna().unique()) or "none at all"
        raise InputError(f"there are no records of task {name!r}", remedy=f"there are of {known}")
    if chosen["task_key"].nunique() > 1:
        each = chosen.drop_duplicates("task_key")
        kinds = [f"{key} ({model})" for key, model in zip(each["task_key"], each["model"], strict=True)]
        raise InputError(
            f"{len(kinds)} tasks are called {name!r}, each another kernel", remedy=f"pass a key: {', '.join(kinds)}"
        )
    return chosen.reset_index(drop=True)


def reused(run: str | Path | RunFolder | Any) -> pd.DataFrame:
    """What a run took from earlier runs, one row a task; none where it took nothing.

    Columns: task, task_key, ansor and autotvm (trials of each engine that count: 0 if no step of it reuses any), runs
    (their ids), best_run and best_trial (whose schedule was measured again first), then_us (its latency there), now_us
    (here; NaN: not yet, or it failed). Raises RecordError for what is no run.
    """
    folder = RunFolder.open(getattr(run, "folder", run))
    noted = folder.read_json(REUSE_FILE, missing={"tasks": {}})
    now = {trial.key: trial.latency_s for trial in folder.trials() if trial.strategy == PAST}
    frame = noted_frame(noted, folder.tasks, folder.experiment)
    best = [noted["tasks"][key]["best"] or {} for key in frame["task_key"]]
    frame["now_us"] = pd.Series([now.get(known.get("key", "")) for known in best], dtype=float) * 1e6
    return frame


def noted_frame(noted: Mapping[str, Any], tasks: Iterable[TaskInfo], experiment: Experiment) -> pd.DataFrame:
    """The columns of `reused` but the last, from what reuse.json holds and what is known of the run's tasks."""
    rows, asked = [], engines_that_reuse(experiment)
    for info in tasks if asked else ():
        if noted["tasks"].get(info.key, {}).get("runs"):
            found, best = noted["tasks"][info.key], noted["tasks"][info.key]["best"] or {}
            taken = {engine: found.get(engine, {}) if engine in asked else {} for engine in ("ansor", "autotvm")}
            counts = {engine: past.get("trials", 0) for engine, past in taken.items()}
            row = {"task": info.name, "task_key": info.key, **counts, "runs": ", ".join(found["runs"])}
            row |= {"best_run": best.get("run", ""), "best_trial": best.get("trial")}
            rows.append(row | {"then_us": best.get("latency_s")})
    columns = ["task", "task_key", "ansor", "autotvm", "runs", "best_run", "best_trial", "then_us"]
    frame = pd.DataFrame(rows, columns=columns).astype({"best_trial": "Int64"})
    frame["then_us"] = frame["then_us"].astype(float) * 1e6
    return frame


def delete_runs(runs: Any, runs_dir: str | Path | None = None) -> list[str]:
    """Delete runs, by id, folder or as `Run`, one or a list, with all that is in them; returns their ids, each once.

    Raises RecordError for what is no run, RunError for one that is still running; then none is deleted.
    """
    single = isinstance(runs, str | Path | RunFolder) or hasattr(runs, "folder")
    opened = [RunFolder.open(getattr(run, "folder", run), runs_dir) for run in ([runs] if single else runs)]
    found = list({run.path.resolve(): run for run in opened}.values())
    for run in found:
        if run.status == "running":
            raise RunError(f"run {run.id} is running", remedy="stop it first; nothing was deleted")
    for run in found:
        shutil.rmtree(run.path)
    return [run.id for run in found]
