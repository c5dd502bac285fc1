"""The run folder: what was asked, on what machine, and one line a trial.

<id>/experiment.json    the Experiment
     environment.json   machine, versions, git state (here and of tvmlab), the target and its roofline
     tasks.json         the model's tasks (TaskInfo); of weight 0 what a layout step only tried
     assignment.json    the packing of each convolution, and what else it could have had; none where all is NCHW
     fork.json          of a fork: the run that it goes on from, and how far that was
     reuse.json         what it takes from earlier runs (tvmlab.reuse)
     exhausted.json, exhausted_sketches.json   spaces that have nothing more to give, by task (tvmlab.past_records)
     transfer.json      where transferred schedules came from and what became of them (tvmlab.transfer_step)
     selective.json     which tasks are alike, which were searched and why (tvmlab.selective_step)
     minima.json        by step and task, at which local minimum a descent ended
     refine.json        schedules that lost in the whole model (tvmlab.measure.refine)
     trials.jsonl       one Trial a line, appended and flushed
     device.jsonl       on a GPU, a line a batch or comparison: clocks, power, throttled, ... (tvmlab.measure.watch)
     state.json         status, heartbeat, pid
     lock               held by the search process for as long as it lives
     log.txt            what the search process printed
     compare.json       written by tvmlab.compare, profile.json by tvmlab.profile
     report.html        written by tvmlab.report, curve.png by `tvmlab demo`
     database_*.json    TVM's own database (tvm.s_tir.meta_schedule.database.JSONDatabase)
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
import psutil
from filelock import FileLock, Timeout

from tvmlab.core import Assignment, MissingTool, Packing, RecordError, Roofline, RunError, TaskInfo, Trial, TrialStatus
from tvmlab.experiment import Experiment
from tvmlab.locks import is_held

__all__ = ["FORMAT", "MINIMA_FILE", "RunFolder", "State", "TrialWriter", "cut_torn_line", "default_runs_dir"]

FORMAT = 1
MINIMA_FILE = "minima.json"
_BESIDE = ("rival", "rival_latencies_s", "reference_s", "shown")  # of a trial: most have none
_LOCK_WAIT_S = 5.0  # a reader that looks at the status holds the lock for an instant
_STALE_START_S = 120.0  # a search process that has not taken the lock by then never will


def default_runs_dir() -> Path:
    """`runs/` in the working directory, or what the environment variable TVMLAB_RUNS names."""
    return Path(os.environ.get("TVMLAB_RUNS") or "runs")


@dataclass(frozen=True)
class State:
    """state.json: what the search process last said of itself. Times are Unix seconds, durations and estimates seconds.

    `elapsed_s` is the tuning time over all sessions; `wall_s` that of their processes, from the launch: importing and
    lowering the model included; a fork's begin with those of the run that it goes on from. `phases` splits `elapsed_s`
    (search_s, build_wait_s, run_s); `phase` says what goes on now; `steps_done` counts the experiment's stages that are
    finished, which a resumed run passes over. `launcher` is the process that is about to start the search process, for
    as long as there is no `pid`.
    """

    status: str = "running"
    pid: int = 0
    launcher: int = 0
    started_s: float = 0.0
    heartbeat_s: float = 0.0
    elapsed_s: float = 0.0
    wall_s: float = 0.0
    trials: int = 0
    total_trials: int = 0
    steps_done: int = 0
    estimate_s: float | None = None
    untuned_s: float | None = None
    phase: str = ""
    phases: dict[str, float] = field(default_factory=dict)
    message: str = ""


class RunFolder:
    """One run on the disk. Reading needs no TVM; only the search process writes trials.

    >>> import tempfile
    >>> folder = RunFolder.create(Experiment(model="alexnet"), tempfile.mkdtemp())
    >>> folder.experiment.model, folder.status
    ('alexnet', 'running')
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def id(self) -> str:
        """Name of the folder."""
        return self.path.name

    @classmethod
    def create(cls, experiment: Experiment, runs_dir: str | Path | None = None) -> RunFolder:
        """Make a new folder for an experiment; two runs never share one.

        Raises MissingTool if the disk is full or the folder cannot be written.
        """
        parent = Path(runs_dir) if runs_dir is not None else default_runs_dir()
        slug = re.sub(r"[^a-z0-9]+", "-", Path(experiment.model).stem.lower()).strip("-") or "model"
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{slug}-{experiment.steps[0].kind}-s{experiment.seed}"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            folder = cls(_make_unique(parent, stem))
            folder.write_json("experiment.json", {"format": FORMAT, "experiment": experiment.model_dump(mode="json")})
            folder.write_state(State(launcher=os.getpid(), started_s=time.time(), heartbeat_s=time.time()))
        except OSError as error:
            raise _disk_error(parent, error) from error
        return folder

    @classmethod
    def open(cls, run: str | Path | RunFolder, runs_dir: str | Path | None = None) -> RunFolder:
        """A run by folder or by id. Raises RecordError if it is not one this version can read."""
        if isinstance(run, RunFolder):
            return run
        parent = Path(runs_dir) if runs_dir is not None else default_runs_dir()
        path = next((p for p in (Path(run), parent / run) if p.is_dir()), None)
        if path is None:
            known = sorted(p.parent.name for p in parent.glob("*/experiment.json"))[-3:]
            raise RecordError(
                f"no run {str(run)!r} here or in {parent}",
                remedy=f"known are {known}" if known else "none exist yet",
            )
        folder = cls(path)
        folder._check_format()
        return folder

    def _check_format(self) -> None:
        found = self.read_json("experiment.json")
        if not isinstance(found, dict) or "format" not in found or "experiment" not in found:
            raise RecordError(f"{self.path} is not a tvmlab run folder", remedy="pass a folder that tvmlab.tune made")
        if not isinstance(found["format"], int) or found["format"] > FORMAT:
            raise RecordError(
                f"{self.path} was written in format {found['format']!r}, this tvmlab reads up to {FORMAT}",
                remedy="install a newer tvmlab; the folder was not changed",
            )

    @property
    def experiment(self) -> Experiment:
        """What was asked."""
        with self._as_written("experiment.json"):
            asked = self.read_json("experiment.json")["experiment"]
            asked.get("measure", {}).pop("processes", None)  # a knob that there was for a day (decision 15)
        return Experiment.from_json(orjson.dumps(asked))

    @property
    def environment(self) -> dict[str, Any]:
        """Machine, versions, target; empty until the search process has written it."""
        with self._as_written("environment.json"):
            return {**self.read_json("environment.json", missing={})}

    @property
    def roofline(self) -> Roofline | None:
        """The device's measured limits, None if they were not measured."""
        with self._as_written("environment.json"):
            found = self.environment.get("target", {}).get("roofline")
            return Roofline(**found) if found else None

    @property
    def tasks(self) -> list[TaskInfo]:
        """The model's tasks; empty until the search process has extracted them."""
        with self._as_written("tasks.json"):
            return [TaskInfo(**row) for row in self.read_json("tasks.json", missing=[])]

    @property
    def layouts(self) -> dict[str, Any] | None:
        """assignment.json, see tvmlab.frames.layouts; None if the run's model is in NCHW, or was not looked at yet."""
        return self.read_json("assignment.json", missing=None)

    @property
    def assignment(self) -> Assignment | None:
        """The packing of each convolution and dense layer that has one, by the name of its site; None as `layouts`."""
        found = self.layouts
        if found is None:
            return None
        packings = {row["site"]: Packing.parse(row["packing"]) for row in found["sites"]}
        return {site: packing for site, packing in packings.items() if packing.block}

    @property
    def minima(self) -> dict[str, dict[str, str]]:
        """By step and task, how a descent ended that had nothing left to try; empty for runs of before it was noted."""
        return self.read_json(MINIMA_FILE, missing={})

    @property
    def comparison(self) -> dict[str, Any] | None:
        """What tvmlab.compare measured, None if it was not run."""
        return self.read_json("compare.json", missing=None)

    @property
    def state(self) -> State:
        """The last state written, with the status corrected if its process died."""
        state = self._state()
        if state.status != "running" or self.is_locked():
            return state
        # Not yet locked: it is starting, if what starts it did not die over it.
        if time.time() - state.started_s < _STALE_START_S and _is_alive(state.pid or state.launcher):
            return state
        # The process may have written its last word and let go of the lock since the first look.
        state = self._state()
        if state.status != "running":
            return state
        return replace(
            state,
            status="failed",
            message="the search process died; tvmlab resume continues (its output is in log.txt)",
        )

    def _state(self) -> State:
        """The last state written, as it is there."""
        found = self.read_json("state.json", missing={"status": "failed", "message": "state.json is missing"})
        with self._as_written("state.json"):
            if "wall_s" not in found:  # before it was noted; such a run had one session, as far as is known
                before_s = self.read_json("fork.json", missing={}).get("elapsed_s", 0.0)
                found["wall_s"] = before_s + found.get("heartbeat_s", 0.0) - found.get("started_s", 0.0)
            return State(**found)

    @property
    def status(self) -> str:
        """running, done, stopped or failed."""
        return self.state.status

    def lock(self) -> FileLock:
        """The lock that makes its holder the folder's only writer."""
        return FileLock(self.path / "lock", timeout=0)

    def acquire(self) -> FileLock:
        """Become the only writer. Raises RunError if another process is."""
        lock = self.lock()
        try:
            lock.acquire(timeout=_LOCK_WAIT_S)
        except Timeout:
            raise RunError(
                f"run {self.id} is being written by process {self.read_json('state.json', missing={}).get('pid')}",
                remedy="attach to it instead, or stop it first",
            ) from None
        return lock

    def is_locked(self) -> bool:
        """Whether a living process holds the run (the kernel frees the lock of a dead one)."""
        try:
            with self.lock().acquire():
                return False
        except Timeout:
            return True
        except OSError:  # another user's run, or a disk that is read only
            held, last = is_held(self.path / "lock"), self._state()
            return time.time() - max(last.heartbeat_s, last.started_s) < _STALE_START_S if held is None else held

    def write_state(self, state: State) -> None:
        """Replace state.json."""
        self.write_json("state.json", asdict(state))

    def write_json(self, name: str, value: Any) -> None:
        """Replace a file in one step: a reader sees the old or the new one, never half."""
        target = self.path / name
        scratch = target.with_name(f".{name}.{os.getpid()}")
        scratch.write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY))
        scratch.replace(target)

    def read_json(self, name: str, **missing: Any) -> Any:
        """Parse a file of the folder; `missing=` is returned where there is none."""
        path = self.path / name
        try:
            return orjson.loads(path.read_bytes())
        except FileNotFoundError:
            if "missing" in missing:
                return missing["missing"]
            raise RecordError(
                f"{self.path} is not a tvmlab run folder: {name} is missing",
                remedy="pass a folder that tvmlab.tune made",
            ) from None
        except orjson.JSONDecodeError as error:
            raise RecordError(
                f"{path} is damaged ({error})", remedy="restore it from a copy or delete the run"
            ) from None

    @contextmanager
    def _as_written(self, name: str) -> Iterator[None]:
        """Raises RecordError where a file of the folder is JSON, but does not hold what this version knows."""
        try:
            yield
        except (AttributeError, TypeError) as error:
            raise RecordError(
                f"{self.path / name} does not hold what it should ({error})",
                remedy="restore it from a copy, or delete the run; install a newer tvmlab if that wrote it",
            ) from None

    def rows(self) -> Iterator[dict[str, Any]]:
        """The trials as plain dicts, in order. A torn last line (a process killed mid-write) is left out."""
        try:
            lines = (self.path / "trials.jsonl").open("rb")
        except FileNotFoundError:
            return
        with lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    return
                try:
                    yield orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    raise self._damaged_line(number, error) from None

    def trials(self) -> Iterator[Trial]:
        """The trials in the order they ended."""
        for number, row in enumerate(self.rows(), start=1):
            try:
                yield Trial(**{**row, "status": TrialStatus(row["status"])})
            except (KeyError, TypeError, ValueError) as error:
                raise self._damaged_line(number, error) from None

    def _damaged_line(self, number: int, error: Exception) -> RecordError:
        return RecordError(
            f"line {number} of {self.path / 'trials.jsonl'} is damaged ({error})",
            remedy="delete that line; the other trials are whole",
        )

    def batches(self) -> list[dict[str, Any]]:
        """What the GPU told of itself, a row a batch of trials, as of tvmlab.measure.watch; empty on a CPU."""
        path = self.path / "device.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [row for line in lines if line.endswith(b"\n") and "compared" not in (row := orjson.loads(line))]

    def log_tail(self, lines: int = 20) -> str:
        """The last lines the search process printed."""
        path = self.path / "log.txt"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"


