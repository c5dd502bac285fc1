"""A model on a target, cut into weighted tasks; and the model compiled again from a database of schedules."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pandas as pd

from tvmlab.compat import idle_passes, load_meta_schedule, structural_key, to_plain
from tvmlab.core import Assignment, InputError, RunError, TaskInfo
from tvmlab.fold import fold
from tvmlab.layouts import pack_sites
from tvmlab.llvm import align_stacks
from tvmlab.models import Model
from tvmlab.targets import Target

__all__ = ["Task", "arguments", "compile_model", "extract", "lower", "table", "task_of"]


@dataclass(frozen=True)
class Task:
    """One distinct fused operator: what is known of it, and its unscheduled module (one function, `main`)."""

    info: TaskInfo
    module: Any

    @property
    def key(self) -> str:
        """Structural hash of the module, 16 hex digits."""
        return self.info.key


def table(found: Sequence[Task], target: Target) -> pd.DataFrame:
    """Tasks as `tvmlab.tasks` shows them."""
    infos = [task.info for task in found]
    limit = target.roofline
    frame = pd.DataFrame(
        {
            "kernel_class": [info.kernel_class for info in infos],
            "shapes": [info.shapes for info in infos],
            "weight": [info.weight for info in infos],
            "flops": [info.flops for info in infos],
            "bytes": [info.bytes_moved for info in infos],
            "intensity": [info.intensity for info in infos],
            "roofline_us": [
                limit.latency_s(info.flops, info.bytes_moved) * 1e6 if limit else float("nan") for info in infos
            ],
            "tunable": [info.tunable for info in infos],
        },
        index=pd.Index([info.name for info in infos], name="task"),
    )
    cost = frame["weight"] * (frame["roofline_us"] if limit else frame["flops"]) * frame["tunable"]
    frame.insert(7, "share", cost / cost.sum())
    return frame.sort_values("share", ascending=False)


def lower(model: Model, target: Target, assignment: Assignment | None = None) -> tuple[Any, dict[str, str]]:
    """The model as fused TensorIR functions, unscheduled; and the kernel class of each function by name.

    With an assignment its convolutions are packed (`tvmlab.layouts.pack`), else everything stays in NCHW. Raises
    InputError for an assignment that the model cannot have.
    """
    if assignment is None:
        return lower_module(_within(target, lambda: fold(_decomposed(model))), target)
    return lower_sites(model, target, assignment)[:2]


def lower_sites(model: Model, target: Target, assignment: Assignment) -> tuple[Any, dict[str, str], dict[str, str]]:
    """What `lower` returns, and which function each convolution or dense layer became, by the name of its site.

    Sites whose weights are not constant are left out. Raises RunError if a site's function cannot be told.
    """
    packed, weights = _within(target, lambda: pack_sites(_decomposed(model), assignment))
    lowered, classes = lower_module(packed, target)
    readers = _readers_of(lowered, weights)
    lost = [site for site, weight in weights.items() if weight is not None and site not in readers]
    if lost:
        raise RunError(f"{lost[0]} of {model.name} is in no kernel", remedy="please report this: it is a fault of ours")
    return lowered, classes, readers


def lower_module(module: Any, target: Target) -> tuple[Any, dict[str, str]]:
    """A Relax module of operators as fused TensorIR functions; and the kernel class of each function by name."""
    import tvm
    from tvm.relax import transform

    operators = _operator_names(module)
    passes = [
        transform.FoldConstant(),
        transform.LegalizeOps(),
        transform.AnnotateTIROpPattern(),
        transform.FoldConstant(),
        transform.FuseOps(),
    ]
    module = _within(target, lambda: tvm.transform.Sequential(passes)(module))
    classes = _kernel_classes(module, operators)
    return _within(target, lambda: transform.FuseTIR()(module)), classes


def _decomposed(model: Model) -> Any:
    import tvm
    from tvm.relax import transform

    passes = [transform.DecomposeOpsForInference(), transform.CanonicalizeBindings()]
    return tvm.transform.Sequential(passes)(model.module)


def _within(target: Target, work: Callable[[], Any]) -> Any:
    """Do some work of TVM's with the target it is for."""
    import tvm

    load_meta_schedule(target.kind)
    with target.to_tvm(), tvm.transform.PassContext(opt_level=3):
        return work()


def calls(lowered: Any) -> list[tuple[str, list[Any]]]:
    """The calls of a lowered module's function `main` in order: the function's name, and the arguments."""
    from tvm import relax

    bindings = [binding.value for block in lowered["main"].body.blocks for binding in block.bindings]
    found = [value for value in bindings if isinstance(value, relax.Call) and value.op.name == "relax.call_tir"]
    return [(call.args[0].name_hint, list(call.args[1].fields)) for call in found]


def _readers_of(lowered: Any, weights: dict[str, Any]) -> dict[str, str]:
    """The function that reads each constant, by the constant's name: passes copy no constant, but reorder calls."""
    waiting = dict(weights)
    found = {}
    for function, arguments in calls(lowered):
        for argument in arguments:
            name = next(
                (name for name, weight in waiting.items() if weight is not None and argument.same_as(weight)), ""
            )
            if name:
                found[name] = function
                del waiting[name]
    return found


def extract(model: Model, target: Target, assignment: Assignment | None = None) -> list[Task]:
    """The distinct tasks of a model on a target, in the order TVM finds them; packed by an assignment, if given."""
    return extract_from(*lower(model, target, assignment), target)


