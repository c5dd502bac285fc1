"""What a run was made on: machine, versions, git state. Written to environment.json."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

__all__ = ["describe", "shared", "tvm_version"]

_PACKAGES = ("tvmlab", "apache-tvm", "apache-tvm-ffi", "xgboost-cpu", "onnx", "onnxruntime", "numpy")
_PACKAGE = Path(__file__).resolve().parent


def describe() -> dict[str, Any]:
    """Machine, versions and git state as plain JSON: `git` of the working directory, `tvmlab_git` of tvmlab itself."""
    return {
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "cores": psutil.cpu_count(logical=False),
            "memory_bytes": psutil.virtual_memory().total,
            "load_average": psutil.getloadavg()[0],
        },
        "versions": {name: _version(name) for name in _PACKAGES},
        "git": _git_state(Path()),
        "tvmlab_git": _tvmlab_git(),
        "command": sys.argv,
    }


@cache
def tvm_version() -> str:
    """The version of TVM that is installed."""
    return _version("apache-tvm") or "unknown"


def shared(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What of environment.json a report shows: not the command, and of a model's file only the name.

    >>> shared({"model": {"source": "/home/me/net.onnx"}, "command": ["/home/me/tune.py"]})
    {'model': {'source': 'net.onnx'}}
    """
    shown = {name: value for name, value in facts.items() if name != "command"}
    if source := shown.get("model", {}).get("source"):
        shown["model"] = shown["model"] | {"source": Path(source).name}
    return shown


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether it was changed, of the checkout that a folder is in; None outside one."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git(folder, "status", "--porcelain"))} if commit else None
    except (OSError, subprocess.SubprocessError):
        return None


def _tvmlab_git() -> dict[str, Any] | None:
    """That of tvmlab's own checkout; None if it is an installed package, which may lie in anybody's repository."""
    try:
        top = _git(_PACKAGE, "rev-parse", "--show-toplevel")
    except (OSError, subprocess.SubprocessError):
        return None
    return _git_state(_PACKAGE) if top and Path(top) == _PACKAGE.parent else None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
