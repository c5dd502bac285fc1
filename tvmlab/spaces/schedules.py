"""What templates are made of: the machine they are fitted to, their interface, and schedule steps they share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from tvmlab import llvm

__all__ = ["Machine", "Template", "divisors", "inline_epilogue", "machine_of", "root_blocks"]

_MOST_STARTS = 12
_LONGEST_RUN = 64  # elements


@dataclass(frozen=True)
class Machine:
    """What a schedule has to fit: float32 lanes of a vector, vector registers, cores."""

    lanes: int
    registers: int
    cores: int


def machine_of(target: Any) -> Machine:
    """The machine of a tvm.target.Target. On CUDA the lanes are of a thread's widest load, registers a thread's."""
    if target.kind.name == "cuda":
        return Machine(4, 255, 1)
    attributes = target.attrs
    features = llvm.features({str(name): value for name, value in target.export().items() if name != "tag"})
    wide = {"avx512f", "neon", "sve"} & features
    cores = int(attributes["num-cores"]) if "num-cores" in attributes else 1
    return Machine(llvm.vector_bits(features) // 32, 32 if wide else 16, cores)


class Template:
    """A schedule with knobs for one task. Subclasses are one kind of operator each.

    `knobs` are the values of each knob, in order of size where they are numbers.
    """

    name: ClassVar[str]

    def __init__(self, knobs: dict[str, tuple[Any, ...]], machine: Machine) -> None:
        self.knobs = knobs
        self.machine = machine

    @classmethod
    def match(cls, module: Any, blocks: list[str], machine: Machine) -> Template | None:
        """This template for a module with these blocks; None if it does not cover it."""
        raise NotImplementedError

    def why_not(self, values: dict[str, Any]) -> str:
        """Why a combination of values is not worth building; an empty string if it is."""
        return ""

    def schedule(self, module: Any, values: dict[str, Any]) -> Any:
        """The module's Schedule at a point; raises what TVM raises where it does not fit."""
        raise NotImplementedError

    def cost(self, values: dict[str, Any]) -> float:
        """A rough estimate of the latency, to order the first points by; in no unit."""
        return 0.0

    def features(self, values: dict[str, Any]) -> list[float]:
        """What a cost model is told beside the values themselves."""
        return []

    def starts(self) -> list[dict[str, Any]]:
        """The valid points of lowest estimated cost, the best guess first."""
        names = list(self.knobs)
        points = (dict(zip(names, values, strict=True)) for values in itertools.product(*self.knobs.values()))
        valid = [point for point in points if not self.why_not(point)]
        return sorted(valid, key=self.cost)[:_MOST_STARTS]


def divisors(number: int, most: int) -> tuple[int, ...]:
    """The divisors of a number up to `most`, in rising order.

    >>> divisors(56, 14)
    (1, 2, 4, 7, 8, 14)
    """
    return tuple(size for size in range(1, min(number, most) + 1) if number % size == 0)


def chunk_balance(chunks: int, cores: int) -> float:
    """How much longer the busiest core works than the average one: 1 where the chunks divide evenly.

    >>> chunk_balance(3, 2)
    1.3333333333333333
    """
    return math.ceil(chunks / cores) * cores / chunks


def root_blocks(module: Any) -> list[str]:
    """The names of a module's blocks, in order."""
    from tvm.s_tir import Schedule

    schedule = Schedule(module)
    return [str(schedule.get(block).name_hint) for block in schedule.get_child_blocks(schedule.get_sblock("root"))]


def extents(schedule: Any, block: Any) -> list[int]:
    """The extents of a block's loops, outermost first."""
    return [int(schedule.get(loop).extent) for loop in schedule.get_loops(block)]


def inline_epilogue(schedule: Any, block: Any) -> Any:
    """Inline what follows a block elementwise, all but the last stage; returns that (the block itself if none)."""
    while True:
        consumers = schedule.get_consumers(block)
        if not consumers:
            return block
        if not schedule.get_consumers(consumers[0]):
            return consumers[0]
        schedule.compute_inline(consumers[0])


def parallel_rows(schedule: Any, block: Any, lanes: int, *, keep: int = 2) -> None:
    """Spread a block's outer loops over the cores and vectorise the innermost if whole vectors fill it."""
    loops = schedule.get_loops(block)
    outer = loops[: max(1, len(loops) - keep)]
    schedule.parallel(schedule.fuse(*outer) if len(outer) > 1 else outer[0])
    vectorize(schedule, schedule.get_loops(block)[-1], lanes)


def place_padding(schedule: Any, pads: list[Any], where: str, chunk: Any, lanes: int) -> None:
    """Pad the whole input first ("root"), or in each turn of the loop `chunk` what it reads ("row")."""
    for pad in pads:
        if where == "row":
            schedule.compute_at(pad, chunk, preserve_unit_loops=True)
            vectorize(schedule, schedule.get_loops(pad)[-1], lanes)
        else:
            parallel_rows(schedule, pad, lanes)


def register_tile(schedule: Any, loops: Iterable[Any], lane: Any) -> None:
    """Unroll the loops of a tile that is held in registers, `lane` is the vector."""
    for loop in loops:
        schedule.unroll(loop)
    schedule.vectorize(lane)


def initialise(schedule: Any, block: Any, reduction: Any) -> None:
    """Set a register tile to zero before `reduction`, the outermost of the reduction's loops, which are around it."""
    first = schedule.get_sref(reduction)
    depth = [schedule.get_sref(loop).same_as(first) for loop in schedule.get_loops(block)].index(True)
    initial = schedule.decompose_reduction(block, reduction)
    *tile, lane = schedule.get_loops(initial)[depth:]
    register_tile(schedule, tile, lane)


def vectorize_runs(schedule: Any, loop: Any) -> None:
    """Vectorise a loop over contiguous elements, whatever its extent: LLVM cuts a vector of 28 into 16, 8 and 4.

    A constant loop that is left to LLVM is unrolled before its vectoriser sees it, which leaves single elements.
    """
    size = max(divisors(int(schedule.get(loop).extent), _LONGEST_RUN))
    schedule.vectorize(schedule.split(loop, [None, size])[1])


def vectorize(schedule: Any, loop: Any, lanes: int) -> None:
    """Vectorise a loop of whole vectors; one of several vectors is split and the outer part unrolled."""
    extent = int(schedule.get(loop).extent)
    if extent % lanes:
        return  # LLVM vectorises such a loop itself, with a remainder
    if extent > lanes:
        outer, loop = schedule.split(loop, [None, lanes])
        if extent // lanes <= 8:
            schedule.unroll(outer)
    schedule.vectorize(loop)
