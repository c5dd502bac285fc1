"""Measuring the roofline of a device: peak float32 GFLOP/s and memory GB/s, once, in a process of its own.

The peak is that of independent chains of fused multiply-adds held in registers. The bandwidth is that of
reading (CPU: a copy would also pay for fetching the lines it overwrites) or copying (GPU) arrays several
times larger than the last-level cache, as STREAM asks (McCalpin, "Memory Bandwidth and Machine Balance in
Current High Performance Computers", 1995). As there, the best of the repeats counts: a limit is what the
device does undisturbed.

`python -m tvmlab.roofline` is the measuring process: a request as JSON on stdin, the roofline on stdout.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson
import platformdirs
from filelock import FileLock

from tvmlab.compat import brief
from tvmlab.core import MissingTool, Roofline
from tvmlab.nvrtc import compile_kernels

__all__ = ["cached_roofline", "child_env", "default_cache_dir", "measure"]

_VERSION = 1  # part of the cache key: raise it when a kernel below changes
_TIMEOUT_S = 120.0
_REPEAT_FOR_S = 0.25


def default_cache_dir() -> Path:
    """Where rooflines are kept between runs: tvmlab's folder in the user's cache."""
    return Path(platformdirs.user_cache_dir("tvmlab"))


def child_env(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `extra`, and tvmlab importable from wherever it is now."""
    here = str(Path(__file__).resolve().parent.parent)
    paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, **extra, "PYTHONPATH": os.pathsep.join(paths)}


def cached_roofline(
    request: Mapping[str, Any], identity: Mapping[str, Any], cache_dir: Path, env: Mapping[str, str], *,
    refresh: bool = False, run: Callable[..., Roofline] | None = None,
) -> Roofline:  # fmt: skip
    """The roofline from the cache, else measured and put there.

    `identity` says which hardware and code it is: equal identities share one measurement. Of several
    processes one measures, the others wait for it. `run` measures (None: `measure`). A folder that cannot be
    written costs a measurement each time, nothing else. Raises MissingTool if measuring fails.
    """
    key = json.dumps([_VERSION, dict(identity)], sort_keys=True)
    path = cache_dir / f"roofline-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    run = run or measure
    if not refresh and (found := _read(path)):
        return found
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"), timeout=_TIMEOUT_S)
        lock.acquire()
    except (OSError, TimeoutError):
        return run(request, env)
    with lock:
        known = _read(path)
        if known and not refresh:
            return known
        roofline = run(request, env)
        if known:
            # A busy machine measures low, never high: of two measurements of one device the larger is nearer.
            roofline = Roofline(
                max(roofline.peak_gflops, known.peak_gflops), max(roofline.bandwidth_gbs, known.bandwidth_gbs)
            )
        _write(path, roofline, identity)
        return roofline


def _read(path: Path) -> Roofline | None:
    """A roofline from the cache; None if there is none or the file is damaged (it is then measured again)."""
    try:
        stored = orjson.loads(path.read_bytes())
        values = [float(stored["peak_gflops"]), float(stored["bandwidth_gbs"])]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return Roofline(*values) if all(math.isfinite(value) and value > 0 for value in values) else None


def _write(path: Path, roofline: Roofline, identity: Mapping[str, Any]) -> None:
    stored = {
        "peak_gflops": roofline.peak_gflops,
        "bandwidth_gbs": roofline.bandwidth_gbs,
        "time_s": time.time(),
        "identity": dict(identity),
    }
    with contextlib.suppress(OSError):  # a full disk only means to measure again next time
        new = path.with_suffix(".new")  # one name is enough: the caller holds the lock
        new.write_bytes(orjson.dumps(stored, option=orjson.OPT_INDENT_2))
        new.replace(path)


