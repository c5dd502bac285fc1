"""Runs CUDA source on the CPU: threads are fibers that switch at __syncthreads, blocks follow one another.

For the kernels that TVM emits for float32 schedules without warp primitives. A thread runs to the next barrier before
another starts, so a missing barrier shows where the order of the threads matters: run in both orders and compare.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_PREAMBLE = r"""
#include <stdint.h>
#include <stdlib.h>
#include <ucontext.h>
template <class T> static T max(T a, T b) { return a > b ? a : b; }
template <class T> static T min(T a, T b) { return a < b ? a : b; }
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct int2 { int x, y; };
struct int4 { int x, y, z, w; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static int2 make_int2(int x, int y) { return {x, y}; }
static int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
struct Index { int x, y, z; };
static Index threadIdx, blockIdx;
#define __global__
#define __launch_bounds__(threads)
#define uint unsigned int

struct Fiber { ucontext_t context; Index index; bool done; };
static ucontext_t scheduler;
static Fiber *current;
static void (*kernel)();
static float **a;
static void __syncthreads() { swapcontext(&current->context, &scheduler); threadIdx = current->index; }
static void enter() { kernel(); current->done = true; }

// 0, or 1 where some threads of a block ended and others waited at a barrier.
static int launch(const int *grid, const int *block, int reversed) {
  const int threads = block[0] * block[1] * block[2], bytes = 1 << 16;
  char *stacks = (char *)malloc((size_t)threads * bytes);
  Fiber *fibers = (Fiber *)calloc(threads, sizeof(Fiber));
  for (blockIdx.z = 0; blockIdx.z < grid[2]; ++blockIdx.z)
  for (blockIdx.y = 0; blockIdx.y < grid[1]; ++blockIdx.y)
  for (blockIdx.x = 0; blockIdx.x < grid[0]; ++blockIdx.x) {
    for (int t = 0; t < threads; ++t) {
      fibers[t].index = {t % block[0], t / block[0] % block[1], t / block[0] / block[1]};
      fibers[t].done = false;
      getcontext(&fibers[t].context);
      fibers[t].context.uc_stack.ss_sp = &stacks[(size_t)t * bytes];
      fibers[t].context.uc_stack.ss_size = bytes;
      fibers[t].context.uc_link = &scheduler;
      makecontext(&fibers[t].context, enter, 0);
    }
    for (int done = 0; done < threads;) {
      done = 0;
      for (int t = 0; t < threads; ++t) {
        current = &fibers[reversed ? threads - 1 - t : t];
        threadIdx = current->index;
        swapcontext(&scheduler, &current->context);
        done += current->done;
      }
      if (done != 0 && done != threads) return 1;
    }
  }
  free(fibers);
  free(stacks);
  return 0;
}
"""
_DEFINITION = re.compile(r'extern "C" __global__ void __launch_bounds__\(\d+\) (\w+)\(([^)]*)\) \{')


def compile_source(source: str, folder: Path) -> tuple[ctypes.CDLL, list[tuple[str, list[str]]]]:
    """A library with one launcher for each kernel; and each kernel's name and the names of its arguments, in order."""
    kernels = [
        (match[1], [part.split()[-1].removesuffix("_ptr") for part in match[2].split(",")])
        for match in _DEFINITION.finditer(source)
    ]
    body = re.sub(r"__shared__ (alignas\(\d+\))", r"\1 static", source[_DEFINITION.search(source).start() :])
    launchers = []
    for name, names in kernels:
        passed = ", ".join(f"a[{position}]" for position in range(len(names)))
        launchers.append(
            f"static void call_{name}() {{ {name}({passed}); }}\n"
            f'extern "C" int launch_{name}(float **passed, const int *grid, const int *block, int reversed) {{ '
            f"a = passed; kernel = call_{name}; return launch(grid, block, reversed); }}"
        )
    code = folder / "kernels.cpp"
    code.write_text("\n".join([_PREAMBLE, body, *launchers]))
    library = code.with_suffix(".so")
    command = ["c++", "-std=c++17", "-O0", "-w", "-shared", "-fPIC", "-o", str(library), str(code)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(library)), kernels


def launches(schedule: Any) -> list[dict[str, int]]:
    """The extents of each kernel's bound loops, such as {"blockIdx.x": 4, "threadIdx.x": 64}, in order."""
    kernels: list[tuple[Any, dict[str, int]]] = []
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        loops = [schedule.get(loop) for loop in schedule.get_loops(block)]
        if not kernels or not kernels[-1][0].same_as(loops[0]):
            kernels.append((loops[0], {}))
        for loop in loops:
            if loop.thread_binding is not None:
                tag, extent = str(loop.thread_binding.thread_tag), int(loop.extent)
                assert kernels[-1][1].setdefault(tag, extent) == extent, f"two extents of {tag}"
    return [bound for _, bound in kernels]


def run(source: str, schedule: Any, arrays: Sequence[np.ndarray], folder: Path) -> list[np.ndarray]:
    """What a scheduled task's kernels write into the last of its arguments, with the threads of a block in order and
    in reverse order. Raises AssertionError at a divergent barrier.
    """
    library, kernels = compile_source(source, folder)
    names = [str(parameter.name) for parameter in schedule.mod["main"].params]
    root = schedule.get(schedule.get_sblock("root"))
    workspaces = [buffer for buffer in root.alloc_buffers if str(buffer.scope()) in ("", "global")]
    bounds = launches(schedule)
    assert len(bounds) == len(kernels)
    results = []
    for reverse in (False, True):
        memory = dict(zip(names, arrays, strict=True)) | {names[-1]: np.full_like(arrays[-1], np.nan)}
        for buffer in workspaces:
            shape = [int(size) for size in buffer.shape]
            memory[str(buffer.name).replace(".", "_")] = np.full(shape, np.nan, "float32")
        for (name, arguments), bound in zip(kernels, bounds, strict=True):
            grid = (ctypes.c_int * 3)(*(bound.get(f"blockIdx.{axis}", 1) for axis in "xyz"))
            block = (ctypes.c_int * 3)(*(bound.get(f"threadIdx.{axis}", 1) for axis in "xyz"))
            pointers = (ctypes.c_void_p * len(arguments))(*(memory[argument].ctypes.data for argument in arguments))
            diverged = library[f"launch_{name}"](pointers, grid, block, int(reverse))
            assert diverged == 0, f"threads of {name} wait at different barriers"
        results.append(memory[names[-1]])
    return results
