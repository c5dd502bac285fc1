"""The CPU template of Winograd convolutions on packed tensors: two transforms around a batch of matrix products.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016), section 4. Keeping a few tiles in the
cache from the first transform to the last is the blocking of Jia et al., "Optimizing N-dimensional, Winograd-based
Convolution for Manycore CPUs" (PPoPP 2018), section 4.
"""

from __future__ import annotations

import math
from typing import Any

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

__all__ = ["Winograd"]

_SPARE = 3


class Winograd(Template):
    """Winograd convolution of stride 1 on NCHW[x]c.

    Knobs: `fuse` is how many tiles of a row go through all stages together (0: each stage is done for all tiles
    before the next, each spread over the cores); `p_tile` tiles by `oc_tile` blocks of output channels are the
    register tile of the matrix products; `order` of their loops.
    """

    name = "winograd_NCHWc"

    def __init__(self, gemm: list[int], output: list[int], machine: Machine) -> None:
        alpha, _, out_blocks, places, y, in_blocks, x = gemm
        _, _, rows, columns, _ = output
        self._tile = alpha - 2
        self._alpha = alpha
        self._lanes = math.gcd(math.gcd(x, y), machine.lanes)
        self._vectors = y // self._lanes
        self._out_blocks, self._in_blocks, self._places = out_blocks, in_blocks, places
        self._tiles_w = -(-columns // self._tile)
        self._rows = places // self._tiles_w
        self._weight_bytes = alpha * alpha * out_blocks * in_blocks * x * y * 4
        most = machine.registers - _SPARE
        tiles = sorted({size for whole in (places, self._tiles_w) for size in divisors(whole, most)})
        ragged = rows % self._tile or columns % self._tile
        knobs: dict[str, tuple[Any, ...]] = {
            "fuse": (0,) if ragged else (0, *(size for size in divisors(self._tiles_w, 56) if size >= 4)),
            "p_tile": tuple(tiles),
            "oc_tile": divisors(out_blocks, 8),
            "order": ("oc", "p"),
        }
        super().__init__(knobs, machine)

    @classmethod
    def match(cls, module: Any, blocks: list[str], machine: Machine) -> Template | None:
        """For a packed Winograd convolution and its epilogue."""
        from tvm.s_tir import Schedule

        if "winograd_gemm" not in blocks:
            return None
        schedule = Schedule(module)
        gemm, output = (extents(schedule, schedule.get_sblock(f"winograd_{name}")) for name in ("gemm", "output"))
        return cls(gemm, output, machine)

    def why_not(self, values: dict[str, Any]) -> str:
        """The register tile must divide the tiles it is taken from and fit the registers."""
        together = values["fuse"] or self._places
        if together % values["p_tile"]:
            return f"p_tile does not divide {together} tiles"
        needed = values["p_tile"] * values["oc_tile"] * self._vectors
        have = self.machine.registers - 1 - values["oc_tile"] * self._vectors
        return f"needs {needed} accumulators, there are {have}" if needed > have else ""

    def cost(self, values: dict[str, Any]) -> float:
        """As for a direct convolution, and what has to come from memory again."""
        accumulators = values["p_tile"] * values["oc_tile"] * self._vectors
        loads = values["p_tile"] + values["oc_tile"] * self._vectors
        cycles = max(accumulators / 2, loads * 0.75, 4.0) + 1
        if values["fuse"]:
            chunks = self._places // values["fuse"]
            again = 0.2 if self._weight_bytes > 2**20 else 0.0  # each chunk reads all weights
        else:
            chunks = self._alpha**2
            again = 0.05 if self._places > 200 else 0.0
        return (
            cycles / accumulators * chunk_balance(chunks, self.machine.cores) + again + (values["order"] == "p") * 0.01
        )

    def features(self, values: dict[str, Any]) -> list[float]:
        """The number of accumulators."""
        return [values["p_tile"] * values["oc_tile"] * self._vectors]

    def schedule(self, module: Any, values: dict[str, Any]) -> Any:
        """The output's loops first; the other stages are placed in them or keep their own."""
        from tvm.s_tir import Schedule

        schedule = Schedule(module)
        data, gemm, output = (schedule.get_sblock(f"winograd_{name}") for name in ("input", "gemm", "output"))
        pads = schedule.get_producers(data)
        out = inline_epilogue(schedule, output)
        chunk = self._tile_output(schedule, output, out, values)
        if values["fuse"]:
            schedule.compute_at(gemm, chunk, preserve_unit_loops=True)
        self._tile_products(schedule, gemm, values)
        if values["fuse"]:
            schedule.compute_at(data, chunk, preserve_unit_loops=True)
        eps, nu, c, p, ci = schedule.get_loops(data)[-5:]
        schedule.reorder(c, p, eps, nu, ci)
        if not values["fuse"]:
            schedule.parallel(schedule.fuse(c, p))
        schedule.unroll(eps)
        schedule.unroll(nu)
        vectorize(schedule, ci, self._lanes)
        pads = [pad for pad in pads if str(schedule.get(pad).name_hint) == "data_pad"]
        place_padding(schedule, pads, "root", chunk, self._lanes)
        return schedule

    def _tile_output(self, schedule: Any, output: Any, out: Any, values: dict[str, Any]) -> Any:
        """Tile by tile; a tile's transform is unrolled, so that its terms are added and multiplied by constants."""
        n, oc, oh, ow, oci = schedule.get_loops(out)
        oh_outer, oh_inner = schedule.split(oh, [None, self._tile])
        if values["fuse"]:
            ow_outer, ow_tile, ow_inner = schedule.split(ow, [None, values["fuse"], self._tile])
            schedule.reorder(n, oh_outer, ow_outer, oc, ow_tile, oh_inner, ow_inner, oci)
            chunk = schedule.fuse(n, oh_outer, ow_outer)
        else:
            ow_tile, ow_inner = schedule.split(ow, [None, self._tile])
            schedule.reorder(n, oc, oh_outer, ow_tile, oh_inner, ow_inner, oci)
            chunk = schedule.fuse(n, oc, oh_outer)
        schedule.parallel(chunk)
        if out is not output:
            schedule.compute_at(output, ow_tile, preserve_unit_loops=True)
        for block in {out, output}:
            *_, rows, columns, lane = schedule.get_loops(block)
            schedule.unroll(rows)
            schedule.unroll(columns)
            vectorize(schedule, lane, self._lanes)
        return chunk

    def _tile_products(self, schedule: Any, gemm: Any, values: dict[str, Any]) -> None:
        eps, nu, oc, p, oci, ic, ici = schedule.get_loops(gemm)[-7:]
        oc_outer, oc_inner = schedule.split(oc, [None, values["oc_tile"]])
        p_outer, p_inner = schedule.split(p, [None, values["p_tile"]])
        vector, lane = schedule.split(oci, [None, self._lanes])
        first = (oc_outer, p_outer) if values["order"] == "oc" else (p_outer, oc_outer)
        schedule.reorder(eps, nu, *first, ic, ici, p_inner, oc_inner, vector, lane)
        register_tile(schedule, (p_inner, oc_inner, vector), lane)
        if not values["fuse"]:
            schedule.parallel(schedule.fuse(eps, nu, first[0]))
        initialise(schedule, gemm, ic)
