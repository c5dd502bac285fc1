"""Measure on a device of this machine: build workers fill the cores, one process owns the device."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from tvmlab.core import DEFAULT_TIMEOUT_FACTOR, Candidate, Measurement, TrialStatus
from tvmlab.experiment import Measure
from tvmlab.measure.builder import Build, BuilderPool, discard, remove_build
from tvmlab.measure.device import planned_s
from tvmlab.measure.process import START_S, WorkerDied, WorkerProcess, WorkerTimeout
from tvmlab.measure.rivals import RivalBuilds
from tvmlab.measure.watch import watch_of
from tvmlab.targets import Target
from tvmlab.tasks import Task, arguments, default_gpu_schedule

__all__ = ["LocalMeasurer"]

_SCRATCH = "scratch-"
_USUAL_CACHE_BYTES = 32 << 20


class LocalMeasurer:
    """Builds and runs candidates of the given tasks. Use as a context manager: leaving it ends every process.

    `folder` takes the workers' output (log.txt), on a GPU what the device told of itself (device.jsonl), and, while
    the workers live, the compiled candidates.

    On a CPU target nothing is built while a candidate runs: both would use the same cores. On a GPU candidates run as
    they are built, in a thread that alone talks to the device's process, while the caller does other work (`overlaps`).
    """

    def __init__(self, tasks: Sequence[Task], target: Target, options: Measure, folder: Path) -> None:
        assert target.device is not None, "resolved by tune(): a target without its device cannot be measured on"
        self._tasks = {task.key: task for task in tasks}
        self._target = target
        self._options = options
        log = folder / "log.txt"
        for left in folder.glob(f"{_SCRATCH}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        self._scratch = tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder, ignore_cleanup_errors=True)
        self._best_s: dict[str, float] = {}
        self._references: dict[str, Build | Future[Build]] = {}
        self._rebuilt: set[str] = set()
        # By task: how its default kernel failed, how often, and with which start of the device's process at last.
        self._unrunnable: dict[str, tuple[Measurement, int, int]] = {}
        # On a GPU, or if weights shall stay in the caches, none.
        is_cold = options.cold_weights and target.kind == "llvm"
        self._cold_cache_bytes = (target.details.get("cache_bytes") or _USUAL_CACHE_BYTES) if is_cold else 0
        workers = options.build_workers or len(os.sched_getaffinity(0))
        environment = target.worker_env()
        scratch = Path(self._scratch.name)
        for_builds = environment if target.kind == "cuda" else {}
        self._builders = BuilderPool(target.attrs, workers, options.build_timeout_s, scratch, log, for_builds)
        self.overlaps = target.kind == "cuda"
        at_once = 4 if self.overlaps else 1  # those of the batch that runs, and of some that are built
        self._rivals = RivalBuilds(lambda rival: self._builders.submit(_to_json(rival.payload.mod)), at_once)
        # By task: the path of the rival that was loaded, by which start of the device's process, and why not.
        self._loaded_rivals: dict[str, tuple[str, int, str]] = {}
        self._device = WorkerProcess("tvmlab.measure.device", [target.device], log, environment)
        self._device.start()
        self._closing = threading.Event()
        self._turn = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._watch = watch_of(target, folder)
        self.build_wait_s = 0.0
        self.run_s = 0.0

    def __enter__(self) -> LocalMeasurer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the living workers."""
        return [*self._builders.pids, *([self._device.pid] if self._device.pid else [])]

    def measure_defaults(self, task_keys: Sequence[str]) -> Generator[Measurement]:
        """Measure the unscheduled kernels (on a GPU: TVM's default schedule), in order; builds start at once."""
        for key in task_keys:
            self._submit_reference(key)
        return (self._turn.submit(self._measure_default, key).result() for key in task_keys)

    def measure(self, candidates: Sequence[Candidate]) -> Generator[Measurement]:
        """Measure candidates, in order. Builds start at once; the runs too if this `overlaps`, else when the iterator
        is first advanced.

        A candidate with a rival that can be built and run is timed in turns with it, any other alone.
        """
        modules = [_to_json(candidate.payload.mod) for candidate in candidates]
        order = list(range(len(modules)))
        if not self.overlaps:  # one that takes seconds to compile must not be the last to begin
            order.sort(key=lambda index: -len(modules[index]))
        first = {each.task_key: each.rival for each in reversed(candidates) if each.rival is not None}
        rivals = [self._rivals.get(rival) for rival in first.values()]
        submitted = {index: self._builders.submit(modules[index]) for index in order}
        builds = [submitted[index] for index in range(len(modules))]
        if self.overlaps:
            runs = [self._turn.submit(self._run_built, *pair) for pair in zip(candidates, builds, strict=True)]
            self._turn.submit(self._note, list(candidates))
            results = self._results(runs, builds)
            next(results)  # now closing it cancels what is left, even if nothing was asked of it yet
            return results
        return self._run_all(list(candidates), builds, rivals)

    def _results(self, runs: list[Future[Measurement]], builds: list[Future[Build]]) -> Generator[Measurement]:
        """What the device's thread measures, as it comes; a caller that closes this cancels the rest."""
        try:
            yield Measurement(TrialStatus.OK)  # taken by `measure`
            for run in runs:
                yield run.result()
        finally:
            for run in runs:
                run.cancel()
            for build, run in zip(builds, runs, strict=True):
                build.cancel()
                if run.cancelled():  # else it deletes its own
                    discard(build)

    def _run_built(self, candidate: Candidate, build: Future[Build]) -> Measurement:
        """Wait for a build and run it: the device's thread does one after the other."""
        try:
            self._wait([build])
            found = self._run(candidate, build.result())
        except CancelledError:
            return Measurement(TrialStatus.BUILD_ERROR, message="the measurer was closed")
        why = self._watch.look()
        throttled = f"measured while the GPU was throttled: {why}" if why and found.status is TrialStatus.OK else ""
        return replace(found, message="; ".join(filter(None, [found.message, throttled])))

    def _note(self, candidates: list[Candidate]) -> None:
        keys = list(dict.fromkeys(candidate.task_key for candidate in candidates))
        self._watch.note({"tasks": keys, "candidates": len(candidates)})

    def _run_all(
        self, candidates: list[Candidate], builds: list[Future[Build]], rivals: list[Future[Build]]
    ) -> Generator[Measurement]:
        self._wait([*builds, *rivals])
        for position, (candidate, build) in enumerate(zip(candidates, builds, strict=True)):
            try:
                yield self._run(candidate, build.result())
            except GeneratorExit:
                for unused in builds[position + 1 :]:
                    unused.cancel()
                    discard(unused)
                raise

    def _wait(self, builds: list[Future[Build]]) -> None:
        started = time.perf_counter()
        for build in builds:
            build.result()
        self.build_wait_s += time.perf_counter() - started

    def _run(self, candidate: Candidate, build: Build) -> Measurement:
        if build.status is not TrialStatus.OK:
            return Measurement(build.status, build_s=build.build_s, message=build.message)
        rival = self._rivals.get(candidate.rival) if candidate.rival is not None else None
        if rival is not None:
            self._wait([rival])
        key = candidate.task_key
        started = time.perf_counter()
        try:
            found = self._run_beside(key, build.path, rival.result() if rival else None)
        finally:
            remove_build(build.path)
        elapsed = time.perf_counter() - started
        self.run_s += elapsed
        for latencies in (found.latencies_s, found.rival_latencies_s):
            if latencies:
                middle = sorted(latencies)[len(latencies) // 2]
                self._best_s[key] = min(middle, self._best_s.get(key, middle))
        return replace(found, build_s=build.build_s, run_s=elapsed)

    def _run_beside(self, key: str, path: str, rival: Build | None) -> Measurement:
        """Run a built candidate, in turns with its rival where that runs; alone, and saying so, where it does not."""
        refused = self._load_rival(key, rival) if rival else None
        failed = self._ensure_task(key)
        if failed is not None:
            return failed
        beside = rival.path if rival and not refused else ""
        timing = self._timing(key)
        timeout_s = self._options.run_timeout_s + planned_s(timing, in_turns=bool(beside))
        found = self._request(("measure", key, path, timing, beside), timeout_s)
        if refused and found.status is TrialStatus.OK:
            return replace(found, message=f"measured without its rival: {refused}")
        return found

    def _load_rival(self, key: str, rival: Build) -> str:
        """Have the device process load, run and check a rival, once in its life; returns why it cannot be used."""
        if rival.status is not TrialStatus.OK:
            return f"{rival.status}, {rival.message}"
        if self._ensure_task(key) is not None:
            return "its task cannot be run"
        path, generation, refused = self._loaded_rivals.get(key, ("", 0, ""))
        # One that killed the process is not tried again; one that ran must be loaded again by another process.
        if path == rival.path and (refused or generation == self._device.generation):
            return refused
        found = self._request(("rival", key, rival.path, self._timing(key)), self._options.run_timeout_s)
        refused = "" if found.status is TrialStatus.OK else f"{found.status}, {found.message}"
        self._loaded_rivals[key] = rival.path, self._device.generation, refused
        return refused

    def _ensure_task(self, key: str) -> Measurement | None:
        """Make sure that the device process holds the task's reference; returns the failure if it cannot."""
        if self._has_task(key):
            return None
        found = self._run_reference(key)
        return None if found.status is TrialStatus.OK else found

    def _has_task(self, key: str) -> bool:
        if self._device.pid is None:
            return False
        try:
            return bool(self._device.request(("has", key), START_S))
        except (WorkerDied, WorkerTimeout):
            return False

    def _run_reference(self, key: str) -> Measurement:
        """Run a task's default kernel; one that failed, once more by another process, then never again."""
        build = self._reference_build(key)
        if build.status is not TrialStatus.OK:
            return Measurement(build.status, message=f"the unscheduled kernel cannot be built: {build.message}")
        failed, times, generation = self._unrunnable.get(key, (None, 0, 0))
        is_same_process = self._device.pid is not None and self._device.generation == generation
        if failed is not None and (times > 1 or is_same_process):
            return failed
        timing = {**self._timing(key), "best_s": None}
        timeout_s = self._options.run_timeout_s * DEFAULT_TIMEOUT_FACTOR + planned_s(timing)
        found = self._request(("default", key, arguments(self._tasks[key].module), build.path, timing), timeout_s)
        if found.status is TrialStatus.OK:
            self._unrunnable.pop(key, None)
        else:
            self._unrunnable[key] = found, times + 1, self._device.generation
        return found

    def _submit_reference(self, key: str) -> None:
        """Have the kernel built that a task's candidates are checked against, unless it is already."""
        if key in self._references:
            return
        module = self._tasks[key].module
        if self._target.kind == "cuda":
            with self._target.to_tvm():
                module = default_gpu_schedule(module)
        self._references[key] = self._builders.submit(_to_json(module))

    def _reference_build(self, key: str) -> Build:
        """Wait for a reference's build; one that the machine may be to blame for is done once more."""
        # Of a task whose default was measured by an earlier session. On a GPU this is the device's thread: it must not
        # ask `measure_defaults`, which waits for that thread.
        self._submit_reference(key)
        found = self._references[key]
        if isinstance(found, Future):
            self._wait([found])
            found = self._references[key] = found.result()
        if found.is_transient and key not in self._rebuilt and not self._closing.is_set():
            self._rebuilt.add(key)
            del self._references[key]
            return self._reference_build(key)
        return found

    def _measure_default(self, key: str) -> Measurement:
        build = self._reference_build(key)
        started = time.perf_counter()
        found = self._run_reference(key)
        elapsed = time.perf_counter() - started
        self.run_s += elapsed
        return replace(found, build_s=build.build_s, run_s=elapsed)

    def _timing(self, key: str) -> dict[str, Any]:
        options = self._options
        return {
            "repeats": options.repeats,
            "min_repeat_ms": options.min_repeat_ms,
            "slow_factor": options.slow_factor,
            "check": options.check,
            "cold_cache_bytes": self._cold_cache_bytes,
            "best_s": self._best_s.get(key),
        }

    def _request(self, message: tuple[Any, ...], timeout_s: float) -> Measurement:
        if self._closing.is_set():
            return Measurement(TrialStatus.CRASHED, message="the measurer was closed")
        try:
            if self._device.pid is None:
                self._device.request(("ping",), START_S)
            found = self._device.request(message, timeout_s)
            if found.status is TrialStatus.CRASHED:  # it lives, but its context on the GPU is lost
                self._device.kill()
            return found
        except WorkerTimeout as error:
            return Measurement(TrialStatus.RUN_TIMEOUT, message=str(error))
        except WorkerDied as error:
            return Measurement(TrialStatus.CRASHED, message=f"the device's worker was {error}")

    def add(self, tasks: Sequence[Task]) -> None:
        """More tasks that there may be candidates of."""
        self._tasks |= {task.key: task for task in tasks}

    def close(self) -> None:
        """End every process and delete the scratch folder."""
        self._closing.set()
        self._turn.shutdown(wait=False, cancel_futures=True)
        self._builders.close()
        self._device.kill()
        self._turn.shutdown(wait=True)
        self._device.kill()  # if the thread was just about to start it again
        self._watch.close()
        self._scratch.cleanup()


def _to_json(module: Any) -> str:
    import tvm

    return tvm.ir.save_json(module)
