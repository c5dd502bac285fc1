"""Seconds to compile one kernel for CUDA, without a card: NVRTC as TVM calls it, NVRTC without headers, nvcc.

    python benchmarks/cuda_builds.py [--model resnet50] [--target sm_90a] [--every 5]

Of every fifth task the first start of its template and a random sketch. Compilers that are not installed are left out.
TVM's way needs CUDA's headers: CUDA_PATH, and with the wheels TVM_CUDA_NVRTC_EXTRA_OPTS=-I.../cccl. The last line is
JSON: medians, and how many kernels have the same machine code with headers and without.
"""

import argparse
import importlib.util
import json
import shutil
import struct
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


def machine_code(cubin):
    """The code sections of a cubin, which is a 64-bit ELF file, by name."""
    (at,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    rows = [struct.unpack_from("<IIQQQQ", cubin, at + number * size) for number in range(count)]
    words = rows[names][4]
    named = {bytes(cubin[words + row[0] : cubin.index(b"\0", words + row[0])]): row for row in rows}
    return {name: bytes(cubin[row[4] : row[4] + row[5]]) for name, row in named.items() if name.startswith(b".text.")}


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
    same = []
    for task in tasks[:: asked.every]:
        for source in sources(task, device):
            codes = []
            for name, compiled in ways.items():
                started = time.perf_counter()
                with device.to_tvm():
                    binary = compiled(source)
                seconds[name].append(time.perf_counter() - started)
                codes += [machine_code(bytes(binary))] if name.startswith("nvrtc") else []
            same += [codes[0] == codes[1] != {}] if len(codes) == 2 else []
            last = ", ".join(f"{name} {values[-1]:.2f}" for name, values in seconds.items())
            print(f"{task.info.name}, {len(source) / 1e3:.0f} kB of source: {last} s", flush=True)
    medians = {name: round(median(values), 3) for name, values in seconds.items()}
    kernels = len(next(iter(seconds.values())))
    print(json.dumps({"benchmark": "cuda_builds", "kernels": kernels, "median_s": medians, "same_code": sum(same)}))


if __name__ == "__main__":
    main()
