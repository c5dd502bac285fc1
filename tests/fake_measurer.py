"""A measurer without a device: a latency follows from the candidate's key, so it always answers the same."""

import threading

from tvmlab.core import Measurement, TrialStatus

DEFAULT_S = 1e-3


class FakeMeasurer:
    """`fails` maps a candidate to a status (None: it runs); `on_measure` is called after each measurement."""

    overlaps = False

    def __init__(self, defaults_s=None, fails=lambda candidate: None, on_measure=lambda number: None):
        self.defaults_s = defaults_s or {}
        self.fails = fails
        self.on_measure = on_measure
        self.asked = []
        self.defaults = []
        self.build_wait_s = 0.0
        self.run_s = 0.0
        self.closed = False

    def measure_defaults(self, task_keys):
        for key in task_keys:
            self.defaults.append(key)
            yield Measurement(TrialStatus.OK, (self.default_s(key),) * 3, 0.1, 0.01)

    def default_s(self, key):
        return self.defaults_s.get(key, DEFAULT_S)

    def measure(self, candidates):
        for candidate in candidates:
            self.asked.append((candidate.task_key, candidate.key))
            self.run_s += 0.01
            status = self.fails(candidate)
            try:
                if status is None:
                    rival = self.latencies(candidate.rival) if candidate.rival else ()
                    yield Measurement(TrialStatus.OK, self.latencies(candidate), 0.1, 0.01, "", rival)
                else:
                    yield Measurement(status, (), 0.1, 0.01, f"{status} as asked")
            finally:  # nobody asks for more after the last of a batch
                self.on_measure(len(self.asked))

    def latencies(self, candidate):
        """Three repeats around the candidate's latency; the unscheduled kernel's is the default one."""
        factor = 1.0 if candidate.key == candidate.task_key else latency_of(candidate.key)
        latency = self.default_s(candidate.task_key) * factor
        return latency * 1.1, latency, latency * 0.9

    def add(self, tasks):
        self.added = [task.key for task in tasks]

    def close(self):
        self.closed = True


def latency_of(key):
    """A number between 0.1 and 1.1 that is the same for a key everywhere."""
    return 0.1 + int(key[:8], 16) / 2**32


def stop_after(count):
    """A stop event, and a measurer that sets it after so many trials."""
    stop = threading.Event()
    return stop, FakeMeasurer(on_measure=lambda number: stop.set() if number == count else None)


def keys(trials):
    """Which candidates were measured, in order."""
    return [(trial.task_key, trial.key) for trial in trials]
