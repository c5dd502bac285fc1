"""A study on the disk, read without TVM: its definition, its runs, and what was timed of them, as tidy frames.

<study>/study.json          the Study, and the target that it was begun on
        runs/<cell>/        a run folder for each cell of the plan
        comparisons/        whole models timed in turns: one file for each model and seed
        refused.json        why a run could not begin
        lock                held by the process that carries the study out
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import orjson
import pandas as pd
from filelock import FileLock

from tvmlab import frames
from tvmlab.comparison_rows import in_shared_turns
from tvmlab.core import InputError, RecordError
from tvmlab.records import RunFolder, State
from tvmlab.sources import TRANSFER_FILE
from tvmlab.stats import turn_ratio
from tvmlab.study_design import BASELINES, Cell, Study, label, plan

__all__ = ["FORMAT", "StudyFolder"]

FORMAT = 1
_FILE = "study.json"
_REFUSED = "refused.json"
_FRAME = (
    "model", "source", "arm", "seed", "status", "estimate_ms", "untuned_estimate_ms", "end_to_end_ms", "untuned_ms",
    "onnxruntime_ms", "speedup", "vs_onnxruntime", "search_s", "source_search_s", "trials", "transferred", "max_error",
    "repeats",
    "run", "message",
)  # fmt: skip
_KEYS = ["model", "source", "arm", "seed"]


class StudyFolder:
    """A study that was begun. `frame()`, `samples()` and `curves()` read it at any moment, finished or not."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: str | Path | StudyFolder) -> StudyFolder:
        """A study by its folder. Raises RecordError if it is none that this version can read."""
        if isinstance(path, StudyFolder):
            return path
        folder = cls(Path(path))
        if not cls.is_study(path):
            raise RecordError(f"{str(path)!r} is not a study", remedy="pass a folder that tvmlab.study made")
        found = folder._about.get("format")
        if not isinstance(found, int) or found > FORMAT:
            raise RecordError(f"{folder.path} was written in format {found!r}, this tvmlab reads up to {FORMAT}",
                              remedy="install a newer tvmlab; the folder was not changed")  # fmt: skip
        return folder

    @staticmethod
    def is_study(path: Any) -> bool:
        """Whether something is a study, or the path of one."""
        if isinstance(path, str | Path):
            return (Path(path) / _FILE).is_file()
        return isinstance(path, StudyFolder)

    @classmethod
    def create(cls, path: str | Path, definition: Study, target: Mapping[str, Any]) -> StudyFolder:
        """A new study, to be run on this target (its label and attrs).

        Raises InputError if something else is in the folder, or it cannot be written.
        """
        folder = cls(Path(path))
        if folder.path.exists() and (not folder.path.is_dir() or any(folder.path.iterdir())):
            raise InputError(f"{str(path)!r} exists and is not a study", remedy="name another folder")
        about = {"format": FORMAT, "study": definition.model_dump(mode="json"), "target": dict(target),
                 "begun_s": time.time()}  # fmt: skip
        try:
            (folder.path / "runs").mkdir(parents=True)
            (folder.path / "comparisons").mkdir()
            folder._write(folder.path / _FILE, about)
        except OSError as error:
            raise InputError(f"cannot write {str(path)!r} ({error.strerror})", remedy="name another folder") from error
        return folder

    @cached_property
    def _about(self) -> dict[str, Any]:
        return _read(self.path / _FILE)

    @cached_property
    def definition(self) -> Study:
        """What was asked."""
        return Study.from_json(orjson.dumps(self._about["study"]))

    @property
    def target(self) -> dict[str, Any]:
        """Label and attributes of the target it was begun on."""
        return self._about["target"]

    @cached_property
    def plan(self) -> list[Cell]:
        """The runs it takes, in order; those with an arm are the cells of the frame."""
        return plan(self.definition)

    def lock(self) -> FileLock:
        """Held by the process that carries the study out."""
        return FileLock(self.path / "lock", timeout=0)

    def run_of(self, cell: Cell) -> RunFolder | None:
        """The run of a cell, None if it has not begun."""
        path = self.path / "runs" / cell.name
        return RunFolder.open(path) if path.is_dir() else None

    def state_of(self, cell: Cell) -> State:
        """The state of a cell's run; its status is "waiting" before it begins."""
        run = self.run_of(cell)
        if run is not None:
            return run.state
        why = self._refused().get(cell.name)
        return State(status="waiting") if why is None else State(status="failed", message=why)

    def refuse(self, cell: Cell, message: str) -> None:
        """Note why the run of a cell could not begin."""
        self._write(self.path / _REFUSED, self._refused() | {cell.name: message})

    def _refused(self) -> dict[str, str]:
        path = self.path / _REFUSED
        return _read(path) if path.exists() else {}

    def cells_of(self, model: str, seed: int) -> list[Cell]:
        """The arms of a model and seed, which are timed together."""
        return [cell for cell in self.plan if (cell.model, cell.seed) == (model, seed) and cell.arm]

    def comparison(self, model: str, seed: int) -> dict[str, Any] | None:
        """What was timed of a model and seed, None if nothing was: subjects (cell or baseline: samples_ms, turns),
        numerics (max error / max output), threads, took_s; only `error`, if it failed."""
        path = self._comparison_path(model, seed)
        return _read(path) if path.exists() else None

    def write_comparison(self, model: str, seed: int, found: Mapping[str, Any]) -> None:
        """Keep what was timed of a model and seed."""
        self._write(self._comparison_path(model, seed), dict(found))

    def _comparison_path(self, model: str, seed: int) -> Path:
        return self.path / "comparisons" / f"{label(model)}-s{seed}.json"

    def _write(self, path: Path, value: Any) -> None:
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        scratch.write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY))
        scratch.replace(path)

    @property
    def is_done(self) -> bool:
        """Whether every run is done and every arm was timed."""
        return not self.problems and all(self.state_of(cell).status == "done" for cell in self.plan) and all(
            {cell.name for cell in self.cells_of(model, seed)} <= _subjects(self.comparison(model, seed)).keys()
            for model, seed in self._timings()
        )  # fmt: skip

    @property
    def problems(self) -> list[str]:
        """What failed, a sentence each. `tvmlab.study` of the folder tries it again."""
        failed = [(cell, self.state_of(cell)) for cell in self.plan]
        said = [f"run {cell.name} failed: {state.message}" for cell, state in failed if state.status == "failed"]
        timed = [(f"{label(model)}, seed {seed}", self.comparison(model, seed)) for model, seed in self._timings()]
        return said + [f"{what} could not be timed: {found['error']}" for what, found in timed
                       if found and "error" in found]  # fmt: skip

    def _timings(self) -> Iterator[tuple[str, int]]:
        return ((model, seed) for seed in self.definition.seeds for model in self.definition.models)

    @property
    def environment(self) -> dict[str, Any]:
        """Machine, versions and target, as the first run noted them; empty before."""
        runs = filter(None, map(self.run_of, self.plan))
        return next((run.environment for run in runs if run.environment), {})

    @property
    def title(self) -> str:
        """What was studied, where."""
        return f"{', '.join(map(label, self.definition.models))} on {self.target['label']}"

    def code(self) -> str:
        """The Python that carries out the same study again, in a new folder."""
        asked = self.definition.code()
        for arm in self.definition.arms:  # a line each
            for before in ("{", ", "):
                asked = asked.replace(f"{before}{arm!r}: [", f"{before.strip()}\n    {arm!r}: [")
        names = sorted(name for name in _NAMES if f"{name}(" in asked)
        return f'import tvmlab\nfrom tvmlab import {", ".join(names)}\n\nstudy = tvmlab.study("again", {asked})'

    def frame(self) -> pd.DataFrame:
        """One row a cell: model x source x arm x seed.

        Columns: model, source ("" for an arm that has none), arm, seed, status (waiting, running, done, stopped,
        failed), estimate_ms and untuned_estimate_ms (model estimates), end_to_end_ms, untuned_ms and onnxruntime_ms
        (medians of whole inferences, timed in turns), speedup (untuned over this), vs_onnxruntime (this over
        onnxruntime, below 1: faster; both stats.turn_ratio), search_s (wall time of all its steps, from the start of
        their processes, that of the search that it shares with others included), source_search_s (that of the runs it
        transfers from), trials, transferred (schedules that it tried because another run had them; NaN for an arm that
        has no source), max_error (max error / max output against onnxruntime), repeats (timed inferences), run,
        message. NaN for what is not known yet.
        """
        rows = [self._row(cell) for cell in self.plan if cell.arm]
        return pd.DataFrame(rows, columns=_FRAME)

    def _row(self, cell: Cell) -> dict[str, Any]:
        state = self.state_of(cell)
        timed = self.comparison(cell.model, cell.seed) or {}
        ours, untuned, other = (_median_ms(timed, name) for name in (cell.name, *BASELINES))
        return {
            **_identity(cell),
            "status": state.status,
            "estimate_ms": _ms(state.estimate_s),
            "untuned_estimate_ms": _ms(state.untuned_s),
            "end_to_end_ms": ours,
            "untuned_ms": untuned,
            "onnxruntime_ms": other,
            "speedup": _ratio(timed, BASELINES[0], cell.name),
            "vs_onnxruntime": _ratio(timed, cell.name, BASELINES[1]),
            "search_s": state.wall_s,
            "source_search_s": sum(self.state_of(other).wall_s for other in self._read_by(cell)),
            "trials": state.trials,
            "transferred": self._transferred(cell),
            "max_error": timed.get("numerics", {}).get(cell.name, math.nan),
            "repeats": len(_samples_ms(timed, cell.name)),
            "run": cell.name,
            "message": state.message,
        }

    def _transferred(self, cell: Cell) -> float:
        """How many schedules of other runs a cell has tried; NaN if it was to try none, or has not begun."""
        run = self.run_of(cell)
        if run is None or not self._read_by(cell):
            return math.nan
        return sum(bool(row["key"]) for row in run.read_json(TRANSFER_FILE, missing={"rows": []})["rows"])

    def _read_by(self, cell: Cell) -> list[Cell]:
        """The cells that a cell, or one that it branches from, transfers from, each once."""
        cells = {other.name: other for other in self.plan}
        names = {name for sources in cell.sources.values() for name in sources}
        while cell.parent:
            cell = cells[cell.parent]
            names |= {name for sources in cell.sources.values() for name in sources}
        return [cells[name] for name in sorted(names)]

    def samples(self) -> pd.DataFrame:
        """Every timed inference: model, source, arm (also "untuned" and "onnxruntime"), seed, repeat, turn, latency_ms.

        All of a model and seed were taken in turns, so they share what drifted; a slow one took only some (`turn` says
        which; <NA> in a study of before that was noted). On a GPU it is the median of a turn's five inferences.
        """
        rows = []
        for model, seed in self._timings():
            subjects = _subjects(self.comparison(model, seed))
            named = {cell.name: _identity(cell) for cell in self.cells_of(model, seed)}
            for name, subject in subjects.items():
                row = named.get(name, {"model": label(model), "source": "", "arm": name, "seed": seed})
                turns = subject.get("turns", [None] * len(subject["samples_ms"]))
                taken = enumerate(zip(turns, subject["samples_ms"], strict=True))
                rows += [{**row, "repeat": n, "turn": turn, "latency_ms": ms} for n, (turn, ms) in taken]
        return pd.DataFrame(rows, columns=[*_KEYS, "repeat", "turn", "latency_ms"]).astype({"turn": "Int64"})

    def curves(self) -> pd.DataFrame:
        """The model estimate over tuning time, a row a trial: model, source, arm, seed, trial, elapsed_s, estimate_ms.

        The time of an arm that branches from another begins with the other's; that of the runs it transfers from is
        not in it (see `source_search_s` of the frame).
        """
        parts = []
        for cell in self.plan:
            run = self.run_of(cell)
            if cell.arm and run is not None and run.tasks:
                curve = frames.curve(run, by="elapsed_s")[["trial", "elapsed_s", "estimate_ms"]]
                parts.append(curve.assign(**_identity(cell)))
        columns = [*_KEYS, "trial", "elapsed_s", "estimate_ms"]
        return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)

    def __repr__(self) -> str:
        states = [self.state_of(cell).status for cell in self.plan]
        return f"<Study {self.path}: {states.count('done')} of {len(states)} runs done>"

    def _repr_html_(self) -> str:
        return (
            self.frame().drop(columns=["run", "message"]).to_html(index=False, na_rep="", float_format="{:.4g}".format)
        )


