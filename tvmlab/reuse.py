"""What a run takes from the earlier runs in its runs folder that are for the same target.

reuse.json says it; a resumed run keeps to that. `runs` are the earlier runs, each with how many lines of trials.jsonl
it had when this one began; `layouts` the run whose layouts are taken ("": none); and `tasks`, by key, what is known of
each task of the model: of each engine a `Past`, the `runs` it is from, and the `best` schedule, to be measured again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tvmlab.core import IMPROVED, RecordError, Trial, TrialStatus
from tvmlab.earlier import ended
from tvmlab.experiment import Ansor, AutoTVM, Experiment, LayoutTuning
from tvmlab.records import RunFolder

__all__ = ["PAST", "REUSE_FILE", "Best", "Past", "Plan", "Reuse", "begin", "past_of", "planned",
           "said_of_reuse", "take_layouts"]  # fmt: skip

REUSE_FILE = "reuse.json"
PAST = "past"  # the strategy of trials that measure the best schedule of earlier runs again
_ENGINES = (Ansor, AutoTVM)


@dataclass(frozen=True)
class Past:
    """What an engine did to a task in earlier runs.

    `trials` are its distinct schedules. `share` is how many trials these runs had for each of their tasks: Ansor
    spreads a budget over the tasks, so one that got few has had its part. The last `since` trials brought nothing.
    """

    trials: int = 0
    share: float = 0.0
    since: int = 0


@dataclass(frozen=True)
class Best:
    """The fastest schedule that earlier runs have of a task: the run, and its trial."""

    run: str
    trial: Trial


@dataclass(frozen=True)
class Plan:
    """What a step measures in a run: `total` trials; of a task at most `limits[key]` (None: no limit but the total).

    `begun` has the trials of earlier runs that count for a task, and how many of them, the last, brought nothing.
    """

    total: int
    limits: dict[str, int] | None = None
    begun: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def afresh(cls, step: Any, keys: Sequence[str]) -> Plan:
        """What a step measures of some tasks without regard to earlier runs."""
        limit = step.task_trials
        return cls(step.total_trials(len(keys)), None if limit is None else dict.fromkeys(keys, limit))


def begin(folder: RunFolder, attrs: Mapping[str, Any]) -> None:
    """Note which earlier runs a run takes from, when it begins and if one of its steps reuses anything.

    `attrs` are the attributes of its target; runs for another one are left out, and so are those that still go on.
    """
    asked = any(getattr(step, "reuse", False) for step in folder.experiment.stages)
    if asked and not (folder.path / REUSE_FILE).exists() and next(folder.rows(), None) is None:
        noted = _noted(folder.path.parent, attrs, folder.id)
        if noted["runs"]:
            folder.write_json(REUSE_FILE, noted)


def _noted(runs_dir: Path, attrs: Mapping[str, Any], itself: str = "") -> dict[str, Any]:
    """reuse.json before the tasks are known."""
    lines = {run.id: _lines(run) for run in ended(runs_dir, attrs, itself)}
    return {"runs": {run: count for run, count in lines.items() if count}, "layouts": "", "tasks": {}}


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
        self._records: dict[str, _Records] = {}

    @classmethod
    def of(cls, folder: RunFolder) -> Reuse:
        """What a run takes; nothing where it has no reuse.json."""
        noted = folder.read_json(REUSE_FILE, missing={"runs": {}, "tasks": {}})
        return cls(folder.experiment, folder.path.parent, noted, lambda more: folder.write_json(REUSE_FILE, more))

    @classmethod
    def forecast(cls, experiment: Experiment, runs_dir: Path, attrs: Mapping[str, Any]) -> Reuse:
        """What a run of this experiment would take if it began now; nothing is written."""
        return cls(experiment, runs_dir, _noted(runs_dir, attrs))

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
            found, first = run.layouts, run.experiment.stages[0]
            if not (step.reuse and found and found["finished"] and isinstance(first, LayoutTuning)):
                continue
            same = _choice(first) == _choice(step) and first.trials_per_variant >= step.trials_per_variant
            if same and run.experiment.measure.cold_weights == cold and _sites(found) == list(sites):
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

    def take(self, keys: Iterable[str]) -> None:
        """Read what the earlier runs have of these tasks, and note it in reuse.json."""
        wanted = {key: _Records() for key in keys if key not in self._records}
        self._records |= wanted
        if not self._file["runs"] or not wanted:
            return
        cold = self._experiment.measure.cold_weights
        others: set[tuple[str, str]] = set()
        for name, lines in self._file["runs"].items():
            run = _opened(self._runs_dir, name)
            if run is None:
                print(f"earlier run {name} cannot be read any more: its records are not started from", flush=True)
            elif not wanted.keys().isdisjoint(info.key for info in run.tasks):
                _read(run, lines, wanted, others, unlike=run.experiment.measure.cold_weights != cold)
        noted = {key: records.noted() for key, records in wanted.items() if records.runs}
        self._file["tasks"] = {**noted, **self._file["tasks"]}  # what was noted before is what the run goes by
        self._write(self._file)

    def trials(self, key: str) -> list[Trial]:
        """The trials of a task in earlier runs that ran, without the decisions of sketches: those are in databases."""
        return self._records[key].ran if key in self._records else []

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
        if not (isinstance(step, _ENGINES) and step.reuse and any(key in self._file["tasks"] for key in keys)):
            return Plan.afresh(step, keys)
        before = [stage for stage in stages[:number] if isinstance(stage, type(step)) and stage.reuse]
        is_first = not any(isinstance(stage, _ENGINES) and stage.reuse for stage in stages[:number])
        again = {key for key in keys if is_first and self._file["tasks"].get(key, {}).get("best")}
        return planned(step, before, {key: self._of(key, step.kind) for key in keys}, again)

    def _of(self, key: str, engine: str) -> Past:
        return Past(**self._file["tasks"].get(key, {}).get(engine, {}))


def _sites(assignment: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(row["site"], row["about"]) for row in assignment["sites"]]


def planned(
    step: Ansor | AutoTVM, before: Sequence[Ansor | AutoTVM], past: Mapping[str, Past], again: set[str]
) -> Plan:
    """The plan of a step, where earlier runs have something; the steps `before` it count on the same trials first.

    `past` is what they have of each task, `again` the tasks whose best schedule is measured again.
    """
    tasks = len(past)
    explore = step.exploration_trials if isinstance(step, AutoTVM) else 0
    each = _each(step, tasks)
    taken = sum(_each(stage, tasks) for stage in before)
    # Else there is one budget for all, which may be spread unevenly.
    by_task = isinstance(step, AutoTVM) and each == _asked(step)
    new, limits = {}, {}
    for key, known in past.items():
        met = max((known.trials if by_task else known.share) - taken, 0.0)
        missing = max(each - met, 0.0) if before or known.since < step.patience else 0.0
        new[key] = max(missing, explore)
        limits[key] = math.ceil(max(_asked(step) - max(known.trials - taken, 0.0), explore)) + (key in again)
    total = math.ceil(round(sum(new.values()), 6)) + len(again)
    return Plan(
        total if step.max_trials is None else min(total, step.max_trials),
        None if step.task_trials is None else limits,
        {} if before else {key: (known.trials, 0 if explore else known.since) for key, known in past.items()},
    )


def _asked(step: Ansor | AutoTVM) -> int:
    return step.trials_per_kernel if isinstance(step, Ansor) else step.kernel_trials


def _each(step: Ansor | AutoTVM, tasks: int) -> float:
    """The trials that a step asks of each of so many tasks, on average."""
    return min(_asked(step) * tasks, step.max_trials or math.inf) / max(tasks, 1)


class _Records:
    """What earlier runs have of one task."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.seen: set[str] = set()
        self.ran: list[Trial] = []
        self.past: dict[str, Past] = {}
        self.best: Best | None = None
        self._rank = (True, math.inf)
        self._least: dict[str, float] = {}

    def add(self, run: str, engine: str, row: dict[str, Any], *, is_new: bool, unlike: bool) -> None:
        """A trial; `unlike` says that it was measured otherwise than the run at hand measures."""
        if run not in self.runs:
            self.runs.append(run)
        self.seen.add(row["key"])
        trial = _trial(row)
        latency = trial.latency_s
        if is_new:
            self._count(engine, latency)
        if latency is None:
            return
        self.ran.append(trial)
        if (unlike, latency) < self._rank:
            self._rank, self.best = (unlike, latency), Best(run, trial)

    def _count(self, engine: str, latency: float | None) -> None:
        known, least = self.past.get(engine, Past()), self._least.get(engine, math.inf)
        improved = latency is not None and latency < least * IMPROVED
        self._least[engine] = min(least, math.inf if latency is None else latency)
        self.past[engine] = replace(known, trials=known.trials + 1, since=0 if improved else known.since + 1)

    def had(self, engine: str, share: float) -> None:
        """A run had so many trials for each of its tasks, this one among them."""
        known = self.past.get(engine, Past())
        self.past[engine] = replace(known, share=known.share + share)

    def noted(self) -> dict[str, Any]:
        """What reuse.json says of the task."""
        best = self.best and {
            "run": self.best.run,
            "trial": self.best.trial.trial,
            "key": self.best.trial.key,
            "latency_s": self.best.trial.latency_s,
        }
        return {**{engine: asdict(past) for engine, past in self.past.items()}, "runs": self.runs, "best": best}


