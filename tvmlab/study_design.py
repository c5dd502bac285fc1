"""What a study asks: models x sources x arms x seeds, and the runs that this takes, in the order of their dependencies.

An arm is a list of steps. Arms that begin with the same steps share the search of these: the run of a longer arm is a
fork of the run of the shorter one, so two arms differ by nothing but what they say they differ by.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictInt, field_validator, model_validator

from tvmlab.core import InputError
from tvmlab.experiment import Experiment, Measure
from tvmlab.options import Options, knob
from tvmlab.steps import Ansor, AutoTVM, Droplet, LayoutTuning, Repeat, Selective, Step, TransferTuning

__all__ = ["BASELINES", "Cell", "Study", "Timed", "label", "plan", "study_of_the_report"]

BASELINES = ("untuned", "onnxruntime")  # timed beside the arms
_PLACEHOLDER = re.compile(r"\$(source|others)(?::(.+))?")


class Timed(Options):
    """A step of an arm that ends after so long.

    >>> Timed(Ansor(), 60.0).time_limit_s
    60.0
    """

    POSITIONAL: ClassVar = ("step", "time_limit_s")

    kind: Literal["timed"] = "timed"
    step: Step = Field(..., description="The step")
    time_limit_s: float = knob(..., "End the step after so long", unit="s", gt=0, le=1e9)


Stage = Annotated[
    Ansor | AutoTVM | LayoutTuning | Droplet | TransferTuning | Selective | Repeat | Timed, Field(discriminator="kind")
]
Stages = tuple[Stage, ...]


class Study(Options):
    """Which models are tuned by which arms, from which sources, with which seeds; `tvmlab.study` carries it out.

    An arm that transfers names its source by a placeholder: `TransferTuning("$source:ansor")` reads the run of arm
    "ansor" of another model of the study, same seed, and makes the arm one for every other model (or those in
    `sources`); `"$others:ansor"` reads those of all other models at once. Without an arm, `"$source"` is the run that
    the steps before it make of the other model.

    >>> design = Study(models=["alexnet", "resnet50"], arms={
    ...     "ansor": [Ansor()], "ansor+droplet": [Ansor(), Droplet()], "transfer": [TransferTuning("$source:ansor")]})
    >>> len(plan(design))
    6
    """

    models: tuple[str, ...] = Field(..., description="Zoo names or paths of .onnx files", min_length=1)
    arms: dict[str, Annotated[Stages, Field(min_length=1)]] = Field(
        ..., description="The steps of each arm, by its name", min_length=1
    )
    seeds: tuple[Annotated[StrictInt, Field(ge=0, le=2**31 - 1)], ...] = Field(
        (0,), description="Each seed is a repetition of everything", min_length=1
    )
    sources: tuple[str, ...] = Field((), description="The models that $source stands for; empty for all of `models`")
    target: str = knob("auto", "What to tune for", min_length=1)
    batch: int = knob(1, "Batch size", unit="samples", ge=1, le=65536)
    time_limit_s: float | None = knob(
        None, "End each step after so long, unless it is Timed; empty for no limit", unit="s", gt=0, le=1e9
    )
    measure: Measure = Field(default_factory=Measure, description="How candidates are timed and checked")
    repeats: int | None = knob(
        None,
        "Timed inferences of each compiled model, those slower than a quarter of a second get fewer; empty for as many "
        "as give the ratios to a model's first arm an interval of 2 %, 15 to 60",
        unit="repeats",
        ge=3,
        le=100_000,
    )

    @field_validator("models", "seeds", "sources")
    @classmethod
    def _once_each(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [label(value) if isinstance(value, str) else value for value in values]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"names {twice[0]!r} twice")
        return values

    @field_validator("arms")
    @classmethod
    def _named(cls, arms: dict[str, Stages]) -> dict[str, Stages]:
        slugs = [_slug(name) for name in arms]
        for name in arms:
            if name in BASELINES or slugs.count(_slug(name)) > 1 or not _slug(name):
                raise InputError(f"an arm cannot be named {name!r}", remedy="give each a word of its own, such as 'a1'")
        if twice := [name for name, stages in arms.items() if list(arms.values()).count(stages) > 1]:
            raise InputError(f"arms {' and '.join(map(repr, twice[:2]))} have the same steps", remedy="leave one out")
        return arms

    @model_validator(mode="after")
    def _possible(self) -> Study:
        if unknown := [name for name in self.sources if name not in self.models]:
            raise InputError(f"source {unknown[0]!r} is none of the models", remedy="add it to models")
        for name, stages in self.arms.items():
            Experiment(model=self.models[0], steps=tuple(map(_untimed, stages)))  # refuses what cannot follow what
            self._check_sources(name, stages)
        names = [cell.name for cell in plan(self)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"two runs would be called {twice[0]!r}", remedy="name the arms otherwise")
        return self

    def _check_sources(self, arm: str, stages: Stages) -> None:
        for number, stage in enumerate(stages):
            for source in _sources(stage):
                found = _PLACEHOLDER.fullmatch(source)
                if not found:
                    raise InputError(
                        f"arm {arm!r} transfers from {source!r}", remedy="in a study write '$source' or '$others'"
                    )
                if found[2] is not None and found[2] not in self.arms:
                    raise InputError(f"arm {arm!r} transfers from an arm {found[2]!r}, which there is not",
                                     remedy=f"the arms are {', '.join(self.arms)}")  # fmt: skip
                origin = self.arms[found[2]] if found[2] is not None else stages[:number]
                if not origin or any(_sources(step) for step in origin):
                    raise InputError(
                        f"arm {arm!r} transfers from a run that itself transfers, or from none",
                        remedy="name an arm that does not, as in '$source:ansor'",
                    )
                if len(self.models) < 2:
                    raise InputError(f"arm {arm!r} transfers, but there is one model", remedy="name a second one")

    def limit_of(self, stage: Any) -> float | None:
        """How long a step may take, seconds; None for no limit. A repetition may take that for each of its steps."""
        if isinstance(stage, Timed):
            return stage.time_limit_s
        if isinstance(stage, Repeat) and self.time_limit_s is not None:
            return self.time_limit_s * stage.times * len(stage.steps)
        return self.time_limit_s


@dataclass(frozen=True)
class Cell:
    """One run of a study: a model with an arm (from a source, if the arm has one) and a seed.

    `arm` is "" for a run that other runs branch from or transfer from and that is no arm itself. `steps` still hold
    their placeholders; `parent` is the run that it is a fork of; `sources` are the runs that each placeholder of its
    last step stands for. Runs are named by their folder.
    """

    name: str
    model: str
    seed: int
    source: str
    arm: str
    steps: Stages
    parent: str | None
    sources: dict[str, tuple[str, ...]]

    @property
    def last_step(self) -> Any:
        """The step that this run adds to its parent's, with the runs it reads in the place of placeholders."""
        return _replaced(_untimed(self.steps[-1]), self.sources)


