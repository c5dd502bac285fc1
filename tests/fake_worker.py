"""A worker that does as it is told: `python -m fake_worker <file descriptor>`."""

import os
import signal
import subprocess
import sys
import time

from tvmlab.measure.process import serve


def answer(message):
    name, *arguments = message
    if name == "echo":
        return arguments[0]
    if name == "sleep":
        time.sleep(arguments[0])
    if name == "exit":
        os._exit(arguments[0])
    if name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "child":
        return subprocess.Popen(["sleep", "600"]).pid
    if name == "print":
        print("printed by the worker", flush=True)
    if name == "environment":
        return os.environ.get(arguments[0])
    return "done"


if __name__ == "__main__":
    serve(int(sys.argv[1]), answer)