def past_of(trials: Sequence[Trial]) -> Past:
    """What the trials of a run with one task and one step, all of them distinct, are to a later run."""
    records = _Records()
    for trial in trials:
        records._count("", trial.latency_s)
    records.had("", len(trials))
    return records.past[""]


def _read(
    run: RunFolder, lines: int, wanted: Mapping[str, _Records], others: set[tuple[str, str]], *, unlike: bool
) -> None:
    """Add what the first lines of a run's trials say of some tasks.

    `others` are the trials of other tasks that were read before: what a fork has from its origin is counted once.
    """
    kinds = [step.kind for step in run.experiment.stages]
    infos = [info for info in run.tasks if info.tunable and info.weight > 0]
    new: Counter[str] = Counter()
    for row in islice(run.rows(), lines):
        if row["trial"] == 0:
            continue
        engine, records = kinds[row["step"]], wanted.get(row["task_key"])
        identity = (row["task_key"], row["key"])
        is_new = row["key"] not in records.seen if records else identity not in others
        new[engine] += is_new
        if records is None:
            others.add(identity)
        else:
            records.add(run.id, engine, row, is_new=is_new, unlike=unlike)
    for info in infos:
        if info.key in wanted:
            for engine, count in new.items():
                wanted[info.key].had(engine, count / len(infos))


def _trial(row: dict[str, Any]) -> Trial:
    """The trial of a row; of its decisions only the number of a template's point is kept."""
    decisions = row["decisions"] if len(row["decisions"]) == 1 else ()
    return Trial(**{**row, "decisions": decisions, "status": TrialStatus(row["status"])})


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
    engines = {step.kind for step in experiment.stages if isinstance(step, _ENGINES) and step.reuse}
    return sum(task[engine]["trials"] for task in noted["tasks"].values() for engine in engines & task.keys())
