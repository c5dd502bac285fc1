"""What every class of options shares: knobs that carry their help, one clear error, JSON round trip, HTML table.

The widgets, the command line and the documentation are generated from these classes.
"""

from __future__ import annotations

import html
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tvmlab.core import InputError

__all__ = ["Options", "knob", "unit_of"]


def knob(default: Any, help: str, *, unit: str = "", **limits: Any) -> Any:
    """A pydantic field with a help text and a unit; `limits` are pydantic's own (ge, le, gt, lt)."""
    return Field(default, description=help, json_schema_extra={"unit": unit}, strict=True, **limits)


class Options(BaseModel):
    """Base of the frozen option classes: one clear error, JSON round trip, HTML table."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    POSITIONAL: ClassVar[tuple[str, ...]] = ()  # the knobs that may be given without their names

    def __init__(self, *first: Any, **values: Any) -> None:
        if len(first) > len(self.POSITIONAL):
            raise InputError(
                f"{type(self).__name__} takes knobs by name, not {first[len(self.POSITIONAL)]!r}",
                remedy=f"its knobs are {_knobs(type(self))}",
            )
        try:
            super().__init__(**dict(zip(self.POSITIONAL, first, strict=False)), **values)
        except ValidationError as error:
            raise _readable(type(self), error) from None

    @classmethod
    def from_json(cls, text: str | bytes) -> Any:
        """Read what `model_dump_json` wrote. Raises InputError on unknown or out-of-range fields."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise _readable(cls, error) from None

    def code(self) -> str:
        """The Python call that makes this object again, defaults left out.

        >>> from tvmlab.steps import Ansor
        >>> Ansor(max_trials=64).code()
        'Ansor(max_trials=64)'
        """
        shown = (
            f"{name}={_code(value)}"
            for name, field in type(self).model_fields.items()
            if name != "kind" and (value := getattr(self, name)) != field.get_default(call_default_factory=True)
        )
        return f"{type(self).__name__}({', '.join(shown)})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{name}</th><td>{html.escape(_code(getattr(self, name)))}</td>"
            f"<td>{unit_of(field)}</td><td style='text-align:left'>{html.escape(field.description or '')}</td></tr>"
            for name, field in type(self).model_fields.items()
            if name != "kind"
        )
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"


def _knobs(cls: type[Options]) -> str:
    return ", ".join(name for name in cls.model_fields if name != "kind")


def unit_of(field: Any) -> str:
    """The unit of a knob's field info, or an empty string."""
    return (field.json_schema_extra or {}).get("unit", "")


def _code(value: Any) -> str:
    if isinstance(value, Options):
        return value.code()
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_code, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name!r}: {_code(item)}" for name, item in value.items()) + "}"
    return repr(value)


def _readable(cls: type[Options], error: ValidationError) -> InputError:
    """One line for the first problem: which knob, what was given, what is allowed."""
    # A misspelt knob may leave a required one missing: the spelling is what to tell.
    problems = error.errors(include_url=False)
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, InputError):  # of a step or of Measure: it says all there is to say
        return inner
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return InputError(f"{cls.__name__} has no knob {where!r}", remedy=f"its knobs are {_knobs(cls)}")
    if first["type"] == "missing":
        return InputError(f"{cls.__name__} needs {where!r}", remedy=f"pass {where}=...")
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        known = ", ".join(f"{step.__name__}(...)" for step in Options.__subclasses__() if "kind" in step.model_fields)
        return InputError(f"{where}: unknown step {first['input']!r}", remedy=f"the steps are {known}")
    problem = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    allowed = _range(cls.model_fields[where]) if where in cls.model_fields else ""
    if allowed:
        problem = f"should be {allowed}" if first["type"] in _BOUNDS else f"{problem}, {allowed}"
    return InputError(
        f"{cls.__name__}({where}={first['input']!r}) is not usable",
        remedy=f"{where} {problem[:1].lower()}{problem[1:]}",
    )


_BOUNDS = ("greater_than_equal", "less_than_equal", "greater_than", "less_than")  # pydantic's names of these errors


def _range(field: Any) -> str:
    """All that a knob allows, not only the limit that was passed; an empty string for one without limits."""
    limits = {name: getattr(limit, name) for limit in field.metadata for name in _LIMITS if hasattr(limit, name)}
    if limits.keys() == {"ge", "le"}:
        said = "{ge:,.10g} to {le:,.10g}".format(**limits)
    else:
        said = " and ".join(f"{words} {limits[name]:,.10g}" for name, words in _LIMITS.items() if name in limits)
    return f"{said} {unit_of(field)}".rstrip() if said else ""


_LIMITS = {"ge": "at least", "gt": "above", "le": "up to", "lt": "below"}
