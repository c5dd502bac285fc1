"""tvmlab.tasks and tvmlab.space: a task's space in two calls, whichever it is, and why it is not another."""

import random
from dataclasses import replace

import pytest
from net import Net
from test_templates import function, placeholder

import tvmlab
from tvmlab import overview
from tvmlab.core import InputError, TaskInfo
from tvmlab.spaces.sketch_points import tiling, tilings
from tvmlab.spaces.template import misfit, template_for
from tvmlab.targets import target
from tvmlab.tasks import Task


@pytest.fixture(scope="module")
def cpu():
    """A CPU with AVX-512, whatever this machine has: nothing is measured on it."""
    return target("cpu:znver4")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A 3x3 convolution, one of stride 2, and a view."""
    net = Net(1, 16, 12, 12)
    a = net.op("Relu", net.conv("x", 16, 32, 3, pads=[1] * 4))
    a = net.op("Relu", net.conv(a, 32, 32, 3, strides=[2, 2]))
    return net.model(tmp_path_factory.mktemp("overview"), net.op("Flatten", a))


@pytest.fixture(scope="module")
def template(model, cpu):
    return tvmlab.space(model, "conv0", cpu)


@pytest.fixture(scope="module")
def sketch(model, cpu):
    return tvmlab.space(model, "conv0", cpu, layout="NCHW")


def test_a_packed_convolution_has_a_template(template):
    assert template.kind == "template" and template.about == f"template conv2d_NCHWc: {len(template):,} points"
    knobs = template.knobs().set_index("knob")
    assert knobs["values"].prod() == len(template)
    assert knobs.loc["ow_tile", "about"] == "one of 1, 2, 3, 4, 6, 12"
    assert set(template[0]) == set(knobs.index)
    assert "oc_tile: one of 1, 2" in repr(template) and "conv2d" in repr(template)


def test_points_say_whether_and_why_not(template):
    shown = template.frame(len(template))
    assert shown["why_not"].iloc[0] == "" and template.why_not(0) == ""
    refused = shown[shown["why_not"] != ""].index
    assert len(refused) and template.why_not(refused[0]) == shown["why_not"][refused[0]]
    assert template.points.realize(refused[0]) is None and template.points.realize(0) is not None
    with pytest.raises(IndexError):
        template[len(template)]


def test_in_nchw_it_has_sketches_with_the_same_surface(sketch):
    assert sketch.kind == "sketch"
    assert (
        "sketches: no template covers it, packed layouts have one;" in sketch.about
        and f"{len(sketch):,} points" in sketch.about
    )
    knobs = sketch.knobs()
    sizes = knobs.groupby("sketch")["values"].prod()
    assert sizes.sum() == len(sketch) > 1e6
    first, last = sketch[0], sketch[len(sketch) - 1]
    assert (first["sketch"], last["sketch"]) == (0, sizes.index.max())
    assert first["tile conv2d_nchw[1]"] == [1, 1, 1, 32] and last["tile conv2d_nchw[1]"] == [32, 1, 1, 1]
    assert list(sketch.frame(2)["unroll_explicit"]) == [0, 0]
    with pytest.raises(IndexError):
        sketch[len(sketch)]


def test_a_sketch_point_is_what_its_schedule_says(sketch):
    drawn = random.Random(0).sample(range(len(sketch)), 20)
    reasons = {index: sketch.why_not(index) for index in drawn}
    assert "" in reasons.values() and len(set(reasons.values())) > 1
    for index, why in reasons.items():
        candidate = sketch.points.realize(index)
        assert (candidate is None) == bool(why)
        if candidate is not None:
            assert (candidate.sketch, candidate.decisions) == sketch.points.point(index)


def test_a_layer_is_named_by_its_site_or_its_task(model, cpu, template):
    by_task = tvmlab.space(model, template.task.name, cpu, layout="auto")
    assert by_task.task == template.task
    winograd = tvmlab.space(model, "conv0", cpu, layout="NCHW16c winograd2")
    assert "winograd" in winograd.points.template.name and winograd.task.key != template.task.key


def test_a_task_of_the_other_layout_is_told_so(model, cpu):
    plain, packed = (set(tvmlab.tasks(model, cpu, layout=layout).index) for layout in ("NCHW", "auto"))
    with pytest.raises(InputError, match=r'no task \S+ in layout="auto": it has one in layout="NCHW"'):
        tvmlab.space(model, min(plain - packed), cpu)
    with pytest.raises(InputError, match=r'no task \S+ in layout="NCHW": it has one in layout="auto"'):
        tvmlab.space(model, min(packed - plain), cpu, layout="NCHW")


def test_what_cannot_be_had_says_why(model, cpu):
    with pytest.raises(InputError, match=r"conv1 cannot be NCHW16c winograd2, Winograd needs stride 1.*NCHW16c$"):
        tvmlab.space(model, "conv1", cpu, layout="NCHW16c winograd2")
    with pytest.raises(InputError, match="has no layer or task 'conv7': it has conv0, conv1"):
        tvmlab.space(model, "conv7", cpu)
    with pytest.raises(InputError, match="a model has many tasks"):
        tvmlab.space(model, target=cpu)
    with pytest.raises(InputError, match="'NHWC' is not a packing"):
        tvmlab.space(model, "conv0", cpu, layout="NHWC")


def test_the_table_names_each_task_s_space(model, cpu):
    packed = tvmlab.tasks(model, cpu, layout="auto", spaces=True)
    convs = packed[packed["kernel_class"].str.startswith("conv2d")]
    assert convs["space"].str.fullmatch(r"template conv2d_NCHWc: [\d,]+ points").all() and len(convs) == 2
    assert (packed.loc[~packed["tunable"], "space"] == "none: a view in the compiled model").all()
    assert "space" not in tvmlab.tasks(model, cpu)
    plain = tvmlab.tasks(model, cpu, spaces=True)
    assert plain.loc[plain["kernel_class"] == "conv2d+add+relu", "space"].str.contains("no template covers it").all()


def test_a_template_that_does_not_fit_a_shape_says_so(cpu):
    from tvmlab import packed_ops

    wide = 1024  # channels in a block: 64 vectors, more than there are registers
    data, weight = placeholder("data", 1, 1, 4, 4, 16), placeholder("weight", 1, 1, 3, 3, 16, wide)
    conv = packed_ops.conv2d(data, weight, [1, 1], [1, 1, 1, 1], [1, 1], 1)
    module = function([data, weight], conv)
    assert template_for(module, cpu.to_tvm()) is None
    assert misfit(module, cpu.to_tvm()).startswith("template conv2d_NCHWc does not fit this shape, it needs 64")
    info = TaskInfo("0" * 16, "wide", "conv2d", 1, 1e6, 1e4, True)
    found = tvmlab.space(Task(info, module), target=cpu)
    assert found.kind == "sketch" and "template conv2d_NCHWc does not fit" in found.about
    assert overview.describe(Task(replace(info, tunable=False), module), cpu) == "none: a view in the compiled model"


@pytest.mark.parametrize(("extent", "parts", "most"), [(12, 2, 0), (12, 2, 4), (64, 3, 16), (7, 4, 0), (1, 2, 8)])
def test_tilings_are_counted_and_each_occurs_once(extent, parts, most):
    found = [tiling(index, extent, parts, most) for index in range(tilings(extent, parts, most))]
    assert len(set(found)) == len(found) > 0
    assert found == sorted(found)
    for sizes in found:
        product = 1
        for size in sizes:
            product *= size
        assert product == extent and len(sizes) == parts and (not most or sizes[-1] <= most)
    with pytest.raises(IndexError):
        tiling(len(found), extent, parts, most)
