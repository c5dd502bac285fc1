"""What to tune and how: the experiment, and how its candidates are measured. The steps are in `tvmlab.steps`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, StrictInt, field_validator

from tvmlab.core import InputError
from tvmlab.options import Options, knob, unit_of
from tvmlab.steps import (
    STEPS,
    Ansor,
    AutoschedulerOptions,
    AutoTVM,
    AutoTVMOptions,
    Droplet,
    LayoutTuning,
    Repeat,
    Selective,
    Step,
    TransferTuning,
    afresh,
)

__all__ = [
    "STEPS",
    "Ansor",
    "AutoTVM",
    "AutoTVMOptions",
    "AutoschedulerOptions",
    "Droplet",
    "Experiment",
    "LayoutTuning",
    "Measure",
    "Options",
    "Repeat",
    "Selective",
    "Step",
    "TransferTuning",
    "afresh",
    "knob",
    "searches_templates",
    "unit_of",
]


def searches_templates(step: Any) -> bool:
    """Whether a step searches template spaces, where there are some: it packs a CPU's model if no LayoutTuning chose.

    >>> searches_templates(Selective()), searches_templates(Selective(engine="ansor"))
    (True, False)
    """
    return isinstance(step, AutoTVM) or (isinstance(step, Selective) and step.engine == "autotvm")


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
        "A candidate this many times slower than the task's best is timed once only; one a tenth of the way there (1.3 "
        "times for 4) gets a quarter of the repeats, at least 2",
        unit="x",
        ge=1.0,
        le=1e6,
    )
    build_timeout_s: float = knob(30.0, "A build that takes longer is a failed trial", unit="s", gt=0, le=3600)
    run_timeout_s: float = knob(
        20.0, "A run that takes longer than this and its timed repeats is a failed trial", unit="s", gt=0, le=3600
    )
    check: bool = knob(True, "Compare each candidate's result with the unscheduled kernel's on the same inputs")
    cold_weights: bool = knob(
        False,
        "Evict every argument but the first from the caches before each timed call, as in a whole model that does not "
        "fit them; CPU only",
    )
    build_workers: int | None = knob(
        None, "Processes that compile candidates; empty for one a core", unit="processes", ge=1, le=256
    )


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

    @property
    def stages(self) -> tuple[Any, ...]:
        """The steps in the order in which they are run, repetitions written out; a trial's `step` counts these.

        >>> [step.kind for step in Experiment(model="alexnet", steps=[Repeat(2, [Ansor(), Droplet()])]).stages]
        ['ansor', 'droplet', 'ansor', 'droplet']
        """
        return _flat(self.steps)

    def afresh(self) -> Experiment:
        """The same, nothing reused from earlier runs: what is compared with another search must not know of it.

        >>> Experiment(model="alexnet").afresh().code()
        "Experiment(model='alexnet', steps=[Ansor(reuse=False)])"
        """
        return self.model_copy(update={"steps": afresh(self.steps)})

    @field_validator("steps")
    @classmethod
    def _layouts_first(cls, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        if any(isinstance(step, LayoutTuning) for step in _flat(steps)[1:]):
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


def _flat(steps: tuple[Step, ...]) -> tuple[Any, ...]:
    return tuple(
        stage for step in steps for stage in (step.times * step.steps if isinstance(step, Repeat) else (step,))
    )
