"""Measure every point of the template space of one task of a model, and write the table that replays answer from.

    python benchmarks/record_space.py resnet50 conv28 data/recorded_spaces/resnet50_conv28.json

The task is that of a site (`conv28`, `dense0`; `tvmlab.layouts.sites` lists them), with its epilogue, in the model
packed for this CPU's vectors. About 5 points a second on 2 cores; nothing is written unless every point was measured.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from statistics import median

import tvmlab
from tvmlab import layouts
from tvmlab.core import InputError
from tvmlab.environment import describe
from tvmlab.experiment import Measure
from tvmlab.layout_plan import Packed, lanes_of
from tvmlab.measure.local import LocalMeasurer
from tvmlab.models import load_model
from tvmlab.spaces.template import TemplateSpace


def task_of(model, name, target, winograd):
    """The task of a site, its packing, and what the site is."""
    packed = Packed(model, target, layouts.uniform(model, lanes_of(target), winograd))
    site = next((site for site in layouts.sites(model) if site.name == name), None)
    if site is None or name not in packed.assignment:
        raise InputError(
            f"{name!r} is no packed site of {model.name}", remedy=f"choose of {', '.join(packed.assignment)}"
        )
    task = next(task for task in packed.tasks if task.key == packed.keys[name])
    return task, packed.assignment[name], site


def measure(space, task, target):
    """What each point gave: (latency in us or status, build and run seconds), None where it is not valid."""
    candidates = [found for index in range(len(space)) if (found := space.realize(index)) is not None]
    found = {}
    with tempfile.TemporaryDirectory() as folder, LocalMeasurer([task], target, Measure(), Path(folder)) as measurer:
        (default,) = measurer.measure_defaults([task.key])
        for begin in range(0, len(candidates), 32):
            batch = candidates[begin : begin + 32]
            for candidate, measured in zip(batch, measurer.measure(batch), strict=True):
                found[candidate.decisions[0]] = measured
            print(f"{begin + len(batch)} of {len(candidates)}", flush=True)
    return default, [found.get(index) for index in range(len(space))]


def answer(found):
    """What the table says of a measurement."""
    if found is None:
        return None
    return round(median(found.latencies_s) * 1e6, 3) if found.latencies_s else str(found.status)


def record(name, site_name, path, batch, winograd):
    """Measure the whole space of a site and write the table."""
    target = tvmlab.target("cpu")
    model = load_model(name, batch=batch)
    task, packing, site = task_of(model, site_name, target, winograd)
    about = {
        "operator": f"{str(site).partition(': ')[2]}, {packing}",
        "model": name,
        "site": site_name,
        "batch": batch,
        "cpu": target.label,
        "threads": int(target.attrs.get("num-cores", 1)),
    }
    write(task, target, about, path)


def write(task, target, about, path):
    """Measure every point of the task's template space, and write them with what is said about them."""
    space = TemplateSpace(task.key, task.module, target.to_tvm())
    print(f"{about}: {len(space)} points", flush=True)
    default, measured = measure(space, task, target)
    about = {
        **about,
        "kernel_class": task.info.kernel_class,
        "flops": task.info.flops,
        "untuned_us": answer(default),
        "recorded": time.strftime("%Y-%m-%d", time.gmtime()),
        "unit": "us",
        **describe()["versions"],
    }
    found = {
        "about": about,
        "knobs": {name: list(values) for name, values in space.template.knobs.items()},
        "starts": list(space.starts()),
        "features": [[round(float(x), 4) for x in space.encode(index)] for index in range(len(space))],
        "table": [answer(item) for item in measured],
        "seconds": [None if item is None else [round(item.build_s, 4), round(item.run_s, 4)] for item in measured],
    }
    assert math.prod(map(len, found["knobs"].values())) == len(found["table"])
    path.write_text(json.dumps(found) + "\n")
    return default, measured


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("site")
    parser.add_argument("path", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--winograd", type=int, default=0, choices=(0, 2, 4), help="of a 3x3 convolution of stride 1")
    given = parser.parse_args()
    record(given.model, given.site, given.path, given.batch, given.winograd)
