"""The words of the project as plain data: tasks, trials, statuses, rooflines, errors, and the two protocols.

Nothing here imports TVM, so results can be read, plotted and tested on a machine without it.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median
from typing import Any, Protocol

__all__ = [
    "ALGORITHMS",
    "DEFAULT_TIMEOUT_FACTOR",
    "IMPROVED",
    "Assignment",
    "Candidate",
    "EnumeratedSpace",
    "InputError",
    "Measurement",
    "Measurer",
    "MissingTool",
    "Packing",
    "RecordError",
    "Roofline",
    "RunError",
    "Strategy",
    "TaskInfo",
    "Trial",
    "TrialStatus",
    "TvmlabError",
    "on_one_clock",
    "standing",
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
    TrialStatus.BUILD_TIMEOUT: "raise measure.build_timeout_s (AutoTVM's logs call this error code 6)",
    TrialStatus.RUN_ERROR: "the kernel raised an error; see log.txt in the run folder",
    TrialStatus.RUN_TIMEOUT: "raise measure.run_timeout_s",
    TrialStatus.CRASHED: "the kernel killed its worker, which was restarted; a few are normal",
    TrialStatus.WRONG_RESULT: "the schedule computes something else; it never counts, however fast",
    TrialStatus.OUT_OF_LIMITS: "the schedule needs more threads, registers or shared memory than the device has; where "
    "every trial ends so, something else fills its memory (nvidia-smi)",
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
    A candidate with a `rival` is timed in turns with it, so that the two can be told apart.
    """

    task_key: str
    key: str
    sketch: int
    decisions: Sequence[Any]
    payload: Any = field(default=None, compare=False, repr=False)
    rival: Candidate | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Trial:
    """A measured candidate, one line of trials.jsonl.

    `trial` counts from 1 over the whole run; 0 marks the default (unscheduled) kernel, measured once per task.
    `latencies_s` holds every repeat in seconds and is empty unless `status` is ok. `elapsed_s` is the tuning
    time of the run when the trial ended; `time_s` the wall clock (Unix time, seconds). Where the candidate was timed
    in turns with another, `rival` is the other's key and `rival_latencies_s[i]` its latency beside `latencies_s[i]`;
    `reference_s` is the rival's latency as the run had it before (0: not known), to put the pairs on one clock. `shown`
    is False if the pairs do not show that it is faster than its rival: then it does not count as faster.
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
    rival: str = ""
    rival_latencies_s: Sequence[float] = ()
    reference_s: float = 0.0
    shown: bool = True

    @property
    def ok(self) -> bool:
        """Whether the kernel ran and computed the right result."""
        return self.status is TrialStatus.OK

    @property
    def latency_s(self) -> float | None:
        """Median of the samples in seconds; None for a failed trial."""
        return median(self.samples_s) if self.ok else None

    @property
    def samples_s(self) -> Sequence[float]:
        """The repeats in seconds; beside a rival as `on_one_clock` has them."""
        if not self.reference_s:
            return self.latencies_s
        return on_one_clock(self.latencies_s, self.rival_latencies_s, self.reference_s, self.shown)


def standing(trials: Sequence[Trial]) -> list[Trial]:
    """The trials whose reading stands, in order: where a step measured a program again, the later reading counts.

    A descent does so with what looked faster than its incumbent: if that does not show, the first reading was luck.
    """
    last = {(trial.task_key, trial.step, trial.key): trial for trial in trials if trial.ok}
    return [trial for trial in trials if not trial.ok or last[trial.task_key, trial.step, trial.key] is trial]


def on_one_clock(
    latencies_s: Sequence[float], rival_latencies_s: Sequence[float], reference_s: float, shown: bool = True
) -> list[float]:
    """What a candidate's repeats would have been when its rival took `reference_s`: each pair's ratio times that.

    A machine that is 10 % slower than it was slows both of a pair: only the ratio is kept, so that the latencies of a
    descent can be compared with each other and with what the search before it measured. Of a hundred candidates one
    looks fastest by luck: what was not `shown` to be faster than its rival has its repeats raised until their median
    is the rival's latency and a millionth, so that it ranks behind that.

    >>> on_one_clock([1.1, 2.2], [2.2, 4.4], 2.0), on_one_clock([1.1, 2.2], [2.2, 4.4], 2.0, shown=False)
    ([1.0, 1.0], [2.000002, 2.000002])
    """
    found = [reference_s * ours / theirs for ours, theirs in zip(latencies_s, rival_latencies_s, strict=True)]
    raised = 1.0 if shown else max(1.0, _BEHIND * reference_s / median(found))
    return [raised * latency_s for latency_s in found]


_BEHIND = 1 + 1e-6  # ranks what is not shown to be faster behind its rival
DEFAULT_TIMEOUT_FACTOR = 15  # an unscheduled kernel is up to this much slower than a user expects of a candidate
IMPROVED = 0.999  # of the best latency: a fall by less is noise, and not what a search goes on for

ALGORITHMS = ("direct", "winograd2", "winograd4")


@dataclass(frozen=True, order=True)
class Packing:
    """How one convolution is computed: its layout NCHW[x]c, and its algorithm.

    `block` is the number x of channels in the innermost axis, 0 for plain NCHW. `algorithm` is one of ALGORITHMS:
    winograd2 and winograd4 are F(2x2, 3x3) and F(4x4, 3x3). A dense layer's block is of its output features.
    Raises InputError for a combination that does not exist.

    >>> str(Packing(16, "winograd4")), str(Packing(8)), str(Packing())
    ('NCHW16c winograd4', 'NCHW8c', 'NCHW')
    """

    block: int = 0
    algorithm: str = "direct"

    def __post_init__(self) -> None:
        if self.block < 0 or self.algorithm not in ALGORITHMS:
            raise InputError(
                f"there is no packing of block {self.block}, {self.algorithm!r}",
                remedy=f"use a block of at least 0 and one of {', '.join(ALGORITHMS)}",
            )
        if not self.block and self.algorithm != "direct":
            raise InputError(f"{self.algorithm} needs packed channels", remedy="use a block of 8, 16 or 32, say")

    def __str__(self) -> str:
        layout = f"NCHW{self.block}c" if self.block else "NCHW"
        return layout if self.algorithm == "direct" else f"{layout} {self.algorithm}"

    @classmethod
    def parse(cls, text: str) -> Packing:
        """The packing of a text. Raises InputError for any other text.

        >>> Packing.parse("NCHW16c winograd4")
        Packing(block=16, algorithm='winograd4')
        """
        match = re.fullmatch(r"NCHW(?:([1-9]\d*)c)?(?: (\w+))?", text.strip())
        if not match:
            raise InputError(f"{text!r} is not a packing", remedy="write 'NCHW', 'NCHW16c' or 'NCHW16c winograd4'")
        return cls(int(match[1] or 0), match[2] or "direct")


Assignment = dict[str, Packing]  # the packing of each convolution and dense layer, by the name of its site


class EnumeratedSpace(Protocol):
    """A space whose points are numbered: the values of a few knobs, in every combination.

    `radices[k]` is the number of values of knob k. The index of a point is its mixed-radix number, the first knob
    changing fastest. A space may have 10 points or 10^9, and not all of them need be valid.
    """

    task_key: str
    radices: tuple[int, ...]

    def __len__(self) -> int:
        """The product of the radices."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The values of the knobs at a point."""
        ...

    def realize(self, index: int) -> Candidate | None:
        """The candidate at a point, with `decisions == [index]`; None where the point is not valid."""
        ...

    def encode(self, index: int) -> Any:
        """The point as a float32 vector, of the same length for all points."""
        ...

    def starts(self) -> Sequence[int]:
        """The points worth trying first, the best guess first; may be empty."""
        ...


