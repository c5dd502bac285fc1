"""Selective tuning before anything is measured: its knobs, how similar two spaces are, the clusters."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvmlab.core import InputError
from tvmlab.experiment import AutoTVM, Selective
from tvmlab.search.clusters import clusters
from tvmlab.selective_step import search_of
from tvmlab.spaces.knobs import Tile
from tvmlab.spaces.overlap import Outline, rate

# The knobs


@pytest.mark.parametrize("top", [0, -1, True, 1.5, 100_001, "0%", "101%", "-5%", "1.5", "five", "", None])
def test_a_share_of_nothing_or_of_more_than_all_is_refused(top):
    with pytest.raises(InputError, match=r"^Selective\(top=.*\) is not usable: top should be a whole number from 1 to"):
        Selective(top=top)


@pytest.mark.parametrize(
    ("top", "trials", "shared"),
    [
        (10, 3, 3),
        (1, 9, 1),
        ("10", 64, 10),
        ("5%", 200, 10),
        ("5 %", 201, 11),
        ("0.1%", 5, 1),
        ("100%", 7, 7),
        (3, 0, 0),
    ],
)
def test_how_many_schedules_are_shared(top, trials, shared):
    assert Selective(top).shared(trials) == shared


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        (
            {"engine": "ansor", "tuner": "grid"},
            "Selective's tuner is a knob of engine 'autotvm', and its engine is 'ansor'",
        ),
        ({"population": 64}, "Selective's population is a knob of engine 'ansor'"),
        ({"similarity": 0.0}, r"Selective\(similarity=0.0\) is not usable: similarity should be above 0 and up to 1$"),
        ({"fall_back": 1.1}, r"Selective\(fall_back=1.1\) is not usable: fall_back should be 0 to 1$"),
        (
            {"trials_per_kernel": 0},
            r"Selective\(trials_per_kernel=0\) is not usable: trials_per_kernel should be 1 to 100,000 trials$",
        ),
    ],
)
def test_a_knob_out_of_range_or_of_the_other_engine_is_named(knobs, said):
    with pytest.raises(InputError, match=said):
        Selective(**knobs)


def test_the_search_has_the_knobs_of_a_normal_one():
    step = Selective(trials_per_kernel=64, early_stopping_threshold=9, tuner="genetic", max_trials=80, warm_start=["a"])
    knobs = {"early_stopping_threshold": 9, "tuner": "genetic", "max_trials": 80, "warm_start": ["a"], "reuse": False}
    assert search_of(step) == AutoTVM(kernel_trials=64, **knobs)
    made = search_of(Selective(engine="ansor", trials_per_kernel=7, population=16, generations=2))
    assert (made.kind, made.trials_per_kernel, made.population, made.generations) == ("ansor", 7, 16, 2)


# Similarity and clusters


def space(*extents, operator="conv2d", unroll=(0, 16), limit=0):
    knobs = [(f"tile {axis}", Tile(extent, 4, limit)) for axis, extent in enumerate(extents)]
    return Outline(operator, ((*knobs, ("unroll", frozenset(unroll))),))


def inner_parts(extent, limit):
    """The tiles of a loop in four parts, without the outermost, counted out."""
    found = {(a, b, c) for a in range(1, extent + 1) for b in range(1, extent + 1) for c in range(1, extent + 1)
             if extent % (a * b * c) == 0}  # fmt: skip
    return {tile for tile in found if not limit or tile[-1] <= limit}


@pytest.mark.parametrize("limit", [0, 4])
@pytest.mark.parametrize(("one", "other"), [(12, 18), (8, 32), (7, 14), (9, 16), (1, 6)])
def test_the_rate_of_tiles_is_that_of_the_sets_of_their_inner_parts(one, other, limit):
    ours, theirs = inner_parts(one, limit), inner_parts(other, limit)
    found = rate(space(one, limit=limit), space(other, limit=limit))
    assert found == pytest.approx((len(ours & theirs) / len(ours | theirs) * 1.0) ** (1 / 2))


def test_the_rate_does_not_fall_with_the_number_of_knobs():
    assert rate(space(56), space(28)) < rate(space(56, 7), space(28, 7)) < 1
    large, small = (space(extent).parts[0][:1] for extent in (56, 28))
    once, twice = (rate(Outline("conv2d", (large * times,)), Outline("conv2d", (small * times,))) for times in (1, 2))
    assert once == pytest.approx(twice)


def test_other_operators_and_other_structures_share_nothing():
    assert rate(space(8), space(8, operator="dense")) == 0
    assert rate(space(8), space(8, 8)) == 0
    assert rate(space(8), space(8, unroll=(64,))) == 0
    assert rate(space(1, unroll=(0,)), space(1, unroll=(0,))) == 1  # nothing to choose in either
    three, two = (Outline("conv2d", space(8).parts * count) for count in (3, 2))
    assert rate(three, two) == pytest.approx(4 / 5)


SIZED = st.integers(1, 9).flatmap(
    lambda count: st.tuples(st.just(count), st.lists(st.floats(0, 1), min_size=count**2, max_size=count**2))
)


@settings(deadline=None, max_examples=60)
@given(SIZED, st.floats(0.1, 1))
def test_every_task_is_in_one_cluster_of_tasks_that_are_all_alike(sized, least):
    count, values = sized
    rates = np.array(values).reshape(count, count)
    rates = (rates + rates.T) / 2
    found = clusters(rates, least, range(count))
    members = [[one.representative, *one.others] for one in found]
    assert sorted(task for cluster in members for task in cluster) == list(range(count))
    assert [len(cluster) for cluster in members] == sorted(map(len, members), reverse=True)
    for cluster in members:
        for task in cluster:
            assert all(rates[task, other] >= least for other in cluster if other != task)
        sums = {task: sum(rates[task, other] for other in cluster if other != task) for task in cluster}
        assert sums[cluster[0]] == pytest.approx(max(sums.values()))
    one, *_ = members  # it cannot grow
    for task in set(range(count)) - set(one):
        assert any(rates[task, other] < least for other in one)


def test_of_equals_the_costly_one_is_searched_and_one_task_is_a_cluster():
    (pair,) = clusters([[1, 0.7], [0.7, 1]], 0.5, [1.0, 5.0])
    assert (pair.representative, pair.others) == (1, (0,))
    (alone,) = clusters([[1.0]], 0.5, [3.0])
    assert (alone.representative, alone.others) == (0, ())


@pytest.mark.parametrize(("rates", "costs", "said"), [([], [], "no tasks"), ([[1.0]], [1, 2], "not a matrix of 2 x 2")])
def test_clusters_of_nothing_are_refused(rates, costs, said):
    with pytest.raises(InputError, match=said):
        clusters(rates, 0.5, costs)
