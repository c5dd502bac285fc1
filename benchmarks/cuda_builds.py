"""Seconds to compile one kernel for CUDA, without a card: NVRTC as TVM calls it, NVRTC without headers, nvcc.

    python benchmarks/cuda_builds.py [--model resnet50] [--target sm_90a] [--every 5]

Of every fifth task the first start of its template and a random sketch. Compilers that are not installed are left
out. TVM's way needs CUDA's headers (CUDA_PATH, and TVM_CUDA_NVRTC_EXTRA_OPTS=-I.../cccl with the wheels). The last line is
JSON: medians.
"""

import argparse
import importlib.util
import json
import shutil
import time
from statistics import median

import numpy as np

from tvmlab.models import load_model
from tvmlab.nvrtc import compile_lean, lean_source
from tvmlab.spaces.sketch import SketchSpace
from tvmlab.strategies import template_space
from tvmlab.targets import target
from tvmlab.tasks import extract


def compilers(device):
    """Compile functions by name, each of a source of TVM's."""
    from tvm.support.nvcc import compile_cuda

    found = {}
    if importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings"):
        found["nvrtc, TVM's way"] = lambda source: compile_cuda(source, "cubin", compiler="nvrtc")
        found["nvrtc, no headers"] = lambda source: compile_lean(lean_source(source), device.attrs["arch"])
    if shutil.which("nvcc"):
        found["nvcc"] = lambda source: compile_cuda(source, "fatbin", compiler="nvcc")
    return found


def sources(task, device):
    """The CUDA source of a template's first start and of a random sketch, as far as there are any."""
    import tvm

    template = template_space(task, device)
    made = [template.realize(template.starts()[0])] if template else []
    sketches = SketchSpace(task.key, task.module, device.to_tvm())
    made.append(sketches.sample(0, np.random.default_rng(0)))
    for candidate in filter(None, made):
        with device.to_tvm():
            built = tvm.driver.build(candidate.payload.mod, target=device.to_tvm())
        yield built.imports[0].inspect_source()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--target", default="sm_90a")
    parser.add_argument("--every", type=int, default=5)
    asked = parser.parse_args()
    device = target(asked.target)
    tasks = [task for task in extract(load_model(asked.model), device) if task.info.tunable]
    ways = compilers(device)
    seconds = {name: [] for name in ways}
    for task in tasks[:: asked.every]:
        for source in sources(task, device):
            for name, compiled in ways.items():
                started = time.perf_counter()
                with device.to_tvm():
                    compiled(source)
                seconds[name].append(time.perf_counter() - started)
            last = ", ".join(f"{name} {values[-1]:.2f}" for name, values in seconds.items())
            print(f"{task.info.name}, {len(source) / 1e3:.0f} kB of source: {last} s", flush=True)
    medians = {name: round(median(values), 3) for name, values in seconds.items()}
    print(json.dumps({"benchmark": "cuda_builds", "kernels": len(next(iter(seconds.values()))), "median_s": medians}))


if __name__ == "__main__":
    main()
