"""A device's process without a device: `python -m fake_device cuda:0 <file descriptor>` answers from what was recorded.

A "library" is a text file with a word of FATES, or any other text, from which the latency follows.
"""

import hashlib
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from fake_measurer import DEFAULT_S, latency_of

from tvmlab.core import Measurement, TrialStatus
from tvmlab.measure.process import serve

FATES = ("hangs", "dies", "loses its context", "raises")
_tasks = set()


def answer(message):
    name, *arguments = message
    if name == "ping":
        return "ok"
    key = arguments[0]
    if name == "has":
        return key in _tasks
    if name == "default":
        _tasks.add(key)
        return Measurement(TrialStatus.OK, (DEFAULT_S,) * 3)
    if key not in _tasks:
        return Measurement(TrialStatus.RUN_ERROR, message="the task was never given")
    found = measured(Path(arguments[1]).read_text())
    if name == "measure" and found.status is TrialStatus.OK and len(arguments) > 3 and arguments[3]:
        return replace(found, rival_latencies_s=measured(Path(arguments[3]).read_text()).latencies_s)
    return found


def measured(text):
    if text == "hangs":
        time.sleep(600)
    if text == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == "loses its context":
        return Measurement(TrialStatus.CRASHED, message="CUDA: an illegal memory access was encountered")
    if text == "raises":
        return Measurement(TrialStatus.RUN_ERROR, message="raised")
    key = text if len(text) <= 16 else hashlib.sha256(text.encode()).hexdigest()
    latency = DEFAULT_S * latency_of(key)
    return Measurement(TrialStatus.OK, (latency * 1.1, latency, latency * 0.9))


if __name__ == "__main__":
    serve(int(sys.argv[2]), answer)
