"""Kernel by kernel beside onnxruntime."""

import math

import pytest

import tvmlab
from tvmlab.operators import _beside


def site(kernel, in_channels, out_channels, size, groups=1):
    return {
        "kernel": (kernel, kernel),
        "in_channels": in_channels,
        "out_channels": out_channels,
        "groups": groups,
        "size": (size, size),
    }


def ours(kernel_class, microseconds, *shapes, calls=1):
    return {"kernel_class": kernel_class, "in_model_s": [microseconds * 1e-6], "shapes": list(shapes), "calls": calls}


def theirs(operator, microseconds, inputs=(), output=()):
    return {"operator": operator, "latency_s": microseconds * 1e-6, "inputs": list(inputs), "output": list(output)}


def conv_of(output_channels, size, weight, microseconds, data_channels):
    shapes = [[1, data_channels, 2 * size, 2 * size], weight]
    return theirs("Conv", microseconds, shapes, [1, output_channels, size, size])


def test_a_row_has_all_convolutions_of_one_shape():
    sites = [site(3, 64, 64, 56), site(3, 64, 64, 56), site(1, 64, 64, 56)]
    kernels = [
        ours("conv2d+add+relu", 100, (1, 64, 56, 56), (64, 64, 3, 3), (1, 64, 1, 1), (1, 64, 56, 56), calls=2),
        ours("conv2d+add", 30, (1, 64, 56, 56), (64, 64, 1, 1), (1, 64, 1, 1), (1, 64, 56, 56)),
    ]
    nodes = [
        conv_of(64, 56, [64, 64, 3, 3], 80, 64),
        conv_of(64, 56, [64, 64, 3, 3], 90, 64),
        conv_of(64, 56, [64, 64, 1, 1], 50, 64),
    ]
    frame = _beside(kernels, nodes, sites)
    assert list(frame.index) == ["conv 3x3", "conv 1x1"]  # the largest difference first
    large, small = frame.iloc[0], frame.iloc[1]
    assert (large["calls"], large["shape"]) == (2, "64->64 @ 56x56")
    assert large["ours_us"] == pytest.approx(200) and large["onnxruntime_us"] == pytest.approx(170)
    assert large["ratio"] == pytest.approx(200 / 170) and large["difference_us"] == pytest.approx(30)
    assert small["difference_us"] == pytest.approx(-20)


@pytest.mark.parametrize(
    ("kernel_class", "shapes", "expected"),
    [
        (
            "conv2d_NCHWc+add",
            [(1, 2, 14, 14, 32), (3, 2, 3, 3, 32, 32), (1, 3, 1, 1, 32), (1, 3, 14, 14, 32)],
            "conv 3x3",
        ),
        ("winograd_conv2d", [(1, 2, 14, 14, 32), (6, 6, 3, 2, 32, 32), (1, 3, 14, 14, 32)], "conv 3x3"),
        ("depthwise_conv2d", [(1, 2, 14, 14, 32), (2, 3, 3, 32), (1, 2, 14, 14, 32)], "depthwise conv 3x3"),
        ("grouped_conv2d", [(1, 64, 14, 14), (64, 32, 3, 3), (1, 64, 14, 14)], "2 groups conv 3x3"),
    ],
)
def test_packed_kernels_are_known_by_their_shapes(kernel_class, shapes, expected):
    sites = [
        site(3, 64, 90, 14),
        site(3, 64, 64, 14, groups=2 if "groups" in expected else 64),
        site(1, 64, 90, 14),
    ]
    frame = _beside([ours(kernel_class, 10, *shapes)], [], sites)
    assert list(frame.index) == [expected]
    assert math.isnan(frame["onnxruntime_us"].iloc[0])


def test_a_padded_kernel_takes_the_nearest_convolution():
    sites = [site(1, 40, 40, 7), site(1, 40, 64, 7)]
    shapes = ((1, 2, 7, 7, 32), (2, 2, 1, 1, 32, 32), (1, 2, 7, 7, 32))
    frame = _beside([ours("conv2d", 10, *shapes), ours("conv2d", 20, *shapes)], [], sites)
    assert dict(zip(frame["shape"], frame["ours_us"], strict=True)) == pytest.approx(
        {"40->64 @ 7x7": 10, "40->40 @ 7x7": 20}
    )


def test_what_is_no_convolution_shares_a_row_a_type():
    kernels = [ours("max_pool2d", 5), ours("layout_pack", 2), ours("layout_unpack", 1), ours("strange", 7)]
    kernels.append(ours("reshape+transpose+reshape", 6))
    nodes = [theirs("MaxPool", 3), theirs("ReorderInput", 4), theirs("ReorderInput", 4), theirs("ReorderOutput", 1)]
    frame = _beside(kernels, nodes, [])
    assert frame.loc["MaxPool", "ratio"] == pytest.approx(5 / 3)
    assert frame.loc["layout", "ours_us"] == pytest.approx(3) and frame.loc["layout", "calls"] == 2
    assert frame.loc["ReorderInput", "onnxruntime_us"] == pytest.approx(8)
    assert frame.loc["ReorderInput", "difference_us"] == pytest.approx(-8)
    assert frame.loc["Transpose", "ours_us"] == pytest.approx(6)
    assert frame.loc["strange", "difference_us"] == pytest.approx(7)


@pytest.mark.slow
def test_a_real_run_beside_onnxruntime(tiny_run):
    frame = tvmlab.compare_operators(tiny_run, repeats=3, threads=1)
    assert frame.loc["conv 3x3", "shape"] == "8->16 @ 14x14"
    for name in ("conv 3x3", "Gemm"):
        assert frame.loc[name, "ours_us"] > 0 and frame.loc[name, "onnxruntime_us"] > 0
        assert frame.loc[name, "calls"] == 1
    assert list(frame["difference_us"]) == sorted(frame["difference_us"], reverse=True)
