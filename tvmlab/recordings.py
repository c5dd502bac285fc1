"""Recorded runs and studies in data/recorded_runs: packed small, opened as ordinary run folders to read.

An archive is a .tar.xz: first `recording.json`, which says what it is, then the JSON files of the folder that was
packed, TVM's databases last, so that they need not be unpacked to draw a figure.
"""

from __future__ import annotations

import html
import io
import lzma
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, cast, overload

import orjson
import pandas as pd
import platformdirs

from tvmlab.core import InputError, RecordError, RunError
from tvmlab.datafiles import data_dir
from tvmlab.frames import folders
from tvmlab.privacy import without_folders
from tvmlab.records import RunFolder
from tvmlab.study_folder import StudyFolder

__all__ = ["FORMAT", "Recording", "gpu_recordings", "pack", "recorded", "recordings"]

FORMAT = 1
_ABOUT = "recording.json"
_ENDING = ".tar.xz"
_DATABASE = "database_"
_LARGE_BYTES = 8 << 20


class Recording(Sequence[RunFolder]):
    """The runs of a recording, wherever tvmlab takes runs: `tvmlab.frames.trials(recording)`.

    `folder_path` is where it was unpacked (a study's folder, for a study), `about` what recording.json says. The files
    are not to be written: make a run of your own with `tvmlab.tune`.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.folder_path = path
        self.about = about
        self._runs = [RunFolder(path / name) for name in about["runs"]]

    @overload
    def __getitem__(self, index: int) -> RunFolder: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[RunFolder]: ...
    def __getitem__(self, index: int | slice) -> RunFolder | Sequence[RunFolder]:
        return self._runs[index]

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def name(self) -> str:
        """The name that `recorded` takes."""
        return str(self.about["name"])

    @property
    def label(self) -> str:
        """What has to stand at a figure: that it is recorded, when, on what, with which TVM."""
        about = self.about
        return f"recorded {about['recorded']} on {', '.join(about['targets'])}; TVM {', '.join(about['tvm'])}"

    @property
    def study(self) -> StudyFolder:
        """The recorded study. Raises RecordError if what was recorded is none."""
        return StudyFolder.open(self.folder_path)

    @property
    def studies(self) -> list[StudyFolder]:
        """The studies that are among what was recorded, by the names of their folders."""
        return [StudyFolder.open(path.parent) for path in sorted(self.folder_path.rglob("study.json"))]

    def __repr__(self) -> str:
        return f"<Recording {self.name}: {len(self)} runs, {self.label}>"

    def _repr_html_(self) -> str:
        return f"<b>{html.escape(self.name)}</b>: {len(self)} runs, {html.escape(self.label)}"


def pack(source: Any, path: str | Path, note: str = "", *, level: int | None = None) -> Path:
    """Pack a run (as in tvmlab.frames), or a folder that holds runs, such as a study's, into a .tar.xz.

    What is kept are the JSON files, TVM's databases among them; logs, locks and the folders of absolute paths are left
    out. `note` says how it was made. The same files give the same archive. `level` is that of xz, 0 to 9 (default: 6,
    of much 9): 2 takes a tenth of the time and a third more space. Returns its path.

    Raises InputError for a folder without runs, another ending or level, RunError if a run is still running.
    """
    target = Path(path)
    if not target.name.endswith(_ENDING):
        raise InputError(f"{target.name!r} is not the name of a recording", remedy=f"end it with {_ENDING}")
    if level is not None and level not in range(10):
        raise InputError(f"xz has no level {level!r}", remedy="choose one of 0 to 9")
    root, runs, files = _runs_of(source)
    if running := [run.id for run in runs if run.status == "running"]:
        raise RunError(f"run {running[0]} is still running", remedy="wait for its end, or stop it")
    about = _about(target.name.removesuffix(_ENDING), root, runs, note)
    # Of a recording that was unpacked there and went on, the folder has an old _ABOUT.
    others = {name: content for name, content in _members(root, files) if name != _ABOUT}
    members = {_ABOUT: orjson.dumps(about, option=orjson.OPT_INDENT_2), **others}
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    usual = 9 if sum(map(len, others.values())) > _LARGE_BYTES else 6  # 9 takes 0.7 GB of memory
    preset = cast(Literal[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], usual if level is None else level)
    try:
        with tarfile.open(scratch, "w:xz", preset=preset) as archive:
            for name, content in members.items():
                item = tarfile.TarInfo(name)
                item.size = len(content)
                archive.addfile(item, io.BytesIO(content))
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)
    return target


def _runs_of(source: Any) -> tuple[Path, list[RunFolder], list[Path]]:
    """The folder that the archive mirrors, the runs in it, and all files there are."""
    path = Path(source) if isinstance(source, str | Path) else None
    if path is not None and path.is_dir() and not (path / "experiment.json").exists():
        files = _files_in(path)
        found = [RunFolder.open(file.parent) for file in sorted(files) if file.name == "experiment.json"]
        if not found:
            raise InputError(f"{path} holds no runs", remedy="pass a run's folder, or one that has runs in it")
        return path, found, files
    runs = [RunFolder(run.path.resolve()) for run in folders(source)]
    if len({run.path.parent for run in runs}) > 1:
        raise InputError("these runs are in several folders", remedy="pack each, or move them into one")
    return runs[0].path.parent, runs, [file for run in runs for file in _files_in(run.path)]


def _files_in(folder: Path) -> list[Path]:
    """All files below a folder, but those that a process was still making when it was killed."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _about(name: str, root: Path, runs: Sequence[RunFolder], note: str) -> dict[str, Any]:
    environments = [found for run in runs if (found := run.environment)]  # a run that never began has none
    began = min(run.state.started_s for run in runs)
    return {
        "format": FORMAT,
        "name": name,
        "note": note,
        "recorded": time.strftime("%Y-%m-%d", time.gmtime(began)),
        "targets": sorted({found["target"]["label"] for found in environments}),
        "tvm": sorted({found["versions"]["apache-tvm"] for found in environments}),
        "models": sorted({Path(run.experiment.model).stem for run in runs}),
        "trials": sum(run.state.trials for run in runs),
        "tuning_s": sum(run.state.elapsed_s for run in runs),
        "runs": [run.path.relative_to(root).as_posix() for run in runs],
    }


