"""Rewrite on the ONNX graph what TVM imports badly or slowly.

TVM keeps an inference-time BatchNormalization as subtract, divide, multiply and add, and imports `Sum` as
broadcast, stack and sum, which also stops layout conversion.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx
import onnx.inliner
import onnx.reference
import onnx.version_converter
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx.numpy_helper import from_array, to_array

from tvmlab.core import InputError
from tvmlab.shapes import infer_shapes, reason, shapes_of, skeleton

__all__ = ["MIN_OPSET", "op_types", "prepare", "with_identifiers"]

# From here on operators take axes, ratios and bounds as inputs, the form TVM's importer knows best.
MIN_OPSET = 13
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_FOLDABLE = {
    "Cast",
    "Concat",
    "ConstantOfShape",
    "Gather",
    "Identity",
    "Reshape",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}


def prepare(model: ModelProto) -> ModelProto:
    """A new model that computes the same in a form that TVM compiles well.

    Opset at least 13; local functions inlined; constants folded; Identity and Dropout dropped;
    BatchNormalization (and Mul or Add by per-channel constants) folded into the convolution before it,
    otherwise into one Mul and one Add; Sum as a chain of Add; unused initialisers dropped; shapes inferred.
    Inputs must have fixed shapes (`set_shapes`). Raises InputError if the opset cannot be converted.
    """
    graph = _Graph(infer_shapes(_modern(skeleton(model))), {tensor.name: tensor for tensor in model.graph.initializer})
    for rewrite in (_fold_constants, _drop_no_ops, _fold_affine, _split_sums):
        rewrite(graph)
    return graph.model()


def _modern(bare: ModelProto) -> ModelProto:
    """The same graph without local functions, in an opset of at least MIN_OPSET."""
    if bare.functions:
        bare = onnx.inliner.inline_local_functions(bare)
    opset = next((entry.version for entry in bare.opset_import if entry.domain in ("", "ai.onnx")), MIN_OPSET)
    if opset >= MIN_OPSET:
        return bare
    try:
        return onnx.version_converter.convert_version(bare, MIN_OPSET)
    except Exception as error:  # noqa: BLE001  the converter raises whatever its C++ side threw
        raise InputError(
            f"cannot convert the model from opset {opset} to {MIN_OPSET} ({reason(error)})",
            remedy=f"export it again with opset {MIN_OPSET} or newer",
        ) from None


def with_identifiers(model: ModelProto) -> ModelProto:
    """The model with inputs that are named as identifiers, in the same order; the model itself where they are.

    TVM names a CUDA kernel's parameters after them, and `gpu_0/data_0` does not compile.
    """
    taken = {value.name for value in (*model.graph.input, *model.graph.initializer)}
    taken |= {name for node in model.graph.node for name in (*_reads(node), *node.output)}
    names: dict[str, str] = {}
    for value in model.graph.input:
        if not _IDENTIFIER.fullmatch(value.name):
            plain = re.sub(r"\W", "_", value.name, flags=re.ASCII)
            plain = plain if _IDENTIFIER.fullmatch(plain) else f"input_{plain}"
            while plain in taken:
                plain += "_"
            taken.add(plain)
            names[value.name] = plain
    if not names or names.keys() & {value.name for value in model.graph.output}:
        return model
    renamed = ModelProto()
    renamed.CopyFrom(model)
    for value in renamed.graph.input:
        value.name = names.get(value.name, value.name)
    for node in renamed.graph.node:
        _rename_inputs(node, names)
    return renamed


def _rename_inputs(node: NodeProto, names: dict[str, str]) -> None:
    """Have a node read other names, in the graphs nested in it too."""
    node.input[:] = [names.get(name, name) for name in node.input]
    for nested in _nested(node):
        for inner in nested.node:
            _rename_inputs(inner, names)


class _Graph:
    """The graph under rewriting: nodes in order, and constants by name, decoded when a pass asks for them."""

    def __init__(self, skeleton: ModelProto, initializers: dict[str, TensorProto]) -> None:
        self._skeleton = skeleton
        self.nodes: list[NodeProto] = list(skeleton.graph.node)
        self.constants: dict[str, TensorProto] = {t.name: t for t in skeleton.graph.initializer} | initializers
        self.inputs = [value for value in skeleton.graph.input if value.name not in self.constants]
        self.outputs = list(skeleton.graph.output)
        self.output_names = {value.name for value in self.outputs}
        self.shapes = shapes_of(skeleton)

    def array(self, name: str) -> np.ndarray:
        return to_array(self.constants[name])

    def add_constant(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = from_array(value, name)
        return name

    def uses(self) -> Counter[str]:
        """How often each tensor is read, as an output of the graph too."""
        return Counter(name for node in self.nodes for name in _reads(node)) + Counter(self.output_names)

    def model(self) -> ModelProto:
        """The rewritten graph as a model, with inferred shapes."""
        made = ModelProto(ir_version=max(self._skeleton.ir_version, 8), producer_name="tvmlab")
        made.opset_import.extend(self._skeleton.opset_import)
        used = self.uses()
        made.graph.name = self._skeleton.graph.name
        made.graph.node.extend(self.nodes)
        made.graph.input.extend(self.inputs)
        made.graph.output.extend(self.outputs)
        made.graph.initializer.extend(tensor for name, tensor in self.constants.items() if used[name])
        inferred = infer_shapes(made).graph
        made.graph.value_info.extend(inferred.value_info)
        for output, known in zip(made.graph.output, inferred.output, strict=True):
            output.type.CopyFrom(known.type)
        return made


def _fold_constants(graph: _Graph) -> None:
    """Turn Constant nodes, the Shape of fixed shapes, and re-arrangements of constants into initialisers."""
    kept = []
    for node in graph.nodes:
        value = _constant_value(graph, node)
        if value is None:
            kept.append(node)
        else:
            graph.add_constant(node.output[0], value)
    graph.nodes = kept


def _constant_value(graph: _Graph, node: NodeProto) -> np.ndarray | None:
    """What the node computes whatever the input, or None."""
    if node.domain not in ("", "ai.onnx") or len(node.output) != 1 or node.output[0] in graph.output_names:
        return None
    if node.op_type == "Shape":
        shape = graph.shapes.get(node.input[0], (None,))
        if None in shape:
            return None
        ends = {attribute.name: attribute.i for attribute in node.attribute}
        return np.array(shape[ends.get("start", 0) : ends.get("end", len(shape))], dtype=np.int64)
    if node.op_type == "Constant":
        if node.attribute[0].name == "sparse_value":
            return None
    elif node.op_type not in _FOLDABLE or any(name and name not in graph.constants for name in node.input):
        return None
    feeds = {name: graph.array(name) for name in node.input if name}
    try:
        return np.asarray(onnx.reference.ReferenceEvaluator(node).run(None, feeds)[0])
    except Exception:  # noqa: BLE001  the evaluator does not know every type; the node is then left to TVM
        return None


def _drop_no_ops(graph: _Graph) -> None:
    """Drop Identity, inference-time Dropout and Sum of one: their readers read their input instead."""
    used, renamed = graph.uses(), dict[str, str]()
    nested = {name for node in graph.nodes for inner in _nested(node) for n in inner.node for name in _reads(n)}
    kept = []
    for node in graph.nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        passes = (
            node.op_type == "Identity"
            or (node.op_type == "Sum" and len(node.input) == 1)
            or (node.op_type == "Dropout" and _is_inactive(graph, node) and not any(used[n] for n in node.output[1:]))
        )
        if not passes or node.output[0] in nested:
            kept.append(node)
        elif node.output[0] not in graph.output_names:
            renamed[node.output[0]] = node.input[0]
        else:
            kept.append(helper.make_node("Identity", [node.input[0]], [node.output[0]], name=node.name))
    graph.nodes = kept


def _is_inactive(graph: _Graph, dropout: NodeProto) -> bool:
    """Whether a Dropout is not in training mode (its third input)."""
    training = dropout.input[2] if len(dropout.input) > 2 else ""
    return not training or (training in graph.constants and not graph.array(training).any())


def _split_sums(graph: _Graph) -> None:
    """Rewrite Sum of n tensors as n - 1 Adds."""
    made = []
    for node in graph.nodes:
        if node.op_type != "Sum" or len(node.input) == 1:
            made.append(node)
            continue
        total = node.input[0]
        for number, term in enumerate(node.input[1:], start=2):
            result = node.output[0] if number == len(node.input) else f"{node.output[0]}__sum{number}"
            made.append(helper.make_node("Add", [total, term], [result], name=node.name and f"{node.name}_{number}"))
            total = result
    graph.nodes = made


def _fold_affine(graph: _Graph) -> None:
    """Fold each chain of per-channel BatchNormalization, Mul and Add into the Conv before, or into Mul, Add.

    y = scale * x + shift with scale = gamma / sqrt(variance + epsilon), shift = beta - scale * mean (Ioffe
    and Szegedy, "Batch Normalization", ICML 2015, algorithm 2), composed along the chain in float64.
    """
    reader = {name: node for node in graph.nodes for name in _reads(node)}
    used = graph.uses()
    replaced: dict[int, list[NodeProto]] = {}
    for node in graph.nodes:
        if id(node) in replaced:
            continue
        conv = node if node.op_type == "Conv" and _constant_weights(graph, node) else None
        chain, last = [], conv
        follower = _only_reader(graph, conv.output[0], reader, used) if conv else node
        while follower is not None and (affine := _affine(graph, follower, last)) is not None:
            chain.append(affine)
            last = follower
            replaced[id(follower)] = []
            follower = _only_reader(graph, follower.output[0], reader, used)
        if not chain or last is None:
            continue
        scale = np.prod([a for a, _ in chain], axis=0)
        shift = np.zeros_like(scale)
        for a, b in chain:
            shift = a * shift + b
        start = conv or node
        made = (_scaled_conv if conv else _mul_add)(graph, start, last.output[0], scale, shift)
        replaced[id(start)] = []
        replaced[id(last)] = made
    graph.nodes = [made for node in graph.nodes for made in replaced.get(id(node), [node])]


def _only_reader(graph: _Graph, name: str, reader: dict[str, NodeProto], used: Counter[str]) -> NodeProto | None:
    """The one node that reads a tensor, if there is just one and the tensor is not a result of the graph."""
    return reader.get(name) if used[name] == 1 and name not in graph.output_names else None


def _constant_weights(graph: _Graph, conv: NodeProto) -> bool:
    return all(name in graph.constants for name in conv.input[1:] if name)


def _affine(graph: _Graph, node: NodeProto, before: NodeProto | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and shift, float64 of shape (channels,), if the node is a per-channel affine map; else None.

    A chain starts at a Conv or at a BatchNormalization: a lone Mul or Add (`before` is None) is left as it
    is.
    """
    if node.op_type == "BatchNormalization":
        return _batch_norm(graph, node)
    if node.op_type not in ("Mul", "Add") or before is None:
        return None
    data, constant = node.input if node.input[1] in graph.constants else reversed(node.input)
    shape = graph.shapes.get(data, ())
    if constant not in graph.constants or data != before.output[0] or len(shape) < 2 or shape[1] is None:
        return None
    value = graph.array(constant)
    aligned = (1,) * (len(shape) - value.ndim) + value.shape
    if len(aligned) != len(shape) or aligned[1] not in (1, shape[1]) or value.size != aligned[1]:
        return None
    per_channel = np.broadcast_to(value.astype(np.float64).reshape(-1), (shape[1],))
    zero, one = np.zeros(shape[1]), np.ones(shape[1])
    return (per_channel, zero) if node.op_type == "Mul" else (one, per_channel)


