"""The layout problem: exact where the reductions are, and never worse than where it started."""

from functools import partial
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvmlab.search.layout import descend, objective, solve

COST = st.integers(0, 20)


def brute(costs, edges):
    return min(objective(costs, edges, choice) for choice in product(*(range(len(cost)) for cost in costs)))


@st.composite
def problems(draw, shape):
    """Nodes of one to four choices, joined as a chain, a tree, a ring, or anyhow."""
    count = draw(st.integers(1, 6))
    costs = [draw(st.lists(COST, min_size=1, max_size=4)) for _ in range(count)]
    pairs = {
        "chain": [(node, node + 1) for node in range(count - 1)],
        "tree": [(draw(st.integers(0, node - 1)), node) for node in range(1, count)],
        "ring": [(node, (node + 1) % count) for node in range(count if count > 2 else count - 1)],
        "any": [pair for pair in product(range(count), repeat=2) if pair[0] < pair[1] and draw(st.booleans())],
    }[shape]
    numbers = st.sampled_from([0, 0, 1, 2, 5, 13, 30, np.inf]) if draw(st.booleans()) else COST
    edges = {}
    for u, v in pairs:
        rows, columns = len(costs[u]), len(costs[v])
        edges[u, v] = [[draw(numbers) for _ in range(columns)] for _ in range(rows)]
    return costs, edges


@pytest.mark.parametrize("shape", ["chain", "tree", "ring"])
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_exact_where_no_reduction_is_a_guess(shape, data):
    costs, edges = data.draw(problems(shape))
    assert objective(costs, edges, solve(costs, edges)) == brute(costs, edges)


@settings(max_examples=80, deadline=None)
@given(problems("any"))
def test_a_branching_graph_is_bounded_by_the_best_and_descent_never_loses(problem):
    costs, edges = problem
    sizes = [len(cost) for cost in costs]
    least = brute(costs, edges)
    found = objective(costs, edges, solve(costs, edges))
    assert found >= least
    choice, cost = descend(solve(costs, edges), sizes, lambda choice: objective(costs, edges, choice))
    assert least <= cost <= found and cost == objective(costs, edges, choice)


def test_the_heuristic_is_near_the_best_on_layouts():
    """Complete graphs of five convolutions, three layouts each; another layout than the neighbour's costs something."""
    rng = np.random.default_rng(0)
    solved, improved = [], []
    for _ in range(100):
        costs = rng.uniform(1.0, 2.0, (5, 3))
        edges = {(u, v): rng.uniform(0.0, 0.5) * (1 - np.eye(3)) for u in range(5) for v in range(u)}
        least, choice = brute(costs, edges), solve(costs, edges)
        solved.append(objective(costs, edges, choice) / least)
        improved.append(descend(choice, [3] * 5, partial(objective, costs, edges))[1] / least)
    assert min(improved) >= 1.0 - 1e-9
    assert np.mean(solved) < 1.03 and np.mean(improved) < 1.01


def test_a_long_chain_takes_no_time():
    """Where trying everything is out of the question: 3^300 choices. The layout that all share is the best."""
    costs = [[1.0, 1.1, 1.2]] * 300
    change = 10.0 * (1 - np.eye(3))
    assert solve(costs, {(node, node + 1): change for node in range(299)}) == [0] * 300


def test_one_dear_transform_is_paid_where_it_is_worth_it():
    costs = [[0, 9], [0, 9], [9, 0], [9, 0]]
    change = [[0, 4], [4, 0]]
    edges = {(0, 1): change, (1, 2): change, (2, 3): change}
    assert solve(costs, edges) == [0, 0, 1, 1]


def test_a_forbidden_pair_is_avoided():
    assert solve([[0, 5], [0, 5]], {(0, 1): [[np.inf, 0], [1, 0]]}) in ([0, 1], [1, 0])
    assert solve([[0, 5], [0, 8]], {(0, 1): [[np.inf, 0], [1, 0]]}) == [1, 0]


@given(problems("any"), st.randoms())
@settings(max_examples=40, deadline=None)
def test_the_order_of_an_edge_does_not_matter(problem, random):
    costs, edges = problem
    turned = {(v, u) if random.random() < 0.5 else (u, v): matrix for (u, v), matrix in edges.items()}
    turned = {pair: np.array(edges[pair]) if pair in edges else np.array(edges[pair[::-1]]).T for pair in turned}
    assert objective(costs, edges, solve(costs, turned)) == objective(costs, edges, solve(costs, edges))