# What a definition's code may name; all are public names of tvmlab.
_NAMES = ("Ansor", "AutoTVM", "Droplet", "LayoutTuning", "Measure", "Repeat", "Selective", "Study", "Timed",
          "TransferTuning")  # fmt: skip


def _identity(cell: Cell) -> dict[str, Any]:
    return {"model": label(cell.model), "source": label(cell.source) if cell.source else "", "arm": cell.arm,
            "seed": cell.seed}  # fmt: skip


def _ms(seconds: float | None) -> float:
    return math.nan if seconds is None else seconds * 1e3


def _subjects(timed: dict[str, Any] | None) -> dict[str, Any]:
    return (timed or {}).get("subjects", {})


def _samples_ms(timed: dict[str, Any], name: str) -> list[float]:
    return list(_subjects(timed).get(name, {}).get("samples_ms", ()))


def _median_ms(timed: dict[str, Any], name: str) -> float:
    found = _samples_ms(timed, name)
    return median(found) if found else math.nan


def _ratio(timed: dict[str, Any], above: str, below: str) -> float:
    subjects = _subjects(timed)
    if not {above, below} <= subjects.keys():
        return math.nan
    return turn_ratio(*in_shared_turns(subjects[above], subjects[below]))


def _read(path: Path) -> Any:
    try:
        return orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise RecordError(f"{path} is damaged ({error})", remedy="delete it, and what it holds is made again") from None
