"""The CPU template of everything that is no product of two tensors."""

from __future__ import annotations

from typing import Any

from tvmlab.spaces.schedules import Machine, Template, vectorize

__all__ = ["Simple"]

_REDUCTION = 2  # the kind of a reduction axis (tir.IterVar.CommReduce)


class Simple(Template):
    """Operators without a product of two tensors: elementwise, pooling, reductions, transforms.

    Each stage on its own: outer loops over the cores, the innermost a vector. Knobs: `parallel` (a small tensor is
    done sooner by one core) and `inline` elementwise stages into what reads them.
    """

    name = "simple"

    @classmethod
    def match(cls, module: Any, blocks: list[str], machine: Machine) -> Template | None:
        """For functions whose reductions read one tensor each."""
        from tvm.s_tir import Schedule

        schedule = Schedule(module)
        for name in blocks:
            block = schedule.get_sblock(name)
            reads = {str(region.source.name) for region in schedule.get(block).reads}
            reduction = _reduction_loops(schedule, block)
            if reduction is None or (reduction and len(reads) > 1):
                return None
        return cls({"parallel": (True, False), "inline": (True, False)}, machine)

    def cost(self, values: dict[str, Any]) -> float:
        """Inlined and parallel first."""
        return 2.0 * (not values["inline"]) + (not values["parallel"])

    def schedule(self, module: Any, values: dict[str, Any]) -> Any:
        """Schedule the stages one by one."""
        from tvm.s_tir import Schedule

        schedule = Schedule(module)
        blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
        if values["inline"]:
            blocks = [block for block in blocks if not _inlined(schedule, block)]
        for block in blocks:
            self._schedule_stage(schedule, block, parallel=values["parallel"])
        return schedule

    def _schedule_stage(self, schedule: Any, block: Any, *, parallel: bool) -> None:
        reduction = _reduction_loops(schedule, block) or []
        loops = schedule.get_loops(block)
        spatial = loops[: len(loops) - len(reduction)]
        outer, last = spatial[:-1], spatial[-1]
        width = int(schedule.get(last).extent)
        if parallel and outer:
            schedule.parallel(schedule.fuse(*outer) if len(outer) > 1 else outer[0])
        if reduction and width % self.machine.lanes == 0 and width <= 4 * self.machine.lanes:
            vector, lane = schedule.split(last, [None, self.machine.lanes])
            schedule.reorder(*reduction, vector, lane)
            schedule.unroll(vector)
            schedule.vectorize(lane)
            initial = schedule.decompose_reduction(block, reduction[0])
            schedule.vectorize(schedule.get_loops(initial)[-1])
        elif not reduction:
            vectorize(schedule, last, self.machine.lanes)


def _reduction_loops(schedule: Any, block: Any) -> list[Any] | None:
    """A block's reduction loops; None unless each loop is one axis, with the reductions innermost."""
    loops = schedule.get_loops(block)
    kinds = [int(variable.iter_type) for variable in schedule.get(block).iter_vars]
    first = next((position for position, kind in enumerate(kinds) if kind == _REDUCTION), len(kinds))
    if not loops or len(kinds) != len(loops) or any(kind != _REDUCTION for kind in kinds[first:]):
        return None
    return list(loops[first:])


def _inlined(schedule: Any, block: Any) -> bool:
    """Inline an elementwise stage into what reads it, if TVM can."""
    if not schedule.get_consumers(block) or _reduction_loops(schedule, block):
        return False
    try:
        schedule.compute_inline(block)
    except Exception:  # noqa: BLE001  a stage that cannot be inlined stays
        return False
    return True
