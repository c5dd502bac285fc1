"""The sketch space of real tasks: points, schedules and back."""

import time

import numpy as np
import pytest

from tvmlab.compat import structural_key
from tvmlab.spaces.knobs import Location, directions
from tvmlab.spaces.sketch import SketchSpace
from tvmlab.targets import target
from tvmlab.tasks import extract


@pytest.fixture(scope="module")
def space(tiny_tasks, cpu):
    task = tiny_tasks["conv2d+relu"]
    return SketchSpace(task.key, task.module, cpu.to_tvm())


@pytest.fixture(scope="module")
def samples(space):
    """Four candidates of each sketch."""
    rng = np.random.default_rng(0)
    found = [space.sample(sketch, rng) for sketch in range(len(space)) for _ in range(4)]
    assert all(found)
    return found


def test_samples_belong_to_the_sketch_they_were_drawn_from(space, samples):
    assert [candidate.sketch for candidate in samples] == [s for s in range(len(space)) for _ in range(4)]
    assert len({candidate.key for candidate in samples}) == len(samples)


def test_a_point_gives_its_candidate_back(space, samples):
    for candidate in samples:
        again = space.realize(space.point(candidate.payload.trace))
        assert again == candidate  # key, sketch and decisions
        assert structural_key(again.payload.mod) == candidate.key
        assert space.realize((candidate.sketch, candidate.decisions)) == candidate


def test_decisions_are_plain_data(samples):
    for candidate in samples:
        for decision in candidate.decisions:
            values = decision if isinstance(decision, list) else [decision]
            assert all(type(value) is int for value in values)


def test_an_invalid_tile_is_repaired_and_reported_as_applied(space, samples):
    candidate = samples[0]
    position = next(i for i, d in enumerate(candidate.decisions) if isinstance(d, list) and np.prod(d) == 14)
    wrong = [*candidate.decisions]
    wrong[position] = [1, 7, 1, 4]  # makes 28 of a loop of 14
    found = space.realize((candidate.sketch, wrong))
    assert found is not None
    assert found.decisions[position] != wrong[position]
    assert np.prod(found.decisions[position]) == 14
    # What is reported is what was applied: the same point makes the same program again.
    assert space.realize((found.sketch, found.decisions)).key == found.key


def test_a_point_that_does_not_apply_is_none(space, samples):
    candidate = samples[0]
    wrong = [*candidate.decisions]
    wrong[0] = [1, 1]  # four parts are needed
    assert space.realize((candidate.sketch, wrong)) is None


def test_mutation_changes_one_knob_and_leaves_the_point_alone(space, samples):
    rng = np.random.default_rng(1)
    for candidate in samples:
        point = (candidate.sketch, candidate.decisions)
        before = [list(d) if isinstance(d, list) else d for d in candidate.decisions]
        for _ in range(20):
            sketch, decisions = space.mutate(point, rng)
            assert sketch == candidate.sketch
            assert sum(a != b for a, b in zip(decisions, before, strict=True)) <= 1
        assert candidate.decisions == before


def test_most_mutations_of_a_valid_point_are_valid(space, samples):
    rng = np.random.default_rng(2)
    found = [space.realize(space.mutate((c.sketch, c.decisions), rng)) for c in samples]
    assert sum(candidate is not None for candidate in found) >= len(samples) * 0.7


def test_random_points_mostly_apply(space):
    rng = np.random.default_rng(3)
    found = [space.realize(space.random(index % len(space), rng)) for index in range(12)]
    assert sum(candidate is not None for candidate in found) >= 6


def test_encoding_has_one_length_and_tells_points_apart(space, samples):
    rng = np.random.default_rng(4)
    points = [(c.sketch, c.decisions) for c in samples]
    points += [space.random(index % len(space), rng) for index in range(200)]
    vectors = space.encode(points)
    assert vectors.shape[0] == len(points)
    assert np.isfinite(vectors).all()
    different = {str(point) for point in points}
    assert len({vector.tobytes() for vector in vectors}) == len(different) > 150


def test_the_same_seed_samples_the_same(space):
    first, second = (space.sample(0, np.random.default_rng(7)) for _ in range(2))
    assert first == second
    assert space.sample(0, np.random.default_rng(8)) != first


def test_two_spaces_of_a_task_are_the_same(space, samples, tiny_tasks, cpu):
    task = tiny_tasks["conv2d+relu"]
    other = SketchSpace(task.key, task.module, cpu.to_tvm())
    assert [other.realize((c.sketch, c.decisions)).key for c in samples] == [c.key for c in samples]


def test_a_trace_of_another_task_does_not_apply_or_is_named_foreign(space, tiny_tasks, cpu):
    task = tiny_tasks["matmul+add"]
    gemm = SketchSpace(task.key, task.module, cpu.to_tvm())
    foreign = gemm.sample(0, np.random.default_rng(0))
    found = space.replay(foreign.payload.trace)
    assert found is None or found.sketch == -1


