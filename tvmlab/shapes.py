"""Shapes of ONNX graphs: infer them, and fix the batch size and every other symbolic dimension.

No function here or in `prepare` serialises the weights: onnx's own passes (shape inference, opset
conversion, the checker) see a *skeleton*, a copy in which every large initialiser is a graph input without
data. So they stay quick, and models over protobuf's limit of 2 GB work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.shape_inference
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from tvmlab.core import InputError

__all__ = [
    "Shape",
    "check",
    "constants",
    "data_inputs",
    "infer_shapes",
    "reason",
    "set_shapes",
    "shapes_of",
    "skeleton",
]

# Initialisers up to this many elements may be shapes, axes or bounds, whose values onnx's passes need.
_SMALL_ELEMENTS = 256

Shape = tuple[int | None, ...]


def data_inputs(graph: GraphProto) -> list[ValueInfoProto]:
    """The graph's real inputs: old files list their initialisers among them."""
    stored = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in stored]


def shapes_of(model: ModelProto) -> dict[str, Shape]:
    """Shape of every tensor whose rank the model states; a dimension that is not a number is None."""
    graph = model.graph
    shapes = {
        value.name: tuple(_size(dim) for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }
    return shapes | {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}


def infer_shapes(model: ModelProto, *, strict: bool = False) -> ModelProto:
    """A skeleton of the model with the shape of every tensor that onnx can infer.

    Shapes stated for intermediate tensors and outputs are dropped first, as they may be for another batch
    size. With `strict`, raises onnx.shape_inference.InferenceError where operators do not fit each other.
    """
    bare = skeleton(model)
    del bare.graph.value_info[:]
    for output in bare.graph.output:
        if output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(bare, strict_mode=strict, data_prop=True)


def check(model: ModelProto, what: str) -> None:
    """Raise InputError if the model breaks ONNX's rules; `what` names it."""
    try:
        onnx.checker.check_model(skeleton(model))
    except onnx.checker.ValidationError as error:
        reason = str(error).strip().splitlines()[0].rstrip(" :.")
        raise InputError(f"{what} is not a valid ONNX model ({reason})", remedy="export it again") from None


def set_shapes(model: ModelProto, *, batch: int = 1, dims: dict[str, int] | None = None) -> None:
    """Give every input of the model a fixed shape, in place.

    A symbolic dim 0 becomes `batch`; any other symbolic dimension takes its size from `dims` by its name,
    or by "input[axis]" if it has none. When every input has a fixed dim 0, that is kept for `batch=1`;
    another `batch` replaces it, also where a Reshape repeats it. Raises InputError for a size that is
    missing, unknown or unusable, and when a batch size written into the graph cannot be replaced.
    """
    dims = dims or {}
    free = {
        (value.name, axis): dim.dim_param or f"{value.name}[{axis}]"
        for value in data_inputs(model.graph)
        for axis, dim in enumerate(_tensor_shape(value).dim)
        if _size(dim) is None
    }
    sizes = _sizes(free, batch, dims)
    for value in data_inputs(model.graph):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if (value.name, axis) in free:
                dim.dim_value = sizes[free[value.name, axis]]
    if batch != 1 and not any(axis == 0 for _, axis in free):
        _replace_batch(model, batch)
    try:
        inferred = infer_shapes(model, strict=bool(free))
    except onnx.shape_inference.InferenceError as error:
        raise InputError(f"sizes {sizes} do not fit the model ({reason(error)})", remedy="pass others") from None
    del model.graph.value_info[:]
    for output, known in zip(model.graph.output, inferred.graph.output, strict=True):
        output.type.CopyFrom(known.type)


def _sizes(free: dict[tuple[str, int], str], batch: int, dims: dict[str, int]) -> dict[str, int]:
    """The size of every free dimension by name; a name given in `dims` is not a batch, wherever it stands."""
    names = set(free.values())
    if unknown := sorted(set(dims) - names):
        known = f"its free dimensions are {', '.join(sorted(names))}" if names else "all its shapes are fixed"
        raise InputError(f"the model has no symbolic dimension {unknown[0]!r}", remedy=known)
    for name, size in dims.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InputError(f"dims gives {name!r} the size {size!r}", remedy="pass an integer of at least 1")
    batch_names = {name for (_, axis), name in free.items() if axis == 0} - set(dims)
    if missing := sorted(names - batch_names - set(dims)):
        example = ", ".join(f"{name!r}: 128" for name in missing)
        raise InputError(
            f"the model has symbolic dimensions without a size: {', '.join(missing)}",
            remedy=f"pass their sizes, such as dims={{{example}}}",
        )
    return {**dict.fromkeys(batch_names, batch), **dims}


def _tensor_shape(value: ValueInfoProto) -> Any:
    if not value.type.tensor_type.HasField("shape"):
        raise InputError(
            f"input {value.name!r} of the model is not a tensor of known rank",
            remedy="export it with a fixed rank",
        )
    return value.type.tensor_type.shape


def _replace_batch(model: ModelProto, batch: int) -> None:
    """Replace a batch size that the inputs, and the Reshapes after them, state as a number."""
    before = shapes_of(infer_shapes(model))
    inputs = [value.name for value in data_inputs(model.graph)]
    old = {before[name][:1] for name in inputs}
    remedy = "export the model with a symbolic batch dimension, or leave batch out"
    if len(old) != 1 or old == {()}:
        raise InputError(f"cannot set batch={batch}: the inputs' first dimensions differ", remedy=remedy)
    ((size,),) = old
    if size == batch:
        return
    for value in data_inputs(model.graph):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    known = dict(constants(model.graph))
    for node in model.graph.node:
        if node.op_type == "Reshape" and len(node.input) > 1 and node.input[1] in known:
            target = numpy_helper.to_array(known[node.input[1]])
            if before.get(node.input[0], ())[:1] == (size,) and target[:1].tolist() == [size]:
                name = f"{node.output[0]}__shape"
                model.graph.initializer.append(numpy_helper.from_array(np.r_[batch, target[1:]], name))
                node.input[1] = name
    try:
        after = shapes_of(infer_shapes(model, strict=True))
    except onnx.shape_inference.InferenceError as error:
        raise InputError(f"cannot set batch={batch}: {reason(error)}", remedy=remedy) from None
    for node, name in _activations(model.graph, inputs):
        shape = before.get(name)
        if not shape or None in shape or after.get(name) != (batch, *shape[1:]) or shape[0] != size:
            raise InputError(
                f"cannot set batch={batch}: the shape of {name!r} ({node.op_type}) does not follow the "
                f"inputs' batch ({shape} becomes {after.get(name)})",
                remedy=remedy,
            )


def _activations(graph: GraphProto, inputs: Iterable[str]) -> Iterator[tuple[NodeProto, str]]:
    """Tensors computed from the values of the inputs (not of their shapes), if used, with producers."""
    reached = set(inputs)
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for node in graph.node:
        sources = node.input[:1] if node.op_type in ("Reshape", "Expand", "Tile") else node.input
        if node.op_type not in ("Shape", "Size") and reached.intersection(sources):
            reached.update(node.output)
            yield from ((node, name) for name in node.output if name in used)


def skeleton(model: ModelProto) -> ModelProto:
    """A copy of the model in which large initialisers are graph inputs without data."""
    graph = model.graph
    # Older graphs list every initialiser as an input, which hides from optimisers that it is constant.
    copy = ModelProto(ir_version=max(model.ir_version, 8))
    for field in ("opset_import", "functions", "metadata_props"):
        getattr(copy, field).extend(getattr(model, field))
    copy.graph.name = graph.name or "main"
    copy.graph.input.extend(data_inputs(graph))
    for field in ("node", "output", "value_info"):
        getattr(copy.graph, field).extend(getattr(graph, field))
    for tensor in graph.initializer:
        if int(np.prod(tensor.dims)) <= _SMALL_ELEMENTS:
            copy.graph.initializer.append(tensor)
        else:
            copy.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return copy


def constants(graph: GraphProto) -> Iterator[tuple[str, TensorProto]]:
    """Initialisers and the tensors of Constant nodes, by name."""
    yield from ((tensor.name, tensor) for tensor in graph.initializer)
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            yield node.output[0], node.attribute[0].t


def _size(dim: Any) -> int | None:
    """A dimension's size; None if it is symbolic (some exporters write 0 or -1 for that)."""
    return dim.dim_value if dim.dim_value > 0 else None


def reason(error: Exception) -> str:
    """The telling line of an error of onnx's C++ side, which starts with file names."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
