"""The six kernels that droplet.py and storm.py tune, each a model of its own, and how two schedules compare."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import save_model
from onnx import helper

from tvmlab.compat import read_database
from tvmlab.core import Candidate
from tvmlab.experiment import Measure
from tvmlab.measure.local import LocalMeasurer
from tvmlab.models import load_model
from tvmlab.records import RunFolder
from tvmlab.spaces.sketch import SketchSpace
from tvmlab.stats import Paired, paired_ratio, turn_ratio
from tvmlab.strategies import warm_records
from tvmlab.targets import Target
from tvmlab.tasks import Task, extract

# Convolutions with bias and relu: channels in and out, kernel, size of the input. Dense layers: features in and out.
CONVS = {
    "resnet50_conv3x3": (128, 128, 3, 28),
    "resnet50_conv1x1": (1024, 256, 1, 14),
    "googlenet_conv5x5": (32, 96, 5, 28),
    "alexnet_conv3x3": (256, 384, 3, 13),
}
DENSE = {"googlenet_dense": (1024, 1000), "alexnet_dense": (4096, 4096)}
KERNELS = (*CONVS, *DENSE)

_PROCESSES = 6  # in which two kernels are compared: the fewest that give an interval
_PAIRS = 10  # fewest turns of each, twice


def model_of(name: str, folder: Path) -> str:
    """The path of an .onnx file of this kernel alone."""
    rng = np.random.default_rng(0)
    if name in DENSE:
        features, out = DENSE[name]
        nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)]
        shapes, scale = ((1, features), (1, out), (out, features)), features**-0.5
    else:
        channels, out, kernel, size = CONVS[name]
        conv = helper.make_node("Conv", ["x", "w", "b"], ["c"], kernel_shape=[kernel] * 2, pads=[kernel // 2] * 4)
        nodes = [conv, helper.make_node("Relu", ["c"], ["y"])]
        shapes = ((1, channels, size, size), (1, out, size, size), (out, channels, kernel, kernel))
        scale = (channels * kernel**2) ** -0.5
    weights = {
        "w": rng.standard_normal(shapes[2], dtype=np.float32) * np.float32(scale),
        "b": np.zeros(out, np.float32),
    }
    return save_model(folder / f"{name}.onnx", nodes, *shapes[:2], weights)


def task_of(model: str, target: Target) -> Task:
    """The one task that computes something."""
    return max(extract(load_model(model), target), key=lambda task: task.info.flops)


def fastest_of(run: RunFolder, task: Task, target: Target, most: int) -> list[Candidate]:
    """The fastest schedules in a run's database, the fastest first."""
    space = SketchSpace(task.key, task.module, target.to_tvm())
    records = warm_records(read_database(run.path, target.kind), task, most)
    return [found for trace, _ in records if (found := space.replay(trace))]


def best_of(run: RunFolder, task: Task, target: Target) -> Candidate:
    """What a user gets of a run: the fastest schedule in its database."""
    (found,) = fastest_of(run, task, target, 1)
    return found


class Compared(NamedTuple):
    """Two candidates' latencies in microseconds, and the ratio of ours over theirs over several processes."""

    ours_us: float
    theirs_us: float
    ratio: Paired


def compare(ours: Candidate, theirs: Candidate, task: Task, target: Target, *, cold: bool = False) -> Compared:
    """Two candidates, timed in turns in processes of their own, one after the other; see docs/benchmarks.md for why.

    The ratio is the geometric mean of the processes' (each the median of its turns), with the interval of
    `tvmlab.stats.paired_ratio` over them. `cold` is Measure's `cold_weights`.
    """
    found = [_in_process(ours, theirs, task, target, cold) for _ in range(_PROCESSES)]
    latencies = (np.median(np.concatenate(samples)) * 1e6 for samples in zip(*found, strict=True))
    ratio = paired_ratio([turn_ratio(*samples) for samples in found], np.ones(len(found)))
    return Compared(*(round(float(latency), 2) for latency in latencies), ratio)


def _in_process(
    ours: Candidate, theirs: Candidate, task: Task, target: Target, cold: bool
) -> tuple[list[float], list[float]]:
    """Latencies in seconds; each of the two is the one that is timed first in half of the turns."""
    samples: tuple[list[float], list[float]] = ([], [])
    options = Measure(repeats=_PAIRS, slow_factor=1e6, cold_weights=cold)
    with (
        tempfile.TemporaryDirectory(prefix="kernels-") as scratch,
        LocalMeasurer([task], target, options, Path(scratch)) as measurer,
    ):
        list(measurer.measure_defaults([task.key]))
        for first, second in ((0, 1), (1, 0)):
            both = (ours, theirs)
            (measured,) = measurer.measure([beside(both[first], both[second])])
            if not measured.rival_latencies_s:
                raise SystemExit(f"{task.info.name}: {measured.status} {measured.message}")
            samples[first].extend(measured.latencies_s)
            samples[second].extend(measured.rival_latencies_s)
    return samples


def beside(candidate: Candidate, rival: Candidate) -> Candidate:
    """A candidate that is timed in turns with a rival."""
    return Candidate(candidate.task_key, candidate.key, -1, (), candidate.payload, rival)
