"""Which tasks of a model may share schedules: maximal cliques of the graph of similar tasks (TVM issue 4188)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvmlab.core import InputError

__all__ = ["Cluster", "clusters"]


@dataclass(frozen=True)
class Cluster:
    """Tasks that are all similar to each other, by their numbers: one that is searched, and the others."""

    representative: int
    others: tuple[int, ...]


def clusters(rates: Any, least: float, costs: Sequence[float]) -> list[Cluster]:
    """Every task in one cluster, the largest clusters first.

    `rates` is symmetric, of shape (n, n); two tasks are joined by an edge if their rate is `least` or more. Maximal
    cliques overlap, which the RFC leaves open: here the largest (of equals the most similar, then the first) becomes a
    cluster and its tasks leave the graph, until none is left. A cluster's representative has the highest sum of rates
    to its others; of equals, as in every pair, the one of the highest cost. Raises InputError for no tasks, or a matrix
    that is not of theirs.

    >>> clusters([[1, .9, 0], [.9, 1, .6], [0, .6, 1]], least=0.5, costs=[1, 2, 3])
    [Cluster(representative=1, others=(0,)), Cluster(representative=2, others=())]
    """
    import networkx

    count = len(costs)
    if not count:
        raise InputError("there are no tasks to put into clusters", remedy="pass a model that has something to tune")
    if len(rates) != count or any(len(row) != count for row in rates):
        raise InputError(f"the similarity of {count} tasks is not a matrix of {count} x {count}", remedy="pass theirs")
    graph = networkx.Graph()
    graph.add_nodes_from(range(count))
    graph.add_edges_from((a, b) for a in range(count) for b in range(a) if rates[a][b] >= least)

    def weight(task: int, clique: Sequence[int]) -> float:
        return round(float(sum(rates[task][other] for other in clique if other != task)), 9)

    found = []
    while graph:
        cliques = (sorted(clique) for clique in networkx.find_cliques(graph))
        largest = max(cliques, key=lambda clique: (len(clique), sum(weight(task, clique) for task in clique),
                                                   [-task for task in clique]))  # fmt: skip
        chosen = max(largest, key=lambda task: (weight(task, largest), costs[task], -task))
        found.append(Cluster(chosen, tuple(task for task in largest if task != chosen)))
        graph.remove_nodes_from(largest)
    return found
