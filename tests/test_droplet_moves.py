"""What a move of a droplet search takes: a plain is not walked on, a small gain is seen; without a device."""

from dataclasses import replace

import pytest
from test_droplet import BOTTOM, Clock, Tiled, descend, new

from tvmlab.stats import LEAD, turn_ratio


class Flat(Tiled):
    def latency_s(self, candidate):
        return 1e-4


def test_noise_does_not_move_it():
    """On a plain every move is a mistake: in 60 descents of about 4 batches there are few; the medians make many."""
    moves, by_median = 0, 0
    for seed in range(60):
        droplet = new(Flat(), seed=seed, latency_s=1e-4)
        descend(droplet, Clock(Flat(), noise=0.05, drift=0.05, seed=seed), total=32)
        moves += droplet.moves
        alone = new(Flat(), seed=seed, latency_s=1e-4)
        clock = Clock(Flat(), noise=0.05, drift=0.05, seed=seed)
        descend(alone, lambda asked, clock=clock: clock([replace(c, rival=None) for c in asked]), total=32)
        by_median += alone.moves
    assert moves <= 60 * 4 * 0.05 * 2 < by_median


class Turns(Clock):
    """As the device takes turns: five, and ten more for what then leads by 2 %."""

    def __init__(self, space, **options):
        super().__init__(space, pairs=5, **options)

    def trial(self, candidate):
        first, more = super().trial(candidate), super().trial(candidate)
        more = more, super().trial(candidate)
        if not first.rival or turn_ratio(first.latencies_s, first.rival_latencies_s) >= LEAD:
            return first
        return replace(
            first,
            latencies_s=sum((each.latencies_s for each in more), first.latencies_s),
            rival_latencies_s=sum((each.rival_latencies_s for each in more), first.rival_latencies_s),
        )


@pytest.mark.parametrize(("noise", "most"), [(0.004, 0), (0.04, 60 * 4 * 0.05)])
def test_the_best_of_many_equals_is_seldom_moved_to(noise, most):
    """Small noise: none leads by 2 %, and one in 32 is faster in all five turns; large noise: many lead by chance."""
    moves = 0
    for seed in range(60):
        droplet = new(Flat(), seed=seed, latency_s=1e-4)
        descend(droplet, Turns(Flat(), noise=noise, seed=seed), total=32)
        moves += droplet.moves
    assert moves <= most  # 42 where five in its favour are enough; 32 where the p-value is not divided


def test_a_small_gain_is_seen_through_drift():
    class Slope(Tiled):
        def latency_s(self, candidate):
            return 1e-4 * 0.97 ** candidate.decisions[2]

    for seed in range(5):
        droplet = new(Slope(), seed=seed, latency_s=1e-4)
        descend(droplet, Clock(Slope(), noise=0.005, drift=0.1, seed=seed))
        assert droplet.incumbent.decisions[2] == 3


def test_a_likely_gain_that_is_not_shown_among_many_is_timed_again_by_itself():
    class Slope(Tiled):
        def latency_s(self, candidate):
            return 1e-4 * 0.94 ** candidate.decisions[2]

    arrived, twice = 0, 0
    for seed in range(10):
        droplet = new(Slope(), seed=seed, latency_s=1e-4)
        trials = descend(droplet, Clock(Slope(), noise=0.08, seed=seed), batch=16)
        arrived += droplet.incumbent.decisions[2] == 3
        keys = [trial.key for trial in trials]
        twice += len(keys) - len(set(keys))
    assert arrived >= 8 and twice >= 5
    assert twice <= len(keys)  # of ten descents together


def test_what_is_timed_again_is_told_as_a_test_of_one():
    space = Tiled()
    droplet = new(space, latency_s=1e-3)
    asked = droplet.ask(16)
    start, rest = asked[0].rival, asked[1:]

    def told(candidate, faster_pairs):
        ours = [0.9e-3] * faster_pairs + [1.05e-3] * (20 - faster_pairs)
        return replace(Clock(space).trial(candidate), latencies_s=ours, rival_latencies_s=[1e-3] * 20)

    droplet.tell(asked, [told(asked[0], 11), *(told(each, 3) for each in rest)])  # p = 0.012: not shown, of 16
    assert droplet.moves == 0
    (again,) = (each for each in droplet.ask(16) if each.key == asked[0].key)
    assert again.rival == start
    droplet.tell([again], [told(again, 11)])
    assert droplet.moves == 1 and droplet.incumbent.key == again.key


def test_too_few_pairs_must_all_be_in_its_favour():
    for pairs in (1, 3):
        droplet = new()
        descend(droplet, Clock(Tiled(), noise=0.001, pairs=pairs))
        assert droplet.incumbent.decisions == BOTTOM
    droplet = new(latency_s=1e-4)
    (asked,) = droplet.ask(1)
    (trial,) = Clock(Tiled())([asked])
    droplet.tell([asked], [replace(trial, latencies_s=[1e-4, 3e-4], rival_latencies_s=[2e-4, 2e-4])])
    assert droplet.moves == 0
    droplet.tell([asked], [replace(trial, latencies_s=[1.995e-4] * 3, rival_latencies_s=[2e-4] * 3)])
    assert droplet.moves == 0  # a lead of less than 1 % had no more turns, so they say nothing
