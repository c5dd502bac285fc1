"""The process that owns a device: holds a task's inputs and reference result, runs candidates, checks and times them.

It is alone on the device. Whatever a candidate does to it (a crash, a hang, an illegal access) ends this process,
not the run.
"""

from __future__ import annotations

import math
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvmlab.compat import brief, hide_torch
from tvmlab.core import Measurement, TrialStatus
from tvmlab.measure.check import difference, make_input
from tvmlab.measure.cold import ColdArguments
from tvmlab.measure.process import serve
from tvmlab.stats import LEAD, turn_ratio

_CACHE_BYTES = 3 << 30
_EVICT = "cache_flush_cpu_non_first_arg"  # TVM's: flushes each cache line of the arguments, so from all cores' caches
_FLUSH_BYTES = 1 << 14  # so much is flushed while the kernel's threads still wait; of larger weights, copies take turns
_COLD_FACTOR = 4  # single calls scatter: so many more of them, of kernels that would be looped
_SLOW_DEFAULT_S = 0.05  # nobody needs to know such a kernel's latency well, and a layout step has a hundred of them
_ONCE_S = 1.0  # a kernel slower than this is not run again
_BEHIND = 0.1  # of the way from the best to `slow_factor`: a kernel slower than that gets a few repeats only
_TURNS_S = 4.0  # what all turns of a candidate and its rival may take
_LEADER_FACTOR = 3  # so many times the turns for a candidate that leads
_LEADER_S = 20.0  # what all its turns may take: five of kernels of two seconds, so that chance can be excluded
_IDLE_S = 0.5  # a GPU that had nothing to do for longer may have lowered its clocks
_WAKE_S = 0.05  # and needs about so long to raise them: tvmlab.compare gives it as much
_CALL_S = 1e-4  # what calling a kernel from Python may cost beside running it


class _Task:
    """A task's arguments on the device, which of them the kernel writes, and what it must write there."""

    def __init__(self, key: str, arguments: Sequence[tuple[Sequence[int], str]], device: Any) -> None:
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
        self.cold = ColdArguments(self.tensors, self.host, list(self.reference))

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


@dataclass(frozen=True)
class _Rival:
    """A kernel that candidates of a task are timed in turns with: loaded, checked, and run once to be warm."""

    library: str
    kernel: Any
    single_s: float


