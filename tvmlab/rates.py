"""How many trials a second to expect of a search before anything was measured: guesses for as many cores as build."""

from __future__ import annotations

from tvmlab.experiment import Measure
from tvmlab.hardware import read_cpu

__all__ = ["TRIALS_PER_S", "building_cores", "cores_gain", "guessed_rate"]

# Guessed for two cores; past runs, and the first finished ones of a study, correct it. "default" are the unscheduled
# kernels before any step.
TRIALS_PER_S = {"ansor": 3.0, "autotvm": 5.0, "layouttuning": 5.0, "droplet": 3.0, "transfertuning": 3.0,
                "selective": 5.0, "default": 5.0}  # fmt: skip
# Of a trial's time on two cores: in the recorded runs (data/recorded_runs) builds took 0.5 to 0.75 of it. Each has one
# core to itself, so more cores build more at once; candidates still run one after another, and one process searches.
_BUILDING = 2 / 3


def building_cores(measure: Measure) -> int:
    """How many cores of this machine build candidates."""
    cores = read_cpu().cores
    return min(measure.build_workers or cores, cores)


def cores_gain(cores: int) -> float:
    """How many times as many trials a second so many building cores are expected to do as two: at most three times.

    >>> [round(cores_gain(cores), 2) for cores in (1, 2, 4, 16, 128)]
    [0.6, 1.0, 1.5, 2.4, 2.91]
    """
    return 1 / (1 - _BUILDING + _BUILDING * 2 / cores)


def guessed_rate(kind: str, cores: int) -> float:
    """Trials a second of a kind of step where so many cores build, as guessed.

    >>> [round(guessed_rate("ansor", cores), 1) for cores in (1, 2, 4, 16, 128)]
    [1.8, 3.0, 4.5, 7.2, 8.7]
    """
    return TRIALS_PER_S[kind] * cores_gain(cores)
