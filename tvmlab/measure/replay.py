"""Answer from recorded trials instead of a device (Kernel Tuner's simulation mode)."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from typing import Any

from tvmlab.core import Candidate, Measurement, RecordError, Trial

__all__ = ["ReplayMeasurer"]


class ReplayMeasurer:
    """Knows what was measured, charges the time it took, and refuses a candidate it has never seen.

    A candidate with a rival is answered with the turns that were recorded of the two, else with the latencies that
    each was recorded with (as many as both have), and their pairing says nothing.

    `trials` are those of a recorded run, the default kernels included. `build_wait_s` and `run_s` add up the
    recorded seconds, not those of the replay.
    """

    overlaps = False

    def __init__(self, trials: Iterable[Trial]) -> None:
        self._defaults: dict[str, Trial] = {}
        self._known: dict[tuple[str, str], Trial] = {}
        self._turns: dict[tuple[str, str, str], Trial] = {}
        for trial in trials:
            if trial.trial == 0:
                self._defaults[trial.task_key] = trial
                continue
            self._known[trial.task_key, trial.key] = trial
            if trial.rival:
                self._turns[trial.task_key, trial.key, trial.rival] = trial
        self.build_wait_s = 0.0
        self.run_s = 0.0

    def measure_defaults(self, task_keys: Sequence[str]) -> Generator[Measurement]:
        """The recorded default kernels. Raises RecordError for a task that was not recorded."""
        for key in task_keys:
            if key not in self._defaults:
                raise RecordError(
                    f"task {key} is not in the records", remedy="replay a run of the same model and target"
                )
            yield self._answer(self._defaults[key])

    def measure(self, candidates: Sequence[Candidate]) -> Generator[Measurement]:
        """The recorded measurements. Raises RecordError for a candidate, or a rival, that was never measured."""
        for candidate in candidates:
            rival = candidate.rival
            turns = self._turns.get((candidate.task_key, candidate.key, rival.key)) if rival else None
            if turns is not None:
                yield replace(self._answer(turns), rival_latencies_s=tuple(turns.rival_latencies_s))
                continue
            trial = self._find(candidate)
            if rival is None or not trial.ok:
                yield self._answer(trial)
            else:
                yield _beside(self._answer(trial), self._find_rival(rival))

    def _find(self, candidate: Candidate) -> Trial:
        found = self._known.get((candidate.task_key, candidate.key))
        if found is None:
            raise RecordError(
                f"candidate {candidate.key} of task {candidate.task_key} was never measured",
                remedy="replay with the recorded experiment and seed, or record a larger part of the space",
            )
        return found

    def _find_rival(self, rival: Candidate) -> Trial:
        """The unscheduled kernel is no candidate, but a search may start from it."""
        default = self._defaults.get(rival.task_key)
        return default if default is not None and rival.key == default.key else self._find(rival)

    def _answer(self, trial: Trial) -> Measurement:
        self.build_wait_s += trial.build_s
        self.run_s += trial.run_s
        return Measurement(trial.status, tuple(trial.latencies_s), trial.build_s, trial.run_s, trial.message)

    def add(self, tasks: Sequence[Any]) -> None:
        """Nothing to do: it goes by the keys."""

    def close(self) -> None:
        """Nothing to end."""


def _beside(measured: Measurement, rival: Trial) -> Measurement:
    """A recorded measurement and a rival's, of equal length; alone where the rival failed."""
    count = min(len(measured.latencies_s), len(rival.latencies_s))
    if not count:
        return measured
    ours, theirs = measured.latencies_s[:count], tuple(rival.latencies_s[:count])
    return replace(measured, latencies_s=ours, rival_latencies_s=theirs)
