"""What the packing pass sees of a model: its convolutions and dense layers, and in which layout each tensor is.

`read` cuts a Relax function into nodes, `place` gives every node its layout under an assignment. Neither builds
anything, so a layout search can compare thousands of assignments.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from math import prod
from typing import Any

from tvmlab.core import Assignment, InputError, Packing
from tvmlab.fold import Constants, static_shape
from tvmlab.layout_patterns import Match, classify, match_lrn
from tvmlab.sites import Site, reason_against

__all__ = ["Graph", "Node", "Placed", "Transform", "place", "read", "transforms"]


@dataclass(eq=False)
class Node:
    """One operator: what it reads (variables that are not constants) and makes, and what the pass can do with it.

    `role` is "conv", "dense", "pointwise", "pool", "reduce", "concat", "lrn", "view" (a reshape), "part" (of the
    node after it) or "other", which is computed in NCHW. `exact` operators would make infinities of padded channels.
    """

    role: str
    binding: Any
    inputs: tuple[Any, ...]
    shape: tuple[int, ...] | None
    site: Site | None = None
    exact: bool = False
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def result(self) -> Any:
        """The variable that the node defines."""
        return self.binding.var


@dataclass(eq=False)
class Graph:
    """The nodes of a function in order, its constants, and the variables that leave it."""

    nodes: list[Node]
    constants: Constants
    outputs: list[Any]

    @property
    def sites(self) -> list[Site]:
        """The convolutions and dense layers, in order."""
        return [node.site for node in self.nodes if node.site]


@dataclass(frozen=True)
class Placed:
    """The layout of a node's result and of each of its inputs, as block sizes; 0 is NCHW."""

    result: int
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """A tensor of `shape` (N, C, H, W) that must be copied from one layout to another (block sizes, 0 is NCHW)."""

    tensor: str
    shape: tuple[int, ...]
    source: int
    target: int


def read(module: Any) -> Graph:
    """The nodes of a module's function `main`, which is what TVM's ONNX importer makes."""
    from tvm import relax

    constants = Constants()
    bindings = [binding for block in module["main"].body.blocks for binding in block.bindings]
    nodes: list[Node] = []
    producers: dict[Any, Node] = {}
    counts: dict[str, int] = defaultdict(int)
    for binding in bindings:
        if constants.learn(binding):
            continue
        node = _node(module, binding, constants, producers)
        if node.site is not None:
            kind = "dense" if node.role == "dense" else "conv"
            node.site = node.site.named(f"{kind}{counts[kind]}")
            counts[kind] += 1
        nodes.append(node)
        producers[binding.var] = node
    outputs = [binding.var for binding in bindings if not isinstance(binding.var, relax.DataflowVar)]
    graph = Graph(nodes, constants, outputs)
    _find_lrn(graph, producers)
    _find_epilogues(graph)
    return graph


def place(graph: Graph, assignment: Assignment) -> dict[Any, Placed]:
    """The layouts of every node under an assignment, by the variable it defines; sites it does not name are NCHW.

    A convolution reads and writes its own block. What follows it stays in that layout as long as it can: a pointwise
    operator of several tensors in the layout of the largest (of the last made, among equals, so that it can be fused
    to the convolution that made it), a concatenation in the layout that most of its elements have. Raises InputError
    for a packing that a convolution cannot have, and for a site that the model does not have.
    """
    _check(graph, assignment)
    placed: dict[Any, Placed] = {}
    homes: dict[Any, int] = {}
    for node in graph.nodes:
        block, read = _layout(node, homes, assignment)
        homes[node.result] = block
        placed[node.result] = Placed(block, (read,) * len(node.inputs))
    return placed


def transforms(graph: Graph, placed: dict[Any, Placed]) -> list[Transform]:
    """The layout transforms that a placement needs, each once."""
    found: dict[tuple[Any, int], Transform] = {}

    def need(variable: Any, block: int) -> None:
        home = placed[variable].result if variable in placed else 0
        if home != block and (variable, block) not in found:
            shape = static_shape(variable)
            assert shape is not None
            found[variable, block] = Transform(variable.name, shape, home, block)

    for node in graph.nodes:
        for variable, block in zip(node.inputs, placed[node.result].inputs, strict=True):
            need(variable, block)
    for variable in graph.outputs:
        need(variable, 0)
    return list(found.values())


