"""The whole compiled model, timed end to end, side by side with what a user would run otherwise."""

from __future__ import annotations

import html
import importlib.util
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import psutil

from tvmlab.comparison_rows import comparison_rows, in_shared_turns
from tvmlab.core import InputError, MissingTool, RecordError
from tvmlab.measure.process import WorkerProcess
from tvmlab.measure.subjects import TURN_S, ask, load, recorded_target, start_worker, thread_count
from tvmlab.measure.watch import NoWatch, watch_of
from tvmlab.measure.whole_model import BASELINES, OPTIONAL
from tvmlab.records import RunFolder
from tvmlab.run import Run
from tvmlab.stats import enough_turns, ratio_in_turns

__all__ = ["Comparison", "compare", "compare_runs"]

ERROR_BOUND = 1e-4  # largest allowed error of the whole model, relative to its largest output
# AlexNet's 244 MB of weights: 0.85 GB in TVM, 1.1 GB in onnxruntime.
_RUNTIME_BYTES = 0.3e9
_WEIGHT_COPIES = 3.5
_CPU_TURN = (1, 0.03)  # who was frozen has its threads to spread and its caches to fill, which takes longer than 2 ms
_GPU_TURN = (5, 0.05)  # an idle GPU lowers its clocks: it is given 50 ms to raise them
_FEWEST_TURNS = 6  # of which a ratio has an interval (stats.ratio_in_turns)
_SAME = ("model", "batch", "dims", "seed")  # of runs that compute the same
_SLOW_S = 0.25  # a subject slower than this takes its turn in only some of the rounds
_PILOT, _MOST = 15, 60  # rounds that say how many are needed, and that are taken at most where nobody says how many
_WIDTH = 0.02  # of a ratio that is known well enough
_MUCH_SLOWER = 2.0  # than the first subject: nobody asks for the last percent of such a ratio


@dataclass(frozen=True)
class Comparison:
    """End-to-end latencies of the run's model and of the baselines, in milliseconds, and what they compute.

    A sample is one turn: one inference, on a GPU the median of five. `turns` of a subject are the numbers of those it
    took, since a slow one takes few. `ratios` are of tvmlab over the baseline, turn by turn (stats.ratio_in_turns):
    their medians with a 95 % interval, NaN with fewer than 6 turns; below 1 tvmlab is faster. `notes` says what else
    is to be known, such as that a CUDA graph failed.
    """

    run: str
    threads: int
    repeats: int
    subjects: dict[str, dict[str, list[Any]]]
    ratios: list[dict[str, Any]]
    numerics: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def frame(self) -> pd.DataFrame:
        """One row a subject; the columns of tvmlab.frames.comparison."""
        rows = comparison_rows(self.run, asdict(self))
        return pd.DataFrame(rows).drop(columns="run").set_index("subject")

    def __str__(self) -> str:
        lines = [
            f"tvmlab takes {row['ratio']:.3g} of {row['baseline']}'s time (too few turns for an interval)"
            if math.isnan(row["low"])
            else f"tvmlab takes {row['ratio']:.3g} [{row['low']:.3g}, {row['high']:.3g}] of {row['baseline']}'s time"
            for row in self.ratios
        ]
        frame = self.frame().to_string(float_format="{:.4g}".format)
        return "\n".join([frame, *lines, self._numerics_text(), *self.notes])

    __repr__ = __str__

    def _numerics_text(self) -> str:
        error, bound = self.numerics["max_error_over_max_output"], self.numerics["bound"]
        verdict = "within" if self.numerics["ok"] else "OUTSIDE"
        others = self.numerics["baselines"].items()
        far_off = [f"; {name} {theirs:.2g}, OUTSIDE it" for name, theirs in others if not theirs <= bound]
        text = f"outputs against onnxruntime: max error / max output {error:.2g}, {verdict} the bound {bound:g}"
        return text + "".join(far_off)

    def _repr_html_(self) -> str:
        table = self.frame().to_html(float_format="{:.4g}".format, na_rep="")
        said = "; ".join([self._numerics_text(), f"{self.threads} threads, end to end", *self.notes])
        return f"{table}<p>{html.escape(said)}</p>"