def _batch_norm(graph: _Graph, node: NodeProto) -> tuple[np.ndarray, np.ndarray] | None:
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    rank = len(graph.shapes.get(node.input[0], ()))
    if attributes.get("training_mode") or rank < 2 or any(name not in graph.constants for name in node.input[1:]):
        return None
    gamma, beta, mean, variance = (graph.array(name).astype(np.float64) for name in node.input[1:])
    scale = gamma / np.sqrt(variance + attributes.get("epsilon", 1e-5))
    return scale, beta - scale * mean


def _scaled_conv(graph: _Graph, conv: NodeProto, output: str, scale: np.ndarray, shift: np.ndarray) -> list[NodeProto]:
    """The convolution with the affine map in its weights and bias; with groups too, axis 0 is the channel."""
    weight = graph.array(conv.input[1])
    bias = graph.array(conv.input[2]).astype(np.float64) if len(conv.input) > 2 and conv.input[2] else 0.0
    per_filter = scale.reshape(-1, *[1] * (weight.ndim - 1))
    folded = NodeProto()
    folded.CopyFrom(conv)
    folded.input[:] = [
        conv.input[0],
        graph.add_constant(f"{output}__weight", (weight * per_filter).astype(weight.dtype)),
        graph.add_constant(f"{output}__bias", (scale * bias + shift).astype(weight.dtype)),
    ]
    folded.output[:] = [output]
    return [folded]


