"""A session on a GPU: what issue 6 asks to be measured on a card, in order of worth, within a time limit.

    python benchmarks/gpu_session.py --out OUT [--minutes 9] [--jobs smoke,main] [--resume OUT_OF_BEFORE]
    python benchmarks/gpu_session.py --list
    python benchmarks/gpu_session.py --out OUT --rehearse        everything on the CPU, tiny: no card is needed

OUT gets results.jsonl (a row a measurement, as it comes; what failed is a row with its error), session.txt,
runs.tar.xz, the run folders, packed after each tuning and each job as tvmlab.pack does, and logs.tar.xz. `--resume`
takes the folder that an earlier session wrote: rows that are there are not measured again, runs that were interrupted
go on. docs/gpu.md tells what is measured, benchmarks/README.md how it is run on a machine that is lent.
"""

import argparse
import contextlib
import json
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import gpu_jobs
import gpu_state

import tvmlab
from tvmlab.environment import describe

RESULTS = "results.jsonl"
_LEAST_S = 10.0  # with less left nothing is begun
_WRAP_UP_S = 20.0  # kept back to stop and pack the runs
_AGAIN_S = 10.0  # the alarm rings again: TVM makes an ordinary error of what is raised in its callbacks


class TimeUp(BaseException):
    """The session's time is over. As KeyboardInterrupt it is no Exception, which many a loop catches and goes on."""


class Session:
    """What the jobs share: the folders, the device, the clock, and the rows that are there.

    `what` of a row says what was measured; a row with an error is tried again by the next session.
    """

    def __init__(self, asked):
        self.rehearse = asked.rehearse
        self.target = "cpu" if asked.rehearse else asked.target
        self.out = asked.out
        self.out.mkdir(parents=True, exist_ok=True)
        self._state = gpu_state.Work(asked.work, self.out, f"benchmarks/gpu_session.py on {self.target}")
        self.work, self.runs, self.keep = self._state.folder, self._state.runs, self._state.keep
        self.ends_s = time.monotonic() + 60 * asked.minutes - _WRAP_UP_S
        self.rows = []
        if asked.resume:
            self._take(asked.resume)
        self.results = (self.out / RESULTS).open("a")

    def _take(self, folder):
        """What an earlier session left; a row whose run folder did not come back is measured again."""
        self._state.take(folder)
        is_other = folder.resolve() != self.out.resolve()
        if (folder / RESULTS).exists():
            lines = (folder / RESULTS).read_text().splitlines(keepends=True)
            rows = [json.loads(line) for line in lines if line.endswith("\n")]  # it may have been killed as it wrote
            whole = [row for row in rows if (self.runs / row.get("folder", ".")).exists()]
            self.rows = [row for row in whole if "error" not in row]
            if is_other:
                (self.out / RESULTS).write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        for begun in folder.glob(f"*{gpu_jobs.BEGUN}") if is_other else ():
            shutil.copy(begun, self.out)

    @property
    def left_s(self):
        """Seconds until the session must begin to end."""
        return self.ends_s - time.monotonic()

    def row(self, what, measure, least_s=_LEAST_S):
        """The row of `what`: the one that is there, else measured now. None if it fails or there is no time for it."""
        for row in self.rows:
            if what.items() <= row.items():
                return row
        if self.left_s < least_s:
            print(f"no time for {what}: {self.left_s:.0f} s left, {least_s:.0f} are needed", flush=True)
            return None
        started = time.monotonic()
        try:
            row = {**what, **measure()}
        except Exception as error:  # noqa: BLE001  a job that fails must not take the others with it
            self.failed(what, error)
            return None
        row["took_s"] = round(time.monotonic() - started, 1)
        self.rows.append(row)
        self._write(row)
        return row

    def failed(self, what, error):
        """Note what failed, with its traceback in the console. Raises TimeUp if that is what the error was made of."""
        traceback.print_exc()
        if self.left_s < 0:
            raise TimeUp from error
        self._write({**what, "error": f"{type(error).__name__}: {error}"[:2000]})

    def _write(self, row):
        line = json.dumps(row, default=float)
        print(line[:2000], flush=True)
        self.results.write(line + "\n")
        self.results.flush()


def main(words=None):
    asked = arguments(words)
    if asked.list:
        for name, job in gpu_jobs.JOBS.items():
            print(f"{name:12} {job.__doc__.splitlines()[0]}")
        return 0
    gpu_state.end_leftovers()
    session = Session(asked)
    with contextlib.redirect_stdout(_Both(sys.stdout, session.out / "session.txt")):
        return run(session, asked.jobs)


def run(session, names):
    """The jobs one after the other; the exit code is 1 if something failed."""
    signal.signal(signal.SIGALRM, _time_is_up)
    signal.setitimer(signal.ITIMER_REAL, max(session.left_s, 1), _AGAIN_S)
    try:
        what = {"job": "machine", "began_s": round(time.time(), 3)}
        if session.row(what, lambda: machine(session), 0.0) is None:
            names = []  # there is nothing to measure on
        for name in names:
            print(f"== {name}: {session.left_s:.0f} s left", flush=True)
            try:
                gpu_jobs.JOBS[name](session)
            except Exception as error:  # noqa: BLE001  nor must what it does beside its rows
                session.failed({"job": name}, error)
            session.keep()
    except TimeUp:
        signal.setitimer(signal.ITIMER_REAL, 0)
        print("the time is up", flush=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        session.keep()
        session.results.close()
    rows = [json.loads(line) for line in (session.out / RESULTS).read_text().splitlines()]
    failed = sum("error" in row for row in rows)
    print(f"{dict(Counter(row['job'] for row in rows if 'error' not in row))}, {failed} failed", flush=True)
    return 1 if failed else 0


def machine(session):
    """What the session runs on: versions, what the doctor says, the target with its measured roofline."""
    found = {**describe(), "doctor": repr(tvmlab.doctor(runs_dir=session.runs)).splitlines()}
    return {**found, "target": tvmlab.target(session.target).as_record()}


def _time_is_up(*_):
    raise TimeUp


class _Both:
    """Writes to two places: the terminal, of which only the end comes back, and a file."""

    def __init__(self, terminal, path):
        self._terminal, self._file = terminal, path.open("a")

    def write(self, text):
        self._file.write(text)
        return self._terminal.write(text)

    def flush(self):
        self._file.flush()
        self._terminal.flush()


def arguments(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-session"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--jobs", type=lambda text: text.split(","), default=list(gpu_jobs.JOBS))
    parser.add_argument("--resume", type=Path, help="OUT of an earlier session")
    parser.add_argument("--work", type=Path, help="where runs are made; a new temporary folder by default")
    parser.add_argument("--target", default="cuda:0")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args(words)
    if unknown := set(asked.jobs) - set(gpu_jobs.JOBS):
        parser.error(f"no job {', '.join(unknown)}; there are {', '.join(gpu_jobs.JOBS)}")
    return asked


if __name__ == "__main__":
    sys.exit(main())
