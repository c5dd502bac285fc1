"""The sketch space of a task: TVM's generated schedules, the knobs in them, and the points those span."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from math import prod
from typing import Any

import numpy as np

from tvmlab.compat import load_meta_schedule, load_wmma, structural_key, to_plain
from tvmlab.core import Candidate
from tvmlab.spaces.encoding import Encoding
from tvmlab.spaces.knobs import Choice, Knob, Location, Tile, directions, stepped
from tvmlab.tasks import arguments

__all__ = ["Point", "SketchSpace"]

Point = tuple[int, Sequence[Any]]  # sketch number, decisions of its sampling instructions

_ATTEMPTS = 40  # random points tried for each one wanted
_DRAWS = 4000  # and drawn for these on a GPU
_GPU_TILE = 5  # parts of a spatial loop's tile there: blocks, virtual threads, threads, and two within a thread
_LEAST_THREADS, _MOST_THREADS = 32, 1024  # of a block: TVM's rules mark blocks so, and VerifyGPUCode looks
_FEW_ELEMENTS = 64  # of a kernel that is marked with no least
_LOCATIONS = 6  # loops considered for a compute location before any was seen


class SketchSpace:
    """Generated sketches (Ansor section 4.1, by TVM's rules for the target), each with sampled knobs.

    Raises nothing for a point that does not apply: `realize` gives None.
    """

    def __init__(self, task_key: str, module: Any, target: Any) -> None:
        meta_schedule = load_meta_schedule(target.kind.name)
        self.task_key = task_key
        self._module = module
        self._is_gpu = target.kind.name == "cuda"
        self.context = meta_schedule.TuneContext(
            mod=module,
            target=target,
            space_generator=_generator(meta_schedule, module, target),
            rand_state=1,
            num_threads=1,
        ).clone()
        found = self.context.generate_design_space()
        self.sketches = [sketch.trace.simplified(True) for sketch in found]
        self._shapes = [_split(sketch)[0] for sketch in self.sketches]
        self._samplers = [_samplers(sketch) for sketch in self.sketches]
        self._knobs = [
            [_knob(inst, decision) for inst, decision in zip(samplers, _split(sketch)[1], strict=True)]
            for sketch, samplers in zip(self.sketches, self._samplers, strict=True)
        ]
        self._encoding = Encoding(self._knobs)

    def __len__(self) -> int:
        return len(self.sketches)

    def random(self, sketch: int, rng: np.random.Generator) -> Point:
        """A point of a sketch drawn knob by knob; it need not be valid."""
        return sketch, [knob.random(rng) for knob in self._knobs[sketch]]

    def mutate(self, point: Point, rng: np.random.Generator) -> Point:
        """A point that differs in one knob."""
        sketch, decisions = point
        if not decisions:
            return point
        changed = list(decisions)
        position = int(rng.integers(len(changed)))
        changed[position] = self._knobs[sketch][position].mutate(changed[position], rng)
        return sketch, changed

    def twins(self, point: Point) -> list[Point]:
        """The same decisions in each of the other sketches that have the same knobs; not all are valid."""
        return list(self._encoding.elsewhere(point))

    def elsewhere(self, candidate: Candidate) -> list[Candidate]:
        """The valid twins of a candidate; none of one whose trace is not of these sketches."""
        points = self.twins((candidate.sketch, candidate.decisions)) if candidate.sketch >= 0 else []
        return [found for point in points if (found := self.realize(point)) is not None and found.sketch == point[0]]

    def encode(self, points: Sequence[Point]) -> Any:
        """The points as a float32 array of shape (len(points), width)."""
        return self._encoding.encode(points)

    def realize(self, point: Point) -> Candidate | None:
        """The candidate at a point; None where TVM's schedule or a postprocessor refuses it.

        TVM repairs some invalid decisions in silence; the candidate's decisions are the ones that were applied.
        """
        from tvm.s_tir import Trace

        sketch, decisions = point
        if self._is_gpu and not _fits_gpu(decisions):
            return None
        chosen = dict(zip(self._samplers[sketch], decisions, strict=True))
        return self.replay(Trace(self.sketches[sketch].insts, chosen))

    def plainest(self) -> Candidate | None:
        """The first valid point: of the first sketch that has one, untiled, at the root, each choice its first value.

        On a GPU such a point lacks threads, so it may be a random one instead. None if none was found.
        """
        for sketch, knobs in enumerate(self._knobs):
            found = self.realize((sketch, [knob.plain for knob in knobs]))
            if found is not None:
                return found
        rng = np.random.default_rng(0)
        return next((found for sketch in range(len(self)) if (found := self.sample(sketch, rng))), None)

    def axes(self, sketch: int) -> list[Knob]:
        """The knobs of a sketch, in order."""
        return list(self._knobs[sketch])

    def knobs(self, candidate: Candidate) -> list[Knob]:
        """The knobs of a candidate's own trace, which need not be of one of the sketches."""
        trace = candidate.payload.trace.simplified(True)
        return [_knob(inst, value) for inst, value in zip(_samplers(trace), candidate.decisions, strict=True)]

    def vary(self, candidate: Candidate, decisions: Sequence[Any]) -> Candidate | None:
        """The candidate with other decisions in the same trace; None where TVM refuses, or repairs, one of them."""
        from tvm.s_tir import Trace

        if self._is_gpu and not _fits_gpu(decisions):
            return None
        trace = candidate.payload.trace.simplified(True)
        found = self.replay(Trace(trace.insts, dict(zip(_samplers(trace), decisions, strict=True))))
        return found if found is not None and list(found.decisions) == list(decisions) else None

    def neighbours(self, candidate: Candidate) -> list[Candidate]:
        """The valid candidates one step from this one, both ways along each of its knobs, no program twice."""
        knobs = self.knobs(candidate)
        points = [stepped(knobs, candidate.decisions, [way]) for way in directions(knobs, candidate.decisions)]
        found = [self.vary(candidate, point) for point in points if point is not None]
        return list({other.key: other for other in found if other and other.key != candidate.key}.values())

    def sample(self, sketch: int, rng: np.random.Generator) -> Candidate | None:
        """A valid random candidate of a sketch; None if none is found.

        Drawn by TVM's own sampler; on a GPU knob by knob, since most points are seen not to fit before TVM is asked.
        """
        from tvm.s_tir import Trace

        if self._is_gpu:
            drawn = (self.random(sketch, rng) for _ in range(_DRAWS))
            fit = islice((point for point in drawn if _fits_gpu(point[1])), _ATTEMPTS)
            return next((found for point in fit if (found := self.realize(point))), None)
        for _ in range(_ATTEMPTS):
            found = self.replay(Trace(self.sketches[sketch].insts, {}), seed=int(rng.integers(1, 2**31 - 1)))
            if found is not None:
                return found
        return None

    def replay(self, trace: Any, seed: int = 1) -> Candidate | None:
        """The candidate a trace makes of this task, postprocessed; None if it does not apply or is not valid.

        Decisions that the trace lacks are sampled with `seed`.
        """
        from tvm.s_tir import Schedule

        schedule = Schedule(self._module, seed=seed, debug_mask="none", error_render_level="none")
        try:
            trace.apply_to_schedule(schedule, remove_postproc=True)
            schedule.enter_postproc()
            valid = all(postproc.apply(schedule) for postproc in self.context.space_generator.postprocs)
        except Exception:  # noqa: BLE001  a trace that does not fit raises ScheduleError, InternalError or ValueError
            return None
        if not valid:
            return None
        sketch, decisions = self.point(schedule.trace)
        return Candidate(self.task_key, structural_key(schedule.mod), sketch, decisions, schedule)

    def point(self, trace: Any) -> Point:
        """Which sketch a trace comes from (-1: none of them), and its decisions in order, as plain data."""
        shape, decisions = _split(trace.simplified(True))
        return (self._shapes.index(shape) if shape in self._shapes else -1), decisions


def _generator(meta_schedule: Any, module: Any, target: Any) -> Any:
    """TVM's rules for the target; on CUDA those of tensor cores only where a tensor is of half precision.

    For float32 they give the same sketches, but need intrinsics that take TVM 8 seconds and more to parse.
    """
    if target.kind.name != "cuda":
        return "post-order-apply"
    if any(dtype == "float16" for _, dtype in arguments(module)):
        load_wmma()
        return "post-order-apply"
    return meta_schedule.space_generator.PostOrderApply(
        sch_rules=meta_schedule.schedule_rule.ScheduleRule.create("cuda"),
        postprocs=meta_schedule.postproc.Postproc.create("cuda"),
        mutator_probs=meta_schedule.mutator.Mutator.create("cuda"),
    )


def _fits_gpu(decisions: Sequence[Any]) -> bool:
    """Whether a thread block of these tiles may pass VerifyGPUCode: applying a trace to find out takes milliseconds.

    The least is asked only of a kernel with more than two warps of elements (TVM's multi_level_tiling.cc).
    """
    tiles = [value for value in decisions if isinstance(value, list) and len(value) == _GPU_TILE]
    least = _LEAST_THREADS if prod(map(prod, tiles)) > _FEW_ELEMENTS else 1
    return not tiles or least <= prod(tile[2] for tile in tiles) <= _MOST_THREADS


def _split(trace: Any) -> tuple[str, list[Any]]:
    """A trace as the text of its instructions (what tells sketches apart) and its decisions."""
    instructions, decisions = to_plain(trace.as_json())
    return json.dumps(instructions), [decision for _, decision in decisions]


def _samplers(trace: Any) -> list[Any]:
    """The sampling instructions of a trace, in order."""
    return [instruction for instruction in trace.insts if instruction.kind.name.startswith("Sample")]


def _knob(instruction: Any, decision: Any) -> Knob:
    kind = instruction.kind.name
    attributes = to_plain(instruction.attrs)
    if kind == "SamplePerfectTile":
        return Tile(int(np.prod(decision)), int(attributes[0]), max(int(attributes[1]), 0))
    if kind == "SamplePartitionedTile":  # its other attributes limit products of parts, not the last one
        return Tile(int(np.prod(decision)), int(attributes[0]), 0)
    if kind == "SampleCategorical":
        return Choice(len(attributes[0]))
    return Location(max(_LOCATIONS, int(decision)))
