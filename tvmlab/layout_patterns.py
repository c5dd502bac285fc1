"""Which operators of TVM's ONNX importer the packing pass knows, and what it needs to know of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tvmlab.fold import Constants, static_shape
from tvmlab.sites import Site

__all__ = ["LrnMatch", "Match", "classify", "match_lrn", "match_shuffle"]

# Pointwise operators of one tensor. Padded channels hold 0 or what these make of it, which must stay finite: a weight
# of 0 does not undo an infinity. The exact ones are packed only where no channel is padded.
_UNARY = {
    "abs", "ceil", "clip", "cos", "erf", "floor", "negative", "nn.gelu", "nn.gelu_tanh", "nn.leakyrelu", "nn.relu",
    "nn.silu", "round", "sigmoid", "sign", "sin", "square", "tanh",
}  # fmt: skip
_EXACT_UNARY = {"exp", "log", "rsqrt", "sqrt"}
_BINARY = {"add", "subtract", "multiply", "divide", "maximum", "minimum", "power"}
_REDUCE = {"mean", "max", "sum"}


@dataclass(frozen=True)
class Match:
    """What an operator is (the roles of `layout_graph.Node`) and which expressions it reads as tensors."""

    role: str
    inputs: tuple[Any, ...]
    site: Site | None = None
    exact: bool = False
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LrnMatch:
    """The variables inside an LRN, in order; what it normalises; and its size, alpha, beta and bias."""

    inner: list[Any]
    source: Any
    detail: dict[str, Any]


def classify(module: Any, binding: Any, constants: Constants) -> Match | None:
    """The match of a binding; None for what must be computed in NCHW."""
    from tvm import relax

    call = getattr(binding, "value", None)
    shape = static_shape(binding.var)
    if not isinstance(call, relax.Call) or shape is None:
        return None
    name = getattr(call.op, "name", "").removeprefix("relax.")
    if name == "matmul":
        return _dense(call, shape, constants)
    if name in ("reshape", "flatten"):
        return Match("view", (call.args[0],))
    if len(shape) != 4:
        return None
    if name == "call_tir":
        return _extremum(module, call, shape, constants)
    if name in _UNARY | _EXACT_UNARY:
        detail = {"name": name.removeprefix("nn.")}
        return Match("pointwise", (call.args[0],), exact=name in _EXACT_UNARY, detail=detail)
    if name in _BINARY:
        return _binary(name, tuple(call.args), shape, constants)
    matcher: Callable[..., Match | None] | None = _STRUCTURED.get(name)
    return matcher(call, shape, constants) if matcher else None


def _conv(call: Any, shape: tuple[int, ...], constants: Constants) -> Match | None:
    data, weight = call.args[0], constants.array(call.args[1])
    data_shape, weight_shape = static_shape(data), static_shape(call.args[1])
    if data_shape is None or weight_shape is None or constants.array(data) is not None:
        return None
    attrs, groups = call.attrs, int(call.attrs.groups)
    kind = "conv2d" if groups == 1 else "grouped_conv2d"
    if groups > 1 and groups == weight_shape[0] == data_shape[1]:
        kind = "depthwise_conv2d"
    refused = ""
    if weight is None:
        refused = "its weights are computed while the model runs"
    elif weight.dtype != np.float32 or str(call.ty.dtype) != "float32":
        refused = f"its tensors are {call.ty.dtype!s}, packing is for float32"
    elif (attrs.data_layout, attrs.kernel_layout, attrs.out_layout or "NCHW") != ("NCHW", "OIHW", "NCHW"):
        refused = f"it is in {attrs.data_layout} already"
    top, left, bottom, right = (int(size) for size in attrs.padding)
    site = Site(
        name="",
        kind=kind,
        data=data_shape,
        weight=weight_shape,
        output=shape,
        strides=_pair(attrs.strides),
        padding=(top, left, bottom, right),
        dilation=_pair(attrs.dilation),
        groups=groups,
        refused=refused,
    )
    return Match("conv", (data, call.args[1]), site)


def _dense(call: Any, shape: tuple[int, ...], constants: Constants) -> Match | None:
    data, weight = call.args[0], constants.array(call.args[1])
    data_shape = static_shape(data)
    if weight is None or weight.ndim != 2 or data_shape is None or len(data_shape) < 2:
        return None
    refused = "" if weight.dtype == np.float32 else f"its weights are {weight.dtype}, packing is for float32"
    site = Site("", "dense", data_shape, (int(weight.shape[0]), int(weight.shape[1])), shape, refused=refused)
    return Match("dense", (data,), site)


def _extremum(module: Any, call: Any, shape: tuple[int, ...], constants: Constants) -> Match | None:
    """The importer makes a Clip of two calls of TensorIR functions that it has generated."""
    from tvm import ir, tirx

    function, arguments = module[call.args[0]], call.args[1].fields
    blocks = function.body.block.body
    while isinstance(blocks, tirx.For):
        blocks = blocks.body
    body = getattr(getattr(blocks, "block", None), "body", None)
    names = {tirx.Max: "maximum", tirx.Min: "minimum"}
    if not isinstance(body, tirx.BufferStore) or type(body.value) not in names or len(arguments) != 2:
        return None
    value = body.value
    if not all(isinstance(side, ir.TensorLoad) for side in (value.a, value.b)):
        return None
    return _binary(names[type(value)], tuple(arguments), shape, constants)


def _binary(name: str, arguments: tuple[Any, ...], shape: tuple[int, ...], constants: Constants) -> Match | None:
    """Both sides must have all channels, or be constants that broadcast to them."""
    tensors = [item for item in arguments if constants.array(item) is None]
    for item in arguments:
        value = constants.array(item)
        size = static_shape(item)
        if size is None or (value is None and (len(size) != 4 or size[1] != shape[1])):
            return None
        if value is not None and (value.ndim > 4 or (value.ndim > 2 and value.shape[-3] not in (1, shape[1]))):
            return None
    if not any(static_shape(item) == shape for item in tensors):
        return None
    # In padded channels a constant divisor is 1; anything else may be 0.
    exact = name == "power" or (name == "divide" and constants.array(arguments[1]) is None)
    return Match("pointwise", arguments, exact=exact, detail={"name": name, "binary": name})


def _pool(call: Any, shape: tuple[int, ...], constants: Constants) -> Match | None:
    return Match("pool", (call.args[0],)) if call.attrs.layout == "NCHW" else None


def _reduce(call: Any, shape: tuple[int, ...], constants: Constants) -> Match | None:
    axes = call.attrs.axis
    spatial = axes is not None and sorted(int(axis) % 4 for axis in axes) == [2, 3]
    return Match("reduce", (call.args[0],)) if spatial and call.attrs.keepdims else None


def _concat(call: Any, shape: tuple[int, ...], constants: Constants) -> Match | None:
    from tvm import relax

    parts = call.args[0]
    if not isinstance(parts, relax.Tuple) or call.attrs.axis is None or int(call.attrs.axis) % 4 != 1:
        return None
    if any(constants.array(part) is not None or static_shape(part) is None for part in parts.fields):
        return None
    return Match("concat", tuple(parts.fields))


_STRUCTURED: dict[str, Callable[..., Match | None]] = {
    "nn.conv2d": _conv,
    "nn.max_pool2d": _pool,
    "nn.avg_pool2d": _pool,
    "concat": _concat,
    **dict.fromkeys(_REDUCE, _reduce),
}


# An LRN as imported, from its last operator to its first, and the argument of each that leads there.
_LRN = (
    ("divide", 1),
    ("power", 0),
    ("add", 0),
    ("multiply", 0),
    ("squeeze", 0),
    ("nn.avg_pool3d", 0),
    ("expand_dims", 0),
    ("multiply", 0),
)


def match_lrn(binding: Any, producer: Callable[[Any], Any], constants: Constants) -> LrnMatch | None:
    """What the importer makes of an LRN: x / (bias + alpha * avg_pool3d(x * x))^beta, seen from its last operator.

    `producer` gives the binding of a variable, None for others.
    """
    chain = []
    for name, argument in _LRN:
        call = getattr(binding, "value", None)
        if getattr(getattr(call, "op", None), "name", "") != f"relax.{name}":
            return None
        chain.append(binding)
        binding = producer(call.args[argument])  # type: ignore[union-attr]
    divide, power, add, scale, _, pool, expand, square = (found.value for found in chain)
    source, window = divide.args[0], [int(size) for size in pool.attrs.pool_size]
    numbers = [constants.array(call.args[1]) for call in (scale, power, add)]
    if not (
        all(number is not None and number.size == 1 for number in numbers)
        and all(side.same_as(source) for side in square.args)
        and [int(axis) for axis in expand.attrs.axis] == [1]
        and window == [window[0], 1, 1]
        and [int(size) for size in pool.attrs.padding] == [window[0] // 2, 0, 0, window[0] // 2, 0, 0]
        and [int(stride) for stride in pool.attrs.strides] == [1, 1, 1]
        and pool.attrs.count_include_pad
        and len(static_shape(source) or ()) == 4
    ):
        return None
    alpha, beta, bias = (float(number.item()) for number in numbers if number is not None)
    detail = {"size": window[0], "alpha": alpha, "beta": beta, "bias": bias}
    return LrnMatch([found.var for found in reversed(chain[1:])], source, detail)


def match_shuffle(variable: Any, producer: Callable[[Any], Any]) -> tuple[Any, int] | None:
    """What a variable is the channel shuffle of, and the number of groups; None if it is none.

    Zhang et al., "ShuffleNet" (CVPR 2018, section 3.1): (N, G*n, H, W) is reshaped to (N, G, n, H, W), its channel axes
    are exchanged, and it is reshaped back.
    """
    found: list[tuple[Any, tuple[int, ...] | None]] = []
    for name in ("reshape", "permute_dims", "reshape"):
        call: Any = getattr(producer(variable), "value", None)
        if getattr(getattr(call, "op", None), "name", "") != f"relax.{name}":
            return None
        found.append((call, static_shape(variable)))
        variable = call.args[0]
    (_, shape), (exchange, exchanged), _ = found
    if shape is None or shape != static_shape(variable) or exchanged is None or len(shape) != 4:
        return None
    axes = [int(axis) for axis in exchange.attrs.axes or ()]
    batch, _, *image = shape
    if axes != [0, 2, 1, 3, 4] or exchanged[0] != batch or list(exchanged[3:]) != image:
        return None
    return variable, exchanged[2]


def _pair(values: Any) -> tuple[int, int]:
    first, second = (int(value) for value in values)
    return first, second
