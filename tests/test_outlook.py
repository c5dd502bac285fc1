"""What trials speak against is put off, and still looked at before a descent ends."""

import numpy as np
import pytest
from test_droplet import Clock, Tiled, descend
from test_scout import TwoSketches

from tvmlab.core import Trial, TrialStatus
from tvmlab.search.droplet import Droplet
from tvmlab.search.outlook import Outlook
from tvmlab.spaces.knobs import directions, stepped


class Cliff(Tiled):
    """As Tiled, but every choice other than the first is ten times slower."""

    def latency_s(self, candidate):
        return super().latency_s(candidate) * (10 if candidate.decisions[2] else 1)


def points(space, count, seed=0):
    rng = np.random.default_rng(seed)
    return [space.at(*(knob.random(rng) for knob in space.KNOBS)) for _ in range(count)]


def trials_of(space, candidates):
    return Clock(space, pairs=3)(candidates)


@pytest.fixture
def space():
    return Cliff()


def test_what_is_far_slower_is_not_promising_and_neighbours_of_a_kind_are(space):
    start = space.at(*space.START)
    outlook = Outlook([(start, space.knobs(start))], seed=0)
    for trial in trials_of(space, points(space, 200)):
        outlook.learn(trial, trial.latency_s)
    here = [[16, 2, 2], [12, 3], 0]
    slow, near = [[16, 2, 2], [12, 3], 1], [[8, 4, 2], [12, 3], 0]
    assert outlook.promising(0, here, [slow, near]) == [False, True]
    slower, faster = outlook.scores(0, [slow, near])
    assert slower < 0.2 < faster


def test_nothing_speaks_against_what_nothing_is_known_of(space):
    start = space.at(*space.START)
    outlook = Outlook([(start, space.knobs(start))], seed=0)
    assert outlook.promising(0, space.START, [[[16, 2, 2], [12, 3], 1]]) == [True]
    assert outlook.scores(5, [[1, 2], [3, 4]]).tolist() == [1, 1]
    assert outlook.scores(0, []).shape == (0,)


def test_of_a_sketch_without_a_trial_nothing_is_expected_and_other_shapes_are_left_out():
    space = TwoSketches(lowest_s=0.5e-4)
    bases = [space.at(*space.START), space.second(3, 3)]
    outlook = Outlook([(base, space.knobs(base)) for base in bases], seed=0)
    for trial in trials_of(space, [space.second(x, y) for x in range(12) for y in range(0, 12, 2)]):
        outlook.learn(trial, trial.latency_s)
    untuned = Trial("d" * 16, -1, "default", 0, "d" * 16, 0, [], TrialStatus.OK, [1e-3])
    outlook.learn(untuned, untuned.latency_s)  # of no sketch: it has no decisions
    near, far = outlook.scores(1, [[9, 8], [0, 0]])
    assert near > far
    assert outlook.scores(0, [space.START]).tolist() == [1]  # nothing was learnt of it


def test_a_descent_puts_off_what_is_expected_to_be_slow_and_ends_beside_all_of_it(space):
    earlier = trials_of(space, points(space, 200))
    start = space.at([16, 2, 2], [12, 3], 0)
    droplet = Droplet(space, start, p_value=0.05, latency_s=space.latency_s(start), earlier=earlier)
    trials = descend(droplet, Clock(space, noise=0.002))
    slow = [bool(trial.decisions[2]) for trial in trials]
    assert droplet.local_minimum and droplet.incumbent.decisions == [[4, 2, 8], [12, 3], 0]
    end = droplet.incumbent.decisions
    around = [stepped(space.KNOBS, end, [way]) for way in directions(space.KNOBS, end)]
    valid = [point for point in around if point is not None and space.vary(start, point) is not None]
    tried = [trial.decisions for trial in trials]
    assert all(point in tried for point in valid)
    # The choice's neighbours come after the tiles'; and once it was told that the model is right, after all else.
    assert slow.index(True) > len(slow) / 5
    assert sum(slow[: len(slow) // 2]) <= 2


def test_a_way_that_led_far_uphill_is_taken_again_at_the_end_only(space):
    start = space.at(*space.START)
    droplet = Droplet(space, start, p_value=0.05, latency_s=space.latency_s(start))
    trials = descend(droplet, Clock(space, noise=0.002), batch=4, ahead=False)
    slow = [number for number, trial in enumerate(trials) if trial.decisions[2]]
    moved = [number for number, trial in enumerate(trials) if trial.rival != trials[max(number - 1, 0)].rival]
    assert droplet.moves >= 5
    assert sum(number < moved[-1] for number in slow) <= 2  # beside the first point, before anything was known
    assert any(number > moved[-1] for number in slow)
