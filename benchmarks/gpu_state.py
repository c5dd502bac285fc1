"""What a session on a GPU leaves for the next one, and takes from the last: run folders, logs, and no processes."""

import contextlib
import io
import json
import os
import signal
import tarfile
import tempfile
import time
import traceback
from pathlib import Path

import psutil

import tvmlab

RUNS, LOGS = "runs.tar.xz", "logs.tar.xz"
_SESSION = "session.json"  # in the folder of a session's work: whose it is
_GRACE_S = 8.0  # a search ends after the trial under way; one that does not is killed
_LEVEL = 2  # of xz: 40 MB of databases in 0.4 s, where 9 takes 4 s and a quarter less space
_LOG_BYTES = 100_000  # of each log, its end


class Work:
    """The folder in which a session makes its runs, and what is packed of it into `out` whenever something changed."""

    def __init__(self, folder, out, note):
        self.folder = Path(folder or tempfile.mkdtemp(prefix="gpu-session-"))
        self.runs = self.folder / "runs"
        self.runs.mkdir(parents=True, exist_ok=True)
        own = psutil.Process()
        (self.folder / _SESSION).write_text(json.dumps({"pid": own.pid, "began_s": own.create_time()}))
        self._out, self._note = out, note
        self._packed = {}

    def take(self, folder):
        """The run folders that an earlier session packed."""
        if (folder / RUNS).exists():
            with tarfile.open(folder / RUNS) as archive:
                archive.extractall(self.runs, filter="data")

    def keep(self):
        """Pack the logs and the runs, of which none goes on after this. What cannot be packed is only told."""
        try:
            with _alarm_held_back():
                self._pack()
        except Exception:  # noqa: BLE001  what was measured must not be lost for it
            traceback.print_exc()

    def _pack(self):
        end_runs(self.folder)
        self._set_aside()
        logs = [path for path in sorted(self.folder.rglob("*")) if _is_log(path)]
        self._pack_changed(LOGS, logs, lambda target: _pack_logs(self.folder, logs, target))
        files = [path for path in self.runs.rglob("*") if path.suffix in (".json", ".jsonl")]
        if any(path.name == "experiment.json" for path in files):
            self._pack_changed(RUNS, files, lambda target: tvmlab.pack(self.runs, target, self._note, level=_LEVEL))

    def _set_aside(self):
        """Move what had not begun out of the runs, its log with it: such a folder is none that can be read."""
        for path in list(self.runs.rglob("experiment.json")):
            if not (path.parent / "environment.json").exists():
                aside = Path(tempfile.mkdtemp(prefix="not-begun-", dir=self.folder))
                path.parent.rename(aside / path.parent.name)

    def _pack_changed(self, name, files, pack):
        """Pack if any of the files is another than when they were last packed."""
        now = {(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files}
        if now != self._packed.get(name):
            pack(self._out / name)
            self._packed[name] = now  # an interrupted one is done again


@contextlib.contextmanager
def _alarm_held_back():
    """The alarm that ends the session, if one is set, rings after this: half an archive is none."""
    left_s, again_s = signal.setitimer(signal.ITIMER_REAL, 0)
    began = time.monotonic()
    try:
        yield
    finally:
        if left_s:
            signal.setitimer(signal.ITIMER_REAL, max(left_s - (time.monotonic() - began), 1e-3), again_s)


def _is_log(path):
    return path.suffix in (".txt", ".log") or path.name in ("device.jsonl", "state.json")


def _pack_logs(root, files, target):
    scratch = target.with_name(f".{target.name}")
    with tarfile.open(scratch, "w:xz", preset=_LEVEL) as archive:
        for path in files:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - _LOG_BYTES))
                content = file.read()
            item = tarfile.TarInfo(path.relative_to(root).as_posix())
            item.size = len(content)
            archive.addfile(item, io.BytesIO(content))
    scratch.replace(target)


def end_leftovers(parent=None):
    """End the searches of sessions that were killed: they would go on with the GPU while the machine is held."""
    for path in Path(parent or tempfile.gettempdir()).glob(f"gpu-session-*/{_SESSION}"):
        if not _lives(path):
            end_runs(path.parent)


def _lives(path):
    """Whether the process that wrote a _SESSION is still there, and is no other of the same number."""
    try:
        owner = json.loads(path.read_text())
        return abs(psutil.Process(owner["pid"]).create_time() - owner["began_s"]) < 1.0
    except (ValueError, psutil.Error):  # ValueError: it was killed as it wrote
        return False


def end_runs(folder):
    """Stop the runs in a folder that go on. One that does not listen is killed; `resume` goes on with it too."""
    found = [tvmlab.attach(path.parent) for path in folder.rglob("experiment.json")]
    going = [run for run in found if run.status == "running"]
    for number, patience_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, 5.0)):
        for run in going:
            _tell(run, number)
        deadline = time.monotonic() + patience_s
        while going and time.monotonic() < deadline:
            time.sleep(0.1)
            going = [run for run in going if run.status == "running"]
    return going


def _tell(run, number):
    """Send a signal to the search of a run, and to what it started in its session."""
    pid = run.folder.state.pid
    try:
        if pid and "tvmlab.search_process" in psutil.Process(pid).cmdline():
            (os.killpg if number == signal.SIGKILL else os.kill)(pid, number)
    except (psutil.Error, ProcessLookupError):  # it ended since
        return
