"""Template spaces: every point computes what the unscheduled kernel computes, and the space is what it says it is."""

import math

import numpy as np
import pytest

from tvmlab.compat import load_meta_schedule
from tvmlab.core import InputError
from tvmlab.measure.check import difference, make_input
from tvmlab.spaces.schedules import Machine, chunk_balance, divisors
from tvmlab.tasks import arguments

tvm = pytest.importorskip("tvm")
X = 16  # channels in a block


@pytest.fixture(scope="module", autouse=True)
def _loaded():
    load_meta_schedule()


@pytest.fixture(scope="module")
def cpu():
    from tvmlab.targets import target

    return target("cpu").to_tvm()


def placeholder(name, *shape):
    from tvm import te

    return te.placeholder(shape, name=name)


def function(inputs, output):
    from tvm import te

    made = te.create_prim_func([*inputs, output]).with_attr("global_symbol", "main").with_attr("tirx.noalias", True)
    return tvm.IRModule({"main": made})


def epilogue(inputs, conv, residual):
    from tvm import topi

    blocks, y = int(conv.shape[1]), int(conv.shape[4])
    bias = placeholder("bias", 1, blocks, 1, 1, y)
    out, extra = topi.add(conv, bias), [bias]
    if residual:
        extra.append(placeholder("residual", *conv.shape))
        out = topi.add(out, extra[-1])
    return function([*inputs, *extra], topi.nn.relu(out))


