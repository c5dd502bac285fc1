"""Droplet search: where it goes, what it takes for a move, where it stops; without a device."""

import hashlib
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

import numpy as np
import pytest

from tvmlab.core import Candidate, Trial, TrialStatus
from tvmlab.search.droplet import Droplet
from tvmlab.search.walkable import Numbered
from tvmlab.spaces.knobs import Choice, Index, Tile
from tvmlab.testing import RecordedSpace

TABLE = Path(__file__).parent.parent / "data" / "recorded_spaces" / "conv3x3_64x28.json"


class Tiled:
    """A space of two tiles and a choice to walk in, without TVM; some points are not valid."""

    task_key = "d" * 16
    KNOBS = (Tile(64, 3, 16), Tile(36, 2, 0), Choice(4))
    START = ([64, 1, 1], [36, 1], 0)

    def knobs(self, candidate):
        return self.KNOBS

    def elsewhere(self, candidate):
        return []

    def vary(self, candidate, decisions):
        return None if decisions[1][1] == 9 else self.at(*decisions)

    def at(self, *decisions):
        key = hashlib.sha256(repr(decisions).encode()).hexdigest()[:16]
        return Candidate(self.task_key, key, 0, list(decisions))

    def latency_s(self, candidate):
        """A valley whose bottom is at ([4, 2, 8], [12, 3], 2)."""
        (_, middle, inner), (_, other), choice = candidate.decisions
        away = [np.log2(middle / 2), np.log2(inner / 8), np.log2(other / 3), choice - 2]
        return 1e-4 * (1 + 0.25 * sum(map(abs, away)))


BOTTOM = [[4, 2, 8], [12, 3], 2]


class Clock:
    """Measures as a device does: noise on each repeat, drift from one candidate to the next, pairs in turns."""

    def __init__(self, space, noise=0.0, drift=0.0, pairs=20, seed=0, fails=()):
        self.space, self.noise, self.drift, self.pairs, self.fails = space, noise, drift, pairs, fails
        self.rng = np.random.default_rng(seed)
        self.speed = 1.0

    def __call__(self, candidates):
        return [self.trial(candidate) for candidate in candidates]

    def trial(self, candidate):
        self.speed *= float(np.exp(self.drift * self.rng.standard_normal()))
        rival = candidate.rival if candidate.rival and candidate.rival.key not in self.fails else None
        failed = candidate.key in self.fails
        return Trial(
            candidate.task_key, 0, "droplet", 1, candidate.key, candidate.sketch, candidate.decisions,
            TrialStatus.RUN_ERROR if failed else TrialStatus.OK,
            [] if failed else self.repeats(candidate),
            rival=rival.key if rival and not failed else "",
            rival_latencies_s=self.repeats(rival) if rival and not failed else [],
        )  # fmt: skip

    def repeats(self, candidate):
        noise = np.exp(self.noise * self.rng.standard_normal(self.pairs))
        return list(self.space.latency_s(candidate) * self.speed * noise)


def descend(droplet, measure, total=1000, batch=8, ahead=True):
    """The trials of a search as the loop does it: the next batch is asked for before the last one is told."""
    trials, under_way = [], []
    while True:
        count = min(batch, total - len(trials) - len(under_way))
        following = droplet.ask(count) if count > 0 and (ahead or not under_way) else []
        if not following and not under_way:
            return trials
        told = measure(under_way)
        droplet.tell(under_way, told)
        trials += told
        under_way = following


def new(space=None, **options):
    space = space or Tiled()
    return Droplet(space, space.at(*space.START), p_value=0.05, **options)


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_it_descends_to_the_bottom_of_a_valley_and_says_so(noise, ahead):
    for seed in range(5):
        droplet = new(seed=seed)
        trials = descend(droplet, Clock(Tiled(), noise, drift=0.05, seed=seed), ahead=ahead)
        assert droplet.incumbent.decisions == BOTTOM
        assert droplet.local_minimum and "local minimum at" in droplet.ending
        assert droplet.moves >= 6 and len(trials) < 300
        assert len({trial.key for trial in trials}) >= len(trials) - 3  # few have to be timed again


def test_the_start_is_measured_unless_its_latency_is_known():
    asked = new().ask(4)
    assert list(asked[0].decisions) == list(Tiled.START) and asked[0].rival is None
    assert all(candidate.rival.key == asked[0].key for candidate in asked[1:])
    known = new(latency_s=1e-3)
    assert all(c.decisions != asked[0].decisions and c.rival.key == asked[0].key for c in known.ask(50))
    assert not known.ending and not known.local_minimum


