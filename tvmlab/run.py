"""Start, watch, stop, resume and list runs. The search itself runs in a process of its own (search_process.py)."""

from __future__ import annotations

import html
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvmlab.core import InputError, RunError, TvmlabError
from tvmlab.earlier import attrs_of, is_of
from tvmlab.experiment import Experiment, afresh
from tvmlab.hardware import require_compiler, require_disk
from tvmlab.records import RunFolder, default_runs_dir
from tvmlab.search_process import check_experiment
from tvmlab.sources import check_sources
from tvmlab.targets import Target
from tvmlab.targets import target as named_target

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Progress", "Run", "attach", "begin", "fork", "resume", "runs", "tune"]

_POLL_S = 0.2
_STATUSES = ("running", "done", "stopped", "failed", "unreadable")
_FORKED = (
    "trials.jsonl",
    "database_*.json",
    "tasks.json",
    "assignment.json",
    "environment.json",
    "transfer.json",
    "selective.json",
    "minima.json",
    "refine.json",
    "reuse.json",
    "exhausted.json",
    "exhausted_sketches.json",
)
_STOP_GRACE_S = 180.0  # a stop waits for the trial under way, and that for its build

# Set by tvmlab.widgets: how a notebook shows a run. Only widgets know the notebook.
view: Callable[[Run], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Progress:
    """A moment of a run. Estimates are of the model, in milliseconds; None while a task has no latency yet."""

    status: str
    trials: int
    total_trials: int
    elapsed_s: float
    trials_per_s: float
    estimate_ms: float | None
    untuned_ms: float | None
    seconds_left: float | None
    phase: str
    message: str

    def __str__(self) -> str:
        parts = [self.status]
        if self.total_trials:
            parts.append(f"{self.trials:,}/{self.total_trials:,} trials")
        if self.trials_per_s:
            parts.append(f"{self.trials_per_s:.2g} trials/s")
        if self.estimate_ms is not None:
            untuned = f" (untuned {self.untuned_ms:,.4g})" if self.untuned_ms is not None else ""
            parts.append(f"model estimate {self.estimate_ms:,.4g} ms{untuned}")
        if self.status == "running" and self.seconds_left is not None:
            minutes, seconds = divmod(round(self.seconds_left), 60)
            parts.append(f"{minutes}:{seconds:02} left")
        if self.message:
            parts.append(self.message)
        return " | ".join(parts)


class Run:
    """A run that was started, here or elsewhere: everything is read from its folder."""

    def __init__(self, folder: RunFolder, process: subprocess.Popen[bytes] | None = None) -> None:
        self.folder = folder
        self._process = process

    @property
    def id(self) -> str:
        """Name of the run folder."""
        return self.folder.id

    @property
    def experiment(self) -> Experiment:
        """What was asked."""
        return self.folder.experiment

    @property
    def status(self) -> str:
        """running, done, stopped or failed."""
        if self._process is not None:
            self._process.poll()  # reaps it once it has ended
        return self.folder.status

    @property
    def progress(self) -> Progress:
        """Where the run is now."""
        state = self.folder.state
        rate = state.trials / state.elapsed_s if state.elapsed_s else 0.0
        return Progress(
            status=state.status,
            trials=state.trials,
            total_trials=state.total_trials,
            elapsed_s=state.elapsed_s,
            trials_per_s=rate,
            estimate_ms=None if state.estimate_s is None else state.estimate_s * 1e3,
            untuned_ms=None if state.untuned_s is None else state.untuned_s * 1e3,
            seconds_left=self._seconds_left(state.trials, state.total_trials, state.elapsed_s, rate),
            phase=state.phase,
            message=state.message,
        )

    def _seconds_left(self, trials: int, total: int, elapsed_s: float, rate: float) -> float | None:
        limit = self.experiment.time_limit_s
        by_time = None if limit is None else max(limit - elapsed_s, 0.0)
        by_trials = (total - trials) / rate if rate else None
        known = [seconds for seconds in (by_time, by_trials) if seconds is not None]
        return min(known) if known else None

    def wait(self, timeout: float | None = None) -> Run:
        """Block until the run has ended, or for `timeout` seconds; returns itself.

        Raises RunError if the run failed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.status == "running":
            if deadline is not None and time.monotonic() >= deadline:
                return self
            time.sleep(_POLL_S)
        state = self.folder.state
        if state.status == "failed":
            raise RunError(f"run {self.id} failed", remedy=state.message or self.folder.log_tail(3))
        return self

    def stop(self, *, wait: bool = True) -> Run:
        """End the search after the trial under way; `resume` continues it. A run that has ended stays as it is."""
        deadline = time.monotonic() + _STOP_GRACE_S
        while self.status == "running":
            state = self.folder.state
            if state.pid and self.folder.is_locked():
                with suppress(ProcessLookupError):  # it ended since, or another holds the lock and has not yet said so
                    os.kill(state.pid, signal.SIGTERM)
                    break
            time.sleep(_POLL_S)  # the process is starting and cannot hear yet
        while wait and self.status == "running":
            if time.monotonic() > deadline:
                raise RunError(f"run {self.id} does not stop", remedy=f"kill process {self.folder.state.pid}")
            time.sleep(_POLL_S)
        return self

    def frame(self) -> pd.DataFrame:
        """The trials as a frame (tvmlab.frames.trials)."""
        from tvmlab import frames

        return frames.trials(self.folder)

    def __repr__(self) -> str:
        return f"<Run {self.id}: {self.progress}>"

    def _repr_html_(self) -> str:
        return f"<b>{html.escape(self.id)}</b>: {html.escape(str(self.progress))}"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        if view is not None:
            return view(self)
        return {"text/plain": repr(self), "text/html": self._repr_html_()}


def tune(experiment: Experiment, runs_dir: str | Path | None = None) -> Run:
    """Start an experiment and return at once; the search runs in a process of its own.

    `run.wait()` blocks, `run.stop()` ends it early. Raises InputError or MissingTool, before anything is written,
    for a model, a target or an earlier run that cannot be used, a missing compiler or a full disk. Warns if another run
    in the folder is under way.

    Example: `tvmlab.tune(tvmlab.Experiment(model="alexnet", steps=[tvmlab.Ansor(max_trials=64)])).wait()`
    """
    parent = Path(runs_dir) if runs_dir is not None else default_runs_dir()
    _check(experiment, parent)
    _warn_of_others(parent)
    return _launch(RunFolder.create(experiment, parent))


def fork(
    run: str | Path | RunFolder | Run, steps: Sequence[Any], *, time_limit_s: float | None = None, name: str = ""
) -> Run:
    """A new run that begins where a finished one ended and goes on with further steps; starts it and returns at once.

    It begins with the other's trials, records and tuning time, in a folder beside it (of this `name`, if one is given);
    `fork.json` there says whose. Two forks of one run differ by their further steps and by nothing else, so these reuse
    nothing from other runs. The further steps together end after `time_limit_s`. Raises RunError if the run is not
    done, InputError for steps that cannot follow its own.

    Example: `tvmlab.fork(run, [tvmlab.Droplet()], time_limit_s=60).wait()`
    """
    origin = RunFolder.open(run.folder if isinstance(run, Run) else run)
    state, asked = origin.state, origin.experiment
    if state.status != "done":
        raise RunError(f"run {origin.id} is {state.status}", remedy="fork it when it is done")
    if not steps:
        raise InputError("a fork needs a step to go on with", remedy="pass one, such as [Droplet()]")
    limit = None if time_limit_s is None else state.elapsed_s + time_limit_s
    values = {field: getattr(asked, field) for field in type(asked).model_fields}
    experiment = Experiment(**{**values, "steps": (*asked.steps, *afresh(steps)), "time_limit_s": limit})
    _check(experiment, origin.path.parent)
    return _launch(_place(experiment, origin.path.parent, name, origin))


def begin(experiment: Experiment, runs_dir: Path, name: str) -> Run:
    """`tune` in a folder of this name, as a search that others are compared with: it reuses nothing."""
    experiment = experiment.afresh()
    _check(experiment, runs_dir)
    return _launch(_place(experiment, runs_dir, name))


def _check(experiment: Experiment, runs_dir: Path) -> None:
    """Everything that keeps a run from starting, before anything is written."""
    check_experiment(experiment)
    require_compiler()
    require_disk(runs_dir)
    check_sources(experiment, named_target(experiment.target), runs_dir)


def _warn_of_others(runs_dir: Path) -> None:
    """Two searches on one machine slow each other down, and each measures that."""
    for path in runs_dir.glob("*/experiment.json"):
        with suppress(TvmlabError):
            if RunFolder(path.parent).status == "running":
                warnings.warn(
                    f"run {path.parent.name} is under way too, and disturbs what this one measures: stop one of them",
                    RuntimeWarning,
                    stacklevel=3,
                )


def _place(experiment: Experiment, runs_dir: Path, name: str, origin: RunFolder | None = None) -> RunFolder:
    """A new run folder, made elsewhere and moved to its place when it is whole: a process that is killed leaves none.

    Raises RunError if there is one of this name.
    """
    runs_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=runs_dir) as scratch:
        folder = RunFolder.create(experiment, scratch)
        if origin is not None:
            _copy(origin, folder)
        path = runs_dir / (name or f"{folder.id}-fork-{uuid.uuid4().hex[:6]}")
        try:
            folder.path.rename(path)
        except OSError as error:
            raise RunError(f"run {path.name} exists", remedy="attach to it, or give another name") from error
    return RunFolder(path)


def _copy(origin: RunFolder, folder: RunFolder) -> None:
    """What a fork has of the run that it goes on from."""
    for pattern in _FORKED:
        for path in origin.path.glob(pattern):
            shutil.copy2(path, folder.path)
    state = origin.state
    folder.write_json("fork.json", {"run": origin.id, "trials": state.trials, "elapsed_s": state.elapsed_s})
    done = len(origin.experiment.stages)
    folder.write_state(replace(state, **_starting(), steps_done=done))


def attach(run: str | Path | RunFolder, runs_dir: str | Path | None = None) -> Run:
    """A run that was started before, by this process or another, by id or folder.

    Raises RecordError if there is none.
    """
    return Run(RunFolder.open(run, runs_dir))


def resume(run: str | Path | RunFolder | Run, runs_dir: str | Path | None = None) -> Run:
    """Continue a stopped or failed run to the total that was asked; a finished one is returned as it is.

    Raises RunError if it is still running.
    """
    folder = RunFolder.open(run.folder if isinstance(run, Run) else run, runs_dir)
    state = folder.state
    if state.status == "running":
        raise RunError(f"run {folder.id} is running", remedy="attach to it instead")
    if state.status == "done":
        return Run(folder)
    check_experiment(folder.experiment, folder)
    folder.acquire().release()  # nobody else may be about to write it
    # With the wall time: of a run of before that was noted it follows from the start, which changes now.
    values = folder.read_json("state.json", missing={}) | {"wall_s": state.wall_s}
    folder.write_json("state.json", values | _starting())
    return _launch(folder)


def runs(runs_dir: str | Path | None = None, *, model: str = "", target: str = "", status: str = "") -> pd.DataFrame:
    """The runs of a folder, the newest first: id, model, target, status, trials, elapsed_s, estimate_ms, message.

    Of these only those of a `model`, on a `target` (a name that `tvmlab.target` takes, however the run named it), or
    with a `status`: running, done, stopped, failed or unreadable. Raises InputError for another status or an unknown
    target.
    """
    import pandas as pd

    if status and status not in _STATUSES:
        raise InputError(f"no run is ever {status!r}", remedy=f"status is one of {', '.join(_STATUSES)}")
    parent = Path(runs_dir) if runs_dir is not None else default_runs_dir()
    wanted = named_target(target) if target else None
    rows = []
    for path in sorted(parent.glob("*/experiment.json"), reverse=True):
        try:
            run = attach(path.parent)
            if wanted is not None and not _is_for(run, target, wanted):
                continue
            rows.append({"run": run.id, "model": run.experiment.model, "target": run.experiment.target, **_row(run)})
        except TvmlabError as error:
            if wanted is None:
                rows.append({"run": path.parent.name, "status": "unreadable", "message": str(error)})
    asked = {name: value for name, value in (("model", model), ("status", status)) if value}
    rows = [row for row in rows if all(row.get(name) == value for name, value in asked.items())]
    columns = ["run", "model", "target", "status", "trials", "elapsed_s", "estimate_ms", "message"]
    return pd.DataFrame(rows, columns=columns).set_index("run")


def _is_for(run: Run, name: str, target: Target) -> bool:
    """Whether a run is on a target; one that has not begun on it yet by the name that its experiment has."""
    if attrs_of(run.folder) is None:
        return run.experiment.target == name
    return is_of(run.folder, target)


def _row(run: Run) -> dict[str, Any]:
    progress = run.progress
    names = ("status", "trials", "elapsed_s", "estimate_ms", "message")
    return {name: getattr(progress, name) for name in names}


def _starting() -> dict[str, Any]:
    return {"status": "running", "pid": 0, "launcher": os.getpid(), "started_s": time.time(), "message": ""}


def _launch(folder: RunFolder) -> Run:
    """Start the search process in a session of its own: a kernel's interrupt, restart or end does not reach it."""
    with (folder.path / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tvmlab.search_process", str(folder.path.resolve())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    # Noted already now, so that a process that dies before it takes the lock is not waited for.
    state = folder.read_json("state.json")
    if state["pid"] == 0:
        folder.write_json("state.json", {**state, "pid": process.pid})
    return Run(folder, process)
