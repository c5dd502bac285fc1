"""A short search and a descent against a long search, per kernel: latency, and wall time.

    python benchmarks/storm.py [--kernel NAME ...] [--seeds 5] [--storm 300] [--drops 130] [--starts 8] [--long 1000]
                               [--rows FILE] [--quick]

"Explore as a Storm, Exploit as a Raindrop" (Canesche et al., 2024) has it that 300 trials of Ansor and a droplet search
reach what 1,000 trials of Ansor do in less time. Both branch from one search of 300 trials: one run goes on with the
descent, the other with 700 trials more, so that luck in the first 300 is no difference between them. Their best kernels
are timed in turns; wall time is the tuning time of the runs (state.json), the common part counted in both, from the
workers' start to the last trial. With --folder the searches that are there already are not done again, only the
descents: a change of the descent can be measured beside the same searches.

A row of JSON for each kernel and seed. Then, for the wall time and last for the latency, the medians over the seeds and
their geometric mean over the kernels, with the 95 % interval of the paired randomization test
(tvmlab.stats.paired_ratio; at least 6 kernels).
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from common import finished, kept, report_medians
from kernels import KERNELS, Compared, best_of, compare, model_of, task_of

import tvmlab
from tvmlab.experiment import Ansor, Droplet, Experiment
from tvmlab.run import begin
from tvmlab.targets import target

GOALS = {"storm.wall_time": 0.5, "storm": 1.0}


def search(trials: int) -> Ansor:
    """So many trials, without an early end."""
    return Ansor(max_trials=trials, trials_per_kernel=trials, early_stopping_threshold=100_000)


def timed(found: Compared) -> dict[str, float]:
    """What a row says of two kernels that were compared."""
    return {
        "short_us": found.ours_us,
        "long_us": found.theirs_us,
        "ratio": round(found.ratio.ratio, 4),
        "low": round(found.ratio.low, 4),
        "high": round(found.ratio.high, 4),
    }


def row_of(name: str, seed: int, storm: int, descent: Droplet, long: int, folder: Path) -> dict[str, Any]:
    """One kernel, one seed."""
    cpu = target("cpu")
    model = model_of(name, folder)
    task = task_of(model, cpu)
    begun = Experiment(model=model, target="cpu", seed=seed, steps=[search(storm)])
    named, longer = f"{name}-s{seed}-{storm}", f"{name}-s{seed}-{storm}-{long}"
    first = finished(folder, named, partial(begin, begun, folder, named))
    short = tvmlab.fork(first, [descent]).wait().folder
    whole = finished(folder, longer, partial(tvmlab.fork, first, [search(long - storm)], name=longer))
    ours, theirs = (best_of(run, task, cpu) for run in (short, whole))
    # Both may end with the same kernel: then there is nothing to time.
    same = ours.key == theirs.key
    return {
        **({"ratio": 1.0, "low": 1.0, "high": 1.0} if same else timed(compare(ours, theirs, task, cpu))),
        "short_s": round(short.state.elapsed_s, 1),
        "long_s": round(whole.state.elapsed_s, 1),
        "trials": {"short": short.state.trials, "long": whole.state.trials},
        "ending": short.state.message,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="repeat for several (default: all six)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--storm", type=int, default=300, help="trials of the short search")
    parser.add_argument("--drops", type=int, default=130, help="most trials of the descent after it")
    parser.add_argument("--starts", type=int, default=8, help="schedules that it goes down from, one after the other")
    parser.add_argument("--long", type=int, default=1000, help="trials of the long search")
    parser.add_argument("--folder", type=Path, help="where the runs are kept (default: a temporary folder)")
    parser.add_argument("--rows", type=Path, help="rows that this file has are not measured again; others are added")
    parser.add_argument("--quick", action="store_true", help="one kernel, one seed, a tenth of the trials")
    asked = parser.parse_args()
    if asked.storm >= asked.long:
        parser.error("--long is more than --storm")
    names = asked.kernel or (KERNELS[:1] if asked.quick else KERNELS)
    shrink = 10 if asked.quick else 1
    storm, drops, long = (max(1, count // shrink) for count in (asked.storm, asked.drops, asked.long))
    descent = Droplet(trials=drops, starts=asked.starts)
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="storm-"))
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(1 if asked.quick else asked.seeds):
        for name in names:
            what = {"kernel": name, "seed": seed, "storm": storm, "drops": drops, "starts": asked.starts, "long": long}
            rows.append(kept(asked.rows, what, partial(row_of, name, seed, storm, descent, long, folder)))
    report_medians("storm.wall_time", rows, lambda row: row["short_s"] / row["long_s"], GOALS["storm.wall_time"])
    report_medians("storm", rows, lambda row: row["ratio"], GOALS["storm"])


if __name__ == "__main__":
    main()