@pytest.mark.parametrize("is_faster", [True, False])
def test_contenders_are_timed_beside_the_start_before_it_looks_around(is_faster):
    space = Tiled()
    near, start = (space.at([8, 2, 4], [12, 3], choice) for choice in ((2, 3) if is_faster else (3, 2)))
    other = space.at([64, 1, 1], [36, 1], 3)
    droplet = Droplet(space, start, p_value=0.05, latency_s=1e-4, contenders=[other, near])
    asked = droplet.ask(8)
    assert [(each.key, each.rival.key) for each in asked] == [(other.key, start.key), (near.key, start.key)]
    assert droplet.ask(8) == [] and not droplet.local_minimum  # where to look around is not known yet
    told = Clock(space, noise=0.01)(asked)
    droplet.tell(asked, told)
    stands_on = droplet.incumbent
    assert stands_on.key == (near if is_faster else start).key and droplet.moves == is_faster
    following = droplet.ask(8)
    assert len(following) == 8 and {each.rival.key for each in following} == {stands_on.key}
    assert {other.key, near.key, start.key}.isdisjoint(each.key for each in following)
    resumed = Droplet(space, start, p_value=0.05, latency_s=1e-4, contenders=[other, near], known=told)
    assert resumed.incumbent.key == stands_on.key
    assert {each.key for each in resumed.ask(8)} == {each.key for each in following}


def test_a_neighbourhood_has_both_ways_of_every_coordinate_and_nothing_twice():
    droplet = Droplet(Tiled(), Tiled().at([16, 2, 2], [6, 6], 1), p_value=0.05, latency_s=1e-3)
    found = [candidate.decisions for candidate in droplet.ask(100)]
    tiles = [[8, 4, 2], [8, 2, 4], [32, 1, 2], [16, 1, 4], [32, 2, 1], [16, 4, 1]]
    others = [[3, 12], [2, 18], [12, 3], [18, 2]]
    expected = [[tile, [6, 6], 1] for tile in tiles] + [[[16, 2, 2], other, 1] for other in others]
    expected += [[[16, 2, 2], [6, 6], choice] for choice in (0, 2)]
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert droplet.ask(8) == []  # nothing is known of it yet that speculation could follow
    assert not droplet.local_minimum


def test_the_order_of_a_neighbourhood_depends_on_the_seed():
    first, again, other = ([c.key for c in new(seed=seed, latency_s=1e-3).ask(100)] for seed in (0, 0, 1))
    assert first == again != other and sorted(first) == sorted(other)


def test_speculation_goes_on_along_the_ways_that_look_fast():
    """All told but one; nothing is a proven gain yet, and what looks like one is followed for two steps."""
    space = Tiled()
    droplet = Droplet(space, space.at([16, 2, 2], [6, 6], 1), p_value=2e-5, latency_s=1e-3)
    asked = droplet.ask(100)
    droplet.tell(asked[1:], Clock(space, noise=0.15, pairs=20)(asked[1:]))
    start = asked[0].rival
    fast = [c for c in asked[1:] if space.latency_s(c) < space.latency_s(start)]
    again, followed = droplet.ask(1), droplet.ask(100)
    assert {c.key for c in again} <= {c.key for c in asked}
    assert len(followed) >= len(fast) >= 2 and all(c.rival == start for c in followed)
    for candidate in followed:
        assert any(changes(candidate, neighbour) == 1 for neighbour in fast)
    assert min(map(space.latency_s, followed)) < min(map(space.latency_s, fast))
    assert droplet.ask(5) == [] and not droplet.local_minimum


def changes(one, other):
    """In how many coordinates two candidates differ."""
    return sum(a != b for a, b in zip(one.decisions, other.decisions, strict=True))


def test_what_is_fast_is_tried_first_from_the_next_point():
    space = Tiled()
    droplet = new(latency_s=space.latency_s(space.at(*space.START)))
    asked = droplet.ask(100)
    droplet.tell(asked, Clock(space)(asked))
    assert droplet.moves == 1
    gains = [space.latency_s(candidate) < space.latency_s(droplet.incumbent) for candidate in droplet.ask(100)]
    assert any(gains) and not all(gains)
    assert mean(np.flatnonzero(gains).tolist()) < mean(np.flatnonzero(np.invert(gains)).tolist())


def test_what_other_searches_measured_decides_which_neighbours_come_first():
    space, rng = Tiled(), np.random.default_rng(0)
    points = [space.at(*(knob.random(rng) for knob in space.KNOBS)) for _ in range(60)]
    earlier = Clock(space)([point for point in points if point.decisions[1][1] != 9])
    foreign = [replace(trial, decisions=[7]) for trial in earlier[:3]] + [replace(earlier[3], sketch=1)]
    start = space.at([16, 2, 2], [6, 6], 0)

    def gains(earlier):
        """How many of the first four neighbours are faster than the start, over seeds."""
        found = []
        for seed in range(8):
            asked = Droplet(space, start, p_value=0.05, seed=seed, latency_s=1e-3, earlier=earlier).ask(4)
            found.append(sum(space.latency_s(candidate) < space.latency_s(start) for candidate in asked))
        return mean(found)

    assert gains([*earlier, *foreign]) > 1.5 * gains(foreign)


