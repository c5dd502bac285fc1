"""An ONNX graph as a torch module of torch's functions: what a torch user would run, without a converter.

The operators are those of the zoo and a few more; any other is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from tvmlab.core import InputError

__all__ = ["TorchGraph", "unsupported"]

_Function = Callable[..., Any]


class TorchGraph:
    """A prepared ONNX graph (BatchNormalization folded) as a list of calls, one a node, in the graph's order.

    `module` is a torch.nn.Module on `device` ("cpu", "cuda:0") that takes the inputs and gives the outputs, in order;
    the weights are parameters, so that torch.compile may take their addresses for fixed. The graph itself, called with
    the inputs by name (numpy), gives the outputs in order (numpy). Raises InputError naming the operators or attributes
    that it does not know.
    """

    def __init__(self, model: ModelProto, device: str = "cpu") -> None:
        if missing := unsupported(model):
            raise InputError(
                f"the torch baseline does not know the operator{'s'[: len(missing) > 1]} {', '.join(missing)}",
                remedy="leave 'torch' out of the baselines",
            )
        import torch

        self._torch = torch
        self._arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.device = device
        self.nodes = list(model.graph.node)
        self._calls = [(self._call(node), list(node.input), node.output[0]) for node in self.nodes]
        inputs = [value.name for value in model.graph.input if value.name not in self._arrays]
        outputs = [output.name for output in model.graph.output]
        self._inputs = inputs
        self.module = _module(torch, self._calls, self._arrays, inputs, outputs).to(device).eval()

    def tensors(self, inputs: dict[str, np.ndarray]) -> list[Any]:
        """Inputs (numpy) as tensors on the device, in order."""
        return [self._torch.from_numpy(array).to(self.device) for array in inputs.values()]

    def walk(self, tensors: Sequence[Any]) -> Iterator[tuple[_Function, list[Any], Any]]:
        """One inference node by node: its function, arguments and output."""
        known = dict(zip(self._inputs, tensors, strict=True))
        for function, names, output in self._calls:
            for name in names:
                if name in self._arrays and name not in known:
                    known[name] = self._torch.from_numpy(np.array(self._arrays[name])).to(self.device)
            arguments = [known[name] if name else None for name in names]
            known[output] = function(*arguments)
            yield function, arguments, known[output]

    def __call__(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """One inference, eagerly."""
        with self._torch.inference_mode():
            return [tensor.cpu().numpy() for tensor in self.module(*self.tensors(inputs))]

    def _call(self, node: NodeProto) -> _Function:
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        if attributes.pop("auto_pad", b"NOTSET") != b"NOTSET":
            raise InputError(
                f"the torch baseline does not know auto_pad of {node.op_type} ({node.output[0]})",
                remedy="export the model with explicit pads, or leave 'torch' out of the baselines",
            )
        return _OPERATORS[node.op_type](self._torch, attributes, [self._arrays.get(name) for name in node.input])


def _module(
    torch: Any,
    calls: list[tuple[_Function, list[str], str]],
    arrays: dict[str, np.ndarray],
    inputs: list[str],
    outputs: list[str],
) -> Any:
    """The calls as a torch.nn.Module."""
    read = {name for _, names, _ in calls for name in names} | set(outputs)
    constants = {name: f"constant_{number}" for number, name in enumerate(arrays) if name in read}

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, attribute in constants.items():
                tensor = torch.from_numpy(np.array(arrays[name]))
                setattr(self, attribute, torch.nn.Parameter(tensor, requires_grad=False))

        def forward(self, *tensors: Any) -> list[Any]:
            known = dict(zip(inputs, tensors, strict=True))
            for name, attribute in constants.items():
                known[name] = getattr(self, attribute)
            for function, names, output in calls:
                known[output] = function(*[known[name] if name else None for name in names])
            return [known[name] for name in outputs]

    return Graph()


def unsupported(model: ModelProto) -> list[str]:
    """The operator types of a graph that TorchGraph does not know, sorted."""
    return sorted({node.op_type for node in model.graph.node} - set(_OPERATORS))


# Each maker takes torch, a node's attributes and its constant inputs (None for the others), and returns the function of
# the node's inputs.
_Constants = list[np.ndarray | None]


def _conv(torch: Any, given: dict[str, Any], constants: _Constants) -> _Function:
    weight = constants[1]
    rank = len(given["kernel_shape"]) if weight is None else weight.ndim - 2
    padding, extra = _padding(given, rank)
    options = {
        "stride": given.get("strides", [1] * rank),
        "padding": padding,
        "dilation": given.get("dilations", [1] * rank),
        "groups": given.get("group", 1),
    }
    function = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[rank]
    pad = torch.nn.functional.pad
    return lambda x, w, b=None: function(pad(x, extra) if extra else x, w, b, **options)


def _padding(given: dict[str, Any], rank: int) -> tuple[list[int], list[int]]:
    """ONNX pads as torch's symmetric padding; where they are not symmetric, as zeros and what F.pad must add."""
    pads = given.get("pads", [0] * 2 * rank)
    before, after = pads[:rank], pads[rank:]
    if before == after:
        return before, []
    return [0] * rank, [size for pair in reversed(list(zip(before, after, strict=True))) for size in pair]


