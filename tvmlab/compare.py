"""The whole compiled model, timed end to end, side by side with what a user would run otherwise."""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tvmlab import frames
from tvmlab.core import InputError, MissingTool, RecordError
from tvmlab.measure.process import WorkerProcess
from tvmlab.measure.subjects import LOAD_S, TURN_S, ask, recorded_target, start_worker, thread_count
from tvmlab.measure.whole_model import BASELINES, OPTIONAL
from tvmlab.records import RunFolder
from tvmlab.run import Run
from tvmlab.stats import bootstrap_ratio

__all__ = ["Comparison", "compare"]

_BOUND = 1e-4  # largest allowed error of the whole model, relative to its largest output
_SLOW_S = 0.25  # a subject slower than this takes its turn in only some of the rounds


@dataclass(frozen=True)
class Comparison:
    """End-to-end latencies of the run's model and of the baselines, in milliseconds, and what they compute.

    `ratios` are medians of tvmlab over the baseline, with a 95 % bootstrap interval; below 1 tvmlab is faster.
    """

    run: str
    threads: int
    repeats: int
    subjects: dict[str, dict[str, list[float]]]
    ratios: list[dict[str, Any]]
    numerics: dict[str, Any]

    def frame(self) -> pd.DataFrame:
        """One row a subject; the columns of tvmlab.frames.comparison."""
        rows = frames.comparison_rows(self.run, asdict(self))
        return pd.DataFrame(rows).drop(columns="run").set_index("subject")

    def __str__(self) -> str:
        lines = [
            f"tvmlab takes {row['ratio']:.3g} [{row['low']:.3g}, {row['high']:.3g}] of {row['baseline']}'s time"
            for row in self.ratios
        ]
        return "\n".join([self.frame().to_string(float_format="{:.4g}".format), *lines, self._numerics_text()])

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
        return f"{table}<p>{html.escape(self._numerics_text())}; {self.threads} threads, end to end</p>"


def compare(
    run: Run | RunFolder | str | Path,
    baselines: Sequence[str] = ("untuned", "onnxruntime"),
    *,
    repeats: int = 30,
    threads: int | None = None,
) -> Comparison:
    """Time the run's compiled model and the baselines in turns, each in a process of its own, the others frozen.

    A baseline is "untuned", "onnxruntime", another run of the same model (id or folder), or an optional extra: "torch"
    (eager, inference mode, on the graph with its BatchNormalization folded) or "openvino" (fp32, latency hint).
    `threads` is the number each may use (default: the target's cores; the kernels stay as they were tuned). With the
    default the result is also written to the run folder as compare.json, which plots and reports show.
    All outputs are checked against onnxruntime's on the
    original model.

    Raises InputError for an unknown baseline or an operator that the torch baseline lacks, MissingTool for an extra
    that is not installed, RunError if the run has no target yet or a runtime fails.
    """
    folder = run.folder if isinstance(run, Run) else RunFolder.open(run)
    subjects = {"tvmlab": ("tvmlab", folder), **{name: _subject(name, folder) for name in baselines}}
    if repeats < 3:
        raise InputError(f"repeats={repeats} gives no interval", remedy="ask for 3 or more")
    target = recorded_target(folder)
    usual = thread_count(target)
    threads = threads or usual
    # onnxruntime gives the right result, even if it is not timed.
    loaded = {**subjects, "onnxruntime": ("onnxruntime", folder)}
    workers = {name: start_worker(folder, target, threads) for name in loaded}
    try:
        outputs = _load_all(workers, loaded, threads)
        for name in loaded.keys() - subjects.keys():
            workers[name].kill()
        samples = _take_turns({name: workers[name] for name in subjects}, repeats)
    finally:
        for worker in workers.values():
            worker.kill()
    result = Comparison(
        run=folder.id,
        threads=threads,
        repeats=repeats,
        subjects={name: {"samples_ms": [s * 1e3 for s in values]} for name, values in samples.items()},
        ratios=[_ratio(samples, name) for name in baselines],
        numerics=_numerics(outputs["tvmlab"], outputs["onnxruntime"])
        | {"baselines": {name: _error(outputs[name], outputs["onnxruntime"]) for name in baselines}},
    )
    if threads == usual:  # on another number of threads it does not belong beside the run's kernel latencies
        folder.write_json("compare.json", asdict(result))
    return result


def _subject(name: str, folder: RunFolder) -> tuple[str, RunFolder]:
    """Which runtime, on which run, a baseline names."""
    if name in OPTIONAL and importlib.util.find_spec(name) is None:
        raise MissingTool(f"baseline {name!r} needs the package {name}", remedy=f"pip install 'tvmlab[{name}]'")
    if name in BASELINES:
        return name, folder
    try:
        other = RunFolder.open(name, folder.path.parent)
    except RecordError as error:
        raise InputError(
            f"unknown baseline {name!r}",
            remedy=f"known are {', '.join(BASELINES)} and the runs of the same model",
        ) from error
    if (other.experiment.model, other.experiment.batch) != (folder.experiment.model, folder.experiment.batch):
        raise InputError(f"run {other.id} is of another model or batch", remedy="compare runs of one model")
    return "tvmlab", other


def _load_all(
    workers: dict[str, WorkerProcess], subjects: dict[str, tuple[str, RunFolder]], threads: int
) -> dict[str, list[Any]]:
    """Every runtime with the model loaded, side by side; returns each one's outputs."""
    with ThreadPoolExecutor(len(workers)) as pool:
        asked = {
            name: pool.submit(ask, name, workers[name], ("load", runtime, str(folder.path.resolve()), threads), LOAD_S)
            for name, (runtime, folder) in subjects.items()
        }
        return {name: future.result() for name, future in asked.items()}


def _take_turns(workers: dict[str, WorkerProcess], repeats: int) -> dict[str, list[float]]:
    """Samples in seconds. One inference of each in every round, in an order that rotates; slow ones less often.

    All but the one whose turn it is are frozen, because the idle threads of TVM and of onnxruntime spin.
    """
    for worker in workers.values():
        worker.pause()
    once = {name: _turn(name, worker) for name, worker in workers.items()}
    every = {name: min(max(1, round(values[0] / _SLOW_S)), max(1, repeats // 3)) for name, values in once.items()}
    samples: dict[str, list[float]] = {name: [] for name in workers}
    names = list(workers)
    for number in range(repeats):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            if number % every[name] == 0:
                samples[name] += _turn(name, workers[name])
    return samples


def _turn(name: str, worker: WorkerProcess) -> list[float]:
    worker.proceed()
    try:
        return ask(name, worker, ("time", 1), TURN_S)
    finally:
        worker.pause()


def _ratio(samples: dict[str, list[float]], baseline: str) -> dict[str, Any]:
    ratio, low, high = bootstrap_ratio(samples["tvmlab"], samples[baseline])
    return {"subject": "tvmlab", "baseline": baseline, "ratio": ratio, "low": low, "high": high}


def _numerics(found: list[Any], expected: list[Any]) -> dict[str, Any]:
    worst = _error(found, expected)
    return {"max_error_over_max_output": worst, "bound": _BOUND, "ok": worst <= _BOUND}


def _error(found: list[Any], expected: list[Any]) -> float:
    """The largest error of any output, relative to that output's largest magnitude."""
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        scale = float(np.abs(theirs).max()) or 1.0
        error = float(np.abs(ours.reshape(theirs.shape).astype("float64") - theirs).max()) / scale
        worst = error if not error <= worst else worst  # a NaN is the worst there is
    return worst
