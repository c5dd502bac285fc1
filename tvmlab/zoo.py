"""The zoo: real model graphs with seeded, well-scaled random weights.

Nine graphs come from the `onnx` wheel, which ships the ONNX model zoo's graphs without their weights for
its own tests; six are built here from their papers. Two of these are backbones of detectors: the network that
makes the features, at the detector's image size, without the layers that find boxes. The speed of a kernel does
not depend on what the weights are, as long as no activation overflows or vanishes, so random weights serve; the
models classify nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tvmlab.core import MissingTool
from tvmlab.moments import Moments
from tvmlab.shapes import data_inputs

__all__ = ["ALIASES", "ZOO", "Blueprint", "Entry", "blueprint", "fill"]

_GRAPH_OF_THE_WHEEL, _BUILT = "onnx model zoo graph", "built by tvmlab"


@dataclass(frozen=True)
class Blueprint:
    """A model whose weights are graph inputs after the data: `weights` has their names and shapes."""

    model: ModelProto
    weights: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Entry:
    """One row of the zoo."""

    source: str
    make: Callable[[], Blueprint]


def fill(plan: Blueprint, seed: int) -> ModelProto:
    """The model with its weights, a pure function of the graph and the seed.

    Every tensor has its own random stream, seeded by its name, so its values do not depend on the others.
    """
    moments = Moments(plan.model, plan.weights)
    model = ModelProto()
    model.CopyFrom(plan.model)
    kept = [value for value in model.graph.input if value.name not in plan.weights]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for name, shape in plan.weights.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = moments.law(name).draw(rng, shape).astype("<f4", copy=False)
        # Not numpy_helper.from_array: appending its result would copy VGG's half gigabyte once more.
        model.graph.initializer.add(name=name, data_type=TensorProto.FLOAT, dims=shape, raw_data=values.tobytes())
    return model


@cache
def blueprint(name: str) -> Blueprint:
    """The graph of a zoo model (not of an alias), made once a process. Do not change it."""
    return ZOO[name].make()


def _from_wheel(stem: str) -> Blueprint:
    path = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"light_{stem}.onnx"
    if not path.is_file():
        raise MissingTool(f"the onnx package lacks {path.name}", remedy="install the onnx version tvmlab pins")
    model = onnx.load(path)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    made = [node for node in graph.node if node.op_type == "ConstantOfShape"]
    nodes = [node for node in graph.node if node.op_type != "ConstantOfShape"]
    used = {name for node in nodes for name in node.input}
    weights = {node.output[0]: tuple(numpy_helper.to_array(constants[node.input[0]]).tolist()) for node in made}
    weights |= {
        name: tuple(tensor.dims)
        for name, tensor in constants.items()
        if tensor.data_type == TensorProto.FLOAT and name in used
    }
    return _blueprint(
        stem,
        nodes,
        [value for value in data_inputs(graph) if value.name in used],
        list(graph.output),
        weights,
        [tensor for name, tensor in constants.items() if name in used - weights.keys()],
        opset=model.opset_import[0].version,
    )


def _blueprint(
    name: str,
    nodes: list[NodeProto],
    inputs: list[Any],
    outputs: list[Any],
    weights: dict[str, tuple[int, ...]],
    constants: list[TensorProto],
    opset: int,
) -> Blueprint:
    values = [helper.make_tensor_value_info(weight, TensorProto.FLOAT, weights[weight]) for weight in weights]
    graph = helper.make_graph(nodes, name, [*inputs, *values], outputs, constants)
    opsets = [helper.make_operatorsetid("", opset)]
    return Blueprint(helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="tvmlab"), weights)


class _Builder:
    """Appends layers to a graph for square images of three channels."""

    def __init__(self, name: str, size: int = 224) -> None:
        self._name = name
        self._size = size
        self._nodes: list[NodeProto] = []
        self._weights: dict[str, tuple[int, ...]] = {}
        self._constants: dict[str, TensorProto] = {}

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Append a node; its name is also the name of its result, which is returned."""
        name = f"{kind.lower()}{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def weight(self, name: str, *shape: int) -> str:
        self._weights[name] = shape
        return name

    def conv(
        self,
        x: str,
        c_in: int,
        c_out: int,
        size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        bn: bool = True,
        bias: bool = False,
    ) -> str:
        """Convolution that keeps the extent (before striding); a bias, BatchNormalization, or both."""
        layer = f"conv{len(self._nodes)}"
        operands = [x, self.weight(f"{layer}.weight", c_out, c_in // groups, size, size)]
        if bias or not bn:
            operands.append(self.weight(f"{layer}.bias", c_out))
        x = self.op(
            "Conv",
            *operands,
            kernel_shape=[size] * 2,
            strides=[stride] * 2,
            pads=[size // 2] * 4,
            group=groups,
        )
        if not bn:
            return x
        statistics = (self.weight(f"{layer}.bn.{part}", c_out) for part in ("scale", "bias", "mean", "variance"))
        return self.op("BatchNormalization", x, *statistics, epsilon=1e-5)

    def linear(self, x: str, c_in: int, c_out: int) -> str:
        layer = f"linear{len(self._nodes)}"
        weight, bias = self.weight(f"{layer}.weight", c_out, c_in), self.weight(f"{layer}.bias", c_out)
        return self.op("Gemm", x, weight, bias, transB=1)

    def relu6(self, x: str) -> str:
        bounds = {"zero": 0.0, "six": 6.0}
        for name, value in bounds.items():
            self._constants[name] = numpy_helper.from_array(np.array(value, np.float32), name)
        return self.op("Clip", x, *bounds)

    def finish(self, **outputs: list[int]) -> Blueprint:
        """The graph; `outputs` are the shapes of its results by name, without the batch."""
        data, *results = (
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, *shape])
            for name, shape in {"data": [3, self._size, self._size], **outputs}.items()
        )
        constants = list(self._constants.values())
        return _blueprint(self._name, self._nodes, [data], results, self._weights, constants, opset=13)


def _resnet18() -> Blueprint:
    """He et al., "Deep Residual Learning for Image Recognition", CVPR 2016: table 1, 18-layer, option B."""
    net = _Builder("resnet18")
    x = net.op("Relu", net.conv("data", 3, 64, 7, stride=2))
    x = net.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    width = 64
    for stage, channels in enumerate((64, 128, 256, 512)):
        for block in range(2):
            stride = 2 if stage and not block else 1
            branch = net.op("Relu", net.conv(x, width, channels, 3, stride=stride))
            branch = net.conv(branch, channels, channels, 3)
            shortcut = x if width == channels else net.conv(x, width, channels, 1, stride=stride)
            x, width = net.op("Relu", net.op("Add", branch, shortcut)), channels
    return net.finish(**{net.linear(net.op("Flatten", net.op("GlobalAveragePool", x)), width, 1000): [1000]})


def _ssd512_resnet50_backbone() -> Blueprint:
    """He et al., CVPR 2016, table 1, 50-layer, option B, on the images of SSD512 (Liu et al., "SSD", ECCV 2016).

    The results are what the detector's layers read: the features of the third and of the fourth stage. The stride of a
    stage is in its first 1x1 convolution, as in the paper.
    """
    net = _Builder("ssd512_resnet50_backbone", size=512)
    x = net.op("Relu", net.conv("data", 3, 64, 7, stride=2))
    x = net.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    width, results = 64, {}
    for stage, (channels, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            branch = net.op("Relu", net.conv(x, width, channels, 1, stride=stride))
            branch = net.op("Relu", net.conv(branch, channels, channels, 3))
            branch = net.conv(branch, channels, 4 * channels, 1)
            shortcut = x if block else net.conv(x, width, 4 * channels, 1, stride=stride)
            x, width = net.op("Relu", net.op("Add", branch, shortcut)), 4 * channels
        results[x] = [width, *[128 >> stage] * 2]
    return net.finish(**dict(list(results.items())[2:]))


def _yolo3_mobilenet_backbone() -> Blueprint:
    """Howard et al., "MobileNets", 2017 (arXiv 1704.04861), table 1, on the images of YOLOv3 (Redmon, Farhadi, 2018).

    The results are what the detector's layers read: the features at an eighth, a sixteenth and a 32nd of the image.
    """
    net = _Builder("yolo3_mobilenet_backbone", size=416)
    x, width, extent = net.op("Relu", net.conv("data", 3, 32, 3, stride=2)), 32, 208
    results = {}
    for channels, stride in (
        (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1),
    ):  # fmt: skip
        if stride == 2 and extent < 104:
            results[x] = [width, extent, extent]
        x = net.op("Relu", net.conv(x, width, width, 3, stride=stride, groups=width))
        x, width, extent = net.op("Relu", net.conv(x, width, channels, 1)), channels, extent // stride
    return net.finish(**results, **{x: [width, extent, extent]})


def _vgg16() -> Blueprint:
    """Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015, table 1, configuration D."""
    return _vgg("vgg16", (2, 2, 3, 3, 3), bn=False)


def _vgg19_bn() -> Blueprint:
    """Configuration E, each convolution followed by a BatchNormalization (Ioffe and Szegedy, ICML 2015)."""
    return _vgg("vgg19_bn", (2, 2, 4, 4, 4), bn=True)


def _vgg(name: str, depths: tuple[int, ...], bn: bool) -> Blueprint:
    net = _Builder(name)
    x, width = "data", 3
    for channels, depth in zip((64, 128, 256, 512, 512), depths, strict=True):
        for _ in range(depth):
            x, width = net.op("Relu", net.conv(x, width, channels, 3, bn=bn, bias=True)), channels
        x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.op("Flatten", x)
    for c_in in (512 * 7 * 7, 4096):
        x = net.op("Dropout", net.op("Relu", net.linear(x, c_in, 4096)))
    return net.finish(**{net.linear(x, 4096, 1000): [1000]})


def _mobilenet_v2() -> Blueprint:
    """Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, tables 1 and 2."""
    net = _Builder("mobilenet_v2")
    x, width = net.relu6(net.conv("data", 3, 32, 3, stride=2)), 32
    # expansion t, output channels c, repeats n, stride s of the first
    for t, c, n, s in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for repeat in range(n):
            stride = s if repeat == 0 else 1
            hidden = t * width
            y = x if t == 1 else net.relu6(net.conv(x, width, hidden, 1))
            y = net.relu6(net.conv(y, hidden, hidden, 3, stride=stride, groups=hidden))
            y = net.conv(y, hidden, c, 1)
            x, width = (net.op("Add", x, y) if stride == 1 and width == c else y), c
    x = net.relu6(net.conv(x, width, 1280, 1))
    x = net.op("Dropout", net.op("Flatten", net.op("GlobalAveragePool", x)))
    return net.finish(**{net.linear(x, 1280, 1000): [1000]})


def _wheel_entry(stem: str) -> Entry:
    return Entry(_GRAPH_OF_THE_WHEEL, lambda: _from_wheel(stem))


ZOO: dict[str, Entry] = {
    "alexnet": _wheel_entry("bvlc_alexnet"),
    "densenet121": _wheel_entry("densenet121"),
    "googlenet": _wheel_entry("inception_v1"),
    "inception_v2": _wheel_entry("inception_v2"),
    "mobilenet_v2": Entry(_BUILT, _mobilenet_v2),
    "resnet18": Entry(_BUILT, _resnet18),
    "resnet50": _wheel_entry("resnet50"),
    "shufflenet": _wheel_entry("shufflenet"),
    "squeezenet": _wheel_entry("squeezenet"),
    "ssd512_resnet50_backbone": Entry(_BUILT, _ssd512_resnet50_backbone),
    "vgg16": Entry(_BUILT, _vgg16),
    "vgg19": _wheel_entry("vgg19"),
    "vgg19_bn": Entry(_BUILT, _vgg19_bn),
    "yolo3_mobilenet_backbone": Entry(_BUILT, _yolo3_mobilenet_backbone),
    "zfnet512": _wheel_entry("zfnet512"),
}
ALIASES = {"bvlc_alexnet": "alexnet", "inception_v1": "googlenet"}
