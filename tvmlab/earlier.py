"""The runs that are in a runs folder, and their records: of every task, of one, of one target. Reading needs no TVM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from tvmlab.columns import TrialReader
from tvmlab.core import TvmlabError
from tvmlab.records import RunFolder

__all__ = ["PAST_COLUMNS", "Device", "attrs_of", "ended", "is_of", "past_frame", "readable"]

_READ = ("run", "model", "target", "task", "task_key", "kernel_class", "strategy", "trial", "status", "latency_us",
         "key", "time_s")  # fmt: skip
PAST_COLUMNS = (*_READ[:-1], "when")


class Device(Protocol):
    """What of a target (tvmlab.targets.Target) tells whose records are whose."""

    @property
    def attrs(self) -> Mapping[str, Any]:
        """What its kernels are built for."""
        ...

    @property
    def label(self) -> str:
        """Which device it is."""
        ...

    @property
    def device(self) -> str | None:
        """Where it runs; None if it is for compiling only."""
        ...


def readable(runs_dir: Path, left_out: Callable[[str, Exception], None] = lambda name, error: None) -> list[RunFolder]:
    """The runs of a folder that this version can read, the newest first; `left_out` is told of the others, and why."""
    found = []
    for path in runs_dir.glob("*/experiment.json"):
        try:
            folder = RunFolder.open(path.parent)
            folder.experiment, folder.environment, folder.tasks  # noqa: B018  what cannot be read is no source
            found.append((folder.state.started_s, folder.id, folder))
        except (TvmlabError, ValueError) as error:
            left_out(path.parent.name, error)
    return [folder for *_, folder in sorted(found, key=lambda item: item[:2], reverse=True)]


def ended(
    runs_dir: Path,
    target: Device,
    itself: str = "",
    left_out: Callable[[str, Exception], None] = lambda name, error: None,
) -> list[RunFolder]:
    """The runs of a folder that are not running and were made on a target, the oldest first.

    `itself` is the id of the run that asks; `left_out` as in `readable`.
    """
    found = [run for run in readable(runs_dir, left_out) if run.id != itself and is_of(run, target)]
    return [run for run in reversed(found) if run.status != "running"]


def is_of(folder: RunFolder, target: Device) -> bool:
    """Whether a run's records are of a target: built for the same attributes, and measured on the same device.

    Two cards may have the same attributes and not the same speed. Where there is no device, as of a target to compile
    for, or of a database that was imported for one, the attributes decide.
    """
    made_on = folder.environment.get("target", {})
    if made_on.get("attrs") != target.attrs:
        return False
    is_nowhere = target.device is None or made_on.get("device", "") is None
    return is_nowhere or made_on.get("label") in (None, target.label)


def attrs_of(folder: RunFolder) -> Mapping[str, Any] | None:
    """The attributes of the target that a run was made for; None until it has begun."""
    return folder.environment.get("target", {}).get("attrs")


def past_frame(runs: Iterable[RunFolder]) -> pd.DataFrame:
    """The trials of some runs, the newest first; of a device those of one task together, the fastest first.

    The default schedules are left out, and readings that were refuted later in their step; what a fork has from its
    origin is listed once, as the origin's. Columns: `PAST_COLUMNS`. Raises RecordError for a damaged run.
    """
    reader, devices = TrialReader((*_READ, "step")), {}
    for run in runs:
        reader.read(run)
        devices[run.id] = str(sorted((attrs_of(run) or {}).items()))  # of one label may be several
    found = reader.frame()
    copied = ["task_key", "step", "trial", "key", "time_s", "latency_us"]
    found = found[found["trial"] > 0].drop_duplicates(copied, keep="last")
    again = found.dropna(subset="latency_us").duplicated(["run", "step", "task_key", "key"], keep="last")
    found = found.drop(index=again[again].index).drop(columns="step")
    found["when"] = pd.to_datetime(found.pop("time_s"), unit="s").dt.round("s")
    for name in ("run", "task_key", "target"):
        found[name] = found[name].astype(object)
    found["device"] = found["run"].map(devices)
    order = ["target", "device", "task_key", "latency_us"]
    return found.sort_values(order, kind="stable", ignore_index=True).drop(columns="device")
