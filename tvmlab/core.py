"""The words of the project as plain data: tasks, trials, statuses, rooflines, errors, and the two protocols.

Nothing here imports TVM, so results can be read, plotted and tested on a machine without it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median
from typing import Any, Protocol

__all__ = [
    "Candidate",
    "InputError",
    "Measurement",
    "Measurer",
    "MissingTool",
    "RecordError",
    "Roofline",
    "RunError",
    "Strategy",
    "TaskInfo",
    "Trial",
    "TrialStatus",
    "TvmlabError",
]


class TvmlabError(Exception):
    """Base of every error tvmlab raises on purpose. The message names the input and the remedy.

    >>> str(InputError("unknown model 'resnet5'", remedy="did you mean 'resnet50'?"))
    "unknown model 'resnet5': did you mean 'resnet50'?"
    """

    def __init__(self, problem: str, *, remedy: str) -> None:
        super().__init__(f"{problem}: {remedy}")
        self.problem = problem
        self.remedy = remedy


class InputError(TvmlabError, ValueError):
    """What the user passed (a model, a target, a knob, a file) cannot be used."""


class RecordError(TvmlabError):
    """A run folder cannot be read: foreign, damaged, or written by a newer tvmlab."""


class RunError(TvmlabError, RuntimeError):
    """A run cannot be started, attached to or continued."""


class MissingTool(TvmlabError, RuntimeError):
    """The machine lacks something that is needed: a compiler, a GPU, a driver, disk space."""


class TrialStatus(StrEnum):
    """How a trial ended. Failure is a name, never a made-up latency."""

    OK = "ok"
    BUILD_ERROR = "build_error"
    BUILD_TIMEOUT = "build_timeout"
    RUN_ERROR = "run_error"
    RUN_TIMEOUT = "run_timeout"
    CRASHED = "crashed"
    WRONG_RESULT = "wrong_result"
    OUT_OF_LIMITS = "out_of_limits"

    @property
    def remedy(self) -> str:
        """What a user can do about trials that end this way."""
        return _REMEDIES[self]


_REMEDIES = {
    TrialStatus.OK: "",
    TrialStatus.BUILD_ERROR: "TVM or the compiler refused the schedule; a few are normal, many mean a missing "
    "compiler (tvmlab doctor)",
    TrialStatus.BUILD_TIMEOUT: "raise measure.build_timeout_s",
    TrialStatus.RUN_ERROR: "the kernel raised an error; see log.txt in the run folder",
    TrialStatus.RUN_TIMEOUT: "raise measure.run_timeout_s",
    TrialStatus.CRASHED: "the kernel killed its worker, which was restarted; a few are normal",
    TrialStatus.WRONG_RESULT: "the schedule computes something else; it never counts, however fast",
    TrialStatus.OUT_OF_LIMITS: "the schedule needs more threads, registers or shared memory than the device has",
}


@dataclass(frozen=True)
class Roofline:
    """The measured limits of a device (Williams et al., "Roofline", CACM 2009).

    >>> Roofline(peak_gflops=100, bandwidth_gbs=10).latency_s(flops=2e9, bytes_moved=1e9)
    0.1
    """

    peak_gflops: float
    bandwidth_gbs: float

    def latency_s(self, flops: float, bytes_moved: float) -> float:
        """Shortest time, in seconds, in which the device can do this work."""
        return max(flops / (self.peak_gflops * 1e9), bytes_moved / (self.bandwidth_gbs * 1e9))


@dataclass(frozen=True)
class TaskInfo:
    """What is known of a task without TVM: this is what the run folder keeps of it (tasks.json).

    `key` is the structural hash of the fused operator (16 hex digits): the same work has the same key in every
    model and run. `kernel_class` is the sequence of fused operator types, never shapes or ordinals.
    """

    key: str
    name: str
    kernel_class: str
    weight: int
    flops: float
    bytes_moved: float
    tunable: bool
    shapes: str = ""

    @property
    def intensity(self) -> float:
        """Arithmetic intensity, FLOP per byte."""
        return self.flops / self.bytes_moved if self.bytes_moved else 0.0


@dataclass(frozen=True)
class Candidate:
    """One point of a task's space, not yet measured.

    `key` identifies the scheduled program (structural hash, stable across processes); `sketch` and `decisions`
    say which point it is; `payload` is the strategy's own handle (for TVM, the schedule) and is never stored.
    """

    task_key: str
    key: str
    sketch: int
    decisions: Sequence[Any]
    payload: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Trial:
    """A measured candidate, one line of trials.jsonl.

    `trial` counts from 1 over the whole run; 0 marks the default (unscheduled) kernel, measured once per task.
    `latencies_s` holds every repeat in seconds and is empty unless `status` is ok. `elapsed_s` is the tuning
    time of the run when the trial ended; `time_s` the wall clock (Unix time, seconds).
    """

    task_key: str
    step: int
    strategy: str
    trial: int
    key: str
    sketch: int
    decisions: Sequence[Any]
    status: TrialStatus
    latencies_s: Sequence[float] = ()
    build_s: float = 0.0
    run_s: float = 0.0
    elapsed_s: float = 0.0
    time_s: float = 0.0
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether the kernel ran and computed the right result."""
        return self.status is TrialStatus.OK

    @property
    def latency_s(self) -> float | None:
        """Median of the repeats in seconds; None for a failed trial."""
        return median(self.latencies_s) if self.ok else None


class Strategy(Protocol):
    """Proposes candidates of one task and is told their measurements; it never measures.

    `ask` changes nothing that another `ask` could see until `tell` answers it, and returns an empty list when the
    space is exhausted.
    """

    name: str

    def ask(self, count: int) -> list[Candidate]:
        """Up to `count` candidates, none of them told before."""
        ...

    def tell(self, candidates: Sequence[Candidate], trials: Sequence[Trial]) -> None:
        """Learn how the candidates did; `trials[i]` is the measurement of `candidates[i]`."""
        ...


@dataclass(frozen=True)
class Measurement:
    """What a measurer says of one candidate: a status, and the repeats when it ran."""

    status: TrialStatus
    latencies_s: tuple[float, ...] = ()
    build_s: float = 0.0
    run_s: float = 0.0
    message: str = ""


class Measurer(Protocol):
    """Builds and runs candidates. The local, RPC and replay measurers share this interface.

    `build_wait_s` and `run_s` are the seconds spent so far in waiting for builds and in running.
    """

    build_wait_s: float
    run_s: float

    def measure_defaults(self, task_keys: Sequence[str]) -> Generator[Measurement]:
        """Measure the unscheduled kernels, in order, and keep what they compute as the reference."""
        ...

    def measure(self, candidates: Sequence[Candidate]) -> Generator[Measurement]:
        """Start building at once; the iterator runs the candidates and gives one Measurement each, in order."""
        ...

    def close(self) -> None:
        """End every process this measurer started."""
        ...
