"""What a run was made on: machine, versions, git state. Written to environment.json."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

__all__ = ["describe", "shared"]

_PACKAGES = ("tvmlab", "apache-tvm", "apache-tvm-ffi", "xgboost-cpu", "onnx", "onnxruntime", "numpy")


def describe() -> dict[str, Any]:
    """Machine, versions and git state as plain JSON."""
    return {
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "cores": psutil.cpu_count(logical=False),
            "memory_bytes": psutil.virtual_memory().total,
            "load_average": psutil.getloadavg()[0],
        },
        "versions": {name: _version(name) for name in _PACKAGES},
        "git": _git_state(),
        "command": sys.argv,
    }


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


def _git_state() -> dict[str, Any] | None:
    """Commit and whether it was changed, of the checkout the run was started in; None outside one."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git("status", "--porcelain"))} if commit else None
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10).stdout.strip()
