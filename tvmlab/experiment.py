"""What to tune and how: every knob's name, default, range, unit and help text, defined once.

The widgets, the command line and the documentation are generated from these classes.
"""

from __future__ import annotations

import html
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, field_validator

from tvmlab.core import ALGORITHMS, InputError

__all__ = ["STEPS", "Ansor", "AutoTVM", "Experiment", "LayoutTuning", "Measure", "Options", "knob", "unit_of"]


def knob(default: Any, help: str, *, unit: str = "", **limits: Any) -> Any:
    """A pydantic field with a help text and a unit; `limits` are pydantic's own (ge, le, gt, lt)."""
    return Field(default, description=help, json_schema_extra={"unit": unit}, strict=True, **limits)


class Options(BaseModel):
    """Base of the frozen option classes: one clear error, JSON round trip, HTML table."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _readable(type(self), error) from None

    @classmethod
    def from_json(cls, text: str | bytes) -> Any:
        """Read what `model_dump_json` wrote. Raises InputError on unknown or out-of-range fields."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise _readable(cls, error) from None

    def code(self) -> str:
        """The Python call that makes this object again, defaults left out.

        >>> Ansor(max_trials=64).code()
        'Ansor(max_trials=64)'
        """
        shown = (
            f"{name}={_code(value)}"
            for name, field in type(self).model_fields.items()
            if name != "kind" and (value := getattr(self, name)) != field.get_default(call_default_factory=True)
        )
        return f"{type(self).__name__}({', '.join(shown)})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{name}</th><td>{html.escape(_code(getattr(self, name)))}</td>"
            f"<td>{unit_of(field)}</td><td style='text-align:left'>{html.escape(field.description or '')}</td></tr>"
            for name, field in type(self).model_fields.items()
            if name != "kind"
        )
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"


def unit_of(field: Any) -> str:
    """The unit of a knob's field info, or an empty string."""
    return (field.json_schema_extra or {}).get("unit", "")


def _code(value: Any) -> str:
    if isinstance(value, Options):
        return value.code()
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_code, value)) + "]"
    return repr(value)


def _readable(cls: type[Options], error: ValidationError) -> InputError:
    """One line for the first problem: which knob, what was given, what is allowed."""
    # A misspelt knob may leave a required one missing: the spelling is what to tell.
    problems = error.errors(include_url=False)
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, InputError):  # of a step or of Measure: it says all there is to say
        return inner
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = ", ".join(name for name in cls.model_fields if name != "kind")
        return InputError(f"{cls.__name__} has no knob {where!r}", remedy=f"its knobs are {known}")
    if first["type"] == "missing":
        return InputError(f"{cls.__name__} needs {where!r}", remedy=f"pass {where}=...")
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        known = ", ".join(f"{step.__name__}(...)" for step in STEPS)
        return InputError(f"{where}: unknown step {first['input']!r}", remedy=f"the steps are {known}")
    problem = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return InputError(
        f"{cls.__name__}({where}={first['input']!r}) is not usable",
        remedy=f"{where} {problem[:1].lower()}{problem[1:]}",
    )


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
    tuner: Literal["xgb", "genetic", "random", "grid"] = Field(
        "xgb",
        description="How the knobs are searched: simulated annealing on a learned model (xgb), genetic, random, grid",
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


class Measure(Options):
    """How a candidate is timed and checked."""

    repeats: int = knob(5, "Timed repeats of a kernel; all are stored", unit="repeats", ge=1, le=1000)
    min_repeat_ms: float = knob(
        4.0,
        "Shortest duration of one repeat; short kernels are looped to fill it",
        unit="ms",
        gt=0,
        le=10_000,
    )
    slow_factor: float = knob(
        4.0,
        "A candidate this many times slower than the task's best is timed once only",
        unit="x",
        ge=1.0,
        le=1e6,
    )
    build_timeout_s: float = knob(30.0, "A build that takes longer is a failed trial", unit="s", gt=0, le=3600)
    run_timeout_s: float = knob(20.0, "A run that takes longer is a failed trial", unit="s", gt=0, le=3600)
    check: bool = knob(True, "Compare each candidate's result with the unscheduled kernel's on the same inputs")
    cold_weights: bool = knob(
        False,
        "Evict every argument but the first from the caches before each timed call, as in a whole model that does not "
        "fit them; CPU only",
    )
    build_workers: int | None = knob(
        None, "Processes that compile candidates; empty for one a core", unit="processes", ge=1, le=256
    )


Step = Annotated[Ansor | AutoTVM | LayoutTuning, Field(discriminator="kind", description="One stage of an experiment")]
STEPS: tuple[type[Options], ...] = get_args(get_args(Step)[0])


class Experiment(Options):
    """Which model, on which target, with which steps, within which budget and seed.

    `model` is a zoo name (see `tvmlab.models()`) or the path of an .onnx file; `target` is a name from
    `tvmlab.targets()`, `"auto"` for the best one attached. `tvmlab.tune(experiment)` runs it.

    >>> Experiment(model="alexnet", steps=[Ansor(max_trials=64)]).code()
    "Experiment(model='alexnet', steps=[Ansor(max_trials=64)])"
    """

    model: str = knob(..., "Zoo name or path of an .onnx file", min_length=1)
    target: str = knob("auto", "What to tune for; 'auto' is the GPU if one is attached, else the CPU", min_length=1)
    batch: int = knob(1, "Batch size", unit="samples", ge=1, le=65536)
    dims: dict[str, StrictInt] = Field(
        default_factory=dict, description="Sizes of the model's other symbolic dimensions, by name"
    )
    steps: tuple[Step, ...] = Field((Ansor(),), description="Stages, in order", min_length=1)
    seed: int = knob(0, "Seeds the weights, the inputs and the search", ge=0, le=2**31 - 1)
    time_limit_s: float | None = knob(None, "Stop the search after so long; empty for no limit", unit="s", gt=0, le=1e9)
    measure: Measure = Field(default_factory=Measure, description="How candidates are timed and checked")

    @field_validator("steps")
    @classmethod
    def _layouts_first(cls, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        if any(isinstance(step, LayoutTuning) for step in steps[1:]):
            raise InputError(
                "LayoutTuning is not the first step, or there are two",
                remedy="begin with it: what follows tunes its choice",
            )
        return steps

    @field_validator("dims")
    @classmethod
    def _positive(cls, dims: dict[str, int]) -> dict[str, int]:
        for name, size in dims.items():
            if size < 1:
                raise ValueError(f"should give {name!r} a size of at least 1")
        return dims
