"""Time the kernels of a compiled model while it runs, and each of them alone.

TVM's virtual machine calls an instrument before every call and lets it skip the call. Ours makes the call itself, on
the arguments it was given, so that only one call from Python lies between the two readings of the clock; what that
costs is measured on the same arguments with a function that does nothing, and subtracted.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

from tvmlab.compat import load_meta_schedule, structural_key

__all__ = ["Kernels", "profile_machine"]

_RUN, _SKIP = 0, 1  # VMInstrumentReturnKind of TVM's include/tvm/runtime/vm/vm.h
_ALL_BIG_CORES = 1  # ThreadGroup::AffinityMode, the one TVM starts with
_ALONE_S = 0.004  # a kernel alone is repeated for about so long
_COLD_REPEATS = 7

_Function = Callable[..., Any]


class Kernels:
    """The TensorIR functions of a lowered model: the task of each, and which of its arguments are constants."""

    def __init__(self, lowered: Any, classes: dict[str, str]) -> None:
        from tvm import tirx

        load_meta_schedule()
        self.classes = classes
        self.keys = {
            variable.name_hint: _task_key(function)
            for variable, function in lowered.functions_items()
            if isinstance(function, tirx.PrimFunc)
        }
        self.constants = _constant_arguments(lowered)


def _task_key(function: Any) -> str:
    """The key under which tvmlab.tasks knows a function: extraction normalises it so."""
    from tvm.s_tir.meta_schedule.tune_context import _normalize_mod

    return structural_key(_normalize_mod(function))


def _constant_arguments(lowered: Any) -> dict[str, list[int]]:
    """Positions of the arguments that are constants in (the first of) a kernel's calls: weights, biases."""
    from tvm import relax
    from tvm.ir.expr import GenericConst

    found: dict[str, list[int]] = {}

    def visit(node: Any) -> None:
        if isinstance(node, relax.Call) and getattr(node.op, "name", "") == "relax.call_tir":
            arguments = enumerate(node.args[1])
            places = [place for place, item in arguments if isinstance(item, GenericConst)]
            found.setdefault(node.args[0].name_hint, places)

    relax.analysis.post_order_visit(lowered["main"], visit)
    return found


def profile_machine(
    machine: Any, infer: _Function, kernels: Kernels, device: Any, threads: int, repeats: int, *, alone: bool
) -> dict[str, Any]:
    """Run a model `repeats` times with the instrument and as often without, in turns; all times in seconds.

    `whole_s`, `instrumented_s`: samples of an inference without and with the instrument. `kernels`: one dict for each
    TensorIR function that ran, with name, task_key, kernel_class, shapes (of the arguments, outputs last), calls (an
    inference), `in_model_s` (for each inference the mean over its calls) and, with `alone`, hot_s, cold_s and
    one_thread_s (`_Alone`; None where not measured).
    """
    import tvm

    # TVM has no way to take an instrument off again; this one costs nothing to speak of.
    nothing = tvm.get_global_func("testing.nop")
    clock = _Clock(kernels, device.sync, nothing)
    infer()
    samples: dict[str, list[float]] = {"whole_s": [], "instrumented_s": []}
    for _ in range(repeats):
        samples["whole_s"].append(_timed(infer))
        machine.set_instrument(clock.instrument)
        clock.begin()
        samples["instrumented_s"].append(_timed(infer))
        machine.set_instrument(nothing)
    found = clock.rows(repeats)
    if alone:
        by_itself = _Alone(kernels, device, threads, nothing)
        machine.set_instrument(by_itself.instrument)
        infer()
        machine.set_instrument(nothing)
        for row in found:
            row.update(by_itself.found[row["name"]])
    return {**samples, "kernels": found}


def _timed(call: _Function, *arguments: Any) -> float:
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