def plan(study: Study) -> list[Cell]:
    """The runs of a study in an order in which each comes after those it needs, seed by seed."""
    found: dict[Any, Cell] = {}
    for seed in study.seeds:
        for arm, stages in study.arms.items():
            for model in study.models:
                for source in _sources_for(study, stages, model):
                    _need(study, found, model, seed, source, arm, stages)
    return list(found.values())


def _need(study: Study, found: dict[Any, Cell], model: str, seed: int, source: str, arm: str, stages: Stages) -> Cell:
    """The cell of these steps, put after what it needs if it is not there yet."""
    source = source if any(_is_varied(stage) for stage in stages) else ""
    key = (model, seed, source, stages)
    if key in found:
        return found[key]
    parent = _need(study, found, model, seed, source, arm, stages[:-1]) if len(stages) > 1 else None
    sources = {}
    for placeholder in _sources(stages[-1]):
        which, origin = _PLACEHOLDER.fullmatch(placeholder).groups()  # type: ignore[union-attr]
        others = [source] if which == "source" else [name for name in study.models if name != model]
        steps = study.arms[origin] if origin is not None else stages[:-1]
        sources[placeholder] = tuple(
            _need(study, found, other, seed, "", origin or arm, steps).name for other in others
        )
    name = next((name for name, steps in study.arms.items() if steps == stages), "")
    words = [label(model), f"s{seed}", name or f"{arm}.{len(stages)}", *(["from", label(source)] if source else [])]
    found[key] = Cell("-".join(map(_slug, words)), model, seed, source, name, stages,
                      parent.name if parent else None, sources)  # fmt: skip
    return found[key]


