"""Carry a study out: its runs in the order of their dependencies, then whole models timed in turns."""

from __future__ import annotations

import builtins
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout
from tqdm import tqdm

from tvmlab.compare import compare_runs
from tvmlab.core import InputError, RunError, TvmlabError
from tvmlab.experiment import Experiment
from tvmlab.overview import tasks
from tvmlab.run import Run, begin, fork, resume
from tvmlab.search_process import check_experiment
from tvmlab.study_design import BASELINES, Cell, Study, label
from tvmlab.study_folder import StudyFolder
from tvmlab.study_length import duration_text, remaining_s
from tvmlab.targets import target as named_target

__all__ = ["study", "study_length_s"]

_LOOK_S = 0.5


def study(
    folder: str | Path | StudyFolder, definition: Study | None = None, *, progress: bool = True, **knobs: Any
) -> StudyFolder:
    """Carry out a study in a folder, or go on with the one that is there, and return it when all is done.

    The knobs are those of `tvmlab.Study`; or pass one, or for a folder that has one nothing. It may be interrupted or
    killed at any moment: the same call goes on, and does not repeat a finished run. What fails is noted
    (`.problems`), does not stop the rest, and is tried again by the same call.

    Raises InputError for a definition other than the folder's, another machine's folder, or what cannot be tuned;
    RunError if another process is at it.

    Example: `tvmlab.study("pairs", models=["alexnet", "resnet50"], time_limit_s=60, arms={"ansor": [tvmlab.Ansor()],
    "ansor+droplet": [tvmlab.Ansor(), tvmlab.Droplet()], "transfer": [tvmlab.TransferTuning("$source:ansor")]})`
    """
    if definition is not None and knobs:
        raise InputError("a definition and knobs were given", remedy="pass one of them")
    opened = _opened(folder, Study(**knobs) if knobs else definition)
    with _held(opened), _Line(opened, progress) as line:
        for seed in opened.definition.seeds:
            for cell in opened.plan:
                if cell.seed == seed:
                    _run(opened, cell, line)
            for model in opened.definition.models:
                _compare(opened, model, seed, line)
    return opened


@contextmanager
def _held(study: StudyFolder) -> Iterator[None]:
    """Be the only one who carries it out; raises RunError if another process does."""
    lock = study.lock()
    try:
        lock.acquire()
    except Timeout:
        raise RunError(f"another process is carrying out {study.path}", remedy="wait for it, or stop it") from None
    try:
        yield
    finally:
        lock.release()


def study_length_s(study: Study | StudyFolder) -> float:
    """About how long a study still takes, in seconds; of a definition, all of it.

    From its limits and budgets, corrected by what its finished parts took. Nothing is measured; where no limit says
    enough, its models are lowered to count their tasks.

    Example: `tvmlab.study_length_s(tvmlab.study_of_the_report((0,))) / 60`
    """
    return remaining_s(study, _Tunable((study if isinstance(study, Study) else study.definition).target))


class _Tunable(dict[str, int]):
    """How many tunable tasks a model has, found out when first asked: it takes seconds to lower a model."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self._target = target

    def __missing__(self, model: str) -> int:
        self[model] = int(tasks(model, self._target)["tunable"].sum())
        return self[model]


def _opened(folder: str | Path | StudyFolder, asked: Study | None) -> StudyFolder:
    """The study of a folder, begun if there is none."""
    if not StudyFolder.is_study(folder):
        if asked is None:
            raise InputError(f"{str(folder)!r} is not a study", remedy="pass its definition, such as models=[...]")
        for model in asked.models:
            check_experiment(Experiment(model=model, target=asked.target, batch=asked.batch))
        return StudyFolder.create(str(folder), asked, _target(asked))
    opened = StudyFolder.open(folder)
    if asked is not None:
        _check_same(opened, asked)
    here = _target(opened.definition)
    if opened.target != here:
        raise InputError(
            f"study {opened.path} was begun on {opened.target['label']}, this is {here['label']}",
            remedy="go on with it there, or begin another here",
        )
    return opened


def _target(design: Study) -> dict[str, Any]:
    found = named_target(design.target)
    return {"label": found.label, "attrs": found.attrs}


def _check_same(opened: StudyFolder, asked: Study) -> None:
    """Raise InputError unless the study in the folder is the one asked for."""
    there = opened.definition
    for name in Study.model_fields:
        before, now = getattr(there, name), getattr(asked, name)
        if name == "repeats" and now is None:  # as many as are needed: a study of before, which had a number, keeps it
            continue
        if before != now:
            if isinstance(now, dict):
                arm = next(arm for arm in (*before, *now) if before.get(arm) != now.get(arm))
                name, before, now = f"arm {arm!r}", before.get(arm, "missing"), now.get(arm, "missing")
            raise InputError(
                f"the study in {opened.path} has another definition: {name} is {before} there, {now} here",
                remedy="use another folder, or pass only the folder to go on with the study that is there",
            )


def _run(study: StudyFolder, cell: Cell, line: _Line) -> None:
    """Do a cell's run, from where it is."""
    if study.state_of(cell).status == "done":
        return
    needed = {name for name in (cell.parent, *sum(cell.sources.values(), ())) if name}
    missing = [other.name for other in study.plan if other.name in needed and study.state_of(other).status != "done"]
    if missing:
        study.refuse(cell, f"it needs {', '.join(missing)}")
        line.note(f"{cell.name} cannot begin: it needs {', '.join(missing)}")
        return
    try:
        run = _start(study, cell)
    except TvmlabError as error:  # such as a source without a single tuned kernel
        study.refuse(cell, str(error))
        line.note(f"{cell.name} cannot begin: {error}")
        return
    try:
        while run.status == "running":
            line.show(f"{cell.name}: {run.progress}")
            time.sleep(_LOOK_S)
    except KeyboardInterrupt:
        line.note(f"stopping {cell.name}; the same call goes on with it")
        run.stop()
        raise
    line.note(f"{cell.name}: {run.progress}")


