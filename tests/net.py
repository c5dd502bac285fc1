"""Small ONNX graphs, written down operator by operator."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tvmlab.models import load_model


class Net:
    """A small ONNX graph with seeded weights, written down operator by operator."""

    def __init__(self, *shape: int, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._input = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)

    def op(self, kind: str, *inputs: str, **attributes) -> str:
        name = f"t{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def const(self, value) -> str:
        self._weights.append(numpy_helper.from_array(np.asarray(value), f"w{len(self._weights)}"))
        return self._weights[-1].name

    def weight(self, *shape: int, low: float = -0.5) -> str:
        return self.const(self._rng.uniform(low, 0.5, shape).astype("float32"))

    def conv(self, x: str, inner: int, outer: int, kernel: int = 1, group: int = 1, bias: bool = True, **attributes):
        weights = [self.weight(outer, inner // group, kernel, kernel), *([self.weight(outer)] if bias else [])]
        return self.op("Conv", x, *weights, group=group, **attributes)

    def model(self, folder, *outputs: str):
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self._nodes, "net", [self._input], values, self._weights)
        path = folder / "net.onnx"
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(onnx.shape_inference.infer_shapes(model), path)
        return load_model(path)
