"""A schedule of one task carried over to another task of its kernel class, whose shape differs.

Gibson & Cano, "Transfer-Tuning" (PACT 2022), apply a schedule unchanged and leave out what does not apply. TVM repairs
a tile that does not divide a loop in silence, mostly to [1, ..., extent]; here every decision is first moved to the
nearest one that the other shape has, and a candidate whose decisions are not those asked for is refused.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import islice
from typing import Any

from tvmlab.compat import to_plain
from tvmlab.core import Candidate
from tvmlab.spaces.schedules import divisors
from tvmlab.spaces.sketch import SketchSpace
from tvmlab.spaces.template import TemplateSpace

__all__ = ["adapt_trace", "adapt_values", "nearest_points", "nearest_tile"]

# An outermost loop grows with the shape (AutoTVM treats it as a wildcard), an innermost one fits a vector: how much a
# doubling of the outermost, a middle and the innermost part of a tile counts.
_OUTER, _MIDDLE, _INNER = 0.25, 1.0, 1.25
_OTHER = 16.0  # a knob value that is no number, or zero, against another: as far as 16 doublings
_MOST_POINTS = 4096  # of a template space that are looked at, the nearest first
_LOCATION, _ROOT = "SampleComputeLocation", -1
_MOST_LOOPS = 32  # no block of a sketch has more


def nearest_tile(sizes: Sequence[int], extent: int, max_innermost: int = 0) -> list[int]:
    """The factorisation of `extent` nearest to `sizes` in log space, exactly; the last part at most `max_innermost`.

    Zero or less stands for no such limit, and a factorisation always exists: the first part may take everything.

    >>> nearest_tile([4, 1, 7, 2], 56), nearest_tile([4, 1, 7, 2], 14), nearest_tile([4, 1, 7, 2], 13)
    ([4, 1, 7, 2], [1, 1, 7, 2], [1, 1, 13, 1])
    >>> nearest_tile([1, 1, 1, 64], 128, max_innermost=16)
    [8, 1, 1, 16]
    """
    return list(_nearest(tuple(sizes), extent, max_innermost)[1])


@lru_cache(maxsize=4096)
def _nearest(sizes: tuple[int, ...], extent: int, limit: int, outermost: bool = True) -> tuple[float, tuple[int, ...]]:
    """Distance and parts; by recursion over what is left for the parts after the first."""
    if len(sizes) == 1:
        too_large = 0 < limit < extent and not outermost
        return (math.inf if too_large else _INNER * _doublings(extent, sizes[0])), (extent,)
    found = []
    for size in divisors(extent, extent):
        rest, parts = _nearest(sizes[1:], extent // size, limit, False)
        weight = _OUTER if outermost else _MIDDLE
        found.append((weight * _doublings(size, sizes[0]) + rest, (size, *parts)))
    return min(found)


def _doublings(one: int, other: int) -> float:
    return abs(math.log2(one / other))


def nearest_points(
    values: Mapping[str, Any], knobs: Mapping[str, Sequence[Any]], most: int = _MOST_POINTS
) -> Iterator[dict[str, Any]]:
    """The points of some knobs, those nearest to `values` in log space first; at most `most` of them.

    A knob that `values` lacks may have any value; the first listed comes first.

    >>> [point["ow"] for point in nearest_points({"ow": 14, "pad": "row"}, {"ow": (1, 7, 13), "pad": ("row",)})]
    [13, 7, 1]
    """
    names = list(knobs)
    ranked = [
        sorted((_apart(values.get(name, value), value), at) for at, value in enumerate(knobs[name])) for name in names
    ]
    start = (0,) * len(names)
    queue, seen = [(sum(choices[0][0] for choices in ranked), start)], {start}
    for _ in range(most):
        if not queue:
            return
        _, at = heapq.heappop(queue)
        yield {name: knobs[name][ranked[k][at[k]][1]] for k, name in enumerate(names)}
        for k in range(len(names)):
            further = (*at[:k], at[k] + 1, *at[k + 1 :])
            if further[k] < len(ranked[k]) and further not in seen:
                seen.add(further)
                heapq.heappush(queue, (sum(ranked[j][place][0] for j, place in enumerate(further)), further))


def _apart(one: Any, other: Any) -> float:
    """Doublings between two values of a knob: numbers, or tuples of them; of anything else, whether they are equal."""
    if type(one) is type(other) and one == other:
        return 0.0
    if isinstance(one, tuple | list) and isinstance(other, tuple | list) and len(one) == len(other):
        return sum(map(_apart, one, other))
    numbers = all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in (one, other))
    return _doublings(one, other) if numbers else _OTHER


def adapt_values(space: TemplateSpace, values: Mapping[str, Any]) -> Candidate | str:
    """The valid point of a template space that is nearest to some knob values; or why there is none."""
    valid = (point for point in nearest_points(values, space.template.knobs) if not space.template.why_not(point))
    for point in islice(valid, 8):  # TVM refuses few that the template accepts
        candidate = space.realize(space.index_of(point))
        if candidate is not None:
            return candidate
    return "no point near it is valid"


def adapt_trace(space: SketchSpace, module: Any, trace: Any) -> Candidate | str:
    """The candidate that a trace of another task makes of this one, its decisions adapted; or why there is none.

    `module` is the task's. The decisions go into the trace's own sketch if the space has it, else into the one most
    like it that samples the same tiles and choices: where the epilogue or the padding differs, such a sketch still
    fits. Where there is none, as between operators, they go into a sketch that samples some of the same in the same
    order, without instructions of a kind that the trace lacks if there is such a one: a pooling takes how far a
    convolution is unrolled, a matrix product the tiles of its channels. A compute location that the trace does not say
    is at the root.
    """
    from tvm.s_tir import Schedule

    source = trace.simplified(True)
    own, _ = space.point(source)
    sketch = space.sketches[own] if own >= 0 else _most_alike(space.sketches, source)
    if sketch is None:
        return "no sketch of this kernel takes its decisions"
    schedule = Schedule(module, seed=1, debug_mask="none", error_render_level="none")
    adaptation = _Adaptation(schedule, source, sketch)
    try:
        sketch.apply_to_schedule(schedule, remove_postproc=True, decision_provider=adaptation)
    except Exception:  # noqa: BLE001  TVM raises ScheduleError, InternalError or ValueError for what does not fit
        return "its decisions do not fit this shape"
    candidate = space.replay(schedule.trace)
    if candidate is None:
        return "it is not valid for this shape"
    if list(candidate.decisions) != adaptation.asked:
        return "TVM changed its decisions"
    return candidate


def _most_alike(sketches: Sequence[Any], trace: Any) -> Any:
    """The sketch that fits a trace's decisions best, see `adapt_trace`; None if none does."""
    wanted, kinds = _sampled(trace), _kinds(trace)

    def likeness(sketch: Any) -> tuple[bool, int, int, float]:
        sampled, theirs = _sampled(sketch), _kinds(sketch)
        strange = len(set(theirs) - set(kinds))
        return sampled == wanted, -strange, len(sampled), SequenceMatcher(None, kinds, theirs).ratio()

    fitting = [sketch for sketch in sketches if _positions(_sampled(sketch), wanted) is not None]
    return max(fitting, key=likeness, default=None)


