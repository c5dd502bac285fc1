"""What an assignment costs a model: its convolutions and the layout transforms between them; and the cheapest one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from tvmlab.core import Assignment, Packing
from tvmlab.fold import static_shape
from tvmlab.layout_graph import Graph, Node, Transform, is_view, place, transforms
from tvmlab.search.layout import descend, solve
from tvmlab.sites import Site

__all__ = ["Copy", "Costs", "Need", "copies_of", "needs_of"]

Copy = tuple[tuple[int, ...], int, int]  # of a tensor (N, C, H, W), from one block to another


@dataclass(frozen=True)
class Need:
    """A tensor (N, C, H, W) whose layout the site `source` decides, and that is read as the site `target` decides.

    None stands for NCHW. `into` says that `target` reads it itself, perhaps in another block than it writes.
    """

    shape: tuple[int, ...]
    source: Site | None
    target: Site | None
    into: bool

    def copy(self, source: int, target: int) -> Copy | None:
        """The layout transform that these blocks of the two sites cost; None if none."""
        read = self.target.input_block(target) if self.target and self.into else target
        free = source == read or (is_view(self.shape, source) and is_view(self.shape, read))
        return None if free else (self.shape, source, read)


def needs_of(graph: Graph) -> list[Need]:
    """Who reads what of whom, as `layout_graph.place` has it where a whole model is packed.

    A layout goes on through pooling and pointwise operators; where several meet, one of them decides.
    """
    owner: dict[Any, Site | None] = {}
    found: dict[Need, None] = {}

    def need(variable: Any, target: Site | None, into: bool = False) -> None:
        source = owner.get(variable)
        if source is not None or target is not None:
            shape = static_shape(variable)
            if shape is not None and len(shape) == 4 and (into or source != target):
                found[Need(shape, source, target, into)] = None

    for node in graph.nodes:
        reader = node.site if node.role == "conv" else _decider(node, owner)
        owner[node.result] = reader
        for variable in node.inputs:
            need(variable, reader, into=node.role == "conv")
    for variable in graph.outputs:
        need(variable, None)
    return list(found)


def _decider(node: Node, owner: Mapping[Any, Site | None]) -> Site | None:
    """The site in whose layout an operator works; None for NCHW."""
    if node.role in ("pool", "reduce", "lrn"):
        return owner.get(node.inputs[0])
    if node.role in ("pointwise", "concat") and node.inputs:
        sizes = [prod(static_shape(variable) or ()) for variable in node.inputs]
        return owner.get(node.inputs[max(range(len(sizes)), key=lambda index: (sizes[index], index))])
    return None


def copies_of(needs: Sequence[Need], choices: Mapping[str, Sequence[Packing]]) -> list[Copy]:
    """Every layout transform that some choice of packings may cost, each once."""
    found: dict[Copy, None] = {}
    for need in needs:
        for source in _blocks(need.source, choices):
            for target in _blocks(need.target, choices):
                if copy := need.copy(source, target):
                    found[copy] = None
    return list(found)


def _blocks(site: Site | None, choices: Mapping[str, Sequence[Packing]]) -> list[int]:
    return sorted({packing.block for packing in choices[site.name]}) if site else [0]


class Costs:
    """The cost in seconds of a model's assignments, from those of its sites and of layout transforms.

    `sites` gives each site's cost by packing: what can be chosen. `copy` is the cost of a layout transform.
    """

    def __init__(
        self,
        graph: Graph,
        sites: Mapping[str, Mapping[Packing, float]],
        copy: Callable[[Copy], float],
    ) -> None:
        self._graph = graph
        self._sites = sites
        self._names = list(sites)
        self._choices = {name: list(costs) for name, costs in sites.items()}
        self._copy = copy
        self._needed = lru_cache(maxsize=None)(self._find_transforms)

    def of(self, assignment: Assignment) -> float | None:
        """What an assignment costs in all; None if it has a packing that has no cost."""
        chosen = {name: assignment.get(name, Packing()) for name in self._names}
        if any(packing not in self._sites[name] for name, packing in chosen.items()):
            return None
        return self._total(chosen)

    def transforms(self, assignment: Assignment) -> list[tuple[Transform, float]]:
        """The layout transforms of an assignment that cost something, and what."""
        return self._needed(tuple(assignment.get(name, Packing()).block for name in self._names))

    def cheapest(self, starts: Sequence[Assignment] = ()) -> tuple[Assignment, float]:
        """The cheapest assignment found, and its cost: never dearer than any of `starts`.

        First the sites and the transforms between neighbours alone (see tvmlab.search.layout), which is exact on
        chains; but a transform that two readers share counts twice there, and an operator of several tensors follows
        one of them whatever it costs. So it is then improved by what it costs in truth, as the best start is.
        """
        sizes = [len(self._choices[name]) for name in self._names]
        found = [self._solve()]
        known = [start for start in starts if self.of(start) is not None]
        if known:
            best = min(known, key=lambda start: self.of(start) or 0.0)
            found.append([self._choices[name].index(best.get(name, Packing())) for name in self._names])
        ends = [descend(choice, sizes, lambda choice: self._total(self._named(choice))) for choice in found]
        choice, cost = min(ends, key=lambda end: end[1])
        return self._named(choice), cost

    def _total(self, chosen: Assignment) -> float:
        paid = sum(cost for _, cost in self.transforms(chosen))
        return sum(self._sites[name][packing] for name, packing in chosen.items()) + paid

    def _named(self, choice: Sequence[int]) -> Assignment:
        return {name: self._choices[name][index] for name, index in zip(self._names, choice, strict=True)}

    def _find_transforms(self, blocks: tuple[int, ...]) -> list[tuple[Transform, float]]:
        # Which layout a site has does not depend on its algorithm, so all of them share an answer.
        assignment = {name: Packing(block) for name, block in zip(self._names, blocks, strict=True)}
        needed = transforms(self._graph, place(self._graph, assignment))
        paid = [item for item in needed if not (is_view(item.shape, item.source) and is_view(item.shape, item.target))]
        return [(item, self._copy((item.shape, item.source, item.target))) for item in paid]

    def _solve(self) -> list[int]:
        """The reductions' answer for the sites and the transforms between neighbours."""
        numbers = {name: number for number, name in enumerate(self._names)}
        costs = [np.array([self._sites[name][packing] for packing in self._choices[name]]) for name in self._names]
        edges: dict[tuple[int, int], Any] = defaultdict(float)
        for need in needs_of(self._graph):
            paid = [
                [self._paid(need.copy(source, target)) for target in self._packed_blocks(need.target)]
                for source in self._packed_blocks(need.source)
            ]
            if need.source and need.target:
                edges[numbers[need.source.name], numbers[need.target.name]] += np.array(paid)
            elif need.source:
                costs[numbers[need.source.name]] += np.array(paid)[:, 0]
            elif need.target:
                costs[numbers[need.target.name]] += np.array(paid)[0]
        return solve(costs, edges)

    def _packed_blocks(self, site: Site | None) -> list[int]:
        return [packing.block for packing in self._choices[site.name]] if site else [0]

    def _paid(self, copy: Copy | None) -> float:
        return 0.0 if copy is None else self._copy(copy)
