"""Points of sketches as vectors: nothing is lost, and what sketches have in common is in the same columns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvmlab.search.costmodel import KnobModel
from tvmlab.spaces.encoding import Encoding
from tvmlab.spaces.knobs import Choice, Index, Location, Tile

LOOPS = (Tile(128, 4, 64), Tile(56, 4, 64), Tile(64, 2, 64))
SKETCHES = [[*LOOPS, Choice(4)], [Choice(4), *LOOPS, Location(6)], [Tile(56, 4, 64), Tile(56, 4, 64)]]


@pytest.fixture
def encoding():
    return Encoding(SKETCHES)


def test_a_column_each_for_what_it_says(encoding):
    (vector,) = encoding.encode([(0, [[2, 4, 1, 16], [7, 1, 4, 2], [8, 8], 3])])
    first = [1, 2, 0, 4, 6, 4]  # sizes of the tile, then the iterations from its second and its third part inwards
    second = [np.log2(7), 0, 2, 1, 3, 3]
    levels = [1 + np.log2(7), 2, 2, 5, 3, 3]  # of both tiles with four parts, then of that with two
    assert sorted(vector) == pytest.approx(sorted([1, *first, *second, 3, 3, *levels, 3, *[0] * (encoding.width - 22)]))


@given(st.integers(0, 2), st.integers(0, 2**32 - 1))
def test_points_of_a_sketch_are_told_apart_and_the_same_one_is_the_same(sketch, seed):
    encoding, rng = Encoding(SKETCHES), np.random.default_rng(seed)
    points = [(sketch, [knob.random(rng) for knob in SKETCHES[sketch]]) for _ in range(20)]
    vectors = encoding.encode(points)
    assert vectors.shape == (20, encoding.width) and np.isfinite(vectors).all()
    assert len({vector.tobytes() for vector in vectors}) == len({str(point) for point in points})
    assert (encoding.encode(points[::-1]) == vectors[::-1]).all()


def test_the_same_tiles_in_another_sketch_are_in_the_same_columns(encoding):
    tiles = [[2, 4, 1, 16], [7, 1, 4, 2], [8, 8]]
    here, there = encoding.encode([(0, [*tiles, 3]), (1, [3, *tiles, 2])])
    different = np.flatnonzero(here != there)
    assert len(different) == 3  # which sketch it is, and the location that only the second has
    assert here[:3].tolist() == [1, 0, 0] and there[:3].tolist() == [0, 1, 0]


def test_what_one_sketch_taught_is_expected_of_the_other():
    knobs = [*LOOPS, Choice(4)]
    encoding, model, rng = Encoding([knobs, knobs]), KnobModel(seed=0), np.random.default_rng(0)

    def latency_s(point):
        return 1e-3 * (1 + abs(np.log2(point[1][0][3]) - 4) + abs(np.log2(point[1][2][1]) - 3))

    for sketch in [0] * 200 + [1] * 10:
        point = (sketch, [knob.random(rng) for knob in knobs])
        model.add(encoding.encode([point])[0], latency_s(point))
    others = [(1, [knob.random(rng) for knob in knobs]) for _ in range(200)]
    scores = model.predict(encoding.encode(others))
    ranks = [np.argsort(np.argsort(values)) for values in (scores, [-latency_s(point) for point in others])]
    assert np.corrcoef(*ranks)[0, 1] > 0.8


def test_the_same_decisions_elsewhere_only_where_all_knobs_are_the_same():
    encoding = Encoding([[*LOOPS, Choice(4)], [Choice(4), *LOOPS], [*LOOPS, Choice(4), Location(6)], [*LOOPS]])
    point = (0, [[2, 4, 1, 16], [7, 1, 4, 2], [8, 8], 3])
    assert encoding.elsewhere(point) == [(1, [3, [2, 4, 1, 16], [7, 1, 4, 2], [8, 8]])]
    assert encoding.elsewhere((3, point[1][:3])) == []


def test_a_numbered_space_and_one_without_knobs():
    class Numbered(Index):
        def encode(self, value):
            return [float(value // 4), float(value % 4)]

    assert Encoding([[Numbered((3, 4))]]).encode([(0, [7]), (0, [2])]).tolist() == [[1, 1, 3], [1, 0, 2]]
    assert Encoding([[]]).encode([(0, []), (0, [])]).tolist() == [[1], [1]]
