"""What there is to tune: a model's tasks as a frame, and the space that one of them is searched in.

Which tasks a model has depends on its layout: packed convolutions are other kernels than those in NCHW.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import pandas as pd

from tvmlab import layouts
from tvmlab import tasks as cutting
from tvmlab.core import Assignment, InputError, Packing, TaskInfo
from tvmlab.layout_plan import Packed, lanes_of
from tvmlab.models import Model, load_model
from tvmlab.selective_step import clustered
from tvmlab.sites import Site, options, reason_against
from tvmlab.spaces.sketch import SketchSpace
from tvmlab.spaces.sketch_points import SketchPoints
from tvmlab.spaces.template import TemplateSpace, misfit, template_for
from tvmlab.steps_selective import SIMILARITY
from tvmlab.targets import Target
from tvmlab.targets import target as named_target
from tvmlab.tasks import Task

__all__ = ["Space", "pack", "space", "tasks"]

_KEPT = 4  # lowered models, each some seconds of work
_lowered: OrderedDict[tuple[str, Target, str], Packed] = OrderedDict()


def tasks(
    model: str | Model,
    target: str | Target = "auto",
    *,
    layout: str = "NCHW",
    spaces: bool = False,
    depend: bool = False,
) -> pd.DataFrame:
    """The tasks of a model as a frame, the largest share first; in NCHW unless `layout` says otherwise.

    Columns: kernel_class, shapes (inputs -> outputs), weight (how often it occurs), flops and bytes (of one
    occurrence), intensity (FLOP/byte), roofline_us (the shortest time the device's measured limits allow; NaN for
    a target without its device), share (of the model's roofline-limited latency, or of its FLOPs), tunable. With
    `spaces` (some tenths of a second a task) also space: which space the task is searched in, or why it keeps its
    default schedule. With `depend` (as long) also depend, as in selective tuning (TVM issue 4188): the task whose
    schedules this one would try, the representative of its cluster; itself if it is one; empty for a view. These are
    the clusters of `Selective()` in the layout "auto"; a run's own are in `frames.tasks(run)`.

    `layout` is how the convolutions are computed, where they can be: "NCHW16c", "NCHW16c winograd4"; "auto" as the
    step AutoTVM does where no LayoutTuning chose.

    Raises InputError for an unknown model, target or layout, or an operator that TVM cannot import.
    """
    model = load_model(model) if isinstance(model, str) else model
    target = named_target(target) if isinstance(target, str) else target
    found = pack(model, target, _uniform(model, _packing(layout, target))).tasks
    frame = cutting.table(found, target)
    if spaces:
        described = {task.info.name: describe(task, target) for task in found}
        frame["space"] = frame.index.map(described)
    if depend:
        frame["depend"] = frame.index.map(_representatives(found, target)).fillna("")
    return frame


def _representatives(found: Sequence[Task], target: Target) -> dict[str, str]:
    """The names of the representatives that a Selective step with its defaults would choose."""
    tunable = [task for task in found if task.info.tunable]
    names = [task.info.name for task in tunable]
    if not names:
        return {}
    _, depends = clustered(tunable, target.to_tvm(), templates=True, least=SIMILARITY)
    return {name: names[on] for name, on in zip(names, depends, strict=True)}


def space(task: Task | Model | str, name: str = "", target: str | Target = "auto", *, layout: str = "auto") -> Space:
    """The space that a task is searched in: its knobs, its size, any point.

    In the layout "auto" unless `layout` says otherwise; `tvmlab.tasks` shows the tasks in NCHW unless asked likewise.
    Pass a Task; or a model and the name of a convolution or dense layer ("conv0", "conv1", ... in the model's order,
    "dense0", ...; frames.layouts names them too), or of a task in `tvmlab.tasks(model, target, layout=layout)`.
    `layout` is how it is computed: "NCHW", "NCHW16c", "NCHW16c winograd4"; "auto" as the step AutoTVM does where no
    LayoutTuning chose. With a target that is not attached nothing is measured, and nothing needs to be.

        found = tvmlab.space("resnet50", "conv3", layout="NCHW16c")
        len(found), found[0], found.frame(), found.why_not(17)

    Raises InputError for an unknown model, name, target or layout (the message says if it is a task in "NCHW" or
    "auto"), or a layout that this layer cannot have (the message says why).
    """
    target = named_target(target) if isinstance(target, str) else target
    if isinstance(task, Task):
        return Space(task, target)
    model = load_model(task) if isinstance(task, str) else task
    packing = _packing(layout, target)
    assignment = _uniform(model, packing)
    site = next((site for site in layouts.sites(model) if site.name == name), None)
    if site is not None and layout != "auto":
        assignment = _with_site(assignment, site, packing)
    packed = pack(model, target, assignment)
    wanted = packed.keys.get(name)
    found = next((each for each in packed.tasks if wanted == each.key or name == each.info.name), None)
    if found is None:
        raise _no_such_task(model, name, target, layout, packed)
    return Space(found, target)


class Space:
    """A task's space: that of the template which covers it, or TVM's generated sketches.

    `kind` is "template" or "sketch", `task` what is known of the task, `points` the TemplateSpace or SketchPoints.
    `len(space)` is the number of points, `space[i]` the values of the knobs at one.
    """

    def __init__(self, task: Task, target: Target) -> None:
        self.task: TaskInfo = task.info
        self._misfit = misfit(task.module, target.to_tvm())
        self.points: TemplateSpace | SketchPoints
        if template_for(task.module, target.to_tvm()) is not None:
            self.kind = "template"
            self.points = TemplateSpace(task.key, task.module, target.to_tvm())
        else:
            self.kind = "sketch"
            self.points = SketchPoints(SketchSpace(task.key, task.module, target.to_tvm()))

    @property
    def about(self) -> str:
        """What kind of space it is, how large, and why no template's, in a sentence."""
        if isinstance(self.points, TemplateSpace):
            return f"template {self.points.template.name}: {len(self):,} points"
        in_nchw = ", packed layouts have one" if self.task.kernel_class.split("+")[0] == "conv2d" else ""
        why = self._misfit or f"no template covers it{in_nchw}"
        if not self.points.sketches:
            return f"default schedule: {why}, and TVM's rules generate no sketch"
        plural = "es" if self.points.sketches > 1 else ""
        size = f"{len(self):,} points" if len(self) > 1 else "a single point, nothing to choose"
        return f"{self.points.sketches} sketch{plural}: {why}; {size}"

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The values of the knobs at a point. Raises IndexError beyond the last point."""
        return self.points[index]

    def why_not(self, index: int) -> str:
        """Why a point is not valid; an empty string if it is."""
        return self.points.why_not(index)

    def frame(self, limit: int = 20) -> pd.DataFrame:
        """The first `limit` points: one column a knob, and `why_not` (empty where the point is valid)."""
        return self.points.frame(limit)

    def knobs(self) -> pd.DataFrame:
        """The knobs: how many values each has, and which."""
        return self.points.knobs()

    def __repr__(self) -> str:
        rows = "\n".join(f"  {knob.knob}: {knob.about}" for knob in self.knobs().itertuples())
        return f"{self.task.name} ({self.task.kernel_class}, {self.task.shapes})\n{self.about}\n{rows}"


def describe(task: Task, target: Target) -> str:
    """The space of a task in a sentence."""
    return Space(task, target).about if task.info.tunable else "none: a view in the compiled model"


def _packing(layout: str, target: Target) -> Packing:
    if layout == "auto":
        return Packing(lanes_of(target)) if target.kind == "llvm" else Packing()
    return Packing.parse(layout)


def _uniform(model: Model, packing: Packing) -> Assignment:
    if not packing.block:
        return {}
    winograd = 0 if packing.algorithm == "direct" else int(packing.algorithm[-1])
    return layouts.uniform(model, packing.block, winograd)


def _with_site(assignment: Assignment, site: Site, packing: Packing) -> Assignment:
    """The assignment with one site as asked. Raises InputError where it cannot have that."""
    why = reason_against(site, packing)
    if why is not None:
        possible = [str(each) for each, against in options(site, [packing.block]).items() if against is None]
        raise InputError(f"{site.name} cannot be {packing}, {why}", remedy=f"it can be {', '.join(possible)}")
    return assignment | {site.name: packing} if packing.block else assignment


def pack(model: Model, target: Target, assignment: Assignment) -> Packed:
    """A model lowered, its convolutions computed as an assignment says; the last few are kept."""
    key = model.sha256, target, str(sorted(assignment.items()))
    if key not in _lowered:
        _lowered[key] = Packed(model, target, assignment)
    _lowered.move_to_end(key)
    while len(_lowered) > _KEPT:
        _lowered.popitem(last=False)
    return _lowered[key]


def _no_such_task(model: Model, name: str, target: Target, layout: str, packed: Packed) -> InputError:
    if not name:
        return InputError("a model has many tasks", remedy='name one, such as tvmlab.space("resnet50", "conv3")')
    for other in ("NCHW", "auto"):
        there = pack(model, target, _uniform(model, _packing(other, target)))
        if any(name == task.info.name for task in there.tasks):
            text = f'{model.name} has no task {name!r} in layout="{layout}"'
            return InputError(text, remedy=f'it has one in layout="{other}": pass that')
    sites = [site.name for site in layouts.sites(model)]
    known = ", ".join(sites[:3] + [task.info.name for task in packed.tasks[:3]])
    return InputError(f"{model.name} has no layer or task {name!r}", remedy=f"it has {known}, ...; see tvmlab.tasks")