def compare(
    run: Run | RunFolder | str | Path,
    baselines: Sequence[str] = ("untuned", "onnxruntime"),
    *,
    repeats: int | None = None,
    threads: int | None = None,
) -> Comparison:
    """Time the run's compiled model and the baselines in turns, each in a process of its own, the others frozen.

    A baseline is "untuned", "onnxruntime" (always on the CPU), another run (id or folder) of the same model, batch,
    dims and seed, or an optional extra: "openvino" (fp32, latency hint, CPU), "torch" (eager, on the graph with its
    BatchNormalization folded) or "torch-compile" (max-autotune, on a GPU with CUDA graphs). torch runs on the run's
    device; "torch-tf32" and "torch-compile-tf32" may round factors to TensorFloat-32, which no other subject does. Of
    `repeats` turns each; None: 15, and after these as many as they say are needed for every ratio to have an interval
    of 2 % (stats.enough_turns), up to 60. With fewer than 6 a ratio has no interval. `threads` is the number each may
    use (default: the target's cores; the kernels stay as they were tuned). With the default the result is also written
    to the run folder as compare.json, which plots and reports show. All outputs are checked against onnxruntime's on
    the original model.

    Raises InputError for an unknown baseline, a run of other weights or inputs, or an operator that the torch baseline
    lacks, MissingTool for an extra that is not installed or if the models do not fit the free memory (not asked where
    the environment variable TVMLAB_CHECK_MEMORY is 0), RunError if the run has no target yet or a runtime fails.
    """
    folder = run.folder if isinstance(run, Run) else RunFolder.open(run)
    subjects = {"tvmlab": ("tvmlab", folder), **{name: _subject(name, folder) for name in baselines}}
    return _kept(folder, "tvmlab", list(baselines), _time(folder, subjects, repeats, threads))