def _mul_add(graph: _Graph, start: NodeProto, output: str, scale: np.ndarray, shift: np.ndarray) -> list[NodeProto]:
    dtype = graph.array(start.input[1]).dtype
    column = (-1, *[1] * (len(graph.shapes[start.input[0]]) - 2))
    a = graph.add_constant(f"{output}__scale", scale.reshape(column).astype(dtype))
    b = graph.add_constant(f"{output}__shift", shift.reshape(column).astype(dtype))
    return [
        helper.make_node("Mul", [start.input[0], a], [f"{output}__scaled"], name=f"{output}__mul"),
        helper.make_node("Add", [f"{output}__scaled", b], [output], name=f"{output}__add"),
    ]


def _nested(node: NodeProto) -> list[GraphProto]:
    graphs = [attribute.g for attribute in node.attribute if attribute.type == AttributeProto.GRAPH]
    return graphs + [graph for attribute in node.attribute for graph in attribute.graphs]


def _reads(node: NodeProto) -> Iterator[str]:
    """Every tensor a node reads, those that its nested graphs take from outside included."""
    yield from filter(None, node.input)
    for graph in _nested(node):
        yield from (value.name for value in graph.output)
        for inner in graph.node:
            yield from _reads(inner)


def op_types(graph: GraphProto | FunctionProto) -> set[str]:
    """Every operator type of a graph and of the graphs nested in it (the branches of an If)."""
    return {node.op_type for node in graph.node}.union(
        *(op_types(nested) for node in graph.node for nested in _nested(node))
    )
