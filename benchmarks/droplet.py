"""Kernel latency after a descent, tvmlab's Droplet over TVM's `PostOpt`: same database, same number of candidates.

    python benchmarks/droplet.py [--kernel NAME ...] [--seeds 5] [--trials 16] [--budget 100] [--rows FILE] [--quick]

For each kernel and seed a short Ansor search makes the database: short, because a descent has nothing to find where a
search has found it; `--trials 64` shows that. `PostOpt` gets a copy of it and at most `--budget`
candidates; it stops by itself, mostly long before. Droplet then gets exactly as many as upstream tried to build, failed
ones counted, its start among them. Their best schedules, as each database gives them, are timed in turns, and so is
ours against the start: a gain that is claimed has to show there again. Weights that no cache holds (alexnet_dense) are
cold in our descent and where the two are compared, as `tvmlab.best` has them and a model reads them.

Upstream is unsound in several ways, which is why few of its candidates are any good (read in the wheel,
`tvm/s_tir/meta_schedule/post_optimization`): every part of a tile is set to a power of two by itself, so that most
products are not the loop's extent, and TVM repairs them in silence to [1, ..., extent]; steps go in the + direction
only; a quarter of the candidates is measured without the postprocessors, though the saved trace has them; where a
candidate cannot be made, the results of those after it are taken for other candidates'; a failed run counts as 1e10
seconds, and as valid; the p-value is stored and not used; the incumbent is not measured again.

A row of JSON for each kernel and seed; then each kernel's median over the seeds; the last line is the geometric mean of
these, ours over theirs, with the 95 % interval of the paired randomization test (tvmlab.stats.paired_ratio; at least 6
kernels).
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from common import HERE, kept, report_medians
from kernels import KERNELS, best_of, compare, model_of, task_of

import tvmlab
from tvmlab import descent
from tvmlab.compat import DATABASE_FILES, read_database
from tvmlab.core import Candidate
from tvmlab.experiment import Ansor, Droplet, Experiment
from tvmlab.records import RunFolder
from tvmlab.stats import Paired
from tvmlab.strategies import warm_records
from tvmlab.targets import Target, target
from tvmlab.tasks import Task

GOAL = 0.8


def run_of(model: str, seed: int, step: Any, folder: Path, **how: Any) -> RunFolder:
    """The folder of a finished run of one step."""
    asked = Experiment(model=model, target="cpu", seed=seed, steps=[step], **how)
    return tvmlab.tune(asked.afresh(), folder).wait().folder


def post_optimize(database: RunFolder, budget: int, seed: int) -> tuple[Path, dict[str, Any]]:
    """Upstream's search on a copy of a run's database: the copy's folder, and what upstream did."""
    folder = Path(tempfile.mkdtemp(prefix="post-opt-", dir=database.path.parent))
    for name in DATABASE_FILES:
        shutil.copy(database.path / name, folder / name)
    command = [sys.executable, str(HERE / "upstream_droplet.py"), str(folder), str(budget), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"upstream failed:\n{done.stderr[-2000:]}")
    return folder, json.loads(done.stdout.strip().splitlines()[-1])


def as_upstream_has_it(folder: Path, task: Task, cpu: Target) -> Candidate:
    """The best record of upstream's database, made as TVM makes it when it compiles: by the saved trace alone."""
    from tvm.s_tir import Schedule

    from tvmlab.compat import structural_key

    schedule = Schedule(task.module)
    warm_records(read_database(folder, cpu.kind), task)[0][0].apply_to_schedule(schedule, remove_postproc=False)
    return Candidate(task.key, structural_key(schedule.mod), -1, (), schedule)


def row_of(name: str, seed: int, trials: int, budget: int, folder: Path) -> dict[str, Any]:
    """One kernel, one seed."""
    cpu = target("cpu")
    model = model_of(name, folder)
    task = task_of(model, cpu)
    start = run_of(model, seed, Ansor(max_trials=trials, early_stopping_threshold=100_000), folder)
    theirs, upstream = post_optimize(start, budget, seed)
    # Upstream compares its readings with those of the database, so that one is made as upstream measures: warm.
    measure = tvmlab.best(model, "cpu").measure
    ours = run_of(model, seed, Droplet(trials=upstream["tried"], warm_start=[str(start.path)]), folder, measure=measure)
    best = best_of(ours, task, cpu)
    cold = measure.cold_weights
    beside_theirs = compare(best, as_upstream_has_it(theirs, task, cpu), task, cpu, cold=cold)
    beside_start = compare(best, best_of(start, task, cpu), task, cpu, cold=cold)
    claimed = descent.summary(ours)["gain"].iloc[0]
    return {
        "cold_weights": cold,
        "ours_us": beside_theirs.ours_us,
        "theirs_us": beside_theirs.theirs_us,
        **_rounded("ratio", beside_theirs.ratio),
        **_rounded("over_start", beside_start.ratio),
        "claimed_over_start": round(1 - float(claimed), 4),
        "candidates": upstream["tried"],
        "ran": {"ours": sum(t.ok for t in ours.trials() if t.trial), "theirs": upstream["ran"]},
        "seconds": {"ours": round(ours.state.elapsed_s, 1), "theirs": round(upstream["seconds"], 1)},
        "ending": ours.state.message,
    }


def _rounded(name: str, interval: Paired) -> dict[str, float]:
    return {
        name: round(interval.ratio, 4),
        f"{name}_low": round(interval.low, 4),
        f"{name}_high": round(interval.high, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="repeat for several (default: all six)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=16, help="of the search that makes the database")
    parser.add_argument("--budget", type=int, default=100, help="most candidates that upstream may try")
    parser.add_argument("--folder", type=Path, help="where the runs are kept (default: a temporary folder)")
    parser.add_argument("--rows", type=Path, help="rows that this file has are not measured again; others are added")
    parser.add_argument("--quick", action="store_true", help="one kernel, one seed")
    asked = parser.parse_args()
    names = asked.kernel or (KERNELS[:1] if asked.quick else KERNELS)
    seeds = 1 if asked.quick else asked.seeds
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="droplet-"))
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(seeds):
        for name in names:
            what = {"kernel": name, "seed": seed, "trials": asked.trials, "budget": asked.budget}
            rows.append(kept(asked.rows, what, partial(row_of, name, seed, asked.trials, asked.budget, folder)))
    claimed = [row for row in rows if row["claimed_over_start"] < 1]
    lost = sum(row["over_start_low"] > 1 for row in claimed)
    unseen = sum(row["over_start_low"] <= 1 <= row["over_start_high"] for row in claimed)
    print(f"of {len(claimed)} claimed gains, timed again: {lost} were losses, {unseen} neither shown nor refuted")
    report_medians("droplet", rows, lambda row: row["ratio"], GOAL)


if __name__ == "__main__":
    main()
