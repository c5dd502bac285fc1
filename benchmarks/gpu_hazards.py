"""Kernels that a run must survive: one that does not end, and one that writes where it may not."""

from types import SimpleNamespace

import tvm

from tvmlab.compat import structural_key
from tvmlab.core import Candidate
from tvmlab.experiment import Measure
from tvmlab.measure.local import LocalMeasurer
from tvmlab.tasks import task_of

_KERNEL = """
# from tvm.script import ir as I
# from tvm.script import tirx as T

@I.ir_module
class Module:
    @T.prim_func(s_tir=True)
    def main(a: T.Buffer((1024,), "float32"), c: T.Buffer((1024,), "float32")):
        for i in {loop}:
            with T.sblock("c"):
                v_i = T.axis.remap("S", [i])
                {body}
"""
_LOOP = "range(1024)"
_RIGHT = "c[v_i] = a[v_i] * T.float32(2)"
# 2**40 steps that each need the one before: an hour.
_ENDLESS = """c[v_i] = a[v_i]
                for k in T.serial(T.int64(1099511627776)):
                    c[v_i] = c[v_i] * T.float32(0.999) + a[v_i]"""
_OUTSIDE = "c[T.Cast('int64', v_i) + T.int64(1099511627776)] = a[v_i]"
EXPECTED = {"before": "ok", "endless": "run_timeout", "between": "ok", "outside": "crashed", "after": "ok"}
_BODIES = {"endless": _ENDLESS, "outside": _OUTSIDE}
_TIMEOUT_S = 3.0


def candidates(target):
    """The task, and a kernel for each name of EXPECTED."""
    task = task_of(_module(_RIGHT), "twice", "multiply", 1)
    loop = "T.thread_binding(1024, thread='threadIdx.x')" if target.kind == "cuda" else _LOOP
    modules = [_module(_BODIES.get(name, _RIGHT), loop) for name in EXPECTED]
    return task, [Candidate(task.key, structural_key(mod), 0, (), SimpleNamespace(mod=mod)) for mod in modules]


def _module(body, loop=_LOOP):
    return tvm.script.from_source(_KERNEL.format(body=body, loop=loop))


def measured(target, folder):
    """What becomes of each: status, message and seconds."""
    task, asked = candidates(target)
    options = Measure(repeats=2, min_repeat_ms=1.0, run_timeout_s=_TIMEOUT_S)
    with LocalMeasurer([task], target, options, folder) as measurer:
        (default,) = measurer.measure_defaults([task.key])
        found = dict(zip(EXPECTED, measurer.measure(asked), strict=True))
    return {
        "default": str(default.status),
        "survived": {name: str(each.status) for name, each in found.items()} == EXPECTED,
        "kernels": {
            name: {"status": str(each.status), "message": each.message[-200:], "run_s": round(each.run_s, 2)}
            for name, each in found.items()
        },
    }
