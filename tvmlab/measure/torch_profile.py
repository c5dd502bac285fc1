"""Each operator of a torch graph timed alone: on a GPU, what cuDNN and cuBLAS take for it without launch overhead."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from tvmlab.measure.torch_graph import TorchGraph

__all__ = ["nodes"]

_WARM_UP = 3
_CALLS = 20  # in one CUDA graph: the launch of the graph is spread over so many


def nodes(graph: TorchGraph, inputs: dict[str, np.ndarray], repeats: int) -> list[dict[str, Any]]:
    """The nodes of the graph in order; keys as of tvmlab.measure.onnx_profile.nodes.

    latency_s is the median of `repeats`: on a GPU of replays of a CUDA graph that holds the operator 20 times (warm
    caches), on a CPU of single calls. With torch.backends.cudnn.benchmark a convolution is cuDNN's fastest.
    """
    import torch

    found: list[dict[str, Any]] = []
    with torch.inference_mode():
        for node, (call, arguments, output) in zip(graph.nodes, graph.walk(graph.tensors(inputs)), strict=True):
            timed = _on_gpu if output.is_cuda else _on_cpu
            found.append(
                {
                    "name": node.output[0],
                    "operator": node.op_type,
                    "inputs": [list(value.shape) for value in arguments if value is not None],
                    "output": list(output.shape),
                    "latency_s": median(timed(torch, partial(call, *arguments), repeats)),
                }
            )
    return found


def _on_cpu(torch: Any, call: Callable[[], Any], repeats: int) -> list[float]:
    samples = []
    for _ in range(_WARM_UP + repeats):
        started = time.perf_counter()
        call()
        samples.append(time.perf_counter() - started)
    return samples[_WARM_UP:]


def _on_gpu(torch: Any, call: Callable[[], Any], repeats: int) -> list[float]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a capture must not be what chooses cuDNN's algorithm
        for _ in range(_WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    replayed = torch.cuda.CUDAGraph()
    with torch.cuda.graph(replayed):
        for _ in range(_CALLS):
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    samples = []
    for _ in range(1 + repeats):
        begin.record()
        replayed.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3 / _CALLS)
    return samples[1:]
