"""The notebook form: choose a model, a target, a step and its knobs; start a search and watch it.

The form holds display state only: `experiment` is what its controls say, `start()` is
`tvmlab.tune(experiment)`, and `code()` prints that call.
"""

from __future__ import annotations

import html
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from tvmlab import run as running
from tvmlab.core import InputError
from tvmlab.experiment import Experiment, Measure, Options
from tvmlab.models import models
from tvmlab.run import Run
from tvmlab.targets import targets
from tvmlab.widgets.controls import INPUT, Choice, Knob, labelled
from tvmlab.widgets.monitor import Monitor, action_button, error_html

__all__ = ["Form"]

_COLUMN = {"width": "456px", "margin": "0 20px 0 0"}


def step_classes() -> tuple[Any, ...]:
    """The steps an experiment can have, read from the type of `Experiment.steps`."""
    step = typing.get_args(Experiment.model_fields["steps"].annotation)[0]
    while typing.get_origin(step) is typing.Annotated:
        step = typing.get_args(step)[0]
    return typing.get_args(step) or (step,)


class Form(widgets.VBox):
    """Tune from a notebook. `Form()` starts from the defaults, `Form(experiment)` from an experiment.

    `experiment` is what the controls say now, `run` the run that is shown, or None. `start()`, `stop()` and
    `resume()` do what the buttons do; `code()` is the equivalent script. A value that the option classes
    refuse is refused at its control, with their message, and Start stays disabled.
    """

    def __init__(self, experiment: Experiment | None = None, runs_dir: str | Path | None = None) -> None:
        self.monitor = Monitor()
        zoo = {
            str(name): f"{row.parameters / 1e6:.3g} M parameters, {row.flops / 1e9:.3g} GFLOP, {row.inputs}"
            for name, row in models().iterrows()
        }
        attached = {"auto": "", **{target.name: target.label for target in targets()}}
        experiment = experiment or Experiment(model=next(iter(zoo)))
        self.runs_dir = runs_dir
        self.start_button = action_button("Start", "play", "Tune this experiment", "success")
        self.own = _Group(experiment, self._refresh)
        self.own.replace(Choice(experiment, "model", zoo, ("an .onnx file ...", "path/to/model.onnx")))
        self.own.replace(Choice(experiment, "target", attached, ("another target ...", "its name")))
        self.steps = [_StepGroup(step, self._refresh) for step in experiment.stages]
        self.measure = _Group(experiment.measure, self._refresh)
        self._code = widgets.HTML()
        self.monitor.buttons.children = (self.start_button, *self.monitor.buttons.children)
        super().__init__([self._columns(), self._panes(), self.monitor])
        self.start_button.on_click(lambda _: self.monitor.guard(self.start, "Checking the model and the target."))
        self.monitor.observe(lambda _: self._refresh(), "status")
        self._refresh()

    @property
    def experiment(self) -> Experiment:
        """What the controls say. Raises InputError for the first value that is refused."""
        steps = tuple(step.group.options() for step in self.steps)
        return self.own.options(steps=steps, measure=self.measure.options())

    @property
    def run(self) -> Run | None:
        """The run that is shown, None before the first Start."""
        return self.monitor.run

    def start(self) -> Run:
        """Tune what the controls say and follow the run. Raises what `tvmlab.tune` raises."""
        run = running.tune(self.experiment, runs_dir=self.runs_dir)
        self.monitor.follow(run)
        return run

    def stop(self) -> None:
        """End the search; what was measured is kept. Raises RunError if there is no run."""
        self.monitor.stop()

    def resume(self) -> Run:
        """Continue the run to the total that was asked. Raises RunError if there is no run."""
        return self.monitor.resume()

    def code(self) -> str:
        """The Python that does what Start does. Raises InputError for the first value that is refused."""
        call = self.experiment.code()
        classes = [cls.__name__ for cls in (*step_classes(), Experiment, Measure)]
        names = ", ".join(name for name in classes if f"{name}(" in call)
        where = "" if self.runs_dir is None else f", runs_dir={str(self.runs_dir)!r}"
        return f"import tvmlab\nfrom tvmlab import {names}\n\nrun = tvmlab.tune({call}{where})"

    def close(self) -> None:
        """Remove the form; a run goes on."""
        self.monitor.close()
        super().close()

    def _columns(self) -> widgets.Box:
        left = widgets.VBox([_heading("Experiment"), self.own.main], layout=_COLUMN)
        right = widgets.VBox([box for step in self.steps for box in (_heading("Step"), step.main)], layout=_COLUMN)
        return widgets.HBox([left, right], layout={"flex_flow": "row wrap"})

    def _panes(self) -> widgets.Accordion:
        rest = widgets.VBox([self.own.rest, *(step.rest for step in self.steps)])
        titles = ("Measuring", "Symbolic dimensions, earlier runs", "The same in code")
        return widgets.Accordion(
            [self.measure.main, rest, self._code],
            titles=titles,
            layout={"max_width": "932px", "margin": "8px 0"},
        )

    def _refresh(self) -> None:
        """Show the equivalent code; allow Start when every value is accepted and nothing runs."""
        try:
            code, accepted = f"<pre style='white-space:pre-wrap'>{html.escape(self.code())}</pre>", True
        except InputError as error:
            code, accepted = error_html(str(error)), False
        self._code.value = code
        self.start_button.disabled = not accepted or self.monitor.status == "running"


class _Group:
    """The controls of one option class: `main` holds its plain knobs, `rest` its lists and tables."""

    def __init__(self, options: Options, changed: Callable[[], Any]) -> None:
        self._class = type(options)
        self._changed = changed
        self.main, self.rest = widgets.VBox(), widgets.VBox()
        self.knobs: dict[str, Knob] = {}
        for name, value in options:
            if name != "kind" and not _is_options(value):
                self._add(Knob(options, name))
        self._lay_out()

    def replace(self, knob: Knob) -> None:
        """Put another control in the place of the one generated from the type."""
        self._add(knob)
        self._lay_out()

    def options(self, **more: Any) -> Any:
        """What the controls say. Raises InputError for the first value that is refused."""
        return self._class(**{name: knob.value for name, knob in self.knobs.items()}, **more)

    def _add(self, knob: Knob) -> None:
        self.knobs[knob.name] = knob
        knob.observe(self._changed)

    def _lay_out(self) -> None:
        self.main.children = [knob.row for knob in self.knobs.values() if not knob.is_collection]
        self.rest.children = [knob.row for knob in self.knobs.values() if knob.is_collection]


class _StepGroup:
    """A step: which class, and the controls of that class."""

    def __init__(self, step: Options, changed: Callable[[], Any]) -> None:
        self._changed = changed
        self.main, self.rest = widgets.VBox(), widgets.VBox()
        classes = [(cls.__name__, cls) for cls in step_classes()]
        self.choice = widgets.Dropdown(options=classes, value=type(step), layout=INPUT)
        self._show(step)
        self.choice.observe(self._choose, "value")

    def _choose(self, change: Any) -> None:
        self._show(change.new())
        self._changed()

    def _show(self, step: Options) -> None:
        self.group = _Group(step, self._changed)
        what = (type(step).__doc__ or "").partition("\n")[0]
        self.main.children = [labelled("step", self.choice, tooltip=what), *self.group.main.children]
        self.rest.children = self.group.rest.children


def _is_options(value: Any) -> bool:
    return isinstance(value, Options) or (isinstance(value, tuple) and any(isinstance(v, Options) for v in value))


def _heading(text: str) -> widgets.HTML:
    return widgets.HTML(f"<b>{text}</b>", layout={"margin": "0 0 2px 0"})
