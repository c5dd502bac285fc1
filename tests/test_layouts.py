"""Packed layouts: sites, what packings they can have, where transforms are placed, and that the numbers stay right."""

from __future__ import annotations

import numpy as np
import pytest
from net import Net

from tvmlab import winograd
from tvmlab.core import InputError, Packing
from tvmlab.layout_graph import place, read, transforms
from tvmlab.layouts import options, sites, uniform
from tvmlab.models import load_model
from tvmlab.tasks import compile_model, extract, lower

B8, B16, B32 = Packing(8), Packing(16), Packing(32)
BOUND = 1e-4  # of the largest output


def error(model, cpu, assignment) -> float:
    """The largest difference to onnxruntime over all outputs, relative to the largest element of each."""
    import onnxruntime
    import tvm
    from tvm import relax

    inputs = model.inputs_for(3)
    session = onnxruntime.InferenceSession(model.original.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, inputs)
    machine = relax.VirtualMachine(compile_model(lower(model, cpu, assignment)[0], cpu), tvm.cpu())
    found = machine["main"](*[tvm.runtime.tensor(array) for array in inputs.values()])
    found = [found] if hasattr(found, "numpy") else list(found)
    assert len(found) == len(expected)
    differences = []
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.numpy().shape == theirs.shape
        assert np.isfinite(theirs).all() and np.abs(theirs).max() > 0
        differences.append(np.abs(ours.numpy() - theirs).max() / np.abs(theirs).max())
    return max(differences)


def transforms_of(model, assignment):
    """The layout transforms that an assignment costs a model."""
    graph = read(model.module)
    return transforms(graph, place(graph, assignment))


def classes(model, cpu, assignment):
    return sorted(task.info.kernel_class for task in extract(model, cpu, assignment))


