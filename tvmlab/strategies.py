"""Which strategy searches a task in each kind of step, and what it starts from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from operator import itemgetter
from typing import Any

from tvmlab.compat import read_database
from tvmlab.core import Candidate, EnumeratedSpace, Strategy, Trial, standing
from tvmlab.experiment import Ansor, AutoTVM, Droplet, LayoutTuning, TransferTuning
from tvmlab.records import RunFolder
from tvmlab.reuse import PAST
from tvmlab.search.annealing import Annealing
from tvmlab.search.costmodel import CostModel
from tvmlab.search.droplet import Droplet as Descent
from tvmlab.search.droplet_tuner import DropletTuner
from tvmlab.search.evolution import Evolution
from tvmlab.search.fallback import Fallback
from tvmlab.search.genetic import Genetic
from tvmlab.search.grid import Grid
from tvmlab.search.random_search import RandomSearch
from tvmlab.search.scout import apart
from tvmlab.search.tuner import Tuner
from tvmlab.search.walkable import Numbered, Walkable
from tvmlab.session import Session
from tvmlab.sources import warm_run
from tvmlab.spaces.sketch import SketchSpace
from tvmlab.targets import Target
from tvmlab.tasks import Task
from tvmlab.transfer_step import Transfers

__all__ = ["TUNERS", "Strategies", "template_space", "warm_records"]

_RECORDS = 64  # earlier schedules of a task that a search starts from
_STARTS = 8  # the fastest of them, of which a descent begins at the first that can be made again and has knobs
# The next fastest records are timed beside the fastest before a descent: one for so many of its trials, and for so many
# earlier ones: the fewer readings, the less luck is in the lowest, and the more there is to find nearby.
_CONTENDED = 8
_READINGS = 10
_BORN, _ANCESTORS = 0.5, 6  # of a descent's trials are children, one for so many earlier trials of the task at most

# Schedules that a descent starts from, with latencies in seconds as far as they are known.
_Starts = list[tuple[Candidate, float | None]]

_ALSO = ("droplet", "transfer", PAST)  # strategies whose trials may be of a template or of a sketch

TUNERS: dict[str, type[Tuner]] = {tuner.name: tuner for tuner in (Annealing, Genetic, RandomSearch, Grid, DropletTuner)}


class Strategies(dict[str, Strategy]):
    """The strategy of each task in one step, made when the task is first chosen, from what is known of it.

    Raises InputError if a run in the step's `warm_start` was made for another target.
    """

    def __init__(
        self, session: Session, number: int, step: Ansor | AutoTVM | LayoutTuning | Droplet | TransferTuning
    ) -> None:
        super().__init__()
        self._session = session
        self._step = step
        self._number = number
        self._own = session.trials_of(number)
        self._runs = [warm_run(run, session.target, session.folder.path.parent) for run in step.warm_start]
        self._reuse = session.reuse if isinstance(step, Ansor | AutoTVM) and step.reuse else None
        self._warm = [trial for run in self._runs for trial in standing(list(run.trials()))]
        self._earlier = _tuned(self._warm)
        self._spaces: dict[str, SketchSpace] = {}
        self._cost_model = CostModel(session.experiment.seed)
        self._transfers = Transfers(session, number, step) if isinstance(step, TransferTuning) else None

    @cached_property
    def _databases(self) -> list[Any]:
        """This run's, those of `warm_start`, and of the runs that are reused the fastest records."""
        kind = self._session.target.kind
        reused = [
            run
            for run in (self._reuse.runs if self._reuse else [])
            if run.path not in {known.path for known in self._runs}
        ]
        return [
            self._session.database,
            *(read_database(run.path, kind) for run in self._runs),
            *(database for run in reused if (database := _database_of(run, kind)) is not None),
        ]

    @cached_property
    def _known(self) -> dict[str, list[Trial]]:
        """The trials of this run before the step chose anything, by task."""
        return _tuned(self._session.history)

    def again(self, key: str) -> Candidate | None:
        """The best schedule that earlier runs have of a task; None if there is none, or it was measured in this run."""
        best = self._reuse.best(key) if self._reuse else None
        if best is None or any(trial.key == best.trial.key for trial in self._session.history):
            return None
        task = self._session.tasks[key]
        template = template_space(task, self._session.target)
        point = _point(template, best.trial) if template else None
        found = point or self._again(task, self._sketches(task), best.trial)
        said = "begins with" if found else "cannot make again"
        print(f"task {task.info.name} {said} the schedule of trial {best.trial.trial} of {best.run}", flush=True)
        return found

    def __missing__(self, key: str) -> Strategy:
        task, step = self._session.tasks[key], self._step
        if self._transfers is not None:
            self[key] = self._transfers.strategy(task)
        elif isinstance(step, Ansor):
            self[key] = self._sketched(task, step)
        elif isinstance(step, Droplet):
            self[key] = self._descent(task, step)
        else:
            assert isinstance(step, AutoTVM | LayoutTuning)
            space = template_space(task, self._session.target)
            self[key] = self._evolution(task, Ansor()) if space is None else self._tuner(space, step)
        return self[key]

    def _sketched(self, task: Task, step: Ansor) -> Strategy:
        """Evolution; on a GPU the task's template takes its place where its sketches have no valid point."""
        template = template_space(task, self._session.target) if self._session.target.kind == "cuda" else None
        first = self._evolution(task, step)
        return first if template is None else Fallback(first, lambda: self._tuner(template, AutoTVM()))

    def _evolution(self, task: Task, options: Ansor) -> Strategy:
        return Evolution(
            self._sketches(task),
            seed=self._session.experiment.seed,
            population=options.population,
            generations=options.generations,
            cost_model=self._cost_model,
            known=[
                *(trial.key for trial in self._session.history if trial.task_key == task.key),
                *sorted(self._reuse.keys(task.key) if self._reuse else ()),
            ],
            records=sorted(self._records(task), key=lambda record: record[1])[:_RECORDS],
        )

    def _tuner(self, space: EnumeratedSpace, step: AutoTVM | LayoutTuning) -> Strategy:
        """From the points that were measured in this run, by any tuner or on the way down, or in another."""
        past = _tuned(self._reuse.trials(space.task_key)) if self._reuse else {}
        known, earlier = (
            [trial for trial in trials if trial.strategy not in _ALSO or _point(space, trial)]
            for trials in (
                self._known.get(space.task_key, []),
                [*self._earlier.get(space.task_key, []), *past.get(space.task_key, [])],
            )
        )
        tuner = TUNERS[step.tuner](space, seed=self._session.experiment.seed, known=known, earlier=earlier)
        if isinstance(step, AutoTVM) and step.random_trials:
            tuner.start_at_random(step.random_trials, step.exploration_trials)
        return tuner

    def _descent(self, task: Task, step: Droplet) -> Strategy:
        fastest = self._fastest(task, step) if step.start == "best" else None
        space, starts, contenders = fastest or (*self._first(task), [])
        start, latency_s = starts[0] if starts else (None, None)
        before = [trial for trial in self._before() if trial.task_key == task.key]
        return Descent(
            space,
            start,
            p_value=step.p_value,
            seed=self._session.experiment.seed,
            latency_s=latency_s,
            contenders=contenders,
            offspring=min(int(step.trials * _BORN), len(before) // _ANCESTORS),
            others=starts[1:],
            known=self._own.get(task.key, ()),
            earlier=[trial for trial in before if not isinstance(space, Numbered) or space.holds(trial.decisions)],
        )

    def _fastest(self, task: Task, step: Droplet) -> tuple[Walkable, _Starts, list[Candidate]] | None:
        """The fastest schedule known before this step, and of the others in its space the fastest that are apart.

        Up to `step.starts` together, each with its latency if it was measured in this run, and the next fastest
        schedules, near or far; None where there is none.

        The default kernel is none: it has no knobs. Neither has a schedule whose template has changed since.
        """
        found = [(trial.latency_s, trial) for trial in self._before() if trial.task_key == task.key]
        tuned = sorted(((s, trial) for s, trial in found if s is not None and trial.key != task.key), key=itemgetter(0))
        most, contenders = step.starts, min(step.trials // _CONTENDED, len(tuned) // _READINGS, _RECORDS - _STARTS)
        chosen: list[Trial] = []
        starts: _Starts = []
        next_fastest: dict[str, Candidate] = {}
        space: Walkable | None = None
        for latency_s, trial in tuned[: _STARTS + contenders if most == 1 else _RECORDS]:
            radices = space.radices if isinstance(space, Numbered) else ()
            is_apart = len(starts) < most and all(apart(trial, other, radices) for other in chosen)
            if not is_apart and len(next_fastest) == contenders:
                continue
            kind, candidate = self._replayed(task, trial)
            if candidate is None or (space is not None and type(kind) is not type(space)):
                continue
            space = space or kind
            if starts and len(next_fastest) < contenders and candidate.key != starts[0][0].key:
                next_fastest[candidate.key] = candidate
            if is_apart:
                chosen.append(trial)
                starts.append((candidate, None if any(trial is other for other in self._warm) else latency_s))
        return None if space is None else (space, starts, list(next_fastest.values()))

    def _replayed(self, task: Task, trial: Trial) -> tuple[Walkable, Candidate | None]:
        """The space that a trial's schedule is of, and the schedule made again; None where that fails."""
        template = template_space(task, self._session.target)
        point = _point(template, trial) if template else None
        if template and point:
            return Numbered(template), point
        sketches = self._sketches(task)
        candidate = self._again(task, sketches, trial)
        return sketches, candidate if candidate is not None and sketches.knobs(candidate) else None

    def _before(self) -> list[Trial]:
        """The trials of earlier steps and of the runs to start from, the unscheduled kernels left out."""
        ours = [trial for trial in self._session.history if trial.step < self._number]
        return [trial for trial in [*standing(ours), *self._warm] if trial.trial > 0]

    def _again(self, task: Task, sketches: SketchSpace, trial: Trial) -> Candidate | None:
        """The candidate of a recorded trial, from its trace in a database: there it is one of about its latency."""
        assert trial.latency_s is not None
        nearest = sorted(self._records(task), key=lambda record: abs(record[1] - (trial.latency_s or 0.0)))
        made = (sketches.replay(trace) for trace, _ in nearest[:_STARTS])
        return next((candidate for candidate in made if candidate and candidate.key == trial.key), None)

    def _first(self, task: Task) -> tuple[Walkable, _Starts]:
        """The first valid point of the task's template, else of its sketches; no start where there is none."""
        template = template_space(task, self._session.target)
        if template is not None:
            found = next((made for index in template.starts() if (made := template.realize(index))), None)
            if found is not None:
                return Numbered(template), [(found, None)]
        sketches = self._sketches(task)
        plainest = sketches.plainest()
        return sketches, [] if plainest is None else [(plainest, None)]

    def _sketches(self, task: Task) -> SketchSpace:
        if task.key not in self._spaces:
            self._spaces[task.key] = SketchSpace(task.key, task.module, self._session.target.to_tvm())
        return self._spaces[task.key]

    def _records(self, task: Task) -> list[tuple[Any, float]]:
        return [record for database in self._databases for record in warm_records(database, task)]


def template_space(task: Task, target: Target) -> EnumeratedSpace | None:
    """The template space of a task; None where no template covers it."""
    from tvmlab.spaces.template import TemplateSpace, template_for

    if template_for(task.module, target.to_tvm()) is None:
        return None
    return TemplateSpace(task.key, task.module, target.to_tvm())


def _database_of(run: RunFolder, kind: str) -> Any:
    """The fastest records of an earlier run; None if they cannot be read."""
    try:
        return read_database(run.path, kind, fastest=_RECORDS)
    except Exception as error:  # noqa: BLE001  JSON's errors, and whatever TVM's parser raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        print(f"the database of earlier run {run.id} cannot be read, nothing is taken from it: {reason}", flush=True)
        return None


def warm_records(database: Any, task: Task, most: int = _RECORDS) -> list[tuple[Any, float]]:
    """The fastest measured schedules of a task in a TVM database: traces and latencies in seconds."""
    if not database.has_workload(task.module):
        return []
    found = database.get_top_k(database.commit_workload(task.module), most)
    return [
        (record.trace, sorted(map(float, record.run_secs))[len(record.run_secs) // 2])
        for record in found
        if record.run_secs and len(record.trace.insts) > 0
    ]


def _tuned(trials: Iterable[Trial]) -> dict[str, list[Trial]]:
    """The trials that may have measured a point of a template space, by task."""
    found: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        if trial.strategy in TUNERS or trial.strategy in _ALSO:
            found[trial.task_key].append(trial)
    return found


def _point(space: EnumeratedSpace, trial: Trial) -> Candidate | None:
    """The candidate of a trial that measured a point of this template; a sketch's only decision may look like one."""
    index = trial.decisions[0] if len(trial.decisions) == 1 else None
    made = space.realize(index) if isinstance(index, int) and 0 <= index < len(space) else None
    return made if made is not None and made.key == trial.key else None
