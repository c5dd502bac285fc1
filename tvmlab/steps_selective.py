"""The knobs of the step Selective. The other steps are in `tvmlab.steps`, which lists this one among them."""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from tvmlab import budget
from tvmlab.core import InputError
from tvmlab.options import Options, knob

__all__ = ["OWN_POINTS", "SIMILARITY", "Selective"]

SIMILARITY = 0.5  # of two tasks that share schedules, at least
OWN_POINTS = 2  # of a task's own template that compete with the shared schedules
_KNOBS_OF = {"autotvm": ("tuner",), "ansor": ("population", "generations")}


class Selective(Options):
    """Search few tasks and give the others their schedules (selective tuning, TVM issue 4188).

    Tasks whose tuning spaces overlap form clusters. Of each cluster one task, its representative, is searched as
    AutoTVM or Ansor does; the others try the representative's `top` fastest schedules and two points of their own
    templates that its trials speak for, and are searched themselves where all these are poor. As AutoTVM does, engine
    'autotvm' packs a CPU's model if no LayoutTuning chose.

    >>> Selective(top="5%").shared(trials=201), Selective().shared(trials=201), Selective(top=10).shared(trials=4)
    (11, 10, 4)
    """

    POSITIONAL: ClassVar = ("top",)

    kind: Literal["selective"] = "selective"
    top: int | str = Field(
        10,
        description="Fastest schedules of a representative that the other tasks of its cluster try: so many, or a "
        "share of its valid trials such as '5%'",
        json_schema_extra={"unit": "schedules"},
    )
    similarity: float = knob(
        SIMILARITY, "Least similarity of any two tasks of a cluster; 1 shares between equal spaces only", gt=0, le=1
    )
    fall_back: float = knob(
        0.6,
        "A task is searched itself if it comes less near to its roofline with the shared schedules than this share of "
        "what its representative reaches, and that costs the model 1 % or more; 0: only if none of them runs",
        ge=0,
        le=1,
    )
    engine: Literal["autotvm", "ansor"] = Field(
        "autotvm", description="How representatives are searched: templates as AutoTVM, or generated sketches as Ansor"
    )
    trials_per_kernel: int = knob(
        2000, "Trials of each task that is searched: at most (autotvm), or on average (ansor)", unit="trials",
        ge=1, le=budget.MOST,
    )  # fmt: skip
    early_stopping_threshold: budget.Threshold = budget.early_stopping(500)
    tuner: Literal["xgb", "genetic", "random", "grid", "droplet"] = Field(
        "xgb", description="How engine autotvm searches the knobs"
    )
    population: int = knob(512, "Points alive in a generation of engine ansor", unit="points", ge=8, le=65536)
    generations: int = knob(4, "Generations of engine ansor between two batches", unit="generations", ge=1, le=100)
    max_trials: int | None = budget.max_trials()
    batch_size: int | None = budget.batch_size()
    warm_start: tuple[str, ...] = budget.warm_start()

    @field_validator("top", mode="before")
    @classmethod
    def _some(cls, top: Any) -> int | str:
        shape = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", str(top)) if isinstance(top, int | str) else None
        share = shape is not None and shape[2] == "%"
        size = float(shape[1]) if shape and not isinstance(top, bool) else 0.0
        if not 0 < size <= (100 if share else budget.MOST) or (not share and size % 1):
            raise ValueError(f"should be a whole number from 1 to {budget.MOST:,}, or a share above 0% and up to 100%")
        return f"{size:g}%" if share else int(size)

    @model_validator(mode="after")
    def _of_the_engine(self) -> Selective:
        for engine, names in _KNOBS_OF.items():
            for name in names:
                if engine != self.engine and getattr(self, name) != type(self).model_fields[name].default:
                    raise InputError(
                        f"Selective's {name} is a knob of engine {engine!r}, and its engine is {self.engine!r}",
                        remedy=f"leave it out, or pass engine={engine!r}",
                    )
        return self

    def shared(self, trials: int) -> int:
        """How many schedules a representative with so many valid trials shares."""
        if isinstance(self.top, int):
            return min(self.top, trials)
        return math.ceil(round(float(self.top[:-1]) / 100 * trials, 9))

    def total_trials(self, tunable_tasks: int) -> int:
        """The most trials of the step for a model with so many tunable tasks: one serves all others poorly."""
        lent = (self.shared(self.trials_per_kernel) + OWN_POINTS) * max(tunable_tasks - 1, 0)
        return budget.capped(self.trials_per_kernel * tunable_tasks + lent, self.max_trials)

    @property
    def task_trials(self) -> int | None:
        """Most trials that one task may get; None for no limit but the budget."""
        return self.trials_per_kernel if self.engine == "autotvm" else None
