"""What a run takes from the earlier runs in its runs folder that are for the same target.

reuse.json says it; a resumed run keeps to that. `runs` are the earlier runs, each with how many lines of trials.jsonl
it had when this one began; `layouts` the run whose layouts are taken ("": none); and `tasks`, by key, what is known of
each task of the model: of each engine a `Past`, the `runs` it is from, the `best` schedule, to be measured again, and
`exhausted`, the size of its template's space if that has nothing more to give, and `exhausted_sketches`, the version of
TVM whose sketches have nothing more to give. What has nothing at all to give has neither runs nor a best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tvmlab.core import RecordError, Trial, TvmlabError
from tvmlab.earlier import Device, ended
from tvmlab.environment import tvm_version
from tvmlab.experiment import Ansor, AutoTVM, Experiment, LayoutTuning, searches_templates
from tvmlab.past_records import Best, Past, Records, read
from tvmlab.records import RunFolder

__all__ = [
    "PAST",
    "REUSE_FILE",
    "Plan",
    "Reuse",
    "begin",
    "engines_that_reuse",
    "planned",
    "said_of_reuse",
    "take_layouts",
]

REUSE_FILE = "reuse.json"
PAST = "past"  # the strategy of trials that measure the best schedule of earlier runs again
_ENGINES = (Ansor, AutoTVM)


@dataclass(frozen=True)
class Plan:
    """What a step measures in a run: `total` trials; of a task at most `limits[key]` (none: no limit but the total).

    `begun` has the trials of earlier runs that count for a task, and how many of them, the last, brought nothing.
    """

    total: int
    limits: dict[str, int] | None = None
    begun: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def afresh(cls, step: Any, keys: Sequence[str], sizes: Mapping[str, int] | None = None) -> Plan:
        """What a step measures of some tasks without regard to earlier runs; `sizes` are those of their spaces."""
        most = step.task_trials
        if most is None:
            return cls(step.total_trials(len(keys)))
        limits = {key: min(most, (sizes or {}).get(key, most)) for key in keys}
        return cls(min(sum(limits.values()), step.total_trials(len(keys))), limits)


def begin(folder: RunFolder, target: Device) -> None:
    """Note which earlier runs a run takes from, when it begins and if one of its steps reuses anything.

    Runs on another target than its own are left out, and so are those that still go on.
    """
    if _reuses(folder.experiment) and not (folder.path / REUSE_FILE).exists() and next(folder.rows(), None) is None:
        noted = _noted(ended(folder.path.parent, target, folder.id, _say_left_out))
        if noted["runs"]:
            folder.write_json(REUSE_FILE, noted)


def _reuses(experiment: Experiment) -> bool:
    return any(getattr(step, "reuse", False) for step in experiment.stages)


def engines_that_reuse(experiment: Experiment) -> set[str]:
    """The engines whose trials in earlier runs count for an experiment, as kinds of step.

    >>> engines_that_reuse(Experiment(model="alexnet", steps=[LayoutTuning(), AutoTVM(), Ansor(reuse=False)]))
    {'autotvm'}
    """
    return {step.kind for step in experiment.stages if isinstance(step, _ENGINES) and step.reuse}


def _noted(runs: Iterable[RunFolder]) -> dict[str, Any]:
    """reuse.json before the tasks are known."""
    lines = {run.id: _lines(run) for run in runs}
    return {"runs": {run: count for run, count in lines.items() if count}, "layouts": "", "tasks": {}}


def _say_left_out(name: str, error: Exception) -> None:
    print(f"earlier run {name} cannot be read, nothing is taken from it: {error}", flush=True)


def _lines(run: RunFolder) -> int:
    path = run.path / "trials.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def take_layouts(folder: RunFolder, step: LayoutTuning, sites: Sequence[tuple[str, str]]) -> dict[str, Any] | None:
    """The assignment that a run takes from an earlier one (`Reuse.layouts`), noted in its folder; None if none fits."""
    found = Reuse.of(folder).layouts(step, sites)
    if found is None:
        return None
    folder.write_json("assignment.json", found[1])
    folder.write_json(REUSE_FILE, {**folder.read_json(REUSE_FILE), "layouts": found[0]})
    return found[1]


def _choice(step: LayoutTuning) -> LayoutTuning:
    """A layout step with the knobs left out that do not change what it may choose."""
    return step.model_copy(update={"trials_per_variant": 1, "warm_start": (), "reuse": True})


class Reuse:
    """What is known of an experiment's tasks from the earlier runs of a folder that `noted`, a reuse.json, names.

    `write` is told when more is noted.
    """

    def __init__(
        self,
        experiment: Experiment,
        runs_dir: Path,
        noted: dict[str, Any],
        write: Callable[[dict[str, Any]], None] = lambda noted: None,
    ) -> None:
        self._experiment = experiment
        self._runs_dir = runs_dir
        self._file = noted
        self._write = write
        self._records: dict[str, Records] = {}
        self._sizes: dict[str, int] = {}

    @classmethod
    def of(cls, folder: RunFolder) -> Reuse:
        """What a run takes; nothing where it has no reuse.json."""
        noted = folder.read_json(REUSE_FILE, missing={"runs": {}, "tasks": {}})
        return cls(folder.experiment, folder.path.parent, noted, lambda more: folder.write_json(REUSE_FILE, more))

    @classmethod
    def forecast(cls, experiment: Experiment, runs_dir: Path, target: Device) -> Reuse:
        """What a run of this experiment would take if it began now; nothing is written."""
        return cls(experiment, runs_dir, _noted(ended(runs_dir, target) if _reuses(experiment) else ()))

    @property
    def runs(self) -> list[RunFolder]:
        """The earlier runs with trials of the run's tasks, as far as they are still there."""
        used = {name for noted in self._file["tasks"].values() for name in noted["runs"]}
        return list(filter(None, (_opened(self._runs_dir, name) for name in self._file["runs"] if name in used)))

    def layouts(self, step: LayoutTuning, sites: Sequence[tuple[str, str]]) -> tuple[str, dict[str, Any]] | None:
        """The newest earlier run that chose layouts by the same knobs for a model with the same sites, and its choice.

        `sites` are their names and what `frames.layouts` says about each.
        """
        cold = self._experiment.measure.cold_weights
        for run in filter(None, (_opened(self._runs_dir, name) for name in reversed(self._file["runs"]))):
            try:
                found, first = run.layouts, run.experiment.stages[0]
            except TvmlabError as error:
                _say_left_out(run.id, error)
                continue
            if not (step.reuse and found and found["finished"] and isinstance(first, LayoutTuning)):
                continue
            same = _choice(first) == _choice(step) and first.trials_per_variant >= step.trials_per_variant
            # Of before that was noted, a run with a time limit may have been.
            cut_short = found.get("cut_short", run.experiment.time_limit_s is not None)
            if same and not cut_short and run.experiment.measure.cold_weights == cold and _sites(found) == list(sites):
                return run.id, found
        return None

    @property
    def noted(self) -> Mapping[str, Any]:
        """What reuse.json holds now."""
        return self._file

    @property
    def counted(self) -> int:
        """How many trials of earlier runs count for the steps that reuse."""
        return _counted(self._experiment, self._file)

    def take(self, keys: Iterable[str], sizes: Mapping[str, int] | None = None) -> None:
        """Read what the earlier runs have of these tasks, and note it in reuse.json.

        `sizes` are those of their template spaces, as far as there are some: no plan goes beyond them. Nothing is read
        where no engine reuses trials.
        """
        self._sizes |= sizes or {}
        wanted = {key: Records() for key in keys if key not in self._records}
        self._records |= wanted
        if not self._file["runs"] or not wanted or not engines_that_reuse(self._experiment):
            return
        cold = self._experiment.measure.cold_weights
        others: set[tuple[str, str]] = set()
        for name, lines in self._file["runs"].items():
            run = _opened(self._runs_dir, name)
            if run is None:
                print(f"earlier run {name} cannot be read any more: its records are not started from", flush=True)
                continue
            try:
                if not wanted.keys().isdisjoint(info.key for info in run.tasks):
                    read(run, lines, wanted, others, unlike=run.experiment.measure.cold_weights != cold)
            except TvmlabError as error:
                _say_left_out(name, error)
        noted = {key: records.noted() for key, records in wanted.items() if records.known}
        self._file["tasks"] = {**noted, **self._file["tasks"]}  # what was noted before is what the run goes by
        self._write(self._file)

    @property
    def without_trials(self) -> set[str]:
        """The tasks in whose spaces earlier runs found nothing to measure."""
        return {key for key, noted in self._file["tasks"].items() if not noted["runs"]}

    def trials(self, key: str) -> list[Trial]:
        """The trials of a task in earlier runs, without the decisions of sketches: those are in databases."""
        return self._records[key].trials if key in self._records else []

    def keys(self, key: str) -> set[str]:
        """The keys of all schedules of a task that earlier runs measured, with or without success."""
        return self._records[key].seen if key in self._records else set()

    def best(self, key: str) -> Best | None:
        """The fastest schedule of a task in earlier runs, those measured as this run measures preferred."""
        return self._records[key].best if key in self._records else None

    def plan(self, number: int, keys: Sequence[str]) -> Plan:
        """What stage `number` of the run measures of its tasks: what it asks, less what earlier runs have."""
        stages = self._experiment.stages
        step = stages[number]
        sizes = self._sizes if searches_templates(step) else {}
        if not (isinstance(step, _ENGINES) and step.reuse and any(key in self._file["tasks"] for key in keys)):
            return Plan.afresh(step, keys, sizes)
        before = [stage for stage in stages[:number] if isinstance(stage, type(step)) and stage.reuse]
        is_first = not any(isinstance(stage, _ENGINES) and stage.reuse for stage in stages[:number])
        again = {key for key in keys if is_first and self._file["tasks"].get(key, {}).get("best")}
        past = {key: self._of(key, step.kind) for key in keys}
        return planned(step, before, past, again, {key: self._untried(key, past[key], sizes) for key in keys})

    def _untried(self, key: str, past: Past, sizes: Mapping[str, int]) -> float:
        """How many points of a task's space may be left; infinity for sketches that are not known to be used up.

        A space of another size, or by another TVM, is another space than the one that was exhausted.
        """
        noted, size = self._file["tasks"].get(key, {}), sizes.get(key)
        if size is None:
            return 0 if noted.get("exhausted_sketches") == tvm_version() else math.inf
        return 0 if noted.get("exhausted") == size else max(size - past.trials, 0)

    def _of(self, key: str, engine: str) -> Past:
        return Past(**self._file["tasks"].get(key, {}).get(engine, {}))


