"""How long a study still takes: from its limits and budgets, corrected by what its finished parts took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvmlab.rates import building_cores, guessed_rate
from tvmlab.steps import Repeat
from tvmlab.study_design import BASELINES, Cell, Study, Timed, plan
from tvmlab.study_folder import StudyFolder

__all__ = ["START_S", "duration_text", "remaining_s"]

START_S = 7.0  # to import and lower a model; its default schedules are measured within the limit
_LOAD_S = 12.0  # to compile and time a whole model, two at once


def remaining_s(study: Study | StudyFolder, tunable_tasks: Mapping[str, int]) -> float:
    """Seconds that a study still takes; of a definition, all of it.

    A step counts with its time limit or with the time that its trials take, whichever is shorter; `tunable_tasks` has
    the number of each model's tasks, and is asked only where no limit says enough.
    """
    folder = study if isinstance(study, StudyFolder) else None
    design = study if isinstance(study, Study) else study.definition
    runs, timings = _Ledger(), _Ledger()
    cells = plan(design)
    for cell in cells:
        expected = START_S + _step_s(design, cell.model, cell.steps[-1], tunable_tasks)
        state = folder.state_of(cell) if folder else None
        done = state is not None and state.status == "done"
        runs.enter(expected, state.wall_s - _before_s(folder, cell) if folder and state and done else None)
    for seed in design.seeds:
        for model in design.models:
            arms = sum((cell.model, cell.seed, bool(cell.arm)) == (model, seed, True) for cell in cells)
            found = (folder.comparison(model, seed) if folder else None) or {}
            timings.enter(_LOAD_S * (arms + len(BASELINES)), found.get("took_s"))
    return runs.left_s + timings.left_s


def _before_s(folder: StudyFolder, cell: Cell) -> float:
    """What a cell's run took before it branched from another."""
    parent = next((other for other in folder.plan if other.name == cell.parent), None)
    return folder.state_of(parent).wall_s if parent else 0.0


class _Ledger:
    """Expected and actual times of like things."""

    def __init__(self) -> None:
        self._expected = self._took = self._left = 0.0

    def enter(self, expected_s: float, took_s: float | None) -> None:
        """One thing; `took_s` is None if it is not finished."""
        if took_s is None:
            self._left += expected_s
        else:
            self._expected += expected_s
            self._took += took_s

    @property
    def left_s(self) -> float:
        """What the rest takes, if it is expected as wrongly as the finished part was."""
        return self._left * (self._took / self._expected if self._took else 1.0)


def _step_s(design: Study, model: str, stage: Any, tunable_tasks: Mapping[str, int]) -> float:
    """How long a step may take, by its limit and its trials."""
    step, limit = (stage.step if isinstance(stage, Timed) else stage), design.limit_of(stage)
    several = [*step.steps] * step.times if isinstance(step, Repeat) else [step]
    capped = [getattr(one, "max_trials", None) for one in several]
    if limit is not None and None in capped:
        return limit
    trials = [most or one.total_trials(tunable_tasks[model]) for one, most in zip(several, capped, strict=True)]
    cores = building_cores(design.measure)
    trials_s = sum(count / guessed_rate(one.kind, cores) for one, count in zip(several, trials, strict=True))
    return trials_s if limit is None else min(limit, trials_s)


def duration_text(seconds: float) -> str:
    """A duration to read.

    >>> duration_text(50), duration_text(1500), duration_text(9000)
    ('50 s', '25 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.2g} h"
