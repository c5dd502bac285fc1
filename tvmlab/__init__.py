"""tvmlab: auto-tune deep-learning models with Apache TVM, from a notebook or a script, reproducibly.

The public names load lazily: importing tvmlab imports neither TVM nor ipywidgets.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# public name -> module that defines it
_PUBLIC = {
    "Ansor": "experiment",
    "AutoTVM": "experiment",
    "AutoTVMOptions": "experiment",
    "AutoschedulerOptions": "experiment",
    "Droplet": "experiment",
    "Experiment": "experiment",
    "Measure": "experiment",
    "Form": "widgets.form",
    "LayoutTuning": "experiment",
    "Repeat": "experiment",
    "Run": "run",
    "RunFolder": "records",
    "Selective": "experiment",
    "Study": "study_design",
    "StudyFolder": "study_folder",
    "TaskInfo": "core",
    "Timed": "study_design",
    "Trial": "core",
    "TransferTuning": "experiment",
    "TrialStatus": "core",
    "TvmlabError": "core",
    "attach": "run",
    "best": "presets",
    "compare": "compare",
    "compare_operators": "operators",
    "doctor": "doctor",
    "delete_runs": "store",
    "engine": "engines",
    "estimate_time": "presets",
    "export": "export",
    "fork": "run",
    "import_records": "imported",
    "load": "deployed",
    "load_model": "models",
    "models": "models",
    "descend": "simulation",
    "gpu_recordings": "recordings",
    "pack": "recordings",
    "past": "store",
    "preset": "presets",
    "presets": "presets",
    "profile": "profile",
    "recorded": "recordings",
    "recorded_space": "simulation",
    "recorded_spaces": "simulation",
    "recordings": "recordings",
    "report": "report",
    "reused": "store",
    "resume": "run",
    "runs": "run",
    "similarity": "similarity",
    "simulate": "simulation",
    "simulate_steps": "simulation",
    "study": "study",
    "study_length_s": "study",
    "study_of_the_report": "study_design",
    "target": "targets",
    "targets": "targets",
    "space": "overview",
    "tasks": "overview",
    "tune": "run",
    "why_layout": "layout_choice",
}
_MODULES = ("claims", "descent", "frames", "gains", "plots", "published", "published_selective", "stats")

__all__ = [*sorted(_PUBLIC), *_MODULES]


class _Package(ModuleType):
    """Keeps `tvmlab.models` the function when the module of the same name is imported.

    The import system binds every sub-module as an attribute of its package; `tvmlab.models()` is what users call.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"tvmlab.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tvmlab' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tvmlab.{_PUBLIC[name]}"), name)
    if _PUBLIC[name] == "run" and "ipykernel" in sys.modules:
        importlib.import_module("tvmlab.widgets.monitor")  # in a notebook a run shows itself live
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
