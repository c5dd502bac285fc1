"""Compile candidates in persistent worker processes.

TVM's LocalBuilder starts its workers anew for every batch, each of which then spends 12 CPU-seconds on importing
tensor intrinsics, and links through the C++ compiler driver (docs/tvm.md). These workers live as long as the run,
load only what the target needs, and link with `ld` alone.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tvmlab.compat import brief, hide_torch
from tvmlab.core import TrialStatus
from tvmlab.measure.process import START_S, WorkerDied, WorkerProcess, WorkerTimeout, serve

__all__ = ["Build", "BuilderPool"]

_RECYCLE_AFTER = 400  # TVM keeps some memory of every module it compiled


@dataclass(frozen=True)
class Build:
    """A compiled candidate (path of a shared library), or why there is none.

    `is_transient` says that it may have been the machine: the worker was killed, or did not answer in time.
    """

    status: TrialStatus
    path: str = ""
    build_s: float = 0.0
    message: str = ""
    is_transient: bool = False


class BuilderPool:
    """`workers` processes that compile TensorIR modules (function `main`) for one target.

    `environment` is what they need beside this process's: on CUDA the compiler, and where its libraries are.
    """

    def __init__(
        self,
        target_json: dict[str, Any],
        workers: int,
        timeout_s: float,
        scratch: Path,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._target = target_json
        self._scratch = scratch
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="build")
        self._idle: SimpleQueue[WorkerProcess] = SimpleQueue()
        self._workers = []
        self._jobs: dict[WorkerProcess, int] = {}
        # One thread in a build worker: the pool as a whole fills the cores.
        environment = {**(environment or {}), "TVM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        for _ in range(workers):
            worker = WorkerProcess(__name__, [], log, environment)
            worker.start()
            self._workers.append(worker)
            self._idle.put(worker)

    @property
    def pids(self) -> list[int]:
        """Process ids of the living workers."""
        return [worker.pid for worker in self._workers if worker.pid]

    def submit(self, module_json: str) -> Future[Build]:
        """Queue one module; the future's result is a Build, never an exception."""
        return self._threads.submit(self._build, module_json)

    def _build(self, module_json: str) -> Build:
        worker = self._idle.get()
        started = time.perf_counter()
        try:
            self._prepare(worker)
            started = time.perf_counter()
            path = tempfile.mkdtemp(dir=self._scratch)
            answer = worker.request(("build", module_json, self._target, path), self._timeout_s)
            return Build(TrialStatus(answer[0]), answer[1], time.perf_counter() - started, answer[2])
        except WorkerTimeout as error:
            return Build(TrialStatus.BUILD_TIMEOUT, "", time.perf_counter() - started, str(error), True)
        except WorkerDied as error:
            message = f"the compiler {error}"
            return Build(TrialStatus.BUILD_ERROR, "", time.perf_counter() - started, message, True)
        finally:
            self._idle.put(worker)

    def _prepare(self, worker: WorkerProcess) -> None:
        """Importing TVM is not part of a candidate's build time, so a fresh worker first answers a ping."""
        if self._jobs.get(worker, 0) >= _RECYCLE_AFTER:
            worker.kill()
        if worker.pid is None or worker not in self._jobs:
            worker.request(("ping",), START_S)
            self._jobs[worker] = 0
        self._jobs[worker] += 1

    def close(self) -> None:
        """End the workers; builds under way are lost."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.kill()


def remove_build(path: str) -> None:
    """Delete a compiled candidate and its folder."""
    if path:
        shutil.rmtree(Path(path).parent, ignore_errors=True)


def discard(build: Future[Build]) -> None:
    """Delete what a build that nobody wants any more has compiled, or will have."""
    build.add_done_callback(lambda done: None if done.cancelled() else remove_build(done.result().path))


def _answer(message: tuple[Any, ...]) -> tuple[str, str, str]:
    if message[0] == "ping":
        from tvmlab.compat import load_meta_schedule

        load_meta_schedule()
        return "ok", "", ""
    _, module_json, target, folder = message
    try:
        return "ok", compile_to(module_json, target, Path(folder)), ""
    except Exception as error:  # noqa: BLE001  whatever a compiler pass raises is this candidate's failure
        shutil.rmtree(folder, ignore_errors=True)
        text = str(error).strip()
        status = TrialStatus.OUT_OF_LIMITS if _is_limit(text) else TrialStatus.BUILD_ERROR
        return status.value, "", brief(text) or type(error).__name__


def _is_limit(text: str) -> bool:
    return any(phrase in text for phrase in ("too many resources", "uses too much shared data", "maximum allowed"))


def compile_to(module_json: str, target_json: dict[str, Any], folder: Path) -> str:
    """Compile a serialised TensorIR module into a shared library in `folder`; returns its path."""
    import tvm
    from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

    from tvmlab.compat import idle_passes, load_meta_schedule
    from tvmlab.llvm import align_stacks
    from tvmlab.nvrtc import compile_kernels

    load_meta_schedule(target_json["kind"])
    align_stacks()
    if target_json["kind"] == "cuda":
        compile_kernels()
    target = tvm.target.Target(target_json)
    module = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(tvm.ir.load_json(module_json))
    library = folder / "kernel.so"
    with target, tvm.transform.PassContext(disabled_pass=idle_passes(target_json["kind"])):
        built = tvm.driver.build(module, target=target)
    if target.kind.name == "llvm":
        _link_object(built, library)
    else:
        built.export_library(str(library))
    return str(library)


def _link_object(built: Any, library: Path) -> None:
    """One object file into a shared library. `ld` takes 5 ms where the C++ driver takes 50."""
    object_file = library.with_suffix(".o")
    built.write_to_file(str(object_file))
    linker = shutil.which("ld")
    command = [linker, "-shared"] if linker else ["cc", "-shared", "-nostdlib"]
    done = subprocess.run([*command, "-o", str(library), str(object_file)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"linking failed: {done.stderr.strip()}")
    object_file.unlink()


if __name__ == "__main__":
    hide_torch()
    _answer(("ping",))  # import TVM while the search process still prepares
    serve(int(sys.argv[1]), _answer)