def _start(study: StudyFolder, cell: Cell) -> Run:
    """The run of a cell, under way."""
    there = study.run_of(cell)
    if there is not None:
        return Run(there) if there.status == "running" else resume(there)
    design, limit = study.definition, study.definition.limit_of(cell.steps[-1])
    runs_dir = study.path / "runs"
    if cell.parent:
        return fork(runs_dir / cell.parent, [cell.last_step], time_limit_s=limit, name=cell.name)
    experiment = Experiment(
        model=cell.model, target=design.target, batch=design.batch, seed=cell.seed, steps=(cell.last_step,),
        time_limit_s=limit, measure=design.measure,
    )  # fmt: skip
    return begin(experiment, runs_dir, cell.name)


def _compare(study: StudyFolder, model: str, seed: int, line: _Line) -> None:
    """Time the finished arms of a model and seed in turns, unless that was done."""
    there = {cell.name: study.run_of(cell) for cell in study.cells_of(model, seed)}
    runs = {name: run for name, run in there.items() if run is not None and run.status == "done"}
    before = study.comparison(model, seed) or {}
    if not runs or runs.keys() <= before.get("subjects", {}).keys():
        return
    line.show(f"timing {label(model)}, seed {seed}: {len(runs)} arms beside {' and '.join(BASELINES)}")
    began = time.monotonic()
    try:
        found = compare_runs(runs, BASELINES, repeats=study.definition.repeats)
    except TvmlabError as error:
        study.write_comparison(model, seed, before | {"error": str(error)})  # what was timed before stays
        line.note(f"{label(model)}, seed {seed} could not be timed: {error}")
        return
    study.write_comparison(model, seed, found | {"took_s": time.monotonic() - began})
    line.note(f"{label(model)}, seed {seed}: {len(runs)} arms timed")


class _Line:
    """One line that says where a study is; where it cannot be overwritten, a line for each part that is finished."""

    def __init__(self, study: StudyFolder, shown: bool) -> None:
        self._study = study
        self._shown = shown
        # IPython puts `display` among the builtins. A notebook keeps all that tqdm overwrites, line by line; a terminal
        # keeps all that `display` updates.
        display = getattr(builtins, "display", None) if shown and "ipykernel" in sys.modules else None
        self._cell = display(_plain(""), raw=True, display_id=True) if display else None
        self._live = shown and (self._cell is not None or sys.stderr.isatty())
        self._bar = tqdm(
            bar_format="{desc}", mininterval=0, dynamic_ncols=True, disable=not self._live or self._cell is not None
        )
        self._left = ""
        self._tunable = _Tunable(study.definition.target)

    def __enter__(self) -> _Line:
        self.note(f"study {self._study.path.name}")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def _look(self) -> None:
        if not self._shown:
            return
        states = [self._study.state_of(cell).status for cell in self._study.plan]
        left = duration_text(remaining_s(self._study, self._tunable))
        self._left = f"{states.count('done')} of {len(states)} done, about {left} left"

    def show(self, text: str) -> None:
        """What goes on now."""
        if self._cell is not None:
            self._cell.update(_plain(f"{self._left}\n{text}"), raw=True)
        self._bar.set_description_str(f"{self._left} | {text}")

    def note(self, text: str) -> None:
        """Something is finished."""
        self._look()
        self.show(text)
        if self._shown and not self._live:
            print(f"{self._left} | {text}", file=sys.stderr, flush=True)


def _plain(text: str) -> dict[str, str]:
    return {"text/plain": text}
