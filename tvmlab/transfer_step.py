"""A TransferTuning step at work: its source runs, their schedules, and transfer.json, which says what became of each.

transfer.json has, by the step's number, the `pool` of runs it may take from, the `sources` it takes from, the `scores`
of the heuristic where that chose, and `common`, how many of their kernels are of a class of the model's; and a row for
each schedule and task: the source's run, task and key, the distance of the shapes, the key of the program, the outcome.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from statistics import median
from typing import Any

from tvmlab.compat import read_database, structural_key
from tvmlab.core import Candidate, TaskInfo
from tvmlab.experiment import TransferTuning
from tvmlab.records import RunFolder
from tvmlab.search.transfer import MEASURED, Fate, Transfer
from tvmlab.session import Session
from tvmlab.sources import AUTO, TRANSFER_FILE, Origin, distance, model_of, origins, pools, score
from tvmlab.spaces.adapt import adapt_trace, adapt_values
from tvmlab.spaces.sketch import SketchSpace
from tvmlab.spaces.template import TemplateSpace, template_for
from tvmlab.tasks import Task

__all__ = ["Spaces", "Transfers", "carried", "said_of"]

_NO_RECORD = "its schedule is not in the database"

Record = tuple[Any, Any]  # a task's module, and the trace of a schedule of it


class Transfers:
    """The sources of one TransferTuning step, and the strategy of each task that tries them."""

    def __init__(self, session: Session, number: int, step: TransferTuning) -> None:
        self._session = session
        self._number = number
        self._target = session.target.to_tvm()
        pool = pools(session.folder, session.target)[number]
        self._file = session.folder.read_json(TRANSFER_FILE)
        self._rows = {_identity(row): row for row in self._file["rows"]}
        found = {run.path: origins(run) for run in pool}
        if step.source == (AUTO,):
            scores = self._scores(found)
            pool = [max(pool, key=lambda run: scores[run.id])]
            self._file["steps"][str(number)]["scores"] = scores
        self._origins = [origin for run in pool for origin in found[run.path]]
        infos = [task.info for task in session.tasks.values()]
        self._common = sum(any(_kinship(origin, info) for info in infos) for origin in self._origins)
        self._file["steps"][str(number)] |= {"sources": [run.id for run in pool], "common": self._common}
        self._write()
        self._records = cache(lambda run: _best_records(run, session.target.kind))

    def strategy(self, task: Task) -> Transfer:
        """The schedules of a task's class, those of the most similar kernels first; then those of its operator.

        The paper leaves a kernel of a class that no source has as it is. Its first operator's schedules fit it too; and
        where there are none, those of any operator, as far as they decide the same things.
        """
        known = [trial.key for trial in self._session.history if trial.task_key == task.key]
        kin = [origin for origin in self._origins if _kinship(origin, task.info)]
        if not kin and self._common:
            kin = self._origins
        nearest = sorted(kin, key=lambda o: (-_kinship(o, task.info), distance(o.task.shapes, task.info.shapes)))
        spaces = Spaces(task, self._target)
        return Transfer(
            nearest,
            lambda origin: self._adapt(spaces, origin),
            known=known,
            note=lambda fates: self._note(task, fates),
        )

    def _scores(self, found: dict[Any, list[Origin]]) -> dict[str, float]:
        """The heuristic's score of each run, by what the tasks' default schedules were measured to take."""
        untuned = {
            trial.task_key: trial.latency_s
            for trial in self._session.history
            if trial.trial == 0 and trial.latency_s is not None
        }
        infos = [task.info for task in self._session.tasks.values()]
        return {path.name: score([origin.task for origin in tuned], infos, untuned) for path, tuned in found.items()}

    def _adapt(self, spaces: Spaces, origin: Origin) -> Candidate | str:
        record = self._records(origin.run.path).get(origin.task.key)
        if record is None:
            return _NO_RECORD
        module, trace = record
        return carried(spaces, origin, module, lambda: trace, self._target)

    def _note(self, task: Task, fates: list[Fate]) -> None:
        for origin, key, outcome in fates:
            row = {
                "step": self._number,
                "task": task.info.name,
                "task_key": task.key,
                "source_run": origin.run.id,
                "source_task": origin.task.name,
                "source_key": origin.task.key,
                "distance": distance(origin.task.shapes, task.info.shapes),
                "key": key,
                "outcome": outcome,
            }
            if outcome != MEASURED or _identity(row) not in self._rows:  # else by this step, before it was resumed
                self._rows[_identity(row)] = row
        self._write()

    def _write(self) -> None:
        self._session.folder.write_json(TRANSFER_FILE, {**self._file, "rows": list(self._rows.values())})


def carried(spaces: Spaces, origin: Origin, module: Any, trace: Callable[[], Any], target: Any) -> Candidate | str:
    """The candidate that an origin's schedule makes of another task, adapted to it; or why there is none.

    `module` is the origin's; `trace` is asked for its trace (None: it is lost) where it is a point of no template.
    """
    values = _template_values(origin, module, target)
    if values is None:
        found = trace()
        return _NO_RECORD if found is None else adapt_trace(spaces.sketches, spaces.module, found)
    name, point = values
    if spaces.template is None or spaces.template.template.name != name:
        return f"no template {name} covers this kernel"
    return adapt_values(spaces.template, point)


def _kinship(origin: Origin, info: TaskInfo) -> int:
    """2 for kernels of one class, 1 for those that begin with the same operator and have another epilogue, else 0."""
    ours, theirs = origin.task.kernel_class, info.kernel_class
    return 2 if ours == theirs else int(ours.split("+")[0] == theirs.split("+")[0])


def said_of(folder: RunFolder) -> str:
    """What a run's last message should say of its transfers: that there was nothing, or how much did not apply."""
    found = folder.read_json(TRANSFER_FILE, missing={"steps": {}, "rows": []})
    said = []
    for number, step in found["steps"].items():
        if "sources" not in step:
            continue  # not begun
        names = " and ".join(step["sources"])
        if not step["common"]:
            said.append(f"nothing to transfer: no kernel of {names} is of a class that this model has")
            continue
        models = {model_of(folder, run) for run in step["sources"]}
        same = ", a run of the same model" if model_of(folder, folder.id) in models else ""
        rows = [row for row in found["rows"] if row["step"] == int(number)]
        refused = Counter(row["outcome"] for row in rows if not row["key"])
        skipped = ", ".join(f"{count} x {reason}" for reason, count in refused.most_common())
        done = "transferred" if any(row["key"] for row in rows) else "nothing was transferred"
        said.append(f"{done} from {names}{same}" + (f"; schedules left out: {skipped}" if skipped else ""))
    return "; ".join(said)


