"""What earlier runs have of a run's tasks: how much was tried, by which engine, how it did. Reading needs no TVM."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

from tvmlab.core import IMPROVED, RecordError, Trial, TrialStatus, standing
from tvmlab.experiment import Selective
from tvmlab.records import RunFolder

__all__ = ["EXHAUSTED_FILE", "IMPORTED", "SKETCHES_FILE", "Best", "Past", "Records", "past_of", "read"]

EXHAUSTED_FILE = "exhausted.json"  # of a run: by task, the size of a template space that has nothing more to give
# By task, the version of TVM whose sketches have nothing more to give: another one's rules may make others.
SKETCHES_FILE = "exhausted_sketches.json"
IMPORTED = "imported"  # the model and the strategy of what is not of a run
_SHARED = "transfer"  # the strategy of those trials of a Selective step that no engine chose


@dataclass(frozen=True)
class Past:
    """What an engine did to a task in earlier runs.

    `trials` are its distinct schedules. `share` is how many trials these runs had for each of their tasks: Ansor
    spreads a budget over the tasks, so one that got few has had its part. The last `since` trials brought nothing;
    imported ones say nothing of that, as the fastest alone are there, in no order.
    """

    trials: int = 0
    share: float = 0.0
    since: int = 0


@dataclass(frozen=True)
class Best:
    """The fastest schedule that earlier runs have of a task: the run, and its trial."""

    run: str
    trial: Trial


class Records:
    """What earlier runs have of one task.

    `trials` have their decisions only where these are the number of a template's point; `seen` are the keys of all
    programs; `exhausted` is the size of the template space that they used up (0: they did not), `exhausted_sketches`
    the version of TVM whose sketches they used up (none: they did not).
    """

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.seen: set[str] = set()
        self.trials: list[Trial] = []
        self.past: dict[str, Past] = {}
        self.best: Best | None = None
        self.exhausted = 0
        self.exhausted_sketches = ""
        self._rank = (True, math.inf)
        self._least: dict[str, float] = {}

    def add(self, run: str, engine: str, trial: Trial, *, unlike: bool) -> bool:
        """A trial, and whether its program is new; `unlike`: it was measured otherwise than the run at hand does."""
        if run not in self.runs:
            self.runs.append(run)
        is_new = trial.key not in self.seen
        self.seen.add(trial.key)
        self.trials.append(trial)
        latency = trial.latency_s
        if is_new:
            self.count(engine, latency, is_in_order=trial.strategy != IMPORTED)
        if latency is not None and (unlike, latency) < self._rank:
            self._rank, self.best = (unlike, latency), Best(run, trial)
        return is_new

    def count(self, engine: str, latency: float | None, *, is_in_order: bool = True) -> None:
        """A new schedule; the trials before it are told first, unless they are in no order."""
        known, least = self.past.get(engine, Past()), self._least.get(engine, math.inf)
        improved = latency is not None and latency < least * IMPROVED
        self._least[engine] = min(least, math.inf if latency is None else latency)
        since = 0 if improved or not is_in_order else known.since + 1
        self.past[engine] = replace(known, trials=known.trials + 1, since=since)

    def had(self, engine: str, share: float) -> None:
        """A run had so many trials for each of its tasks, this one among them."""
        known = self.past.get(engine, Past())
        self.past[engine] = replace(known, share=known.share + share)

    @property
    def known(self) -> bool:
        """Whether there is anything to note."""
        return bool(self.runs or self.exhausted or self.exhausted_sketches)

    def noted(self) -> dict[str, Any]:
        """What reuse.json says of the task."""
        best = self.best and {
            "run": self.best.run,
            "trial": self.best.trial.trial,
            "key": self.best.trial.key,
            "latency_s": self.best.trial.latency_s,
        }
        spaces = {"exhausted": self.exhausted, "exhausted_sketches": self.exhausted_sketches}
        exhausted = {name: space for name, space in spaces.items() if space}
        engines = {engine: asdict(past) for engine, past in self.past.items()}
        return {**engines, **exhausted, "runs": self.runs, "best": best}


def past_of(trials: Sequence[Trial]) -> Past:
    """What the trials of a run with one task and one step, all of them distinct, are to a later run."""
    records = Records()
    for trial in trials:
        records.count("", trial.latency_s)
    records.had("", len(trials))
    return records.past[""]


def read(
    run: RunFolder, lines: int, wanted: Mapping[str, Records], others: set[tuple[str, str]], *, unlike: bool
) -> None:
    """Add what the first lines of a run's trials say of some tasks; a reading that was refuted says nothing.

    `others` are the trials of other tasks that were read before: what a fork has from its origin is counted once.
    Raises RecordError for a damaged run, of which nothing is added then.
    """
    stages = run.experiment.stages
    exhausted, sketches = (run.read_json(name, missing={}) for name in (EXHAUSTED_FILE, SKETCHES_FILE))
    mine, foreign = _divided(run, lines, wanted)
    new: dict[tuple[int, str], Counter[str]] = defaultdict(Counter)  # by stage and engine, of each task
    for identity, made in foreign.items():
        if identity not in others:
            others.add(identity)
            new[made][identity[0]] += 1
    for trial in standing(mine):
        engine = _engine(stages[trial.step], trial.strategy)
        if wanted[trial.task_key].add(run.id, engine, trial, unlike=unlike):
            new[trial.step, engine][trial.task_key] += 1
    _share(run, stages, new, wanted)
    for key, size in exhausted.items():
        if key in wanted:
            wanted[key].exhausted = size
    for key, version in sketches.items():
        if key in wanted:
            wanted[key].exhausted_sketches = version


def _divided(
    run: RunFolder, lines: int, wanted: Mapping[str, Records]
) -> tuple[list[Trial], dict[tuple[str, str], tuple[int, str]]]:
    """The trials of the wanted tasks; of the others task and program, and the stage and engine that tried it first."""
    stages = run.experiment.stages
    mine: list[Trial] = []
    foreign: dict[tuple[str, str], tuple[int, str]] = {}
    try:
        for row in islice(run.rows(), lines):
            if row["trial"] == 0:
                continue
            engine = _engine(stages[row["step"]], row["strategy"])
            if row["task_key"] in wanted:
                mine.append(_trial(row))
            else:
                foreign.setdefault((row["task_key"], row["key"]), (row["step"], engine))
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise RecordError(
            f"{run.path / 'trials.jsonl'} has a line that is no trial ({error})", remedy="delete that line"
        ) from None
    return mine, foreign


def _engine(step: Any, strategy: str) -> str:
    """Whose trials a step's count as: what Selective searches is searched as its engine does."""
    return step.engine if isinstance(step, Selective) and strategy != _SHARED else step.kind


def _share(
    run: RunFolder,
    stages: Sequence[Any],
    new: Mapping[tuple[int, str], Counter[str]],
    wanted: Mapping[str, Records],
) -> None:
    """What a run's stages had for each of their tasks: all of the model, or those that a Selective step searched."""
    keys = [info.key for info in run.tasks if info.tunable and info.weight > 0]
    for (stage, engine), counts in new.items():
        searched = list(counts) if isinstance(stages[stage], Selective) else keys
        for key in searched:
            if key in wanted:
                wanted[key].had(engine, counts.total() / len(searched))


def _trial(row: dict[str, Any]) -> Trial:
    """The trial of a row; of its decisions only the number of a template's point is kept."""
    decisions = row["decisions"] if len(row["decisions"]) == 1 else ()
    return Trial(**{**row, "decisions": decisions, "message": "", "status": TrialStatus(row["status"])})
