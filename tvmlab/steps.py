"""The steps of an experiment: every knob's name, default, range, unit and help text, defined once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator, model_validator

from tvmlab import budget
from tvmlab.core import ALGORITHMS, InputError
from tvmlab.options import Options, knob
from tvmlab.steps_selective import Selective

__all__ = [
    "STEPS",
    "Ansor",
    "AutoTVM",
    "AutoTVMOptions",
    "AutoschedulerOptions",
    "Droplet",
    "LayoutTuning",
    "Repeat",
    "Selective",
    "Step",
    "TransferTuning",
    "afresh",
]


class Ansor(Options):
    """Search TVM's generated sketch space with evolution and a learned cost model (Zheng et al., OSDI 2020).

    TVM removed its `auto_scheduler` module in 0.20; this step runs that design on what is left of it in TVM,
    `tvm.s_tir.meta_schedule`. The total budget is `trials_per_kernel` times the number of tunable tasks, spread
    over the tasks where the model estimate is expected to fall most; `Ansor(500)` has `max_trials` of 500.
    `AutoschedulerOptions` is this class by its other name.

    >>> step = Ansor(early_stopping_threshold="40 %")
    >>> step.patience(10), step.model_copy(update={"max_trials": 1000}).patience(10)
    (400, 40)
    """

    POSITIONAL: ClassVar = ("max_trials",)

    kind: Literal["ansor"] = "ansor"
    trials_per_kernel: int = knob(
        1000,
        "Trials per task on average; the total is this times the number of tunable tasks",
        unit="trials",
        ge=1,
        le=budget.MOST,
    )
    early_stopping_threshold: budget.Threshold = budget.early_stopping(250)
    reuse: bool = budget.reuse("the trials of a task")
    max_trials: int | None = budget.max_trials()
    batch_size: int | None = budget.batch_size()
    population: int = knob(
        512, "Points alive in a generation of the evolutionary search", unit="points", ge=8, le=65536
    )
    generations: int = knob(4, "Generations of evolution between two batches", unit="generations", ge=1, le=100)
    warm_start: tuple[str, ...] = budget.warm_start()

    def total_trials(self, tunable_tasks: int) -> int:
        """The step's budget for a model with so many tunable tasks, in trials."""
        return budget.capped(self.trials_per_kernel * tunable_tasks, self.max_trials)

    @property
    def task_trials(self) -> int | None:
        """Most trials that one task may get: no limit but the budget."""
        return None

    def patience(self, tunable_tasks: int) -> float:
        """Trials without an improvement that end one of so many tasks; infinity for never."""
        return budget.patience_of(self.early_stopping_threshold, self.total_trials(tunable_tasks), tunable_tasks)

    def as_autotvm(self) -> AutoTVM:
        """AutoTVM with the budget that corresponds: two trials for each of Ansor's, the ratio of the defaults.

        Percentages stay. What only Ansor has (population, generations) has no counterpart.

        >>> Ansor().as_autotvm() == AutoTVM(), Ansor(trials_per_kernel=300).as_autotvm().kernel_trials
        (True, 600)
        """
        return AutoTVM(
            kernel_trials=self.trials_per_kernel * budget.RATIO,
            **budget.converted(self, lambda trials: trials * budget.RATIO),
        )