def stem(folder):
    """What most networks begin with, then a residual block whose channels no block divides."""
    net = Net(1, 3, 19, 19)
    a = net.op("Relu", net.conv("x", 3, 24, 7, strides=[2, 2], pads=[3] * 4))
    a = net.op("MaxPool", a, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    b = net.op("Clip", net.conv(a, 24, 40, 1), net.const(np.float32(0)), net.const(np.float32(6)))
    b = net.op("Sigmoid", net.conv(b, 40, 24, 3, pads=[0, 1, 2, 1], bias=False))
    c = net.op("Relu", net.op("Add", a, b))
    return net.model(folder, net.conv(c, 24, 16, 3, dilations=[2, 2], pads=[2] * 4))


@pytest.mark.parametrize(
    "assignment",
    [
        {"conv0": B16, "conv1": B16, "conv2": B16, "conv3": B16},
        {"conv0": B8, "conv1": B16, "conv2": B8, "conv3": B16},
        {"conv1": B16, "conv3": B16},
    ],
    ids=["uniform", "mixed", "half"],
)
def test_a_residual_network_with_padded_channels(tmp_path, cpu, assignment):
    assert error(stem(tmp_path), cpu, assignment) <= BOUND


def test_pools_of_padded_channels(tmp_path, cpu):
    net = Net(1, 3, 13, 13)
    a = net.conv("x", 3, 24, 3)
    square = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}
    outputs = [
        net.op("AveragePool", a, count_include_pad=1, **square),
        net.op("AveragePool", a, count_include_pad=0, **square),
        net.op("MaxPool", a, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
        net.op("AveragePool", a, kernel_shape=[4, 4], strides=[3, 3], ceil_mode=1, pads=[1, 0, 0, 1]),
        net.op("GlobalAveragePool", a),
        net.op("GlobalMaxPool", a),
    ]
    model = net.model(tmp_path, *outputs)
    assert error(model, cpu, {"conv0": B16}) <= BOUND
    assert {transform.source for transform in transforms_of(model, {"conv0": B16})} == {0, 16}


@pytest.mark.parametrize(("parts", "packed"), [((16, 32), True), ((16, 24), False)])
def test_concatenation_stays_packed_where_the_block_divides_every_part(tmp_path, cpu, parts, packed):
    net = Net(1, 16, 5, 5)
    both = [net.op("Relu", net.conv("x", 16, channels)) for channels in parts]
    net_out = net.conv(net.op("Relu", net.op("Concat", *both, axis=1)), sum(parts), 16)
    model = net.model(tmp_path, net_out)
    assignment = uniform(model, 16)
    assert len(assignment) == 3
    unpacked = [t for t in transforms_of(model, assignment) if (t.source, t.target) == (16, 0)]
    assert len(unpacked) == (1 if packed else 3)
    assert error(model, cpu, assignment) <= BOUND


def test_grouped_and_depthwise(tmp_path, cpu):
    net = Net(1, 32, 9, 9)
    a = net.op("Relu", net.conv("x", 32, 64, 3, group=2, pads=[1] * 4, strides=[2, 2]))
    a = net.conv(a, 64, 24, 1)
    a = net.op("Relu", net.conv(a, 24, 24, 3, group=24, pads=[1] * 4))
    model = net.model(tmp_path, net.conv(a, 24, 48, 3, group=24))
    assignment = uniform(model, 16)
    assert assignment == {"conv0": B16, "conv1": B16, "conv2": B16}
    assert error(model, cpu, assignment) <= BOUND
    assert [site.kind for site in sites(model)] == ["grouped_conv2d", "conv2d", "depthwise_conv2d", "grouped_conv2d"]
    found = classes(model, cpu, assignment)
    assert "grouped_conv2d_NCHWc+add+relu" in found and "depthwise_conv2d_NCHWc+add+relu" in found
    assert "grouped_conv2d_NCHW+add" in found  # the one whose groups have a channel each


def test_grouped_and_depthwise_in_nchw_are_kernels_with_a_template(tmp_path, cpu):
    from tvmlab.spaces.template import template_for

    net = Net(2, 12, 11, 14)
    a = net.op("Relu", net.conv("x", 12, 20, 1, group=4, strides=[2, 1], bias=False))
    b = net.op("Relu", net.conv(a, 20, 20, 3, group=20, pads=[2, 1, 0, 1], strides=[1, 2]))
    c = net.conv(b, 20, 20, 3, group=2, pads=[2] * 4, dilations=[2, 2])
    d = net.conv(c, 20, 40, 5, group=20, pads=[2, 3, 3, 2], strides=[3, 2], dilations=[1, 2])
    model = net.model(tmp_path, net.op("Add", b, c), d)
    assert error(model, cpu, {}) <= BOUND
    tasks = [task for task in extract(model, cpu, {}) if "conv2d" in task.info.kernel_class]
    found = {task.info.kernel_class: template_for(task.module, cpu.to_tvm()) for task in tasks}
    assert set(found) == {
        "grouped_conv2d_NCHW+relu",
        "depthwise_conv2d_NCHW+add+relu",
        "grouped_conv2d_NCHW+add",
    }
    assert all(template is not None and template.name == "plane_conv2d" for template in found.values())


def shuffle(net, tensor, channels, groups, size):
    split = net.op("Reshape", tensor, net.const(np.array([1, groups, channels // groups, size, size])))
    exchanged = net.op("Transpose", split, perm=[0, 2, 1, 3, 4])
    return net.op("Reshape", exchanged, net.const(np.array([1, channels, size, size])))


def test_a_channel_shuffle_in_front_of_a_plane_convolution_is_no_kernel(tmp_path, cpu):
    net = Net(1, 12, 6, 6)
    a = net.op("Relu", net.conv("x", 12, 24, 1, group=2))
    b = net.op("Relu", net.conv(shuffle(net, a, 24, 4, 6), 24, 24, 3, group=24, pads=[1] * 4))
    c = shuffle(net, net.conv(b, 24, 12, 1, group=4), 12, 3, 6)  # read twice, once by another operator
    model = net.model(tmp_path, net.conv(c, 12, 12, 1, group=2), net.op("Tanh", c))
    assert error(model, cpu, {}) <= BOUND
    found = classes(model, cpu, {})
    assert len(found) == 5 and sum("transpose" in name for name in found) == 1
    assert error(model, cpu, {"conv1": B8}) <= BOUND
    assert sum("transpose" in name for name in classes(model, cpu, {"conv1": B8})) == 2


def test_what_only_resembles_a_channel_shuffle_is_left_as_it_is(tmp_path, cpu):
    net = Net(1, 12, 4, 4)
    split = net.op("Reshape", "x", net.const(np.array([1, 3, 4, 4, 4])))
    rows = net.op("Transpose", split, perm=[0, 1, 3, 2, 4])  # channels with rows
    a = net.conv(net.op("Reshape", rows, net.const(np.array([1, 12, 4, 4]))), 12, 12, 3, group=12)
    uneven = net.op("Transpose", net.op("Reshape", "x", net.const(np.array([1, 6, 8, 2, 2]))), perm=[0, 2, 1, 3, 4])
    b = net.conv(net.op("Reshape", uneven, net.const(np.array([1, 12, 4, 4]))), 12, 12, 3, group=12)
    model = net.model(tmp_path, net.op("Add", a, b))
    assert error(model, cpu, {}) <= BOUND
    assert sum("transpose" in name for name in classes(model, cpu, {})) == 2


@pytest.mark.parametrize(("size", "beta", "channels"), [(5, 0.75, 32), (3, 0.5, 24)])
def test_lrn_is_one_packed_operator(tmp_path, cpu, size, beta, channels):
    net = Net(1, 3, 6, 6)
    a = net.op("Relu", net.conv("x", 3, channels, 3))
    a = net.op("LRN", a, size=size, alpha=0.5, beta=beta, bias=0.7)
    model = net.model(tmp_path, net.conv(a, channels, 16))
    assert error(model, cpu, uniform(model, 16)) <= BOUND
    assert "lrn" in classes(model, cpu, uniform(model, 16))
    assert "lrn" not in classes(model, cpu, {"conv1": B16})  # its input is NCHW there


def test_pointwise_operators_with_constants_and_gates(tmp_path, cpu):
    net = Net(1, 16, 6, 6)
    a = net.op("Mul", net.conv("x", 16, 24), net.weight(24, 1, 1))
    a = net.op("Div", a, net.weight(1, 24, 1, 1, low=0.25))
    a = net.op("Sub", net.const(np.float32(2.0)), a)
    a = net.op("Add", a, net.weight(1, 1, 6, 6))
    gate = net.op("Sigmoid", net.conv(net.op("GlobalAveragePool", a), 24, 24))
    a = net.op("Mul", gate, a)
    a = net.op("Div", a, net.op("Exp", a))  # in padded channels nothing may become infinite
    a = net.op("Pow", net.op("Exp", a), net.const(np.float32(1.5)))
    model = net.model(tmp_path, net.conv(a, 24, 16), a)
    assert error(model, cpu, uniform(model, 16)) <= BOUND


def test_operators_that_need_nchw(tmp_path, cpu):
    net = Net(1, 16, 6, 6)
    a = net.op("Relu", net.conv("x", 16, 32))
    b = net.op("Reshape", a, net.const(np.array([1, 4, 8, 6, 6])))
    b = net.op("Reshape", net.op("Transpose", b, perm=[0, 2, 1, 3, 4]), net.const(np.array([1, 32, 6, 6])))
    c = net.op("Softmax", net.conv(b, 32, 16, 3), axis=1)
    d = net.op("Concat", a, net.op("Tanh", a), axis=3)  # along the columns
    model = net.model(tmp_path, c, d, a)
    assignment = uniform(model, 16)
    assert error(model, cpu, assignment) <= BOUND
    unpacked = [t.tensor for t in transforms_of(model, assignment) if t.target == 0]
    assert len(unpacked) == len(set(unpacked)) == 3  # a once for all its readers, its tanh, and what softmax reads


@pytest.mark.parametrize(
    ("tile", "size", "pads"),
    [(2, 7, [1, 0, 2, 1]), (4, 7, [1, 0, 2, 1])],
)
def test_winograd(tmp_path, cpu, tile, size, pads):
    net = Net(2, 24, size, size + 3)
    a = net.conv("x", 24, 16, 3, pads=pads)
    model = net.model(tmp_path, net.op("Relu", net.op("Add", a, net.conv("x", 24, 16, 3, pads=pads))))
    assignment = {"conv0": Packing(8, f"winograd{tile}"), "conv1": Packing(16, f"winograd{tile}")}
    assert error(model, cpu, assignment) <= BOUND
    assert f"conv2d_winograd{tile}_NCHWc+add+add+relu" in classes(model, cpu, assignment)  # fused to the convolution


@pytest.mark.parametrize(("tile", "bound"), [(2, 3e-6), (4, 2e-5)])
def test_error_of_winograd_in_single_precision(tile, bound):
    """The bounds that docs/decisions/0005-packing.md states, for 256 channels, data after ReLU, He's weights."""
    output, _, to_data = (matrix.astype("float32") for matrix in winograd.matrices(tile))
    rng, channels, alpha = np.random.default_rng(0), 256, tile + 2
    data = np.maximum(rng.standard_normal((20, channels, alpha, alpha)), 0).astype("float32")
    weight = (rng.standard_normal((1, channels, 3, 3)) * np.sqrt(2 / (9 * channels))).astype("float32")
    windows = np.lib.stride_tricks.sliding_window_view(data.astype("float64"), (3, 3), axis=(2, 3))
    exact = np.einsum("ncijkl,ckl->nij", windows, weight[0].astype("float64"))
    packed = winograd.transform_weight(weight, tile, channels, 1)[:, :, 0, 0, :, 0]
    product = np.einsum("ncij,ijc->nij", to_data @ data @ to_data.T, packed)
    errors = np.abs(output @ product @ output.T - exact).max(axis=(1, 2)) / np.abs(exact).max(axis=(1, 2))
    assert errors.max() <= bound


def test_dense_layers_of_any_batch(tmp_path, cpu):
    net = Net(3, 20)
    a = net.op("Relu", net.op("Gemm", "x", net.weight(40, 20), net.weight(40), transB=1))
    b = net.op("MatMul", a, net.weight(40, 10))
    c = net.op("MatMul", net.op("Reshape", b, net.const(np.array([1, 3, 10]))), net.weight(10, 64))
    model = net.model(tmp_path, net.op("Relu", net.op("Add", c, net.weight(64))), b)
    assignment = uniform(model, 16, dense_block=32)
    assert assignment == {"dense0": B16, "dense1": B16, "dense2": B32}
    assert error(model, cpu, assignment) <= BOUND
    assert classes(model, cpu, assignment).count("dense_pack+add+relu") == 2
    assert "dense_pack" not in " ".join(classes(model, cpu, {}))


def test_a_packed_vector_is_only_looked_at_by_a_dense_layer(tmp_path, cpu):
    net = Net(1, 16, 5, 5)
    a = net.op("Flatten", net.op("GlobalAveragePool", net.conv("x", 16, 32)))
    model = net.model(tmp_path, net.op("Gemm", a, net.weight(10, 32), transB=1))
    assert error(model, cpu, uniform(model, 16)) <= BOUND
    assert "layout_unpack" not in " ".join(classes(model, cpu, uniform(model, 16)))


def test_sites_of_equal_work_share_a_workload_and_a_task(tmp_path, cpu):
    net = Net(1, 16, 6, 6)
    a = net.op("Relu", net.conv("x", 16, 16, 3, pads=[1] * 4))
    b = net.op("Relu", net.conv(a, 16, 16, 3, pads=[1] * 4))
    model = net.model(tmp_path, net.conv(b, 16, 16, 3, pads=[1] * 4))
    first, second, third = sites(model)
    assert [site.name for site in (first, second, third)] == ["conv0", "conv1", "conv2"]
    assert first.workload == second.workload != third.workload
    assert (first.epilogue, third.epilogue) == (("add", "relu"), ("add",))
    weights = {task.info.kernel_class: task.info.weight for task in extract(model, cpu, uniform(model, 16))}
    assert weights["conv2d_NCHWc+add+relu"] == 2 and weights["conv2d_NCHWc+add"] == 1


def test_options_say_why_not(tmp_path):
    net = Net(1, 3, 12, 12)
    a = net.conv("x", 3, 48, 3, strides=[2, 2])
    a = net.conv(a, 48, 48, 3, group=2, pads=[1] * 4)
    a = net.conv(a, 48, 5, 3)
    first, second, third = sites(net.model(tmp_path, a))
    assert options(first, [16]) == {
        Packing(): None,
        B16: None,
        Packing(16, "winograd2"): "Winograd needs stride 1, this convolution has 2x2",
        Packing(16, "winograd4"): "Winograd needs stride 1, this convolution has 2x2",
    }
    assert "24 input and 24 output channels are not both multiples of 16" in options(second, [16])[B16]
    assert options(second, [8])[B8] is None
    assert "is for convolutions without groups" in options(second, [8])[Packing(8, "winograd2")]
    assert "3.2 times the work" in options(third, [16])[B16]
    assert options(third, [8])[Packing(8, "winograd2")] is None
    assert "smaller than a tile of 4x4" in options(third, [8])[Packing(8, "winograd4")]


@pytest.mark.parametrize("block", [3, 12, 24])
def test_a_block_that_divides_no_channels_pads_them_or_says_why_not(tmp_path, cpu, block):
    net = Net(1, 10, 7, 7)
    a = net.op("Relu", net.conv("x", 10, 14, 3, pads=[1] * 4))
    a = net.op("Relu", net.conv(a, 14, 14, 3, group=14))
    a = net.op("Flatten", net.conv(a, 14, 26, 1, group=2))
    model = net.model(tmp_path, net.op("Gemm", a, net.weight(26 * 25, 34)))
    assignment = uniform(model, block)
    for site in sites(model):
        why = options(site, [block])[Packing(block)]
        if site.kind != "dense":  # which has a block of its own
            assert (site.name in assignment) == (why is None)
        assert why is None or str(block) in why
    assert "dense0" in assignment and "conv2" not in assignment
    assert error(model, cpu, assignment) <= BOUND


def test_what_cannot_be_packed_is_refused(tmp_path, cpu):
    net = Net(1, 8, 6, 6)
    model = net.model(tmp_path, net.conv("x", 8, 5))
    with pytest.raises(InputError, match="conv0 cannot be NCHW16c: filling its channels"):
        lower(model, cpu, {"conv0": B16})
    with pytest.raises(InputError, match="no convolution or dense layer 'conv7'"):
        transforms_of(model, {"conv7": B16})


def test_weights_that_are_not_constant_are_named(tmp_path, cpu):
    net = Net(1, 16, 6, 6)
    kernel = net.op(
        "Reshape",
        net.op("Slice", "x", *(net.const(np.array([n])) for n in (0, 1, 3))),
        net.const(np.array([6, 16, 1, 1])),
    )
    model = net.model(tmp_path, net.conv(net.op("Conv", "x", kernel), 6, 8))
    assert "while the model runs" in options(sites(model)[0], [8])[B8]


def test_packings_as_text():
    for packing in (Packing(), B8, Packing(16, "winograd4")):
        assert Packing.parse(str(packing)) == packing
    for text in ("NCHW0c", "NHWC", "NCHW16c winograd3", "NCHW winograd4", ""):
        with pytest.raises(InputError):
            Packing.parse(text)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [0, 4])
def test_a_whole_network(cpu, tile):
    model = load_model("squeezenet")
    assert error(model, cpu, uniform(model, 16, tile)) <= BOUND


@pytest.mark.slow
def test_a_network_of_planes_and_shuffles(cpu):
    model = load_model("shufflenet")
    planes = {site.name for site in sites(model) if site.planar}
    assignment = {site: packing for site, packing in uniform(model, 16).items() if site not in planes}
    assert error(model, cpu, assignment) <= BOUND
    assert "transpose" not in " ".join(classes(model, cpu, assignment))
