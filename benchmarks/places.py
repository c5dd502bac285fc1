"""How much comparing two kernels depends on the pages of memory that their data got, with one place and with four.

    python benchmarks/places.py [--kernel googlenet_dense] [--processes 24] [--quick]

The two fastest schedules of a short Ansor search are timed in turns in many processes one after the other, as a droplet
search times a candidate beside its rival: each time with all pairs in one place, and with pairs that go round four
copies of the data (tvmlab.measure.device). A process gets other pages each time, so the ratio of the two scatters.

A line for each way: the median ratio and its range. The last line compares the scatter, the standard deviation of the
log ratio over the processes, of four places over one, with a 95 % bootstrap interval over the processes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import report
from kernels import KERNELS, model_of, task_of

import tvmlab
from tvmlab.compat import read_database
from tvmlab.experiment import Ansor, Experiment
from tvmlab.measure.builder import compile_to
from tvmlab.spaces.sketch import SketchSpace
from tvmlab.strategies import warm_records
from tvmlab.targets import target
from tvmlab.tasks import arguments

GOAL = 1.0
WAYS = (1, 4)
_OPTIONS = {"repeats": 20, "min_repeat_ms": 10.0, "slow_factor": 1e6, "best_s": None, "check": True}


def built(name: str, trials: int, folder: Path) -> dict:
    """What a child is told: the task, and the libraries of its default kernel and of its two fastest schedules."""
    cpu = target("cpu")
    model = model_of(name, folder)
    step = Ansor(max_trials=trials, early_stopping_threshold=100_000)
    run = tvmlab.tune(Experiment(model=model, target="cpu", steps=(step,)).afresh(), folder / "runs").wait()
    task = task_of(model, cpu)
    space = SketchSpace(task.key, task.module, cpu.to_tvm())
    records = warm_records(read_database(run.folder.path, cpu.kind), task, 2)
    found = [made for trace, _ in records if (made := space.replay(trace))]
    modules = [task.module, *(made.payload.mod for made in found)]
    return {"key": task.key, "arguments": arguments(task.module), "libraries": [_compiled(m, folder) for m in modules]}


def _compiled(module, folder: Path) -> str:
    from tvm.ir import save_json

    return compile_to(save_json(module), target("cpu").attrs, Path(tempfile.mkdtemp(dir=folder)))


def child(told: dict, places: int) -> float:
    """The ratio of the two kernels in this process: medians of pairs that go round so many places."""
    from tvmlab.measure import device

    device._PLACES = places
    timing = {**_OPTIONS, "cold_cache_bytes": 0}
    worker = device.Device("cpu")
    default, rival, ours = told["libraries"]
    worker.do_default(told["key"], [tuple(each) for each in told["arguments"]], default, timing)
    worker.do_rival(told["key"], rival, timing)
    found = worker.do_measure(told["key"], ours, timing, rival)
    return float(np.median(found.latencies_s) / np.median(found.rival_latencies_s))


def ratio_of(told: Path, places: int) -> float:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--child", str(told), str(places)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return float(done.stdout.split()[-1])


def scatter(ratios: np.ndarray) -> float:
    return float(np.std(np.log(ratios), ddof=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=KERNELS, default="googlenet_dense")
    parser.add_argument("--trials", type=int, default=16, help="of the search that finds the two schedules")
    parser.add_argument("--processes", type=int, default=24, help="each way")
    parser.add_argument("--quick", action="store_true", help="six processes each way")
    parser.add_argument("--child", nargs=2, metavar=("FILE", "PLACES"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(child(json.loads(Path(asked.child[0]).read_text()), int(asked.child[1])))
        return
    folder = Path(tempfile.mkdtemp(prefix="places-"))
    told = folder / "told.json"
    told.write_text(json.dumps(built(asked.kernel, asked.trials, folder)))
    rounds = range(6 if asked.quick else asked.processes)
    found = np.array([[ratio_of(told, places) for places in WAYS] for _ in rounds])  # shape (processes, ways)
    for places, ratios in zip(WAYS, found.T, strict=True):
        print(f"{places} place(s): ratio {np.median(ratios):.3f}, from {ratios.min():.3f} to {ratios.max():.3f}")
    rng = np.random.default_rng(0)
    drawn = (found[rng.integers(len(found), size=len(found))] for _ in range(2000))
    ratios = [scatter(sample[:, 1]) / scatter(sample[:, 0]) for sample in drawn]
    low, high = np.quantile(ratios, [0.025, 0.975])
    report("places", scatter(found[:, 1]) / scatter(found[:, 0]), float(low), float(high), GOAL)


if __name__ == "__main__":
    main()
