"""Input controls generated from an option class: one per knob, with the knob's own help, unit and limits.

Nothing of a knob is written here, and an error is the option class's own message.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets as widgets
from traitlets import Unicode, dlink

from tvmlab.core import InputError
from tvmlab.experiment import Options, unit_of
from tvmlab.widgets.style import error_html, note_html

__all__ = ["INPUT", "Choice", "Knob", "labelled"]

_LABEL = {
    "width": "172px",
    "flex": "0 0 auto",
    "display": "flex",
    "justify_content": "flex-end",
    "margin": "2px 8px 2px 0",
}
_UNIT = {"width": "80px", "margin": "2px 0 2px 6px"}
_WIDE = {"width": "250px"}  # a control without a unit has its room too
INPUT = {"width": "166px"}


class Knob:
    """The control of one field of an option class, filled with the value it has in `options`.

    `row` is the widget to show, `value` what the control says: where the text is no number at all the text
    itself, so that the option class can refuse it. `beside` gives what the other controls of its group say now, by
    name. Raises TypeError for a field whose type has no control.
    """

    def __init__(self, options: Options, name: str) -> None:
        field = type(options).model_fields[name]
        self.name = name
        self.beside: Callable[[], Mapping[str, Any]] = dict
        self._options = options
        self._annotation = field.annotation
        self._write, self._read = _codec(self._annotation)
        self.control = self._make_control(options)
        self.control.tooltip = _help(field)
        self._message = widgets.HTML(layout={"display": "none", "margin": "0 0 4px 184px", "width": "260px"})
        line = labelled(name, self.control, unit_of(field), self.control.tooltip)
        self.row = widgets.VBox([line, self._message])

    def _make_control(self, options: Options) -> Any:
        value = self._write(getattr(options, self.name))
        if isinstance(value, bool):
            return widgets.Checkbox(value, indent=False, layout=INPUT)
        if typing.get_origin(self._annotation) is typing.Literal:
            return widgets.Dropdown(options=typing.get_args(self._annotation), value=value, layout=INPUT)
        return widgets.Text(value, placeholder="none" if _is_optional(self._annotation) else "", layout=INPUT)

    @property
    def value(self) -> Any:
        """What the control says, as the option class takes it."""
        return self._read(self.control.value)

    def fill(self, options: Options) -> None:
        """Show the value that the field has in other options of the same class."""
        self.control.value = self._write(getattr(options, self.name))

    @property
    def error(self) -> str:
        """The option class's message for this value beside those of its group, "" if it is accepted."""
        now = {**self.beside(), self.name: self.value}
        if not self._refusal(now):
            return ""
        # What is wrong with another value by itself is said there.
        sound = {name: value for name, value in now.items() if name == self.name or not self._refusal({name: value})}
        return self._refusal(sound)

    def _refusal(self, values: Mapping[str, Any]) -> str:
        """The option class's message for these values among those it began with."""
        try:
            type(self._options)(**{**dict(self._options), **values})
        except InputError as error:
            return str(error)
        return ""

    def check(self) -> None:
        """Show or clear the error under the control."""
        error = self.error
        self._message.value = error_html(error)
        self._message.layout.display = "" if error else "none"

    def observe(self, changed: Callable[[], Any]) -> None:
        """Call `changed` after every change of the value."""
        self.control.observe(lambda _: changed(), "value")


def labelled(name: str, control: Any, unit: str = "", tooltip: str = "") -> widgets.HBox:
    """One line of a form: name, control, unit, aligned with the lines above and below."""
    line = [widgets.Label(name, tooltip=tooltip, layout=_LABEL), control]
    return widgets.HBox([*line, widgets.Label(unit, layout=_UNIT)] if unit else line)


class Choice(Knob):
    """A text knob whose usual values are known: a list to choose from, and a text box for any other value.

    `choices` maps a value to what it stands for, shown under the list; `other` is (label of the last entry,
    hint in the empty text box).
    """

    def __init__(self, options: Options, name: str, choices: Mapping[str, str], other: tuple[str, str]) -> None:
        self._choices = choices
        self._other = other
        super().__init__(options, name)

    def _make_control(self, options: Options) -> Any:
        return _ChoiceBox(getattr(options, self.name), self._choices, self._other)


class _ChoiceBox(widgets.VBox):
    value = Unicode()
    tooltip = Unicode()  # not synchronised: JupyterLab cannot draw a box that has one

    def __init__(self, value: str, choices: Mapping[str, str], other: tuple[str, str]) -> None:
        label, hint = other
        self._choices = choices
        self._showing = False
        self.menu = widgets.Dropdown(options=[*((name, name) for name in choices), (label, "")], layout=_WIDE)
        self.text = widgets.Text(placeholder=hint, layout={**_WIDE, "display": "none"})
        self.note = widgets.HTML(layout={**_WIDE, "margin": "0 2px 4px 2px"})
        super().__init__([self.menu, self.text, self.note])
        self.observe(self._show, "value")
        self.menu.observe(self._choose, "value")
        self.text.observe(self._choose, "value")
        for part in (self.menu, self.text):
            dlink((self, "tooltip"), (part, "tooltip"))
        self.value = self.menu.value
        self.value = value

    def _choose(self, _: Any) -> None:
        self.text.layout.display = "none" if self.menu.value else ""
        if not self._showing:
            self.value = self.menu.value or self.text.value

    def _show(self, change: Any) -> None:
        self._showing = True
        if change.new in self._choices:
            self.menu.value = change.new
        else:
            self.text.value, self.menu.value = change.new, ""
        self._showing = False
        note = self._choices.get(change.new, "")
        self.note.value = note_html(note)
        self.note.layout.display = "" if note else "none"


def _codec(annotation: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """How a control shows a value of this type, and how it reads what was typed."""
    kind, *_ = [part for part in _parts(annotation) if part is not type(None)]
    if kind is bool or kind is str or typing.get_origin(kind) is typing.Literal:
        return (lambda value: value), (lambda shown: shown)
    if kind in (int, float):
        return (lambda value: "" if value is None else f"{value}"), _number
    content = [getattr(part, "__origin__", part) for part in typing.get_args(kind)]  # Annotated[int, ...] is an int
    if typing.get_origin(kind) is tuple and content == [str, ...]:
        return ", ".join, lambda text: tuple(_items(text))
    if typing.get_origin(kind) is tuple and content == [int, ...]:
        return (
            lambda numbers: ", ".join(map(str, numbers or ())),
            lambda text: tuple(map(_number, _items(text))) or None,
        )
    if typing.get_origin(kind) is dict and content == [str, int]:
        return (lambda sizes: ", ".join(f"{name}={size}" for name, size in sizes.items())), _sizes
    raise TypeError(f"no control for a knob of type {annotation}")


def _parts(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; any other type is its own only member."""
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _is_optional(annotation: Any) -> bool:
    return type(None) in _parts(annotation)


def _number(text: str) -> Any:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text.strip() or None


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _sizes(text: str) -> dict[str, Any]:
    pairs = (item.partition("=") for item in _items(text))
    return {name.strip(): _number(size) for name, _, size in pairs}


_LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def _help(field: Any) -> str:
    """The knob's help text, limits and default, for a tooltip."""
    limits = [
        f"{words} {getattr(limit, name):,.10g}"
        for limit in field.metadata
        for name, words in _LIMITS.items()
        if hasattr(limit, name)
    ]
    default = field.get_default(call_default_factory=True)
    if not field.is_required() and default not in (None, (), {}):
        limits.append(f"default {default}")
    return ". ".join([field.description or "", "; ".join(limits)]).strip(". ")