def extract_from(lowered: Any, classes: dict[str, str], target: Target) -> list[Task]:
    """The distinct tasks of an already lowered model."""
    meta_schedule = load_meta_schedule(target.kind)
    found = meta_schedule.relax_integration.extract_tasks(lowered, target.to_tvm())
    return [_task(item, classes) for item in found]


def key_of(lowered: Any, function: str) -> str:
    """The key of the task that a function of a lowered module is."""
    import tvm

    load_meta_schedule()
    return structural_key(tvm.get_global_func("tvm.s_tir.meta_schedule.normalize_mod")(lowered[function]))


def compile_model(lowered: Any, target: Target, database: Any = None, *, cuda_graph: bool = True) -> Any:
    """Compile a lowered model; tasks in the database take their best schedule, the others their default one.

    Returns TVM's VMExecutable. `lowered` is the first result of `lower`. On a GPU the kernels that neither read the
    model's inputs nor write its outputs become one CUDA graph, captured at the first inference: at batch 1 a launch may
    take longer than its kernel. Without `cuda_graph` each is launched by itself, as an instrument needs it.
    """
    import tvm
    from tvm.relax import transform

    load_meta_schedule(target.kind)
    align_stacks()
    config = {"relax.backend.use_cuda_graph": cuda_graph} if target.kind == "cuda" else {}
    with target.to_tvm(), tvm.transform.PassContext(3, disabled_pass=idle_passes(target.kind), config=config):
        if database is not None:
            with database:
                lowered = transform.MetaScheduleApplyDatabase()(lowered)
        if target.kind == "cuda":
            lowered = default_gpu_schedule(lowered)
        return tvm.compile(lowered, target=target.to_tvm())


def default_gpu_schedule(module: Any) -> Any:
    """The module with what is not scheduled yet scheduled by TVM's dlight rules: a GPU runs no unscheduled kernel."""
    from tvm.s_tir import dlight

    gpu = dlight.gpu
    return dlight.ApplyDefaultSchedule(
        gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Transpose(), gpu.Fallback()
    )(module.clone())  # the pass replaces functions in the very module that it is given


def _task(found: Any, classes: dict[str, str]) -> Task:
    name = str(found.task_name)
    return task_of(found.dispatched[0], name, classes.get(name, _stem(name)), int(found.weight))


def task_of(module: Any, name: str, kernel_class: str, weight: int) -> Task:
    """The task of an unscheduled module (one function, `main`)."""
    from tvm import relax
    from tvm.s_tir import analysis

    tensors = arguments(module)
    moved = sum(math.prod(shape) * _itemsize(dtype) for shape, dtype in tensors)
    info = TaskInfo(
        key=structural_key(module),
        name=name,
        kernel_class=kernel_class,
        weight=weight,
        flops=float(analysis.estimate_tir_flops(module)),
        bytes_moved=float(moved),
        # A reshape becomes a view in the compiled model, so there is nothing to gain.
        tunable=not relax.analysis.has_reshape_pattern(module["main"]),
        shapes=" ".join("x".join(map(str, shape)) or "scalar" for shape, _ in tensors),
    )
    return Task(info, module)


def arguments(module: Any) -> list[tuple[tuple[int, ...], str]]:
    """Shape and dtype of every argument of a task's module, inputs first."""
    meta_schedule = load_meta_schedule()
    found = []
    for info in meta_schedule.arg_info.ArgInfo.from_prim_func(module["main"]):
        _, dtype, shape = to_plain(info.as_json())
        found.append((tuple(int(size) for size in shape), str(dtype)))
    return found


@lru_cache
def _itemsize(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    bits = int(digits.group()) if digits else 8  # "bool"
    return max(bits // 8, 1)


def _operator_names(module: Any) -> set[str]:
    """The operators of a Relax module without their dialect: `relax.nn.conv2d` gives `conv2d`."""
    import tvm
    from tvm import relax

    names: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, relax.Call) and isinstance(node.op, tvm.ir.Op):
            names.add(node.op.name.rsplit(".", 1)[-1])

    for _, function in module.functions_items():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, visit)
    return names


def _kernel_classes(module: Any, operators: set[str]) -> dict[str, str]:
    """Kernel class of every TensorIR function of a module after FuseOps: the operator types, joined by `+`."""
    from tvm import relax

    classes = {}
    for variable, function in module.functions_items():
        name = variable.name_hint
        if not isinstance(function, relax.Function):
            classes[name] = _stem(name, operators)
        elif function.attrs and "Primitive" in function.attrs:
            called = [
                binding.value.args[0].name_hint
                for block in function.body.blocks
                for binding in block.bindings
                if isinstance(binding.value, relax.Call) and binding.value.op.name == "relax.call_tir"
            ]
            classes[name] = "+".join(_stem(callee, operators) for callee in called)
    return classes


def _stem(name: str, operators: set[str] = frozenset()) -> str:  # type: ignore[assignment]
    """A function's name without TVM's ordinal: conv2d15 -> conv2d, but log2 stays where log2 is an operator."""
    for operator in sorted(operators, key=len, reverse=True):
        if operator[-1].isdigit() and re.fullmatch(re.escape(operator) + r"\d*", name):
            return operator
    return re.sub(r"\d+$", "", name)


def require_tunable(found: list[Task], model: Model) -> list[Task]:
    """The tasks a search can work on. Raises InputError where a model has none."""
    tunable = [task for task in found if task.info.tunable]
    if not tunable:
        raise InputError(f"model {model.name!r} has nothing to tune", remedy="it consists of reshapes only")
    return tunable
