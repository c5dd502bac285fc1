"""Measure every point of a small template space, and write the table that the tuners' tests are answered from.

    python benchmarks/record_space.py data/recorded_spaces/conv3x3_64x28.json

The space is the template's for a 3x3 convolution, 64 to 64 channels at 28x28 on NCHW16c, then relu.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median

import tvmlab
from tvmlab import packed_ops
from tvmlab.compat import load_meta_schedule, structural_key
from tvmlab.core import TaskInfo
from tvmlab.environment import describe
from tvmlab.experiment import Measure
from tvmlab.measure.local import LocalMeasurer
from tvmlab.spaces.template import TemplateSpace
from tvmlab.tasks import Task

BLOCK, CHANNELS, SIZE = 16, 64, 28
OPERATOR = f"conv2d 3x3, {CHANNELS} to {CHANNELS} channels, {SIZE}x{SIZE}, NCHW{BLOCK}c, relu"


def convolution(target):
    """The unscheduled convolution as a TVM module."""
    from tvm import IRModule, te, topi

    blocks = CHANNELS // BLOCK
    data = te.placeholder((1, blocks, SIZE, SIZE, BLOCK), name="data")
    weight = te.placeholder((blocks, blocks, 3, 3, BLOCK, BLOCK), name="weight")
    with target.to_tvm():
        result = topi.nn.relu(packed_ops.conv2d(data, weight, (1, 1), (1, 1, 1, 1), (1, 1)))
    return IRModule({"main": te.create_prim_func([data, weight, result]).with_attr("global_symbol", "main")})


def measure(space, module, target):
    """The median latency of each point in microseconds, how it failed, or None where it is not valid."""
    info = TaskInfo(space.task_key, "conv2d_relu", "conv2d+relu", 1, 2.0 * 9 * (CHANNELS * SIZE) ** 2, 0.0, True)
    candidates = [found for index in range(len(space)) if (found := space.realize(index)) is not None]
    table = [None] * len(space)
    task = Task(info, module)
    with tempfile.TemporaryDirectory() as folder, LocalMeasurer([task], target, Measure(), Path(folder)) as measurer:
        list(measurer.measure_defaults([task.key]))
        for begin in range(0, len(candidates), 32):
            batch = candidates[begin : begin + 32]
            for candidate, found in zip(batch, measurer.measure(batch), strict=True):
                table[candidate.decisions[0]] = answer(found)
            print(f"{begin + len(batch)} of {len(candidates)}", flush=True)
    return table


def answer(found):
    """What the table says of a measurement."""
    return round(median(found.latencies_s) * 1e6, 3) if found.latencies_s else str(found.status)


def record(path):
    """Measure the whole space and write the table."""
    load_meta_schedule()
    target = tvmlab.target("cpu")
    module = convolution(target)
    space = TemplateSpace(structural_key(module), module, target.to_tvm())
    table = measure(space, module, target)
    knobs = {name: list(values) for name, values in space.template.knobs.items()}
    about = {"operator": OPERATOR, "cpu": target.label, "unit": "us", **describe()["versions"]}
    features = [[round(float(x), 4) for x in space.encode(index)] for index in range(len(space))]
    found = {"about": about, "knobs": knobs, "starts": list(space.starts()), "features": features, "table": table}
    path.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    record(parser.parse_args().path)
