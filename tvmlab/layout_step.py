"""The layout of a run's model: which assignment its tasks are of, before the layout step's end and after."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace

from tvmlab import layouts
from tvmlab.experiment import AutoTVM, LayoutTuning
from tvmlab.layout_plan import LayoutPlan, Packed, lanes_of, record
from tvmlab.models import Model
from tvmlab.records import RunFolder
from tvmlab.session import Session
from tvmlab.targets import Target
from tvmlab.tasks import Task, extract

__all__ = ["adopt", "arrange"]

_FILE = "assignment.json"


def arrange(folder: RunFolder, model: Model, target: Target) -> tuple[list[Task], LayoutPlan | None]:
    """The tasks that a run works on now, noted in its folder; and the plan of its layout step, until that is done.

    AutoTVM without a layout step packs a CPU's model by its vectors: that is noted too.
    """
    steps, known = folder.experiment.stages, folder.layouts
    tuning = next((step for step in steps if isinstance(step, LayoutTuning)), None)
    if tuning and not (known and known["finished"]):
        plan = LayoutPlan(model, target, tuning)
        folder.write_json(_FILE, plan.provisional)
        _write_tasks(folder, plan.tasks)
        return plan.tasks, plan
    if known is None and target.kind == "llvm" and any(isinstance(step, AutoTVM) for step in steps):
        packed = Packed(model, target, layouts.uniform(model, lanes_of(target)))
        folder.write_json(_FILE, record(layouts.sites(model), packed, {}, finished=True))
        tasks = packed.tasks
    else:
        tasks = extract(model, target, folder.assignment)
    _write_tasks(folder, tasks)
    return tasks, None


def adopt(session: Session, plan: LayoutPlan) -> None:
    """Choose by what was measured, and go on with the tasks of the model packed by that."""
    decision, packed = plan.decide(session.trial_latency)
    session.folder.write_json(_FILE, decision)
    _write_tasks(session.folder, packed.tasks)
    session.take(packed.tasks)


def _write_tasks(folder: RunFolder, tasks: Iterable[Task]) -> None:
    """Rewrite tasks.json; tasks that are none of the model's any more stay, with weight 0: they have trials."""
    infos = {task.key: task.info for task in tasks}
    past = [replace(info, weight=0) for info in folder.tasks if info.key not in infos]
    folder.write_json("tasks.json", [asdict(info) for info in [*infos.values(), *past]])
