"""Schedules carried over to other shapes: the nearest tiles and points, on real spaces of small kernels."""

import itertools
import math

import numpy as np
import pytest
from net import Net

from tvmlab import layouts
from tvmlab.spaces import adapt
from tvmlab.spaces.adapt import adapt_trace, adapt_values, nearest_points, nearest_tile
from tvmlab.spaces.sketch import SketchSpace
from tvmlab.spaces.template import TemplateSpace
from tvmlab.tasks import extract


def factorisations(extent, parts):
    divisors = [size for size in range(1, extent + 1) if extent % size == 0]
    return [sizes for sizes in itertools.product(divisors, repeat=parts) if math.prod(sizes) == extent]


def apart(one, other):
    """The distance as the module's docstrings tell it, written down once more."""
    weights = [0.25, *[1.0] * (len(one) - 2), 1.25]
    return sum(weight * abs(math.log2(a / b)) for weight, a, b in zip(weights, one, other, strict=True))


@pytest.mark.parametrize("limit", [0, 4])
def test_the_nearest_tile_is_the_nearest_of_all(limit):
    rng = np.random.default_rng(0)
    for _ in range(60):
        parts, extent = int(rng.integers(2, 5)), int(rng.choice([1, 13, 24, 56, 60]))
        wanted = [int(size) for size in rng.choice([1, 2, 3, 7, 8, 16], parts)]
        allowed = [sizes for sizes in factorisations(extent, parts) if not limit or sizes[-1] <= limit]
        found = nearest_tile(wanted, extent, limit)
        assert tuple(found) in allowed
        assert apart(found, wanted) == pytest.approx(min(apart(sizes, wanted) for sizes in allowed))


def test_a_tile_that_fits_stays_and_a_large_extent_is_no_effort():
    assert nearest_tile([4, 1, 7, 2], 56) == [4, 1, 7, 2]
    assert nearest_tile([8, 4, 4, 8, 9], 9216 * 10, 64)[-1] <= 64
    assert nearest_tile([7], 12) == [12]


def test_points_come_in_order_of_distance_each_once():
    knobs = {"tile": (1, 2, 4, 8), "pad": ("root", "row"), "pair": ((1, 1), (2, 1), (4, 4))}
    values = {"tile": 4, "pad": "row", "pair": (2, 2)}
    found = list(nearest_points(values, knobs))
    assert len(found) == 24 == len({tuple(point.values()) for point in found})
    distances = [sum(adapt._apart(values[name], point[name]) for name in knobs) for point in found]
    assert distances == sorted(distances)
    assert found[0] == {"tile": 4, "pad": "row", "pair": (2, 1)}
    assert [point["tile"] for point in nearest_points({}, {"tile": (1, 2)}, most=1)] == [1]


def conv_tasks(folder, cpu, size, channels, *, block=0):
    """The tasks of two convolutions by kernel class: conv2d+add+relu, and conv2d+add+add+relu."""
    net = Net(1, channels, size, size)
    a = net.op("Relu", net.conv("x", channels, channels, 3, pads=[1] * 4))
    model = net.model(folder, net.op("Relu", net.op("Add", "x", net.conv(a, channels, channels, 3, pads=[1] * 4))))
    assignment = layouts.uniform(model, block) if block else None
    return {task.info.kernel_class: task for task in extract(model, cpu, assignment)}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory, cpu):
    return [conv_tasks(tmp_path_factory.mktemp("net"), cpu, *shape) for shape in ((14, 16), (13, 24))]


def space_of(task, cpu):
    return SketchSpace(task.key, task.module, cpu.to_tvm())


@pytest.fixture(scope="module")
def traces(kernels, cpu):
    """Random valid schedules of the first kernel."""
    space = space_of(kernels[0]["conv2d+add+relu"], cpu)
    rng = np.random.default_rng(0)
    found = [space.sample(sketch, rng) for sketch in range(len(space)) for _ in range(3)]
    return [candidate.payload.trace for candidate in found]


@pytest.mark.parametrize("kernel_class", ["conv2d+add+relu", "conv2d+add+add+relu"])
def test_schedules_fit_another_shape_and_another_epilogue(kernels, traces, cpu, kernel_class):
    task = kernels[1][kernel_class]
    space = space_of(task, cpu)
    made = [adapt_trace(space, task.module, trace) for trace in traces]
    assert not [why for why in made if isinstance(why, str)]
    for candidate in made:
        tiles = [decision for decision in candidate.decisions if isinstance(decision, list)]
        # Every loop of the kernel: batch, channels, rows, columns, and the reduction; tiled as a whole.
        assert {math.prod(tile) for tile in tiles} == {1, 24, 13, 3}
        assert candidate.task_key == task.key and candidate.sketch >= 0
    assert len({candidate.key for candidate in made}) > 1