class _Clock:
    """Reads the clock around each kernel of an inference."""

    def __init__(self, kernels: Kernels, sync: _Function, nothing: _Function) -> None:
        self._kernels = kernels
        self._sync = sync
        self._nothing = nothing
        self._elapsed: dict[str, list[list[float]]] = defaultdict(list)
        self._overhead: dict[str, list[float]] = defaultdict(list)
        self._shapes: dict[str, list[tuple[int, ...]]] = {}

    def begin(self) -> None:
        """A new inference."""
        for inferences in self._elapsed.values():
            inferences.append([])

    def instrument(self, function: Any, name: str, before: bool, _: Any, *arguments: Any) -> int:
        """Called by the virtual machine."""
        if not before or name not in self._kernels.keys:
            return _RUN
        if name not in self._shapes:
            self._shapes[name] = [tuple(map(int, argument.shape)) for argument in arguments]
            self._elapsed[name].append([])
        self._overhead[name].append(_timed(self._nothing, *arguments))
        self._sync()
        started = time.perf_counter()
        function(*arguments)
        self._sync()
        self._elapsed[name][-1].append(time.perf_counter() - started)
        return _SKIP

    def rows(self, repeats: int) -> list[dict[str, Any]]:
        """One dict a kernel."""
        return [
            {
                "name": name,
                "task_key": self._kernels.keys[name],
                "kernel_class": self._kernels.classes.get(name, name),
                "shapes": self._shapes[name],
                "calls": len(inferences[-1]),
                "in_model_s": [
                    max(sum(calls) / len(calls) - median(self._overhead[name]), 0.0) for calls in inferences[-repeats:]
                ],
            }
            for name, inferences in self._elapsed.items()
        ]


class _Alone:
    """At a kernel's first call in the model, times that kernel by itself on the very arguments, several times.

    `hot_s`: again and again, so that everything it reads is in the caches as far as it fits. `cold_s`: with its
    constants (weights, bias) flushed from all caches before each call; None without constants. `one_thread_s`: hot, on
    one thread. The last two are measured on CPUs only.
    """

    def __init__(self, kernels: Kernels, device: Any, threads: int, nothing: _Function) -> None:
        import tvm

        self._kernels = kernels
        self._device = device
        self._threads = threads
        self._nothing = nothing
        self._flush = tvm.get_global_func("cache_flush_cpu_non_first_arg")
        self._configure = tvm.get_global_func("runtime.config_threadpool")
        self._is_cpu = device.dlpack_device_type() == 1
        self.found: dict[str, dict[str, float | None]] = {}

    def instrument(self, function: Any, name: str, before: bool, _: Any, *arguments: Any) -> int:
        """Called by the virtual machine."""
        if before and name in self._kernels.keys and name not in self.found:
            self.found[name] = self._measure(function, name, arguments)
        return _RUN

    def _measure(self, function: _Function, name: str, arguments: tuple[Any, ...]) -> dict[str, float | None]:
        def run() -> None:
            function(*arguments)
            self._device.sync()

        run()
        count = min(max(int(_ALONE_S / max(_timed(run), 1e-6)), 5), 500)
        if not self._is_cpu:  # launched one after the other: waiting for each takes longer than most of them run
            return {"hot_s": self._queued(function, arguments, count), "cold_s": None, "one_thread_s": None}
        overhead = median(_timed(self._nothing, *arguments) for _ in range(9))
        found: dict[str, float | None] = {"hot_s": median(_timed(run) for _ in range(count)) - overhead}
        found["cold_s"] = None
        constants = [arguments[place] for place in self._kernels.constants.get(name, ())]
        if constants:
            found["cold_s"] = self._cold(run, arguments[-1], constants) - overhead
        self._configure(_ALL_BIG_CORES, 1)
        found["one_thread_s"] = median(_timed(run) for _ in range(count)) - overhead
        self._configure(_ALL_BIG_CORES, self._threads)
        return found

    def _queued(self, function: _Function, arguments: tuple[Any, ...], count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            function(*arguments)
        self._device.sync()
        return (time.perf_counter() - started) / count

    def _cold(self, run: _Function, kept: Any, constants: list[Any]) -> float:
        samples = []
        for _ in range(_COLD_REPEATS):
            self._flush(kept, *constants)  # it leaves its first argument alone
            samples.append(_timed(run))
        return median(samples)