class Device:
    """Answers the requests of one LocalMeasurer. `name` is cpu, or cuda:0."""

    def __init__(self, name: str) -> None:
        import tvm

        kind, _, index = name.partition(":")
        self._device = tvm.device(kind, int(index or 0))
        self._kind = kind
        self._tasks: OrderedDict[str, _Task] = OrderedDict()
        self._rivals: dict[str, _Rival] = {}
        self._used_s = -math.inf
        self._was_idle = True

    def answer(self, message: tuple[Any, ...]) -> Any:
        """Dispatch a request to the method it names; its errors become a failed measurement."""
        name, *arguments = message
        self._was_idle = time.perf_counter() - self._used_s > _IDLE_S
        try:
            return getattr(self, f"do_{name}")(*arguments)
        except Exception as error:  # noqa: BLE001  whatever the kernel raises is this candidate's failure
            text = str(error).strip()
            limit = any(word in text for word in ("OUT_OF_RESOURCES", "OUT_OF_MEMORY", "out of memory"))
            status = TrialStatus.OUT_OF_LIMITS if limit else TrialStatus.RUN_ERROR
            status = TrialStatus.CRASHED if self._is_lost() else status
            return Measurement(status, message=brief(text) or type(error).__name__)
        finally:
            if name in ("default", "rival", "measure"):
                self._used_s = time.perf_counter()

    def _is_lost(self) -> bool:
        """Whether nothing runs on the device any more: after an illegal access every call of CUDA's fails.

        CUDA C++ Programming Guide, "Error Handling": such an error stays until the process ends.
        """
        if self._kind != "cuda":
            return False
        try:
            self._device.sync()
        except Exception:  # noqa: BLE001  whatever TVM makes of CUDA's error
            return True
        return False

    def do_ping(self) -> str:
        """Answered once TVM is loaded."""
        return "ok"

    def do_has(self, key: str) -> bool:
        """Whether the task's inputs and reference are still in memory."""
        return key in self._tasks

    def do_default(
        self, key: str, arguments: list[tuple[list[int], str]], library: str, options: dict[str, Any]
    ) -> Measurement:
        """Run the unscheduled kernel: keep what it computes as the reference, and time it."""
        task = _Task(key, arguments, self._device)
        kernel = self._load(library)
        elapsed = self._run_once(kernel, task.tensors)
        task.find_outputs()
        self._tasks[key] = task
        self._evict()
        if self._kind == "cuda" and elapsed > _SLOW_DEFAULT_S:  # the first launch of a process also loads the program
            elapsed = self._run_once(kernel, task.tensors)
        elapsed = self._awake(kernel, task, elapsed)
        latencies = [elapsed] if elapsed > _SLOW_DEFAULT_S else self._time(kernel, task, elapsed, options)
        return Measurement(TrialStatus.OK, tuple(latencies))

    def do_rival(self, key: str, library: str, options: dict[str, Any]) -> Measurement:
        """Load what candidates of the task will be timed in turns with; one a task is kept. Run and check it."""
        task = self._tasks[key]
        kernel = self._load(library)
        elapsed, problem = self._try(kernel, task, options)
        if problem:
            return Measurement(TrialStatus.WRONG_RESULT, message=problem)
        elapsed = self._awake(kernel, task, elapsed)
        self._rivals[key] = _Rival(library, kernel, self._single(kernel, task, elapsed, options))
        return Measurement(TrialStatus.OK)

    def do_measure(self, key: str, library: str, options: dict[str, Any], rival: str = "") -> Measurement:
        """Run a candidate once and compare, then time it; in turns with the loaded rival of that path, if named."""
        task = self._tasks[key]
        self._tasks.move_to_end(key)
        kernel = self._load(library)
        elapsed, problem = self._try(kernel, task, options)
        if problem:
            return Measurement(TrialStatus.WRONG_RESULT, message=problem)
        elapsed = self._awake(kernel, task, elapsed)
        other = self._rivals.get(key)
        if rival and other is not None and other.library == rival:
            ours, theirs = self._take_turns(kernel, other, task, elapsed, options)
            return Measurement(TrialStatus.OK, tuple(ours), rival_latencies_s=tuple(theirs))
        return Measurement(TrialStatus.OK, tuple(self._time(kernel, task, elapsed, options)))

    def _load(self, library: str) -> Any:
        import tvm

        return tvm.runtime.load_module(library)

    def _run_once(self, kernel: Any, tensors: Sequence[Any]) -> float:
        main = kernel["main"]
        started = time.perf_counter()
        main(*tensors)
        self._device.sync()
        return time.perf_counter() - started

    def _try(self, kernel: Any, task: _Task, options: dict[str, Any]) -> tuple[float, str]:
        """Run a kernel for the first time: the seconds it took, and what is wrong with its result."""
        if not options["check"]:
            return self._run_once(kernel, task.tensors), ""
        task.clear_outputs()
        elapsed = self._run_once(kernel, task.tensors)
        problem = task.problem()
        if problem:
            task.restore()
        return elapsed, problem

    def _awake(self, kernel: Any, task: _Task, first_s: float) -> float:
        """Seconds of one call once an idle GPU has raised its clocks; `first_s` on a CPU, or if the GPU was not idle.

        A kernel that is slower than a second is not run again, and wakes the GPU by itself.
        """
        if self._kind != "cuda" or not self._was_idle or first_s > _ONCE_S:
            return first_s
        deadline = time.perf_counter() + _WAKE_S
        while time.perf_counter() < deadline:
            first_s = self._run_once(kernel, task.tensors)
        return first_s

    def _single(self, kernel: Any, task: _Task, first_s: float, options: dict[str, Any]) -> float:
        """Seconds of one call. The first also paged in code and data; of a short kernel that may be most of it."""
        if _limit_s(options) < first_s <= _ONCE_S:
            first_s = self._run_once(kernel, task.tensors)
        if first_s < min(_limit_s(options), options["min_repeat_ms"] / 4e3):
            (first_s,) = self._timed(kernel, task.tensors, 3, 1)
        return first_s

    def _time(self, kernel: Any, task: _Task, first_s: float, options: dict[str, Any]) -> list[float]:
        """All repeats, seconds. A kernel far behind the best is run once more only, one slower than a second never.

        One that is behind after a few repeats is not given the others: they would not make it the best.
        """
        single_s = self._single(kernel, task, first_s, options)
        if single_s > _limit_s(options):
            return [single_s]
        number, repeats = _loops(single_s, options)
        few = repeats if options["best_s"] is None else max(2, repeats // 4)
        found = self._samples(kernel, task, number, few, options)
        if few < repeats and not _is_behind(min(found), options):
            found += self._samples(kernel, task, number, repeats - few, options)
        return found

    def _take_turns(
        self, kernel: Any, rival: _Rival, task: _Task, first_s: float, options: dict[str, Any]
    ) -> tuple[list[float], list[float]]:
        """Latencies of a candidate and of its rival, seconds, a pair a turn; who begins alternates (a b, b a, ...).

        After the repeats, a candidate that leads gets twice as many more, for a paired test to decide by. One
        far behind has a single turn, unless the rival is slower in that: then one of the two was interrupted.
        """
        single_s = self._single(kernel, task, first_s, options)
        if single_s > min(_limit_s(options), options["slow_factor"] * rival.single_s + _CALL_S):
            theirs_s = self._single(rival.kernel, task, self._run_once(rival.kernel, task.tensors), options)
            if single_s > theirs_s:
                return [single_s], [theirs_s]
        number, repeats = _loops(min(single_s, rival.single_s), options)
        turn_s = number * (single_s + rival.single_s)
        begun = min(repeats, max(1, int(_TURNS_S / turn_s)))
        found = self._turns(kernel, rival.kernel, task, number, range(begun), options)
        if turn_ratio(*found) < LEAD:
            turns = range(begun, min(_LEADER_FACTOR * repeats, int(_LEADER_S / turn_s)))
            more = self._turns(kernel, rival.kernel, task, number, turns, options)
            found = found[0] + more[0], found[1] + more[1]
        return found

    def _turns(
        self, kernel: Any, rival: Any, task: _Task, number: int, turns: range, options: dict[str, Any]
    ) -> tuple[list[float], list[float]]:
        """A pair a turn, seconds a call; in even ones the candidate begins."""
        found: tuple[list[float], list[float]] = ([], [])
        for turn in turns:
            for who in (0, 1) if turn % 2 == 0 else (1, 0):
                found[who].extend(self._samples((kernel, rival)[who], task, number, 1, options))
        return found

    def _samples(
        self,
        kernel: Any,
        task: _Task,
        number: int,
        repeats: int,
        options: dict[str, Any],
    ) -> list[float]:
        """So many repeats of `number` calls each, seconds a call; of single calls with cold weights, if asked for."""
        if not options["cold_cache_bytes"]:
            return self._timed(kernel, task.tensors, number, repeats)
        if task.cold.weight_bytes <= _FLUSH_BYTES:
            return self._timed(kernel, task.tensors, 1, repeats, _EVICT)
        task.bytes += task.cold.copy(options["cold_cache_bytes"], self._device)
        self._evict()
        return [self._run_once(kernel, task.cold.turn()) for _ in range(repeats)]

    def _timed(self, kernel: Any, tensors: Sequence[Any], number: int, repeats: int, before: str = "") -> list[float]:
        timer = kernel.time_evaluator("main", self._device, number=number, repeat=repeats, f_preproc=before)
        return [float(value) for value in timer(*tensors).results]

    def _evict(self) -> None:
        while len(self._tasks) > 1 and sum(task.bytes for task in self._tasks.values()) > _CACHE_BYTES:
            self._tasks.popitem(last=False)


def _limit_s(options: dict[str, Any]) -> float:
    """A kernel slower than this is timed once only."""
    best_s = options["best_s"]
    return _ONCE_S if best_s is None else min(_ONCE_S, options["slow_factor"] * best_s + _CALL_S)


def _is_behind(single_s: float, options: dict[str, Any]) -> bool:
    """Whether a candidate is so far behind the best (1.3 times for a `slow_factor` of 4) that it gets few repeats."""
    return bool(single_s > (1 + _BEHIND * (options["slow_factor"] - 1)) * options["best_s"])


def _loops(single_s: float, options: dict[str, Any]) -> tuple[int, int]:
    """How many calls a repeat has, and how many repeats there are."""
    number = max(1, math.ceil(options["min_repeat_ms"] / 1e3 / max(single_s, 1e-8)))
    if options["cold_cache_bytes"]:  # only a single call is cold, so a short kernel is repeated instead of looped
        return 1, options["repeats"] * min(number, _COLD_FACTOR)
    return number, options["repeats"]


def planned_s(options: dict[str, Any], *, in_turns: bool = False) -> float:
    """Seconds that timing a kernel takes by plan at the most; in turns with a rival, those of both.

    Where no kernel of the task was timed yet in this session, its turns may be of any length.
    """
    if in_turns and options["best_s"] is None:
        return _LEADER_S
    repeat_s = options["min_repeat_ms"] / 1e3 + (options["best_s"] or 0.0)  # the last call may begin as that is over
    if not in_turns:
        return float(options["repeats"] * repeat_s)
    return float(max(2 * repeat_s, min(_LEADER_S, 2 * _LEADER_FACTOR * options["repeats"] * repeat_s)))


def main(device: str, file_descriptor: int) -> None:
    """Serve until the parent is gone."""
    serve(file_descriptor, Device(device).answer)


if __name__ == "__main__":
    hide_torch()
    main(sys.argv[1], int(sys.argv[2]))
