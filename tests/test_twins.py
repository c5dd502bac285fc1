"""The sketch as a coordinate: of a point a descent tries the same decisions in the other sketches first."""

import hashlib

import pytest
from test_droplet import BOTTOM, Clock, Tiled, descend, new

from tvmlab.core import Candidate


class Twins(Tiled):
    """Tiled twice: in the second sketch everything takes `factor` times as long."""

    def __init__(self, factor):
        self.factor = factor

    def vary(self, candidate, decisions):
        return None if decisions[1][1] == 9 else self.at(*decisions, sketch=candidate.sketch)

    def at(self, *decisions, sketch=0):
        key = hashlib.sha256(repr((sketch, decisions)).encode()).hexdigest()[:16]
        return Candidate(self.task_key, key, sketch, list(decisions))

    def elsewhere(self, candidate):
        return [self.at(*candidate.decisions, sketch=1 - candidate.sketch)]

    def latency_s(self, candidate):
        return super().latency_s(candidate) * (self.factor if candidate.sketch else 1)


@pytest.mark.parametrize(("factor", "sketch"), [(0.5, 1), (2, 0)])
def test_the_twin_comes_first_and_is_stood_on_where_it_is_faster(factor, sketch):
    space = Twins(factor)
    droplet = new(space, latency_s=space.latency_s(space.at(*space.START)))
    trials = descend(droplet, Clock(space, noise=0.003), ahead=False)
    assert (trials[0].sketch, trials[0].decisions) == (1, list(space.START))
    assert (droplet.incumbent.sketch, droplet.incumbent.decisions) == (sketch, BOTTOM)
    assert droplet.local_minimum


def test_an_interrupted_descent_stands_in_the_other_sketch_again():
    space = Twins(0.5)
    latency_s = space.latency_s(space.at(*space.START))
    before = descend(new(space, latency_s=latency_s), Clock(space, noise=0.003), total=40)
    resumed = new(space, latency_s=latency_s, known=before)
    assert resumed.incumbent.sketch == 1 and resumed.incumbent.decisions != list(space.START)
    descend(resumed, Clock(space, noise=0.003))
    assert (resumed.incumbent.sketch, resumed.incumbent.decisions) == (1, BOTTOM)