class Spaces:
    """The spaces of a task, made when first needed: a sketch space takes TVM a while."""

    def __init__(self, task: Task, target: Any) -> None:
        self.module = task.module
        self._key, self._target = task.key, target
        covered = template_for(task.module, target) is not None
        self.template = TemplateSpace(task.key, task.module, target) if covered else None
        self._sketches: SketchSpace | None = None

    @property
    def sketches(self) -> SketchSpace:
        """Its generated sketches."""
        if self._sketches is None:
            self._sketches = SketchSpace(self._key, self.module, self._target)
        return self._sketches


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["step"], row["task_key"], row["source_run"], row["source_key"]


def _best_records(path: Any, kind: str) -> dict[str, Record]:
    """The module and the fastest schedule of each task in a run's database, by the task's key."""
    best: dict[str, tuple[float, Record]] = {}
    keys: dict[Any, str] = {}
    for record in read_database(path, kind, fastest=2).get_all_tuning_records():  # one may be the default schedule
        if not record.run_secs or len(record.trace.insts) == 0:
            continue  # the default schedule
        workload = record.workload
        if workload not in keys:
            keys[workload] = structural_key(workload.mod)
        latency = median(map(float, record.run_secs))
        if keys[workload] not in best or latency < best[keys[workload]][0]:
            best[keys[workload]] = (latency, (workload.mod, record.trace))
    return {key: record for key, (_, record) in best.items()}


def _template_values(origin: Origin, module: Any, target: Any) -> tuple[str, dict[str, Any]] | None:
    """The template and the knob values of an origin's schedule; None if it is a point of no template space."""
    decisions = origin.trial.decisions
    if len(decisions) != 1 or not isinstance(decisions[0], int) or template_for(module, target) is None:
        return None
    space = TemplateSpace(origin.task.key, module, target)
    made = space.realize(decisions[0]) if 0 <= decisions[0] < len(space) else None
    if made is None or made.key != origin.trial.key:
        return None  # a sketch with one knob, or a template that has changed since
    return space.template.name, space[decisions[0]]
