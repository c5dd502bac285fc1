"""What stack frames aligned to cache lines bring a kernel: the same schedules compiled either way, in new processes.

    python benchmarks/stacks.py [--kernel NAME ...] [--trials 96] [--schedules 24] [--processes 8] [--rows FILE]
                                [--quick]

The schedules are the fastest of a short Ansor search. Each is compiled as TVM does and as tvmlab does
(`tvmlab.llvm.align_stacks`), and all are timed in turns in so many processes, one after the other: the stack of each
begins at another address.

A row of JSON a kernel, with the latencies in microseconds, [process][schedule][way]. Then, either way, of how many of
its schedules the slowest process takes more than 1.1 times as long as the fastest, and the largest such ratio. Then,
aligned over not, the latency (geometric mean over schedules and processes); last, that of each schedule's slowest
process. Intervals of 95 % by the randomization test over the schedules (tvmlab.stats.paired_ratio).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
from common import kept, report_mean, tune_tvmlab
from kernels import KERNELS, fastest_of, model_of, task_of

from tvmlab.core import Candidate
from tvmlab.measure.builder import compile_to
from tvmlab.measure.check import make_input
from tvmlab.targets import target
from tvmlab.tasks import arguments

GOAL = 1.0
WAYS = ("plain", "aligned")  # as TVM compiles, as tvmlab does
_TURNS, _TURN_S = 9, 0.003
_SCATTERED = 1.1


def compile_all(modules: list[str], way: str, folder: Path) -> list[str]:
    """The libraries of some modules. For a new process: one that has compiled aligned once always does."""
    with patch("tvmlab.llvm.align_stacks") if way == "plain" else nullcontext():
        return [compile_to(text, target("cpu").attrs, Path(tempfile.mkdtemp(dir=folder))) for text in modules]


def compiled(found: list[Candidate], folder: Path) -> list[tuple[str, ...]]:
    """The libraries of some candidates, either way."""
    from tvm.ir import save_json

    modules, libraries = [save_json(each.payload.mod) for each in found], []
    for way in WAYS:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            libraries.append(pool.submit(compile_all, modules, way, folder).result())
    pairs = list(zip(*libraries, strict=True))
    same = sum(Path(plain).read_bytes() == Path(aligned).read_bytes() for plain, aligned in pairs)
    if same == len(pairs):
        raise SystemExit("both ways give the same code: there is nothing to compare")
    return pairs


def timed(told: dict[str, Any]) -> list[list[float]]:
    """Microseconds of a call in this process, [schedule][way]: medians of turns that all of them take."""
    import tvm

    device = tvm.cpu()
    tensors = [
        tvm.runtime.tensor(make_input(told["key"], index, shape, kind), device)
        for index, (shape, kind) in enumerate(told["arguments"])
    ]
    kernels = [[tvm.runtime.load_module(path) for path in pair] for pair in told["libraries"]]
    samples: dict[Any, list[float]] = {}
    for _ in range(_TURNS):
        for kernel in (each for pair in kernels for each in pair):
            (first,) = kernel.time_evaluator("main", device, number=1, repeat=1)(*tensors).results
            timer = kernel.time_evaluator("main", device, number=max(1, round(_TURN_S / first)), repeat=1)
            samples.setdefault(kernel, []).append(float(timer(*tensors).results[0]))
    return [[round(median(samples[kernel]) * 1e6, 2) for kernel in pair] for pair in kernels]


def row_of(name: str, trials: int, schedules: int, processes: int, folder: Path) -> dict[str, Any]:
    """One kernel."""
    model, cpu = model_of(name, folder), target("cpu")
    task = task_of(model, cpu)
    run, _ = tune_tvmlab(model, trials, 0, folder / "runs")
    found = fastest_of(run.folder, task, cpu, schedules)
    told = {"key": task.key, "arguments": arguments(task.module), "libraries": compiled(found, folder)}
    command = [sys.executable, __file__, "--timed", json.dumps(told)]
    answers = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(processes)]
    return {"latencies_us": [json.loads(answer.splitlines()[-1]) for answer in answers]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="repeat for several (default: all six)")
    parser.add_argument("--trials", type=int, default=96, help="of the search that finds the schedules")
    parser.add_argument("--schedules", type=int, default=24, help="of each kernel, at most")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--rows", type=Path, help="rows that this file has are not measured again; others are added")
    parser.add_argument("--quick", action="store_true", help="one kernel, four processes")
    parser.add_argument("--timed", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.timed:
        print(json.dumps(timed(json.loads(asked.timed))))
        return
    names = asked.kernel or (["resnet50_conv3x3"] if asked.quick else KERNELS)
    processes = 4 if asked.quick else asked.processes
    folder = Path(tempfile.mkdtemp(prefix="stacks-"))
    means: list[float] = []
    worst: list[float] = []
    for name in names:
        what = {"kernel": name, "trials": asked.trials, "schedules": asked.schedules, "processes": processes}
        row = kept(asked.rows, what, partial(row_of, name, asked.trials, asked.schedules, processes, folder))
        plain, aligned = np.array(row["latencies_us"]).transpose(2, 0, 1)
        for way, latencies in (("as TVM compiles", plain), ("aligned", aligned)):
            spread = latencies.max(axis=0) / latencies.min(axis=0)
            print(
                f"{name}, {way}: {(spread > _SCATTERED).sum()} of {spread.size} schedules, at most {spread.max():.2f}"
            )
        means += list(np.exp(np.log(aligned / plain).mean(axis=0)))
        worst += list(aligned.max(axis=0) / plain.max(axis=0))
    report_mean("stacks.latency", means, GOAL)
    report_mean("stacks", worst, GOAL)


if __name__ == "__main__":
    main()
