"""A worker process of our own: one request at a time, killed on timeout, gone when its parent is.

TVM's popen workers are started anew for every batch and can outlive a killed parent (docs/tvm.md).
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

__all__ = ["START_S", "WorkerDied", "WorkerProcess", "WorkerTimeout", "end_with_parent_thread", "serve"]


START_S = 120.0  # what a worker may take until it answers at all: importing TVM takes a second on a quiet machine
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class WorkerDied(Exception):
    """The process ended before it answered (a crash in native code, or the out-of-memory killer)."""


class WorkerTimeout(Exception):
    """The process did not answer in time and was killed."""


class WorkerProcess:
    """`python -m <module> <arguments>` in a process group of its own, restarted by the next request if it died.

    The worker reads requests from a socket and watches its standard input: the parent holds the other end and never
    writes, so the end of file means that the parent is gone, however it died.
    """

    def __init__(self, module: str, arguments: list[str], log: Path, environment: Mapping[str, str]) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._environment = {**os.environ, **environment}
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self.generation = 0  # how often it was started: what the worker held in memory is lost at each start

    @property
    def pid(self) -> int | None:
        """Process id, None while it is not running."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """Start it if it is not running; returns at once (importing TVM takes the worker a second)."""
        if self.pid is not None:
            return
        self.kill()
        ours, theirs = socket.socketpair()
        with theirs, self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command, str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                env=self._environment,
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        self.generation += 1

    def request(self, message: Any, timeout_s: float, *, anew: bool = True) -> Any:
        """Send a message and wait for the answer. Raises WorkerDied, or WorkerTimeout after killing the process.

        One that died before is started first; with `anew` False that is refused: what it held in memory is needed.
        """
        if anew:
            self.start()
        elif self.pid is None:
            raise WorkerDied(self._cause_of_death())
        assert self._connection is not None
        try:
            self._connection.send(message)
            if not self._connection.poll(timeout_s):
                self.kill()
                raise WorkerTimeout(f"no answer after {timeout_s:g} s")
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied(self._cause_of_death()) from error

    def _cause_of_death(self) -> str:
        process = self._process
        self.kill()
        code = process.returncode if process else None
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def pause(self) -> None:
        """Freeze the process: an idle thread pool spins for a while, and would take the cores from whom is measured."""
        self._signal(signal.SIGSTOP)

    def proceed(self) -> None:
        """Let a paused process go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        pid = self.pid
        if pid is not None:
            with suppress(ProcessLookupError):  # it died this moment
                os.killpg(pid, number)

    def abort(self) -> None:
        """Kill the process from another thread than the one that asks it, which is then told that it died."""
        self._signal(signal.SIGKILL)

    def kill(self) -> None:
        """End the process and everything it started."""
        if self._process is not None:
            if self._process.poll() is None:
                try:
                    # A worker that died by itself a moment ago keeps its exit status.
                    self._process.wait(timeout=0.05)
                except subprocess.TimeoutExpired:
                    os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            stdin: IO[bytes] | None = self._process.stdin
            if stdin:
                stdin.close()
            self._process = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def end_with_parent_thread() -> None:
    """On Linux, have the kernel kill this process when the thread that started it ends, even while it is frozen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def serve(file_descriptor: int, answer: Callable[[Any], Any]) -> None:
    """The worker's side: answer requests until the parent closes the socket or dies; does not return."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(file_descriptor)
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            _end()
        connection.send(answer(message))


def _die_with_parent() -> None:
    while os.read(0, 1):
        pass
    _end()


def _end() -> None:
    """End this process and what it started (a compiler, a linker)."""
    os.killpg(os.getpgrp(), signal.SIGKILL)
