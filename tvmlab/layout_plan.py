"""What the layout step can choose from, as tasks to measure; and its choice, by what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from tvmlab import layouts
from tvmlab.core import Assignment, Packing
from tvmlab.experiment import LayoutTuning
from tvmlab.layout_costs import Copy, Costs, copies_of, needs_of
from tvmlab.layout_graph import read
from tvmlab.models import Model
from tvmlab.sites import Site, options, reason_against
from tvmlab.targets import Target
from tvmlab.tasks import Task, calls, extract_from, key_of, lower_module, lower_sites

__all__ = ["LayoutPlan", "Packed", "described", "lanes_of", "record"]

_GUESS_GBS = 10.0  # what an unmeasured layout transform reads and writes, on a target without a roofline

Latency = Callable[[str], float | None]  # of a task's best trial, seconds


def lanes_of(target: Target) -> int:
    """The float32 lanes of a vector register."""
    return target.vector_bits // 32


class Packed:
    """A model lowered with an assignment: its tasks, and the key of the task that each site became."""

    def __init__(self, model: Model, target: Target, assignment: Assignment) -> None:
        self.assignment = assignment
        lowered, classes, functions = lower_sites(model, target, assignment)
        self.tasks = extract_from(lowered, classes, target)
        known = {function: key_of(lowered, function) for function in set(functions.values())}
        self.keys = {site: known[function] for site, function in functions.items()}


class LayoutPlan:
    """The packings that a model's sites could have, as tasks to measure.

    `tasks` are all there are: those of the provisional assignment (the first block, direct) with their weight, the
    others with weight 0. `variants` are the convolutions and dense layers to measure, `copies` the layout transforms,
    both with the weight that they would have.
    """

    def __init__(self, model: Model, target: Target, step: LayoutTuning) -> None:
        self._model, self._target = model, target
        self._graph = read(model.module)
        blocks = step.blocks or (lanes_of(target),)
        # Beside a convolution that must stay in NCHW, one that can do so as fast saves the transforms between them.
        beside = tuple(dict.fromkeys((*blocks, 0))) if _stuck(self._graph.sites, blocks) else blocks
        self.choices = {
            site.name: _choices(site, beside if site.planar else blocks, step.algorithms, target)
            for site in self._graph.sites
        }
        self._tried = {site: [p for p, why in found.items() if why is None] for site, found in self.choices.items()}
        packed = [Packed(model, target, assignment) for assignment in _rounds(self._tried, beside)]
        self._keys = _keys(packed)
        self._first = packed[0]
        self.variants = self._labelled(packed)
        copied = self._copied()
        self._copy_keys = {copy: task.key for copy, task in copied.items()}
        self.copies = list({task.key: task for task in copied.values() if task.info.tunable}.values())
        self._views = {task.key for task in copied.values()} - {task.key for task in self.copies}
        weights = {task.key: task.info.weight for task in self._first.tasks}
        every = {task.key: task for task in [*self._first.tasks, *self.copies, *self.variants]}
        self.tasks = [_with(task, weight=weights.get(key, 0)) for key, task in every.items()]

    @property
    def provisional(self) -> dict[str, Any]:
        """What assignment.json says as long as nothing was chosen."""
        return self._record(self._first, lambda key: None, {}, finished=False)

    def decide(self, latency: Latency) -> tuple[dict[str, Any], Packed]:
        """The cheapest assignment for assignment.json, and the model packed by it.

        Only packings with a latency are chosen from; a site without any keeps its provisional one.
        """
        costs = Costs(self._graph, self._site_costs(latency), lambda copy: self._copy_cost(copy, latency))
        uniform = {name: (found, costs.of(found)) for name, found in self._uniform(latency).items()}
        best, least = costs.cheapest([found for found, _ in uniform.values()])
        instead = {
            (site, packing): costs.of(best | {site: packing})
            for site, known in self._site_costs(latency).items()
            for packing in known
        }
        packed = Packed(self._model, self._target, {site: packing for site, packing in best.items() if packing.block})
        compared = {name: cost for name, (_, cost) in uniform.items() if cost is not None}
        paid = [
            {
                "tensor": item.tensor,
                "shape": item.shape,
                "source": str(Packing(item.source)),
                "target": str(Packing(item.target)),
                "cost_s": cost,
            }
            for item, cost in costs.transforms(best)
            if cost
        ]
        summary = {"transforms": paid, "cost_s": least, "uniform": compared}
        return self._record(packed, latency, instead, finished=True) | summary, packed

    def _labelled(self, packed: Sequence[Packed]) -> list[Task]:
        """The tasks to measure; their names say which packing they are, because each lowering counts from zero."""
        labels: dict[str, set[str]] = {}
        for (site, packing), key in self._keys.items():
            tried = self._tried[site]
            if packing in tried and (packing.block or len(tried) > 1):  # without a choice there is nothing to find out
                labels.setdefault(key, set()).add(str(packing))
        found = {task.key: task for each in reversed(packed) for task in each.tasks if task.key in labels}
        return [_with(task, name=f"{task.info.name} ({', '.join(sorted(labels[key]))})") for key, task in found.items()]

    def _copied(self) -> dict[Copy, Task]:
        """Every layout transform that could be needed, with its task."""
        wanted = copies_of(needs_of(self._graph), self._tried)
        if not wanted:
            return {}
        lowered, classes = lower_module(layouts.copies(wanted), self._target)
        tasks = {task.key: task for task in extract_from(lowered, classes, self._target)}
        return {copy: tasks[key_of(lowered, name)] for copy, (name, _) in zip(wanted, calls(lowered), strict=True)}

    def _site_costs(self, latency: Latency) -> dict[str, dict[Packing, float]]:
        """What can be chosen for each site: the packings that were measured, or the provisional one."""
        found = {}
        for site, packings in self._tried.items():
            known = {packing: latency(self._keys.get((site, packing), "")) for packing in packings}
            costs = {packing: seconds for packing, seconds in known.items() if seconds is not None}
            found[site] = costs or {self._first.assignment.get(site, Packing()): 0.0}
        return found

    def _copy_cost(self, copy: Copy, latency: Latency) -> float:
        """Seconds of a layout transform; where it was not measured, what reading and writing it takes."""
        key = self._copy_keys.get(copy)
        if key in self._views:  # TVM makes no kernel of it
            return 0.0
        seconds = latency(key) if key else None
        limits = self._target.roofline
        return seconds or 8 * prod(copy[0]) / ((limits.bandwidth_gbs if limits else _GUESS_GBS) * 1e9)

    def _uniform(self, latency: Latency) -> dict[str, Assignment]:
        """The assignments of one block and algorithm, by its name; what cannot have it is direct, or as it must be.

        Dense layers have their best block in all of them: it has no influence on any other layout.
        """
        costs = self._site_costs(latency)
        packings = dict.fromkeys(
            packing for site, found in costs.items() if not self._is_dense(site) for packing in found
        )
        return {
            str(packing): {site: self._nearest(packing, found, site) for site, found in costs.items()}
            for packing in packings
        }

    def _nearest(self, packing: Packing, known: Mapping[Packing, float], site: str) -> Packing:
        if self._is_dense(site) or len(known) == 1:
            return min(known, key=lambda choice: known[choice])
        return next((choice for choice in (packing, Packing(packing.block)) if choice in known), Packing())

    def _is_dense(self, site: str) -> bool:
        return site.startswith("dense")

    def _record(
        self,
        packed: Packed,
        latency: Latency,
        instead: Mapping[tuple[str, Packing], float | None],
        finished: bool,
    ) -> dict[str, Any]:
        alternatives = {
            site: [
                {
                    "packing": str(packing),
                    "why_not": why or "",
                    "task_key": self._keys.get((site, packing), ""),
                    "cost_s": latency(key) if (key := self._keys.get((site, packing))) else None,
                    "instead_s": instead.get((site, packing)),  # of the model, if this site alone had this packing
                }
                for packing, why in found.items()
            ]
            for site, found in self.choices.items()
        }
        return record(self._graph.sites, packed, alternatives, finished)


def described(site: Site) -> tuple[str, str]:
    """A site's name, and what the record of an assignment says about it."""
    return site.name, str(site).partition(": ")[2]