def compare_runs(
    runs: Mapping[str, RunFolder],
    baselines: Sequence[str] = ("untuned", "onnxruntime"),
    *,
    repeats: int | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Time several runs of one model in turns with each other and with the baselines, for tvmlab.study.

    Returns `subjects` (samples_ms of each run, by its name here, and of each baseline: one a turn; and the numbers of
    these turns), `numerics` (max error / max output against onnxruntime), `threads`, `repeats` and `notes`. `repeats`
    is as of `compare`; without it the ratios to the first of `runs` say how many. What concerns it is also written to
    each run's compare.json. Raises as `compare` does.
    """
    first = next(iter(runs.values()))
    ours = {name: _subject(str(run.path.resolve()), first) for name, run in runs.items()}
    timing = _time(first, ours | {name: _subject(name, first) for name in baselines}, repeats, threads)
    for name, run in runs.items():
        _kept(run, name, list(baselines), timing)
    return {
        "subjects": {name: _subject_row(taken) for name, taken in timing.samples.items()},
        "numerics": timing.errors,
        "threads": timing.threads,
        "repeats": timing.repeats,
        "notes": timing.notes,
    }


@dataclass(frozen=True)
class _Timing:
    """What was measured in turns: seconds by subject and turn, errors against onnxruntime, and Comparison's notes."""

    threads: int
    usual: int
    repeats: int
    samples: dict[str, dict[int, float]]
    errors: dict[str, float]
    notes: list[str]


def _time(
    folder: RunFolder, subjects: dict[str, tuple[str, RunFolder]], repeats: int | None, threads: int | None
) -> _Timing:
    """Load every subject in a process of its own, check what it computes, and time them in turns."""
    if repeats is not None and repeats < 3:
        raise InputError(
            f"repeats={repeats} gives no median worth its name",
            remedy=f"ask for 3 or more, and for {_FEWEST_TURNS} or more if it is to have an interval",
        )
    target = recorded_target(folder)
    _require_memory(folder, len(subjects) + 1)
    usual = thread_count(target)
    threads = threads or usual
    # onnxruntime gives the right result, even if it is not timed.
    loaded = {**subjects, "onnxruntime": ("onnxruntime", folder)}
    watch = watch_of(target, folder.path)
    workers = {name: start_worker(folder, target, threads) for name in loaded}
    try:
        at_once = 1 if target.kind == "cuda" else os.cpu_count()  # torch tries kernels while it compiles
        found = _load_all(workers, loaded, threads, at_once)
        for name in loaded.keys() - subjects.keys():
            workers[name].kill()
        turn = _GPU_TURN if target.kind == "cuda" else _CPU_TURN
        throttled: list[str] = []
        samples = _take_turns({name: workers[name] for name in subjects}, repeats, turn, _look(watch, throttled))
    finally:
        for worker in workers.values():
            worker.kill()
        watch.note({"compared": list(subjects)})
        watch.close()
    errors = {name: worst_error(found[name][0], found["onnxruntime"][0]) for name in subjects}
    rounds = repeats or 1 + max(number for taken in samples.values() for number in taken)
    notes = [note for _, note in found.values() if note]
    if throttled:
        turns = sum(map(len, samples.values()))
        reasons = ", ".join(dict.fromkeys(throttled))
        notes.append(f"the GPU held its clocks back after {len(throttled)} of {turns} turns: {reasons}")
    return _Timing(threads, usual, rounds, samples, errors, notes)


def _look(watch: NoWatch, throttled: list[str]) -> Callable[[], None]:
    """What is to be done after each turn: read the device, and keep why it holds its clocks back, if it does."""

    def look() -> None:
        if why := watch.look():
            throttled.append(why)

    return look


def _require_memory(folder: RunFolder, count: int) -> None:
    """Raise MissingTool unless so many loaded models fit the memory: better than being killed half-way."""
    weights = 4 * folder.environment.get("model", {}).get("parameters", 0)
    needed, free = count * (_RUNTIME_BYTES + _WEIGHT_COPIES * weights), psutil.virtual_memory().available
    # A virtual machine may be given memory only as it asks for it.
    if needed > free and os.environ.get("TVMLAB_CHECK_MEMORY") != "0":
        raise MissingTool(
            f"{count} models of {weights / 1e6:,.0f} MB need about {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free",
            remedy="compare fewer at once, free some memory, or set TVMLAB_CHECK_MEMORY=0",
        )


def _kept(folder: RunFolder, name: str, baselines: list[str], timing: _Timing) -> Comparison:
    """The comparison of one subject with the baselines, also written to its run folder."""
    taken = {"tvmlab": timing.samples[name], **{other: timing.samples[other] for other in baselines}}
    subjects = {name: _subject_row(turns) for name, turns in taken.items()}
    result = Comparison(
        run=folder.id,
        threads=timing.threads,
        repeats=timing.repeats,
        subjects=subjects,
        ratios=[_ratio(subjects, other) for other in baselines],
        numerics=_numerics(timing.errors[name]) | {"baselines": {other: timing.errors[other] for other in baselines}},
        notes=timing.notes,
    )
    if timing.threads == timing.usual:  # else it does not belong beside the run's kernel latencies
        folder.write_json("compare.json", asdict(result))
    return result


def _subject(name: str, folder: RunFolder) -> tuple[str, RunFolder]:
    """Which runtime, on which run, a baseline names."""
    package = OPTIONAL.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise MissingTool(
            f"baseline {name!r} needs the package {package}",
            remedy=f"pip install -e '.[{package}]' in tvmlab's checkout",
        )
    if name in BASELINES:
        return name, folder
    try:
        other = RunFolder.open(name, folder.path.parent)
    except RecordError as error:
        raise InputError(
            f"unknown baseline {name!r}",
            remedy=f"known are {', '.join(BASELINES)} and the runs of the same model",
        ) from error
    # The seed too: it makes the inputs, and a zoo model's weights.
    asked, theirs = folder.experiment, other.experiment
    if differing := [knob for knob in _SAME if getattr(asked, knob) != getattr(theirs, knob)]:
        raise InputError(
            f"run {other.id} has another {' and '.join(differing)} than {folder.id}",
            remedy=f"compare runs of the same {', '.join(_SAME)}",
        )
    return "tvmlab", other


def _load_all(
    workers: dict[str, WorkerProcess], subjects: dict[str, tuple[str, RunFolder]], threads: int, at_once: int | None
) -> dict[str, tuple[list[Any], str]]:
    """Every runtime with the model loaded, so many at a time; returns each one's outputs and note.

    One that is loaded is frozen: its idle threads would spin while the others are compiled.
    """

    def loaded(name: str) -> tuple[list[Any], str]:
        runtime, folder = subjects[name]
        try:
            return load(name, workers[name], runtime, folder, threads)
        finally:
            workers[name].pause()

    if at_once == 1:  # in this thread: what it starts anew would end with another
        return {name: loaded(name) for name in subjects}
    with ThreadPoolExecutor(at_once) as pool:
        try:
            return dict(zip(subjects, pool.map(loaded, subjects), strict=True))
        except BaseException:  # leaving the block waits for the loads under way, which may take minutes
            for worker in workers.values():
                worker.abort()
            raise


def _take_turns(
    workers: dict[str, WorkerProcess],
    repeats: int | None,
    turn: tuple[int, float] = (1, 0.0),
    look: Callable[[], None] = lambda: None,
) -> dict[str, dict[int, float]]:
    """Seconds of each turn, by its number: one of each in every round, in an order that rotates; slow ones less often.

    All but the one whose turn it is are frozen, because the idle threads of TVM and of onnxruntime spin. `turn` is the
    inferences of a turn that count, and the seconds of others before them. Where no `repeats` are asked for, the pilot
    says how many; who takes more than twice as long as the first subject takes no part in more.
    """
    pilot = _PILOT if repeats is None else repeats
    once = {name: _turn(name, worker, *turn) for name, worker in workers.items()}
    every = {name: _every(taken, pilot) for name, taken in once.items()}
    samples: dict[str, dict[int, float]] = {name: {} for name in workers}
    names, wanted, number = list(workers), pilot, 0
    while number < wanted:
        start = number % len(names)
        for name in names[start:] + names[:start]:
            if number % every[name] == 0:
                samples[name][number] = _turn(name, workers[name], *turn)
                look()
        number += 1
        if number == wanted and repeats is None:
            names = [name for name in names if once[name] <= _MUCH_SLOWER * once[names[0]]]
            taken = [_subject_row(samples[name]) for name in names]
            wanted = max(wanted, min(_MOST, every[names[0]] * _enough(taken)))
    return samples


def _enough(subjects: list[dict[str, list[Any]]]) -> int:
    """How many turns the ratio of the first to each of the others needs, as far as these turns say."""
    first, *others = subjects
    return max((enough_turns(*in_shared_turns(first, other), _WIDTH) for other in others), default=0)


def _every(taken_s: float, repeats: int) -> int:
    """In every how many rounds a subject takes its turn: a power of two, so that one's rounds are among another's.

    >>> [_every(taken_s, 60) for taken_s in (0.01, 0.8, 1.5, 1.75, 100.0)]
    [1, 2, 4, 4, 8]
    """
    wanted = min(max(1, round(taken_s / _SLOW_S)), max(1, repeats // _FEWEST_TURNS))
    return 1 << (wanted.bit_length() - 1)


def _turn(name: str, worker: WorkerProcess, count: int, warm_s: float) -> float:
    """The median of a turn's inferences: they share its clock state, so they are no samples of their own."""
    worker.proceed()
    try:
        return median(ask(name, worker, ("time", count, warm_s), TURN_S, loaded=True))
    finally:
        worker.pause()


def _subject_row(taken: dict[int, float]) -> dict[str, list[Any]]:
    """A subject as it is kept."""
    return {"samples_ms": [seconds * 1e3 for seconds in taken.values()], "turns": list(taken)}


def _ratio(subjects: dict[str, dict[str, list[Any]]], baseline: str) -> dict[str, Any]:
    ratio, low, high = ratio_in_turns(*in_shared_turns(subjects["tvmlab"], subjects[baseline]))
    return {"subject": "tvmlab", "baseline": baseline, "ratio": ratio, "low": low, "high": high}


def _numerics(worst: float) -> dict[str, Any]:
    return {"max_error_over_max_output": worst, "bound": ERROR_BOUND, "ok": worst <= ERROR_BOUND}


def worst_error(found: list[Any], expected: list[Any]) -> float:
    """The largest error of any output, relative to that output's largest magnitude."""
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        scale = float(np.abs(theirs).max()) or 1.0
        error = float(np.abs(ours.reshape(theirs.shape).astype("float64") - theirs).max()) / scale
        worst = float(np.maximum(worst, error))  # a NaN is the worst there is, in whichever output
    return worst