class Strategy(Protocol):
    """Proposes candidates of one task and is told their measurements; it never measures.

    `ask` may be called again before the candidates of the last one are told. An empty list means that the space is
    exhausted, or, before those are told, that there is nothing to ask until they are.
    """

    name: str

    def ask(self, count: int) -> list[Candidate]:
        """Up to `count` candidates, none of them asked for before."""
        ...

    def tell(self, candidates: Sequence[Candidate], trials: Sequence[Trial]) -> None:
        """Learn how the candidates did; `trials[i]` is the measurement of `candidates[i]`."""
        ...


@dataclass(frozen=True)
class Measurement:
    """What a measurer says of one candidate: a status, and the repeats when it ran; its rival's beside them."""

    status: TrialStatus
    latencies_s: tuple[float, ...] = ()
    build_s: float = 0.0
    run_s: float = 0.0
    message: str = ""
    rival_latencies_s: tuple[float, ...] = ()


class Measurer(Protocol):
    """Builds and runs candidates. The local and replay measurers share this interface.

    `build_wait_s` and `run_s` are the seconds spent so far in waiting for builds and in running. One that `overlaps`
    builds candidates while others run, and runs them in the background: more can be given to it before the last are
    asked for.
    """

    overlaps: bool
    build_wait_s: float
    run_s: float

    def measure_defaults(self, task_keys: Sequence[str]) -> Generator[Measurement]:
        """Measure the unscheduled kernels, in order, and keep what they compute as the reference."""
        ...

    def measure(self, candidates: Sequence[Candidate]) -> Generator[Measurement]:
        """Start building at once; the iterator runs the candidates and gives one Measurement each, in order."""
        ...

    def add(self, tasks: Sequence[Any]) -> None:
        """More tasks (tvmlab.tasks.Task) that there may be candidates of."""
        ...

    def close(self) -> None:
        """End every process this measurer started."""
        ...
