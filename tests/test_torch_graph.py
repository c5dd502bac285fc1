"""The torch baseline computes what onnxruntime computes, operator by operator, and names what it lacks."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tvmlab.core import InputError
from tvmlab.measure.torch_graph import TorchGraph, unsupported


def model_of(nodes, shape, constants=()):
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in dict(constants).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def node(operator, *inputs, **attributes):
    return helper.make_node(operator, ["x", *inputs], ["y"], **attributes)


IMAGE = (1, 8, 9, 9)
CASES = {
    "conv": (node("Conv", "w", "b", pads=[1] * 4, strides=[2, 2]), IMAGE, {"w": random(4, 8, 3, 3), "b": random(4)}),
    "conv-uneven": (node("Conv", "w", pads=[0, 1, 2, 1]), IMAGE, {"w": random(4, 8, 3, 3)}),
    "conv-groups": (node("Conv", "w", group=4, dilations=[2, 2]), IMAGE, {"w": random(8, 2, 3, 3)}),
    "max": (node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4), IMAGE, {}),
    "max-uneven": (node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 2, 2]), IMAGE, {}),
    "max-ceil": (node("MaxPool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1), IMAGE, {}),
    "average": (node("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4), IMAGE, {}),
    "average-all": (node("AveragePool", kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1), IMAGE, {}),
    "average-uneven": (node("AveragePool", kernel_shape=[3, 3], pads=[0, 1, 2, 1]), IMAGE, {}),
    "global": (node("GlobalAveragePool"), IMAGE, {}),
    "lrn": (node("LRN", size=5, alpha=0.3, beta=0.75, bias=2.0), IMAGE, {}),
    "gemm": (node("Gemm", "w", "b", transB=1), (2, 8), {"w": random(4, 8), "b": random(4)}),
    "gemm-scaled": (node("Gemm", "w", "b", alpha=0.5, beta=2.0), (2, 8), {"w": random(8, 4), "b": random(4)}),
    "matmul": (node("MatMul", "w"), (2, 8), {"w": random(8, 4)}),
    "clip": (node("Clip", "low", "high"), IMAGE, {"low": np.float32(0), "high": np.float32(1)}),
    "clip-below": (node("Clip", "low"), IMAGE, {"low": np.float32(0)}),
    "concat": (node("Concat", "x", axis=1), IMAGE, {}),
    "reshape": (node("Reshape", "to"), IMAGE, {"to": np.array([0, -1], np.int64)}),
    "flatten": (node("Flatten", axis=2), IMAGE, {}),
    "transpose": (node("Transpose", perm=[0, 2, 3, 1]), IMAGE, {}),
    "transpose-all": (node("Transpose"), IMAGE, {}),
    "softmax": (node("Softmax", axis=1), IMAGE, {}),
    "relu": (node("Relu"), IMAGE, {}),
    "sigmoid": (node("Sigmoid"), IMAGE, {}),
    "add": (node("Add", "c"), IMAGE, {"c": random(8, 1, 1)}),
    "sub": (node("Sub", "c"), IMAGE, {"c": random(8, 1, 1)}),
    "mul": (node("Mul", "c"), IMAGE, {"c": random(8, 1, 1)}),
    "div": (node("Div", "c"), IMAGE, {"c": 1 + random(8, 1, 1) ** 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_operator_computes_what_onnxruntime_computes(case):
    pytest.importorskip("torch")
    only, shape, constants = CASES[case]
    model, inputs = model_of([only], shape, constants), {"x": random(*shape)}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, inputs)
    (found,) = TorchGraph(model)(inputs)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_what_it_lacks_is_named():
    model = model_of([node("Relu"), node("Erf"), node("Gelu")], IMAGE)
    assert unsupported(model) == ["Erf", "Gelu"]
    with pytest.raises(InputError, match="operators Erf, Gelu: leave 'torch' out"):
        TorchGraph(model)


def test_implicit_padding_is_refused():
    pytest.importorskip("torch")
    with pytest.raises(InputError, match="auto_pad of MaxPool"):
        TorchGraph(model_of([node("MaxPool", kernel_shape=[3, 3], auto_pad="SAME_UPPER")], IMAGE))
