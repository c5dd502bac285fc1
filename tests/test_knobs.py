"""Knobs: whatever is drawn or changed stays a value the knob may take."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvmlab.spaces.knobs import Choice, Index, Location, Tile, directions, prime_factors, stepped
from tvmlab.testing import RecordedSpace

SEEDS = st.integers(0, 2**32 - 1)
TILES = st.builds(
    Tile,
    extent=st.integers(1, 5000),
    parts=st.integers(2, 5),
    max_innermost=st.sampled_from([0, 1, 4, 16, 64]),
)


def assert_valid(tile, value):
    assert len(value) == tile.parts
    assert math.prod(value) == tile.extent
    assert all(type(size) is int and size >= 1 for size in value)
    assert tile.max_innermost == 0 or value[-1] <= tile.max_innermost


@given(st.integers(1, 10**6))
def test_prime_factors(number):
    factors = prime_factors(number)
    assert math.prod(factors) == number
    assert list(factors) == sorted(factors)
    assert all(factor > 1 and all(factor % d for d in range(2, math.isqrt(factor) + 1)) for factor in factors)


@given(TILES, SEEDS)
def test_tiles_keep_the_product_and_the_innermost_bound(tile, seed):
    rng = np.random.default_rng(seed)
    value = tile.random(rng)
    assert_valid(tile, value)
    for _ in range(10):
        changed = tile.mutate(value, rng)
        assert_valid(tile, changed)
        assert len(tile.encode(changed)) == tile.parts
        value = changed


@given(TILES, SEEDS)
def test_a_tile_mutation_moves_one_prime_and_leaves_its_argument_alone(tile, seed):
    rng = np.random.default_rng(seed)
    value = tile.random(rng)
    before = list(value)
    changed = tile.mutate(value, rng)
    assert value == before
    differ = [(old, new) for old, new in zip(value, changed, strict=True) if old != new]
    assert len(differ) in (0, 2)
    if differ:
        ratios = sorted(max(old, new) // min(old, new) for old, new in differ)
        assert ratios[0] == ratios[1] and prime_factors(ratios[0]) == (ratios[0],)


def test_every_factorisation_can_be_reached():
    tile, rng = Tile(12, 3, 4), np.random.default_rng(0)
    outer = [(a, b) for a in range(1, 13) for b in range(1, 13) if 12 % (a * b) == 0]
    every = {(a, b, 12 // (a * b)) for a, b in outer if 12 // (a * b) <= 4}
    assert {tuple(tile.random(rng)) for _ in range(2000)} == every
    value, seen = [12, 1, 1], set()
    for _ in range(3000):
        value = tile.mutate(value, rng)
        seen.add(tuple(value))
    assert seen == every


def test_a_tile_with_nothing_to_move_stays():
    rng = np.random.default_rng(0)
    assert Tile(1, 4, 64).mutate([1, 1, 1, 1], rng) == [1, 1, 1, 1]
    assert Tile(7, 1, 0).mutate([7], rng) == [7] == Tile(7, 1, 0).random(rng)
    assert Tile(7, 2, 4).mutate([7, 1], rng) == [7, 1]  # the only prime does not fit inside


@given(st.integers(1, 20), SEEDS)
def test_choices_stay_in_range_and_change(count, seed):
    knob, rng = Choice(count), np.random.default_rng(seed)
    value = knob.random(rng)
    assert 0 <= value < count
    changed = knob.mutate(value, rng)
    assert 0 <= changed < count
    assert count == 1 or changed != value


@given(st.integers(-1, 12), SEEDS)
def test_locations_stay_in_range(highest, seed):
    knob, rng = Location(highest), np.random.default_rng(seed)
    value = knob.random(rng)
    assert -2 <= value <= highest
    for _ in range(20):
        changed = knob.mutate(value, rng)
        # One step past what was seen is allowed: how deep the loops are depends on the other knobs.
        assert -2 <= changed <= max(highest, value + 1)
        value = changed


@pytest.mark.parametrize("knob", [Choice(5), Location(4)])
def test_every_value_is_drawn_and_reached(knob):
    rng = np.random.default_rng(0)
    every = set(range(5)) if isinstance(knob, Choice) else set(range(-2, 5))
    assert {knob.random(rng) for _ in range(500)} == every
    value, seen = 0, set()
    for _ in range(500):
        value = knob.mutate(value, rng)
        seen.add(value)
    assert seen >= every


@given(TILES, SEEDS)
def test_the_same_seed_gives_the_same_value(tile, seed):
    assert tile.random(np.random.default_rng(seed)) == tile.random(np.random.default_rng(seed))


@given(TILES, SEEDS)
def test_the_neighbours_of_a_tile_are_all_that_one_prime_away(tile, seed):
    rng = np.random.default_rng(seed)
    value = tile.random(rng)
    before = list(value)
    steps = [tile.step(value, way) for way in tile.directions(value)]
    found = [tuple(step) for step in steps if step is not None]
    assert value == before
    assert len(set(found)) == len(found)
    for step in found:
        assert_valid(tile, step)
    assert {tuple(tile.mutate(value, rng)) for _ in range(50)} - {tuple(value)} <= set(found)


@given(TILES, SEEDS)
def test_a_step_of_a_tile_can_be_taken_back(tile, seed):
    value = tile.random(np.random.default_rng(seed))
    for source, destination, prime in tile.directions(value):
        moved = tile.step(value, (source, destination, prime))
        if moved is not None:
            assert tile.step(moved, (destination, source, prime)) == value


def test_a_step_that_makes_the_innermost_part_too_large_is_none():
    tile = Tile(64, 2, 4)
    assert tile.step([16, 4], (0, 1, 2)) is None
    assert tile.step([16, 4], (1, 0, 2)) == [32, 2]
    assert tile.step([2, 32], (1, 0, 2)) == [4, 16]  # of a foreign point: what leads back is allowed


@given(st.integers(1, 20), SEEDS)
def test_the_neighbours_of_a_choice_are_the_values_beside_it(count, seed):
    knob = Choice(count)
    value = knob.random(np.random.default_rng(seed))
    found = [step for way in knob.directions(value) if (step := knob.step(value, way)) is not None]
    assert found == [other for other in (value - 1, value + 1) if 0 <= other < count]


def test_the_neighbours_of_a_location_begin_at_inlined():
    knob = Location(4)
    assert [knob.step(-2, way) for way in knob.directions(-2)] == [None, -1]
    assert [knob.step(7, way) for way in knob.directions(7)] == [6, 8]  # how deep the loops are, TVM says


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_the_neighbours_of_a_number_differ_in_one_knob_by_one_position(sizes, data):
    space = RecordedSpace({str(knob): range(size) for knob, size in enumerate(sizes)}, lambda index: 1e-3)
    index = data.draw(st.integers(0, len(space) - 1))
    axis = Index(space.radices)
    found = [step for way in axis.directions(index) if (step := axis.step(index, way)) is not None]
    expected = [
        other
        for other in range(len(space))
        if sum(abs(space[other][name] - value) for name, value in space[index].items()) == 1
    ]
    assert sorted(found) == expected


def test_the_directions_of_a_point_are_those_of_its_knobs():
    knobs, values = [Choice(2), Tile(6, 2, 0), Location(3)], [0, [6, 1], -2]
    ways = directions(knobs, values)
    assert ways == [(0, 1), (1, (0, 1, 2)), (1, (0, 1, 3)), (2, 1)]
    assert [stepped(knobs, values, [way]) for way in ways] == [
        [1, [6, 1], -2],
        [0, [3, 2], -2],
        [0, [2, 3], -2],
        [0, [6, 1], -1],
    ]
    assert stepped(knobs, values, ways[1:3]) == [0, [1, 6], -2]
    assert stepped(knobs, values, [ways[0], ways[0]]) is None
    assert values == [0, [6, 1], -2]


@pytest.mark.parametrize("knob", [Tile(24, 3, 4), Choice(3), Location(5)])
def test_the_plain_value_is_one_of_the_knob(knob):
    plain = knob.plain
    if isinstance(knob, Tile):
        assert_valid(knob, plain)
        assert plain == [24, 1, 1]
    else:
        assert plain == {Choice: 0, Location: -1}[type(knob)]