def test_without_rival_latencies_the_medians_decide():
    """As in a replayed table: it ends where no neighbour in the table is faster."""
    for seed in range(3):
        space = RecordedSpace.load(TABLE)
        start = space.realize(space.starts()[-1])
        droplet = Droplet(Numbered(space), start, p_value=0.05, seed=seed)
        trials = descend(droplet, space.measure)
        end = droplet.incumbent.decisions[0]
        axis = Index(space.radices)
        beside = [axis.step(end, way) for way in axis.directions(end)]
        answers = [space.answer(index) for index in beside if index is not None]
        assert all(not isinstance(answer, float) or answer >= space.answer(end) for answer in answers)
        assert droplet.local_minimum and space.answer(end) <= min(t.latency_s for t in trials if t.ok)
        assert space.answer(end) < space.answer(start.decisions[0])


def test_a_start_that_fails_is_left_for_any_point_that_runs():
    space = Tiled()
    start = space.at(*space.START)
    droplet = new()
    descend(droplet, Clock(space, fails=[start.key]))
    assert droplet.incumbent.decisions == BOTTOM


def test_nothing_to_walk_on():
    class Alone(Tiled):
        def vary(self, candidate, decisions):
            return None

    droplet = new(Alone())
    assert len(descend(droplet, Clock(Alone()))) == 1
    assert "local minimum" in droplet.ending and droplet.moves == 0
    nowhere = Droplet(Tiled(), None, p_value=0.05)
    assert nowhere.ask(8) == [] and "no valid point" in nowhere.ending
    droplet = new(Alone())
    start = droplet.ask(8)
    droplet.tell(start, Clock(Alone(), fails=[start[0].key])(start))
    assert droplet.ask(8) == [] and "neither" in droplet.ending


def test_what_beat_an_earlier_incumbent_is_timed_beside_the_present_one():
    """Two neighbours are gains; the slower one is told first, while the other is under way."""
    space = Tiled()
    droplet = new(latency_s=space.latency_s(space.at(*space.START)))
    asked = sorted(droplet.ask(100), key=space.latency_s)
    clock = Clock(space, noise=1e-4)
    slower = next(c for c in asked if space.latency_s(asked[0]) < space.latency_s(c) < space.latency_s(asked[0].rival))
    droplet.tell([slower], clock([slower]))
    assert droplet.incumbent == replace(slower, rival=None)
    droplet.tell([asked[0]], clock([asked[0]]))
    assert droplet.incumbent.key == slower.key  # not compared with it yet
    again = droplet.ask(8)
    assert again[0].key == asked[0].key and all(c.rival.key == slower.key for c in again)
    droplet.tell(again[:1], clock(again[:1]))
    assert droplet.incumbent.key == asked[0].key


@pytest.mark.parametrize("count", [1, 10, 20, 45])
def test_a_resumed_descent_stands_where_it_stood_and_asks_nothing_twice(count):
    space = Tiled()
    before = descend(new(), Clock(space, noise=0.003, seed=3), total=count)
    stood = new()
    descend(stood, Clock(space, noise=0.003, seed=3), total=count)
    resumed = new(known=before)
    stays = space.latency_s(resumed.incumbent) <= space.latency_s(stood.incumbent)
    assert stays and resumed.moves == stood.moves
    after = descend(resumed, Clock(space, noise=0.003, seed=4))
    assert resumed.incumbent.decisions == BOTTOM and resumed.local_minimum
    assert not {trial.key for trial in before} & {trial.key for trial in after}


def test_a_resumed_search_of_a_finished_descent_has_nothing_to_ask():
    space = Tiled()
    before = descend(new(), Clock(space, noise=0.003))
    resumed = new(known=before)
    assert resumed.ask(8) == [] and resumed.local_minimum
    assert resumed.incumbent.decisions == BOTTOM


def test_it_needs_few_trials_on_a_real_table():
    """From any of 40 points to within 3 % of the best of 468, mostly, in less than 60 trials."""
    space = RecordedSpace.load(TABLE)
    ran = [index for index in range(len(space)) if isinstance(space.answer(index), float)]
    best, reached = min(map(space.answer, ran)), []
    for start in np.random.default_rng(0).choice(ran, 40):
        droplet = Droplet(Numbered(space), space.realize(int(start)), p_value=0.05)
        trials = descend(droplet, space.measure, total=60)
        reached.append(best / min(trial.latency_s for trial in trials if trial.ok))
    assert median(reached) > 0.97 and mean(reached) > 0.95


def test_two_knobs_that_only_change_together_are_no_end():
    """As of a register tile: each of the two alone would make it too large, or leave registers idle."""
    space = RecordedSpace(
        {"high": (1, 2, 4, 8), "wide": (8, 4, 2, 1)},
        lambda index: (
            None if index % 4 > index // 4 else 1e-3 * (1 + 10 * (index // 4 - index % 4) - 0.1 * (index % 4))
        ),
    )
    droplet = Droplet(Numbered(space), space.realize(0), p_value=0.05)
    trials = descend(droplet, space.measure)
    assert droplet.incumbent.decisions == [15] and droplet.moves == 3
    assert len(trials) <= 10
