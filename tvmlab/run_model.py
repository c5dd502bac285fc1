"""The model of a run, as long as it is the one that the run began with."""

from __future__ import annotations

from tvmlab.core import InputError
from tvmlab.models import Model, load_model
from tvmlab.records import RunFolder

__all__ = ["model_of"]


def model_of(folder: RunFolder) -> Model:
    """Load what the run's experiment names.

    Raises InputError if it is another model now: a file that was exported again, or another one of that name in the
    folder that a relative path is looked for in. Raises what `load_model` raises.
    """
    asked = folder.experiment
    model = load_model(asked.model, batch=asked.batch, seed=asked.seed, dims=asked.dims)
    began_with = folder.environment.get("model", {}).get("sha256")
    if began_with and began_with != model.sha256:
        raise InputError(
            f"{asked.model} is another model now than the one that run {folder.id} began with",
            remedy="put that one back, or start a new run",
        )
    return model
