"""CPU templates for packed operators: convolution, depthwise convolution and dense; the table of all CPU templates.

The register tile of the convolutions is that of Georganas et al., "Anatomy of High-Performance Deep Learning
Convolutions on SIMD Architectures" (SC 2018), section II: output columns by output channels, one vector register
each, kept over the whole reduction; a channel of the input is broadcast, a vector of weights loaded.
"""

from __future__ import annotations

import math
from typing import Any

from tvmlab.spaces.plane_template import PlaneConv2d
from tvmlab.spaces.schedules import (
    Machine,
    Template,
    chunk_balance,
    divisors,
    extents,
    initialise,
    inline_epilogue,
    place_padding,
    register_tile,
    vectorize,
)
from tvmlab.spaces.simple_template import Simple
from tvmlab.spaces.winograd_template import Winograd

__all__ = ["TEMPLATES"]

_SPARE = 3  # vector registers beside the accumulators: weights and a broadcast
_NEAR_BYTES = 24 * 1024  # of weights that stay in the nearest cache beside the data
_PLANE = 256  # points of an output plane over which a chunk of input channels is taken


class Conv2d(Template):
    """Direct convolution on NCHW[x]c, grouped or not.

    Knobs: `oc_tile` blocks of output channels, `oh_tile` rows and `ow_tile` columns of the output held in registers;
    `order` of the parallel loop ("oc": a core keeps its weights, "oh": it keeps its rows); `ic_unroll` channels of
    the input unrolled; `ic_chunk` blocks of input channels taken over a whole plane of the output before the next, so
    that their weights stay in the nearest cache (0: all at once, tile by tile); `pad` the input as a whole ("root")
    or row by row ("row").
    """

    name = "conv2d_NCHWc"

    def __init__(self, block: str, sizes: list[int], padded: bool, groups_blocks: int, machine: Machine) -> None:
        _, out_blocks, rows, columns, y, in_blocks, kernel_h, kernel_w, x = sizes
        self._block = block
        self._lanes = math.gcd(y, machine.lanes)
        self._vectors = y // self._lanes
        self._sizes = (out_blocks, rows, columns, in_blocks, kernel_h, kernel_w, x)
        most = machine.registers - _SPARE
        knobs: dict[str, tuple[Any, ...]] = {
            "oc_tile": divisors(groups_blocks, 8),
            "oh_tile": divisors(rows, 8),
            "ow_tile": divisors(columns, most),
            "order": ("oc", "oh"),
            "ic_unroll": divisors(x, 4),
            "ic_chunk": _chunks(in_blocks, rows * columns),
            "pad": ("root", "row") if padded else ("none",),
        }
        super().__init__(knobs, machine)

    @classmethod
    def match(cls, module: Any, blocks: list[str], machine: Machine) -> Template | None:
        """For a direct packed convolution and its epilogue."""
        from tvm.s_tir import Schedule

        name = next((name for name in blocks if name in ("conv2d_NCHWc", "grouped_conv2d_NCHWc")), None)
        if name is None:
            return None
        schedule = Schedule(module)
        sizes = extents(schedule, schedule.get_sblock(name))
        # A register tile must not reach over two groups: their blocks read different inputs.
        within = sizes[1] if name == "conv2d_NCHWc" else 1
        return cls(name, sizes, "data_pad" in blocks, within, machine)

    def why_not(self, values: dict[str, Any]) -> str:
        """Accumulators must fit the registers."""
        if values["ic_chunk"] and (values["order"], values["pad"]) not in (("oc", "root"), ("oc", "none")):
            return "a chunk of channels goes over whole planes: order 'oc', pad 'root'"
        needed = self._accumulators(values)
        have = self.machine.registers - 1 - values["oc_tile"] * self._vectors
        return f"needs {needed} accumulators, there are {have}" if needed > have else ""

    def _accumulators(self, values: dict[str, Any]) -> int:
        return int(values["oc_tile"] * self._vectors * values["oh_tile"] * values["ow_tile"])

    def cost(self, values: dict[str, Any]) -> float:
        """Cycles a multiply-add, of two a cycle, or four loads in three; and how well a cache serves the weights."""
        out_blocks, rows, _, in_blocks, kernel_h, kernel_w, x = self._sizes
        accumulators = self._accumulators(values)
        weights = values["oc_tile"] * self._vectors
        loads = weights + values["oh_tile"] * values["ow_tile"]
        cycles = max(accumulators / 2, loads * 0.75, 4.0) + 0.5 / values["ic_unroll"]
        chunks = out_blocks // values["oc_tile"] * (1 if values["ic_chunk"] else rows // values["oh_tile"])
        taken = (values["ic_chunk"] or in_blocks) * kernel_h * kernel_w * x * weights * self._lanes * 4
        prefer = 0.04 * (taken > _NEAR_BYTES) + 0.02 * (taken > 2 * _NEAR_BYTES)
        prefer += 0.01 + 0.02 / values["ic_chunk"] if values["ic_chunk"] else 0.0
        prefer += (values["order"] != "oc") * 0.01 + (values["pad"] == "row") * 0.02 + (values["oh_tile"] > 1) * 0.01
        return cycles / accumulators * chunk_balance(chunks, self.machine.cores) * (1 + prefer)

    def features(self, values: dict[str, Any]) -> list[float]:
        """The number of accumulators and the parallel chunks."""
        out_blocks, rows, *_ = self._sizes
        return [self._accumulators(values), math.log2(out_blocks / values["oc_tile"] * rows / values["oh_tile"])]

    def schedule(self, module: Any, values: dict[str, Any]) -> Any:
        """One parallel loop, one register tile, the epilogue fused."""
        from tvm.s_tir import Schedule

        schedule = Schedule(module)
        conv = schedule.get_sblock(self._block)
        pads = schedule.get_producers(conv) if values["pad"] != "none" else []
        out = inline_epilogue(schedule, conv)
        chunk, tile = self._tile_output(schedule, out, values)
        if out is not conv:
            schedule.compute_at(conv, chunk if values["ic_chunk"] else tile, preserve_unit_loops=True)
        self._tile_reduction(schedule, conv, values)
        place_padding(schedule, pads, values["pad"], chunk, self._lanes)
        return schedule

    def _tile_output(self, schedule: Any, out: Any, values: dict[str, Any]) -> tuple[Any, Any]:
        """Tile the last stage; returns the parallel loop and the one around the register tile."""
        n, oc, oh, ow, oci, *reduction = schedule.get_loops(out)
        oc_outer, oc_inner = schedule.split(oc, [None, values["oc_tile"]])
        if reduction and values["ic_chunk"]:  # the convolution itself is the last stage: its plane is tiled below
            chunk = schedule.fuse(n, oc_outer)
            schedule.parallel(chunk)
            return chunk, chunk
        oh_outer, oh_inner = schedule.split(oh, [None, values["oh_tile"]])
        ow_outer, ow_inner = schedule.split(ow, [None, values["ow_tile"]])
        first = (oc_outer, oh_outer) if values["order"] == "oc" else (oh_outer, oc_outer)
        if reduction:
            schedule.reorder(n, *first, ow_outer, oc_inner, oh_inner, ow_inner, oci, *reduction)
            chunk = schedule.fuse(n, *first)
            schedule.parallel(chunk)
            return chunk, ow_outer
        vector, lane = schedule.split(oci, [None, self._lanes])
        schedule.reorder(n, *first, ow_outer, oh_inner, ow_inner, oc_inner, vector, lane)
        chunk = schedule.fuse(n, oc_outer) if values["ic_chunk"] else schedule.fuse(n, *first)
        schedule.parallel(chunk)
        register_tile(schedule, (oh_inner, ow_inner, oc_inner, vector), lane)
        return chunk, ow_outer

    def _tile_reduction(self, schedule: Any, conv: Any, values: dict[str, Any]) -> None:
        """The convolution inside its tile: reduction loops outside, the accumulators unrolled and vectorised."""
        if values["ic_chunk"]:
            self._tile_chunk(schedule, conv, values)
            return
        oc, oh, ow, oci, ic, kh, kw, ici = schedule.get_loops(conv)[-8:]
        vector, lane = schedule.split(oci, [None, self._lanes])
        ici_outer, ici_inner = schedule.split(ici, [None, values["ic_unroll"]])
        schedule.reorder(ic, kh, kw, ici_outer, ici_inner, oh, ow, oc, vector, lane)
        register_tile(schedule, (oh, ow, oc, vector, ici_inner), lane)
        initialise(schedule, conv, ic)

    def _tile_chunk(self, schedule: Any, conv: Any, values: dict[str, Any]) -> None:
        """The convolution over a whole plane, a chunk of input channels at a time."""
        oc, oh, ow, oci, ic, kh, kw, ici = schedule.get_loops(conv)[-8:]
        ic_outer, ic_inner = schedule.split(ic, [None, values["ic_chunk"]])
        oh_outer, oh_inner = schedule.split(oh, [None, values["oh_tile"]])
        ow_outer, ow_inner = schedule.split(ow, [None, values["ow_tile"]])
        vector, lane = schedule.split(oci, [None, self._lanes])
        ici_outer, ici_inner = schedule.split(ici, [None, values["ic_unroll"]])
        tile = (oh_inner, ow_inner, oc, vector)
        schedule.reorder(ic_outer, oh_outer, ow_outer, ic_inner, kh, kw, ici_outer, ici_inner, *tile, lane)
        register_tile(schedule, (*tile, ici_inner), lane)
        initial = schedule.decompose_reduction(conv, ic_outer)
        schedule.vectorize(schedule.get_loops(initial)[-1])


