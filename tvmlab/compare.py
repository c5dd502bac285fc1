"""The whole compiled model, timed end to end, side by side with what a user would run otherwise."""

from __future__ import annotations

import html
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tvmlab import frames
from tvmlab.core import InputError, RecordError, RunError
from tvmlab.measure.process import WorkerDied, WorkerProcess, WorkerTimeout
from tvmlab.measure.whole_model import BASELINES
from tvmlab.records import RunFolder
from tvmlab.run import Run
from tvmlab.stats import bootstrap_ratio
from tvmlab.targets import Target

__all__ = ["Comparison", "compare"]

_BOUND = 1e-4  # largest allowed error of the whole model, relative to its largest output
_LOAD_S = 1800.0
_TURN_S = 600.0
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
        return f"outputs against onnxruntime: max error / max output {error:.2g}, {verdict} the bound {bound:g}"

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

    A baseline is "untuned", "onnxruntime", or another run of the same model (id or folder). `threads` is the number
    each may use (default: the target's cores). The result is also written to the run folder as compare.json.
    Outputs are checked against onnxruntime's on the original model.

    Raises InputError for an unknown baseline, RunError if the run has no target yet or a runtime fails.
    """
    folder = run.folder if isinstance(run, Run) else RunFolder.open(run)
    subjects = {"tvmlab": ("tvmlab", folder), **{name: _subject(name, folder) for name in baselines}}
    if repeats < 3:
        raise InputError(f"repeats={repeats} gives no interval", remedy="ask for 3 or more")
    if not folder.environment:
        raise RunError(f"run {folder.id} has not begun", remedy="wait for its first trial")
    target = Target.from_record(folder.environment["target"])
    threads = threads or int(target.attrs.get("num-cores", 1))
    environment = {**target.worker_env(), "TVM_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    loaded = {
        **subjects,
        "onnxruntime": ("onnxruntime", folder),
    }  # even if not timed: it gives the right result
    workers = {
        name: WorkerProcess("tvmlab.measure.whole_model", [], folder.path / "log.txt", environment) for name in loaded
    }
    for worker in workers.values():
        worker.start()  # here and not in a pool's thread: they end with the thread that started them
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
        numerics=_numerics(outputs["tvmlab"], outputs["onnxruntime"]),
    )
    folder.write_json("compare.json", asdict(result))
    return result


def _subject(name: str, folder: RunFolder) -> tuple[str, RunFolder]:
    """Which runtime, on which run, a baseline names."""
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
            name: pool.submit(
                _ask, name, workers[name], ("load", runtime, str(folder.path.resolve()), threads), _LOAD_S
            )
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
        return _ask(name, worker, ("time", 1), _TURN_S)
    finally:
        worker.pause()


def _ask(name: str, worker: WorkerProcess, message: tuple[Any, ...], timeout_s: float) -> Any:
    try:
        status, answer = worker.request(message, timeout_s)
    except (WorkerDied, WorkerTimeout) as error:
        raise RunError(f"{name} could not be compared", remedy=f"its process {error}; see log.txt") from error
    if status != "ok":
        raise RunError(f"{name} could not be compared ({answer})", remedy="see log.txt in the run folder")
    return answer


def _ratio(samples: dict[str, list[float]], baseline: str) -> dict[str, Any]:
    ratio, low, high = bootstrap_ratio(samples["tvmlab"], samples[baseline])
    return {"subject": "tvmlab", "baseline": baseline, "ratio": ratio, "low": low, "high": high}


def _numerics(found: list[Any], expected: list[Any]) -> dict[str, Any]:
    """The largest error of any output, relative to that output's largest magnitude."""
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        scale = float(np.abs(theirs).max()) or 1.0
        error = float(np.abs(ours.reshape(theirs.shape).astype("float64") - theirs).max()) / scale
        worst = error if not error <= worst else worst  # a NaN is the worst there is
    return {"max_error_over_max_output": worst, "bound": _BOUND, "ok": worst <= _BOUND}
