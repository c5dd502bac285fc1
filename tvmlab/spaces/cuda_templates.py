"""CUDA templates: direct convolution, convolution 1x1 and dense layers as matrix products, and matrix by vector.

Tiles in shared memory, register tiles and virtual threads are those of AutoTVM's CUDA templates (Chen et al.,
"Learning to Optimize Tensor Programs", NeurIPS 2018, section 4; TVM's former topi/cuda/conv2d_direct.py).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from tvmlab.spaces.cuda_conv import DirectConv2d
from tvmlab.spaces.cuda_schedules import Costed, Work, fetch, shared_words, skewed_row, split_reduction, tile_threads
from tvmlab.spaces.schedules import Machine, Template, divisors, extents

__all__ = ["TEMPLATES"]

_WASTE = 1.6  # a product padded to whole tiles may be so many times the work
_LEAST = 4  # rows, columns, depth of a product: with fewer it is not worth tiling
_PARTS = (1, 2, 4, 8, 16, 32)


class _Product(Costed):
    """C[m, n] = sum over k of A[k, m] * B[k, n], padded to whole tiles.

    Knobs: along m and n, `*_vthreads` strided parts of a thread's tile, `*_threads`, and `*_inner` consecutive
    elements; `k_tile` of the reduction in shared memory, `k_parts` of it in different blocks, whether a tile's
    reduction is unrolled (`unroll`), and the words that one load of A takes (`vector`).
    """

    # Whether k is the contiguous axis of an operand in global memory; in shared memory it never is.
    _left_turned: ClassVar[bool]
    _right_turned: ClassVar[bool]

    def __init__(self, sizes: tuple[int, int, int], contiguous: int, machine: Machine) -> None:
        self._m, self._n, self._k = sizes
        knobs: dict[str, tuple[Any, ...]] = {
            "m_vthreads": (1, 2),
            "m_threads": _sizes(self._m, 32),
            "m_inner": _sizes(self._m, 8),
            "n_vthreads": (1, 2),
            "n_threads": _sizes(self._n, 64),
            "n_inner": _sizes(self._n, 8),
            "k_tile": (4, 8, 16, 32),
            "k_parts": tuple(parts for parts in _PARTS if parts == 1 or parts * 4 <= self._k),
            "unroll": (False, True),
            "vector": tuple(width for width in divisors(machine.lanes, machine.lanes) if contiguous % width == 0),
        }
        super().__init__(knobs, machine)

    def tile(self, values: dict[str, Any]) -> tuple[int, ...]:
        """Rows and columns of the product."""
        m = values["m_vthreads"] * values["m_threads"] * values["m_inner"]
        n = values["n_vthreads"] * values["n_threads"] * values["n_inner"]
        return m, n

    def work(self, values: dict[str, Any]) -> Work:
        """One word of each operand is loaded for each step of the reduction; a word of B takes two address steps."""
        m, n = self.tile(values)
        threads = values["m_threads"] * values["n_threads"]
        own_m, own_n = m // values["m_threads"], n // values["n_threads"]
        parts, k_tile = values["k_parts"], values["k_tile"]
        rounds = math.ceil(self._k / (k_tile * parts))
        depth = rounds * k_tile
        loop = 0 if values["unroll"] else 2  # a counter and a branch beside the multiply-adds
        return Work(
            blocks=math.ceil(self._m / m) * math.ceil(self._n / n) * parts,
            threads=threads,
            accumulators=own_m * own_n,
            fma=depth * (own_m * own_n + loop),
            shared_loads=depth * (shared_words(own_m, values["m_inner"]) + shared_words(own_n, values["n_inner"])),
            global_loads=depth * (m / values["vector"] + 2 * n) / threads,
            rounds=rounds,
            shared_bytes=4 * k_tile * sum(self._row_words(values)),
            partial_sums=self._m * self._n * (parts if parts > 1 else 0),
        )

    def _row_words(self, values: dict[str, Any]) -> list[int]:
        """Words of shared memory that the rows of A and B take for one step of the reduction."""
        turned = (self._left_turned, self._right_turned)
        return [skewed_row(size) if skewed else size for size, skewed in zip(self.tile(values), turned, strict=True)]

    def why_not(self, values: dict[str, Any]) -> str:
        """The resources of a block must suffice, and padding must not waste much of the work."""
        if refused := super().why_not(values):
            return refused
        m, n = self.tile(values)
        if not self._left_turned and m % values["vector"]:
            return f"vectors of {values['vector']} words do not fill a tile of {m} rows"
        steps = values["k_tile"] * values["k_parts"]
        pairs = ((self._m, m), (self._n, n), (self._k, steps))
        waste = math.prod(math.ceil(size / tile) * tile / size for size, tile in pairs)
        return f"padded to whole tiles it is {waste:.1f} times the work" if waste > _WASTE else ""

    def schedule(self, module: Any, values: dict[str, Any]) -> Any:
        """One kernel, or two where the reduction is in parts."""
        from tvm.s_tir import Schedule

        schedule = Schedule(module)
        product = self._as_product(schedule)
        m, n = self.tile(values)
        schedule.pad_einsum(product, [m, n, values["k_tile"] * values["k_parts"]])
        right, left = self._operands(schedule, product)
        reduction = schedule.get_loops(product)[-1]
        computed, written = split_reduction(schedule, product, reduction, values["k_parts"])
        loops = schedule.get_loops(written) if values["k_parts"] > 1 else self._output_loops(schedule, written)
        *outer, m_loop, n_loop = loops
        m_factors = (values["m_vthreads"], values["m_threads"], values["m_inner"])
        n_factors = (values["n_vthreads"], values["n_threads"], values["n_inner"])
        thread = tile_threads(schedule, outer, [(m_loop, m_factors), (n_loop, n_factors)])
        schedule.compute_at(computed, thread, preserve_unit_loops=True)
        *_, m_inner, n_inner, k = schedule.get_loops(computed)
        k_outer, k_inner = schedule.split(k, [None, values["k_tile"]])
        schedule.reorder(k_outer, k_inner, m_inner, n_inner)
        threads = values["m_threads"] * values["n_threads"]
        fetch(schedule, left, k_outer, threads, values["vector"], skewed=self._left_turned)
        fetch(schedule, right, k_outer, threads, 1, skewed=self._right_turned)
        for loop in (m_inner, n_inner, *((k_inner,) if values["unroll"] else ())):
            schedule.unroll(loop)
        schedule.decompose_reduction(computed, k_outer)
        return schedule

    def _operands(self, schedule: Any, product: Any) -> list[Any]:
        """The stages of B and A (in which order the product reads them), their loops as global memory has the words."""
        stages = {str(schedule.get(stage).writes[0].source.name): stage for stage in schedule.get_producers(product)}
        operands = [stages[str(region.source.name)] for region in schedule.get(product).reads]
        for stage, turned in zip(operands, (self._right_turned, self._left_turned), strict=True):
            padded = schedule.get_producers(stage)
            for earlier in padded:
                schedule.compute_inline(earlier)
            if turned == bool(padded):  # padding walks its buffer, with k before the rows; reindexing the reverse
                schedule.reorder_block_iter_var(stage, [1, 0])
        return operands

    def _as_product(self, schedule: Any) -> Any:
        """Turn the operator's block into the product, its operands stages of their own; returns the block.

        Its loops are (m, n, k), and the axes of its operands (k, n) and (k, m).
        """
        raise NotImplementedError

    def _output_loops(self, schedule: Any, written: Any) -> list[Any]:
        """The loops (m, n) of the last stage."""
        raise NotImplementedError


class PointwiseConv2d(_Product):
    """Convolution 1x1 on NCHW: output channels by pixels, over input channels."""

    name = "conv2d_nchw 1x1"
    _left_turned, _right_turned = True, False

    def __init__(self, sizes: list[int], machine: Machine) -> None:
        batch, channels, self._rows, self._columns, depth = sizes
        super().__init__((channels, batch * self._rows * self._columns, depth), depth, machine)

    @classmethod
    def match(cls, module: Any, blocks: list[str], machine: Machine) -> Template | None:
        """For a convolution 1x1, its padding and its epilogue; not one of hardly any channels or pixels."""
        from tvm.s_tir import Schedule

        if blocks[1:2] != ["conv2d_nchw"]:
            return None
        schedule = Schedule(module)
        batch, channels, rows, columns, depth, *kernel = extents(schedule, schedule.get_sblock("conv2d_nchw"))
        if kernel != [1, 1] or min(channels, batch * rows * columns, depth) < _LEAST:
            return None
        return cls([batch, channels, rows, columns, depth], machine)

    def _as_product(self, schedule: Any) -> Any:
        block = schedule.get_sblock("conv2d_nchw")
        (pad,) = schedule.get_producers(block)
        # The kernel's axes have one element each.
        schedule.transform_block_layout(block, lambda n, f, y, x, c, ky, kx: (f, self._pixel(n, y, x), c + ky + kx))
        _reindex(schedule, block)
        schedule.compute_inline(pad)
        return block

    def _output_loops(self, schedule: Any, written: Any) -> list[Any]:
        # Tiled by rows and columns instead, TVM would compute whole rows for a tile of consecutive pixels.
        schedule.transform_block_layout(written, lambda n, f, y, x: (f, self._pixel(n, y, x)))
        return list(schedule.get_loops(written))

    def _pixel(self, n: Any, y: Any, x: Any) -> Any:
        return (n * self._rows + y) * self._columns + x


class Dense(_Product):
    """Dense layer of a batch: output features by rows of the batch."""

    name = "matmul"
    _left_turned, _right_turned = False, True

    @classmethod
    def match(cls, module: Any, blocks: list[str], machine: Machine) -> Template | None:
        """For the product of two of the task's inputs and its epilogue, with at least 4 rows."""
        sizes = _matmul_sizes(module, blocks)
        if sizes is None or sizes[0] < _LEAST:
            return None
        rows, features, depth = sizes
        return cls((features, rows, depth), features, machine)

    def _as_product(self, schedule: Any) -> Any:
        block = schedule.get_sblock(self.name)
        schedule.transform_block_layout(block, lambda row, feature, k: (feature, row, k))
        _reindex(schedule, block)
        return block

    def _output_loops(self, schedule: Any, written: Any) -> list[Any]:
        row, feature = schedule.get_loops(written)
        return [feature, row]


