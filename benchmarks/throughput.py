"""Seconds a trial, tvmlab over upstream's ms.tune_tir with its default builder and runner; and the kernels they find.

    python benchmarks/throughput.py [--trials 128] [--repeats 3] [--quick]

Each repeat tunes one convolution and one matrix product with both, in turn, another seed each time. Then the two best
kernels are timed interleaved. The last line is the ratio of seconds per trial (median over the repeats and the two
operators, with their range).
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import conv_model, matmul_model, report, tune_tvmlab, tune_upstream

from tvmlab.compat import load_meta_schedule
from tvmlab.experiment import Measure
from tvmlab.measure.local import LocalMeasurer
from tvmlab.models import load_model
from tvmlab.session import open_database
from tvmlab.spaces.sketch import SketchSpace
from tvmlab.stats import ratio_in_turns
from tvmlab.strategies import warm_records
from tvmlab.targets import target
from tvmlab.tasks import extract

GOAL = 0.25


def kernel_ratio(model: str, ours: Path, theirs: Path, rounds: int) -> tuple[float, float, float]:
    """Latency of our best kernel over upstream's, measured in turns."""
    from tvmlab.records import RunFolder

    cpu = target("cpu")
    (task,) = (task for task in extract(load_model(model), cpu) if task.info.flops > 1e6)
    space = SketchSpace(task.key, task.module, cpu.to_tvm())
    meta_schedule = load_meta_schedule()
    databases = [
        open_database(RunFolder(ours), cpu),
        meta_schedule.database.JSONDatabase(work_dir=str(theirs)),
    ]
    best = [space.replay(warm_records(database, task)[0][0]) for database in databases]
    samples: list[list[float]] = [[], []]
    with LocalMeasurer([task], cpu, Measure(repeats=3, slow_factor=1e6), Path(tempfile.mkdtemp())) as measurer:
        list(measurer.measure_defaults([task.key]))
        for _ in range(rounds):
            for found, measured in zip(samples, measurer.measure(best), strict=True):
                found += measured.latencies_s
    print(
        f"    best kernel: tvmlab {np.median(samples[0]) * 1e6:.0f} us, upstream {np.median(samples[1]) * 1e6:.0f} us"
    )
    return tuple(ratio_in_turns(*samples))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one repeat, 32 trials, the convolution only")
    asked = parser.parse_args()
    trials, repeats = (32, 1) if asked.quick else (asked.trials, asked.repeats)
    folder = Path(tempfile.mkdtemp(prefix="throughput-"))
    models = [conv_model(folder)] if asked.quick else [conv_model(folder), matmul_model(folder)]
    times, kernels = [], []
    for seed in range(repeats):
        for model in models:
            theirs = folder / f"upstream-{Path(model).stem}-{seed}"
            upstream_s = tune_upstream("tir", model, trials, seed, theirs)
            run, ours_s = tune_tvmlab(model, trials, seed, folder / "runs")
            # Both from the prepared model to the last trial, tvmlab's with its workers' start and default kernel.
            done, search_s = run.progress.trials, run.folder.state.elapsed_s
            times.append((search_s / done) / (upstream_s / trials))
            print(
                f"{Path(model).stem} seed {seed}: tvmlab {done / search_s:.2f} trials/s ({ours_s:.1f} s in all), "
                f"upstream {trials / upstream_s:.2f} trials/s",
                flush=True,
            )
            kernels.append(kernel_ratio(model, run.folder.path, theirs, 3 if asked.quick else 10))
            phases = run.folder.state.phases
            other = 1 - sum(phases.values()) / run.folder.state.elapsed_s
            print(
                f"    latency ratio {kernels[-1][0]:.3f} {kernels[-1][1:]}; phases {phases}, other {other:.1%}",
                flush=True,
            )
    report(
        "throughput.kernel_latency",
        float(np.median([k[0] for k in kernels])),
        min(k[1] for k in kernels),
        max(k[2] for k in kernels),
        1.0,
    )
    report("throughput", float(np.median(times)), min(times), max(times), GOAL)


if __name__ == "__main__":
    sys.exit(main())
