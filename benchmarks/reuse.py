"""A second run of a model whose tasks are all in the store: its share of the first run's time, and its latency.

    python benchmarks/reuse.py [--models squeezenet ...] [--seeds 3] [--what default|fast|ansor] [--trials N] [--quick]

For each model and seed a runs folder of its own: the first run finds nothing there, the second, of the same experiment,
finds the first. Time is that of the whole search process, importing the model and measuring its default schedules
included; both compiled models are timed in turns. `--what` is a preset, or "ansor" for a plain search of NCHW;
`--trials` is its budget for each task, the engine's own where it is left out.

A row of JSON for each model and seed; then the median latency ratio (second over first), and last that of the time,
each with its 95 % interval over the rows (their range below 6).
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from common import kept, median_of, report

import tvmlab
from tvmlab.compare import compare
from tvmlab.experiment import Ansor, AutoTVM, Experiment
from tvmlab.run import Run

TIME, LATENCY = 0.05, 1.0  # the goals: at most


def experiment(model: str, seed: int, what: str, trials: int | None) -> Experiment:
    """What both runs are asked."""
    found = (
        Experiment(model=model, target="cpu", seed=seed)
        if what == "ansor"
        else tvmlab.preset(what, model, "cpu", seed=seed)
    )
    if trials is None:
        return found
    knobs = {AutoTVM: {"kernel_trials": trials}, Ansor: {"trials_per_kernel": trials}}
    steps = tuple(step.model_copy(update=knobs.get(type(step), {})) for step in found.steps)
    return found.model_copy(update={"steps": steps})


def run_of(asked: Experiment, folder: Path) -> Run:
    """A finished run."""
    run = tvmlab.tune(asked, folder).wait()
    print(
        f"  {run.id}: {run.progress.trials} trials, {run.folder.state.wall_s:.1f} s; {run.progress.message}", flush=True
    )
    return run


def row_of(model: str, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Two runs of a model, the second knowing the first."""
    folder = Path(tempfile.mkdtemp(prefix=f"{model}-{asked.what}-s{seed}-", dir=asked.runs_dir))  # nothing is known yet
    first, second = (run_of(experiment(model, seed, asked.what, asked.trials), folder) for _ in range(2))
    (ratio,) = compare(second, [first.id], repeats=asked.repeats).ratios
    return {
        "time": round(second.folder.state.wall_s / first.folder.state.wall_s, 4),
        "first_s": round(first.folder.state.wall_s, 1),
        "second_s": round(second.folder.state.wall_s, 1),
        "trials": [first.progress.trials, second.progress.trials],
        **{name: round(ratio[name], 4) for name in ("ratio", "low", "high")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["squeezenet", "resnet18", "googlenet"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--what", choices=["fast", "default", "ansor"], default="default")
    parser.add_argument("--trials", type=int, default=None, help="for each task; the engine's default if left out")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--runs-dir", type=Path, default=None)
    parser.add_argument("--rows", type=Path, help="rows that this file has are not measured again; others are added")
    parser.add_argument("--quick", action="store_true", help="squeezenet, one seed, 4 trials a task")
    asked = parser.parse_args()
    asked.runs_dir = asked.runs_dir or Path(tempfile.mkdtemp(prefix="reuse-"))
    asked.runs_dir.mkdir(parents=True, exist_ok=True)
    if asked.quick:
        asked.models, asked.seeds, asked.trials, asked.repeats = ["squeezenet"], 1, 4, 6
    rows = []
    for seed in range(asked.seeds):
        for model in asked.models:
            what = {"model": model, "seed": seed, "what": asked.what, "trials_asked": asked.trials}
            rows.append(kept(asked.rows, what, partial(row_of, model, seed, asked)))
    slower = sum(row["low"] > 1 for row in rows)
    print(f"{len(rows)} pairs of runs; the second beyond noise slower in {slower}")
    report("reuse.latency", *median_of([row["ratio"] for row in rows]), LATENCY)
    report("reuse", *median_of([row["time"] for row in rows]), TIME)


if __name__ == "__main__":
    main()