def _sites(assignment: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(row["site"], row["about"]) for row in assignment["sites"]]


def planned(
    step: Ansor | AutoTVM,
    before: Sequence[Ansor | AutoTVM],
    past: Mapping[str, Past],
    again: set[str],
    untried: Mapping[str, float] | None = None,
) -> Plan:
    """The plan of a step, where earlier runs have something; the steps `before` it count on the same trials first.

    `past` is what they have of each task, `again` the tasks whose best schedule is measured again, `untried` how many
    new trials a task's space can have at the most, where that is known.
    """
    tasks = len(past)
    explore = step.exploration_trials if isinstance(step, AutoTVM) else 0
    each, patience = _each(step, tasks), step.patience(tasks)
    taken = sum(_each(stage, tasks) for stage in before)
    # Else there is one budget for all, which is spread unevenly: what a task has no use for goes to the others.
    by_task = isinstance(step, AutoTVM) and each == _asked(step)
    spread = not by_task and any(left > 0 for left in (untried or dict.fromkeys(past, 1)).values())
    new, limits = {}, {}
    for key, known in past.items():
        met = max((known.trials if by_task else known.share) - taken, 0.0)
        missing = max(each - met, 0.0) if before or known.since < patience else 0.0
        left = math.inf if untried is None else untried[key]
        new[key] = max(missing, explore) if spread else min(max(missing, explore), left)
        most = max(_asked(step) - max(known.trials - taken, 0.0), explore)
        if left == 0 or step.task_trials is not None:
            limits[key] = math.ceil(min(most, left)) + (key in again)
    total = math.ceil(round(sum(new.values()), 6)) + len(again)
    return Plan(
        total if step.max_trials is None else min(total, step.max_trials),
        limits or None,
        {} if before else {key: (known.trials, 0 if explore else known.since) for key, known in past.items()},
    )


