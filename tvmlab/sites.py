"""The convolutions and dense layers of a model as plain data, and which packings each can have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tvmlab.core import ALGORITHMS, Packing

__all__ = ["Site", "options", "reason_against"]

# A packing that would compute this many times as much, on zeros, is not an option.
_MOST_WORK = 2.0


@dataclass(frozen=True)
class Site:
    """One convolution or dense layer of a model.

    Shapes of a convolution: data (N, C, H, W), weight (O, C / groups, KH, KW), output (N, O, OH, OW); padding is
    (top, left, bottom, right). Of a dense layer: data (..., K), weight (K, N), output (..., N). `epilogue` names the
    pointwise operators that are fused to it, those of two tensors with a 2.
    """

    name: str
    kind: str  # "conv2d", "grouped_conv2d", "depthwise_conv2d" or "dense"
    data: tuple[int, ...]
    weight: tuple[int, ...]
    output: tuple[int, ...]
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    epilogue: tuple[str, ...] = ()
    refused: str = ""  # why no packing at all is possible

    @property
    def workload(self) -> tuple[object, ...]:
        """Everything but the name: sites of equal workload have the same kernel in each packing."""
        return (
            self.kind,
            self.data,
            self.weight,
            self.output,
            self.strides,
            self.padding,
            self.dilation,
            self.groups,
            self.epilogue,
        )

    @property
    def planar(self) -> bool:
        """Whether `tvmlab.plane_ops` computes it where it is in NCHW, so that it has a template there too."""
        return not self.refused and self.kind in ("grouped_conv2d", "depthwise_conv2d")

    def named(self, name: str) -> Site:
        """The same site with a name."""
        return replace(self, name=name)

    def followed_by(self, epilogue: tuple[str, ...]) -> Site:
        """The same site with an epilogue."""
        return replace(self, epilogue=epilogue)

    def input_block(self, block: int) -> int:
        """The block in which the site reads its data: its own, or all channels where they are fewer than half.

        >>> stem = Site("conv0", "conv2d", (1, 3, 8, 8), (16, 3, 3, 3), (1, 16, 6, 6))
        >>> stem.input_block(16), stem.input_block(0)
        (3, 0)
        """
        channels = self.data[1]
        few = self.kind == "conv2d" and _padded(channels, block) > _MOST_WORK * channels
        return channels if few else block

    def __str__(self) -> str:
        parts = [self.kind, "x".join(map(str, self.data)), "x".join(map(str, self.weight))]
        if self.strides != (1, 1):
            parts.append("stride " + "x".join(map(str, self.strides)))
        return f"{self.name}: {' '.join([*parts, *self.epilogue])}"


def options(site: Site, blocks: Iterable[int]) -> dict[Packing, str | None]:
    """Every packing of a convolution in the given blocks, NCHW first: None, or the reason why it cannot be had.

    >>> stem = Site("conv0", "conv2d", (1, 3, 8, 8), (16, 3, 3, 3), (1, 16, 3, 3), strides=(2, 2))
    >>> options(stem, [16])[Packing(16, "winograd4")]
    'Winograd needs stride 1, this convolution has 2x2'
    """
    packings = [Packing(), *(Packing(block, name) for block in blocks if block for name in ALGORITHMS)]
    return {packing: reason_against(site, packing) for packing in packings}


def reason_against(site: Site, packing: Packing) -> str | None:
    """Why a site cannot have a packing; None if it can."""
    if not packing.block:
        return None
    if site.refused:
        return site.refused
    if packing.algorithm != "direct" and (problem := _winograd_problem(site, int(packing.algorithm[-1]))):
        return problem
    block = packing.block
    if site.kind == "grouped_conv2d":
        inner, outer = site.weight[1], site.weight[0] // site.groups
        if inner % block or outer % block:
            return f"a group's {inner} input and {outer} output channels are not both multiples of {block}"
    work = _work(site, block)
    if work > _MOST_WORK:
        return f"filling its channels up to multiples of {block} makes {work:.1f} times the work"
    return None


def _work(site: Site, block: int) -> float:
    """How many times as much is computed, padded channels included."""
    if site.kind == "dense":
        return _padded(site.weight[1], block) / site.weight[1]
    out = site.output[1]
    if site.kind == "depthwise_conv2d":
        return _padded(out, block) / out
    channels = site.data[1]
    return _padded(out, block) * _padded(channels, site.input_block(block)) / (out * channels)


def _winograd_problem(site: Site, tile: int) -> str | None:
    if site.kind != "conv2d":
        return f"Winograd is for convolutions without groups, this is a {site.kind}"
    if site.weight[2:] != (3, 3):
        return f"Winograd needs a 3x3 kernel, this one is {site.weight[2]}x{site.weight[3]}"
    if site.strides != (1, 1):
        return f"Winograd needs stride 1, this convolution has {site.strides[0]}x{site.strides[1]}"
    if site.dilation != (1, 1):
        return f"Winograd needs dilation 1, this convolution has {site.dilation[0]}x{site.dilation[1]}"
    if min(site.output[2:]) < tile:
        return f"the output of {site.output[2]}x{site.output[3]} is smaller than a tile of {tile}x{tile}"
    return None


def _padded(channels: int, block: int) -> int:
    return -(-channels // block) * block if block else channels
