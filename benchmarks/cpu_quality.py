"""The tuned model over onnxruntime, end to end, batch 1, fp32: one JSON row a model, tuned from nothing.

    python benchmarks/cpu_quality.py [--model resnet50 ...] [--threads 1 --threads 2] [--time-limit 180] [--quick]

Both run the same ONNX file in processes of their own, in turns, all but one of them frozen; on one thread, then on all
cores. A row's `ratio` is tvmlab's median latency over onnxruntime's with its 95 % interval, on the most threads; `at`
has every number of threads. `tuning_s` is all that a user waits for, from the call to the end of the run. The last line
is the model that is furthest from its goal: its ratio over that goal, so at most 1 means that all were reached.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from common import report

import tvmlab
from tvmlab.compare import compare
from tvmlab.experiment import Experiment
from tvmlab.run import Run

# From issue 3: tvmlab / onnxruntime, at most; tuning time on 2 cores in minutes, at most.
GOALS = {
    "resnet50": (0.85, 10),
    "googlenet": (0.85, 15),
    "vgg19": (0.70, 10),
    "alexnet": (0.95, 5),
    "squeezenet": (1.0, 15),
    "resnet18": (1.0, 15),
    "mobilenet_v2": (1.0, 15),
    "inception_v2": (1.0, 15),
    "zfnet512": (1.0, 15),
    "densenet121": (1.0, 15),
    "shufflenet": (1.0, 15),
}
OTHERS = (1.0, 15)  # the goal of a model that has none of its own
QUICK_S = 60.0


def experiment(model: str, seed: int, time_limit_s: float | None, quick: bool) -> Experiment:
    """What is measured: the experiment that a user gets without choosing anything."""
    return tvmlab.best(model, "cpu", time_limit_s=time_limit_s or (QUICK_S if quick else None), seed=seed)


def measure(run: Run, threads: int, repeats: int) -> dict[str, Any]:
    """One comparison: latencies in ms, their ratio with its interval, the error of the outputs."""
    result = compare(run, ["onnxruntime"], repeats=repeats, threads=threads)
    print(result, flush=True)
    (ratio,) = result.ratios
    frame = result.frame()
    return {
        "threads": threads,
        **{name: round(ratio[name], 4) for name in ("ratio", "low", "high")},
        **{f"{name}_ms": round(float(frame.loc[name, "median_ms"]), 4) for name in ("tvmlab", "onnxruntime")},
        "error": result.numerics["max_error_over_max_output"],
        "right": result.numerics["ok"],
    }


def row_of(asked: Experiment, threads: list[int], repeats: int, folder: Path) -> dict[str, Any]:
    """Tune a model and compare it."""
    started = time.perf_counter()
    run = tvmlab.tune(asked.afresh(), folder).wait()
    tuning_s = time.perf_counter() - started
    at = [measure(run, count, repeats) for count in sorted(threads)]
    ratio_goal, minutes = GOALS.get(asked.model, OTHERS)
    main = at[-1]
    return {
        "model": asked.model,
        **{name: main[name] for name in ("threads", "ratio", "low", "high")},
        "goal": ratio_goal,
        "tuning_s": round(tuning_s, 1),
        "tuning_goal_s": minutes * 60,
        "trials": run.progress.trials,
        "trials_per_s": round(run.progress.trials_per_s, 2),
        "error": max(found["error"] for found in at),
        "right": all(found["right"] for found in at),
        "reached": bool(
            all(found["ratio"] <= ratio_goal and found["right"] for found in at) and tuning_s <= minutes * 60
        ),
        "at": at,
        "run": str(run.folder.path),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="repeat for several (default: all that have a goal)")
    parser.add_argument("--threads", type=int, action="append", help="repeat for several (default: 1, and all cores)")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time-limit", type=float, metavar="S", help="stop a model's search after so long")
    parser.add_argument("--runs-dir", type=Path, help="where the runs are kept (default: a temporary folder)")
    parser.add_argument("--quick", action="store_true", help=f"squeezenet, {QUICK_S:g} s of search, few repeats")
    asked = parser.parse_args()
    models = asked.model or (["squeezenet"] if asked.quick else list(GOALS))
    threads = asked.threads or sorted({1, len(os.sched_getaffinity(0))})
    folder = asked.runs_dir or Path(tempfile.mkdtemp(prefix="cpu-quality-"))
    repeats = 10 if asked.quick else asked.repeats
    rows = []
    for model in models:
        wanted = experiment(model, asked.seed, asked.time_limit, asked.quick)
        rows.append(row_of(wanted, threads, repeats, folder))
        print(json.dumps(rows[-1]), flush=True)
    worst = max(rows, key=lambda row: row["ratio"] / row["goal"])
    report("cpu_quality", *(worst[name] / worst["goal"] for name in ("ratio", "low", "high")), 1.0)


if __name__ == "__main__":
    main()
