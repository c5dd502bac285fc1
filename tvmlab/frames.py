"""Run folders to tidy pandas frames: trials, best-so-far curves, tasks, runs, failures, reference lines.

Every function takes `runs`: a run folder's path or id, a RunFolder, anything with a `.folder` (a Run), a glob
such as `"runs/*resnet50*"`, or a sequence of these. Nothing here needs TVM, and nothing writes.

`model estimate` is the sum over tasks of weight x best kernel latency; `end-to-end` is the whole compiled
model, timed by tvmlab.compare. Columns say which they hold.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tvmlab.columns import COLUMNS, DETAILS, PER_RUN, TrialReader, identity
from tvmlab.comparison_rows import comparison_rows, median_ms, ratio_of
from tvmlab.core import InputError, RecordError, TaskInfo, TrialStatus
from tvmlab.layout_rows import LAYOUT_COLUMNS, TRANSFORM_COLUMNS, site_rows, summary_of, transform_rows
from tvmlab.records import RunFolder, default_runs_dir
from tvmlab.selective_rows import SELECTIVE_COLUMNS, representative_of, selective_rows, similarity_of
from tvmlab.transfer_rows import TRANSFER_COLUMNS, transfer_rows

__all__ = [
    "comparison",
    "curve",
    "failures",
    "folders",
    "layout_transforms",
    "layouts",
    "references",
    "selective",
    "similarity",
    "summary",
    "tasks",
    "transfers",
    "trials",
]


def folders(runs: Any) -> list[RunFolder]:
    """The run folders that `runs` names, each once, in the order given (a glob: sorted).

    Raises RecordError for a folder that is not a run, or a name or glob that matches none; InputError for no
    runs, or two different ones with the same id.
    """
    several = isinstance(runs, Iterable) and not isinstance(runs, str | Path)
    found: dict[Path, RunFolder] = {}
    for run in runs if several else [runs]:
        for folder in _folders_of(run):
            found.setdefault(folder.path.resolve(), folder)
    if not found:
        raise InputError("no runs were given", remedy="pass a run, or a list of them")
    if len({folder.id for folder in found.values()}) < len(found):
        raise InputError("two of these runs have the same id", remedy="rename one of the folders")
    return list(found.values())


def _folders_of(run: Any) -> list[RunFolder]:
    run = getattr(run, "folder", run)
    if isinstance(run, str) and glob.has_magic(run) and not Path(run).is_dir():
        paths = sorted(glob.glob(run) or glob.glob(str(default_runs_dir() / run)))  # noqa: PTH207 (absolute ones too)
        matches = [path for path in paths if (Path(path) / "experiment.json").is_file()]
        if not matches:
            raise RecordError(f"no run matches {run!r}", remedy="list the runs with tvmlab.runs()")
        return [RunFolder.open(path) for path in matches]
    if not isinstance(run, str | Path | RunFolder):
        raise InputError(f"{run!r} is not a run", remedy="pass a folder, an id, a glob, or what tvmlab.tune returned")
    return [RunFolder.open(run)]


def trials(runs: Any, *, columns: Sequence[str] | None = None, details: bool = False) -> pd.DataFrame:
    """One row a trial, in the order they ended; `trial` 0 marks the untuned (default) kernel of a task.

    Columns: run, model, target (label), seed, step, strategy, trial, task (name), task_key, kernel_class,
    status, latency_us (median of the repeats), latency_min_us, latency_std_us (all NaN when the trial
    failed), repeats, build_s, run_s, elapsed_s (tuning time), time_s (Unix time), gflops (GFLOP/s), key,
    sketch. `decisions` and `message` come with `details=True` or when `columns` names them; `columns` picks
    and orders.

    Raises InputError for an unknown column, RecordError for a damaged file.
    """
    wanted = tuple(columns) if columns is not None else COLUMNS + (DETAILS if details else ())
    for name in wanted:
        if name not in COLUMNS + DETAILS:
            raise InputError(f"trials have no column {name!r}", remedy=f"they have {', '.join(COLUMNS + DETAILS)}")
    reader = TrialReader(wanted)
    for folder in folders(runs):
        reader.read(folder)
    return reader.frame()


def curve(runs: Any, by: str = "trial", task: str | None = None) -> pd.DataFrame:
    """Best so far, one row a trial, ordered by `by`: `"trial"` or `"elapsed_s"` (tuning time, seconds).

    Without `task`: `estimate_ms`, the model estimate: sum over the tunable tasks of weight x best latency so far. A
    task's untuned latency counts as long as no valid trial beats it, so the estimate never rises; it is NaN
    until every task has either. With `task` (a name or key, or `"all"`): `best_us` of that task, a row for
    each of its own trials. By trial, row 0 is the untuned state; by time, each untuned kernel is a row when
    it was measured.

    Columns: run, model, target, seed, [task,] trial, elapsed_s, estimate_ms | best_us.
    """
    if by not in ("trial", "elapsed_s"):
        raise InputError(f"a curve cannot run by {by!r}", remedy="by is 'trial' or 'elapsed_s'")
    parts, unknown = [], []
    for folder in folders(runs):
        infos = folder.tasks
        if task is None:
            infos = [info for info in infos if info.tunable and info.weight]
        chosen = [info for info in infos if task in (None, "all", info.name, info.key)]
        if infos and not chosen:
            unknown.append(sorted(info.name for info in infos))
        if chosen:
            part = _model_curve(folder, chosen, by) if task is None else _task_curves(folder, chosen, by)
            parts.append(_named(part, folder))
    if unknown and not parts:
        raise InputError(f"no task {task!r}", remedy=f"the tasks are {', '.join(unknown[0])}")
    value = ["estimate_ms"] if task is None else ["best_us"]
    columns = [*PER_RUN, *(["task"] if task else []), "trial", "elapsed_s", *value]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns, dtype=float)


def _named(frame: pd.DataFrame, folder: RunFolder) -> pd.DataFrame:
    """The frame with the columns that say which run it is of."""
    named: dict[str, Any] = dict(zip(PER_RUN, identity(folder), strict=True))
    return frame.assign(**named)


def _events(folder: RunFolder, infos: Sequence[TaskInfo], by: str) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """The run's trials of these tasks in order, each one's task number, and its task's best so far (us, inf:
    none)."""
    events = _standing(trials(folder, columns=["task_key", "step", "key", "trial", "elapsed_s", "latency_us"]))
    numbers = {info.key: number for number, info in enumerate(infos)}
    of_category = np.array([numbers.get(key, -1) for key in events["task_key"].cat.categories], dtype=np.int64)
    task = of_category[events["task_key"].cat.codes] if len(events) else np.empty(0, np.int64)
    events, task = events[task >= 0], task[task >= 0]
    order = np.argsort(events[by].to_numpy(), kind="stable")
    events, task = events.iloc[order], task[order]
    best = events["latency_us"].fillna(np.inf).to_numpy(copy=True)
    for number in range(len(infos)):
        at = np.flatnonzero(task == number)
        best[at] = np.minimum.accumulate(best[at])
    return events, task, best


def _standing(events: pd.DataFrame) -> pd.DataFrame:
    """Without the readings of what a step measured again (`tvmlab.core.standing`); the trials stay."""
    later = events.dropna(subset="latency_us").duplicated(["task_key", "step", "key"], keep="last")
    events.loc[later[later].index, "latency_us"] = np.nan
    return events


def _model_curve(folder: RunFolder, infos: Sequence[TaskInfo], by: str) -> pd.DataFrame:
    events, task, best = _events(folder, infos, by)
    change = np.zeros(len(best))  # of the estimate, in us
    first = np.zeros(len(best), dtype=bool)  # the task is known from here on
    for number, info in enumerate(infos):
        at = np.flatnonzero(task == number)
        at = at[np.isfinite(best[at])]
        if len(at):
            first[at[0]] = True
            change[at] = info.weight * np.diff(best[at], prepend=0.0)
    estimate_ms = np.where(np.cumsum(first) == len(infos), np.cumsum(change) / 1e3, np.nan)
    found = events[["trial", "elapsed_s"]].assign(estimate_ms=estimate_ms)
    return found.drop_duplicates("trial", keep="last") if by == "trial" else found


def _task_curves(folder: RunFolder, infos: Sequence[TaskInfo], by: str) -> pd.DataFrame:
    events, task, best = _events(folder, infos, by)
    names = pd.Categorical(np.array([info.name for info in infos], dtype=object)[task])
    return events[["trial", "elapsed_s"]].assign(task=names, best_us=np.where(np.isfinite(best), best, np.nan))


def tasks(runs: Any) -> pd.DataFrame:
    """One row a run and task, in the model's order, then (weight 0) those that a layout step only tried.

    Columns: run, model, target, seed, task, task_key, kernel_class, tunable, weight, flops, bytes, intensity
    (FLOP per byte), roofline_us (NaN if the target's limits were not measured), default_us (untuned), best_us
    (the least of default and valid trials), speedup (default / best), share and default_share (of the model
    estimate, 0 to 1), trials, failed, gflops (of the best), best_trial (0: nothing beat the default; <NA>: no
    latency at all), shapes, depend (the representative of its cluster in the last Selective step; empty: none).
    """
    parts = [part for folder in folders(runs) if not (part := _tasks_of(folder)).empty]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*PER_RUN, *_TASK_COLUMNS])


_TASK_COLUMNS = (
    "task", "task_key", "kernel_class", "tunable", "weight", "flops", "bytes", "intensity", "roofline_us",
    "default_us", "best_us", "speedup", "share", "default_share", "trials", "failed", "gflops", "best_trial",
    "shapes", "depend",
)  # fmt: skip


def _tasks_of(folder: RunFolder) -> pd.DataFrame:
    infos, limit = folder.tasks, folder.roofline
    found = pd.DataFrame(
        {
            "task": [info.name for info in infos],
            "task_key": [info.key for info in infos],
            "kernel_class": [info.kernel_class for info in infos],
            "tunable": [info.tunable for info in infos],
            "weight": [info.weight for info in infos],
            "flops": [info.flops for info in infos],
            "bytes": [info.bytes_moved for info in infos],
            "intensity": [info.intensity for info in infos],
            "roofline_us": [limit.latency_s(i.flops, i.bytes_moved) * 1e6 if limit else np.nan for i in infos],
            "shapes": [info.shapes for info in infos],
            "depend": representative_of(folder, infos),
        }
    )
    measured = _standing(trials(folder, columns=["task_key", "step", "key", "trial", "latency_us", "status"]))
    measured["task_key"] = measured["task_key"].astype(object)
    measured["failed"] = measured.pop("status") != TrialStatus.OK
    valid = measured.dropna(subset="latency_us").sort_values("trial", kind="stable")
    best = valid.loc[valid.groupby("task_key")["latency_us"].idxmin()].set_index("task_key")
    searched = measured[measured["trial"] > 0].groupby("task_key")["failed"].agg(["size", "sum"])
    key = found["task_key"]
    found["default_us"] = key.map(valid[valid["trial"] == 0].groupby("task_key")["latency_us"].min())
    found["best_us"] = key.map(best["latency_us"])
    found["best_trial"] = key.map(best["trial"]).astype("Int64")
    found["trials"] = key.map(searched["size"]).fillna(0).astype(int)
    found["failed"] = key.map(searched["sum"]).fillna(0).astype(int)
    found["speedup"] = found["default_us"] / found["best_us"]
    found["gflops"] = found["flops"] / found["best_us"] / 1e3
    for share, latency in (("share", "best_us"), ("default_share", "default_us")):
        part = _weighted(found, latency)
        found[share] = part / part.sum(skipna=False)
    return _named(found, folder)[[*PER_RUN, *_TASK_COLUMNS]]


def summary(runs: Any) -> pd.DataFrame:
    """One row a run.

    Columns: run, model, target, seed, steps, status, trials (untuned kernels not counted), failed, one count
    per kind of failure, elapsed_s, trials_per_s, untuned_estimate_ms, best_estimate_ms and roofline_ms (model
    estimates), end_to_end_ms, onnxruntime_ms (medians measured by tvmlab.compare, NaN if it was not run),
    ratio, ratio_low, ratio_high: tvmlab's end-to-end latency over onnxruntime's with its interval, below 1
    where tvmlab is faster.
    """
    return pd.DataFrame([_summary_of(folder) for folder in folders(runs)])


def _summary_of(folder: RunFolder) -> dict[str, Any]:
    measured = trials(folder, columns=["trial", "status", "elapsed_s"])
    counts = measured.loc[measured["trial"] > 0, "status"].value_counts()
    state = folder.state
    elapsed_s = max(state.elapsed_s, measured["elapsed_s"].max() if len(measured) else 0.0)
    compared = folder.comparison or {}
    ratio = ratio_of(compared, "tvmlab", "onnxruntime")
    return {
        **dict(zip(PER_RUN, identity(folder), strict=True)),
        "steps": " > ".join(step.kind for step in folder.experiment.steps),
        "status": state.status,
        "trials": int(counts.sum()),
        "failed": int(counts.drop(TrialStatus.OK).sum()),
        **{str(status): int(counts[status]) for status in TrialStatus if status != TrialStatus.OK},
        "elapsed_s": elapsed_s,
        "trials_per_s": counts.sum() / elapsed_s if elapsed_s > 0 else np.nan,
        **_estimates(folder),
        "end_to_end_ms": median_ms(compared, "tvmlab"),
        "onnxruntime_ms": median_ms(compared, "onnxruntime"),
        "ratio": ratio.get("ratio", np.nan),
        "ratio_low": ratio.get("low", np.nan),
        "ratio_high": ratio.get("high", np.nan),
    }


def _estimates(folder: RunFolder) -> dict[str, float]:
    """The model estimate untuned and now, and the roofline's, in ms; NaN where a task has no latency."""
    found = _tasks_of(folder)
    columns = {
        "untuned_estimate_ms": "default_us",
        "best_estimate_ms": "best_us",
        "roofline_ms": "roofline_us",
    }
    return {
        name: float(_weighted(found, of).sum(skipna=False)) / 1e3 if len(found) else np.nan
        for name, of in columns.items()
    }


def _weighted(found: pd.DataFrame, latency: str) -> pd.Series:
    """Each task's part of the model estimate, us. One that is not tunable is a view in the compiled model: free."""
    return (found["weight"] * found[latency]).where(found["tunable"] & (found["weight"] > 0), 0.0)


def layouts(runs: Any) -> pd.DataFrame:
    """One row a run, convolution or dense layer (`site`), and packing; no rows for runs whose model is in NCHW.

    Columns: run, site, about (operator, shapes, what is fused to it), packing, chosen, best_us (its best latency in
    the run's trials, NaN: none), decided_us (what the layout step chose by; NaN: nothing), instead_us (what the whole
    model would cost, transforms included, if this site alone had this packing; NaN: not known), why_not (why it could
    not be chosen; empty if it could), task_key. For one run `attrs` holds cost_us (of the assignment with its
    transforms, as measured when it was chosen), uniform_us (of each assignment of one block and algorithm),
    best_uniform, and gain (what the assignment saves of the best uniform one, 0 to 1); nothing where no layout step
    chose.
    """
    found = folders(runs)
    rows = [row for folder in found for row in site_rows(folder, _best_us(folder))]
    frame = pd.DataFrame(rows, columns=list(LAYOUT_COLUMNS))
    if len(found) == 1:
        frame.attrs.update(summary_of(found[0]))
    return frame


def layout_transforms(runs: Any) -> pd.DataFrame:
    """One row a run and layout transform that its model pays for: run, tensor, shape, source, target, cost_us."""
    rows = [row for folder in folders(runs) for row in transform_rows(folder)]
    return pd.DataFrame(rows, columns=list(TRANSFORM_COLUMNS))


def transfers(runs: Any) -> pd.DataFrame:
    """One row a task and schedule that a TransferTuning step took from elsewhere; columns: tvmlab.transfer_rows."""
    return pd.DataFrame([row for each in folders(runs) for row in transfer_rows(each)], columns=list(TRANSFER_COLUMNS))


def selective(runs: Any) -> pd.DataFrame:
    """One row a task of each Selective step: its cluster, who was searched; columns: tvmlab.selective_rows."""
    rows = [row for each in folders(runs) for row in selective_rows(each)]
    return pd.DataFrame(rows, columns=list(SELECTIVE_COLUMNS))


def similarity(run: Any) -> pd.DataFrame:
    """The similarity of one run's tasks as its first Selective step found it, as tvmlab.similarity gives it.

    Raises InputError for several runs, or one without such a step.
    """
    found = folders(run)
    if len(found) > 1:
        raise InputError("the similarity of tasks is of one run", remedy="pass one run")
    return similarity_of(found[0])


def _best_us(folder: RunFolder) -> dict[str, float]:
    """The least latency of each task's trials."""
    measured = trials(folder, columns=["task_key", "trial", "latency_us"])
    best = measured[measured["trial"] > 0].groupby("task_key", observed=True)["latency_us"].min()
    return {str(key): float(value) for key, value in best.items()}


def comparison(runs: Any) -> pd.DataFrame:
    """What tvmlab.compare timed end to end, one row a run and subject; no rows for runs without.

    Columns: run, subject, median_ms, low_ms, high_ms (95 % interval of the median; NaN below 6 samples),
    samples, ratio, ratio_low, ratio_high (tvmlab over the subject, below 1 where tvmlab is faster; NaN for
    tvmlab itself).
    """
    rows = [row for folder in folders(runs) for row in comparison_rows(folder.id, folder.comparison or {})]
    columns = ["run", "subject", "median_ms", "low_ms", "high_ms", "samples", "ratio", "ratio_low", "ratio_high"]
    return pd.DataFrame(rows, columns=columns)


def failures(runs: Any) -> pd.DataFrame:
    """Failed trials by run, status and task, most first.

    Columns: run, status, task, trials, share (of the task's trials, 0 to 1), message (first line, of the last
    such trial), remedy. Failed untuned kernels (trial 0) are counted too: nothing can be compared without
    them.
    """
    measured = trials(runs, columns=["run", "task", "status", "message"])
    totals = measured.groupby(["run", "task"], observed=True).size().rename("total")
    failed = measured[measured["status"] != TrialStatus.OK]
    groups = failed.groupby(["run", "status", "task"], observed=True)["message"]
    found = groups.agg(trials="size", message="last").reset_index().merge(totals.reset_index(), on=["run", "task"])
    found["share"] = found["trials"] / found["total"]
    found["message"] = found["message"].map(lambda text: text.partition("\n")[0])
    found["remedy"] = [TrialStatus(status).remedy for status in found["status"]]
    columns = ["run", "status", "task", "trials", "share", "message", "remedy"]
    return found.sort_values("trials", ascending=False, kind="stable", ignore_index=True)[columns]


def references(runs: Any) -> pd.DataFrame:
    """Lines to hold a curve against, those that are known: kind, measure, value_ms, run.

    kind `untuned` and `roofline` (the device's limit) are model estimates; `end-to-end` (the tuned model) and
    `onnxruntime` were timed whole by tvmlab.compare: `measure` says which.
    """
    rows = []
    for folder in folders(runs):
        estimates, compared = _estimates(folder), folder.comparison or {}
        for kind, measure, value in (
            ("untuned", "model estimate", estimates["untuned_estimate_ms"]),
            ("end-to-end", "end-to-end", median_ms(compared, "tvmlab")),
            ("onnxruntime", "end-to-end", median_ms(compared, "onnxruntime")),
            ("roofline", "model estimate", estimates["roofline_ms"]),
        ):
            if np.isfinite(value):
                rows.append((kind, measure, value, folder.id))
    return pd.DataFrame(rows, columns=["kind", "measure", "value_ms", "run"])