class AutoTVM(Options):
    """Search hand-written templates with one of AutoTVM's tuners (Chen et al., NeurIPS 2018).

    TVM removed its `autotvm` module in 0.20; templates and tuners are this project's own. Each task gets up to
    `kernel_trials` trials, in batches, the next batch where the model estimate is expected to fall most. A task that
    no template covers is searched as `Ansor` does. `AutoTVMOptions` is this class by its other name.

    >>> AutoTVM(kernel_trials=64, tuner="genetic").total_trials(tunable_tasks=3)
    192
    """

    kind: Literal["autotvm"] = "autotvm"
    kernel_trials: int = knob(
        2000, "Most trials of one task, those of earlier runs counted", unit="trials", ge=1, le=budget.MOST
    )
    early_stopping_threshold: budget.Threshold = budget.early_stopping(500)
    exploration_trials: int = knob(
        0,
        "New trials of a task even where earlier runs have its kernel_trials, which start from the best of those; so "
        "many unless early stopping ends the task before, or its template has no further points",
        unit="trials",
        ge=0,
        le=budget.MOST,
    )
    random_trials: int = knob(
        0,
        "Of the exploration_trials, so many start from past records drawn at random, to leave a local optimum; none "
        "where a task has no past records or no template; refused without reuse or a warm_start",
        unit="trials",
        ge=0,
        le=budget.MOST,
    )
    reuse: bool = budget.reuse("the trials of a task")
    tuner: Literal["xgb", "genetic", "random", "grid", "droplet"] = Field(
        "xgb",
        description="How the knobs are searched: simulated annealing on a learned model (xgb), genetic, random, grid, "
        "coordinate descent (droplet)",
    )
    max_trials: int | None = budget.max_trials()
    batch_size: int | None = budget.batch_size()
    warm_start: tuple[str, ...] = budget.warm_start()

    @model_validator(mode="after")
    def _part_of_exploration(self) -> AutoTVM:
        if self.random_trials > self.exploration_trials:
            raise InputError(
                f"random_trials={self.random_trials} are more than exploration_trials={self.exploration_trials}",
                remedy="they are a part of these: raise exploration_trials, or lower random_trials",
            )
        return self

    def total_trials(self, tunable_tasks: int) -> int:
        """The step's budget for a model with so many tunable tasks, in trials."""
        return budget.capped(self.task_trials * tunable_tasks, self.max_trials)

    @property
    def task_trials(self) -> int:
        """Most trials that one task may get, where earlier runs have none."""
        return max(self.kernel_trials, self.exploration_trials)

    def patience(self, tunable_tasks: int) -> float:
        """Trials without an improvement that end one of so many tasks; infinity for never."""
        return budget.patience_of(self.early_stopping_threshold, self.total_trials(tunable_tasks), tunable_tasks)

    def as_autoscheduler(self) -> Ansor:
        """Ansor with the budget that corresponds: a trial for two of AutoTVM's, the ratio of the defaults.

        Percentages stay. What only AutoTVM has (tuner, exploration_trials, random_trials) has no counterpart.

        >>> AutoTVM().as_autoscheduler() == Ansor(), AutoTVM(kernel_trials=3).as_autoscheduler().trials_per_kernel
        (True, 2)
        """
        return Ansor(trials_per_kernel=budget.halved(self.kernel_trials), **budget.converted(self, budget.halved))


AutoschedulerOptions = Ansor  # the names that the platform of the seed texts gave these options
AutoTVMOptions = AutoTVM


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
    reuse: bool = knob(
        True, "Take the layouts that an earlier run in the runs folder chose for this model on this target by the same "
        "knobs"
    )  # fmt: skip
    warm_start: tuple[str, ...] = budget.warm_start()

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

    def patience(self, tunable_tasks: int) -> int:
        """Every variant gets all its trials."""
        return self.trials_per_variant + 1

    @property
    def batch_size(self) -> int:
        """All trials of a variant at once: they are the points that its template names first."""
        return min(self.trials_per_variant, 64)