def test_a_schedule_of_the_same_kernel_stays_what_it_is(kernels, traces, cpu):
    task = kernels[0]["conv2d+add+relu"]
    space = space_of(task, cpu)
    for trace in traces[:2]:
        found = adapt_trace(space, task.module, trace)
        assert list(found.decisions) == space.point(trace)[1]
        assert found.key == space.replay(trace).key


def test_what_cannot_be_adapted_is_refused_with_a_reason(kernels, traces, cpu, monkeypatch):
    task = kernels[1]["conv2d+add+relu"]
    space = space_of(task, cpu)
    from tvm.s_tir import Schedule

    why = adapt_trace(space, task.module, Schedule(task.module).trace)
    assert why == "no sketch of this kernel takes its decisions"
    # A tile that does not make the extent: TVM would repair it, and the candidate would be another.
    monkeypatch.setattr(adapt, "nearest_tile", lambda sizes, extent, limit: list(sizes))
    assert adapt_trace(space, task.module, traces[0]) == "TVM changed its decisions"


def test_a_padding_that_the_source_lacks_stays_at_the_root(tmp_path, kernels, cpu):
    """A 1x1 convolution has no padding to place; a 3x3 takes its tiles."""
    net = Net(1, 16, 14, 14)
    model = net.model(tmp_path, net.op("Relu", net.conv("x", 16, 24)))
    source = next(task for task in extract(model, cpu) if task.info.kernel_class == "conv2d+add+relu")
    drawn = space_of(source, cpu).sample(0, np.random.default_rng(0))
    task = kernels[1]["conv2d+add+relu"]
    made = adapt_trace(space_of(task, cpu), task.module, drawn.payload.trace)
    assert len(made.decisions) == len(drawn.decisions) + 1
    assert made.decisions[-1] == -1


def test_another_operator_takes_the_decisions_that_it_has_too(traces, tiny_tasks, cpu):
    """A matrix product has two loops and a reduction: those of batch, channels and input channels."""
    task = tiny_tasks["matmul+add"]
    space = space_of(task, cpu)
    for trace in traces:
        made = adapt_trace(space, task.module, trace)
        rows, columns, depth, *_ = made.decisions
        assert [math.prod(tile) for tile in (rows, columns, depth)] == [1, 10, 3136]
        batch, channels = space.point(trace)[1][:2]
        assert rows == nearest_tile(batch, 1, 64) and columns == nearest_tile(channels, 10, 64)


@pytest.mark.parametrize(
    ("part", "whole", "found"), [("", "ab", []), ("ab", "cacb", [1, 3]), ("ba", "ab", None), ("aa", "ab", None)]
)
def test_a_part_is_found_in_order(part, whole, found):
    assert adapt._positions(part, whole) == found


def test_template_points_move_to_the_nearest_valid_one(tmp_path, cpu):
    source, target = (conv_tasks(tmp_path, cpu, *shape, block=8) for shape in ((14, 16), (13, 24)))
    kernel = next(name for name in source if name.startswith("conv2d"))
    one, other = (TemplateSpace(t[kernel].key, t[kernel].module, cpu.to_tvm()) for t in (source, target))
    for index in one.starts():
        made = adapt_values(other, one[index])
        assert not other.why_not(made.decisions[0])
        nearest = next(
            point for point in nearest_points(one[index], other.template.knobs) if not other.template.why_not(point)
        )
        assert other[made.decisions[0]] == nearest
    fitting = {**other[other.starts()[0]]}
    assert other[adapt_values(other, fitting).decisions[0]] == fitting


def test_a_template_space_without_a_valid_point_near_is_refused(tmp_path, cpu, monkeypatch):
    task = next(task for name, task in conv_tasks(tmp_path, cpu, 14, 16, block=8).items() if name.startswith("conv2d"))
    space = TemplateSpace(task.key, task.module, cpu.to_tvm())
    monkeypatch.setattr(space.template, "why_not", lambda values: "never")
    assert adapt_values(space, {}) == "no point near it is valid"
