"""How much of a full search's speed-up transfer-tuning finds, and in what share of its time, over pairs of models.

    python benchmarks/transfer.py [--seeds 5] [--full ansor] [--trials 64] [--early-stopping N] [--transferred 32]
                                  [--rows FILE] [--quick]

For each seed every model is searched in full; then every other model's schedules are transferred to it. The share is
(untuned / transferred - 1) / (untuned / full - 1) of end-to-end latencies, all compiled models timed in turns and the
ratios taken turn by turn; the time is that of the whole search process, importing the model and measuring its default
schedules included; the transfer is given a tenth of the full search's. `--full best` is tvmlab.best(model), packed
layouts and templates, in place of an Ansor search of NCHW. With --runs-dir the runs that are there already are not done
again, with --rows whole pairs.
"""

import argparse
import json
import tempfile
from functools import partial
from itertools import permutations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import finished, kept, median_of

import tvmlab
from tvmlab.compare import compare
from tvmlab.experiment import Ansor, Experiment, TransferTuning
from tvmlab.records import RunFolder
from tvmlab.run import begin

SHARE, TIME = 0.8, 0.1  # the goals
_WRAP_UP = 0.07  # of its time a transfer keeps back: the trials under way end after the limit


def search(experiment: Experiment, runs_dir: Path, name: str) -> RunFolder:
    """The finished run of this name, made if there is none."""
    folder = finished(runs_dir, name, partial(begin, experiment, runs_dir, name))
    state = folder.state
    print(f"  {name}: {state.trials} trials, {state.wall_s:.0f} s; {state.message}", flush=True)
    return folder


def full(model: str, seed: int, asked: argparse.Namespace) -> Experiment:
    if asked.full == "best":
        return tvmlab.best(model, "cpu", seed=seed)
    step = Ansor(trials_per_kernel=asked.trials, early_stopping_threshold=asked.early_stopping or asked.trials)
    return Experiment(model=model, target="cpu", seed=seed, steps=(step,))


def pair(source: str, target: str, seed: int, asked: argparse.Namespace) -> dict[str, float]:
    """One row: end-to-end latencies in ms and what follows from them."""
    kind = asked.full if asked.full == "best" else f"ansor-{asked.trials}-{asked.early_stopping or 'all'}"
    runs = {
        name: search(full(name, seed, asked), asked.runs_dir, f"{name}-{kind}-s{seed}") for name in (source, target)
    }
    step = TransferTuning(runs[source].id, trials_per_kernel=asked.transferred)
    whole, tuning_s = runs[target].state.wall_s, runs[target].state.elapsed_s
    experiment = Experiment(
        model=target,
        target="cpu",
        seed=seed,
        steps=(step,),
        measure=runs[target].experiment.measure,
        # What is left of a tenth of the full search's time, after the start and the import that both have.
        time_limit_s=max((1 - _WRAP_UP) * TIME * whole - (whole - tuning_s), 1.0),
    )
    moved = search(experiment, asked.runs_dir, f"{source}-to-{target}-{kind}-s{seed}")
    timed = compare(moved, ["untuned", runs[target].id], repeats=asked.repeats)
    names = {"untuned_ms": "untuned", "full_ms": runs[target].id, "transferred_ms": "tvmlab"}
    over_untuned, over_full = (row["ratio"] for row in timed.ratios)
    return {
        **{column: round(median(timed.subjects[name]["samples_ms"]), 3) for column, name in names.items()},
        "over_full": round(over_full, 4),
        "share": (1 / over_untuned - 1) / (over_full / over_untuned - 1),
        "time": moved.state.wall_s / whole,
        "full_s": whole,
    }


def interval(values: list[float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}], n = {}".format(*median_of(values), len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "googlenet", "alexnet"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--full", choices=["ansor", "best"], default="ansor")
    parser.add_argument("--trials", type=int, default=64, help="trials per kernel of a full search by Ansor")
    parser.add_argument(
        "--early-stopping", type=int, help="a kernel's full search ends after so many in vain (default: never)"
    )
    parser.add_argument("--transferred", type=int, default=32, help="most schedules tried for a kernel")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--runs-dir", type=Path, default=None)
    parser.add_argument("--rows", type=Path, help="rows that this file has are not measured again; others are added")
    parser.add_argument("--quick", action="store_true", help="resnet18 to squeezenet, one seed, small budgets")
    asked = parser.parse_args()
    asked.runs_dir = asked.runs_dir or Path(tempfile.mkdtemp(prefix="transfer-"))
    pairs = list(permutations(asked.models, 2))
    if asked.quick:
        asked.seeds, asked.trials, asked.transferred, asked.repeats, pairs = 1, 4, 2, 3, [("resnet18", "squeezenet")]
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {names: [] for names in pairs}
    for seed in range(asked.seeds):
        for names in pairs:
            budgets = {name: getattr(asked, name) for name in ("full", "trials", "early_stopping", "transferred")}
            what = {"source": names[0], "target": names[1], "seed": seed, **budgets}
            rows[names].append(kept(asked.rows, what, partial(pair, *names, seed, asked)))
    for (source, target), found in rows.items():
        shares, times = ([row[name] for row in found] for name in ("share", "time"))
        print(f"{source:>10} to {target:<10} share {interval(shares)}, of the time {interval(times)}")
    by_seed = [[rows[names][seed] for names in pairs] for seed in range(asked.seeds)]
    shares = [float(np.mean([row["share"] for row in seed])) for seed in by_seed]
    times = [float(np.mean([row["time"] for row in seed])) for seed in by_seed]
    slower = sum(row["transferred_ms"] > row["untuned_ms"] for seed in by_seed for row in seed)
    print(
        f"mean over the pairs: share {interval(shares)}, of the time {interval(times)}; slower than untuned: {slower}"
    )
    summary = {"benchmark": "transfer", "share": round(median(shares), 4), "share_goal": SHARE}
    summary |= {
        "share_low": round(min(shares), 4),
        "share_high": round(max(shares), 4),
        "time": round(median(times), 4),
    }
    summary |= {"time_goal": TIME, "slower_than_untuned": slower, "seeds": asked.seeds, "pairs": len(pairs)}
    print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    main()
