"""A Selective step at work: its clusters, whose schedules who tries, who is searched after all; and selective.json.

selective.json has, by the step's number: the keys of the `tasks` in order, the `rates` of all pairs, what each
`depends` on (key to key, a representative on itself), by what engine it was decided, and once that is known `poor`, why
a task is searched after all. `shared` has a row for each schedule and task: both keys, the key of the program and the
outcome. All is decided once: a resumed run keeps to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from tvmlab import budget
from tvmlab.core import Candidate, Strategy, TaskInfo, Trial
from tvmlab.experiment import Ansor, AutoTVM, Selective, TransferTuning
from tvmlab.records import RunFolder
from tvmlab.search.clusters import clusters
from tvmlab.search.costmodel import KnobModel
from tvmlab.search.transfer import MEASURED, Fate, Transfer
from tvmlab.session import Session
from tvmlab.sources import SELECTIVE_FILE, Origin
from tvmlab.spaces.overlap import outline, rates
from tvmlab.spaces.sketch import SketchSpace
from tvmlab.spaces.template import TemplateSpace, sizes
from tvmlab.steps_selective import OWN_POINTS
from tvmlab.strategies import TUNERS, warm_records
from tvmlab.tasks import Task
from tvmlab.transfer_step import Spaces, carried

__all__ = ["Selection", "clustered", "planned", "said_of", "search_of"]

_NEAREST = 8  # records whose latency is nearest to a trial's, among which its trace is looked for
_WORTH = 0.01  # of the model estimate: what a task must be able to save to be searched after all
_SHARED_PER_S = 3.0  # shared schedules tried in a second, to leave them time
_SHARING = 0.5  # of what is left of the time limit may be kept for them at most


def search_of(step: Selective) -> Ansor | AutoTVM:
    """The normal search that a step gives its representatives."""
    common = {name: getattr(step, name) for name in ("early_stopping_threshold", "max_trials", "batch_size")}
    common |= {"warm_start": step.warm_start, "reuse": False}
    if step.engine == "ansor":
        return Ansor(
            trials_per_kernel=step.trials_per_kernel,
            population=step.population,
            generations=step.generations,
            **common,
        )
    return AutoTVM(kernel_trials=step.trials_per_kernel, tuner=step.tuner, **common)


def clustered(tasks: Sequence[Task], target: Any, *, templates: bool, least: float) -> tuple[Any, list[int]]:
    """The similarity of some tasks' spaces, pair by pair, and the number of each task's representative.

    `target` is a tvm.target.Target; `templates` and `least` are of `tvmlab.spaces.overlap` and `clusters`.
    """
    found = rates([outline(task, target, templates=templates) for task in tasks])
    depends = list(range(len(tasks)))
    for one in clusters(found, least, [_cost_of(task.info) for task in tasks]):
        for task in one.others:
            depends[task] = one.representative
    return found, depends


def sizes_of(step: Selective, tasks: Sequence[Task], target: Any) -> dict[str, int]:
    """How many points the template spaces have in which a step searches these tasks, by key; none for sketches."""
    return sizes(tasks, target) if step.engine == "autotvm" else {}


def planned(
    step: Selective,
    depends: Mapping[str, str],
    sizes: Mapping[str, int],
    poor: Collection[str] = (),
    *,
    capped: bool = True,
) -> int:
    """The trials of a step, at the most: of each representative its search, of each other task what it tries.

    `depends` has each task's representative, both by their keys; `sizes` the points of the tasks' template spaces, as
    far as there are some: no search takes more. `poor` tasks are searched besides.
    """
    limits = {key: min(step.trials_per_kernel, sizes.get(key, budget.MOST)) for key in depends}
    searched = sum(limits[key] for key, on in depends.items() if key == on or key in poor)
    shared = sum(step.shared(limits[on]) + OWN_POINTS * (key in sizes) for key, on in depends.items() if key != on)
    return budget.capped(searched + shared, step.max_trials if capped else None)


def _cost_of(info: TaskInfo) -> float:
    """What a task may cost its model, to choose between equals: its work, without having measured it."""
    return info.weight * (info.flops or info.bytes_moved)


class Selection:
    """Which tasks of one Selective step are searched, which take schedules, and from where."""

    def __init__(self, session: Session, number: int, step: Selective) -> None:
        self._session = session
        self._number = number
        self._step = step
        self._target = session.target.to_tvm()
        self._file = session.folder.read_json(SELECTIVE_FILE, missing={"steps": {}})
        known = self._file["steps"].get(str(number))
        if known is None:
            known = self._file["steps"][str(number)] = self._decide(list(session.tasks.values()))
            self._write()
        self._noted: dict[str, Any] = known
        self._depends: dict[str, str] = known["depends"]
        self._rows = {(row["task_key"], row["source_trial"]): row for row in known["shared"]}
        self.representatives = [self._for_its_cluster(task) for task in self._tasks(lambda key, on: key == on)]
        self.others = self._tasks(lambda key, on: key != on)
        self._sizes = sizes_of(step, list(session.tasks.values()), self._target)
        self._origins: Callable[[str], list[Origin]] = cache(self._fastest)
        self._models: Callable[[str], KnobModel] = cache(self._model)
        self._traces: Callable[[str, str], Any] = cache(self._trace)
        self._plan(())

    def _decide(self, tasks: Sequence[Task]) -> dict[str, Any]:
        templates = self._step.engine == "autotvm"
        found, depends = clustered(tasks, self._target, templates=templates, least=self._step.similarity)
        keys = [task.key for task in tasks]
        return {
            "engine": self._step.engine,
            "tasks": keys,
            "rates": found.round(4).tolist(),
            "depends": {key: keys[on] for key, on in zip(keys, depends, strict=True)},
            "poor": None,
            "shared": [],
        }

    def _tasks(self, wanted: Callable[[str, str], bool]) -> list[Task]:
        tasks = self._session.tasks
        return [tasks[key] for key, on in self._depends.items() if key in tasks and wanted(key, on)]

    def _for_its_cluster(self, task: Task) -> Task:
        """A representative with the weight of its cluster: its trials are worth what they save all of it."""
        members = [member.info for member in self._tasks(lambda key, on: on == task.key)]
        share = _cost_of(task.info) / task.info.weight if task.info.weight else 0.0
        weight = round(sum(map(_cost_of, members)) / share) if share else task.info.weight
        return replace(task, info=replace(task.info, weight=weight))

    def _plan(self, poor: Collection[str]) -> None:
        """Tell the session how many trials the step takes, as far as it is known."""
        self._session.planned[self._number] = planned(self._step, self._depends, self._sizes, poor)

    def _to_share(self) -> int:
        """How many trials it takes to try the schedules of the representatives on the others."""
        alone = {key: on for key, on in self._depends.items() if key == on}
        everything, searched = (planned(self._step, each, self._sizes, capped=False) for each in (self._depends, alone))
        return everything - searched

    @contextmanager
    def leaving_time(self) -> Iterator[None]:
        """Within it the session is over early enough for the others to try their schedules before the time limit."""
        session, limit_s = self._session, self._session.experiment.time_limit_s
        if limit_s is not None:
            wanted = self._to_share() / _SHARED_PER_S
            begun_s = self._noted.setdefault("begun_s", session.elapsed_s)  # of the first session that comes here
            self._write()
            session.limit_s = limit_s - min(wanted, _SHARING * max(limit_s - begun_s, 0.0))
        try:
            yield
        finally:
            session.limit_s = limit_s

    def search(self, tasks: Sequence[Task]) -> Ansor | AutoTVM | None:
        """The options by which some tasks are searched; None if the step's cap is used up.

        Of the cap the representatives leave the others what these try, half of it at most.
        """
        search, left = search_of(self._step), self._left(tasks)
        if left is None or self._step.max_trials is None:
            return search
        if tasks is self.representatives:
            left = min(left, self._step.max_trials - min(self._to_share(), self._step.max_trials // 2))
        return search.model_copy(update={"max_trials": left}) if left > 0 else None

    def sharing(self) -> TransferTuning | None:
        """The options by which shared schedules are tried; None if there is nothing to try, or no trial left."""
        most = max((len(self._origins(on)) for on in {self._depends[task.key] for task in self.others}), default=0)
        left = self._left(self.others, shared=True)
        if not most or (left is not None and left <= 0):
            return None
        own = OWN_POINTS if self._step.engine == "autotvm" else 0
        return TransferTuning(trials_per_kernel=most + own, max_trials=left, batch_size=self._step.batch_size)

    def _left(self, tasks: Sequence[Task], *, shared: bool = False) -> int | None:
        """What the step's cap leaves to the own search of some tasks, or to `shared` schedules; None without a cap.

        What that search, or these, took before the run was resumed is not taken off: the loop does that.
        """
        if self._step.max_trials is None:
            return None
        mine = {task.key for task in tasks}
        spent = self._session.trials_of(self._number).items()
        elsewhere = sum(
            key not in mine or (trial.strategy == Transfer.name and not shared)
            for key, found in spent
            for trial in found
        )
        return self._step.max_trials - elsewhere

    def shared(self, task: Task) -> Strategy:
        """The schedules of a task's representative, the fastest first, adapted as in transfer-tuning; then `_own`."""
        known = [trial.key for trial in self._session.history if trial.task_key == task.key]
        spaces, origins = Spaces(task, self._target), self._origins(self._depends[task.key])
        return Transfer(
            origins,
            lambda origin: self._adapt(spaces, origin),
            own=self._own(task, spaces),
            most=len(origins) + OWN_POINTS,
            known=known,
            note=lambda fates: self._note(task, fates),
        )

    def _own(self, task: Task, spaces: Spaces) -> Iterator[Candidate]:
        """Of the points that a task's template names first those that its representative's trials speak for.

        They are chosen for the task's shape, and cost nothing to find; none where it is searched by sketches. Two of
        them are tried, and more where schedules do not fit or are the same (`sharing`).
        """
        space = spaces.template if self._step.engine == "autotvm" else None
        if space is None or not (starts := list(space.starts())):
            return
        scores = self._models(self._depends[task.key]).predict(np.array([space.encode(index) for index in starts]))
        ranked = (starts[at] for at in np.argsort(-scores, kind="stable"))
        yield from filter(None, map(space.realize, ranked))

    def _model(self, key: str) -> KnobModel:
        """What a representative's trials say of the knobs of its template, which is that of all its cluster."""
        task, model = self._session.tasks[key], KnobModel(self._session.experiment.seed)
        space = TemplateSpace(key, task.module, self._target)
        for trial in self._session.history:
            if trial.task_key == key and trial.strategy in TUNERS:
                model.add(space.encode(trial.decisions[0]), trial.latency_s)
        return model

    def _fastest(self, key: str) -> list[Origin]:
        """The fastest valid trials of a representative, each of another program."""
        best: dict[str, Trial] = {}
        for trial in sorted(self._valid(key), key=_latency):
            best.setdefault(trial.key, trial)
        info = self._session.tasks[key].info
        found = list(best.values())[: self._step.shared(len(best))]
        return [Origin(self._session.folder, info, trial) for trial in found]

    def _valid(self, key: str) -> list[Trial]:
        return [t for t in self._session.history if t.task_key == key and t.trial and t.latency_s is not None]

    def _adapt(self, spaces: Spaces, origin: Origin) -> Candidate | str:
        module = self._session.tasks[origin.task.key].module
        return carried(spaces, origin, module, lambda: self._traces(origin.task.key, origin.trial.key), self._target)

    def _trace(self, key: str, program: str) -> Any:
        """The trace of a representative's trial, from the database; None if it is not there."""
        task = self._session.tasks[key]
        latency_s = next(_latency(trial) for trial in self._valid(key) if trial.key == program)
        records = warm_records(self._session.database, task, len(self._session.history))
        sketches = SketchSpace(key, task.module, self._target)
        for trace, _ in sorted(records, key=lambda record: abs(record[1] - latency_s))[:_NEAREST]:
            made = sketches.replay(trace)
            if made is not None and made.key == program:
                return trace
        return None

    def _note(self, task: Task, fates: list[Fate]) -> None:
        for origin, program, outcome in fates:
            row = {
                "task_key": task.key,
                "source_key": origin.task.key,
                "source_trial": origin.trial.trial,
                "key": program,
                "outcome": outcome,
            }
            identity = (task.key, origin.trial.trial)
            if outcome != MEASURED or identity not in self._rows:  # else by this step, before it was resumed
                self._rows[identity] = row
        self._noted["shared"] = list(self._rows.values())
        self._write()

    def poor(self) -> list[Task]:
        """The tasks that the shared schedules serve poorly; decided when it is first asked, and noted with why."""
        if self._noted["poor"] is None:
            found = {task.key: self._why_poor(task) for task in self.others}
            self._noted["poor"] = {key: why for key, why in found.items() if why}
            self._write()
        self._plan(self._noted["poor"])
        return [task for task in self.others if task.key in self._noted["poor"]]

    def _why_poor(self, task: Task) -> str:
        """Why a task is to be searched itself; an empty string if it is not."""
        representative = self._session.tasks[self._depends[task.key]]
        reachable = self._rate(representative.info, self._session.trial_latency(representative.key))
        if not reachable:
            return "its representative has no valid schedule"
        best_s = self._session.trial_latency(task.key)
        if best_s is None:
            was_tried = any(key == task.key for key, _ in self._rows)  # else the cap was used up before its turn
            return "no shared schedule runs" if was_tried else ""
        share = self._rate(task.info, best_s) / reachable
        known = self._session.known_latencies_s([task.key])[task.key] or best_s
        saving = task.info.weight * max(known - best_s * share, 0.0)
        model_s = self._session.estimate_s() or 0.0
        if share >= self._step.fall_back or saving < _WORTH * model_s:
            return ""
        return f"{share:.2f} of its representative's share of the roofline"

    def _rate(self, info: TaskInfo, latency_s: float | None) -> float:
        """How near to the roofline a latency is, 0 to 1; without a measured roofline the FLOPs (or bytes) a second.

        A small kernel whose data stay in a cache may beat the roofline; that counts as 1, and is no mark for others.
        """
        if latency_s is None:
            return 0.0
        limit = self._session.target.roofline
        if limit is None:
            return (info.flops or info.bytes_moved) / latency_s
        return min(1.0, limit.latency_s(info.flops, info.bytes_moved) / latency_s)

    def _write(self) -> None:
        self._session.folder.write_json(SELECTIVE_FILE, self._file)


def said_of(folder: RunFolder) -> str:
    """What a run's last message should say of its Selective steps."""
    said = []
    for number, step in folder.read_json(SELECTIVE_FILE, missing={"steps": {}})["steps"].items():
        counts = Counter(key == on for key, on in step["depends"].items())
        text = f"searched {counts[True]} representatives of {len(step['tasks'])} tasks"
        if step["poor"]:
            own = (t for t in folder.trials() if t.trial and t.step == int(number) and t.strategy != Transfer.name)
            searched = len({trial.task_key for trial in own} & step["poor"].keys())
            too = (
                "and were searched too"
                if searched == len(step["poor"])
                else f"and {searched} of these were searched too"
            )
            text += f"; of the others {len(step['poor'])} came out poor {too}"
        said.append(text)
    return "; ".join(said)


def _latency(trial: Trial) -> float:
    assert trial.latency_s is not None
    return trial.latency_s
