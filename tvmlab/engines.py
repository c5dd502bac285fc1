"""Which engine a set of knobs is for: Ansor, or AutoTVM with its templates."""

from __future__ import annotations

from typing import Any

from tvmlab.core import InputError
from tvmlab.steps import Ansor, AutoTVM

__all__ = ["engine"]

_ENGINES: dict[str, type[Ansor] | type[AutoTVM]] = {"ansor": Ansor, "autoscheduler": Ansor, "autotvm": AutoTVM}


def engine(name: str = "", **knobs: Any) -> Ansor | AutoTVM:
    """The step that searches with an engine: "ansor" (or "autoscheduler", its name in TVM), or "autotvm".

    Without a name the knobs choose: AutoTVM if one of them is AutoTVM's alone (kernel_trials, exploration_trials,
    random_trials, tuner), else Ansor. Raises InputError for an unknown name, for knobs of both engines at once, for
    one of the other engine, and for a value out of range.

    >>> engine().code(), engine(kernel_trials=64).code(), engine("autotvm", max_trials=8).code()
    ('Ansor()', 'AutoTVM(kernel_trials=64)', 'AutoTVM(max_trials=8)')
    """
    only = {cls: [knob for knob in knobs if knob in _alone(cls)] for cls in (Ansor, AutoTVM)}
    if name:
        if name.lower() not in _ENGINES:
            raise InputError(f"there is no engine {name!r}", remedy=f"there are {', '.join(_ENGINES)}")
        chosen = _ENGINES[name.lower()]
    elif only[Ansor] and only[AutoTVM]:
        raise InputError(
            f"{only[Ansor][0]} is a knob of Ansor and {only[AutoTVM][0]} one of AutoTVM",
            remedy="give the knobs of one engine; to search with both, make a step of each",
        )
    else:
        chosen = AutoTVM if only[AutoTVM] else Ansor
    other: type[Ansor] | type[AutoTVM] = AutoTVM if chosen is Ansor else Ansor
    if only[other]:
        raise InputError(
            f"{only[other][0]} is a knob of {other.__name__}, not of {chosen.__name__}",
            remedy=f"{chosen.__name__} has {', '.join(knob for knob in chosen.model_fields if knob != 'kind')}",
        )
    return chosen(**knobs)


def _alone(cls: type[Ansor] | type[AutoTVM]) -> set[str]:
    """The knobs that the other engine lacks."""
    other = AutoTVM if cls is Ansor else Ansor
    return set(cls.model_fields) - set(other.model_fields)
