"""Knobs: whatever is drawn or changed stays a value the knob may take."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvmlab.spaces.knobs import Choice, Location, Tile, prime_factors

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
