"""What CUDA templates share: the limits of a block, a rough cost, and the steps that make kernels of blocks."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvmlab.spaces.schedules import Template, inline_epilogue

__all__ = ["Costed", "Work", "estimate", "fetch", "shared_words", "skewed_row", "split_reduction", "tile_threads"]

SHARED_BYTES = 48 * 1024  # of static shared memory in a block, on every architecture
MOST_THREADS, LEAST_THREADS = 1024, 32
# Rows of a skewed tile are an odd multiple of 4 words apart: 8 of them begin in 8 banks, 16 bytes aligned.
_SKEW, _SKEW_UNIT = 4, 8

# A processor of recent data-centre GPUs (CUDA C++ Programming Guide, "Compute Capabilities"): 8.0 and 9.0. TVM's
# targets do not say how many a card has; A100 has 108, H100 and H200 have 132.
_PROCESSORS = 120
_RESIDENT_THREADS, _RESIDENT_BLOCKS, _REGISTERS, _RESIDENT_SHARED = 2048, 32, 65536, 160 * 1024
_FMA_PER_CYCLE, _LANES_PER_CYCLE = 128, 32  # multiply-adds, words loaded from shared or global memory
_BARRIER_CYCLES = 600  # a load from global memory and two barriers, where no other warp hides it
_LAUNCH_CYCLES = 3000  # about 2 us: a second kernel
_OTHER_REGISTERS = 32  # a thread's beside its accumulators: addresses, operands
_THREADS = 128  # of a block that does one element a thread
_DRAWS, _DESCENTS, _MOST_STARTS = 2000, 12, 12


@dataclass(frozen=True)
class Work:
    """What one block of a kernel does, in all its threads, and how many blocks there are.

    `accumulators` a thread; `fma` multiply-adds, `shared_loads` and `global_loads` words a thread; `rounds` of
    loading, each between barriers; `shared_bytes` a block; `partial_sums` in all, which a second kernel adds up.
    """

    blocks: int
    threads: int
    accumulators: int
    fma: float
    shared_loads: float
    global_loads: float
    rounds: int
    shared_bytes: int
    partial_sums: int = 0

    def why_not(self) -> str:
        """Why a GPU would refuse it or run it badly; an empty string if it would not."""
        if not LEAST_THREADS <= self.threads <= MOST_THREADS:
            return f"a block of {self.threads} threads; {LEAST_THREADS} to {MOST_THREADS} are useful"
        if self.shared_bytes > SHARED_BYTES:
            return f"needs {self.shared_bytes} bytes of shared memory, there are {SHARED_BYTES}"
        registers = self.accumulators + _OTHER_REGISTERS
        if registers > 255 or registers * self.threads > _REGISTERS:
            return f"needs about {registers} registers in each of {self.threads} threads"
        return ""


def estimate(work: Work) -> float:
    """Cycles until the last block is done: what bounds a processor, and how well its warps hide latency."""
    registers = (work.accumulators + _OTHER_REGISTERS) * work.threads
    resident = min(
        _RESIDENT_THREADS // work.threads,
        _RESIDENT_BLOCKS,
        _REGISTERS // registers,
        _RESIDENT_SHARED // max(work.shared_bytes, 1),
    )
    each = math.ceil(work.blocks / _PROCESSORS)  # blocks a processor does
    together = min(each, max(resident, 1))
    lanes = math.ceil(work.threads / 32) * 32
    issue = lanes * max(
        work.fma / _FMA_PER_CYCLE + work.global_loads / _LANES_PER_CYCLE, work.shared_loads / _LANES_PER_CYCLE
    )
    # Independent instructions in flight: four schedulers, four cycles each; the compiler pairs at least two.
    in_flight = together * lanes / 32 * min(work.accumulators, 2)
    busy = issue * max(1.0, 16 / in_flight) * together
    second = _LAUNCH_CYCLES + 8 * work.partial_sums / _PROCESSORS / _LANES_PER_CYCLE if work.partial_sums else 0
    return each / together * (busy + work.rounds * _BARRIER_CYCLES / together) + second


class Costed(Template):
    """A CUDA template whose points are judged by the work of a block."""

    def work(self, values: dict[str, Any]) -> Work:
        """What the kernel of a point does."""
        raise NotImplementedError

    def tile(self, values: dict[str, Any]) -> tuple[int, ...]:
        """What of the output one block computes."""
        raise NotImplementedError

    def why_not(self, values: dict[str, Any]) -> str:
        """The resources of a block must suffice."""
        return self.work(values).why_not()

    def cost(self, values: dict[str, Any]) -> float:
        """Estimated cycles."""
        return estimate(self.work(values))

    def features(self, values: dict[str, Any]) -> list[float]:
        """Binary logarithms of tiles, of the factors in tuples, of the work of a block, and of the estimated cycles."""
        work = self.work(values)
        factors = [factor for value in values.values() if isinstance(value, tuple) for factor in value]
        done = (work.blocks, work.threads, work.accumulators, work.rounds, work.shared_bytes + 1, work.partial_sums + 1)
        cycles = 1.0 if work.why_not() else estimate(work)
        return [math.log2(number) for number in (*self.tile(values), *factors, *done, cycles)]

    def starts(self) -> list[dict[str, Any]]:
        """Points of low estimated cost, each of another tile, the best guess first.

        There are too many points to look at all of them: coordinate descent from some drawn with a fixed seed.
        """
        rng = random.Random(0)
        best: dict[tuple[int, ...], tuple[float, dict[str, Any]]] = {}
        descents = 0
        for _ in range(_DRAWS):
            values = {name: rng.choice(choices) for name, choices in self.knobs.items()}
            if descents < _DESCENTS and not self.why_not(values):
                descents += 1
                for cost, found in self._descend(values):
                    tile = self.tile(found)
                    if tile not in best or cost < best[tile][0]:
                        best[tile] = (cost, found)
        ranked = sorted(best.values(), key=lambda found: found[0])
        return [values for _, values in ranked[:_MOST_STARTS]]

    def _descend(self, values: dict[str, Any]) -> Iterator[tuple[float, dict[str, Any]]]:
        """Points of falling cost, changing one knob after the other until no change of one helps."""
        cost, before = self.cost(values), math.inf
        while cost < before:
            before = cost
            for name, choices in self.knobs.items():
                changed = [{**values, name: choice} for choice in choices]
                costs = [(self.cost(found), place) for place, found in enumerate(changed) if not self.why_not(found)]
                cost, place = min(costs)
                values = changed[place]
                yield cost, values


def split_reduction(schedule: Any, product: Any, loop: Any, parts: int, scope: str = "local") -> tuple[Any, Any]:
    """Split a reduction over blocks; returns the block that computes, and the stage that writes what it computed.

    With one part that stage is the end of the epilogue. With more, each part's sums go to global memory, and a
    second kernel adds them up in the epilogue ("split-K", as in CUTLASS). What is computed is kept in `scope`.
    """
    if not schedule.get_consumers(product):  # no epilogue: a copy instead, so that the sums can be kept near
        schedule.cache_write(product, 0, "global")
    if parts == 1:
        last = inline_epilogue(schedule, product)
        schedule.set_scope(product, 0, scope)
        return product, last
    outer, _ = schedule.split(loop, [parts, None])
    partial = schedule.rfactor(outer, 0)
    written = schedule.cache_write(partial, 0, scope)
    last = inline_epilogue(schedule, product)
    outer, thread = schedule.split(schedule.fuse(*schedule.get_loops(last)), [None, _THREADS])
    schedule.bind(outer, "blockIdx.x")
    schedule.bind(thread, "threadIdx.x")
    schedule.set_scope(product, 0, "local")
    schedule.compute_at(product, thread, preserve_unit_loops=True)
    return partial, written


def fetch(schedule: Any, stage: Any, loop: Any, threads: int, width: int, *, skewed: bool) -> None:
    """Copy a stage into shared memory before a loop's body, by all threads together, `width` words at a time.

    Consecutive threads copy along the stage's last loop. Where that is not the buffer's last axis, the rows of the
    buffer should be `skewed` against bank conflicts.
    """
    rank = len(schedule.get_loops(stage))
    schedule.set_scope(stage, 0, "shared")
    schedule.compute_at(stage, loop, preserve_unit_loops=True)
    if skewed:
        schedule.storage_align(stage, 0, axis=rank - 2, factor=_SKEW_UNIT, offset=_SKEW)
    walk = schedule.fuse(*schedule.get_loops(stage)[-rank:])
    _, thread, vector = schedule.split(walk, [None, threads, width])
    schedule.bind(thread, "threadIdx.x")
    if width > 1:
        schedule.vectorize(vector)


def skewed_row(words: int) -> int:
    """Words from one row of a skewed buffer to the next.

    >>> skewed_row(64), skewed_row(6)
    (68, 12)
    """
    return words + (_SKEW - words) % _SKEW_UNIT


def shared_words(words: int, consecutive: int) -> float:
    """The cost of loading words from shared memory, in loads of one: pairs and quadruples are half as much.

    >>> shared_words(8, 4), shared_words(7, 7)
    (4.0, 7.0)
    """
    return words * (0.5 if consecutive % 2 == 0 else 1.0)


def tile_threads(schedule: Any, outer: list[Any], axes: list[tuple[Any, tuple[int, ...]]]) -> Any:
    """Tile the stage that writes a kernel's output, binding all of it; returns the threads' loop.

    Each of `axes` is a loop with (virtual threads, threads, consecutive elements) of its tile.
    """
    tiles = [schedule.split(loop, [None, *factors]) for loop, factors in axes]
    blocks, virtual, threads, inner = (list(level) for level in zip(*tiles, strict=True))
    schedule.reorder(*outer, *blocks, *virtual, *threads, *inner)
    schedule.bind(schedule.fuse(*outer, *blocks), "blockIdx.x")
    schedule.bind(schedule.fuse(*virtual), "vthread.x")
    thread = schedule.fuse(*threads)
    schedule.bind(thread, "threadIdx.x")
    return thread