class Gemv(Costed):
    """Dense layer of one row: a vector by a matrix [k, n], which is read once, so memory bounds it.

    Knobs: `n` (threads along the features, words in a load), `k` (parts of the reduction in different blocks, threads
    of a block along it), and steps of it that are unrolled (`unroll`): loads in flight.
    """

    name = "matmul by vector"

    def __init__(self, features: int, depth: int, machine: Machine) -> None:
        self._features, self._depth = features, depth
        lanes = divisors(machine.lanes, machine.lanes)
        columns = [(threads, width) for width in lanes for threads in divisors(features, 256)]
        rows = [(parts, threads) for parts in divisors(depth, 64) for threads in divisors(depth, 64)]
        knobs: dict[str, tuple[Any, ...]] = {
            "n": tuple(found for found in columns if features % math.prod(found) == 0),
            "k": tuple(found for found in rows if depth % math.prod(found) == 0),
            "unroll": (1, 2, 4, 8, 16),
        }
        super().__init__(knobs, machine)

    @classmethod
    def match(cls, module: Any, blocks: list[str], machine: Machine) -> Template | None:
        """For the product of two of the task's inputs and its epilogue, with one row."""
        sizes = _matmul_sizes(module, blocks)
        if sizes is None or sizes[0] != 1:
            return None
        _, features, depth = sizes
        return cls(features, depth, machine)

    def tile(self, values: dict[str, Any]) -> tuple[int, ...]:
        """Features, and parts of the reduction."""
        return math.prod(values["n"]), values["k"][0]

    def work(self, values: dict[str, Any]) -> Work:
        """A matrix word is loaded for each multiply-add; what is loaded at once hides the latency."""
        (columns, width), (parts, rows) = values["n"], values["k"]
        steps = self._depth // (parts * rows)
        unroll = math.gcd(values["unroll"], steps)
        return Work(
            blocks=self._features // (columns * width) * parts,
            threads=columns * rows,
            accumulators=width * unroll,
            fma=steps * width,
            shared_loads=math.log2(rows) * width if rows > 1 else 0,
            global_loads=steps * (width * max(1, 16 / (columns * width)) + 1),  # a load is of 64 bytes at least
            rounds=math.ceil(steps / unroll),
            shared_bytes=4 * columns * width * (rows + 1),
            partial_sums=self._features * (parts if parts > 1 else 0),
        )

    def why_not(self, values: dict[str, Any]) -> str:
        """The resources of a block must suffice, and the steps unrolled be there."""
        steps = self._depth // math.prod(values["k"])
        if steps % values["unroll"]:
            return f"{steps} steps of a thread are not whole times {values['unroll']}"
        return super().why_not(values)

    def schedule(self, module: Any, values: dict[str, Any]) -> Any:
        """Each thread sums its steps; the threads of a column add up through shared memory."""
        from tvm.s_tir import Schedule

        (columns, width), (parts, rows) = values["n"], values["k"]
        schedule = Schedule(module)
        product = schedule.get_sblock(Dense.name)
        schedule.reindex(product, ("write", 0))
        reduction = schedule.get_loops(product)[-1]
        computed, written = split_reduction(schedule, product, reduction, parts, "shared")
        *_, k = schedule.get_loops(computed)
        _, row = schedule.split(k, [None, rows])
        own = schedule.rfactor(row, 0)
        *outer, features = schedule.get_loops(written)
        block, inner = schedule.split(features, [None, columns * width])
        block = schedule.fuse(*outer, block)
        schedule.bind(block, "blockIdx.x")
        schedule.compute_at(computed, block, preserve_unit_loops=True)
        _, row, column = schedule.split(inner, [None, rows, columns])
        schedule.bind(row, "threadIdx.y")
        schedule.bind(column, "threadIdx.x")
        self._add_up(schedule, computed, own, values)
        return schedule

    def _add_up(self, schedule: Any, computed: Any, own: Any, values: dict[str, Any]) -> None:
        """The sum over a block's threads, and before it each thread's own sum."""
        columns, width = values["n"]
        _, row, *_, features = schedule.get_loops(computed)
        column, vector = schedule.split(features, [columns, width])
        schedule.reorder(column, vector, row)
        schedule.bind(column, "threadIdx.x")
        schedule.bind(row, "threadIdx.y")
        schedule.set_scope(own, 0, "local")
        schedule.compute_at(own, column, preserve_unit_loops=True)
        row, *_, vector, k = schedule.get_loops(own)[2:]
        k_outer, k_inner = schedule.split(k, [None, values["unroll"]])
        schedule.reorder(row, k_outer, k_inner, vector)
        schedule.bind(row, "threadIdx.y")
        schedule.unroll(k_inner)
        schedule.vectorize(vector)
        initial = schedule.decompose_reduction(own, k_outer)
        schedule.vectorize(schedule.get_loops(initial)[-1])


