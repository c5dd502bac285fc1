"""Convolutions, dense layers and layout transforms on packed tensors, as TE computes; and their weights in numpy.

A tensor of C channels in layout NCHW[x]c has the shape [N, ceil(C/x), H, W, x]. Channels beyond C hold finite values
that no result depends on: weights are zero there. The names of the computes are those of the blocks in the
TensorIR, which templates look for.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = [
    "blocks_of",
    "conv2d",
    "dense",
    "depthwise_conv2d",
    "layout_pack",
    "layout_repack",
    "layout_unpack",
    "lrn",
    "pack_broadcast",
    "pack_dense_weight",
    "pack_depthwise_weight",
    "pack_weight",
    "packed_shape",
]


def blocks_of(channels: int, block: int) -> int:
    """How many blocks hold the channels.

    >>> blocks_of(24, 16)
    2
    """
    return -(-channels // block)


def packed_shape(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    """The shape of a tensor (N, C, H, W) in a layout; block 0 is NCHW.

    >>> packed_shape((1, 24, 7, 7), 16)
    (1, 2, 7, 7, 16)
    """
    batch, channels, rows, columns = shape
    return (batch, blocks_of(channels, block), rows, columns, block) if block else shape


def conv2d(data: Any, weight: Any, strides: Any, padding: Any, dilation: Any, groups: int = 1) -> Any:
    """Convolution [N, I/x, H, W, x] * [O/y, I/groups/x, KH, KW, x, y] -> [N, O/y, OH, OW, y].

    Reduction axes in the order (input block, kernel row, kernel column, channel in the block). `padding` is (top,
    left, bottom, right). With groups, x divides the input channels of a group and y its output channels.
    """
    from tvm import te

    batch, _, _, _, _ = _sizes(data)
    out_blocks, in_blocks, kernel_h, kernel_w, x, y = _sizes(weight)
    source = pad(data, padding)
    rows, columns = _out_size(source, (kernel_h, kernel_w), strides, dilation)
    axes = [
        te.reduce_axis((0, size), name=name)
        for size, name in ((in_blocks, "ic_outer"), (kernel_h, "kh"), (kernel_w, "kw"), (x, "ic_inner"))
    ]
    ic, kh, kw, ici = axes
    per_group = out_blocks // groups

    def body(n: Any, oc: Any, oh: Any, ow: Any, oci: Any) -> Any:
        block = ic if groups == 1 else oc // per_group * in_blocks + ic
        row, column = oh * strides[0] + kh * dilation[0], ow * strides[1] + kw * dilation[1]
        return te.sum(source[n, block, row, column, ici] * weight[oc, ic, kh, kw, ici, oci], axis=axes)

    name = "conv2d_NCHWc" if groups == 1 else "grouped_conv2d_NCHWc"
    return te.compute((batch, out_blocks, rows, columns, y), body, name=name)


def depthwise_conv2d(data: Any, weight: Any, strides: Any, padding: Any, dilation: Any) -> Any:
    """Depthwise convolution [N, C/x, H, W, x] * [C/x, KH, KW, x] -> [N, C/x, OH, OW, x]."""
    from tvm import te

    batch, blocks, _, _, x = _sizes(data)
    _, kernel_h, kernel_w, _ = _sizes(weight)
    source = pad(data, padding)
    rows, columns = _out_size(source, (kernel_h, kernel_w), strides, dilation)
    kh, kw = te.reduce_axis((0, kernel_h), name="kh"), te.reduce_axis((0, kernel_w), name="kw")

    def body(n: Any, c: Any, oh: Any, ow: Any, ci: Any) -> Any:
        row, column = oh * strides[0] + kh * dilation[0], ow * strides[1] + kw * dilation[1]
        return te.sum(source[n, c, row, column, ci] * weight[c, kh, kw, ci], axis=[kh, kw])

    return te.compute((batch, blocks, rows, columns, x), body, name="depthwise_conv2d_NCHWc")


def pad(data: Any, padding: Any) -> Any:
    """Zeros around the rows and columns, (top, left, bottom, right), as a stage `data_pad`; none where all are 0."""
    from tvm import topi

    top, left, bottom, right = padding
    if not any(padding):
        return data
    return topi.nn.pad(data, [0, 0, top, left, 0], [0, 0, bottom, right, 0], name="data_pad")


def dense(data: Any, weight: Any, features: int) -> Any:
    """Matrix product [..., K] * [N/x, K, x] -> [..., N]: a stage `dense_pack` [..., N/x, x], then `dense_unpack`."""
    from tvm import te

    *rows, depth = _sizes(data)
    blocks, _, x = _sizes(weight)
    k = te.reduce_axis((0, depth), name="k")
    packed = te.compute(
        (*rows, blocks, x),
        lambda *index: te.sum(data[(*index[:-2], k)] * weight[index[-2], k, index[-1]], axis=k),
        name="dense_pack",
    )
    return te.compute(
        (*rows, features), lambda *index: packed[(*index[:-1], index[-1] // x, index[-1] % x)], name="dense_unpack"
    )


def lrn(data: Any, channels: int, size: int, alpha: float, beta: float, bias: float) -> Any:
    """x / (bias + alpha * mean of x^2 over `size` channels)^beta, Krizhevsky et al. (2012, section 3.3), as in ONNX.

    The stage `lrn_halo` gathers the squares of a block and of its neighbours, zeros outside of the channels, so that
    the sum reads contiguous channels. The usual beta of 3/4 is two square roots: those vectorise, a power does not.
    """
    from tvm import te, tirx

    batch, blocks, rows, columns, x = _sizes(data)
    before = (size - 1) // 2

    def squares(n: Any, c: Any, h: Any, w: Any, j: Any) -> Any:
        channel = c * x + j - before
        value = data[n, channel // x, h, w, channel % x]
        inside = tirx.all(channel >= 0, channel < channels)
        return tirx.if_then_else(inside, value * value, tirx.const(0.0, data.dtype))

    halo = te.compute((batch, blocks, rows, columns, x + size - 1), squares, name="lrn_halo")
    k = te.reduce_axis((0, size), name="k")
    total = te.compute(
        (batch, blocks, rows, columns, x),
        lambda n, c, h, w, ci: te.sum(halo[n, c, h, w, ci + k], axis=k),
        name="lrn_sum",
    )

    def normalise(*index: Any) -> Any:
        base = total[index] * tirx.const(alpha / size, data.dtype) + tirx.const(bias, data.dtype)
        if beta == 0.75:
            root = tirx.sqrt(base)
            return data[index] / (root * tirx.sqrt(root))
        return data[index] / tirx.power(base, tirx.const(beta, data.dtype))

    return te.compute((batch, blocks, rows, columns, x), normalise, name="lrn")


def layout_pack(data: Any, block: int) -> Any:
    """[N, C, H, W] -> [N, ceil(C/block), H, W, block], zeros in the channels beyond C."""
    from tvm import te, tirx

    batch, channels, rows, columns = _sizes(data)

    def body(n: Any, c: Any, h: Any, w: Any, ci: Any) -> Any:
        value = data[n, c * block + ci, h, w]
        if channels % block == 0:
            return value
        return tirx.if_then_else(c * block + ci < channels, value, tirx.const(0.0, data.dtype))

    shape = (batch, blocks_of(channels, block), rows, columns, block)
    return te.compute(shape, body, name="layout_pack")


def layout_unpack(data: Any, channels: int) -> Any:
    """[N, ceil(C/x), H, W, x] -> [N, C, H, W]."""
    from tvm import te

    batch, _, rows, columns, x = _sizes(data)
    return te.compute(
        (batch, channels, rows, columns), lambda n, c, h, w: data[n, c // x, h, w, c % x], name="layout_unpack"
    )


def layout_repack(data: Any, channels: int, block: int) -> Any:
    """[N, ceil(C/x), H, W, x] -> [N, ceil(C/block), H, W, block], zeros in the channels beyond C."""
    from tvm import te, tirx

    batch, _, rows, columns, x = _sizes(data)

    def body(n: Any, c: Any, h: Any, w: Any, ci: Any) -> Any:
        channel = c * block + ci
        value = data[n, channel // x, h, w, channel % x]
        if channels % block == 0:
            return value
        return tirx.if_then_else(channel < channels, value, tirx.const(0.0, data.dtype))

    return te.compute((batch, blocks_of(channels, block), rows, columns, block), body, name="layout_repack")


def pack_weight(weight: np.ndarray, x: int, y: int) -> np.ndarray:
    """[O, I, KH, KW] -> [ceil(O/y), ceil(I/x), KH, KW, x, y], padded with zeros.

    >>> pack_weight(np.ones((8, 3, 5, 5)), 3, 16).shape
    (1, 1, 5, 5, 3, 16)
    """
    out, inner, kernel_h, kernel_w = weight.shape
    padded = np.pad(weight, [(0, -out % y), (0, -inner % x), (0, 0), (0, 0)])
    split = padded.reshape(blocks_of(out, y), y, blocks_of(inner, x), x, kernel_h, kernel_w)
    return np.ascontiguousarray(split.transpose(0, 2, 4, 5, 3, 1))


def pack_depthwise_weight(weight: np.ndarray, x: int) -> np.ndarray:
    """[C, 1, KH, KW] -> [ceil(C/x), KH, KW, x], padded with zeros."""
    return pack_weight(weight, 1, x)[:, 0, :, :, 0]


def pack_dense_weight(weight: np.ndarray, x: int) -> np.ndarray:
    """[K, N] -> [ceil(N/x), K, x], padded with zeros.

    >>> pack_dense_weight(np.ones((4, 10)), 8).shape
    (2, 4, 8)
    """
    depth, features = weight.shape
    padded = np.pad(weight, [(0, 0), (0, -features % x)]) if features % x else weight
    return np.ascontiguousarray(padded.reshape(depth, blocks_of(features, x), x).transpose(1, 0, 2))


def pack_broadcast(array: np.ndarray, x: int, fill: float) -> np.ndarray:
    """A constant that broadcasts to [N, C, H, W], as one that broadcasts to the packed tensor; beyond C it is `fill`.

    >>> pack_broadcast(np.ones((1, 24, 1, 1)), 16, fill=0).shape
    (1, 2, 1, 1, 16)
    """
    if array.size == 1:
        return array.reshape(())
    batch, channels, rows, columns = (1,) * (4 - array.ndim) + array.shape
    array = array.reshape(batch, channels, rows, columns)
    if channels == 1:
        return array[..., None]
    padded = np.pad(array, [(0, 0), (0, -channels % x), (0, 0), (0, 0)], constant_values=fill)
    return padded.reshape(batch, blocks_of(channels, x), x, rows, columns).transpose(0, 1, 3, 4, 2)


def _sizes(tensor: Any) -> list[int]:
    return [int(size) for size in tensor.shape]


def _out_size(source: Any, kernel: Any, strides: Any, dilation: Any) -> tuple[int, int]:
    rows, columns = _sizes(source)[2:4]
    return (
        (rows - (kernel[0] - 1) * dilation[0] - 1) // strides[0] + 1,
        (columns - (kernel[1] - 1) * dilation[1] - 1) // strides[1] + 1,
    )
