"""The parent's side of tvmlab.measure.whole_model: start such a process, ask it, raise what went wrong there."""

from __future__ import annotations

from typing import Any

from tvmlab import core
from tvmlab.core import InputError, RunError, TvmlabError
from tvmlab.hardware import read_cpu
from tvmlab.measure.process import WorkerDied, WorkerProcess, WorkerTimeout
from tvmlab.measure.whole_model import GRAPHED
from tvmlab.records import RunFolder
from tvmlab.targets import Target

__all__ = ["LOAD_S", "TURN_S", "ask", "load", "profiled", "recorded_target", "start_worker", "thread_count"]

LOAD_S = 1800.0  # compiling a large model with a slow schedule can take minutes
TURN_S = 600.0


def recorded_target(folder: RunFolder) -> Target:
    """The target of a run. Raises RunError if the run has none yet."""
    if not folder.environment:
        raise RunError(f"run {folder.id} has not begun", remedy="wait for its first trial")
    return Target.from_record(folder.environment["target"])


def thread_count(target: Target) -> int:
    """How many threads a runtime gets: the target's cores; beside a GPU all of the machine's, for those of the CPU."""
    return int(target.attrs.get("num-cores") or read_cpu().cores)


def start_worker(folder: RunFolder, target: Target, threads: int) -> WorkerProcess:
    """A process that can hold one whole model, with so many threads for any runtime; its output goes to log.txt.

    Start it from the thread that shall own it: it ends with that thread.
    """
    environment = {**target.worker_env(), "TVM_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    worker = WorkerProcess("tvmlab.measure.whole_model", [], folder.path / "log.txt", environment)
    worker.start()
    return worker


def ask(name: str, worker: WorkerProcess, message: tuple[Any, ...], timeout_s: float, *, loaded: bool = False) -> Any:
    """The answer of the runtime `name`; `loaded` says that it takes the model that its process has loaded.

    Raises RunError if its process failed, or the error of tvmlab's own that was raised there.
    """
    try:
        status, answer = worker.request(message, timeout_s, anew=not loaded)
    except (WorkerDied, WorkerTimeout) as error:
        raise RunError(f"{name} could not be run", remedy=f"its process {error}; see log.txt") from error
    if status == "ok":
        return answer
    if status == "error":
        raise RunError(f"{name} could not be run ({answer})", remedy="see log.txt in the run folder")
    kind: type[TvmlabError] = getattr(core, status)
    raise kind(answer["problem"], remedy=answer["remedy"])


def load(name: str, worker: WorkerProcess, runtime: str, folder: RunFolder, threads: int) -> tuple[Any, str]:
    """Have a process load the run's model in a runtime: its outputs, and what is to be known of how it runs.

    A compiled model whose CUDA graph fails is loaded once more without one, in a fresh process: an error of CUDA's may
    outlast its cause. Raises as `ask` does.
    """
    request = ("load", runtime, str(folder.path.resolve()), threads)
    try:
        return ask(name, worker, request, LOAD_S), ""
    except RunError as error:
        if runtime not in GRAPHED or recorded_target(folder).kind != "cuda":
            raise
        failed = error
    worker.kill()
    outputs = ask(name, worker, (*request, False), LOAD_S)
    return outputs, f"{name} ran without a CUDA graph, with which {failed.problem}"


def profiled(folder: RunFolder, runtime: str, repeats: int, threads: int | None, *, alone: bool = False) -> Any:
    """What a runtime's own profile says of the run's model (tvmlab.measure.instrument and .onnx_profile).

    It has a fresh process to itself. `threads` defaults to the target's cores.
    """
    if repeats < 3:
        raise InputError(f"repeats={repeats} gives no median worth its name", remedy="ask for 3 or more")
    target = recorded_target(folder)
    worker = start_worker(folder, target, threads or thread_count(target))
    try:
        load(runtime, worker, runtime, folder, threads or thread_count(target))
        return ask(runtime, worker, ("profile", repeats, alone), LOAD_S, loaded=True)
    finally:
        worker.kill()
