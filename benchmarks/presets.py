"""Whether the preset "max" is ever slower than "default": both tuned from nothing, the whole models timed in turns.

    python benchmarks/presets.py [--models squeezenet ...] [--seeds 3] [--scale 0.02] [--quick]

Neither run knows the other (reuse=False). `--scale` multiplies every budget of both, trials and early stopping, since
the presets in full take hours: 0.02 is 40 trials a task beside 60 by each engine. A row of JSON a model and seed: the
ratio of end-to-end latencies, max over default, with its 95 % interval; max is slower if all of that is above 1, and
"slower beyond noise" counts the rows where it is. After that a line a model: the median of its ratios, with their range
(of six seeds or more its 95 % interval; of one seed the row's own). The last line is the largest of these medians.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from common import kept, median_of, report

import tvmlab
from tvmlab.compare import compare
from tvmlab.experiment import Experiment
from tvmlab.run import Run

GOAL = 1.0
# Of the engines; the layout step is the same in both presets, and stays as it is.
BUDGETS = ("kernel_trials", "trials_per_kernel", "early_stopping_threshold", "exploration_trials", "random_trials")


def scaled(step: Any, scale: float) -> Any:
    """A step with its budgets scaled; percentages stay, and so does what is 0."""
    values = {name: getattr(step, name) for name in BUDGETS if name in type(step).model_fields}
    numbers = {name: value for name, value in values.items() if isinstance(value, int) and value}
    return step.model_copy(update={name: max(1, round(value * scale)) for name, value in numbers.items()})


def run_of(name: str, model: str, seed: int, scale: float, folder: Path) -> Run:
    """A finished run of a preset, which knows no other."""
    found = tvmlab.preset(name, model, "cpu", seed=seed)
    steps = tuple(scaled(step, scale) for step in found.steps)
    asked: Experiment = found.model_copy(update={"steps": steps})
    print(f"  {name}: {asked.code()}", flush=True)
    run = tvmlab.tune(asked.afresh(), folder).wait()
    print(
        f"  {run.id}: {run.progress.trials} trials, {run.folder.state.wall_s:.0f} s; {run.progress.message}", flush=True
    )
    return run


def row_of(model: str, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Both presets of a model."""
    default, most = (run_of(name, model, seed, asked.scale, asked.runs_dir) for name in ("default", "max"))
    (ratio,) = compare(most, [default.id], repeats=asked.repeats).ratios
    return {
        **{name: round(ratio[name], 4) for name in ("ratio", "low", "high")},
        "slower": bool(ratio["low"] > 1),
        "default_s": round(default.folder.state.wall_s),
        "max_s": round(most.folder.state.wall_s),
        "trials": [default.progress.trials, most.progress.trials],
    }


def median_ratio(rows: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Of one model's rows: the median of the ratios and where they lie."""
    if len(rows) == 1:
        return rows[0]["ratio"], rows[0]["low"], rows[0]["high"]
    return median_of([row["ratio"] for row in rows])


def conclude(rows: list[dict[str, Any]]) -> None:
    """The last lines: how often max is slower, each model's median, and the largest of these."""
    print(f"slower beyond noise: {sum(row['slower'] for row in rows)} of {len(rows)}")
    medians = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        medians[model] = median_ratio(of_model)
        ratio, low, high = medians[model]
        seeds = "1 seed" if len(of_model) == 1 else f"{len(of_model)} seeds"
        print(f"{model}: median {ratio:.3f} [{low:.3f}, {high:.3f}] of {seeds}")
    report("presets", *max(medians.values()), GOAL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["squeezenet", "resnet18", "mobilenet_v2", "googlenet"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=0.02)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--runs-dir", type=Path, default=None)
    parser.add_argument("--rows", type=Path, help="rows that this file has are not measured again; others are added")
    parser.add_argument("--quick", action="store_true", help="squeezenet, one seed, a thousandth of the budgets")
    asked = parser.parse_args()
    asked.runs_dir = asked.runs_dir or Path(tempfile.mkdtemp(prefix="presets-"))
    if asked.quick:
        asked.models, asked.seeds, asked.scale, asked.repeats = ["squeezenet"], 1, 0.001, 6
    rows = []
    for seed in range(asked.seeds):
        for model in asked.models:
            what = {"model": model, "seed": seed, "scale": asked.scale}
            rows.append(kept(asked.rows, what, partial(row_of, model, seed, asked)))
    conclude(rows)


if __name__ == "__main__":
    main()