def _matmul_sizes(module: Any, blocks: list[str]) -> list[int] | None:
    """Rows, features and depth of a task that begins with a matrix product; None for any other task."""
    from tvm.s_tir import Schedule

    if blocks[0] != Dense.name:
        return None
    schedule = Schedule(module)
    sizes = extents(schedule, schedule.get_sblock(Dense.name))
    return sizes if len(sizes) == 3 and min(sizes[1:]) >= _LEAST else None


def _reindex(schedule: Any, block: Any) -> None:
    """Give a product's operands and result buffers of their own, with its axes; the operands' with k first."""
    for operand in (("read", 0), ("read", 1)):
        stage = schedule.reindex(block, operand)
        schedule.transform_layout(stage, ("write", 0), lambda row, k: (k, row))
    schedule.reindex(block, ("write", 0))


def _sizes(extent: int, most: int) -> tuple[int, ...]:
    """Sizes of a tile along an axis: the powers of two that are not beyond it, and the axis' divisors.

    >>> _sizes(36, 16)
    (1, 2, 3, 4, 6, 8, 9, 12, 16)
    """
    powers = {1 << exponent for exponent in range(min(most, 2 * extent - 1).bit_length())}
    return tuple(sorted(powers | set(divisors(extent, most))))


TEMPLATES: tuple[type[Template], ...] = (PointwiseConv2d, DirectConv2d, Dense, Gemv)
