"""Selective tuning beside full tuning: performance of the whole model, and search time, over the models of the RFC.

    python benchmarks/selective.py [--model NAME ...] [--seeds 3] [--engine autotvm] [--trials 128] [--top 1] [--quick]

For each model and seed every task is searched (AutoTVM or Ansor), then in a run of its own the same is done by
Selective, with the same trials for each task that it searches. Performance is the end-to-end latency after full tuning
over that after selective tuning, both compiled models and onnxruntime timed in turns: above 1 where selective tuning
gives the faster model. Time is that of the whole search process, importing the model, measuring its default schedules
and finding the clusters included.

A row of JSON a model and seed; with `--rows FILE` they are appended to that file, and rows of the same model, seed,
engine, steps and time limit that are there already are not measured again, so that rows may be added one at a time
(`--rows data/selective/rows.jsonl` is what notebook 07 shows, each experiment apart). The last line has the
geometric means over the models (the median of each one's seeds) with the 95 % interval of the randomization test
(tvmlab.stats.paired_ratio; null below 6 models), and the arithmetic means, as the RFC has them.
"""

import argparse
import json
import tempfile
import zlib
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from common import kept, rounded
from transfer import search

import tvmlab
from tvmlab import frames
from tvmlab.compare import compare
from tvmlab.comparison_rows import in_shared_turns
from tvmlab.experiment import Ansor, AutoTVM, Experiment, Selective
from tvmlab.published_selective import MODELS
from tvmlab.records import RunFolder
from tvmlab.stats import paired_ratio, ratio_in_turns

PERFORMANCE, TIME = 1.0, 0.25  # the goals: at least, at most


def steps(asked: argparse.Namespace) -> tuple[Any, Selective]:
    """The full search, and the selective one with the same knobs."""
    stop = asked.early_stopping or max(asked.trials // 2, 8)
    shared = {"early_stopping_threshold": stop}
    if asked.engine == "ansor":
        full: Any = Ansor(trials_per_kernel=asked.trials, **shared)
    else:
        full = AutoTVM(kernel_trials=asked.trials, **shared)
    selective = Selective(
        asked.top,
        engine=asked.engine,
        trials_per_kernel=asked.trials,
        similarity=asked.similarity,
        fall_back=asked.fall_back,
        **shared,
    )
    return full, selective


def tuned(model: str, seed: int, step: Any, asked: argparse.Namespace) -> RunFolder:
    """The finished run of one step; its name says of which knobs, so that a folder may hold several benchmarks."""
    measure = tvmlab.best(model, "cpu", seed=seed).measure  # whether the weights are to be cold
    wanted = Experiment(
        model=model, target="cpu", seed=seed, steps=(step,), measure=measure, time_limit_s=asked.time_limit
    )
    return search(wanted, asked.runs_dir, f"{model}-{step.kind}-{zlib.crc32(wanted.code().encode()):08x}-s{seed}")


def row_of(model: str, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """One model, one seed: both searches, and both models timed in turns."""
    full, selective = (tuned(model, seed, step, asked) for step in steps(asked))
    timed = compare(selective, ["onnxruntime", full.id], repeats=asked.repeats)
    samples = {name: subject["samples_ms"] for name, subject in timed.subjects.items()}
    performance = ratio_in_turns(*in_shared_turns(timed.subjects[full.id], timed.subjects["tvmlab"]))
    table = frames.selective(selective)
    return {
        "machine": selective.environment["machine"],
        "versions": selective.environment["versions"],
        "tasks": len(table),
        "representatives": int((table["role"] == "searched").sum()),
        "poor": int((table["role"] == "searched after all").sum()),
        "full_s": round(full.state.wall_s, 1),
        "selective_s": round(selective.state.wall_s, 1),
        "time": round(selective.state.wall_s / full.state.wall_s, 4),
        "full_trials": full.state.trials,
        "selective_trials": selective.state.trials,
        "full_ms": round(median(samples[full.id]), 4),
        "selective_ms": round(median(samples["tvmlab"]), 4),
        "onnxruntime_ms": round(median(samples["onnxruntime"]), 4),
        "performance": round(performance.value, 4),
        "performance_low": rounded(performance.low),
        "performance_high": rounded(performance.high),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last line: means over the models, each with the medians of its seeds."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    found: dict[str, Any] = {"benchmark": "selective"}
    for name, goal in (("performance", PERFORMANCE), ("time", TIME)):
        ratios = [median(row[name] for row in rows if row["model"] == model) for model in models]
        mean = paired_ratio(ratios, [1.0] * len(ratios))
        found |= {
            name: rounded(mean.ratio),
            f"{name}_low": rounded(mean.low),
            f"{name}_high": rounded(mean.high),
            f"{name}_arithmetic": round(fmean(ratios), 4),
            f"{name}_goal": goal,
        }
    return found | {"models": len(models), "rows": len(rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="repeat for several (default: the RFC's seven)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ...")
    parser.add_argument("--engine", choices=["autotvm", "ansor"], default="autotvm")
    parser.add_argument("--trials", type=int, default=128, help="of a task that is searched")
    parser.add_argument("--early-stopping", type=int, help="default: half of the trials")
    parser.add_argument("--top", default="1", help="schedules that are shared, or a share such as 5%%")
    parser.add_argument("--similarity", type=float, default=Selective().similarity)
    parser.add_argument("--fall-back", type=float, default=Selective().fall_back)
    parser.add_argument("--time-limit", type=float, metavar="S", help="of each search (default: none)")
    parser.add_argument("--repeats", type=int, default=30, help="turns of the whole models")
    parser.add_argument("--rows", type=Path, help="JSON lines that rows are taken from and appended to")
    parser.add_argument("--runs-dir", type=Path, help="where the runs are kept (default: a temporary folder)")
    parser.add_argument("--quick", action="store_true", help="squeezenet, 4 trials a task, few turns")
    asked = parser.parse_args()
    if asked.quick:
        asked.model, asked.seeds, asked.trials, asked.top, asked.repeats = ["squeezenet"], 1, 4, "1", 3
    asked.runs_dir = asked.runs_dir or Path(tempfile.mkdtemp(prefix="selective-"))
    rows = []
    for seed in range(asked.seeds):
        for model in asked.model or list(MODELS.values()):
            searches = [step.code() for step in steps(asked)]
            what = {"model": model, "seed": seed, "engine": asked.engine, "steps": searches}
            what |= {"time_limit_s": asked.time_limit}
            rows.append(kept(asked.rows, what, partial(row_of, model, seed, asked)))
    print(json.dumps(summary(rows)), flush=True)


if __name__ == "__main__":
    main()