def measure(request: Mapping[str, Any], env: Mapping[str, str]) -> Roofline:
    """Measure in a child process, so that neither TVM's thread pool nor a GPU context stays in this one.

    `request`: attrs (of the tvm target), device ("cpu" or "cuda:N"), threads, lanes (float32 values a vector
    holds), cache_bytes and memory_bytes of the device. Raises MissingTool with the child's last words.
    """
    command = [sys.executable, "-m", "tvmlab.roofline"]
    try:
        asked = orjson.dumps(dict(request))
        done = subprocess.run(command, input=asked, env=child_env(env), capture_output=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        words = f"no answer in {_TIMEOUT_S:.0f} s"
    else:
        if done.returncode == 0:
            return Roofline(**orjson.loads(done.stdout.splitlines()[-1]))
        words = brief(done.stderr.decode(errors="replace")) or f"exit status {done.returncode}"
    problem = f"the roofline of {request['device']} could not be measured ({words})"
    raise MissingTool(problem, remedy="run tvmlab doctor")


def _cpu_fma(threads: int, chains: int, lanes: int, steps: int) -> Any:
    """Each thread: `steps` times acc[c] = acc[c] * x + x on `chains` vectors in registers."""
    from tvm.script import tirx as T

    @T.prim_func
    def main(start_ptr: T.handle, out_ptr: T.handle):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        start = T.match_buffer(start_ptr, (chains + 1, lanes), "float32")
        out = T.match_buffer(out_ptr, (threads, chains, lanes), "float32")
        for t in T.parallel(threads):
            acc = T.alloc_buffer((chains * lanes,), "float32", scope="local")
            for c in T.unroll(chains):
                acc[T.ramp(c * lanes, 1, lanes)] = start[c, T.ramp(0, 1, lanes)]
            for _ in T.serial(steps):
                for c in T.unroll(chains):
                    acc[T.ramp(c * lanes, 1, lanes)] = (
                        acc[T.ramp(c * lanes, 1, lanes)] * start[chains, T.ramp(0, 1, lanes)]
                        + start[chains, T.ramp(0, 1, lanes)]
                    )
            for c in T.unroll(chains):
                out[t, c, T.ramp(0, 1, lanes)] = acc[T.ramp(c * lanes, 1, lanes)]

    return main


def _cpu_fill(threads: int, steps: int, chains: int, lanes: int) -> Any:
    """Write ones, each thread its own part: so the pages lie where they are read."""
    from tvm.script import tirx as T

    @T.prim_func
    def main(data_ptr: T.handle):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        data = T.match_buffer(data_ptr, (threads, steps, chains * lanes), "float32")
        for t in T.parallel(threads):
            for k, c in T.grid(steps, chains):
                data[t, k, T.ramp(c * lanes, 1, lanes)] = T.broadcast(T.float32(1), lanes)

    return main


def _cpu_read(threads: int, steps: int, chains: int, lanes: int) -> Any:
    """Each thread sums its own part of the array into `chains` vectors."""
    from tvm.script import tirx as T

    @T.prim_func
    def main(data_ptr: T.handle, out_ptr: T.handle):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        data = T.match_buffer(data_ptr, (threads, steps, chains * lanes), "float32")
        out = T.match_buffer(out_ptr, (threads, chains * lanes), "float32")
        for t in T.parallel(threads):
            acc = T.alloc_buffer((chains * lanes,), "float32", scope="local")
            for c in T.unroll(chains):
                acc[T.ramp(c * lanes, 1, lanes)] = T.broadcast(T.float32(0), lanes)
            for k in T.serial(steps):
                for c in T.unroll(chains):
                    acc[T.ramp(c * lanes, 1, lanes)] = (
                        acc[T.ramp(c * lanes, 1, lanes)] + data[t, k, T.ramp(c * lanes, 1, lanes)]
                    )
            for c in T.unroll(chains):
                out[t, T.ramp(c * lanes, 1, lanes)] = acc[T.ramp(c * lanes, 1, lanes)]

    return main


def _cuda_fma(blocks: int, threads: int, chains: int, steps: int) -> Any:
    """Each thread: `steps` times acc[c] = acc[c] * x + x on `chains` scalars in registers."""
    from tvm.script import tirx as T

    @T.prim_func
    def main(start_ptr: T.handle, out_ptr: T.handle):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        start = T.match_buffer(start_ptr, (chains + 1,), "float32")
        out = T.match_buffer(out_ptr, (blocks * threads,), "float32")
        for b in T.thread_binding(blocks, thread="blockIdx.x"):
            for t in T.thread_binding(threads, thread="threadIdx.x"):
                acc = T.alloc_buffer((chains + 1,), "float32", scope="local")
                for c in T.unroll(chains + 1):
                    acc[c] = start[c]
                for _ in T.serial(steps):
                    for c in T.unroll(chains):
                        acc[c] = acc[c] * acc[chains] + acc[chains]
                for c in T.unroll(chains):
                    acc[chains] = acc[chains] + acc[c]
                out[b * threads + t] = acc[chains]

    return main


def _cuda_copy(blocks: int, threads: int) -> Any:
    """Each thread copies one vector of four float32."""
    from tvm.script import tirx as T

    @T.prim_func
    def main(source_ptr: T.handle, out_ptr: T.handle):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        source = T.match_buffer(source_ptr, (blocks * threads * 4,), "float32")
        out = T.match_buffer(out_ptr, (blocks * threads * 4,), "float32")
        for b in T.thread_binding(blocks, thread="blockIdx.x"):
            for t in T.thread_binding(threads, thread="threadIdx.x"):
                for v in T.vectorized(4):
                    out[(b * threads + t) * 4 + v] = source[(b * threads + t) * 4 + v]

    return main


def _best_s(call: Callable[[], Any], sync: Callable[[], Any]) -> float:
    """Shortest of the repeats in seconds: at least five, after two to warm up."""
    times: list[float] = []
    while len(times) < 7 or sum(times) < _REPEAT_FOR_S:
        started = time.perf_counter()
        call()
        sync()
        times.append(time.perf_counter() - started)
    return min(times[2:])


def _starts(*shape: int) -> Any:
    """Start values, a row a chain, all different lest the compiler merges them; the last row is x = 1/2."""
    import numpy as np

    starts = np.full(shape, 0.5, "float32")
    starts[:-1] += np.arange(shape[0] - 1, dtype="float32").reshape(-1, *[1] * (len(shape) - 1)) / 64
    return starts


def _measure_cpu(request: Mapping[str, Any], target: Any) -> Roofline:
    import tvm

    threads, lanes, steps = request["threads"], request["lanes"], 1 << 17
    device = tvm.cpu()

    def gflops(chains: int) -> float:
        kernel = tvm.compile(_cpu_fma(threads, chains, lanes, steps), target=target)
        start, out = (
            tvm.runtime.tensor(_starts(chains + 1, lanes)),
            tvm.runtime.empty((threads, chains, lanes)),
        )
        return 2 * threads * chains * lanes * steps / _best_s(lambda: kernel(start, out), device.sync) / 1e9

    wanted = max(64 << 20, 4 * request["cache_bytes"])
    chains = 8
    rows = min(wanted, request["memory_bytes"] // 8, 4 << 30) // (4 * threads * chains * lanes)
    data, sums = (
        tvm.runtime.empty((threads, rows, chains * lanes)),
        tvm.runtime.empty((threads, chains * lanes)),
    )
    tvm.compile(_cpu_fill(threads, rows, chains, lanes), target=target)(data)
    read = tvm.compile(_cpu_read(threads, rows, chains, lanes), target=target)
    bandwidth = 4 * threads * rows * chains * lanes / _best_s(lambda: read(data, sums), device.sync) / 1e9
    # 12 chains fit 16 vector registers and cover the latency of two FMA units; 24 serve CPUs with 32 and 4.
    return Roofline(peak_gflops=max(gflops(12), gflops(24)), bandwidth_gbs=bandwidth)


def _cuda_kernel(function: Any, target: Any) -> Any:
    """A compiled kernel. In the target's scope: the compiler asks that for the architecture."""
    import tvm

    compile_kernels()
    with target:
        return tvm.compile(function, target=target)


def _measure_cuda(request: Mapping[str, Any], target: Any) -> Roofline:
    import tvm

    device = tvm.cuda(int(request["device"].partition(":")[2] or 0))
    threads, chains, steps = 256, 8, 1 << 14
    blocks = 8 * device.multi_processor_count
    kernel = _cuda_kernel(_cuda_fma(blocks, threads, chains, steps), target)
    start = tvm.runtime.tensor(_starts(chains + 1), device=device)
    out = tvm.runtime.empty((blocks * threads,), device=device)
    peak = 2 * blocks * threads * chains * steps / _best_s(lambda: kernel(start, out), device.sync) / 1e9

    blocks = min(512 << 20, request["memory_bytes"] // 8) // (16 * threads)
    copy = _cuda_kernel(_cuda_copy(blocks, threads), target)
    arrays = [tvm.runtime.empty((blocks * threads * 4,), device=device) for _ in range(2)]
    bandwidth = 2 * 16 * blocks * threads / _best_s(lambda: copy(*arrays), device.sync) / 1e9
    return Roofline(peak_gflops=peak, bandwidth_gbs=bandwidth)


def _main() -> None:
    import tvm

    request = orjson.loads(sys.stdin.buffer.read())
    target = tvm.target.Target(request["attrs"])
    measured = (_measure_cuda if request["device"].startswith("cuda") else _measure_cpu)(request, target)
    print(json.dumps({"peak_gflops": measured.peak_gflops, "bandwidth_gbs": measured.bandwidth_gbs}))


if __name__ == "__main__":
    _main()
