"""Kernel by kernel beside onnxruntime: what each spends on the same convolutions, and on everything else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import pandas as pd

from tvmlab.measure.subjects import profiled
from tvmlab.records import RunFolder
from tvmlab.run import Run

__all__ = ["compare_operators"]

_MOST_PADDING = 64  # a packed layout rounds channels up to at most so many more


def compare_operators(run: Run | RunFolder | str, *, repeats: int = 15, threads: int | None = None) -> pd.DataFrame:
    """Per operator, the time of the run's compiled model and of onnxruntime; one row a shape of convolution or a type.

    Convolutions of equal kernel, channels, groups and output size share a row, with whatever each runtime fused to
    them (bias, addition, activation). The other operators share a row a type; onnxruntime's ReorderInput and
    ReorderOutput are its changes of layout, "layout" is ours. Each runtime runs in a process of its own, one after
    the other, with `threads` threads (default: the target's cores); medians of `repeats` inferences. onnxruntime's
    times are its own profile's, with its instruments' cost; ours are as of `tvmlab.profile`.

    Index: operator. Columns: shape ("in->out @ output size"), calls (ours in an inference), ours_us and
    onnxruntime_us (all calls of the row in an inference; NaN where a runtime has no such operator), ratio (ours over
    onnxruntime's), difference_us (ours - onnxruntime's, a missing one as 0). Sorted by it, the largest first.

    Raises InputError for fewer than 3 repeats, RunError if the run has no target yet or its model cannot be run.
    """
    folder = run.folder if isinstance(run, Run) else RunFolder.open(run)
    ours = profiled(folder, "tvmlab", repeats, threads)
    theirs = profiled(folder, "onnxruntime", repeats, threads)
    return _beside(ours["kernels"], theirs["nodes"], theirs["convolutions"])


def _beside(
    kernels: list[dict[str, Any]], nodes: list[dict[str, Any]], convolutions: list[dict[str, Any]]
) -> pd.DataFrame:
    """The frame, from what both profiles say and the convolutions of the graph."""
    columns = {
        "ours_us": _sums(_our_calls(kernels), convolutions),
        "onnxruntime_us": _sums(_their_calls(nodes), convolutions),
    }
    rows = dict.fromkeys([*columns["ours_us"], *columns["onnxruntime_us"]])
    index = pd.MultiIndex.from_tuples(list(rows), names=["operator", "shape"])
    frame = pd.DataFrame(
        {name: [sums.get(row, (float("nan"), 0))[0] * 1e6 for row in index] for name, sums in columns.items()}, index
    )
    frame.insert(0, "calls", [columns["ours_us"].get(row, (0.0, 0))[1] for row in index])
    frame["ratio"] = frame["ours_us"] / frame["onnxruntime_us"]
    frame["difference_us"] = frame["ours_us"].fillna(0.0) - frame["onnxruntime_us"].fillna(0.0)
    return frame.reset_index("shape").sort_values("difference_us", ascending=False, kind="stable")


@dataclass(frozen=True)
class _Call:
    """One or several equal calls of a kernel. `convolution` is None for another operator; `kernel` if not known."""

    operator: str
    latency_s: float
    count: int = 1
    convolution: _Convolution | None = None


@dataclass(frozen=True)
class _Convolution:
    """What the shapes of a kernel's arguments tell; packed channels may be padded."""

    in_channels: int
    out_channels: int
    size: tuple[int, int]
    kernel: tuple[int, int] | None

    def padding_of(self, site: dict[str, Any]) -> int | None:
        """Channels that the kernel computes more than a convolution of the graph needs; None: not this convolution."""
        more = (self.in_channels - site["in_channels"], self.out_channels - site["out_channels"])
        fits = all(0 <= extra < _MOST_PADDING for extra in more)
        same = self.size == tuple(site["size"]) and self.kernel in (None, tuple(site["kernel"]))
        return sum(more) if fits and same else None


def _sums(calls: Iterable[_Call], convolutions: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[float, int]]:
    """Seconds and calls of each row. A convolution goes to the site of the graph it fits best, each site once."""
    left = list(convolutions)
    sums: dict[tuple[str, str], tuple[float, int]] = {}
    for call in calls:
        for _ in range(call.count):
            row = (call.operator, "")
            if call.convolution is not None and (site := _take(left, call.convolution)):
                row = _name(site)
            seconds, count = sums.get(row, (0.0, 0))
            sums[row] = (seconds + call.latency_s, count + 1)
    return sums


def _take(left: list[dict[str, Any]], found: _Convolution) -> dict[str, Any] | None:
    """Remove and return the first of the best fitting convolutions."""
    fits = [(padding, place) for place, site in enumerate(left) if (padding := found.padding_of(site)) is not None]
    return left.pop(min(fits)[1]) if fits else None


def _name(site: dict[str, Any]) -> tuple[str, str]:
    kernel = "x".join(map(str, site["kernel"]))
    groups = site["groups"]
    kind = "" if groups == 1 else "depthwise " if groups == site["in_channels"] else f"{groups} groups "
    size = "x".join(map(str, site["size"]))
    return f"{kind}conv {kernel}", f"{site['in_channels']}->{site['out_channels']} @ {size}"


# Ours


def _our_calls(kernels: list[dict[str, Any]]) -> list[_Call]:
    return [
        _Call(
            _our_operator(kernel["kernel_class"]),
            median(kernel["in_model_s"]),
            kernel["calls"],
            _our_convolution(kernel["kernel_class"], kernel["shapes"]),
        )
        for kernel in kernels
    ]


# The first operator of a kernel class under onnxruntime's name for it.
_SAME = {
    "add": "Add",
    "avg_pool2d": "AveragePool",
    "concatenate": "Concat",
    "dense": "Gemm",
    "lrn": "LRN",
    "matmul": "Gemm",
    "max_pool2d": "MaxPool",
    "mean": "GlobalAveragePool",
    "multiply": "Mul",
    "relu": "Relu",
    "softmax": "Softmax",
    "transpose": "Transpose",
}


def _our_operator(kernel_class: str) -> str:
    first, *others = kernel_class.split("+")
    if "transpose" in others:
        return "Transpose"
    if first.startswith("layout_"):
        return "layout"
    return next((theirs for ours, theirs in _SAME.items() if first.startswith(ours)), first)


def _our_convolution(kernel_class: str, shapes: list[tuple[int, ...]]) -> _Convolution | None:
    """The convolution of a kernel, plain or packed (NCHW, or NCHW with a block of channels innermost)."""
    if "conv2d" not in kernel_class and "winograd" not in kernel_class:
        return None
    data, weight, result = shapes[0], shapes[1], shapes[-1]
    if not (len(data) in (4, 5) and len(result) in (4, 5)):
        return None
    block = [shape[4] if len(shape) == 5 else 1 for shape in (data, result)]
    size, kernel = (result[2], result[3]), _our_kernel(kernel_class, data, weight)
    return _Convolution(data[1] * block[0], result[1] * block[1], size, kernel)


def _our_kernel(kernel_class: str, data: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, int] | None:
    if "winograd" in kernel_class:
        return (3, 3)
    if len(data) == 5 and len(weight) == 4:  # depthwise: C/b, KH, KW, b
        return weight[1], weight[2]
    return (weight[2], weight[3]) if len(weight) in (4, 6) else None


# onnxruntime's


def _their_calls(nodes: list[dict[str, Any]]) -> list[_Call]:
    return [
        _Call(
            "Gemm" if node["operator"] in ("MatMul", "FusedGemm", "FusedMatMul") else node["operator"],
            node["latency_s"],
            convolution=_their_convolution(node),
        )
        for node in nodes
    ]


def _their_convolution(node: dict[str, Any]) -> _Convolution | None:
    if node["operator"] not in ("Conv", "FusedConv") or len(node["output"]) != 4:
        return None
    data, weight, result = node["inputs"][0], node["inputs"][1], node["output"]
    return _Convolution(data[1], result[1], (result[2], result[3]), (weight[2], weight[3]))
