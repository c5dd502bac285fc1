r"""JSON without the folders of absolute paths: which file it was may be told, where somebody keeps it is private.

>>> without_folders(b'{"model": "/home/jo hn/nets/m.onnx", "message": "no \\n/data/x/y.so (/conv1/Conv_output_0)"}')
b'{"model":"m.onnx","message":"no \\ny.so (/conv1/Conv_output_0)"}'
"""

from __future__ import annotations

import os
import re
from pathlib import PurePosixPath
from typing import Any

import orjson

__all__ = ["without_folders"]

# Fields that hold a name or a path, never a sentence: what is absolute there is a path from end to end.
_NAMING = frozenset({"model", "models", "source", "sources", "warm_start", "pool"})
_HOMES = frozenset({"home", "Users"})
_TOP = _HOMES | {"root", "tmp", "var", "opt", "usr", "mnt", "media", "data", "scratch", "private", "srv", "Volumes"}
_NODE = re.compile(r"[A-Z][A-Za-z]*(_\d+)?(_output_\d+)?")  # what the name of an ONNX node or tensor ends with

_NAME = r"""(?:[^\s/\\"'`<>|:;]|\b'\b)+"""
_WORD = r"""(?:[^\s/\\"'`<>|:;,()\[\]{}]|\b'\b)+"""
# A name with spaces is told from a sentence by its words: few, none of which ends as a file or a sentence does.
_SPACED = rf"(?:(?![^\s/]*\.\w{{0,5}}\s){_WORD}[ ]){{1,3}}{_WORD}"
_PATH = re.compile(
    r"(?P<url>\w+://[^/\s]\S*)"
    r"|(?:(?<![\w.)\]/])|(?<=\\[nrt]))(?:~\w*)?/+"  # not amid a relative path or fraction; \n may be two letters
    rf"(?P<folders>(?:(?:{_NAME}|{_SPACED})/+)+)(?P<last>{_WORD})"
)


def without_folders(content: bytes) -> bytes:
    """JSON, or a line of it, with the last part of each absolute path only; ONNX nodes keep their names.

    What is not whole is read as text: half a line that a killed process left.
    """
    if b"/" not in content:
        return content
    try:
        found = orjson.loads(content)
    except orjson.JSONDecodeError:
        text = content.decode(errors="surrogateescape")
        return _PATH.sub(_last, text).encode(errors="surrogateescape")
    bare = _bare(found)
    if bare == found:
        return content
    return orjson.dumps(bare) + (b"\n" if content.endswith(b"\n") else b"")


def _bare(value: Any, field: str = "") -> Any:
    if isinstance(value, dict):
        inside = {key: field if field in _NAMING else key for key in value}
        return {_text(key, field): _bare(item, inside[key]) for key, item in value.items()}
    if isinstance(value, list):
        return [_bare(item, field) for item in value]
    return _text(value, field) if isinstance(value, str) else value


def _text(text: str, field: str) -> str:
    if field not in _NAMING or not text.startswith(("/", "~")):
        return _PATH.sub(_last, text)
    path = PurePosixPath(text)
    return "~" if path.parent.name in _HOMES and len(path.parts) == 3 else path.name


def _last(match: re.Match[str]) -> str:
    """What is left of a path that was found in a text."""
    folders, last = match["folders"], match["last"]
    if match["url"] or _is_node(folders, last):
        return match[0]
    return "~" if folders.strip("/") in _HOMES else last


def _is_node(folders: str, last: str) -> bool:
    """Whether a path names an ONNX node, as exporters call them, and no file of this machine or of another."""
    top = folders.partition("/")[0]
    is_there = os.path.exists(f"/{top}")  # noqa: PTH110 (Path.exists raises for a name that is too long)
    return _NODE.fullmatch(last) is not None and top not in _TOP and not is_there
