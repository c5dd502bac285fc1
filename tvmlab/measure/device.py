"""The process that owns a device: holds a task's inputs and reference result, runs candidates, checks and times them.

It is alone on the device. Whatever a candidate does to it (a crash, a hang, an illegal access) ends this process,
not the run.
"""

from __future__ import annotations

import math
import sys
import time
from collections import OrderedDict
from typing import Any

import numpy as np

from tvmlab.compat import hide_torch
from tvmlab.core import TrialStatus
from tvmlab.measure.check import difference, make_input
from tvmlab.measure.process import serve

_CACHE_BYTES = 3 << 30
_EVICT = "cache_flush_cpu_non_first_arg"  # TVM's: flushes each cache line of the arguments, so from all cores' caches
_COLD_FACTOR = 4  # single calls scatter: so many more of them, of kernels that would be looped
_SLOW_DEFAULT_S = 0.05  # nobody needs to know such a kernel's latency well, and a layout step has a hundred of them
_CALL_S = 1e-4  # what calling a kernel from Python may cost beside running it


class _Task:
    """A task's arguments on the device, which of them the kernel writes, and what it must write there."""

    def __init__(self, key: str, arguments: list[tuple[list[int], str]], device: Any) -> None:
        import tvm

        host = [make_input(key, index, shape, dtype) for index, (shape, dtype) in enumerate(arguments)]
        self.tensors = [tvm.runtime.tensor(array, device) for array in host]
        self.bytes = sum(array.nbytes for array in host)
        self.host = host
        self.reference: dict[int, Any] = {}

    def find_outputs(self) -> None:
        """After the unscheduled kernel ran: the arguments it changed are its outputs, their values the reference."""
        after = [tensor.numpy() for tensor in self.tensors]
        changed = [i for i, (a, b) in enumerate(zip(after, self.host, strict=True)) if not np.array_equal(a, b)]
        # A kernel may write what was there already (a copy of zeros): then its last argument is the output.
        self.reference = {index: after[index] for index in changed or [len(after) - 1]}

    def clear_outputs(self) -> None:
        """Overwrite the outputs, so that an element a candidate does not write is seen."""
        for index, reference in self.reference.items():
            filler = np.nan if reference.dtype.kind == "f" or reference.dtype.name == "bfloat16" else 1
            blank = np.full_like(reference, filler) if filler != 1 else ~reference
            self.tensors[index].copyfrom(blank)

    def restore(self) -> None:
        """Write the inputs again: a wrong kernel may have written into them."""
        for tensor, array in zip(self.tensors, self.host, strict=True):
            tensor.copyfrom(array)

    def problem(self) -> str:
        """What is wrong with the outputs now; empty if nothing is."""
        for index, reference in self.reference.items():
            found = difference(self.tensors[index].numpy(), reference)
            if found:
                return found
        return ""


class Device:
    """Answers the requests of one LocalMeasurer. `name` is cpu, or cuda:0."""

    def __init__(self, name: str) -> None:
        import tvm

        from tvmlab.compat import load_meta_schedule

        kind, _, index = name.partition(":")
        load_meta_schedule(kind)
        self._device = tvm.device(kind, int(index or 0))
        self._tasks: OrderedDict[str, _Task] = OrderedDict()

    def answer(self, message: tuple[Any, ...]) -> Any:
        """Dispatch a request to the method it names; its errors become a failed measurement."""
        name, *arguments = message
        try:
            return getattr(self, f"do_{name}")(*arguments)
        except Exception as error:  # noqa: BLE001  whatever the kernel raises is this candidate's failure
            text = str(error).strip()
            limit = any(word in text for word in ("OUT_OF_RESOURCES", "OUT_OF_MEMORY", "out of memory"))
            status = TrialStatus.OUT_OF_LIMITS if limit else TrialStatus.RUN_ERROR
            return status.value, [], text.splitlines()[-1][:300] if text else type(error).__name__

    def do_ping(self) -> str:
        """Answered once TVM is loaded."""
        return "ok"

    def do_has(self, key: str) -> bool:
        """Whether the task's inputs and reference are still in memory."""
        return key in self._tasks

    def do_default(
        self, key: str, arguments: list[tuple[list[int], str]], library: str, options: dict[str, Any]
    ) -> tuple[str, list[float], str]:
        """Run the unscheduled kernel: keep what it computes as the reference, and time it."""
        task = _Task(key, arguments, self._device)
        kernel = self._load(library)
        elapsed = self._run_once(kernel, task)
        task.find_outputs()
        self._tasks[key] = task
        self._evict()
        latencies = [elapsed] if elapsed > _SLOW_DEFAULT_S else self._time(kernel, task, elapsed, options)
        return TrialStatus.OK.value, latencies, ""

    def do_measure(self, key: str, library: str, options: dict[str, Any]) -> tuple[str, list[float], str]:
        """Run a candidate once and compare, then time it."""
        task = self._tasks[key]
        self._tasks.move_to_end(key)
        kernel = self._load(library)
        if options["check"]:
            task.clear_outputs()
        elapsed = self._run_once(kernel, task)
        if options["check"] and (problem := task.problem()):
            task.restore()
            return TrialStatus.WRONG_RESULT.value, [], problem
        return TrialStatus.OK.value, self._time(kernel, task, elapsed, options), ""

    def _load(self, library: str) -> Any:
        import tvm

        return tvm.runtime.load_module(library)

    def _run_once(self, kernel: Any, task: _Task) -> float:
        started = time.perf_counter()
        kernel["main"](*task.tensors)
        self._device.sync()
        return time.perf_counter() - started

    def _time(self, kernel: Any, task: _Task, first_s: float, options: dict[str, Any]) -> list[float]:
        """All repeats, seconds. A kernel far behind the best is run once more only, one slower than a second never."""
        if first_s > 1.0:
            return [first_s]
        limit_s = math.inf
        if options["best_s"] is not None:
            limit_s = options["slow_factor"] * options["best_s"] + _CALL_S
        if first_s > limit_s:
            first_s = self._run_once(kernel, task)  # the first run paged in code and data
            if first_s > limit_s:
                return [first_s]
        if first_s < options["min_repeat_ms"] / 4e3:
            # The first run also paged the code in; of a short kernel that may be most of it.
            evaluator = kernel.time_evaluator("main", self._device, number=3, repeat=1)
            first_s = float(evaluator(*task.tensors).results[0])
        number = max(1, math.ceil(options["min_repeat_ms"] / 1e3 / max(first_s, 1e-8)))
        repeats, evict = options["repeats"], ""
        if options["cold_weights"]:  # only a call's first run is cold, so a short kernel is repeated instead of looped
            number, repeats, evict = 1, repeats * min(number, _COLD_FACTOR), _EVICT
        evaluator = kernel.time_evaluator("main", self._device, number=number, repeat=repeats, f_preproc=evict)
        return [float(value) for value in evaluator(*task.tensors).results]

    def _evict(self) -> None:
        while len(self._tasks) > 1 and sum(task.bytes for task in self._tasks.values()) > _CACHE_BYTES:
            self._tasks.popitem(last=False)


def main(device: str, file_descriptor: int) -> None:
    """Serve until the parent is gone."""
    serve(file_descriptor, Device(device).answer)


if __name__ == "__main__":
    hide_torch()
    main(sys.argv[1], int(sys.argv[2]))
