"""Three experiments by name, and about how long an experiment takes on this machine, before it starts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from tvmlab.columns import TrialReader
from tvmlab.core import InputError, Packing, RecordError, TaskInfo
from tvmlab.earlier import ended
from tvmlab.experiment import Ansor, AutoTVM, Experiment, LayoutTuning, Measure, Selective, TransferTuning
from tvmlab.layout_plan import LayoutPlan, described
from tvmlab.layout_step import packed_at_first
from tvmlab.layouts import sites
from tvmlab.models import Model, load_model, parameters_of
from tvmlab.overview import pack
from tvmlab.rates import TRIALS_PER_S, building_cores, guessed_rate
from tvmlab.records import default_runs_dir
from tvmlab.reuse import Reuse
from tvmlab.selective_step import clustered, planned, sizes_of
from tvmlab.sources import resolve
from tvmlab.spaces.template import sizes
from tvmlab.store import noted_frame
from tvmlab.study_length import START_S, duration_text
from tvmlab.targets import Target
from tvmlab.targets import target as named_target
from tvmlab.tasks import Task

__all__ = ["PRESETS", "TimeEstimate", "best", "estimate_time", "preset", "presets"]

# name -> what it is, in a sentence
PRESETS = {
    "fast": "Fast kernels within minutes.",
    "default": "The same search with its engine's default budget.",
    "max": "Both engines, 3,000 trials a task each, no early stopping; the faster schedule of each task is kept.",
}
_WEIGHT_BYTES = 4
_MAX_TRIALS = 3000
_MAX_RANDOM = 500
_ENOUGH = 20  # trials of a kind of step in a past run that say how fast these are
_NEWEST = 5  # past runs that a rate is taken from
_UNSEARCHED = "; selective without what is searched after all because shared schedules are poor"

_plans: dict[tuple[str, Target, LayoutTuning], LayoutPlan] = {}


def best(model: str, target: str = "auto", **knobs: Any) -> Experiment:
    """The experiment for a user who does not want to choose: what makes this model fast within minutes.

    On a CPU the layout search, then templates for every kernel; candidates are timed with cold weights if those of the
    model do not fit the last cache, since each inference then reads them from memory. On a GPU templates, then the
    sketch search of every kernel, of which the faster schedule is kept. `knobs` are further ones of Experiment:
    time_limit_s, seed, batch, dims. Raises InputError for an unknown model or target, and for `steps` or `measure`.

    >>> [step.kind for step in best("alexnet", "cpu").steps]
    ['layouttuning', 'autotvm']
    """
    if decided := [name for name in ("measure", "steps") if name in knobs]:
        raise InputError(
            f"a preset decides {' and '.join(decided)} itself",
            remedy="leave them out, or write an Experiment with the steps that presets(model) shows",
        )
    found = named_target(target)
    steps: tuple[Any, ...] = (
        AutoTVM(kernel_trials=64, early_stopping_threshold=32),
        Ansor(trials_per_kernel=64, early_stopping_threshold=32),
    )
    measure = Measure()
    if found.kind == "llvm":
        steps = (LayoutTuning(), AutoTVM(kernel_trials=48, early_stopping_threshold=24))
        weights = _WEIGHT_BYTES * parameters_of(model)
        measure = Measure(cold_weights=weights > found.details.get("cache_bytes", math.inf))
    return Experiment(model=model, target=target, steps=steps, measure=measure, **knobs)


def preset(name: str, model: str, target: str = "auto", **knobs: Any) -> Experiment:
    """The experiment of a preset; `knobs` are further ones of Experiment (seed, time_limit_s, batch, dims).

    "fast" is `tvmlab.best`: fast kernels within minutes. "default" gives the same search its engine's default budget.
    "max" is the seed texts' advice for the best performance: both engines with 3000 trials a task, no early stopping,
    at least 3000 new trials of AutoTVM's of which 500 start at random, the faster schedule of each task kept. Each
    searches what the one before it searches, and more: on a CPU templates in layouts that are chosen first, on a GPU
    templates and sketches. `estimate_time` says how long. Raises InputError for an unknown name, model or target, and
    for knobs that a preset decides itself.

    >>> [step.code() for step in preset("default", "alexnet", "cpu").steps]
    ['LayoutTuning()', 'AutoTVM()']
    """
    if name not in PRESETS:
        raise InputError(f"there is no preset {name!r}", remedy=f"there are {', '.join(PRESETS)}")
    fast = best(model, target, **knobs)
    return fast.model_copy(update={"steps": _steps(name, fast.steps)})


def _steps(name: str, fast: tuple[Any, ...]) -> tuple[Any, ...]:
    if name == "fast":
        return fast
    engines = [step for step in fast if isinstance(step, AutoTVM | Ansor)]
    before = [step for step in fast if step not in engines]
    if name == "default":
        return (*before, *(type(engine)() for engine in engines))
    autotvm = AutoTVM(
        kernel_trials=_MAX_TRIALS,
        early_stopping_threshold="100 %",
        exploration_trials=_MAX_TRIALS,
        random_trials=_MAX_RANDOM,
    )
    ansor = Ansor(trials_per_kernel=_MAX_TRIALS, early_stopping_threshold="100 %")
    return (*before, autotvm, ansor)


@dataclass(frozen=True)
class TimeEstimate:
    """About how long an experiment takes, at the most: `seconds` for so many `trials`.

    `reused` are trials of earlier runs that it counts on. `basis` says, for each kind of step, at how many trials a
    second, and whether past runs on this machine say so. Early stopping ends it sooner, invalid points of templates do;
    with Selective it takes longer where tasks are searched after all because shared schedules serve them poorly.

    `layouts` is the earlier run whose layouts it takes ("": none), `past` what it takes of each task, one row a task:
    the columns of `tvmlab.reused` but the last.
    """

    seconds: float
    trials: int
    reused: int
    basis: str
    layouts: str = ""
    past: pd.DataFrame = field(default_factory=pd.DataFrame, compare=False, repr=False)

    def __str__(self) -> str:
        reused = f" beside {self.reused:,} of earlier runs" if self.reused else ""
        return f"at most about {duration_text(self.seconds)}: {self.trials:,} trials{reused}; {self.basis}"


def presets(model: str, target: str = "auto", runs_dir: str | Path | None = None, **knobs: Any) -> pd.DataFrame:
    """The presets of a model, by name: steps, trials (at most), reused, seconds, time, basis; see TimeEstimate.

    `knobs` are as in `preset`. It takes some seconds: the model is cut into tasks. Raises as `preset` does.
    """
    rows = []
    for name in PRESETS:
        asked = preset(name, model, target, **knobs)
        found = estimate_time(asked, runs_dir)
        shown = {"preset": name, "steps": " > ".join(step.code() for step in asked.steps)}
        numbers = {each: getattr(found, each) for each in ("trials", "reused", "seconds", "basis")}
        rows.append(shown | numbers | {"time": duration_text(found.seconds)})
    columns = ["preset", "steps", "trials", "reused", "seconds", "time", "basis"]
    return pd.DataFrame(rows, columns=columns).set_index("preset")


def estimate_time(experiment: Experiment, runs_dir: str | Path | None = None) -> TimeEstimate:
    """About how long an experiment takes on this machine at the most, what it reuses from a runs folder left out.

    The rates are those of the newest past runs there on its target, of the same model if there are some; where there
    are none, guesses for as many cores as build. It takes some seconds: the model is cut into tasks. Raises
    InputError for an unknown model or target, or for a TransferTuning without anything to take from.
    """
    parent = Path(runs_dir) if runs_dir is not None else default_runs_dir()
    target = named_target(experiment.target)
    rates = _rates(experiment, target, parent)
    reuse = Reuse.forecast(experiment, parent, target)
    trials, tasks, layouts = _asked(experiment, target, reuse, parent)
    stages = experiment.stages
    packings = 2 if not layouts and isinstance(stages[0], LayoutTuning) else 1  # the chosen layouts have new kernels
    seconds = START_S + packings * len(tasks) / rates["default"][0]
    seconds += sum(count / rates[step.kind][0] for step, count in zip(stages, trials, strict=True))
    limited = min(seconds, experiment.time_limit_s or seconds)
    kinds = dict.fromkeys(step.kind for step in stages)
    basis = ", ".join(f"{kind} {rates[kind][0]:.2g} trials/s ({rates[kind][1]})" for kind in kinds)
    basis += _UNSEARCHED if "selective" in kinds else ""
    past = noted_frame(reuse.noted, tasks, experiment)
    return TimeEstimate(limited, sum(trials), reuse.counted, basis, layouts, past)


def _asked(
    experiment: Experiment, target: Target, reuse: Reuse, runs_dir: Path
) -> tuple[list[int], list[TaskInfo], str]:
    """The trials of each stage, at the most; the tasks; the earlier run whose layouts are taken, if one is."""
    model = load_model(experiment.model, batch=experiment.batch, seed=experiment.seed, dims=experiment.dims)
    first = experiment.stages[0]
    layouts, taken = 0, ""
    if isinstance(first, LayoutTuning) and (chosen := reuse.layouts(first, list(map(described, sites(model))))):
        taken, assignment = chosen
        packings = {row["site"]: Packing.parse(row["packing"]) for row in assignment["sites"]}
        found = pack(model, target, {site: packing for site, packing in packings.items() if packing.block}).tasks
    elif isinstance(first, LayoutTuning):
        plan = _layout_plan(model, target, first)
        layouts = first.total_trials(len(plan.variants)) + first.transform_trials * len(plan.copies)
        found = plan.tasks
    else:
        sources = [
            resolve(step.source, experiment.model, target, runs_dir)
            for step in experiment.stages
            if isinstance(step, TransferTuning)
        ]
        found = pack(model, target, packed_at_first(model, target, experiment.stages, sources)).tasks
    counted = [task for task in found if task.info.tunable and task.info.weight > 0]
    keys = [task.key for task in counted]
    reuse.take(keys, sizes(counted, target.to_tvm()))

    def trials_of(number: int, step: Any) -> int:
        if isinstance(step, Selective):
            return _selected(step, counted, target)
        return layouts if isinstance(step, LayoutTuning) else reuse.plan(number, keys).total

    trials = [trials_of(number, step) for number, step in enumerate(experiment.stages)]
    return trials, [task.info for task in counted], taken


def _selected(step: Selective, tasks: Sequence[Task], target: Target) -> int:
    """The trials of a selective step, at the most, but for tasks that are searched after all."""
    device = target.to_tvm()
    _, depends = clustered(tasks, device, templates=step.engine == "autotvm", least=step.similarity)
    on = {task.key: tasks[representative].key for task, representative in zip(tasks, depends, strict=True)}
    return planned(step, on, sizes_of(step, tasks, device))


def _layout_plan(model: Model, target: Target, step: LayoutTuning) -> LayoutPlan:
    """What a layout step has to choose from; the last is kept, as it takes seconds and presets share it."""
    key = (model.sha256, target, step)
    if key not in _plans:
        _plans.clear()
        _plans[key] = LayoutPlan(model, target, step)
    return _plans[key]


def _rates(experiment: Experiment, target: Target, runs_dir: Path) -> Mapping[str, tuple[float, str]]:
    """Trials a second of each kind of step, and where that is from."""
    found: dict[str, list[tuple[bool, int, float]]] = defaultdict(list)  # same model, trials, seconds; oldest first
    for run in ended(runs_dir, target):
        same = run.experiment.model == experiment.model
        try:
            spent_there = _spent(run)
        except RecordError:  # what is damaged says nothing of the rate
            continue
        for kind, count, seconds in spent_there:
            if count >= _ENOUGH and seconds > 0:
                found[kind].append((same, count, seconds))
    cores = building_cores(experiment.measure)
    guessed = f"guessed for {cores} core{'' if cores == 1 else 's'}"
    rates = {kind: (guessed_rate(kind, cores), guessed) for kind in TRIALS_PER_S}
    for kind, spent in found.items():
        used = ([each for each in spent if each[0]] or spent)[-_NEWEST:]
        rate = sum(count for _, count, _ in used) / sum(seconds for *_, seconds in used)
        rates[kind] = (rate, f"{len(used)} past run{'s' if len(used) > 1 else ''} here")
    return rates


def _spent(run: Any) -> Sequence[tuple[str, int, float]]:
    """The kind of each stage of a run, its trials and the seconds that they took, those of a fork's origin left out.

    First what is measured before any stage, of kind "default".
    """
    reader = TrialReader(["step", "trial", "elapsed_s"])
    reader.read(run)
    rows = reader.frame()
    rows = rows[rows["trial"] > run.read_json("fork.json", missing={"trials": -1})["trials"]]
    before = rows.loc[(rows["trial"] == 0) & (rows["trial"].cummax() == 0), "elapsed_s"]
    spent = [("default", len(before), float(before.max() - before.min()))] if len(before) else []
    began = rows.loc[rows["trial"] == 0, "elapsed_s"].max()
    for number, step in enumerate(run.experiment.stages):
        mine = rows[(rows["step"] == number) & (rows["trial"] > 0)]
        if len(mine):
            start = min(began, mine["elapsed_s"].min()) if began == began else mine["elapsed_s"].min()
            spent.append((step.kind, len(mine), float(mine["elapsed_s"].max() - start)))
            began = mine["elapsed_s"].max()
    return spent