def _chunks(in_blocks: int, plane: int) -> tuple[int, ...]:
    """Sizes of a chunk of input channels, in blocks; only for planes that stay in the nearest cache."""
    return (0, *(size for size in divisors(in_blocks, 16) if size < in_blocks)) if plane <= _PLANE else (0,)


class DepthwiseConv2d(Template):
    """Depthwise convolution on NCHW[x]c: a vector of channels, a tile of output columns and rows in registers.

    Knobs: `oh_tile`, `ow_tile`, whether the kernel's columns are unrolled (`kw_unroll`), and `pad`.
    """

    name = "depthwise_conv2d_NCHWc"

    def __init__(self, sizes: list[int], padded: bool, machine: Machine) -> None:
        _, self._blocks, self._rows, self._columns, y, self._kernel_h, self._kernel_w = sizes
        self._lanes = math.gcd(y, machine.lanes)
        self._vectors = y // self._lanes
        knobs: dict[str, tuple[Any, ...]] = {
            "oh_tile": divisors(self._rows, 4),
            "ow_tile": divisors(self._columns, machine.registers - _SPARE),
            "kw_unroll": (1, self._kernel_w),
            "pad": ("root", "row") if padded else ("none",),
        }
        super().__init__(knobs, machine)

    @classmethod
    def match(cls, module: Any, blocks: list[str], machine: Machine) -> Template | None:
        """For a packed depthwise convolution and its epilogue."""
        from tvm.s_tir import Schedule

        if cls.name not in blocks:
            return None
        schedule = Schedule(module)
        return cls(extents(schedule, schedule.get_sblock(cls.name)), "data_pad" in blocks, machine)

    def why_not(self, values: dict[str, Any]) -> str:
        """Accumulators must fit the registers."""
        needed = self._vectors * values["oh_tile"] * values["ow_tile"]
        have = self.machine.registers - _SPARE
        return f"needs {needed} accumulators, there are {have}" if needed > have else ""

    def cost(self, values: dict[str, Any]) -> float:
        """A row of the padded input is copied once, however many tiles read it; more accumulators hide latency."""
        accumulators = self._vectors * values["oh_tile"] * values["ow_tile"]
        chunks = self._blocks * self._rows // values["oh_tile"]
        loop = 1 / values["kw_unroll"]
        again = (values["pad"] == "row") * 0.3
        return (max(accumulators, 8) + loop) / accumulators * chunk_balance(chunks, self.machine.cores) + again

    def schedule(self, module: Any, values: dict[str, Any]) -> Any:
        """Parallel over blocks of channels and rows."""
        from tvm.s_tir import Schedule

        schedule = Schedule(module)
        conv = schedule.get_sblock(self.name)
        pads = schedule.get_producers(conv) if values["pad"] != "none" else []
        out = inline_epilogue(schedule, conv)
        n, c, oh, ow, ci, *kernel = schedule.get_loops(out)
        oh_outer, oh_inner = schedule.split(oh, [None, values["oh_tile"]])
        ow_outer, ow_inner = schedule.split(ow, [None, values["ow_tile"]])
        schedule.reorder(n, c, oh_outer, ow_outer, oh_inner, ow_inner, ci, *kernel)
        chunk = schedule.fuse(n, c, oh_outer)
        schedule.parallel(chunk)
        if out is not conv:
            for loop in (oh_inner, ow_inner):
                schedule.unroll(loop)
            vectorize(schedule, ci, self._lanes)
            schedule.compute_at(conv, ow_outer, preserve_unit_loops=True)
        self._tile_reduction(schedule, conv, values)
        place_padding(schedule, pads, values["pad"], chunk, self._lanes)
        return schedule

    def _tile_reduction(self, schedule: Any, conv: Any, values: dict[str, Any]) -> None:
        oh, ow, ci, kh, kw = schedule.get_loops(conv)[-5:]
        vector, lane = schedule.split(ci, [None, self._lanes])
        schedule.reorder(kh, kw, oh, ow, vector, lane)
        register_tile(schedule, (oh, ow, vector, *((kw,) if values["kw_unroll"] > 1 else ())), lane)
        initialise(schedule, conv, kh)


