"""Command-line flags made from the option classes: one for each knob, with its help text and default."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from tvmlab.core import InputError
from tvmlab.engines import engine
from tvmlab.experiment import STEPS, Experiment, Measure, Options, unit_of

__all__ = ["add_knobs", "add_steps", "flag", "given_experiment", "given_knobs", "refuse_steps"]

_KINDS = {step.model_fields["kind"].default: step for step in STEPS}


def add_knobs(parser: argparse.ArgumentParser, options: type[Options], skip: Collection[str] = ()) -> None:
    """A flag for each knob. Only flags that are given end up in the namespace."""
    group = parser.add_argument_group(options.__name__)
    for name, field in options.model_fields.items():
        if name not in (*skip, "kind"):
            _add(group, name, field, _default(field))


def add_steps(parser: argparse.ArgumentParser) -> None:
    """`--step`, and a flag for each knob of each step; knobs of the same name share one."""
    group = parser.add_argument_group("Step")
    group.add_argument("--step", action="append", choices=list(_KINDS), dest="kinds",
                       help="how to search; again for a further step (default: the engine whose knobs are given, "
                       "ansor if none is)")  # fmt: skip
    for name in dict.fromkeys(name for step in STEPS for name in step.model_fields if name != "kind"):
        owners = {step.__name__: step.model_fields[name] for step in STEPS if name in step.model_fields}
        defaults = {step: _default(field) for step, field in owners.items()}
        told = set(defaults.values())
        if len(told) == 1 and (len(owners) == len(STEPS) or told == {""}):
            default = told.pop()
        else:  # say whose it is
            default = ", ".join(f"{step} {default}".strip() for step, default in defaults.items())
        _add(group, name, next(iter(owners.values())), default, _described(owners))


def _described(owners: dict[str, FieldInfo]) -> str:
    """The help texts of a knob that several steps have, each once, with its step's name where they differ."""
    texts: dict[str, str] = {}
    for step, field in owners.items():
        texts.setdefault(field.description or "", step if texts else "")
    return "; ".join(f"{step}: {text}" if step else text for text, step in texts.items())


def _add(group: Any, name: str, field: FieldInfo, default: str, described: str = "") -> None:
    text = described or field.description or name
    help = text.replace("%", "%%") + (f" (default: {default})" if default else "")
    group.add_argument(flag(name), dest=name, default=argparse.SUPPRESS, help=help, **_parsing(field))


def _default(field: FieldInfo) -> str:
    """A knob's default as the help shows it; empty if it is nothing."""
    default = field.get_default(call_default_factory=True)
    return "" if default in (None, (), {}) else str(default)


def given_knobs(args: argparse.Namespace, options: type[Options]) -> dict[str, Any]:
    """The knobs of this class that were given as flags. Raises InputError for a dimension without a size."""
    found = {name: getattr(args, name) for name in options.model_fields if hasattr(args, name)}
    if "dims" in found:
        found["dims"] = dict(map(_dimension, found["dims"]))
    return found


def given_experiment(args: argparse.Namespace) -> Experiment:
    """The experiment the flags describe. Raises InputError for a knob out of range, or not of the step chosen."""
    measure = Measure(**given_knobs(args, Measure))
    return Experiment(**given_knobs(args, Experiment), steps=_given_steps(args), measure=measure)


def _given_steps(args: argparse.Namespace) -> tuple[Options, ...]:
    """The steps that the flags name; without any, the engine whose knobs are given."""
    knobs = {name: value for step in STEPS for name, value in given_knobs(args, step).items()}
    if not args.kinds:
        return (engine(**knobs),)
    kinds = [_KINDS[kind] for kind in args.kinds]
    of_none = {name: value for name, value in knobs.items() if not any(name in kind.model_fields for kind in kinds)}
    # Each step takes the knobs that it has; the first refuses one that none has, and names its own.
    return tuple(
        kind(**of_none, **{name: value for name, value in knobs.items() if name in kind.model_fields}) for kind in kinds
    )


def refuse_steps(args: argparse.Namespace, why: str) -> None:
    """Raises InputError if the flags name a step or a knob of one."""
    knobs = [flag(name) for step in STEPS for name in given_knobs(args, step)]
    given = [*(["--step"] if args.kinds else []), *knobs]
    if given:
        raise InputError(f"{why}, and {given[0]} is given", remedy="leave one of them out")


def flag(name: str) -> str:
    """The flag of a knob; seconds are the unit one expects.

    >>> flag("time_limit_s")
    '--time-limit'
    """
    return "--" + {"dims": "dim"}.get(name, name.removesuffix("_s")).replace("_", "-")


def _parsing(field: FieldInfo) -> dict[str, Any]:
    """How argparse is to parse a knob."""
    kinds = _types(field.annotation)
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction}
    if dict in kinds:
        return {"action": "append", "metavar": "NAME=SIZE"}
    if tuple in kinds:
        return {"nargs": "+", "metavar": unit_of(field).upper() or "NAME"}
    if Literal in kinds:
        return {"choices": get_args(field.annotation)}
    if {int, str} <= kinds:
        return {"type": _number_or_text, "metavar": unit_of(field).upper() or "VALUE"}
    kind = next(kind for kind in (int, float, str) if kind in kinds)
    return {"type": kind, "metavar": unit_of(field).upper() or kind.__name__.upper()}


def _types(annotation: Any) -> set[Any]:
    """The plain types of an annotation: `int | None` -> {int, NoneType}, `tuple[str, ...]` -> {tuple}."""
    if get_origin(annotation) in (Union, UnionType):
        return {get_origin(part) or part for part in get_args(annotation)}
    return {get_origin(annotation) or annotation}


def _number_or_text(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdecimal() else text


def _dimension(text: str) -> tuple[str, int]:
    name, _, size = text.partition("=")
    if not name or not size.isdecimal():
        raise InputError(f"--dim {text!r} is not usable", remedy="write NAME=SIZE, such as sequence=128")
    return name, int(size)
