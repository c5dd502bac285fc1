"""Which strategy searches a task in each kind of step, and what it starts from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from tvmlab.compat import read_database
from tvmlab.core import EnumeratedSpace, InputError, Strategy, Trial
from tvmlab.experiment import Ansor, AutoTVM, LayoutTuning
from tvmlab.records import RunFolder
from tvmlab.search.annealing import Annealing
from tvmlab.search.costmodel import CostModel
from tvmlab.search.evolution import Evolution
from tvmlab.search.genetic import Genetic
from tvmlab.search.grid import Grid
from tvmlab.search.random_search import RandomSearch
from tvmlab.search.tuner import Tuner
from tvmlab.session import Session
from tvmlab.spaces.sketch import SketchSpace
from tvmlab.targets import Target
from tvmlab.tasks import Task

__all__ = ["TUNERS", "Strategies", "template_space", "warm_records"]

_RECORDS = 64  # earlier schedules of a task that a search starts from

TUNERS: dict[str, type[Tuner]] = {tuner.name: tuner for tuner in (Annealing, Genetic, RandomSearch, Grid)}


class Strategies(dict[str, Strategy]):
    """The strategy of each task in one step, made when the task is first chosen, from what is known of it.

    Raises InputError if a run in the step's `warm_start` was made for another target.
    """

    def __init__(self, session: Session, number: int, step: Ansor | AutoTVM | LayoutTuning) -> None:
        super().__init__()
        self._session = session
        self._step = step
        self._own = session.trials_of(number)
        runs = [_foreign_run(session, run) for run in step.warm_start]
        self._databases = [session.database, *(read_database(run.path, session.target.kind) for run in runs)]
        self._known = _tuned(session.history)
        self._earlier = _tuned(trial for run in runs for trial in run.trials())
        self._cost_model = CostModel(session.experiment.seed)

    def __missing__(self, key: str) -> Strategy:
        task, step = self._session.tasks[key], self._step
        if isinstance(step, Ansor):
            self[key] = self._evolution(task, step)
        else:
            space = template_space(task, self._session.target)
            self[key] = self._evolution(task, Ansor()) if space is None else self._tuner(space, step.tuner)
        return self[key]

    def _evolution(self, task: Task, options: Ansor) -> Strategy:
        records = [record for database in self._databases for record in warm_records(database, task)]
        return Evolution(
            SketchSpace(task.key, task.module, self._session.target.to_tvm()),
            seed=self._session.experiment.seed,
            population=options.population,
            generations=options.generations,
            cost_model=self._cost_model,
            known=[trial.key for trial in self._own.get(task.key, ())],
            records=sorted(records, key=lambda record: record[1])[:_RECORDS],
        )

    def _tuner(self, space: EnumeratedSpace, name: str) -> Strategy:
        """From the points that any tuner measured, in this step or another."""
        known, earlier = (trials.get(space.task_key, ()) for trials in (self._known, self._earlier))
        return TUNERS[name](space, seed=self._session.experiment.seed, known=known, earlier=earlier)


def template_space(task: Task, target: Target) -> EnumeratedSpace | None:
    """The template space of a task; None where no template covers it."""
    from tvmlab.spaces.template import TemplateSpace, template_for

    if template_for(task.module, target.to_tvm()) is None:
        return None
    return TemplateSpace(task.key, task.module, target.to_tvm())


def warm_records(database: Any, task: Task) -> list[tuple[Any, float]]:
    """The fastest measured schedules of a task in a TVM database: traces and latencies in seconds."""
    if not database.has_workload(task.module):
        return []
    found = database.get_top_k(database.commit_workload(task.module), _RECORDS)
    return [
        (record.trace, sorted(map(float, record.run_secs))[len(record.run_secs) // 2])
        for record in found
        if record.run_secs and len(record.trace.insts) > 0
    ]


def _tuned(trials: Iterable[Trial]) -> dict[str, list[Trial]]:
    """The trials that measured a point of a template space, by task."""
    found: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        if trial.strategy in TUNERS:
            found[trial.task_key].append(trial)
    return found


def _foreign_run(session: Session, run: str) -> RunFolder:
    """An earlier run to start from. Raises InputError if it was made for another target."""
    other = RunFolder.open(run, session.folder.path.parent)
    made_for = other.environment.get("target", {}).get("attrs")
    if made_for != session.target.attrs:
        raise InputError(
            f"run {other.id} was tuned for {made_for}, this one is for {session.target.attrs}",
            remedy="leave it out of warm_start: records of another target mislead the search",
        )
    return other
