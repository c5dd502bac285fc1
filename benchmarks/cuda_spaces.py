"""How much of the CUDA spaces is valid, without a card: sketches, templates, neighbours, transferred schedules.

    python benchmarks/cuda_spaces.py [--models resnet50 googlenet alexnet] [--target sm_90a] [--tries 25] [--every 4]

Valid is what TVM's postprocessors for the target accept, VerifyGPUCode among them. Each distinct task of the models is
looked at; neighbours and transfers of every fourth (`--every`), since they take a second each. Sketch points are drawn
by TVM's own sampler; where none of them is valid, by tvmlab's, which refuses beforehand what cannot fit a thread block.
The last line is JSON.
"""

import argparse
import json
from collections import defaultdict

import numpy as np

from tvmlab.models import load_model
from tvmlab.spaces.adapt import adapt_trace, adapt_values
from tvmlab.spaces.knobs import directions, stepped
from tvmlab.spaces.sketch import SketchSpace
from tvmlab.strategies import template_space
from tvmlab.targets import target
from tvmlab.tasks import extract


class Counts(dict):
    """Valid ones and tries, by what was tried."""

    def add(self, name, is_valid):
        valid, tries = self.get(name, (0, 0))
        self[name] = (valid + bool(is_valid), tries + 1)


def samples(space, tries, rng, counts, name):
    """The valid candidates among so many random points of a task's sketches."""
    from tvm.s_tir import Trace

    found = []
    for number in range(tries):
        trace = Trace(space.sketches[number % len(space)].insts, {})
        candidate = space.replay(trace, seed=int(rng.integers(1, 2**31 - 1)))
        counts.add(name, candidate)
        found += [candidate] if candidate else []
    return found


def starts(template, counts):
    """The valid candidates among a template's starts."""
    made = [template.realize(index) for index in template.starts()]
    for candidate in made:
        counts.add("template starts", candidate)
    return [candidate for candidate in made if candidate]


def neighbours(space, candidate, counts):
    """Try every neighbour of a candidate."""
    knobs = space.knobs(candidate)
    points = [stepped(knobs, candidate.decisions, [way]) for way in directions(knobs, candidate.decisions)]
    for point in (point for point in points if point is not None):
        counts.add("droplet's neighbours of a sketch", space.vary(candidate, point))


def transfer(origins, spaces, task, counts):
    """Try the other tasks' candidates of its class on a task."""
    sketches, template = spaces
    for key, candidate, values in origins:
        if key == task.key:
            continue
        if values is None:
            counts.add("transferred sketches", not isinstance(adapt_trace(sketches, task.module, candidate), str))
        elif template is not None and template.template.name == values[0]:
            counts.add("transferred template points", not isinstance(adapt_values(template, values[1]), str))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "googlenet", "alexnet"])
    parser.add_argument("--target", default="sm_90a")
    parser.add_argument("--tries", type=int, default=25)
    parser.add_argument("--every", type=int, default=4)
    asked = parser.parse_args()
    device = target(asked.target)
    tasks = {task.key: task for name in asked.models for task in extract(load_model(name), device)}
    tasks = [task for task in tasks.values() if task.info.tunable]
    rng, counts, unserved, without_sketch = np.random.default_rng(0), Counts(), [], []
    origins, spaces = defaultdict(list), {}
    for number, task in enumerate(tasks):
        sketches = SketchSpace(task.key, task.module, device.to_tvm())
        template = template_space(task, device)
        spaces[task.key] = sketches, template
        tiled = "conv2d" in task.info.kernel_class or "matmul" in task.info.kernel_class
        kind = "sketch points of convolutions and dense layers" if tiled else "sketch points of other tasks"
        drawn = samples(sketches, asked.tries, rng, counts, kind)
        begun = starts(template, counts) if template else []
        drawn = drawn or list(filter(None, (sketches.sample(number, rng) for number in range(len(sketches)))))
        if not drawn:
            without_sketch.append(f"{task.info.kernel_class} {task.info.shapes}")
            if not begun:
                unserved.append(without_sketch[-1])
        if number % asked.every == 0:
            if drawn and drawn[0].decisions:
                neighbours(sketches, drawn[0], counts)
                origins[task.info.kernel_class].append((task.key, drawn[0].payload.trace, None))
            if begun:
                values = template.template.name, template[begun[0].decisions[0]]
                origins[task.info.kernel_class].append((task.key, begun[0], values))
        print(f"{number + 1} of {len(tasks)}: {task.info.name} {len(drawn)} of {asked.tries}", flush=True)
    for task in tasks[:: asked.every]:
        transfer(origins[task.info.kernel_class][:6], spaces[task.key], task, counts)
    for name, (valid, tries) in counts.items():
        print(f"{name}: {valid} of {tries} valid ({valid / tries:.0%})")
    print(f"tasks for which tvmlab's sketch space finds no valid point: {without_sketch}")
    print(f"of these also without a template: {unserved}")
    print(
        json.dumps(
            {
                "tasks": len(tasks),
                "target": asked.target,
                "valid": counts,
                "without_sketch": len(without_sketch),
                "unserved": len(unserved),
            }
        )
    )


if __name__ == "__main__":
    main()
