"""Weights that keep a deep network's activations in range, without running it.

Mean and variance of every activation are followed through the graph as if activations were independent and
normal (the mean-field view of Poole et al., "Exponential expressivity in deep neural networks through
transient chaos", NeurIPS 2016), and each layer's weights are scaled so that its result has variance one:
the rule of He et al., "Delving Deep into Rectifiers", ICCV 2015, for graphs whose layers are not all
followed by a ReLU. Pools, residual sums and concatenations would otherwise make the activations grow or
fade with depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import exp, pi, prod, sqrt
from statistics import NormalDist, fmean, pvariance

import numpy as np
from onnx import ModelProto, NodeProto, helper

from tvmlab.shapes import infer_shapes, shapes_of

__all__ = ["Law", "Moments"]

# Relative spread of biases and of normalisation parameters: wide enough that a wrong one shows in the result.
_SPREAD = 0.1
# Share of an activation's variance that is the same all over the image: a random layer on inputs of positive
# mean gives each channel a level of its own, and pooling only acts on the rest.
_LEVEL = 0.5
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Law:
    """How to draw a weight tensor: uniformly, with this mean and standard deviation."""

    mean: float
    std: float

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Random float32 values.

        >>> values = Law(mean=1.0, std=0.5).draw(np.random.default_rng(0), (1000,))
        >>> values.dtype, round(float(values.std()), 1)
        (dtype('float32'), 0.5)
        """
        half_width = sqrt(3) * self.std
        values = rng.random(shape, np.float32)
        values *= np.float32(2 * half_width)
        values += np.float32(self.mean - half_width)
        return values


@dataclass(frozen=True)
class _Moment:
    mean: float
    variance: float

    @property
    def square(self) -> float:
        return self.mean**2 + self.variance

    def scaled(self, factor: float) -> _Moment:
        return _Moment(self.mean * factor, self.variance * factor**2)


class Moments:
    """Follows the activations of a model whose weights are graph inputs and says how to draw each weight."""

    def __init__(self, model: ModelProto, weights: dict[str, tuple[int, ...]]) -> None:
        self._weights = weights
        self._laws: dict[str, Law] = {}
        self._shapes = shapes_of(infer_shapes(model))
        self._root = {name: name for name in weights}
        self._moments = {v.name: _Moment(0.0, 1.0) for v in model.graph.input if v.name not in weights}
        for node in model.graph.node:
            self._follow(node)

    def law(self, weight: str) -> Law:
        """How to draw a weight, by name."""
        return self._laws[weight]

    def _follow(self, node: NodeProto) -> None:
        if node.input[0] in self._root:  # a weight brought into shape
            self._root[node.output[0]] = self._root[node.input[0]]
            return
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        data = [(name, self._moments[name]) for name in node.input if name in self._moments]
        weights = [self._root[name] for name in node.input if name in self._root]
        x = data[0][1]
        if node.op_type in ("Conv", "Gemm"):
            result = self._layer(weights, x)
        elif node.op_type == "BatchNormalization":
            result = self._normalize(weights, x)
        elif weights:
            result = self._scale_or_shift(node.op_type, weights[0], x)
        elif node.op_type in ("Add", "Sum"):
            result = _Moment(sum(m.mean for _, m in data), sum(m.variance for _, m in data))
        elif node.op_type == "Concat":
            result = self._mixture(data)
        else:
            result = _apply(node.op_type, attributes, x, self._shapes[node.input[0]])
        self._moments[node.output[0]] = result

    def _layer(self, weights: list[str], x: _Moment) -> _Moment:
        shape = self._weights[weights[0]]
        fan_in = prod(shape) // next(size for size in shape if size > 1)
        self._laws[weights[0]] = Law(0.0, sqrt(1 / (fan_in * x.square)))
        for bias in weights[1:]:
            self._laws[bias] = Law(0.0, _SPREAD)
        return _Moment(0.0, 1.0)

    def _normalize(self, weights: list[str], x: _Moment) -> _Moment:
        scale, bias, mean, variance = weights
        self._laws[scale] = Law(1.0, _SPREAD)
        self._laws[bias] = Law(0.0, _SPREAD)
        self._laws[mean] = Law(x.mean, _SPREAD * sqrt(x.variance))
        self._laws[variance] = Law(x.variance, _SPREAD * x.variance)
        return _Moment(0.0, 1.0)

    def _scale_or_shift(self, kind: str, weight: str, x: _Moment) -> _Moment:
        """Mul and Add by weights: the second half of a normalisation in Caffe's models."""
        self._laws[weight] = Law(1.0, _SPREAD) if kind == "Mul" else Law(0.0, _SPREAD * sqrt(x.variance))
        return x

    def _mixture(self, data: list[tuple[str, _Moment]]) -> _Moment:
        channels = [self._shapes[name][1] or 1 for name, _ in data]
        mean = sum(c * m.mean for c, (_, m) in zip(channels, data, strict=True)) / sum(channels)
        square = sum(c * m.square for c, (_, m) in zip(channels, data, strict=True)) / sum(channels)
        return _Moment(mean, square - mean**2)


def _apply(kind: str, attributes: dict, x: _Moment, shape: tuple[int | None, ...]) -> _Moment:
    """Moments after an operator without weights."""
    if kind in ("Relu", "Clip"):  # Clip at 6, six standard deviations away, is a Relu here
        return _relu(x)
    if kind == "MaxPool":
        mean, variance = _largest(prod(attributes["kernel_shape"]))
        mean *= sqrt((1 - _LEVEL) * x.variance)
        return _Moment(x.mean + mean, (_LEVEL + (1 - _LEVEL) * variance) * x.variance)
    if kind in ("AveragePool", "GlobalAveragePool"):
        count = prod(attributes.get("kernel_shape") or (size or 1 for size in shape[2:]))
        return _Moment(x.mean, (_LEVEL + (1 - _LEVEL) / count) * x.variance)
    if kind == "LRN":
        return x.scaled((attributes["bias"] + attributes["alpha"] * x.square) ** -attributes["beta"])
    return x


def _relu(x: _Moment) -> _Moment:
    """Moments of max(0, x) for normal x."""
    std = sqrt(x.variance)
    density, share = exp(-0.5 * (x.mean / std) ** 2) / sqrt(2 * pi), _NORMAL.cdf(x.mean / std)
    mean = x.mean * share + std * density
    return _Moment(mean, x.square * share + x.mean * std * density - mean**2)


@cache
def _largest(count: int) -> tuple[float, float]:
    """Mean and variance of the largest of `count` standard normal numbers.

    >>> round(_largest(4)[0], 2)
    1.03
    """
    grid = [_NORMAL.inv_cdf(((i + 0.5) / 2000) ** (1 / count)) for i in range(2000)]
    return fmean(grid), pvariance(grid)
