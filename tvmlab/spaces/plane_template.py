"""The CPU template of grouped and depthwise convolutions on plain NCHW, whose vectors lie along the pixels."""

from __future__ import annotations

from typing import Any

from tvmlab.plane_ops import LANES
from tvmlab.spaces.schedules import (
    Machine,
    Template,
    chunk_balance,
    divisors,
    extents,
    initialise,
    inline_epilogue,
    register_tile,
    vectorize_runs,
)

__all__ = ["PlaneConv2d"]

_SPARE = 3  # vector registers beside the accumulators: pixels and a broadcast weight
_MOST_UNROLLED = 9  # points of a kernel
_MOST_TAPS = 9  # accumulators beside the unrolled points of a kernel
_NEAR_BYTES = 24 * 1024  # of pixels that stay in the nearest cache beside weights and results


class PlaneConv2d(Template):
    """Grouped convolution on flattened planes (`tvmlab.plane_ops`): weights are broadcast, vectors are of pixels.

    Knobs: `oc_tile` output channels of a group by `p_tile` vectors of LANES pixels are held in registers; `share`
    says whether a core does a group's output channels all together (they read the same pixels) or a tile at a time;
    `p_chunk` vectors of a plane are done before the next (0: the whole plane; parts are whole rows, and only where
    these leave no gap); `order` of the loops inside ("p": each pixel is read from memory once, "oc": each weight);
    `ic_unroll` input channels unrolled; `data`: the padded planes are made at once ("root") or by each core for what
    it does next ("chunk").
    """

    name = "plane_conv2d"

    def __init__(self, sizes: list[int], groups: int, parts: tuple[int, ...], copied: str, machine: Machine) -> None:
        _, every, vectors, _, ic, kernel_h, kernel_w = sizes
        channels = every // groups
        self._groups, self._channels, self._vectors, self._ic = groups, channels, vectors, ic
        self._points, self._copied = kernel_h * kernel_w, copied
        self._lanes = min(LANES, machine.lanes)
        self._wide = LANES // self._lanes  # registers that a vector of LANES takes
        most = machine.registers - _SPARE
        tiles = divisors(vectors, most)
        knobs: dict[str, tuple[Any, ...]] = {
            "oc_tile": divisors(channels, most),
            "p_tile": tiles,
            "share": (True, False) if channels > 1 else (True,),
            "p_chunk": (0, *parts),
            "order": ("p", "oc"),
            "ic_unroll": divisors(ic, 4),
            "data": ("chunk", "root") if copied else ("none",),
        }
        super().__init__(knobs, machine)

    @classmethod
    def match(cls, module: Any, blocks: list[str], machine: Machine) -> Template | None:
        """For a convolution of `tvmlab.plane_ops` and its epilogue."""
        from tvm.s_tir import Schedule

        if cls.name not in blocks:
            return None
        schedule = Schedule(module)
        sizes = extents(schedule, schedule.get_sblock(cls.name))
        rows, columns = extents(schedule, schedule.get_sblock("plane_rows"))[2:]
        vectors, parts = sizes[2], tuple[int, ...]()
        copied = next((name for name in blocks if name in ("plane_pad", "plane_copy")), "")
        if not copied and rows * columns == vectors * LANES:
            parts = tuple(size for size in divisors(vectors, vectors - 1) if size * LANES % columns == 0)
        data = next(region.source for region in schedule.get(schedule.get_sblock(cls.name)).reads)
        groups = int(data.shape[1]) // sizes[4]
        return cls(sizes, groups, parts, copied, machine)

    def why_not(self, values: dict[str, Any]) -> str:
        """Accumulators must fit the registers, and whole register tiles a chunk."""
        if values["p_chunk"] % values["p_tile"]:
            return f"p_tile {values['p_tile']} does not divide p_chunk {values['p_chunk']}"
        needed, have = self._accumulators(values), self.machine.registers - _SPARE
        return f"needs {needed} accumulators, there are {have}" if needed > have else ""

    def _accumulators(self, values: dict[str, Any]) -> int:
        return int(values["oc_tile"] * values["p_tile"] * self._wide)

    def _chunks(self, values: dict[str, Any]) -> int:
        parts = self._vectors // (values["p_chunk"] or self._vectors)
        return int(self._groups * parts * (1 if values["share"] else self._channels // values["oc_tile"]))

    def cost(self, values: dict[str, Any]) -> float:
        """Cycles of the busiest core: multiply-adds and loads, two of each at a time, then copies and the epilogue."""
        accumulators, pixels = self._accumulators(values), values["p_tile"] * self._wide
        crossing = 2 if self._points > 1 else 1  # vectors that begin anywhere lie in two cache lines
        step = max(accumulators / 2, (crossing * pixels + values["oc_tile"]) / 2, 4.0) + 0.5 / values["ic_unroll"]
        together = values["p_tile"] if values["order"] == "p" else values["p_chunk"] or self._vectors
        if together * LANES * 4 * self._ic > _NEAR_BYTES:  # the pixels come from the next cache, half a vector a cycle
            step = max(step, 2.0 * pixels)
        if self._points > 1 and accumulators > _MOST_TAPS:
            step *= 1.5  # measured: 14 take 1.2 times as long as 7, 28 more than twice
        every = self._groups * self._channels * self._vectors * self._wide
        products = every / accumulators * step * self._ic * self._points
        copies = 3.0 * self._groups * self._ic * self._vectors * self._wide if self._copied else 0.0
        if values["data"] == "chunk" and not values["share"]:
            copies *= self._channels / values["oc_tile"]
        cycles = products + copies * (1.3 if values["data"] == "root" else 1.0) + 3.0 * every
        return cycles * chunk_balance(self._chunks(values), self.machine.cores) * (1 + 0.02 * (values["order"] == "oc"))

    def features(self, values: dict[str, Any]) -> list[float]:
        """The number of accumulators, of parallel chunks, and the vectors of a chunk."""
        return [self._accumulators(values), self._chunks(values), values["p_chunk"] or self._vectors]

    def schedule(self, module: Any, values: dict[str, Any]) -> Any:
        """One parallel loop; in it the products of a chunk, then its epilogue."""
        from tvm.s_tir import Schedule

        schedule = Schedule(module)
        conv, rows = (schedule.get_sblock(name) for name in (self.name, "plane_rows"))
        if schedule.get_consumers(rows):
            schedule.compute_inline(rows)
        out = inline_epilogue(schedule, conv)
        if not values["p_chunk"]:
            self._need_whole_vectors(schedule, out)
        chunk, pixels = self._chunk_output(schedule, out, values)
        self._tile_products(schedule, conv, chunk, values)
        if self._copied:
            self._place_data(schedule, chunk if values["data"] == "chunk" else None)
        vectorize_runs(schedule, pixels)
        return schedule

    def _need_whole_vectors(self, schedule: Any, out: Any) -> None:
        """Say that each pixel reads its whole plane: else what no pixel reads is cut off the last vectors."""
        reads = [str(region.source.name) for region in schedule.get(out).reads]

        def whole(n: Any, channel: Any, h: Any, w: Any) -> tuple[Any, ...]:
            return n, channel, (0, self._vectors), (0, LANES)

        schedule.annotate_buffer_access(out, reads.index(self.name), "read", whole)

    def _place_data(self, schedule: Any, chunk: Any | None) -> None:
        """The padded planes; zeros are written first, all over, so that what is copied are whole rows."""
        block = schedule.get_sblock(self._copied)
        if chunk is None:
            schedule.parallel(schedule.fuse(*schedule.get_loops(block)[:-2]))
        else:
            schedule.compute_at(block, chunk, preserve_unit_loops=True)
        if self._copied == "plane_pad":
            zeros = schedule.decompose_padding(block, schedule.get_loops(block)[-2])
            vectorize_runs(schedule, schedule.fuse(*schedule.get_loops(zeros)[-2:]))
        *_, row, column = schedule.get_loops(block)
        together = int(schedule.get(column).extent) == int(schedule.get(block).writes[0].source.shape[-1])
        vectorize_runs(schedule, schedule.fuse(row, column) if together else column)

    def _chunk_output(self, schedule: Any, out: Any, values: dict[str, Any]) -> tuple[Any, Any]:
        """The last stage in chunks; returns the parallel loop and the innermost one."""
        n, channel, h, w = schedule.get_loops(out)
        inner = self._channels if values["share"] else values["oc_tile"]
        outer, channel = schedule.split(channel, [None, inner])
        parallel = [n, outer]
        if values["p_chunk"]:
            part, pixels = schedule.split(schedule.fuse(h, w), [None, values["p_chunk"] * LANES])
            schedule.reorder(n, outer, part, channel, pixels)
            parallel.append(part)
        else:
            pixels = schedule.fuse(h, w) if self._points == 1 else w
        chunk = schedule.fuse(*parallel)
        schedule.parallel(chunk)
        return chunk, pixels

    def _tile_products(self, schedule: Any, conv: Any, chunk: Any, values: dict[str, Any]) -> None:
        """The products of a chunk, a register tile at a time, each copied out when it is finished."""
        tile = schedule.cache_write(conv, 0, "local")
        schedule.compute_at(tile, chunk, preserve_unit_loops=True)
        channel, vector, lane = schedule.get_loops(tile)[-3:]
        oc_outer, oc_inner = schedule.split(channel, [None, values["oc_tile"]])
        p_outer, p_inner = schedule.split(vector, [None, values["p_tile"]])
        outer = (p_outer, oc_outer) if values["order"] == "p" else (oc_outer, p_outer)
        schedule.reorder(*outer, oc_inner, p_inner, lane)
        schedule.compute_at(conv, outer[1], preserve_unit_loops=True)
        wide, lane = schedule.split(lane, [None, self._lanes])
        register_tile(schedule, (oc_inner, p_inner, wide), lane)
        oc, p, lane, ic, kh, kw = schedule.get_loops(conv)[-6:]
        wide, lane = schedule.split(lane, [None, self._lanes])
        ic_outer, ic_inner = schedule.split(ic, [None, values["ic_unroll"]])
        schedule.reorder(ic_outer, kh, kw, ic_inner, oc, p, wide, lane)
        unrolled = (kh, kw, ic_inner) if self._points <= _MOST_UNROLLED else (kw, ic_inner)
        register_tile(schedule, (*unrolled, oc, p, wide), lane)
        initialise(schedule, conv, ic_outer)
