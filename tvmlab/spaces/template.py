"""Template spaces: hand-written schedules with knobs (AutoTVM's spaces), as enumerated spaces.

Chen et al., "Learning to Optimize Tensor Programs" (NeurIPS 2018), section 2; a schedule is a function of the values
of a few knobs. Which values make sense (vector width, registers) comes from the target.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tvmlab.compat import structural_key
from tvmlab.core import Candidate, InputError
from tvmlab.spaces import cpu_templates, cuda_templates
from tvmlab.spaces.knobs import Index
from tvmlab.spaces.schedules import Template, machine_of, root_blocks

__all__ = ["TemplateSpace", "misfit", "sizes", "template_for"]


def template_for(module: Any, target: Any) -> Template | None:
    """The template that covers a task's module (one function, `main`) on a tvm.target.Target; None if there is none.

    One that has no valid point for the module's shape does not cover it.
    """
    found = _match(module, target)
    return None if found is None or _refusal(found) else found


def sizes(tasks: Iterable[Any], target: Any) -> dict[str, int]:
    """How many points the template spaces of tasks (tvmlab.tasks.Task) have, by key; none where no template covers."""
    found = {task.key: template_for(task.module, target) for task in tasks}
    return {key: math.prod(map(len, made.knobs.values())) for key, made in found.items() if made is not None}


def misfit(module: Any, target: Any) -> str:
    """Which template is for such a module but does not fit its shape, and why; an empty string if none."""
    found = _match(module, target)
    why = _refusal(found) if found else ""
    return f"template {found.name} does not fit this shape, it {why}" if found and why else ""


def _refusal(template: Template) -> str:
    """Why the first point of a template is not valid, if none is; else an empty string."""
    names = list(template.knobs)
    points = (dict(zip(names, values, strict=True)) for values in itertools.product(*template.knobs.values()))
    first = ""
    for point in points:
        why = template.why_not(point)
        if not why:
            return ""
        first = first or why
    return first


def _match(module: Any, target: Any) -> Template | None:
    kind = target.kind.name
    classes = {"llvm": cpu_templates.TEMPLATES, "cuda": cuda_templates.TEMPLATES}.get(kind, ())
    blocks = root_blocks(module)
    machine = machine_of(target)
    return next((found for made in classes if (found := made.match(module, blocks, machine)) is not None), None)


class TemplateSpace:
    """The points of a task's template: every combination of its knobs' values, numbered.

    An EnumeratedSpace. Raises InputError if no template covers the task.
    """

    def __init__(self, task_key: str, module: Any, target: Any) -> None:
        found = template_for(module, target)
        if found is None:
            raise InputError(f"no template covers task {task_key}", remedy="use its sketch space: Ansor(...)")
        self.task_key = task_key
        self.template = found
        self._module = module
        self._names = tuple(found.knobs)
        self.radices = tuple(len(values) for values in found.knobs.values())

    def __len__(self) -> int:
        return math.prod(self.radices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The values of the knobs at a point. Raises IndexError beyond the last point."""
        if not 0 <= index < len(self):
            raise IndexError(f"point {index} of a space of {len(self)}")
        values = {}
        for name in self._names:
            choices = self.template.knobs[name]
            index, position = divmod(index, len(choices))
            values[name] = choices[position]
        return values

    def index_of(self, values: dict[str, Any]) -> int:
        """The number of a point. Raises InputError for a knob or value that the space does not have."""
        index, scale = 0, 1
        for name in self._names:
            choices = self.template.knobs[name]
            if values.get(name) not in choices:
                raise InputError(f"knob {name}={values.get(name)!r} is not in the space", remedy=f"it has {choices}")
            index += choices.index(values[name]) * scale
            scale *= len(choices)
        return index

    def why_not(self, index: int) -> str:
        """Why a point is not valid; an empty string if it is."""
        return self.template.why_not(self[index])

    def realize(self, index: int) -> Candidate | None:
        """The candidate at a point; None where it is not valid for this task."""
        if self.why_not(index):
            return None
        try:
            schedule = self.template.schedule(self._module, self[index])
        except Exception:  # noqa: BLE001  TVM raises ScheduleError, InternalError or ValueError for what does not fit
            return None
        return Candidate(self.task_key, structural_key(schedule.mod), 0, [index], schedule)

    def encode(self, index: int) -> Any:
        """The point as float32: a number as its binary logarithm, anything else as its position in the list."""
        vector = [
            math.log2(value) if isinstance(value, int) and value > 0 else float(self.template.knobs[name].index(value))
            for name, value in self[index].items()
        ]
        return np.array([*vector, *self.template.features(self[index])], dtype="float32")

    def neighbours(self, index: int) -> list[int]:
        """The points one position up or down the values of one knob; not all need be valid."""
        axis = Index(self.radices)
        return [point for way in axis.directions(index) if (point := axis.step(index, way)) is not None]

    def starts(self) -> Sequence[int]:
        """The valid points of lowest estimated cost, the best guess first (at most 12)."""
        return [self.index_of(values) for values in self.template.starts()]

    def frame(self, limit: int = 1000) -> pd.DataFrame:
        """The first `limit` points: one column a knob, and `why_not` (empty where the point is valid)."""
        rows = [{**self[index], "why_not": self.why_not(index)} for index in range(min(limit, len(self)))]
        return pd.DataFrame(rows, columns=[*self._names, "why_not"], index=pd.RangeIndex(len(rows), name="point"))

    def knobs(self) -> pd.DataFrame:
        """One row a knob: how many values it has, and which."""
        rows = [
            (name, len(values), "one of " + ", ".join(map(str, values))) for name, values in self.template.knobs.items()
        ]
        return pd.DataFrame(rows, columns=["knob", "values", "about"])

    def __repr__(self) -> str:
        knobs = ", ".join(f"{name} {list(values)}" for name, values in self.template.knobs.items())
        return f"TemplateSpace({self.template.name}, {len(self):,} points: {knobs})"