def changed(candidate, other):
    """The positions at which two candidates' decisions differ."""
    pairs = zip(candidate.decisions, other.decisions, strict=True)
    return [position for position, (a, b) in enumerate(pairs) if a != b]


def test_neighbours_are_valid_and_one_step_away(space, samples):
    """All postprocessors were applied: each is the candidate that its own point makes."""
    start = samples[0]
    found = space.neighbours(start)
    assert len({candidate.key for candidate in found} - {start.key}) == len(found) >= 15
    for candidate in found:
        assert candidate.sketch == start.sketch and len(changed(start, candidate)) == 1
    for candidate in found[::6]:
        assert space.realize((candidate.sketch, candidate.decisions)) == candidate


def test_neighbours_go_both_ways_along_every_knob(space, samples):
    start = samples[0]
    found = [candidate.decisions for candidate in space.neighbours(start)]
    for position, (knob, value) in enumerate(zip(space.knobs(start), start.decisions, strict=True)):
        steps = [step for way in knob.directions(value) if (step := knob.step(value, way)) is not None]
        taken = [decisions[position] for decisions in found if decisions[position] != value]
        assert all(step in steps for step in taken)
        if isinstance(value, list):
            assert len(taken) >= 0.7 * len(steps)  # what TVM repairs, or a postprocessor refuses, is left out


def test_a_location_that_tvm_moves_elsewhere_is_no_neighbour(space, samples):
    for start in samples:
        position = next((p for p, knob in enumerate(space.knobs(start)) if isinstance(knob, Location)), None)
        if position is None:
            continue
        asked = [*start.decisions]
        asked[position] = 19  # no nest is that deep
        repaired = space.realize((start.sketch, asked))
        assert repaired is not None and repaired.decisions[position] != 19
        assert space.vary(start, asked) is None
        break
    else:
        pytest.fail("no sketch has a compute location")


def test_a_trace_of_no_sketch_has_neighbours_too(space, samples):
    """Say one that was transferred: the knobs are read from the trace itself."""
    from tvm.s_tir import Schedule

    schedule = Schedule(space._module, seed=1)
    (name, *_) = [str(schedule.get(b).name_hint) for b in schedule.get_child_blocks(schedule.get_sblock("root"))][::-1]
    loop = schedule.get_loops(schedule.get_sblock(name))[1]
    schedule.split(loop, schedule.sample_perfect_tile(loop, n=3, max_innermost_factor=8, decision=[4, 2, 2]))
    start = space.replay(schedule.trace)
    assert start.sketch == -1 and list(start.decisions) == [[4, 2, 2]]
    found = {str(candidate.decisions[0]) for candidate in space.neighbours(start)}
    assert found == {"[2, 4, 2]", "[2, 2, 4]", "[8, 1, 2]", "[4, 1, 4]", "[8, 2, 1]", "[4, 4, 1]"}


def test_the_plainest_point_is_not_tiled(space):
    plain = space.plainest()
    assert plain.sketch == 0
    assert all(decision[1:] == [1] * (len(decision) - 1) for decision in plain.decisions if isinstance(decision, list))
    assert space.neighbours(plain)


@pytest.mark.slow
@pytest.mark.parametrize("kernel_class", ["conv2d+relu", "matmul+add"])
def test_neighbours_in_a_cuda_space(tiny_model, kernel_class):
    """From a valid point at least two in five of them are valid; no GPU is needed to see that."""
    h100 = target("nvidia/nvidia-h100")
    task = next(t for t in extract(tiny_model, h100) if t.info.kernel_class == kernel_class)
    space = SketchSpace(task.key, task.module, h100.to_tvm())
    start = space.plainest()
    assert start is not None and "threadIdx.x" in start.payload.mod.script()
    ways = directions(space.knobs(start), start.decisions)
    found = space.neighbours(start)
    assert len(found) >= 0.4 * len(ways) and len(found) >= 8
    assert all("threadIdx.x" in candidate.payload.mod.script() for candidate in found[::5])


@pytest.mark.slow
@pytest.mark.parametrize("kernel_class", ["conv2d+relu", "matmul+add"])
def test_a_cuda_space_has_valid_candidates(tiny_model, kernel_class):
    """No GPU is needed: TVM's postprocessors reject what a GPU cannot run."""
    h100 = target("nvidia/nvidia-h100")
    task = next(t for t in extract(tiny_model, h100) if t.info.kernel_class == kernel_class)
    space = SketchSpace(task.key, task.module, h100.to_tvm())
    rng = np.random.default_rng(0)
    started = time.monotonic()
    found = None
    while found is None and time.monotonic() - started < 120:
        found = space.sample(int(rng.integers(len(space))), rng)
    assert found is not None
    assert space.realize((found.sketch, found.decisions)).key == found.key
    assert "threadIdx.x" in found.payload.mod.script()
