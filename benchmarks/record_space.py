"""Measure every point of the template space of one task of a model, and write the table that replays answer from.

    python benchmarks/record_space.py resnet50 conv28 data/recorded_spaces/resnet50_conv28.json

The task is that of a site (`conv28`, `dense0`; `tvmlab.layouts.sites` lists them), with its epilogue, in the model
packed for this CPU's vectors. About 5 points a second on 2 cores. What was measured so far is kept beside the table, in
a file that ends in .begun.jsonl, until every point was: the same call goes on.
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
from tvmlab.records import cut_torn_line
from tvmlab.spaces.template import TemplateSpace

_BATCH = 32


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


def measure(space, task, target, begun):
    """The default kernel's measurement, and each point's answer and seconds, None where it is not valid.

    The points are written to the file `begun` as they come; those that it has are not measured again.
    """
    found = read_begun(begun, {"task": task.key, "target": target.label, "points": len(space)})
    left = [index for index in range(len(space)) if index not in found]
    with (
        begun.open("a") as file,
        tempfile.TemporaryDirectory() as folder,
        LocalMeasurer([task], target, Measure(), Path(folder)) as measurer,
    ):
        (default,) = measurer.measure_defaults([task.key])
        for rows in in_batches(space, measurer, left):
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            found |= {index: (said, seconds) for index, said, seconds in rows}
            print(f"{len(found)} of {len(space)}", flush=True)
    return default, [found[index] for index in range(len(space))]


def in_batches(space, measurer, indices):
    """Rows of a batch of points each: index, answer, build and run seconds.

    On a GPU the next batch is generated and built while one is run; on a CPU that would take its cores.
    """
    ahead = []
    for begin in range(0, len(indices), _BATCH):
        made = [(index, space.realize(index)) for index in indices[begin : begin + _BATCH]]
        ahead.append((made, measurer.measure([candidate for _, candidate in made if candidate is not None])))
        if len(ahead) > measurer.overlaps:
            yield _rows(*ahead.pop(0))
    yield from (_rows(*batch) for batch in ahead)


def _rows(made, measured):
    """The rows of a batch, once it was measured."""
    rows = []
    for index, candidate in made:
        item = None if candidate is None else next(measured)
        rows.append((index, answer(item), item and [round(item.build_s, 4), round(item.run_s, 4)]))
    return rows


def read_begun(path, about):
    """The rows that a file has, by index; it is begun anew if it is of something else."""
    if path.exists():
        cut_torn_line(path)
        first, *rows = [json.loads(line) for line in path.read_text().splitlines()] or [None]
        if first == about:
            return {index: (said, seconds) for index, said, seconds in rows}
    path.write_text(json.dumps(about) + "\n")
    return {}


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
    write(task, target, about, path, path.with_suffix(".begun.jsonl"))


def write(task, target, about, path, begun):
    """Measure every point of the task's template space, and write them with what is said about them; returns that."""
    space = TemplateSpace(task.key, task.module, target.to_tvm())
    print(f"{about}: {len(space)} points", flush=True)
    default, measured = measure(space, task, target, begun)
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
        "table": [said for said, _ in measured],
        "seconds": [seconds for _, seconds in measured],
    }
    assert math.prod(map(len, found["knobs"].values())) == len(found["table"])
    path.write_text(json.dumps(found) + "\n")
    begun.unlink()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("site")
    parser.add_argument("path", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--winograd", type=int, default=0, choices=(0, 2, 4), help="of a 3x3 convolution of stride 1")
    given = parser.parse_args()
    record(given.model, given.site, given.path, given.batch, given.winograd)
