"""Constants of an imported module, evaluated in numpy.

TVM's FoldConstant compiles a kernel for every shape of bias that an importer reshapes: 8 s of a MobileNet's 8.4 s of
lowering. What is left behind constants is a handful of operators, so they are done here, in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["Constants", "fold", "static_shape"]


class Constants:
    """The constants of a function by variable, as numpy arrays: views where possible, copied only when used.

    `learn` each binding in order; `array` gives the value of an argument, `expression` what to put in its place.
    """

    def __init__(self) -> None:
        self._arrays: dict[Any, np.ndarray] = {}
        self._expressions: dict[Any, Any] = {}

    def learn(self, binding: Any) -> bool:
        """Whether the binding's value is a constant; it is remembered. Outputs of the function are left alone."""
        from tvm import relax

        if not isinstance(binding.var, relax.DataflowVar) or not isinstance(binding.value, relax.Call):
            return False
        call = binding.value
        evaluate = _EVALUATE.get(getattr(call.op, "name", ""))
        arguments = [value for item in call.args if (value := self.array(item)) is not None]
        tensors = [item for item in call.args if not isinstance(item, relax.ShapeExpr)]
        if evaluate is None or len(arguments) != len(tensors):
            return False
        self._arrays[binding.var] = evaluate(binding, *arguments)
        return True

    def array(self, expression: Any) -> np.ndarray | None:
        """The value of a constant or of a variable bound to one; None for anything else. Read-only."""
        from tvm import ir

        if isinstance(expression, ir.GenericConst) and expression not in self._arrays:
            self._arrays[expression] = np.from_dlpack(expression.value)  # shares the module's memory
            self._arrays[expression].flags.writeable = False
        return self._arrays.get(expression) if isinstance(expression, (ir.GenericConst, ir.Var)) else None

    def expression(self, variable: Any) -> Any:
        """The Relax constant of a variable, made once; None if it is not constant."""
        if variable not in self._expressions and variable in self._arrays:
            self._expressions[variable] = constant(self._arrays[variable])
        return self._expressions.get(variable)


def fold(module: Any) -> Any:
    """The module with its evaluated constants in place: a new IRModule whose function `main` holds no such binding."""
    from tvm import relax

    @relax.expr_functor.mutator
    class Fold(relax.PyExprMutator):
        constants = Constants()

        def visit_var_binding_(self, binding: Any) -> None:
            if not self.constants.learn(binding):
                super().visit_var_binding_(binding)

        def visit_dataflow_var_(self, op: Any) -> Any:
            value = self.constants.expression(op)
            return super().visit_dataflow_var_(op) if value is None else value

    folder = Fold(module)
    folder.builder_.update_func(module.get_global_var("main"), folder.visit_expr(module["main"]))
    return folder.builder_.get()


def constant(array: np.ndarray) -> Any:
    """A Relax constant that holds an array."""
    import tvm
    from tvm import relax

    return relax.const(tvm.runtime.tensor(np.ascontiguousarray(array).reshape(array.shape)))


def static_shape(expression: Any) -> tuple[int, ...] | None:
    """The shape of a Relax tensor; None where it is no tensor or a size is not known."""
    from tvm import relax, tirx

    shape = getattr(expression.ty, "shape", None)
    if not isinstance(shape, relax.ShapeExpr) or not all(isinstance(size, tirx.IntImm) for size in shape.values):
        return None
    return tuple(int(size) for size in shape.values)


def _reshape(binding: Any, data: np.ndarray) -> np.ndarray:
    shape = static_shape(binding.var)
    assert shape is not None, "a constant's shape is static"
    return data.reshape(shape)


def _transpose(binding: Any, data: np.ndarray) -> np.ndarray:
    axes = binding.value.attrs.axes
    return data.transpose(None if axes is None else [int(axis) for axis in axes])


def _where(binding: Any, condition: np.ndarray, yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    return np.where(condition, yes, no)


_EVALUATE: dict[str, Callable[..., np.ndarray]] = {
    "relax.reshape": _reshape,
    "relax.expand_dims": _reshape,
    "relax.squeeze": _reshape,
    "relax.flatten": _reshape,
    "relax.permute_dims": _transpose,
    "relax.isnan": lambda binding, data: np.isnan(data),
    "relax.where": _where,
}
