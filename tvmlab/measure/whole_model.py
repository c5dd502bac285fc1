"""A process that holds one whole model in one runtime and times it on request. Used by tvmlab.compare.

Each runtime lives in a process of its own, so that their thread pools do not share one; they take turns.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tvmlab.measure.process import end_with_parent_thread, serve
from tvmlab.models import Model, load_model
from tvmlab.records import RunFolder
from tvmlab.targets import target as named_target

_Run = Callable[[], list[Any]]


class Subject:
    """One runtime with one model: `load` it once, then `time` it as often as wanted."""

    def __init__(self) -> None:
        self._run: _Run | None = None

    def answer(self, message: tuple[Any, ...]) -> Any:
        """Dispatch a request; an error comes back as ("error", text)."""
        try:
            return getattr(self, f"do_{message[0]}")(*message[1:])
        except Exception as error:  # noqa: BLE001  reported by the parent, which names the runtime
            return (
                "error",
                f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:300] if str(error) else ''}",
            )

    def do_load(self, name: str, folder: str, threads: int) -> tuple[str, list[Any]]:
        """Prepare a runtime by name; returns the outputs for the run's seeded inputs."""
        run = RunFolder.open(folder)
        asked = run.experiment
        model = load_model(asked.model, batch=asked.batch, seed=asked.seed, dims=asked.dims)
        self._run = _RUNTIMES[name](model, run, threads)
        return "ok", self._run()

    def do_time(self, count: int) -> tuple[str, list[float]]:
        """Seconds of each of `count` inferences, after one that does not count."""
        assert self._run is not None
        self._run()
        samples = []
        for _ in range(count):
            started = time.perf_counter()
            self._run()
            samples.append(time.perf_counter() - started)
        return "ok", samples


def _tvm(model: Model, run: RunFolder, *, tuned: bool) -> _Run:
    import tvm
    from tvm import relax

    from tvmlab.compat import read_database
    from tvmlab.tasks import compile_model, lower

    target = named_target(run.experiment.target)
    database = read_database(run.path, target.kind) if tuned else None
    executable = compile_model(lower(model, target)[0], target, database)
    kind, _, index = str(target.device).partition(":")
    device = tvm.device(kind, int(index or 0))
    machine = relax.VirtualMachine(executable, device)
    inputs = [tvm.runtime.tensor(array, device) for array in model.inputs_for(run.experiment.seed).values()]

    def infer() -> list[Any]:
        result = machine["main"](*inputs)
        device.sync()
        return [result] if hasattr(result, "numpy") else list(result)

    return lambda: [np.asarray(output.numpy()) for output in infer()]


def _onnxruntime(model: Model, run: RunFolder, threads: int) -> _Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.original.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    inputs = model.inputs_for(run.experiment.seed)
    return lambda: session.run(None, inputs)


# How each subject of a comparison is made. A new baseline is one function and one row.
_RUNTIMES: dict[str, Callable[[Model, RunFolder, int], _Run]] = {
    "tvmlab": lambda model, run, _: _tvm(model, run, tuned=True),
    "untuned": lambda model, run, _: _tvm(model, run, tuned=False),
    "onnxruntime": _onnxruntime,
}
BASELINES = tuple(name for name in _RUNTIMES if name != "tvmlab")

if __name__ == "__main__":
    end_with_parent_thread()
    serve(int(sys.argv[1]), Subject().answer)
