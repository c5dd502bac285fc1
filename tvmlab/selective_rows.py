"""selective.json as rows of a frame: which tasks were searched, which took schedules, and how those did.

`tvmlab.frames.selective(runs)` has a row a task and Selective step. Its columns: run, model, step, task, task_key,
kernel_class, weight; depend (the representative of its cluster: itself if it is one), cluster (its size), rate (its
similarity to the representative); role ("searched", "shared", "searched after all", or "not reached" if trials or time
ended before its turn), poor (why shared schedules are, if so); tried (how many of the representative's schedules were
measured, and of the points of its own template that compete with them), refused (how many schedules do not fit),
searched (trials of the task's own search); shared_us (the fastest of what was tried), best_us (of the run),
roofline_share and depend_share (what the fastest schedules reach of the roofline, the task's and its representative's;
NaN: not measured).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import inf, nan
from typing import Any

import pandas as pd

from tvmlab.core import InputError, Roofline, TaskInfo, Trial, standing
from tvmlab.records import RunFolder
from tvmlab.sources import SELECTIVE_FILE

__all__ = ["SELECTIVE_COLUMNS", "matrix", "representative_of", "selective_rows", "similarity_of"]

SELECTIVE_COLUMNS = (
    "run", "model", "step", "task", "task_key", "kernel_class", "weight", "depend", "cluster", "rate", "role", "poor",
    "tried", "refused", "searched", "shared_us", "best_us", "roofline_share", "depend_share",
)  # fmt: skip
_TRIED = "transfer"  # the strategy of a shared schedule's trial


def matrix(names: Sequence[str], rates: Any, depends: Sequence[int]) -> pd.DataFrame:
    """Similarity rates as a frame with the tasks' names on both sides, those of a cluster together.

    `depends` has the number of each task's representative. `attrs["depend"]` names it by task, `attrs["clusters"]`
    lists the tasks of each cluster, the largest cluster first, its representative first.
    """
    members: dict[int, list[int]] = {}
    for task, on in enumerate(depends):
        members.setdefault(on, []).append(task)
    groups = [[on, *(task for task in found if task != on)] for on, found in members.items()]
    groups.sort(key=lambda group: (-len(group), group[0]))
    order = [task for group in groups for task in group]
    labels = pd.Index([names[task] for task in order], name="task")
    frame = pd.DataFrame([[rates[row][column] for column in order] for row in order], index=labels, columns=labels)
    frame.attrs["clusters"] = [[names[task] for task in group] for group in groups]
    frame.attrs["depend"] = {names[task]: names[on] for task, on in enumerate(depends)}
    return frame


def similarity_of(folder: RunFolder) -> pd.DataFrame:
    """The similarity matrix of a run's first Selective step. Raises InputError if it has none yet."""
    step = next(iter(_steps(folder).values()), None)
    if step is None:
        raise InputError(f"run {folder.id} has no clusters", remedy="pass one whose Selective step has begun")
    place = {key: number for number, key in enumerate(step["tasks"])}
    names = _names(folder)
    depends = [place[step["depends"][key]] for key in step["tasks"]]
    return matrix([names[key] for key in step["tasks"]], step["rates"], depends)


def representative_of(folder: RunFolder, infos: Sequence[TaskInfo]) -> list[str]:
    """The name of each task's representative in the run's last Selective step; empty where it has none."""
    steps = list(_steps(folder).values())
    names, depends = _names(folder), steps[-1]["depends"] if steps else {}
    return [names.get(depends.get(info.key, ""), "") for info in infos]


def selective_rows(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """One row a task and Selective step, clusters together, each with its representative first."""
    infos, limit = {info.key: info for info in folder.tasks}, folder.roofline
    for number, step in _steps(folder).items():
        trials = [trial for trial in folder.trials() if trial.trial]
        best, shared = _best_us(trials), _best_us(trials, step=int(number), strategy=_TRIED)
        mine = [trial for trial in trials if trial.step == int(number)]
        searched = Counter(trial.task_key for trial in mine if trial.strategy != _TRIED)
        tried = Counter(trial.task_key for trial in mine if trial.strategy == _TRIED)
        refused = Counter(row["task_key"] for row in step["shared"] if not row["key"])
        sizes, place = Counter(step["depends"].values()), {key: at for at, key in enumerate(step["tasks"])}
        poor = step["poor"] or {}
        for key, on in sorted(step["depends"].items(), key=lambda pair: (pair[1], pair[0] != pair[1])):
            info = infos[key]
            yield {
                "run": folder.id,
                "model": folder.experiment.model,
                "step": int(number),
                "task": info.name,
                "task_key": key,
                "kernel_class": info.kernel_class,
                "weight": info.weight,
                "depend": infos[on].name,
                "cluster": sizes[on],
                "rate": step["rates"][place[key]][place[on]],
                "role": _role(key == on, searched[key], tried[key] + refused[key]),
                "poor": poor.get(key, ""),
                "tried": tried[key],
                "refused": refused[key],
                "searched": searched[key],
                "shared_us": shared.get(key, nan),
                "best_us": best.get(key, nan),
                "roofline_share": _share(info, limit, best.get(key, nan)),
                "depend_share": _share(infos[on], limit, best.get(on, nan)),
            }


def _role(is_representative: bool, searched: int, shared: int) -> str:
    """What became of a task that has so many trials of its own, and so many schedules that were tried or refused."""
    if is_representative:
        return "searched"
    if searched:
        return "searched after all"
    return "shared" if shared else "not reached"


def _steps(folder: RunFolder) -> Mapping[str, dict[str, Any]]:
    found: Mapping[str, dict[str, Any]] = folder.read_json(SELECTIVE_FILE, missing={"steps": {}})["steps"]
    return found


def _names(folder: RunFolder) -> dict[str, str]:
    return {info.key: info.name for info in folder.tasks}


def _best_us(trials: Sequence[Trial], **wanted: Any) -> dict[str, float]:
    """The least latency of each task among the trials whose attributes are those wanted."""
    best: dict[str, float] = {}
    for trial in standing(trials):
        if trial.latency_s is not None and all(getattr(trial, name) == value for name, value in wanted.items()):
            best[trial.task_key] = min(trial.latency_s * 1e6, best.get(trial.task_key, inf))
    return best


def _share(info: TaskInfo, limit: Roofline | None, latency_us: float) -> float:
    return limit.latency_s(info.flops, info.bytes_moved) * 1e6 / latency_us if limit else nan