def label(model: str) -> str:
    """A model's short name: that of its file, for a path.

    >>> label("resnet50"), label("nets/my_net.onnx")
    ('resnet50', 'my_net')
    """
    return Path(model).stem


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.+_]+", "-", text.lower()).strip("-")


def _sources_for(study: Study, stages: Stages, model: str) -> list[str]:
    """What $source stands for in turn; one empty name for an arm that has none."""
    if not any(_is_varied(stage) for stage in stages):
        return [""]
    return [name for name in study.sources or study.models if name != model]


def _untimed(stage: Any) -> Any:
    return stage.step if isinstance(stage, Timed) else stage


def _transfers(stage: Any) -> Iterator[TransferTuning]:
    """The transfers of a step of an arm."""
    step = _untimed(stage)
    if isinstance(step, Repeat):
        yield from (inner for inner in step.steps if isinstance(inner, TransferTuning))
    elif isinstance(step, TransferTuning):
        yield step


def _sources(stage: Any) -> list[str]:
    return list(dict.fromkeys(source for step in _transfers(stage) for source in step.source))


def _is_varied(stage: Any) -> bool:
    """Whether a step of an arm reads $source."""
    return any(source.startswith("$source") for source in _sources(stage))


def _replaced(step: Any, runs: dict[str, tuple[str, ...]]) -> Any:
    """A step with the runs in the place of the placeholders."""
    if isinstance(step, Repeat):
        return Repeat(times=step.times, steps=tuple(_replaced(inner, runs) for inner in step.steps))
    if isinstance(step, TransferTuning):
        named = tuple(dict.fromkeys(run for source in step.source for run in runs[source]))
        return step.model_copy(update={"source": named})
    return step


def study_of_the_report(seeds: tuple[int, ...] = (0,)) -> Study:
    """The published report's experiment with small budgets: half an hour for each seed on two cores.

    Three models, transferred between all ordered pairs, with and without Droplet on either side, where on and off
    branch from one search. "ansor, longer" is the control that the report lacks: Ansor for as long as Droplet took.

    >>> design = study_of_the_report()
    >>> len(design.models), sum(cell.arm != "" for cell in plan(design))
    (3, 27)
    """
    ansor, droplet = Timed(step=Ansor(), time_limit_s=100.0), Timed(step=Droplet(), time_limit_s=40.0)
    transfer, from_droplet = (
        Timed(step=TransferTuning(source=(f"$source:{arm}",)), time_limit_s=30.0) for arm in ("ansor", "ansor+droplet")
    )
    return Study(
        models=("resnet50", "googlenet", "alexnet"),
        arms={
            "ansor": (ansor,),
            "ansor+droplet": (ansor, droplet),
            "ansor, longer": (ansor, Timed(step=Ansor(), time_limit_s=40.0)),
            "transfer": (transfer,),
            "transfer+droplet": (transfer, Timed(step=Droplet(), time_limit_s=30.0)),
            "transfer of droplet": (from_droplet,),
        },
        seeds=seeds,
    )
