"""Convolutions on flattened planes: the arithmetic of the layout, and that the layout search knows of them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from net import Net

from tvmlab.core import Packing
from tvmlab.experiment import LayoutTuning
from tvmlab.layout_plan import LayoutPlan
from tvmlab.plane_ops import LANES, Plane, shuffled_channel

NCHW, B16 = Packing(), Packing(16)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (1, 3), (3, 1)])
@pytest.mark.parametrize(("kernel", "dilation"), [((1, 1), (1, 1)), ((3, 3), (1, 1)), ((3, 5), (2, 1))])
def test_a_position_reads_the_kernels_points_at_constant_distances(strides, kernel, dilation):
    """Every output pixel finds its points of the kernel; a vector reads contiguous elements of the padded plane."""
    output = (5, 7)
    plane = Plane(output, kernel, strides, dilation)
    q = np.arange(plane.vectors * LANES)
    for kh, kw in product(*map(range, kernel)):
        at = plane.read(q, kh, kw)
        assert at.min() >= 0 and at.max() < plane.rows * plane.pitch
        vectors = at.reshape(-1, LANES)
        assert (vectors == vectors[:, :1] + np.arange(LANES)).all()
        for row, column in product(*map(range, output)):
            expected = (row * strides[0] + kh * dilation[0]) * plane.pitch + column * strides[1] + kw * dilation[1]
            assert at[row * plane.pitch + column * strides[1]] == expected


def test_a_shuffle_is_a_transposition_of_the_channels():
    channels = np.arange(24)
    expected = channels.reshape(4, 6).T.ravel()
    assert [shuffled_channel(channel, 24, 4) for channel in channels] == expected.tolist()
    assert [shuffled_channel(channel, 24, 1) for channel in channels] == channels.tolist()


def unit(folder, groups):
    """A convolution, a depthwise one and a 1x1 to 16 channels."""
    net = Net(1, 32, 8, 8)
    a = net.op("Relu", net.conv("x", 32, 40, 1, group=groups))
    b = net.conv(a, 40, 40, 3, group=40, pads=[1] * 4)
    return net.model(folder, net.conv(b, 40, 16, 1))


def test_depthwise_beside_what_cannot_be_packed_is_tried_in_nchw_too(tmp_path, cpu):
    plan = LayoutPlan(unit(tmp_path, 4), cpu, LayoutTuning(blocks=(16,), algorithms=("direct",), trials_per_variant=2))
    tried = {site: [packing for packing, why in found.items() if why is None] for site, found in plan.choices.items()}
    assert tried == {"conv0": [NCHW], "conv1": [NCHW, B16], "conv2": [B16]}
    assert "8 input and 10 output channels are not both multiples of 16" in plan.choices["conv0"][B16]
    variants = [task.info.name.partition(" ")[2] for task in plan.variants]
    assert sorted(variants) == ["(NCHW)", "(NCHW16c)", "(NCHW16c)"]
    key = plan._keys["conv1", NCHW]
    _, packed = plan.decide(lambda task: 1e-6 if task == key else 2e-6)
    assert packed.assignment == {"conv2": B16} and packed.keys["conv1"] == key


def test_without_such_a_neighbour_it_is_not(tmp_path, cpu):
    plan = LayoutPlan(unit(tmp_path, 1), cpu, LayoutTuning(blocks=(16,), algorithms=("direct",), trials_per_variant=2))
    found = plan.choices["conv1"]
    assert found[NCHW] == "NCHW is not among the blocks to try" and found[B16] is None
