"""Grouped and depthwise convolution on plain NCHW, as TE computes on flattened planes.

The channels of a group are too few, or divide too badly, to be the vectors of a packed layout; a plane of pixels is
long enough. For that its rows must follow each other in memory with their borders, `pitch` elements from one to the
next: then the output pixel q = row * pitch + column reads the kernel's point (kh, kw) at q + constant, whatever the
row, and whole vectors of q may cross from one row to the next. The few q between two rows are computed and dropped, as
are the columns that a stride leaves out. So a plane is a "direct" convolution without im2col (Zhang et al., "High
Performance Zero-Memory Overhead Direct Convolutions", ICML 2018), with its vectors along the pixels instead of the
channels.

Measured on ShuffleNet's layers, alone and warm, on two Skylake cores with AVX-512, in us beside what onnxruntime's own
profile says of its kernels: 1x1 of four groups of 34 channels at 28x28 36 and 64, of 68 at 14x14 50 and 57, of 136 at
7x7 47 and 62, where these have addition and ReLU in them and onnxruntime's mostly have not; depthwise 3x3 at 14x14 26,
shuffle included, and 31 beside 36 for copies to and from its blocked layout. Filling each group up to blocks of 16 for
a packed layout would make 2.0, 1.4 and 1.1 times the work, and a gather of every shuffle, so it was not built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

__all__ = ["LANES", "Plane", "conv2d", "shuffled_channel"]

LANES = 16  # q is in vectors of so many: whole registers on every CPU
_TILES = range(4, 9)  # vectors of a register tile: fewer share no weight, more leave no room for channels


@dataclass(frozen=True)
class Plane:
    """How the planes of a convolution are laid out flat; each field is (of rows, of columns).

    >>> plane = Plane((28, 28), (3, 3), (1, 1), (1, 1))
    >>> plane.pitch, plane.positions, plane.vectors, plane.rows
    (30, 840, 54, 31)
    """

    output: tuple[int, int]
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def pitch(self) -> int:
        """Elements from one row to the next; whole vectors where a stride skips rows, so that none crosses."""
        read = (self.output[1] - 1) * self.strides[1] + (self.kernel[1] - 1) * self.dilation[1] + 1
        return read if self.strides[0] == 1 else -(-read // LANES) * LANES

    @property
    def positions(self) -> int:
        """How many q there are."""
        return self.output[0] * self.pitch

    @property
    def vectors(self) -> int:
        """How many vectors of LANES hold them, and a few more where no register tile would divide those.

        >>> Plane((28, 28), (3, 3), (1, 1), (1, 1)).vectors  # 53 are needed
        54
        """
        needed = -(-self.positions // LANES)
        if needed <= max(_TILES):
            return needed
        return next(size for size in count(needed) if any(size % tile == 0 for tile in _TILES))

    def read(self, q: Any, kh: Any, kw: Any) -> Any:
        """Where q reads a point of the kernel, as an offset in the padded plane: numbers or TE expressions."""
        row = q // self.pitch * self.strides[0] + kh * self.dilation[0]
        return row * self.pitch + q % self.pitch + kw * self.dilation[1]

    @property
    def rows(self) -> int:
        """Rows of the padded plane, those included that only surplus positions read."""
        last = self.read(self.vectors * LANES - 1, self.kernel[0] - 1, self.kernel[1] - 1)
        return int(last // self.pitch) + 1


def conv2d(data: Any, weight: Any, strides: Any, padding: Any, dilation: Any, groups: int, shuffled: int = 1) -> Any:
    """Convolution [N, I, H, W] * [O, I/groups, KH, KW] -> [N, O, OH, OW]; `padding` is (top, left, bottom, right).

    With `shuffled` it is the convolution of the data's channel shuffle of so many groups (`shuffled_channel`).
    Stages: `plane_pad` [N, I, rows, pitch] (`plane_copy` without zeros, none where the data are so already),
    `plane_conv2d` [N, O, vectors, LANES], `plane_rows`, which keeps the output's pixels.
    """
    from tvm import te

    batch, channels, height, width = _sizes(data)
    out, per_group, kernel_h, kernel_w = _sizes(weight)
    top, left, bottom, right = (int(size) for size in padding)
    stride_h, stride_w = (int(size) for size in strides)
    dilation_h, dilation_w = (int(size) for size in dilation)
    rows = (height + top + bottom - (kernel_h - 1) * dilation_h - 1) // stride_h + 1
    columns = (width + left + right - (kernel_w - 1) * dilation_w - 1) // stride_w + 1
    plane = Plane((rows, columns), (kernel_h, kernel_w), (stride_h, stride_w), (dilation_h, dilation_w))

    def channel_of(channel: Any) -> Any:
        return shuffled_channel(channel, channels, shuffled)

    as_it_is = (plane.rows, plane.pitch) == (height, width) and not any((top, left))
    source = data if as_it_is else _padded(data, plane, (top, left), channel_of)
    sizes = ((per_group, "ic"), (kernel_h, "kh"), (kernel_w, "kw"))
    ic, kh, kw = axes = [te.reduce_axis((0, size), name=name) for size, name in sizes]

    def body(n: Any, o: Any, v: Any, lane: Any) -> Any:
        at = plane.read(v * LANES + lane, kh, kw)
        channel = o // (out // groups) * per_group + ic
        if as_it_is:
            channel = channel_of(channel)
        return te.sum(source[n, channel, at // plane.pitch, at % plane.pitch] * weight[o, ic, kh, kw], axis=axes)

    flat = te.compute((batch, out, plane.vectors, LANES), body, name="plane_conv2d")

    def row(n: Any, o: Any, h: Any, w: Any) -> Any:
        at = h * plane.pitch + w * stride_w
        return flat[n, o, at // LANES, at % LANES]

    return te.compute((batch, out, rows, columns), row, name="plane_rows")


def shuffled_channel(channel: Any, channels: int, groups: int) -> Any:
    """Which channel of a tensor a channel of its shuffle is: (groups, n) channels become (n, groups).

    >>> [shuffled_channel(channel, 6, 2) for channel in range(6)]
    [0, 3, 1, 4, 2, 5]
    """
    return channel % groups * (channels // groups) + channel // groups


def _padded(data: Any, plane: Plane, before: tuple[int, int], channel_of: Callable[[Any], Any]) -> Any:
    """The data's planes, in another order, with zeros around them or cut to the rows and the pitch of `plane`."""
    from tvm import te, tirx

    batch, channels, height, width = _sizes(data)
    top, left = before
    shape = (batch, channels, plane.rows, plane.pitch)
    cut = not (top or left) and plane.rows <= height and plane.pitch <= width

    def body(n: Any, c: Any, row: Any, column: Any) -> Any:
        h, w = row - top, column - left
        value = data[n, channel_of(c), h, w]
        inside = tirx.all(h >= 0, h < height, w >= 0, w < width)
        return value if cut else tirx.if_then_else(inside, value, tirx.const(0.0, data.dtype))

    return te.compute(shape, body, name="plane_copy" if cut else "plane_pad")


def _sizes(tensor: Any) -> list[int]:
    return [int(size) for size in tensor.shape]