def _max_pool(torch: Any, given: dict[str, Any], _: _Constants) -> _Function:
    rank = len(given["kernel_shape"])
    padding, extra = _padding(given, rank)
    functional = torch.nn.functional
    function = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}[rank]
    options = {
        "kernel_size": given["kernel_shape"],
        "stride": given.get("strides", [1] * rank),
        "padding": padding,
        "dilation": given.get("dilations", [1] * rank),
        "ceil_mode": bool(given.get("ceil_mode", 0)),
    }
    return lambda x: function(functional.pad(x, extra, value=-math.inf) if extra else x, **options)


def _average_pool(torch: Any, given: dict[str, Any], _: _Constants) -> _Function:
    rank = len(given["kernel_shape"])
    padding, extra = _padding(given, rank)
    functional = torch.nn.functional
    function = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}[rank]
    options = {
        "kernel_size": given["kernel_shape"],
        "stride": given.get("strides", [1] * rank),
        "padding": padding,
        "ceil_mode": bool(given.get("ceil_mode", 0)),
        "count_include_pad": bool(given.get("count_include_pad", 0)),
    }
    if not extra:
        return lambda x: function(x, **options)
    if options["count_include_pad"]:
        return lambda x: function(functional.pad(x, extra), **options)

    def uneven(x: Any) -> Any:
        """The mean over what is not padding: the padded mean over the padded mean of ones."""
        return function(functional.pad(x, extra), **options) / function(
            functional.pad(torch.ones_like(x), extra), **options
        )

    return uneven


def _gemm(torch: Any, given: dict[str, Any], _: _Constants) -> _Function:
    alpha, beta = given.get("alpha", 1.0), given.get("beta", 1.0)

    def call(a: Any, b: Any, c: Any = None) -> Any:
        a, b = a.T if given.get("transA") else a, b.T if given.get("transB") else b
        return alpha * (a @ b) if c is None else torch.addmm(c, a, b, alpha=alpha, beta=beta)

    return call


def _lrn(torch: Any, given: dict[str, Any], _: _Constants) -> _Function:
    options = (given["size"], given.get("alpha", 1e-4), given.get("beta", 0.75), given.get("bias", 1.0))
    return lambda x: torch.nn.functional.local_response_norm(x, *options)


def _reshape(torch: Any, given: dict[str, Any], constants: _Constants) -> _Function:
    if constants[1] is None:
        raise InputError("the torch baseline needs constant shapes", remedy="leave 'torch' out of the baselines")
    sizes = [int(size) for size in constants[1]]
    return lambda x, _: x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(sizes)])


def _softmax(torch: Any, given: dict[str, Any], _: _Constants) -> _Function:
    return lambda x: torch.softmax(x, given.get("axis", -1))


def _concat(torch: Any, given: dict[str, Any], _: _Constants) -> _Function:
    return lambda *parts: torch.cat(parts, given["axis"])


def _transpose(torch: Any, given: dict[str, Any], _: _Constants) -> _Function:
    return lambda x: x.permute(given.get("perm", list(reversed(range(x.dim())))))


def _flatten(torch: Any, given: dict[str, Any], _: _Constants) -> _Function:
    axis = given.get("axis", 1)
    return lambda x: x.reshape(math.prod(x.shape[:axis]), -1)


def _plain(name: str) -> Callable[..., _Function]:
    """A torch function that takes the node's inputs as they are."""
    return lambda torch, given, _: getattr(torch, name)


_OPERATORS: dict[str, Callable[[Any, dict[str, Any], _Constants], _Function]] = {
    "Add": _plain("add"),
    "AveragePool": _average_pool,
    "Clip": _plain("clamp"),
    "Concat": _concat,
    "Conv": _conv,
    "Div": _plain("div"),
    "Flatten": _flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda torch, given, _: lambda x: x.mean(dim=list(range(2, x.dim())), keepdim=True),
    "LRN": _lrn,
    "MatMul": _plain("matmul"),
    "MaxPool": _max_pool,
    "Mul": _plain("mul"),
    "Relu": _plain("relu"),
    "Reshape": _reshape,
    "Sigmoid": _plain("sigmoid"),
    "Softmax": _softmax,
    "Sub": _plain("sub"),
    "Transpose": _transpose,
}
