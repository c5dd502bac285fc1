"""Packed layouts: which convolutions a model has, and the pass that computes each in the layout chosen for it.

`docs/decisions/0005-packing.md` says why this is not TVM's ConvertLayout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvmlab import packed_ops, plane_ops, winograd
from tvmlab.core import Assignment, Packing
from tvmlab.fold import constant, static_shape
from tvmlab.layout_graph import Graph, Node, Placed, is_view, place, read
from tvmlab.layout_patterns import match_shuffle
from tvmlab.models import Model
from tvmlab.sites import Site, options, reason_against

__all__ = [
    "Site",
    "copies",
    "dense_block_of",
    "options",
    "pack",
    "pack_sites",
    "sites",
    "uniform",
]

# How FuseOps shall treat a function (OpPatternKind in TVM's op_attr_types.h).
_INJECTIVE, _FUSES_EPILOGUE = 2, 4


def sites(model: Model) -> list[Site]:
    """Every convolution of a model, in the order of its graph: conv0, conv1, ..., and its dense layers, dense0, ..."""
    return read(model.module).sites


def uniform(model: Model, block: int, winograd: int = 0, dense_block: int | None = None) -> Assignment:
    """The same block for every convolution that can have it, the others in NCHW.

    With `winograd` 2 or 4, F(2x2, 3x3) or F(4x4, 3x3) where it is possible. Dense layers get `dense_block` (by default
    128, for long runs of memory at batch 1), halved down to `block` where it would pad the features by a quarter.
    """
    assignment = {}
    for site in sites(model):
        if site.kind == "dense":
            choices = [Packing(dense_block_of(site, block, dense_block or max(block, 128)))]
        else:
            choices = [*([Packing(block, f"winograd{winograd}")] if winograd else []), Packing(block)]
        chosen = next((packing for packing in choices if reason_against(site, packing) is None), None)
        if chosen is not None:
            assignment[site.name] = chosen
    return assignment


def dense_block_of(site: Site, smallest: int, largest: int) -> int:
    """The block of a dense layer's features: `largest`, halved down to `smallest` while it pads them by a quarter."""
    block, features = largest, site.weight[1]
    while block > smallest and packed_ops.blocks_of(features, block) * block > 1.25 * features:
        block //= 2
    return max(block, smallest)


def pack(module: Any, assignment: Assignment) -> Any:
    """A Relax module with the sites of an assignment packed; constants are evaluated, unused functions dropped.

    `module` is what TVM's ONNX importer makes (operators not yet legalised, weights as constants), its function `main`
    is rewritten: tensors stay packed from one operator to the next, and are copied to another layout only where a
    reader needs it, once. Raises InputError for a site the module does not have, or a packing it cannot have.
    """
    return pack_sites(module, assignment)[0]


def pack_sites(module: Any, assignment: Assignment) -> tuple[Any, dict[str, Any]]:
    """What `pack` returns, and by site the constant that holds its weights there: it tells the sites' calls apart."""
    from tvm import relax

    graph = read(module)
    packed, weights = _rewrite(module, graph, place(graph, assignment), assignment)
    return relax.transform.DeadCodeElimination()(packed), weights


def _rewrite(
    module: Any, graph: Graph, placed: dict[Any, Placed], assignment: Assignment
) -> tuple[Any, dict[str, Any]]:
    from tvm import relax

    weights: dict[str, Any] = {}
    nodes = {node.result: node for node in graph.nodes}

    @relax.expr_functor.mutator
    class Rewrite(relax.PyExprMutator):
        def visit_var_binding_(self, binding: Any) -> None:
            node = nodes.get(binding.var)
            if node is None or node.role == "part":
                return
            layouts = placed[node.result]
            inputs = [tensors.get(variable, block) for variable, block in zip(node.inputs, layouts.inputs, strict=True)]
            value = _emit(kernels, node, graph, layouts, assignment, inputs)
            if value is None:
                value = _plane(kernels, tensors, nodes, node, graph)
            if node.site is not None:
                weights[node.site.name] = _weight(node, graph) if value is None else value.args[1].fields[1]
            if value is not None:
                tensors.put(binding.var, layouts.result, value)
            else:
                for part in (*node.detail.get("parts", ()), binding):
                    super().visit_var_binding_(part)

        def visit_dataflow_var_(self, op: Any) -> Any:
            value = graph.constants.expression(op)
            return super().visit_dataflow_var_(op) if value is None else value

    rewriter = Rewrite(module)
    kernels = _Kernels(rewriter.builder_)
    tensors = _Tensors(rewriter, kernels, placed)
    rewriter.builder_.update_func(module.get_global_var("main"), rewriter.visit_expr(module["main"]))
    return rewriter.builder_.get(), weights