def record(
    sites: Iterable[Site], packed: Packed, alternatives: Mapping[str, list[dict[str, Any]]], finished: bool
) -> dict[str, Any]:
    """An assignment as assignment.json has it; `finished` says that no step is going to change it."""
    rows = [
        {
            **dict(zip(("site", "about"), described(site), strict=True)),
            "packing": str(packed.assignment.get(site.name, Packing())),
            "task_key": packed.keys.get(site.name, ""),
            "alternatives": alternatives.get(site.name, []),
        }
        for site in sites
    ]
    return {"finished": finished, "sites": rows}


def _stuck(sites: Iterable[Site], blocks: Sequence[int]) -> bool:
    """Whether some convolution can have none of the blocks."""
    found = [options(site, blocks) for site in sites if site.kind != "dense"]
    return any(all(why for packing, why in choices.items() if packing.block) for choices in found)


def _choices(site: Site, blocks: Sequence[int], algorithms: Sequence[str], target: Target) -> dict[Packing, str | None]:
    """The packings of a site: None where it is to be tried, or why not."""
    if site.kind == "dense":
        sizes = {layouts.dense_block_of(site, lanes_of(target), most * lanes_of(target)) for most in (8, 2)}
        found = {Packing(): None} | {Packing(size): reason_against(site, Packing(size)) for size in sorted(sizes)}
    else:
        found = options(site, blocks)
    for packing, why in found.items():
        if why is None and packing.algorithm not in algorithms:
            found[packing] = f"{packing.algorithm} is not among the algorithms to try"
    possible = any(why is None for packing, why in found.items() if packing.block)
    if possible and 0 not in blocks:
        found[Packing()] = "NCHW is not among the blocks to try"
    return found


def _rounds(tried: Mapping[str, Sequence[Packing]], blocks: Sequence[int]) -> Iterator[Assignment]:
    """Assignments of one block each, in which every packing to be tried occurs, beside neighbours of the same block."""
    for block in blocks:
        possible = {
            site: [packing for packing in packings if packing.block == block or site.startswith("dense")]
            for site, packings in tried.items()
        }
        for number in range(max(map(len, possible.values()), default=1) or 1):
            chosen = {site: found[min(number, len(found) - 1)] for site, found in possible.items() if found}
            yield {site: packing for site, packing in chosen.items() if packing.block}


def _keys(packed: Iterable[Packed]) -> dict[tuple[str, Packing], str]:
    """The task of each site in each packing: that of the first lowering in which it has it."""
    found: dict[tuple[str, Packing], str] = {}
    for each in packed:
        for site, key in each.keys.items():
            found.setdefault((site, each.assignment.get(site, Packing())), key)
    return found


def _with(task: Task, **changes: Any) -> Task:
    return replace(task, info=replace(task.info, **changes))
