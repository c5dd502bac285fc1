"""The layout of a run's model: which assignment its tasks are of, before the layout step's end and after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from tvmlab import layouts
from tvmlab.core import Assignment, Packing
from tvmlab.experiment import LayoutTuning, searches_templates
from tvmlab.layout_plan import LayoutPlan, Packed, described, lanes_of, record
from tvmlab.models import Model
from tvmlab.records import RunFolder
from tvmlab.reuse import take_layouts
from tvmlab.session import Session
from tvmlab.sites import reason_against
from tvmlab.sources import block_of, packing_like, pools
from tvmlab.targets import Target
from tvmlab.tasks import Task, extract

__all__ = ["adopt", "arrange", "packed_at_first"]

_FILE = "assignment.json"


def arrange(folder: RunFolder, model: Model, target: Target) -> tuple[list[Task], LayoutPlan | None]:
    """The tasks that a run works on now, noted in its folder; and the plan of its layout step, until that is done.

    A layout step has nothing to do if an earlier run that is reused made its choice. Without one, AutoTVM (or Selective
    with its engine) packs a CPU's model by its vectors, and TransferTuning as the runs are packed that it takes its
    schedules from: that is noted too.
    """
    sources = pools(folder, target)
    steps, known = folder.experiment.stages, folder.layouts
    tuning = next((step for step in steps if isinstance(step, LayoutTuning)), None)
    if tuning and known is None:
        known = take_layouts(folder, tuning, [described(site) for site in layouts.sites(model)])
    if tuning and not (known and known["finished"]):
        plan = LayoutPlan(model, target, tuning)
        folder.write_json(_FILE, plan.provisional)
        _write_tasks(folder, plan.tasks)
        return plan.tasks, plan
    is_new = known is None and next(folder.rows(), None) is None
    assignment = packed_at_first(model, target, steps, sources.values()) if is_new else {}
    if assignment:
        packed = Packed(model, target, assignment)
        folder.write_json(_FILE, record(layouts.sites(model), packed, {}, finished=True))
        tasks = packed.tasks
    else:
        tasks = extract(model, target, folder.assignment)
    _write_tasks(folder, tasks)
    return tasks, None


def packed_at_first(
    model: Model, target: Target, steps: Iterable[Any], sources: Iterable[Sequence[RunFolder]]
) -> Assignment:
    """How a run without a LayoutTuning packs its model; `sources` are the runs that each TransferTuning takes from."""
    if target.kind != "llvm":
        return {}
    if any(map(searches_templates, steps)):
        return layouts.uniform(model, lanes_of(target))
    return _packed_like(model, [run for runs in sources for run in runs])


def _packed_like(model: Model, runs: Sequence[RunFolder]) -> Assignment:
    """The block in which most convolutions of some runs are packed, for all; each computed as the run's most like it.

    Nothing if none of the runs is packed: a schedule fits the layout that it was made for.
    """
    block = block_of(runs)
    assignment = layouts.uniform(model, block) if block else {}
    for site in layouts.sites(model) if assignment else []:
        like = packing_like(described(site)[1], runs) if site.kind == "conv2d" else None
        if like and like.block and reason_against(site, wanted := Packing(block, like.algorithm)) is None:
            assignment[site.name] = wanted
    return assignment


def adopt(session: Session, plan: LayoutPlan) -> None:
    """Choose by what was measured, and go on with the tasks of the model packed by that.

    It is noted where the time was over: what was not measured then has the packing that it had for the time being.
    """
    decision, packed = plan.decide(session.trial_latency)
    session.folder.write_json(_FILE, decision | {"cut_short": session.is_over})
    _write_tasks(session.folder, packed.tasks)
    session.take(packed.tasks)


def _write_tasks(folder: RunFolder, tasks: Iterable[Task]) -> None:
    """Rewrite tasks.json; tasks that are none of the model's any more stay, with weight 0: they have trials."""
    infos = {task.key: task.info for task in tasks}
    past = [replace(info, weight=0) for info in folder.tasks if info.key not in infos]
    folder.write_json("tasks.json", [asdict(info) for info in [*infos.values(), *past]])