def _positions(part: Sequence[Any], whole: Sequence[Any]) -> list[int] | None:
    """Where the items of `part` are in `whole`, in the same order; None if they are not all there."""
    found: list[int] = []
    for item in part:
        after = found[-1] + 1 if found else 0
        position = next((at for at in range(after, len(whole)) if whole[at] == item), None)
        if position is None:
            return None
        found.append(position)
    return found


def _samplers(trace: Any) -> list[Any]:
    return [instruction for instruction in trace.insts if str(instruction.kind.name).startswith("Sample")]


def _sampled(trace: Any) -> list[tuple[str, Any]]:
    """The kind and attributes of each sampling instruction but the locations: those are of paddings, mostly."""
    found = [(str(instruction.kind.name), to_plain(instruction.attrs)) for instruction in _samplers(trace)]
    return [(kind, attributes) for kind, attributes in found if kind != _LOCATION]


def _kinds(trace: Any) -> list[str]:
    return [str(instruction.kind.name) for instruction in trace.insts]


class _Adaptation:
    """Answers each sampling instruction with the value nearest to a trace's decision that the schedule allows."""

    def __init__(self, schedule: Any, source: Any, sketch: Any) -> None:
        self._schedule = schedule
        known = [(str(each.kind.name), to_plain(source.decisions[each])) for each in _samplers(source)]
        decisions = [decision for kind, decision in known if kind != _LOCATION]
        self._wanted = iter([decisions[at] for at in _positions(_sampled(sketch), _sampled(source)) or []])
        self._locations = iter([decision for kind, decision in known if kind == _LOCATION])
        self.asked: list[Any] = []

    def __call__(self, instruction: Any, inputs: Any, attributes: Any, decision: Any) -> Any:
        kind = str(instruction.kind.name)
        if not kind.startswith("Sample"):
            return decision
        if kind == _LOCATION:
            chosen: Any = self._location(inputs[0], next(self._locations, _ROOT))
        elif kind == "SamplePerfectTile":
            extent, limit = int(self._schedule.get(inputs[0]).extent), int(to_plain(attributes)[1])
            chosen = nearest_tile(next(self._wanted), extent, limit)
        else:
            chosen = next(self._wanted)
        self.asked.append(chosen)
        return chosen

    def _location(self, block: Any, wanted: int) -> int:
        """The nearest location that TVM leaves as it is."""
        for location in sorted(range(-2, _MOST_LOOPS), key=lambda number: (abs(number - wanted), number)):
            scratch = self._schedule.copy()
            scratch.sample_compute_location(block, decision=location)
            if int(to_plain(scratch.trace.get_decision(scratch.trace.insts[-1]))) == location:
                return location
        return _ROOT