class Dense(Template):
    """Matrix product with packed weights [N/x, K, x]; at batch 1 it reads each weight once and is bound by memory.

    Knobs: `row_tile` rows in registers, `block_tile` blocks of features, `k_unroll` steps of the reduction unrolled.
    """

    name = "dense_pack"

    def __init__(self, rows: int, blocks: int, x: int, depth: int, machine: Machine) -> None:
        self._rows, self._blocks, self._depth = rows, blocks, depth
        self._lanes = math.gcd(x, machine.lanes)
        self._vectors = x // self._lanes
        knobs: dict[str, tuple[Any, ...]] = {
            "row_tile": divisors(rows, machine.registers - _SPARE),
            "block_tile": divisors(blocks, 8),
            "k_unroll": divisors(depth, 8),
        }
        super().__init__(knobs, machine)

    @classmethod
    def match(cls, module: Any, blocks: list[str], machine: Machine) -> Template | None:
        """For a packed dense layer and its epilogue."""
        from tvm.s_tir import Schedule

        if cls.name not in blocks:
            return None
        schedule = Schedule(module)
        *rows, out_blocks, x, depth = extents(schedule, schedule.get_sblock(cls.name))
        return cls(math.prod(rows), out_blocks, x, depth, machine)

    def why_not(self, values: dict[str, Any]) -> str:
        """Accumulators must fit the registers."""
        needed = values["row_tile"] * values["block_tile"] * self._vectors
        have = self.machine.registers - _SPARE
        return f"needs {needed} accumulators, there are {have}" if needed > have else ""

    def cost(self, values: dict[str, Any]) -> float:
        """Few streams of weights at a time, enough accumulators to hide the latency."""
        accumulators = values["row_tile"] * values["block_tile"] * self._vectors
        chunks = self._rows // values["row_tile"] * (self._blocks // values["block_tile"])
        streams = values["block_tile"] * self._vectors
        latency = max(accumulators, 8) / accumulators + 0.1 / values["k_unroll"] + 0.01 * streams
        return latency * chunk_balance(chunks, self.machine.cores)

    def schedule(self, module: Any, values: dict[str, Any]) -> Any:
        """Parallel over blocks of features, then rows."""
        from tvm.s_tir import Schedule

        schedule = Schedule(module)
        product = schedule.get_sblock(self.name)
        unpacked = schedule.get_sblock("dense_unpack")
        if schedule.get_consumers(unpacked):  # a change of index only; what follows reads the product itself
            schedule.compute_inline(unpacked)
        out = inline_epilogue(schedule, product)
        width = self._lanes * self._vectors * values["block_tile"]
        *rows, features = schedule.get_loops(out)
        row = schedule.fuse(*rows) if len(rows) > 1 else rows[0]
        row_outer, row_inner = schedule.split(row, [None, values["row_tile"]])
        outer, inner = schedule.split(features, [None, width])
        schedule.reorder(outer, row_outer, row_inner, inner)
        chunk = schedule.fuse(outer, row_outer)
        schedule.parallel(chunk)
        schedule.compute_at(product, chunk, preserve_unit_loops=True)
        self._tile_reduction(schedule, product, values)
        return schedule

    def _tile_reduction(self, schedule: Any, product: Any, values: dict[str, Any]) -> None:
        _, *rows, block, x, k = schedule.get_loops(product)
        k_outer, k_inner = schedule.split(k, [None, values["k_unroll"]])
        vector, lane = schedule.split(x, [None, self._lanes])
        schedule.reorder(k_outer, k_inner, *rows, block, vector, lane)
        register_tile(schedule, (k_inner, *rows, block, vector), lane)
        initialise(schedule, product, k_outer)


TEMPLATES: tuple[type[Template], ...] = (Conv2d, DepthwiseConv2d, Winograd, Dense, PlaneConv2d, Simple)
