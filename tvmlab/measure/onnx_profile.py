"""onnxruntime's own profile of a model, and the convolutions of an ONNX graph to hold it against."""

from __future__ import annotations

from statistics import median
from typing import Any, cast

import numpy as np
import orjson
from onnx import ModelProto, helper

from tvmlab.shapes import shapes_of

__all__ = ["convolutions", "nodes"]

_WARM_UP = 2


def nodes(session: Any, inputs: dict[str, np.ndarray], repeats: int) -> list[dict[str, Any]]:
    """The nodes that onnxruntime runs after its own rewriting, in their order.

    `session` was made with profiling enabled and is used up. Keys of a node: name, operator, inputs and output
    (shapes, of logical channels even where its layout is blocked), latency_s (median over `repeats` inferences).
    """
    for _ in range(_WARM_UP + repeats):
        session.run(None, inputs)
    with open(session.end_profiling(), "rb") as file:  # noqa: PTH123  a name, not a path of ours
        events = orjson.loads(file.read())
    found: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            found.setdefault(event["args"]["node_index"], []).append(event)
    return [_node(runs) for runs in found.values()]


def _node(events: list[dict[str, Any]]) -> dict[str, Any]:
    first = events[0]
    shapes = first["args"]
    return {
        "name": first["name"].removesuffix("_kernel_time"),
        "operator": shapes["op_name"],
        "inputs": [shape for item in shapes["input_type_shape"] for shape in item.values()],
        "output": next(iter(shapes["output_type_shape"][0].values())),
        "latency_s": median(event["dur"] for event in events[_WARM_UP:]) * 1e-6,
    }


def convolutions(model: ModelProto) -> list[dict[str, Any]]:
    """The 2-d convolutions of a graph with inferred shapes, in its order: kernel, channels, groups and output size."""
    shapes = shapes_of(model)
    found = []
    for node in model.graph.node:
        if node.op_type != "Conv" or len(shapes[node.input[1]]) != 4:
            continue
        groups = next((helper.get_attribute_value(item) for item in node.attribute if item.name == "group"), 1)
        out_channels, per_group, height, width = cast(tuple[int, int, int, int], shapes[node.input[1]])
        found.append(
            {
                "kernel": (height, width),
                "in_channels": per_group * groups,
                "out_channels": out_channels,
                "groups": groups,
                "size": tuple(shapes[node.output[0]][2:]),
            }
        )
    return found
