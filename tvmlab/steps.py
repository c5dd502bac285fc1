"""The steps of an experiment: every knob's name, default, range, unit and help text, defined once."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator

from tvmlab.core import ALGORITHMS
from tvmlab.options import Options, knob
from tvmlab.steps_selective import Selective

__all__ = ["STEPS", "Ansor", "AutoTVM", "Droplet", "LayoutTuning", "Repeat", "Selective", "Step", "TransferTuning"]


# Knobs that every step with a search has


def _early_stopping(default: int) -> Any:
    return knob(default, "Stop a task after so many trials without an improvement", unit="trials", ge=1, le=100_000)


def _max_trials() -> Any:
    return knob(None, "Cap on the trials of the whole step; empty for none", unit="trials", ge=1, le=100_000_000)


def _batch_size() -> Any:
    return knob(
        None,
        "Trials measured between two updates of what guides the search; empty to fit it to the budget",
        unit="trials",
        ge=1,
        le=1024,
    )


def _warm_start() -> Any:
    return Field(
        (), description="Earlier runs (folders or ids) whose records of the same task and target are used first"
    )


def _capped(total: int, cap: int | None) -> int:
    return total if cap is None else min(total, cap)


class Ansor(Options):
    """Search TVM's generated sketch space with evolution and a learned cost model (Zheng et al., OSDI 2020).

    TVM removed its `auto_scheduler` module in 0.20; this step runs that design on what is left of it in TVM,
    `tvm.s_tir.meta_schedule`. The total budget is `trials_per_kernel` times the number of tunable tasks, spread
    over the tasks where the model estimate is expected to fall most.

    >>> Ansor(trials_per_kernel=64).trials_per_kernel
    64
    """

    kind: Literal["ansor"] = "ansor"
    trials_per_kernel: int = knob(
        1000,
        "Trials per task on average; the total is this times the number of tunable tasks",
        unit="trials",
        ge=1,
        le=100_000,
    )
    early_stopping_threshold: int = _early_stopping(250)
    max_trials: int | None = _max_trials()
    batch_size: int | None = _batch_size()
    population: int = knob(
        512, "Points alive in a generation of the evolutionary search", unit="points", ge=8, le=65536
    )
    generations: int = knob(4, "Generations of evolution between two batches", unit="generations", ge=1, le=100)
    warm_start: tuple[str, ...] = _warm_start()

    def total_trials(self, tunable_tasks: int) -> int:
        """The step's budget for a model with so many tunable tasks, in trials."""
        return _capped(self.trials_per_kernel * tunable_tasks, self.max_trials)

    @property
    def task_trials(self) -> int | None:
        """Most trials that one task may get: no limit but the budget."""
        return None


class AutoTVM(Options):
    """Search hand-written templates with one of AutoTVM's tuners (Chen et al., NeurIPS 2018).

    TVM removed its `autotvm` module in 0.20; templates and tuners are this project's own. Each task gets up to
    `kernel_trials` trials, in batches, the next batch where the model estimate is expected to fall most. A task that
    no template covers is searched as `Ansor` does.

    >>> AutoTVM(kernel_trials=64, tuner="genetic").total_trials(tunable_tasks=3)
    192
    """

    kind: Literal["autotvm"] = "autotvm"
    kernel_trials: int = knob(2000, "Most trials of one task", unit="trials", ge=1, le=100_000)
    early_stopping_threshold: int = _early_stopping(500)
    tuner: Literal["xgb", "genetic", "random", "grid", "droplet"] = Field(
        "xgb",
        description="How the knobs are searched: simulated annealing on a learned model (xgb), genetic, random, grid, "
        "coordinate descent (droplet)",
    )
    max_trials: int | None = _max_trials()
    batch_size: int | None = _batch_size()
    warm_start: tuple[str, ...] = _warm_start()

    def total_trials(self, tunable_tasks: int) -> int:
        """The step's budget for a model with so many tunable tasks, in trials."""
        return _capped(self.kernel_trials * tunable_tasks, self.max_trials)

    @property
    def task_trials(self) -> int | None:
        """Most trials that one task may get."""
        return self.kernel_trials