class TrialWriter:
    """Appends to trials.jsonl. Opening it cuts off a torn last line, so the next append starts a line of its own."""

    def __init__(self, folder: RunFolder) -> None:
        self._path = folder.path / "trials.jsonl"
        cut_torn_line(self._path)
        self._file = self._path.open("ab", buffering=0)

    def append(self, trial: Trial) -> None:
        """Write one line with a single write call. Raises MissingTool when the disk is full."""
        row = {name: value for name, value in vars(trial).items() if trial.rival or name not in _BESIDE}
        line = orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)
        try:
            written = self._file.write(line)
        except OSError as error:
            raise _disk_error(self._path, error) from error
        if written != len(line):
            raise MissingTool(f"the disk of {self._path} is full", remedy="free space, then tvmlab resume")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def cut_torn_line(path: Path) -> None:
    """Remove what follows the last newline of a file: the half-written line of a process that was killed."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        keep = file.seek(0, os.SEEK_END)
        while keep > 0:
            file.seek(keep - 1)
            if file.read(1) == b"\n":
                break
            keep -= 1
        file.truncate(keep)


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _make_unique(parent: Path, stem: str) -> Path:
    number = 1
    while True:
        path = parent / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


def _disk_error(path: Path, error: OSError) -> MissingTool:
    return MissingTool(
        f"cannot write to {path} ({error.strerror or error})", remedy="free space or choose another runs_dir"
    )