def _weight(node: Node, graph: Graph) -> Any:
    """The constant that a convolution or dense layer in NCHW reads; None where its weights are not constant."""
    from tvm import ir

    own = node.binding.value.args[1]
    return own if isinstance(own, ir.GenericConst) else graph.constants.expression(own)


def copies(wanted: Sequence[tuple[tuple[int, ...], int, int]]) -> Any:
    """A Relax module whose function `main` does nothing but layout transforms, one binding each, in order.

    A transform is the shape (N, C, H, W) of a tensor, and the blocks it is in and shall be in (0 is NCHW).
    """
    from tvm import relax

    builder = relax.BlockBuilder()
    sources = [
        relax.Var(f"x{number}", relax.TensorType(packed_ops.packed_shape(shape, source), "float32"))
        for number, (shape, source, _) in enumerate(wanted)
    ]
    with builder.function("main", sources):
        kernels = _Kernels(builder)
        with builder.dataflow():
            calls = [
                builder.emit_output(_copy(kernels, variable, shape, source, target))
                for variable, (shape, source, target) in zip(sources, wanted, strict=True)
            ]
        builder.emit_func_output(relax.Tuple(calls))
    return builder.get()


class _Kernels:
    """Calls of TensorIR functions, one function for equal calls: TVM takes 45 ms to make one of Winograd's."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder
        self._calls: dict[Any, Any] = {}

    def call(self, name: str, pattern: int, compute: Any, tensors: list[Any], *numbers: Any) -> Any:
        """Call a compute of packed tensors as a function of a name, which FuseOps shall treat by a pattern."""
        from tvm import relax

        key = (name, *(static_shape(tensor) for tensor in tensors), repr(numbers))
        if key in self._calls:
            known = self._calls[key]
            return relax.call_tir(known.args[0], tensors, known.ty_args[0])
        self._calls[key] = self._builder.call_te(
            compute, *tensors, *numbers, primfunc_name_hint=name, primfunc_attrs={"op_pattern": pattern}
        )
        return self._calls[key]


class _Tensors:
    """The layouts in which each tensor of the old function exists in the new one; others are made when asked for."""

    def __init__(self, rewriter: Any, kernels: _Kernels, placed: dict[Any, Placed]) -> None:
        self._rewriter = rewriter
        self._kernels = kernels
        self._placed = placed
        self._made: dict[tuple[Any, int], Any] = {}

    def put(self, variable: Any, block: int, value: Any) -> None:
        """Bind the result of an operator; what leaves the function does so in NCHW."""
        from tvm import relax

        builder = self._rewriter.builder_
        leaves = not isinstance(variable, relax.DataflowVar)
        if block == 0:
            bound = builder.emit_output(value) if leaves else builder.emit(value)
            self._rewriter.set_var_remap(variable, bound)
            return
        self._made[variable, block] = builder.emit(value)
        if leaves:
            unpacked = _transform(self._kernels, self._made[variable, block], variable, block, 0)
            self._made[variable, 0] = builder.emit_output(unpacked)
            self._rewriter.set_var_remap(variable, self._made[variable, 0])

    def get(self, variable: Any, block: int) -> Any:
        """A tensor in a layout."""
        home = self._placed[variable].result if variable in self._placed else 0
        if block == home == 0:
            return self._rewriter.visit_expr(variable)
        if (variable, block) not in self._made:
            call = _transform(self._kernels, self.get(variable, home), variable, home, block)
            self._made[variable, block] = self._rewriter.builder_.emit(call)
            if block == 0:
                self._rewriter.set_var_remap(variable, self._made[variable, block])
        return self._made[variable, block]


def _transform(kernels: _Kernels, source: Any, variable: Any, home: int, block: int) -> Any:
    """A call that copies a tensor from block `home` to `block`: a view where the bytes stay in order."""
    from tvm import relax

    shape = static_shape(variable)
    assert shape is not None and len(shape) == 4, "only tensors (N, C, H, W) are packed"
    if is_view(shape, home) and is_view(shape, block):
        return relax.op.reshape(source, packed_ops.packed_shape(shape, block))
    return _copy(kernels, source, shape, home, block)


def _copy(kernels: _Kernels, source: Any, shape: tuple[int, ...], home: int, block: int) -> Any:
    channels = shape[1]
    if not home:
        return kernels.call("layout_pack", _INJECTIVE, packed_ops.layout_pack, [source], block)
    if not block:
        return kernels.call("layout_unpack", _INJECTIVE, packed_ops.layout_unpack, [source], channels)
    return kernels.call("layout_repack", _INJECTIVE, packed_ops.layout_repack, [source], channels, block)


def _emit(
    kernels: _Kernels, node: Node, graph: Graph, layouts: Placed, assignment: Assignment, inputs: list[Any]
) -> Any:
    """The packed call of a node; None for what stays as it is, in NCHW."""
    from tvm import relax

    packing = assignment.get(node.site.name, Packing()) if node.site else Packing()
    if node.site is not None:
        return _layer(kernels, node, graph, packing, inputs[0]) if packing.block else None
    if node.role == "view" and any(layouts.inputs):
        return relax.op.reshape(inputs[0], node.shape)
    if not layouts.result:
        return None
    if node.role == "pointwise":
        return _pointwise(node, graph, layouts.result, inputs)
    if node.role == "lrn":
        assert node.shape is not None
        numbers = [node.shape[1], *(node.detail[key] for key in ("size", "alpha", "beta", "bias"))]
        return kernels.call("lrn", _FUSES_EPILOGUE, packed_ops.lrn, inputs, *numbers)
    return _same_operator(node.binding.value, node.role, layouts.result, inputs)


def _layer(kernels: _Kernels, node: Node, graph: Graph, packing: Packing, data: Any) -> Any:
    """A convolution or dense layer with its weights packed ahead of time."""
    site, weight = node.site, graph.constants.array(node.binding.value.args[1])
    assert site is not None and weight is not None
    block, read_block = packing.block, site.input_block(packing.block)
    geometry = [list(site.strides), list(site.padding), list(site.dilation)]
    compute: Any = packed_ops.conv2d
    name = f"{site.kind}_NCHWc"
    numbers: list[Any] = [*geometry, site.groups]
    if site.kind == "dense":
        name, compute, numbers = "dense_pack", packed_ops.dense, [site.weight[1]]
        packed = packed_ops.pack_dense_weight(weight, block)
    elif packing.algorithm != "direct":
        tile = int(packing.algorithm[-1])
        name, compute, numbers = f"conv2d_{packing.algorithm}_NCHWc", winograd.conv2d, [tile, list(site.padding)]
        packed = winograd.transform_weight(weight, tile, read_block, block)
    elif site.kind == "depthwise_conv2d":
        compute, numbers = packed_ops.depthwise_conv2d, geometry
        packed = packed_ops.pack_depthwise_weight(weight, block)
    else:
        packed = packed_ops.pack_weight(weight, read_block, block)
    return kernels.call(name, _FUSES_EPILOGUE, compute, [data, constant(packed)], *numbers)


def _plane(kernels: _Kernels, tensors: _Tensors, nodes: dict[Any, Node], node: Node, graph: Graph) -> Any:
    """A grouped or depthwise convolution in NCHW: ours has a template. None for what stays TVM's operator.

    It reads through a channel shuffle, which then costs nothing: the shuffle itself is dead unless others read it.
    """
    site = node.site
    if site is None or not site.planar:
        return None
    weight = graph.constants.array(node.binding.value.args[1])
    assert weight is not None, "a site without constant weights is refused"
    shuffle = match_shuffle(node.inputs[0], lambda variable: nodes[variable].binding if variable in nodes else None)
    source, groups = shuffle or (node.inputs[0], 1)
    numbers = [list(site.strides), list(site.padding), list(site.dilation), site.groups, groups]
    arguments = [tensors.get(source, 0), constant(weight)]
    return kernels.call(f"{site.kind}_NCHW", _FUSES_EPILOGUE, plane_ops.conv2d, arguments, *numbers)


def _pointwise(node: Node, graph: Graph, block: int, inputs: list[Any]) -> Any:
    from tvm import relax

    call, name = node.binding.value, node.detail.get("binary")
    if name is None:
        return relax.Call(call.op, [inputs[0], *call.args[1:]], call.attrs)
    arguments = call.args[1].fields if call.op.name == "relax.call_tir" else call.args
    packed = dict(zip(node.inputs, inputs, strict=True))
    fill = 1.0 if name == "divide" else 0.0
    sides = []
    for argument in arguments:
        value = graph.constants.array(argument)
        sides.append(packed[argument] if value is None else constant(packed_ops.pack_broadcast(value, block, fill)))
    return getattr(relax.op, name)(*sides)


def _same_operator(call: Any, role: str, block: int, inputs: list[Any]) -> Any:
    """Pooling, means and concatenation: TVM's own operators take a fifth axis, if told of it."""
    from tvm import relax

    attrs, op = call.attrs, relax.op
    if role == "concat":
        return op.concat(inputs, axis=1)
    name = call.op.name.removeprefix("relax.")
    if role == "reduce":
        return getattr(op, name)(inputs[0], axis=[2, 3], keepdims=True)
    return getattr(op.nn, name.removeprefix("nn."))(
        inputs[0],
        pool_size=attrs.pool_size,
        strides=attrs.strides,
        padding=attrs.padding,
        dilation=attrs.dilation,
        ceil_mode=bool(attrs.ceil_mode),
        count_include_pad=bool(attrs.count_include_pad),
        layout=f"NCHW{block}c",
    )