class LayoutTuning(Options):
    """Choose layout and algorithm of every convolution: the graph tuner (Liu et al., USENIX ATC 2019, section 3.3).

    Every packing that a convolution can have is measured with a few trials of its template, so are the layout
    transforms between them; the assignment that costs least in all goes into the run folder, and the steps that follow
    tune the model packed by it. It comes first, and once. CPU only.

    >>> LayoutTuning(blocks=(8, 16), algorithms=("direct",)).blocks
    (8, 16)
    """

    kind: Literal["layouttuning"] = "layouttuning"
    trials_per_variant: int = knob(
        8, "Trials of each packing of each distinct convolution", unit="trials", ge=1, le=1000
    )
    blocks: tuple[Annotated[int, Field(ge=0, le=1024)], ...] | None = Field(
        None,
        description="Channels in the innermost axis to try, 0 for plain NCHW (searched as Ansor does); empty for the "
        "target's float32 lanes",
        json_schema_extra={"unit": "channels"},
    )
    algorithms: tuple[str, ...] = Field(
        ALGORITHMS, description="Ways to compute a convolution: direct, winograd2, winograd4 (3x3 with stride 1)"
    )
    warm_start: tuple[str, ...] = _warm_start()

    tuner: ClassVar[str] = "xgb"  # whose trials these count as: AutoTVM's default goes on where they end

    @field_validator("blocks")
    @classmethod
    def _some(cls, blocks: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if blocks == ():
            raise ValueError("should name a block, or be left empty")
        return blocks

    @field_validator("algorithms")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in names if name not in ALGORITHMS]:
            raise ValueError(f"has no {unknown[0]!r}: it may hold {', '.join(ALGORITHMS)}")
        if "direct" not in names:
            raise ValueError("should hold 'direct': not every convolution can have another")
        return names

    def total_trials(self, tunable_tasks: int) -> int:
        """The step's budget for so many variants, in trials."""
        return self.trials_per_variant * tunable_tasks

    @property
    def task_trials(self) -> int:
        """Most trials that one variant may get."""
        return self.trials_per_variant

    @property
    def transform_trials(self) -> int:
        """Most trials that one layout transform may get: it has few schedules."""
        return max(2, self.trials_per_variant // 4)

    @property
    def early_stopping_threshold(self) -> int:
        """Every variant gets all its trials."""
        return self.trials_per_variant + 1

    @property
    def batch_size(self) -> int:
        """All trials of a variant at once: they are the points that its template names first."""
        return min(self.trials_per_variant, 64)


class Droplet(Options):
    """Walk downhill from the best point known: coordinate descent over the knobs.

    After "The Droplet Search Algorithm for Kernel Scheduling" (Canesche et al., ACM TACO 2024) and "Explore as a Storm,
    Exploit as a Raindrop" (2024). Every neighbour is timed in turns with the point it would replace, which it does only
    if it is faster at the given p-value; a task ends where no neighbour is.

    >>> Droplet(trials=32).total_trials(tunable_tasks=3)
    96
    """

    kind: Literal["droplet"] = "droplet"
    trials: int = knob(100, "Most trials of one task", unit="trials", ge=1, le=100_000)
    p_value: float = knob(0.05, "A move is made if chance explains it with at most this probability", gt=0, lt=1)
    start: Literal["best", "default"] = Field(
        "best",
        description="Where a task's descent begins: at the best schedule known of it (of this run, or transferred), "
        "or at the first point of its space",
    )
    max_trials: int | None = _max_trials()
    batch_size: int | None = _batch_size()
    warm_start: tuple[str, ...] = _warm_start()

    def total_trials(self, tunable_tasks: int) -> int:
        """The step's budget for a model with so many tunable tasks, in trials."""
        return _capped(self.trials * tunable_tasks, self.max_trials)

    @property
    def task_trials(self) -> int:
        """Most trials that one task may get."""
        return self.trials

    @property
    def early_stopping_threshold(self) -> int:
        """A descent ends at a local minimum, not for want of luck."""
        return self.trials + 1


class TransferTuning(Options):
    """Try the schedules that other models' kernels of the same class ended with (Gibson & Cano, PACT 2022).

    A schedule is adapted to the shape at hand; the default schedule competes on the same terms. `source` names runs or
    models; of a model the newest finished run on this target is taken. After the schedules of its class, a kernel tries
    those of kernels that begin with the same operator, and where there are none, any that fit. On a CPU, a run that has
    no trials yet packs its model as its sources are packed.

    >>> TransferTuning("alexnet").source
    ('alexnet',)
    """

    POSITIONAL: ClassVar = ("source",)

    kind: Literal["transfertuning"] = "transfertuning"
    source: tuple[str, ...] = Field(
        ("auto",),
        description="Runs (folders or ids) or models whose records are tried, together a pool; 'auto' takes the run of "
        "another model that the paper's heuristic prefers",
    )
    trials_per_kernel: int = knob(
        32, "Most transferred schedules tried for one task, those of the most similar kernels first", unit="trials",
        ge=1, le=100_000,
    )  # fmt: skip
    refine: int = knob(
        0,
        "Kernels whose second-best schedule, if it is close, is tried in the whole model afterwards",
        unit="swaps",
        ge=0,
        le=1000,
    )
    max_trials: int | None = _max_trials()
    batch_size: int | None = _batch_size()

    warm_start: ClassVar[tuple[str, ...]] = ()

    @field_validator("source", mode="before")
    @classmethod
    def _several(cls, source: Any) -> Any:
        return (source,) if isinstance(source, str) else source

    @field_validator("source")
    @classmethod
    def _some(cls, source: tuple[str, ...]) -> tuple[str, ...]:
        if not source or not all(source):
            raise ValueError("should name a run or a model")
        if "auto" in source and len(source) > 1:
            raise ValueError("should be 'auto' alone, or names without it")
        return source

    def total_trials(self, tunable_tasks: int) -> int:
        """The step's budget for a model with so many tunable tasks, in trials."""
        return _capped(self.trials_per_kernel * tunable_tasks, self.max_trials)

    @property
    def task_trials(self) -> int:
        """Most trials that one task may get."""
        return self.trials_per_kernel

    @property
    def early_stopping_threshold(self) -> int:
        """Every schedule of the class is tried."""
        return self.trials_per_kernel + 1


Simple = Annotated[
    Ansor | AutoTVM | LayoutTuning | Droplet | TransferTuning | Selective,
    Field(discriminator="kind", description="One stage of an experiment"),
]
STEPS: tuple[type[Options], ...] = get_args(get_args(Simple)[0])


class Repeat(Options):
    """The same steps several times over, each time from the records of all before: the report's bursts.

    >>> Repeat(10, [Ansor(max_trials=500), Droplet()]).times
    10
    """

    POSITIONAL: ClassVar = ("times", "steps")

    kind: Literal["repeat"] = "repeat"
    times: int = knob(..., "How often", unit="times", ge=1, le=1000)
    steps: tuple[Simple, ...] = Field(..., description="Stages, in order", min_length=1)


Step = Annotated[
    Ansor | AutoTVM | LayoutTuning | Droplet | TransferTuning | Selective | Repeat,
    Field(discriminator="kind", description="One stage of an experiment, or a repetition of some"),
]