def conv(channels=32, size=8, filters=64, kernel=3, stride=1, pad=1, *, residual=False, bare=False, groups=1):
    from tvmlab import packed_ops

    x = X if channels % X == 0 else channels
    data = placeholder("data", 1, channels // x, size, size, x)
    weight = placeholder("weight", filters // X, channels // groups // x, kernel, kernel, x, X)
    out = packed_ops.conv2d(data, weight, (stride,) * 2, (pad,) * 4, (1, 1), groups)
    return function([data, weight], out) if bare else epilogue([data, weight], out, residual)


def depthwise(channels=32, size=8, stride=1, pad=1):
    from tvmlab import packed_ops

    data, weight = placeholder("data", 1, channels // X, size, size, X), placeholder("weight", channels // X, 3, 3, X)
    out = packed_ops.depthwise_conv2d(data, weight, (stride,) * 2, (pad,) * 4, (1, 1))
    return epilogue([data, weight], out, False)


def plane(channels=8, size=8, filters=8, kernel=1, stride=1, pad=0, groups=2, *, residual=False, bare=False, **more):
    from tvm import topi

    from tvmlab import plane_ops

    data = placeholder("data", more.get("batch", 1), channels, size, more.get("columns", size))
    weight = placeholder("w", filters, channels // groups, kernel, kernel)
    strides = (stride, more.get("stride_w", stride))
    out = plane_ops.conv2d(data, weight, strides, (pad,) * 4, (1, 1), groups, more.get("shuffled", 1))
    if bare:
        return function([data, weight], out)
    extra = [placeholder("bias", 1, filters, 1, 1), *([placeholder("residual", *out.shape)] if residual else [])]
    for tensor in extra:
        out = topi.add(out, tensor)
    return function([data, weight, *extra], topi.nn.relu(out))


def winograd(channels=32, size=8, filters=32, tile=4):
    from tvmlab import winograd as algorithm

    alpha = tile + 2
    data = placeholder("data", 1, channels // X, size, size, X)
    weight = placeholder("weight", alpha, alpha, filters // X, channels // X, X, X)
    return epilogue([data, weight], algorithm.conv2d(data, weight, tile, (1, 1, 1, 1)), False)


def dense(rows=1, features=64, depth=48, block=32):
    from tvm import topi

    from tvmlab import packed_ops

    data, weight = placeholder("data", rows, depth), placeholder("weight", -(-features // block), depth, block)
    bias = placeholder("bias", 1, features)
    return function([data, weight, bias], topi.nn.relu(topi.add(packed_ops.dense(data, weight, features), bias)))


def pool(kind="max"):
    from tvm import topi

    data = placeholder("data", 1, 2, 9, 9, X)
    out = topi.nn.pool2d(data, (3, 3), (2, 2), (1, 1), (1, 1, 1, 1), kind, layout="NCHW16c")
    return function([data], out)


def softmax():
    from tvm import topi

    data = placeholder("data", 1, 100)
    return function([data], topi.nn.softmax(data))


CASES = {
    "conv": conv,
    "conv residual": lambda: conv(residual=True),
    "conv stem": lambda: conv(3, 14, 32, 7, 2, 3),
    "conv 1x1": lambda: conv(64, 7, 64, 1, 1, 0),
    "conv bare": lambda: conv(bare=True),
    "conv odd": lambda: conv(16, 13, 48, 3, 2, 1),
    "conv grouped": lambda: conv(64, 8, 64, groups=2),
    "depthwise": depthwise,
    "depthwise stride": lambda: depthwise(stride=2),
    "winograd4": winograd,
    "winograd4 ragged": lambda: winograd(size=7),
    "winograd2": lambda: winograd(tile=2),
    "winograd2 ragged": lambda: winograd(size=7, tile=2),
    "plane": plane,
    "plane ragged": lambda: plane(12, 7, 20, residual=True),
    "plane parts": lambda: plane(8, 16, 12, groups=4, shuffled=2, batch=2),
    "plane cut": lambda: plane(4, 16, 4, columns=6, stride_w=2),
    "plane bare": lambda: plane(bare=True),
    "plane 3x3": lambda: plane(8, 9, 4, 3, 1, 1),
    "plane 5x5": lambda: plane(4, 6, 4, 5, 1, 2),
    "plane depthwise": lambda: plane(6, 12, 6, 3, 1, 1, 6, shuffled=3, batch=2),
    "plane depthwise stride": lambda: plane(6, 9, 12, 3, 2, 1, 6),
    "dense": dense,
    "dense rows": lambda: dense(rows=6),
    "dense padded": lambda: dense(features=50),
    "max pool": pool,
    "average pool": lambda: pool("avg"),
    "softmax": softmax,
}


def run(module, cpu):
    with cpu:
        kernel = tvm.tirx.build(module, target=cpu)
    tensors = [
        tvm.runtime.tensor(make_input("t", index, shape, dtype), tvm.cpu())
        for index, (shape, dtype) in enumerate(arguments(module))
    ]
    kernel["main"](*tensors)
    return tensors[-1].numpy()


@pytest.mark.parametrize("name", CASES)
def test_points_compute_what_the_unscheduled_kernel_computes(name, cpu):
    from tvmlab.spaces.template import TemplateSpace

    module = CASES[name]()
    space = TemplateSpace("key", module, cpu)
    expected = run(module, cpu)
    drawn = np.random.default_rng(0).integers(0, len(space), 400)
    points = [index for index in dict.fromkeys(map(int, drawn)) if not space.why_not(index)][:2]
    for index in [*space.starts()[:2], *points]:
        found = space.realize(index)
        assert found is not None, space[index]
        assert not difference(run(found.payload.mod, cpu), expected), space[index]


@pytest.mark.parametrize("name", CASES)
def test_a_recorded_trace_makes_the_same_program_again(name, cpu):
    """The database keeps the trace; the compiled model is made from it."""
    from tvm.s_tir import Schedule, Trace

    from tvmlab.compat import structural_key
    from tvmlab.spaces.template import TemplateSpace

    module = CASES[name]()
    space = TemplateSpace("key", module, cpu)
    found = space.realize(space.starts()[0])
    again = Schedule(module)
    Trace.apply_json_to_schedule(found.payload.trace.as_json(), again)
    assert structural_key(again.mod) == found.key


def test_points_and_indexes_are_each_others_inverse(cpu):
    from tvmlab.spaces.template import TemplateSpace

    space = TemplateSpace("key", conv(), cpu)
    assert len(space) == math.prod(space.radices)
    for index in (0, 1, len(space) // 3, len(space) - 1):
        assert space.index_of(space[index]) == index
    assert space[0] != space[1]
    with pytest.raises(IndexError):
        space[len(space)]
    with pytest.raises(InputError, match="oc_tile=99"):
        space.index_of({**space[0], "oc_tile": 99})


def test_a_point_that_does_not_fit_the_registers_says_so_and_is_not_made(cpu):
    from tvmlab.spaces.template import TemplateSpace

    space = TemplateSpace("key", conv(32, 28, 256), cpu)
    refused = [index for index in range(len(space)) if space.why_not(index)]
    assert refused and space.realize(refused[0]) is None
    frame = space.frame(len(space))
    assert set(frame.index[frame["why_not"] != ""]) == set(refused)
    assert frame["why_not"].str.contains("accumulators").any()


@pytest.mark.parametrize("shape", [{}, {"kernel": 1, "pad": 0}, {"channels": 64, "size": 7, "stride": 2}])
def test_a_chunk_of_channels_goes_over_whole_planes_with_and_without_an_epilogue(shape, cpu):
    from tvm.s_tir import Schedule

    from tvmlab.spaces.template import TemplateSpace

    for bare in (False, True):
        module = conv(**shape, bare=bare)
        space = TemplateSpace("key", module, cpu)
        chunked = [index for index in range(len(space)) if space[index]["ic_chunk"] and not space.why_not(index)]
        index = chunked[len(chunked) // 2]
        found = space.realize(index)
        assert found is not None, space[index]
        assert not difference(run(found.payload.mod, cpu), run(module, cpu)), space[index]
        schedule = Schedule(found.payload.mod)
        parallel = schedule.get_loops(schedule.get_sblock("conv2d_NCHWc_update"))[0]
        blocks = 64 // X // space[index]["oc_tile"]
        assert int(schedule.get(parallel).extent) == blocks, "a plane is cut, and its chunks are not whole"


def test_starts_are_valid_distinct_and_ordered_by_estimated_cost(cpu):
    from tvmlab.spaces.template import TemplateSpace

    space = TemplateSpace("key", conv(64, 28, 128), cpu)
    starts = space.starts()
    assert len(set(starts)) == len(starts) == 12
    assert not any(map(space.why_not, starts))
    costs = [space.template.cost(space[index]) for index in starts]
    assert costs == sorted(costs)


def test_features_have_one_length_and_tell_points_apart(cpu):
    from tvmlab.spaces.template import TemplateSpace

    space = TemplateSpace("key", conv(), cpu)
    rows = np.array([space.encode(index) for index in range(0, len(space), 7)])
    assert rows.dtype == np.float32 and np.isfinite(rows).all()
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_the_register_tile_follows_the_vector_width_and_the_registers():
    """A tile for 32 registers of 16 lanes would spill on AVX2 (docs/tvm.md)."""
    from tvmlab.spaces.cpu_templates import Conv2d

    blocks = ["data_pad", "conv2d_NCHWc"]
    wide, narrow = (Conv2d.match(conv(32, 28, 256), blocks, Machine(*sizes)) for sizes in ((16, 32, 2), (8, 16, 2)))

    def registers(template, values, lanes):
        return values["oc_tile"] * values["oh_tile"] * values["ow_tile"] * X // lanes

    best = {"wide": wide.starts()[0], "narrow": narrow.starts()[0]}
    assert 8 < registers(wide, best["wide"], 16) <= 31
    assert 4 < registers(narrow, best["narrow"], 8) <= 15


def test_a_product_without_a_template_is_left_to_the_sketches(cpu):
    from tvm import te, topi

    from tvmlab.spaces.template import TemplateSpace, template_for

    data, weight = placeholder("data", 1, 8, 8, 8), placeholder("weight", 8, 8, 3, 3)
    plain = function([data, weight], topi.nn.conv2d_nchw(data, weight, 1, 1, 1))
    assert template_for(plain, cpu) is None
    with pytest.raises(InputError, match="no template covers task k1"):
        TemplateSpace("k1", plain, cpu)
    scalar = function([te.placeholder((), name="a")], te.compute((), lambda: tvm.tirx.const(1.0), name="one"))
    assert template_for(scalar, cpu) is None


def test_parts_of_a_plane_are_taken_only_where_its_rows_leave_no_gap(cpu):
    from tvmlab.spaces.template import TemplateSpace

    whole, parts = (TemplateSpace("key", module, cpu) for module in (plane(size=7), plane(size=16)))
    assert whole.template.name == parts.template.name == "plane_conv2d"
    assert whole.template.knobs["p_chunk"] == (0,) and parts.template.knobs["p_chunk"] == (0, 1, 2, 4, 8)
    assert parts.template.knobs["data"] == ("none",) and whole.template.knobs["data"] == ("chunk", "root")
    refused = {**parts[parts.starts()[0]], "p_chunk": 2, "p_tile": 4}
    assert parts.why_not(parts.index_of(refused)) == "p_tile 4 does not divide p_chunk 2"


@pytest.mark.parametrize("stride", [1, 2])
def test_a_plane_is_computed_in_whole_vectors(stride, cpu):
    """No pixel reads the last lanes of rows of 14 at a pitch of 16: without them nothing would be a vector."""
    from tvmlab.spaces.template import TemplateSpace

    space = TemplateSpace("key", plane(4, 14 * stride, 4, 3, stride, 1, 4), cpu)
    for index in space.starts():
        found = space.realize(index)
        assert found is not None and "T.where" not in found.payload.mod.script()


def test_helpers():
    assert divisors(56, 14) == (1, 2, 4, 7, 8, 14)
    assert chunk_balance(4, 2) == 1.0 and chunk_balance(1, 2) == 2.0