def _members(root: Path, files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Names and contents for the archive; files of the same name side by side, which compresses best."""
    kept = [file for file in files if file.suffix in (".json", ".jsonl")]
    for file in sorted(kept, key=lambda file: (file.name.startswith(_DATABASE), file.name, str(file))):
        content = file.read_bytes()
        if file.name == "environment.json":
            content = orjson.dumps({name: value for name, value in orjson.loads(content).items() if name != "command"})
        if not file.name.startswith(_DATABASE):  # text in base 64 looks like paths
            parts = content.splitlines(keepends=True) if file.suffix == ".jsonl" else [content]
            content = b"".join(map(without_folders, parts))
        yield file.relative_to(root).as_posix(), content


def recorded(name: str | Path, *, database: bool = False, cache: str | Path | None = None) -> Recording:
    """A recording of data/recorded_runs by name, or any archive of `pack` by path, unpacked into the user's cache.

    `database` unpacks TVM's databases too: what is needed to compile, to transfer from the runs or to go on with them.
    `cache` is another folder to unpack into. Raises InputError for an unknown name, RecordError for a damaged archive,
    one that a newer tvmlab made, or one that names runs outside of itself.
    """
    path = _archive(name)
    content = path.read_bytes()
    parent = Path(cache) if cache is not None else Path(platformdirs.user_cache_dir("tvmlab")) / "recorded"
    stem = f"{path.name.removesuffix(_ENDING)}-{sha256(content).hexdigest()[:12]}"
    home = parent / (f"{stem}-database" if database else stem)
    if not home.is_dir():
        _unpack(path, content, home, database)
    return Recording(home, _checked(path, orjson.loads((home / _ABOUT).read_bytes())))


def recordings() -> pd.DataFrame:
    """What is in data/recorded_runs, by name: models, targets, runs, kB, recorded (date), trials, tuning_s, note."""
    rows = []
    for path in sorted(data_dir("recorded_runs").glob(f"*{_ENDING}")):
        about = _read_about(path)
        shown = {"models": ", ".join(about["models"]), "targets": ", ".join(about["targets"])}
        numbers = {name: about[name] for name in ("recorded", "trials", "tuning_s", "note")}
        size = {"runs": len(about["runs"]), "kB": round(path.stat().st_size / 1000)}
        rows.append({"name": about["name"], **shown, **size, **numbers})
    columns = ["name", "models", "targets", "runs", "kB", "recorded", "trials", "tuning_s", "note"]
    return pd.DataFrame(rows, columns=columns).set_index("name")


def gpu_recordings() -> list[Recording]:
    """What sessions on a GPU brought back, data/gpu-<card>/runs.tar.xz (docs/gpu.md); empty as long as there was none.

    >>> [recording.label for recording in gpu_recordings()]
    []
    """
    return [recorded(path) for path in sorted(data_dir("recorded_runs").parent.glob(f"gpu-*/runs{_ENDING}"))]


def _archive(name: str | Path) -> Path:
    if str(name).endswith(_ENDING):
        if Path(name).is_file():
            return Path(name)
        raise InputError(f"there is no recording {str(name)!r}", remedy="pass the path of an archive of tvmlab.pack")
    folder = data_dir("recorded_runs")
    path = folder / f"{name}{_ENDING}"
    if not path.is_file():
        known = sorted(found.name.removesuffix(_ENDING) for found in folder.glob(f"*{_ENDING}"))
        raise InputError(
            f"there is no recording {str(name)!r}",
            remedy=f"there are {', '.join(known) or 'none yet'}; record_runs.py makes those of the notebooks",
        )
    return path


def _read_about(path: Path) -> dict[str, Any]:
    """recording.json, without unpacking what follows it."""
    try:
        with tarfile.open(path, "r:xz") as archive:
            first = archive.next()
            content = archive.extractfile(first) if first is not None and first.name == _ABOUT else None
            return _checked(path, orjson.loads(content.read()) if content else None)
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError, orjson.JSONDecodeError) as error:
        raise _damaged(path, error) from error


def _unpack(path: Path, content: bytes, home: Path, database: bool) -> None:
    """Unpack beside the place and move there in one step: a folder that is there is whole."""
    _read_about(path)
    home.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=home.parent))
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:xz") as archive:
            for member in archive:
                if not database and Path(member.name).name.startswith(_DATABASE):
                    break  # the databases are last
                archive.extract(member, scratch, filter="data")
        scratch.rename(home)
    except (EOFError, lzma.LZMAError, tarfile.TarError) as error:
        raise _damaged(path, error) from error
    except OSError:
        if not home.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _checked(path: Path, about: Any) -> dict[str, Any]:
    known = about.get("format") if isinstance(about, dict) else None
    if isinstance(known, int) and known > FORMAT:
        raise RecordError(
            f"{path} was made in format {known}, this tvmlab reads up to {FORMAT}", remedy="install a newer tvmlab"
        )
    if known != FORMAT or not {"name", "runs"} <= about.keys():
        raise RecordError(f"{path} is not a recording", remedy="make one with tvmlab.pack")
    runs = about["runs"]
    if not isinstance(runs, list) or not all(isinstance(name, str) for name in runs):
        raise RecordError(f"{path} does not list its runs", remedy="make another with tvmlab.pack")
    if outside := [name for name in runs if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise RecordError(
            f"{path} names a run that is not in it, {outside[0]!r}",
            remedy="do not trust it; make another with tvmlab.pack",
        )
    return about


def _damaged(path: Path, error: Exception) -> RecordError:
    return RecordError(f"{path} is damaged ({error})", remedy="restore it, with git for one that came with tvmlab")
