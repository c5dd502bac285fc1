"""How similar a model's tasks are, and which would share schedules, before anything is measured."""

from __future__ import annotations

from typing import Literal

import pandas as pd

from tvmlab import layouts
from tvmlab.layout_plan import lanes_of
from tvmlab.models import Model, load_model
from tvmlab.selective_rows import matrix
from tvmlab.selective_step import clustered
from tvmlab.steps_selective import SIMILARITY, Selective
from tvmlab.targets import Target
from tvmlab.targets import target as named_target
from tvmlab.tasks import extract, require_tunable

__all__ = ["similarity"]


def similarity(
    model: str | Model,
    target: str | Target = "auto",
    *,
    engine: Literal["autotvm", "ansor"] = "autotvm",
    least: float = SIMILARITY,
) -> pd.DataFrame:
    """The similarity of a model's tasks, pair by pair, and the clusters that `Selective` would make of them.

    A square frame of rates from 0 to 1 (`tvmlab.spaces.overlap` says what they are), the tasks of a cluster together.
    `attrs["clusters"]` lists the clusters, the largest first, each with its representative first; `attrs["depend"]` has
    each task's representative. `engine` and `least` are the knobs of `Selective` of that name and `similarity`: with
    engine "autotvm" a CPU's model is packed by its vectors and searched by templates, with "ansor" it stays in NCHW and
    is searched by generated sketches. `tvmlab.plots.similarity` draws the frame.

        tvmlab.similarity("resnet50").attrs["clusters"]

    Raises InputError for an unknown model, target or engine, or a similarity that is not above 0 and up to 1.
    """
    least = Selective(engine=engine, similarity=least).similarity  # the same limits, the same messages
    model = load_model(model) if isinstance(model, str) else model
    target = named_target(target) if isinstance(target, str) else target
    packed = engine == "autotvm" and target.kind == "llvm"
    assignment = layouts.uniform(model, lanes_of(target)) if packed else None
    tasks = require_tunable(extract(model, target, assignment), model)
    found, depends = clustered(tasks, target.to_tvm(), templates=engine == "autotvm", least=least)
    return matrix([task.info.name for task in tasks], found, depends)
