"""The notebook form: choose a model, a target, a preset or steps and their knobs; estimate, start, watch.

The form holds display state only: `experiment` is what its controls say, `start()` is
`tvmlab.tune(experiment)`, `fill(name)` is `tvmlab.preset(name, ...)`, `estimate()` is
`tvmlab.estimate_time(experiment)`, and `code()` prints the first of these calls.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ipywidgets as widgets

from tvmlab import run as running
from tvmlab.core import InputError, TvmlabError
from tvmlab.experiment import Experiment, Measure
from tvmlab.models import models
from tvmlab.presets import PRESETS, TimeEstimate, preset
from tvmlab.run import Run
from tvmlab.targets import targets
from tvmlab.widgets.controls import Choice
from tvmlab.widgets.forecast import Forecast
from tvmlab.widgets.groups import Group, Steps, every_step_class
from tvmlab.widgets.monitor import Monitor
from tvmlab.widgets.style import STYLE, action_button, card, error_html, heading, note_html

__all__ = ["AS_BELOW", "Form"]

_COLUMN = "462px"
_WIDTH = "932px"
_PRESET = {"align_items": "center", "grid_gap": "10px"}
AS_BELOW = ""  # the value of the preset's control where the steps below are none
_AS_BELOW_HELP = "The steps below, as they are set."


class Form(widgets.VBox):
    """Tune from a notebook. `Form()` starts from the defaults, `Form(experiment)` from an experiment.

    `experiment` is what the controls say now, `run` the run that is shown, or None. `fill()`, `estimate()`, `start()`,
    `stop()` and `resume()` do what the preset's control and the buttons do; `code()` is the equivalent script. A value
    that the option classes refuse is refused at its control, with their message, and Start stays disabled. A preset
    that is chosen there is estimated at once, beside the form.
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
        self._filled: Experiment | None = None  # the preset that the steps and the measuring were filled from
        self._wanted = AS_BELOW  # a preset that waits for a model or a target that is accepted
        self._filling = True
        self.start_button = action_button("Start", "play", "Tune this experiment", "success")
        self.own = Group(experiment, self._moved)
        self.own.replace(Choice(experiment, "model", zoo, ("an .onnx file ...", "path/to/model.onnx")))
        self.own.replace(Choice(experiment, "target", attached, ("another target ...", "its name")))
        self.preset = _preset_control()
        self.steps = Steps(experiment.steps, self._edited)
        self.measure = Group(experiment.measure, self._edited)
        self.forecast = Forecast(lambda: self.experiment, runs_dir)
        self.problem = widgets.HTML()
        self._about = widgets.HTML()
        self._code = widgets.HTML()
        self.monitor.buttons.children = (self.forecast.button, self.start_button, *self.monitor.buttons.children)
        above = [widgets.HTML(STYLE), self._preset_row(), self._columns(), self._panes()]
        super().__init__([*above, self.problem, self.forecast, self.monitor], layout={"grid_gap": "8px"})
        self._observe()
        self._filling = False
        self._refresh()

    @property
    def experiment(self) -> Experiment:
        """What the controls say. Raises InputError for the first value that is refused."""
        return self.own.options(steps=self.steps.options(), measure=self.measure.options())

    @property
    def run(self) -> Run | None:
        """The run that is shown, None before the first Start."""
        return self.monitor.run

    def fill(self, name: str) -> None:
        """Fill steps and measuring with those of a preset, for the model and the target that are chosen.

        Raises what `tvmlab.preset` raises; then nothing is filled.
        """
        found = preset(name, self.own.knobs["model"].value, self.own.knobs["target"].value)
        self._filled, self._wanted = found, AS_BELOW
        with self._without_observers():
            self.steps.show(found.steps)
            self.measure.fill(found.measure)
            self.preset.value = name
        self._refresh()

    def estimate(self) -> TimeEstimate:
        """How long the experiment takes at the most, and what it reuses; shown too. As `tvmlab.estimate_time`."""
        return self.forecast.estimate()

    def start(self) -> Run:
        """Tune what the controls say and follow the run. Raises what `tvmlab.tune` raises.

        An estimate under way ends first: it would take a core from what is measured.
        """
        self.forecast.settle()
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
        where = "" if self.runs_dir is None else f", runs_dir={str(self.runs_dir)!r}"
        if self.preset.value != AS_BELOW:
            steps = Experiment.model_fields["steps"].default
            plain = self.experiment.model_copy(update={"steps": steps, "measure": Measure()}).code()
            call = f"tvmlab.preset({self.preset.value!r}, {plain.removeprefix('Experiment(')}"
            return f"import tvmlab\n\nrun = tvmlab.tune({call}{where})"
        call = self.experiment.code()
        classes = [cls.__name__ for cls in (*every_step_class(), Experiment, Measure)]
        names = ", ".join(name for name in classes if f"{name}(" in call)
        return f"import tvmlab\nfrom tvmlab import {names}\n\nrun = tvmlab.tune({call}{where})"

    def close(self) -> None:
        """Remove the form; a run goes on."""
        self.monitor.close()
        super().close()

    def _preset_row(self) -> widgets.Box:
        return card([widgets.HBox([heading("Preset"), self.preset, self._about], layout=_PRESET)], _WIDTH)

    def _columns(self) -> widgets.Box:
        left = card([heading("Experiment"), self.own], _COLUMN)
        return widgets.HBox([left, card([self.steps], _COLUMN)], layout={"flex_flow": "row wrap", "grid_gap": "8px"})

    def _panes(self) -> widgets.Accordion:
        titles = ("Measuring: repeats, timeouts, checks", "The same in code")
        return widgets.Accordion([self.measure, self._code], titles=titles, layout={"max_width": _WIDTH})

    def _observe(self) -> None:
        self.preset.observe(lambda _: self._choose(self.preset.value), "value")
        for name in ("model", "target"):
            self.own.knobs[name].observe(lambda: self._choose(self.preset.value or self._wanted))
        self.start_button.on_click(
            lambda button: self.monitor.guard(button, self._press_start, "Checking the model and the target.")
        )
        self.monitor.observe(lambda _: self._refresh(), "status")

    def _press_start(self) -> None:
        self.start_button.disabled = True  # it takes seconds, in which it could be clicked again
        try:
            self.start()
        finally:
            self._refresh()

    def _choose(self, name: str) -> None:
        """A preset was chosen, or another model or target while one was, or while one waits for these."""
        if self._filling:
            return
        self._wanted = AS_BELOW
        if name == AS_BELOW:
            self._refresh()
            return
        try:
            self.fill(name)
        except TvmlabError as error:  # the model is a path that is still being typed, say
            with self._without_observers():
                self.preset.value = AS_BELOW
            self._refresh()
            self._wanted, self._about.value = name, error_html(str(error))
            return
        if self.monitor.status != "running":  # it would take a core from what is measured
            self.forecast.begin()

    def _moved(self) -> None:
        """The model, the target or another knob of the experiment changed: a preset that is lost by it is to wait."""
        waiting = self.preset.value or self._wanted
        self._refresh()
        self._wanted = waiting if self.preset.value == AS_BELOW else AS_BELOW

    def _edited(self) -> None:
        """A step or the measuring was changed by hand: no preset is to replace that later."""
        if not self._filling:
            self._wanted = AS_BELOW
        self._refresh()

    @contextmanager
    def _without_observers(self) -> Iterator[None]:
        """Within it what the controls show is changed, and nothing follows from that."""
        self._filling = True
        try:
            yield
        finally:
            self._filling = False

    def _refresh(self) -> None:
        """Show what the controls say together: the code, or what is wrong; which buttons may be pressed."""
        if self._filling:
            return
        try:
            found, problem = self.experiment, ""
        except InputError as error:
            found, problem = None, str(error)
        if self.preset.value != AS_BELOW and (found is None or not self._is_preset(found)):
            self.preset.value = AS_BELOW
        self._about.value = note_html(PRESETS.get(self.preset.value, _AS_BELOW_HELP))
        self.problem.value = error_html(problem)
        self.problem.layout.display = "" if problem else "none"
        code = "" if found is None else f"<pre style='white-space:pre-wrap'>{html.escape(self.code())}</pre>"
        self._code.value = code or error_html(problem)
        is_running = self.monitor.status == "running"
        self.start_button.disabled = found is None or is_running
        self.forecast.button.disabled = found is None or is_running  # it would take a core from what is measured
        self.forecast.compare(found)

    def _is_preset(self, found: Experiment) -> bool:
        """Whether what a preset decides is still as it was filled."""
        return self._filled is not None and (found.steps, found.measure) == (self._filled.steps, self._filled.measure)


def _preset_control() -> widgets.ToggleButtons:
    names = [*PRESETS]
    control = widgets.ToggleButtons(
        options=[("as below", AS_BELOW), *((name, name) for name in names)],
        tooltips=[_AS_BELOW_HELP, *PRESETS.values()],
        layout={"flex": "0 0 auto"},
    )
    control.style.button_width = "92px"
    control.add_class("tvmlab-preset")
    return control
