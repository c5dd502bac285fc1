"""The controls of an experiment's parts: a group of knobs for each option class, and the steps, in order, as tabs."""

from __future__ import annotations

import html
import typing
from collections.abc import Callable, Iterable
from typing import Any

import ipywidgets as widgets

from tvmlab.core import InputError
from tvmlab.experiment import Ansor, AutoTVM, Experiment, Options
from tvmlab.widgets.controls import INPUT, Knob, labelled
from tvmlab.widgets.style import heading, icon_button, note_html

__all__ = ["Group", "StepEditor", "Steps", "every_step_class", "step_classes"]


def every_step_class() -> tuple[Any, ...]:
    """The classes that an experiment's steps can have, read from the type of `Experiment.steps`."""
    step = typing.get_args(Experiment.model_fields["steps"].annotation)[0]
    while typing.get_origin(step) is typing.Annotated:
        step = typing.get_args(step)[0]
    return typing.get_args(step) or (step,)


def step_classes() -> tuple[Any, ...]:
    """Those that can be chosen: all whose knobs have defaults."""
    return tuple(
        cls for cls in every_step_class() if not any(field.is_required() for field in cls.model_fields.values())
    )


class Group(widgets.VBox):
    """The controls of one option class, in `knobs` by name. What it holds of other options stays as it is."""

    def __init__(self, options: Options, changed: Callable[[], Any]) -> None:
        super().__init__()
        self._class = type(options)
        self._changed = changed
        self._kept = {name: value for name, value in options if _is_options(value)}
        self.knobs: dict[str, Knob] = {}
        for name in type(options).model_fields:
            if name != "kind" and name not in self._kept:
                self._add(Knob(options, name))
        self._lay_out()

    def replace(self, knob: Knob) -> None:
        """Put another control in the place of the one generated from the type."""
        self._add(knob)
        self._lay_out()

    def options(self, **more: Any) -> Any:
        """What the controls say. Raises InputError for the first value that is refused."""
        return self._class(**self._said(), **{**self._kept, **more})

    def fill(self, options: Options) -> None:
        """Show other options of the same class."""
        for knob in self.knobs.values():
            knob.fill(options)

    def _add(self, knob: Knob) -> None:
        self.knobs[knob.name] = knob
        knob.beside = self._said
        knob.observe(self._edited)

    def _said(self) -> dict[str, Any]:
        return {name: knob.value for name, knob in self.knobs.items()}

    def _edited(self) -> None:
        for knob in self.knobs.values():  # one value may make another right or wrong
            knob.check()
        self._changed()

    def _lay_out(self) -> None:
        self.children = [knob.row for knob in self.knobs.values()]


class StepEditor(widgets.VBox):
    """A step: which class, and the controls of that class, in `group`."""

    def __init__(self, step: Options, changed: Callable[[], Any]) -> None:
        super().__init__()
        self._changed = changed
        classes = dict.fromkeys([*step_classes(), type(step)])
        self.choice = widgets.Dropdown(options=[(cls.__name__, cls) for cls in classes], value=type(step), layout=INPUT)
        self._show(step)
        self.choice.observe(self._choose, "value")

    def options(self) -> Any:
        """The step that the controls say. Raises InputError for the first value that is refused."""
        return self.group.options()

    def _choose(self, change: Any) -> None:
        self._show(_instead(self.group, change.new))
        self._changed()

    def _show(self, step: Options) -> None:
        self.group = Group(step, self._changed)
        what = (type(step).__doc__ or "").partition("\n")[0]
        repeated = "".join(f"<br>{html.escape(each.code())}" for each in getattr(step, "steps", ()))
        about = widgets.HTML(note_html(what) + repeated, layout={"margin": "0 8px 6px 8px"})
        self.children = [labelled("step", self.choice, tooltip=what), about, self.group]


class Steps(widgets.VBox):
    """The steps of an experiment, a tab each, in the order in which they run.

    `show(steps)` replaces them; `add`, `remove` and `move` do what the buttons do to the tab that is open.
    """

    def __init__(self, steps: Iterable[Options], changed: Callable[[], Any]) -> None:
        self._changed = changed
        self.editors: list[StepEditor] = []
        self.tabs = widgets.Tab(layout={"width": "100%"})
        self.add_button = icon_button("plus", "Add a step after the last")
        self.earlier_button = icon_button("arrow-left", "Run this step one place earlier")
        self.later_button = icon_button("arrow-right", "Run this step one place later")
        self.remove_button = icon_button("trash", "Remove this step")
        buttons = [self.add_button, self.earlier_button, self.later_button, self.remove_button]
        space = widgets.Box(layout={"flex": "1 1 auto"})
        super().__init__([widgets.HBox([heading("Steps, in order"), space, *buttons]), self.tabs])
        self.add_button.on_click(lambda _: self.add())
        self.remove_button.on_click(lambda _: self.remove(self.tabs.selected_index))
        self.earlier_button.on_click(lambda _: self.move(self.tabs.selected_index, -1))
        self.later_button.on_click(lambda _: self.move(self.tabs.selected_index, 1))
        self.tabs.observe(lambda _: self._allow(), "selected_index")
        self.show(steps)

    def __len__(self) -> int:
        return len(self.editors)

    def __getitem__(self, place: int) -> StepEditor:
        return self.editors[place]

    def options(self) -> tuple[Any, ...]:
        """The steps that the controls say. Raises InputError for the first value that is refused."""
        return tuple(editor.options() for editor in self.editors)

    def show(self, steps: Iterable[Options]) -> None:
        """Show these steps instead, the first one open."""
        self.editors = [StepEditor(step, self._edited) for step in steps]
        self._lay_out(0)

    def add(self, step: Options | None = None) -> None:
        """Add a step at the end (Ansor's defaults, if none is given) and open it."""
        self.editors.append(StepEditor(step or Ansor(), self._edited))
        self._lay_out(len(self) - 1)

    def remove(self, place: int) -> None:
        """Remove the step at a place. The last one stays: an experiment has at least one."""
        if len(self) > 1:
            del self.editors[place]
            self._lay_out(min(place, len(self) - 1))

    def move(self, place: int, by: int) -> None:
        """Move the step at a place so many places later; not beyond the ends."""
        to = min(max(place + by, 0), len(self) - 1)
        self.editors.insert(to, self.editors.pop(place))
        self._lay_out(to)

    def _lay_out(self, opened: int) -> None:
        self.tabs.children = self.editors
        self.tabs.selected_index = opened
        self._edited()

    def _edited(self) -> None:
        names = [editor.choice.label for editor in self.editors]
        self.tabs.titles = [f"{number} {name}" for number, name in enumerate(names, start=1)]
        self._allow()
        self._changed()

    def _allow(self) -> None:
        opened, last = self.tabs.selected_index, len(self) - 1
        self.remove_button.disabled = last == 0
        self.earlier_button.disabled = opened in (None, 0)
        self.later_button.disabled = opened in (None, last)


def _instead(group: Group, cls: Any) -> Any:
    """A step of another class: an engine with the budget that corresponds to the other's, else the defaults."""
    try:
        step = group.options()
        if type(step) is Ansor and cls is AutoTVM:
            return step.as_autotvm()
        if type(step) is AutoTVM and cls is Ansor:
            return step.as_autoscheduler()
    except InputError:
        pass  # what was typed is refused: nothing to convert
    return cls()


def _is_options(value: Any) -> bool:
    return isinstance(value, Options) or (isinstance(value, tuple) and any(isinstance(v, Options) for v in value))