def is_view(shape: tuple[int, ...] | None, block: int) -> bool:
    """Whether a packed tensor of an (N, C, H, W) shape has its bytes in the order of NCHW: it is one pixel, unpadded.

    >>> is_view((1, 32, 1, 1), 16), is_view((1, 24, 1, 1), 16), is_view((1, 32, 7, 7), 16)
    (True, False, False)
    """
    if not block or shape is None:
        return not block
    return shape[1] % block == 0 and shape[2] * shape[3] == 1


def _check(graph: Graph, assignment: Assignment) -> None:
    sites = {site.name: site for site in graph.sites}
    for name, packing in assignment.items():
        if name not in sites:
            raise InputError(f"the model has no convolution or dense layer {name!r}", remedy="see tvmlab.layouts.sites")
        if problem := reason_against(sites[name], packing):
            raise InputError(f"{name} cannot be {packing}", remedy=problem)


def _layout(node: Node, homes: dict[Any, int], assignment: Assignment) -> tuple[int, int]:
    """The block of a node's result and of its inputs."""
    found = [homes.get(variable, 0) for variable in node.inputs]
    if node.site is not None:
        packing = assignment.get(node.site.name, Packing())
        return (0, 0) if node.role == "dense" else (packing.block, node.site.input_block(packing.block))
    if node.role == "view":
        return 0, found[0] if is_view(static_shape(node.inputs[0]), found[0]) else 0
    if node.role in ("pool", "reduce", "lrn"):
        chosen = found[0]
    elif node.role == "pointwise":
        sizes = [prod(static_shape(variable) or ()) for variable in node.inputs]
        # The last of the largest was made last: bindings are in order.
        chosen = max(zip(sizes, range(len(sizes)), found, strict=True))[2] if found else 0
    elif node.role == "concat":
        chosen = _concat_layout(node, found)
    else:
        chosen = 0
    if node.exact and chosen and node.shape is not None and node.shape[1] % chosen:
        chosen = 0
    return chosen, chosen


def _concat_layout(node: Node, found: list[int]) -> int:
    """The layout that most elements are in, among those whose block divides the channels of every part."""
    shapes = [static_shape(variable) or () for variable in node.inputs]
    weight: dict[int, int] = defaultdict(int)
    for shape, block in zip(shapes, found, strict=True):
        weight[block] += prod(shape)
    fitting = [block for block in weight if not block or all(shape[1] % block == 0 for shape in shapes)]
    return max(fitting, key=lambda block: weight[block], default=0)


def _node(module: Any, binding: Any, constants: Constants, producers: dict[Any, Node]) -> Node:
    from tvm import relax

    match = classify(module, binding, constants)
    if match is None:
        free = relax.analysis.free_vars(binding.value) if hasattr(binding, "value") else [binding.input]
        match = Match("other", tuple(free))
    inputs = tuple(variable for variable in match.inputs if constants.array(variable) is None)
    if match.role == "pointwise":  # in the order they were made
        order = {variable: index for index, variable in enumerate(producers)}
        inputs = tuple(sorted(dict.fromkeys(inputs), key=lambda variable: order.get(variable, -1)))
    return Node(match.role, binding, inputs, static_shape(binding.var), match.site, match.exact, match.detail)


def _find_lrn(graph: Graph, producers: dict[Any, Node]) -> None:
    """Make one node of the eight operators that the importer makes of an LRN."""
    readers = _readers(graph)

    def producer(variable: Any) -> Any:
        return producers[variable].binding if variable in producers else None

    for node in graph.nodes:
        found = match_lrn(node.binding, producer, graph.constants)
        if found is None:
            continue
        inner = [producers[variable] for variable in found.inner]
        if any(reader not in (*inner, node) for part in inner for reader in readers[part.result]):
            continue
        for part in inner:
            part.role, part.inputs, part.exact = "part", (), False
        node.role, node.inputs, node.exact = "lrn", (found.source,), found.detail["bias"] <= 0
        node.detail = {**found.detail, "parts": [part.binding for part in inner]}


def _find_epilogues(graph: Graph) -> None:
    """Tell each site the pointwise operators that will be fused to it: those with equal work share a task."""
    readers = _readers(graph)
    for node in graph.nodes:
        if node.site is None:
            continue
        names, last = [], node
        while len(readers[last.result]) == 1 and readers[last.result][0].role == "pointwise":
            last = readers[last.result][0]
            names.append(last.detail["name"] + ("" if len(last.inputs) == 1 else "2"))
        node.site = node.site.followed_by(tuple(names))


def _readers(graph: Graph) -> dict[Any, list[Node]]:
    readers: dict[Any, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        for variable in node.inputs:
            readers[variable].append(node)
    return readers
