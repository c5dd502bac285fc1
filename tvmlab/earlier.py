"""The runs that are in a runs folder, and their records: of every task, of one, of one target. Reading needs no TVM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from tvmlab.columns import TrialReader
from tvmlab.core import TvmlabError
from tvmlab.records import RunFolder

__all__ = ["PAST_COLUMNS", "attrs_of", "ended", "past_frame", "readable"]

_READ = ("run", "model", "target", "task", "task_key", "kernel_class", "strategy", "trial", "status", "latency_us",
         "key", "time_s")  # fmt: skip
PAST_COLUMNS = (*_READ[:-1], "when")


def readable(runs_dir: Path) -> list[RunFolder]:
    """The runs of a folder that this version can read, the newest first."""
    found = []
    for path in runs_dir.glob("*/experiment.json"):
        try:
            folder = RunFolder.open(path.parent)
            folder.experiment  # noqa: B018  what cannot be read is no source
            found.append((folder.read_json("state.json", missing={}).get("started_s", 0.0), folder.id, folder))
        except (TvmlabError, ValueError):
            continue
    return [folder for *_, folder in sorted(found, key=lambda item: item[:2], reverse=True)]


def ended(runs_dir: Path, attrs: Mapping[str, Any], itself: str = "") -> list[RunFolder]:
    """The runs of a folder that are not running and were made for the target with these attributes, the oldest first.

    `itself` is the id of the run that asks.
    """
    found = [run for run in readable(runs_dir) if run.id != itself and attrs_of(run) == attrs]
    return [run for run in reversed(found) if run.status != "running"]


def attrs_of(folder: RunFolder) -> Mapping[str, Any] | None:
    """The attributes of the target that a run was made for; None until it has begun."""
    return folder.environment.get("target", {}).get("attrs")


def past_frame(runs: Iterable[RunFolder]) -> pd.DataFrame:
    """The trials of some runs, the default schedules left out, those of one task and target together, fastest first.

    Columns: `PAST_COLUMNS`. Raises RecordError for a damaged run.
    """
    reader = TrialReader(_READ)
    for run in runs:
        reader.read(run)
    found = reader.frame()
    found = found[found["trial"] > 0]
    found["when"] = pd.to_datetime(found.pop("time_s"), unit="s").dt.round("s")
    for name in ("task_key", "target"):
        found[name] = found[name].astype(object)
    return found.sort_values(["task_key", "target", "latency_us"], kind="stable", ignore_index=True)