class Droplet(Options):
    """Walk downhill from the best point known: coordinate descent over the knobs.

    After "The Droplet Search Algorithm for Kernel Scheduling" (Canesche et al., ACM TACO 2024) and "Explore as a Storm,
    Exploit as a Raindrop" (2024). Each neighbour is timed in turns with the point it would replace, which it does only
    if it is faster by 2 % at the p-value (where so few turns fit into 20 s that none could be: if it leads in all); a
    task ends where no neighbour is. So are, before that, the next fastest records (up to an eighth of the trials).

    >>> Droplet(trials=32).total_trials(tunable_tasks=3)
    96
    """

    kind: Literal["droplet"] = "droplet"
    trials: int = knob(100, "Most trials of one task", unit="trials", ge=1, le=100_000)
    p_value: float = knob(0.05, "A move is made if chance explains it with at most this probability", ge=1e-4, lt=1)
    start: Literal["best", "default"] = Field(
        "best",
        description="Where a task's descent begins: at the best schedule known of it (of this run, or transferred), "
        "or at the first point of its space",
    )
    starts: int = knob(
        1, "Fast schedules, far from each other, that a descent goes down from, one after the other; with "
        "start='best'", unit="schedules", ge=1, le=64,
    )  # fmt: skip
    max_trials: int | None = budget.max_trials()
    batch_size: int | None = budget.batch_size()
    warm_start: tuple[str, ...] = budget.warm_start()

    @model_validator(mode="after")
    def _starts_are_of_the_best(self) -> Droplet:
        if self.starts > 1 and self.start != "best":
            raise InputError(
                f"starts={self.starts} with start={self.start!r}: a task has one default schedule",
                remedy="leave starts at 1, or begin with start='best'",
            )
        return self

    def total_trials(self, tunable_tasks: int) -> int:
        """The step's budget for a model with so many tunable tasks, in trials."""
        return budget.capped(self.trials * tunable_tasks, self.max_trials)

    @property
    def task_trials(self) -> int:
        """Most trials that one task may get."""
        return self.trials

    def patience(self, tunable_tasks: int) -> int:
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
    max_trials: int | None = budget.max_trials()
    batch_size: int | None = budget.batch_size()

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
        return budget.capped(self.trials_per_kernel * tunable_tasks, self.max_trials)

    @property
    def task_trials(self) -> int:
        """Most trials that one task may get."""
        return self.trials_per_kernel

    def patience(self, tunable_tasks: int) -> int:
        """Every schedule of the class is tried."""
        return self.trials_per_kernel + 1


Simple = Annotated[
    Ansor | AutoTVM | LayoutTuning | Droplet | TransferTuning | Selective,
    Field(discriminator="kind", description="One stage of an experiment"),
]
STEPS: tuple[type[Options], ...] = get_args(get_args(Simple)[0])


class Repeat(Options):
    """The same steps several times over, each time from the records of all before: the report's bursts.

    >>> Repeat(10, [Ansor(500), Droplet()]).steps[0].code()
    'Ansor(max_trials=500)'
    """

    POSITIONAL: ClassVar = ("times", "steps")

    kind: Literal["repeat"] = "repeat"
    times: int = knob(..., "How often", unit="times", ge=1, le=1000)
    steps: tuple[Simple, ...] = Field(..., description="Stages, in order", min_length=1)


def afresh(steps: Iterable[Any]) -> tuple[Any, ...]:
    """The same steps, nothing reused from earlier runs: no trial starts from a random one of their records either.

    >>> [step.code() for step in afresh([Ansor(), AutoTVM(exploration_trials=9, random_trials=3)])]
    ['Ansor(reuse=False)', 'AutoTVM(exploration_trials=9, reuse=False)']
    """
    return tuple(map(_afresh, steps))


def _afresh(step: Any) -> Any:
    if isinstance(step, Repeat):
        return Repeat(times=step.times, steps=afresh(step.steps))
    fields = type(step).model_fields
    changed: dict[str, Any] = {"reuse": False} if "reuse" in fields else {}
    if "random_trials" in fields and not step.warm_start:
        changed["random_trials"] = 0
    return step.model_copy(update=changed)


Step = Annotated[
    Ansor | AutoTVM | LayoutTuning | Droplet | TransferTuning | Selective | Repeat,
    Field(discriminator="kind", description="One stage of an experiment, or a repetition of some"),
]
