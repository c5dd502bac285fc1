"""How much comparing two kernels depends on the process that they are timed in: in one process, and in four.

    python benchmarks/processes.py [--kernel NAME ...] [--trials 64] [--pairs 3] [--times 12] [--rows FILE] [--quick]

The next fastest schedules of a short Ansor search are timed in turns with the fastest, again and again, as a droplet
search times a candidate beside its rival (tvmlab.measure.witnesses): each time in new processes, all turns in one of
them, or shared by four. A process gets other addresses each time, so the ratio of the two scatters.

A row of JSON a kernel with all ratios, [time][pair]; notebook 03 shows those in data/benchmarks. Then a line for each
pair: the range of its ratios each way. The last line compares the scatter, the standard deviation of the log ratio over
the times, of four processes over one: the geometric mean over the pairs, with a 95 % bootstrap interval over the times.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import kept, report, tune_tvmlab
from kernels import KERNELS, beside, fastest_of, model_of, task_of

from tvmlab.core import Candidate
from tvmlab.experiment import Measure
from tvmlab.measure.local import LocalMeasurer
from tvmlab.stats import turn_ratio
from tvmlab.targets import target
from tvmlab.tasks import Task

GOAL = 1.0
WAYS = (1, 4)


def ratios(found: list[Candidate], task: Task, processes: int, folder: Path) -> list[float]:
    """Each one's latency over that of the first, timed once in so many new processes."""
    options = Measure(repeats=5, slow_factor=1e6, processes=processes)
    with LocalMeasurer([task], target("cpu"), options, folder) as measurer:
        list(measurer.measure_defaults([task.key]))
        timed = list(measurer.measure([beside(each, found[0]) for each in found[1:]]))
    return [turn_ratio(each.latencies_s, each.rival_latencies_s) for each in timed]


def row_of(name: str, trials: int, pairs: int, times: int, folder: Path) -> dict[str, Any]:
    """One kernel."""
    model = model_of(name, folder)
    task = task_of(model, target("cpu"))
    run, _ = tune_tvmlab(model, trials, 0, folder / "runs")
    found = fastest_of(run.folder, task, target("cpu"), pairs + 1)
    timed = [[ratios(found, task, processes, folder) for processes in WAYS] for _ in range(times)]
    return {
        way: np.round([each[number] for each in timed], 4).tolist() for number, way in enumerate(("alone", "shared"))
    }


def scatter(logs: np.ndarray) -> float:
    """Of four processes over one; logs has shape (times, ways, pairs)."""
    deviation = logs.std(axis=0, ddof=1)
    return float(np.exp(np.log(deviation[1] / deviation[0]).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="repeat for several (default: all six)")
    parser.add_argument("--trials", type=int, default=64, help="of the search that finds the schedules")
    parser.add_argument("--pairs", type=int, default=3, help="schedules that are timed beside the fastest, each kernel")
    parser.add_argument("--times", type=int, default=12, help="each way")
    parser.add_argument("--quick", action="store_true", help="one kernel, five times")
    parser.add_argument("--rows", type=Path, help="rows that this file has are not measured again; others are added")
    asked = parser.parse_args()
    names = asked.kernel or (["googlenet_conv5x5"] if asked.quick else KERNELS)
    times = 5 if asked.quick else asked.times
    folder = Path(tempfile.mkdtemp(prefix="processes-"))
    tables = []
    for name in names:
        what = {"kernel": name, "trials": asked.trials, "pairs": asked.pairs, "times": times}
        row = kept(asked.rows, what, partial(row_of, name, asked.trials, asked.pairs, times, folder))
        tables.append(np.array([row["alone"], row["shared"]]).transpose(1, 0, 2))
        for pair, (alone, shared) in enumerate(tables[-1].transpose(2, 1, 0), start=1):
            said = (f"{ratio.min():.3f} to {ratio.max():.3f}" for ratio in (alone, shared))
            print(f"{name}, pair {pair}: {' in one process, '.join(said)} in four")
    logs = np.log(np.concatenate(tables, axis=2))
    rng = np.random.default_rng(0)
    drawn = [scatter(logs[rng.integers(len(logs), size=len(logs))]) for _ in range(2000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    report("processes", scatter(logs), float(low), float(high), GOAL)


if __name__ == "__main__":
    main()
