"""One choice for each node of a graph, where nodes and edges have costs: the layouts of a model's convolutions.

The problem is a partitioned Boolean quadratic program (PBQP). It is solved by the reductions of Scholz and Eckstein,
"Register Allocation for Irregular Architectures" (LCTES 2002), section 4: exact while no node has more than two
neighbours, as in chains and trees, a heuristic beyond. Anderson and Gregg, "Optimal DNN Primitive Selection with
Partitioned Boolean Quadratic Programming" (CGO 2018), section 3, choose layouts and algorithms of a network's
convolutions like that; Liu et al., "Optimizing CNN Model Inference on CPUs" (ATC 2019), section 3.3, only layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["descend", "objective", "solve"]

_SWEEPS = 4


def solve(costs: Sequence[Any], edges: Mapping[tuple[int, int], Any]) -> list[int]:
    """The choice of each node, that together cost least.

    `costs[u]` is a vector, the cost of each choice of node u; `edges[u, v]` a matrix, the cost of each pair of choices
    of two different nodes u and v (rows are u's). An infinite cost is a choice, or a pair, that there is not.

    >>> solve([[0, 3], [2, 0]], {(0, 1): [[0, 9], [9, 0]]})
    [0, 0]
    """
    graph = _Graph(costs, edges)
    removed: list[tuple[int, np.ndarray, dict[int, np.ndarray]]] = []
    while graph.costs:
        node = graph.next_node()
        cost, links = graph.reduce(node)
        removed.append((node, cost, links))
    chosen: dict[int, int] = {}
    for node, cost, links in reversed(removed):
        total = cost + sum(matrix[:, chosen[other]] for other, matrix in links.items())
        chosen[node] = int(np.argmin(total))
    return [chosen[node] for node in range(len(costs))]


def objective(costs: Sequence[Any], edges: Mapping[tuple[int, int], Any], choice: Sequence[int]) -> float:
    """What a choice costs in all.

    >>> objective([[0, 3], [2, 0]], {(0, 1): [[0, 9], [9, 0]]}, [1, 1])
    3.0
    """
    nodes = sum(float(cost[chosen]) for cost, chosen in zip(costs, choice, strict=True))
    return nodes + sum(float(np.asarray(matrix)[choice[u], choice[v]]) for (u, v), matrix in edges.items())


def descend(
    choice: Sequence[int], sizes: Sequence[int], cost: Callable[[tuple[int, ...]], float]
) -> tuple[list[int], float]:
    """Coordinate descent: change one node's choice at a time while that is cheaper, in a few sweeps over all nodes.

    `sizes[u]` is the number of choices of node u. Returns a choice that is never dearer than the first, and its cost.

    >>> descend([0, 0], [2, 3], lambda choice: abs(choice[0] + choice[1] - 3))
    ([1, 2], 0)
    """
    best, least = list(choice), cost(tuple(choice))
    for _ in range(_SWEEPS):
        before = least
        for node, size in enumerate(sizes):
            for value in range(size):
                candidate = [*best[:node], value, *best[node + 1 :]]
                found = least if value == best[node] else cost(tuple(candidate))
                if found < least:
                    best, least = candidate, found
        if least == before:
            break
    return best, least


class _Graph:
    """The nodes not yet removed, and the matrices between them, each kept from both sides."""

    def __init__(self, costs: Sequence[Any], edges: Mapping[tuple[int, int], Any]) -> None:
        self.costs = {node: np.array(cost, dtype="float64") for node, cost in enumerate(costs)}
        self._links: dict[int, dict[int, np.ndarray]] = {node: {} for node in self.costs}
        for (u, v), matrix in edges.items():
            self._connect(u, v, np.array(matrix, dtype="float64"))

    def next_node(self) -> int:
        """One with at most two neighbours, so that removing it is exact; else one with the most."""
        fewest = min(self.costs, key=lambda node: len(self._links[node]))
        if len(self._links[fewest]) <= 2:
            return fewest
        return max(self.costs, key=lambda node: len(self._links[node]))

    def reduce(self, node: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Remove a node, leaving what it costs to its neighbours; its costs and matrices, to choose by later."""
        cost, links = self.costs.pop(node), self._links.pop(node)
        for other in links:
            del self._links[other][node]
        if len(links) == 1:
            ((other, matrix),) = links.items()
            self.costs[other] = self.costs[other] + (cost[:, None] + matrix).min(axis=0)
        elif len(links) == 2:
            (u, to_u), (v, to_v) = links.items()
            self._connect(u, v, (cost[:, None, None] + to_u[:, :, None] + to_v[:, None, :]).min(axis=0))
        elif links:
            hoped = cost + sum((matrix + self.costs[other]).min(axis=1) for other, matrix in links.items())
            chosen = int(np.argmin(hoped))
            for other, matrix in links.items():
                self.costs[other] = self.costs[other] + matrix[chosen]
            cost = np.where(np.arange(len(cost)) == chosen, 0.0, np.inf)  # settled: neighbours have counted it
        return cost, links

    def _connect(self, u: int, v: int, matrix: np.ndarray) -> None:
        known = self._links[u].get(v)
        self._links[u][v] = matrix if known is None else known + matrix
        self._links[v][u] = self._links[u][v].T