def _asked(step: Ansor | AutoTVM) -> int:
    return step.trials_per_kernel if isinstance(step, Ansor) else step.kernel_trials


def _each(step: Ansor | AutoTVM, tasks: int) -> float:
    """The trials that a step asks of each of so many tasks, on average."""
    return min(_asked(step) * tasks, step.max_trials or math.inf) / max(tasks, 1)


def _opened(runs_dir: Path, name: str) -> RunFolder | None:
    """An earlier run; None if it cannot be read any more."""
    try:
        return RunFolder.open(runs_dir / name)
    except RecordError:
        return None


def said_of_reuse(folder: RunFolder) -> str:
    """What a run's message says of what it took from earlier runs; an empty string where that is nothing."""
    noted = folder.read_json(REUSE_FILE, missing={"tasks": {}, "layouts": ""})
    runs = {run for task in noted["tasks"].values() for run in task["runs"]}
    parts = [f"the layouts of {noted['layouts']}"] if noted["layouts"] else []
    if trials := _counted(folder.experiment, noted):
        parts.append(f"{trials} trials of {len(runs)} earlier run{'s' if len(runs) > 1 else ''}")
    return f"reused {' and '.join(parts)}; reuse=False searches afresh" if parts else ""


def _counted(experiment: Experiment, noted: Mapping[str, Any]) -> int:
    engines = engines_that_reuse(experiment)
    return sum(task[engine]["trials"] for task in noted["tasks"].values() for engine in engines & task.keys())
