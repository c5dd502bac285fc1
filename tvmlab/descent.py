"""A droplet search, told step by step: which neighbours were tried, which coordinate moved, how the latency fell.

Everything is read from the trials: a neighbour was timed in turns with the point it would replace (its rival), and a
neighbour that became the rival of later ones was moved to. Nothing here needs TVM.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from tvmlab import frames
from tvmlab.core import EnumeratedSpace, InputError, Trial
from tvmlab.records import RunFolder
from tvmlab.stats import is_faster
from tvmlab.steps import Droplet

__all__ = ["P_VALUE", "STRATEGY", "moves", "of", "of_trials", "summary"]

STRATEGY = "droplet"  # what the trials of a droplet search call themselves
P_VALUE = float(Droplet.model_fields["p_value"].default)
_COLUMNS = (
    "order", "trial", "outcome", "changed", "change", "latency_us", "rival_us", "ratio", "pairs", "incumbent", "status",
    "key",
)  # fmt: skip


def summary(run: Any) -> pd.DataFrame:
    """The droplet searches of runs, one row a run, task and step: run, task, task_key, step, tried, moves, start_us,
    end_us, gain, ending.

    `start_us` is the start's latency, `end_us` that of the last point moved to, and `gain` what the moves saved: each
    move's ratio multiplied, as pairs that share what drifts. `ending` says that nothing beside the last point was left
    to try (a local minimum); it is empty where the trials or the time ended first, or if that was not noted yet.
    """
    rows = []
    for folder in frames.folders(run):
        names = {info.key: info.name for info in folder.tasks}
        by_task: dict[str, list[Trial]] = {}
        for trial in folder.trials():
            by_task.setdefault(trial.task_key, []).append(trial)
        for key, trials in by_task.items():
            for step in sorted({trial.step for trial in trials if trial.strategy == STRATEGY and trial.rival}):
                row = {"run": folder.id, "task": names.get(key, key), "task_key": key, "step": step}
                found = of_trials(trials, step=step, p_value=_p_value(folder, step))
                rows.append({**row, **_summary_of(found), "ending": folder.minima.get(str(step), {}).get(key, "")})
    columns = ["run", "task", "task_key", "step", "tried", "moves", "start_us", "end_us", "gain", "ending"]
    return pd.DataFrame(rows, columns=columns)


def _summary_of(found: pd.DataFrame) -> dict[str, Any]:
    moved = found[found["outcome"] == "moved"]
    first, last = found["rival_us"].dropna().iloc[:1], moved["latency_us"].iloc[-1:]
    return {
        "tried": len(found),
        "moves": len(moved),
        "start_us": first.iloc[0] if len(first) else np.nan,
        "end_us": last.iloc[0] if len(last) else np.nan,
        "gain": 1 - float(np.prod(moved["ratio"])),
    }


def of(run: Any, task: str, step: int | None = None) -> pd.DataFrame:
    """The droplet search of one task of one run, by the task's name or key: the frame of `of_trials`.

    Raises InputError for several runs, an unknown task, or one that droplet did not search.
    """
    found = frames.folders(run)
    if len(found) > 1:
        raise InputError("a descent is of one run", remedy="pass one run")
    keys = {info.key for info in found[0].tasks if task in (info.name, info.key)}
    if not keys:
        names = ", ".join(info.name for info in found[0].tasks)
        raise InputError(f"no task {task!r}", remedy=f"the tasks are {names}")
    trials = [trial for trial in found[0].trials() if trial.task_key in keys]
    first = next((trial.step for trial in trials if trial.strategy == STRATEGY), 0)
    return of_trials(trials, step=step, p_value=_p_value(found[0], first if step is None else step))


def _p_value(folder: RunFolder, step: int) -> float:
    """What the step asks of a move."""
    stages = folder.experiment.stages
    return getattr(stages[step], "p_value", P_VALUE) if step < len(stages) else P_VALUE


def of_trials(
    trials: Iterable[Trial],
    space: EnumeratedSpace | None = None,
    step: int | None = None,
    p_value: float = P_VALUE,
) -> pd.DataFrame:
    """One row a droplet trial of one task, in order. `trials` may hold the task's other trials too.

    Columns: order (from 1), trial (its number in the run), outcome ("moved": it became the incumbent, "faster": in
    every pair, but another of its batch was chosen or the search ended, "rejected", "failed", "start": timed without a
    rival), changed (the knobs in which it differs from its rival), change (in words), latency_us (median), rival_us
    (the incumbent's; both without what the machine drifted since the incumbent was first measured), ratio (median of
    the pairs' ratios, below 1: faster), pairs, incumbent (which one it was beside: the number of moves that led there),
    status, key.

    For a space whose points are numbered, `space` names the knobs. `step` is the stage of the experiment, where droplet
    searched in several; the first, if it is not given. Whether the search moved once more at its very end is found as
    it finds that itself, at this `p_value`. Raises InputError where droplet measured nothing.
    """
    every = list(trials)
    tried = [trial for trial in every if trial.strategy == STRATEGY and step in (None, trial.step)]
    if not tried:
        raise InputError("droplet measured nothing of this task", remedy="take a run with a Droplet() step")
    tried = [trial for trial in tried if trial.step == tried[0].step]
    points = {trial.key: trial for trial in every}
    accepted = _accepted(tried) | _last(tried, p_value)
    places: dict[str, int] = {}  # of the incumbents, in order
    rows = []
    for order, trial in enumerate(tried, start=1):
        outcome = "moved" if order - 1 in accepted else _outcome(trial)
        changed = _changed(points.get(trial.rival), trial, space) if trial.rival else {}
        rows.append(
            {
                "order": order,
                "trial": trial.trial,
                "outcome": outcome,
                "changed": tuple(changed),
                "change": "; ".join(f"{name}: {text}" for name, text in changed.items()),
                **_latencies(trial),
                "incumbent": places.setdefault(trial.rival, len(places)) if trial.rival else 0,
                "status": str(trial.status),
                "key": trial.key,
            }
        )
    return pd.DataFrame(rows, columns=_COLUMNS)


def moves(found: pd.DataFrame) -> list[str]:
    """The way down in words, a sentence a move, for a frame of `of_trials`; the last says where it ended."""
    rows = found[found["outcome"] == "moved"]
    said = [
        f"{number}. {row['change'] or 'another point'}: {100 * (1 - row['ratio']):.1f} % faster "
        f"over {_count(row['pairs'], 'pair')}."
        for number, row in enumerate(rows.to_dict("records"), start=1)
    ]
    left = found[(found["incumbent"] == len(rows)) & (found["outcome"] != "start")]
    ended = f"After that {_count(len(left), 'neighbour')} more, none of which was taken." if len(left) else ""
    return [*said, ended or "There the search ended."]


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"


def _accepted(tried: Sequence[Trial]) -> set[int]:
    """Where the trials are that led to a move: the last one of a point before it is first the rival of another."""
    found: set[int] = set()
    last: dict[str, int] = {}
    for place, trial in enumerate(tried):
        if trial.rival in last:
            found.add(last.pop(trial.rival))
        if trial.ok and trial.rival:
            last[trial.key] = place
    return found


def _last(tried: Sequence[Trial], p_value: float) -> set[int]:
    """Where the trial is that led to a move of which no later trial tells; empty if there was none.

    By the rule of tvmlab.search.droplet: the fastest of those that beat the last incumbent at the p-value, divided by
    how many were timed beside it once; what was timed beside it again is a test of its own.
    """
    stood_on = next((trial.rival for trial in reversed(tried) if trial.rival), None)
    rivals = {trial.key: place for place, trial in enumerate(tried) if trial.rival == stood_on}  # the last of each
    times = Counter(trial.key for trial in tried)
    once = sum(tried[place].ok and times[key] == 1 for key, place in rivals.items())
    winners = [
        place for key, place in rivals.items() if _beats(tried[place], p_value, 1 if times[key] > 1 else max(1, once))
    ]
    return {min(winners, key=lambda place: _ratio(tried[place]))} if winners else set()


def _beats(trial: Trial, p_value: float, tests: int) -> bool:
    paired = trial.ok and bool(trial.rival)
    return paired and is_faster(trial.latencies_s, trial.rival_latencies_s, p_value, tests)


def _ratio(trial: Trial) -> float:
    return median(ours / theirs for ours, theirs in zip(trial.latencies_s, trial.rival_latencies_s, strict=True))


def _outcome(trial: Trial) -> str:
    """What became of a trial that led to no move."""
    if not trial.ok:
        return "failed"
    if not trial.rival:
        return "start"
    pairs = list(zip(trial.latencies_s, trial.rival_latencies_s, strict=True))
    return "faster" if pairs and all(ours < theirs for ours, theirs in pairs) else "rejected"


def _latencies(trial: Trial) -> dict[str, Any]:
    pairs = len(trial.rival_latencies_s) if trial.ok else 0
    return {
        "latency_us": np.nan if trial.latency_s is None else trial.latency_s * 1e6,
        "rival_us": (trial.reference_s or median(trial.rival_latencies_s)) * 1e6 if pairs else np.nan,
        "ratio": _ratio(trial) if pairs else np.nan,
        "pairs": pairs,
    }


def _changed(before: Trial | None, after: Trial, space: EnumeratedSpace | None) -> dict[str, str]:
    """The knobs in which two points differ, with what became of each; empty where the first is not known."""
    if before is None:
        return {}
    old, new = _values(before, space), _values(after, space)
    if before.sketch != after.sketch or old.keys() != new.keys():
        return {"sketch": f"{before.sketch} → {after.sketch}"}
    return {name: f"{_text(old[name])} → {_text(new[name])}" for name in old if old[name] != new[name]}


def _values(trial: Trial, space: EnumeratedSpace | None) -> dict[str, Any]:
    decisions = list(trial.decisions)
    if space is not None and len(decisions) == 1:
        return space[decisions[0]]
    if len(decisions) == 1:
        return {"point": decisions[0]}
    return {
        f"{'tile' if isinstance(value, list) else 'choice'} {place}": value for place, value in enumerate(decisions)
    }


def _text(value: Any) -> str:
    """A tile's parts as a product.

    >>> _text([1, 7, 4, 2]), _text(3)
    ('1·7·4·2', '3')
    """
    return "·".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
