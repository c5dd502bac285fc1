"""CUDA template of direct convolution, after AutoTVM's (TVM's former topi/cuda/conv2d_direct.py)."""

from __future__ import annotations

import itertools
import math
from typing import Any

from tvmlab.spaces.cuda_schedules import Costed, Work, fetch, shared_words, skewed_row, split_reduction, tile_threads
from tvmlab.spaces.schedules import Machine, Template, divisors, extents

__all__ = ["DirectConv2d"]

_ADDRESS = 6  # loads of a padded input cost so many times their words: divisions and bounds for each


class DirectConv2d(Costed):
    """Convolution on NCHW, grouped or not: a tile of output channels, rows, columns.

    Knobs: `f`, `y`, `x` (virtual threads, threads, consecutive elements of a tile along channels, rows, columns), `c`
    (input channels in shared memory, parts of them in different blocks), whether the kernel is unrolled (`unroll`),
    and words in a load of weights (`vector`).
    """

    name = "conv2d_nchw direct"

    def __init__(self, block: str, sizes: list[int], groups: int, window: tuple[int, ...], machine: Machine) -> None:
        self._batch, self._channels, self._rows, self._columns, self._depth, *self._kernel = sizes
        self._block = block
        self._window = window  # rows and columns of input between one output and the next
        depth = self._depth
        c = [
            (size, parts)
            for size in divisors(depth, 16)
            for parts in divisors(depth, 32)
            if depth % (size * parts) == 0
        ]
        knobs: dict[str, tuple[Any, ...]] = {
            "f": _tiles(self._channels // groups, virtual=2, threads=64, inner=16),
            "y": _tiles(self._rows, virtual=1, threads=32, inner=14),
            "x": _tiles(self._columns, virtual=2, threads=64, inner=14),
            "c": tuple(c),
            "unroll": (False, True),
            "vector": divisors(machine.lanes, machine.lanes),
        }
        super().__init__(knobs, machine)

    @classmethod
    def match(cls, module: Any, blocks: list[str], machine: Machine) -> Template | None:
        """For a convolution, its padding and its epilogue; not for a depthwise one."""
        from tvm.s_tir import Schedule

        name = next((name for name in blocks if name in ("conv2d_nchw", "group_conv2d_nchw")), None)
        if name is None or blocks.index(name) != 1:
            return None
        schedule = Schedule(module)
        block = schedule.get_sblock(name)
        sizes = extents(schedule, block)
        _, channels, height, width = (int(size) for size in schedule.get(block).reads[0].source.shape)
        groups = channels // sizes[4]
        # The padded input may have rows and columns that no output needs.
        window = tuple(
            max(1, (size - kernel) // max(outputs - 1, 1))
            for size, kernel, outputs in zip((height, width), sizes[5:], sizes[2:4], strict=True)
        )
        return cls(name, sizes, groups, window, machine) if sizes[1] > groups else None

    def tile(self, values: dict[str, Any]) -> tuple[int, ...]:
        """Channels, rows and columns."""
        return math.prod(values["f"]), math.prod(values["y"]), math.prod(values["x"])

    def _words(self, values: dict[str, Any]) -> tuple[int, int]:
        """Words of weights and of input that a tile needs of one input channel."""
        f, y, x = self.tile(values)
        rows, columns = (
            (size - 1) * step + kernel for size, step, kernel in zip((y, x), self._window, self._kernel, strict=True)
        )
        return f * math.prod(self._kernel), rows * columns

    def work(self, values: dict[str, Any]) -> Work:
        """For each input channel a thread reads its channels' weights and the input under its outputs."""
        f, y, x = self.tile(values)
        threads = values["f"][1] * values["y"][1] * values["x"][1]
        own_f, own_y, own_x = f // values["f"][1], y // values["y"][1], x // values["x"][1]
        size, parts = values["c"]
        taps = math.prod(self._kernel)
        weights, inputs = self._words(values)
        depth = self._depth // parts
        # Unrolled, an input is read once for all taps that use it, in each row of the kernel.
        under = (own_x - 1) * self._window[1] + self._kernel[1] if values["unroll"] else own_x * self._kernel[1]
        loop = 0 if values["unroll"] else 2 * taps
        tiles = self._batch * (self._channels // f) * (self._rows // y) * (self._columns // x)
        return Work(
            blocks=tiles * parts,
            threads=threads,
            accumulators=own_f * own_y * own_x,
            fma=depth * (taps * own_f * own_y * own_x + loop),
            shared_loads=depth * (taps * shared_words(own_f, values["f"][2]) + self._kernel[0] * own_y * under),
            global_loads=depth * (weights / values["vector"] + _ADDRESS * inputs) / threads,
            rounds=depth // size,
            shared_bytes=4 * size * (skewed_row(f) * taps + inputs),
            partial_sums=self._batch * self._channels * self._rows * self._columns * (parts if parts > 1 else 0),
        )

    def why_not(self, values: dict[str, Any]) -> str:
        """The resources of a block must suffice, and vectors of weights be whole."""
        taps = math.prod(self._kernel)
        if values["c"][0] * taps % values["vector"] or self._depth * taps % values["vector"]:
            return f"vectors of {values['vector']} words are not whole in {values['c'][0]} x {taps} weights"
        return super().why_not(values)

    def schedule(self, module: Any, values: dict[str, Any]) -> Any:
        """One kernel, or two where the input channels are in parts."""
        from tvm.s_tir import Schedule

        size, parts = values["c"]
        schedule = Schedule(module)
        conv = schedule.get_sblock(self._block)
        (pad,) = schedule.get_producers(conv)
        weights = schedule.cache_read(conv, 1, "shared")
        schedule.transform_layout(weights, ("write", 0), lambda f, c, ky, kx: (c, ky, kx, f))
        computed, written = split_reduction(schedule, conv, schedule.get_loops(conv)[4], parts)
        *outer, n, f, y, x = schedule.get_loops(written)[: 4 + (parts > 1)]
        thread = tile_threads(schedule, [*outer, n], [(f, values["f"]), (y, values["y"]), (x, values["x"])])
        schedule.compute_at(computed, thread, preserve_unit_loops=True)
        *_, own_f, own_y, own_x, c, ky, kx = schedule.get_loops(computed)
        c_outer, c_inner = schedule.split(c, [None, size])
        schedule.reorder(c_outer, c_inner, ky, kx, own_f, own_y, own_x)
        threads = values["f"][1] * values["y"][1] * values["x"][1]
        fetch(schedule, weights, c_outer, threads, values["vector"], skewed=True)
        fetch(schedule, pad, c_outer, threads, 1, skewed=False)
        for loop in (own_f, own_y, own_x, *((ky, kx) if values["unroll"] else ())):
            schedule.unroll(loop)
        schedule.decompose_reduction(computed, c_outer)
        return schedule


def _tiles(extent: int, *, virtual: int, threads: int, inner: int) -> tuple[tuple[int, int, int], ...]:
    """Whole tiles of an axis: (virtual threads, threads, consecutive elements), each up to so many.

    >>> _tiles(13, virtual=2, threads=16, inner=8)
    ((1, 1, 1), (1, 13, 1))
    """
    choices = itertools.product(divisors(extent, virtual), divisors(extent, threads), divisors(extent, inner))
    return tuple(tile for tile in choices if extent % math.prod(tile) == 0)
