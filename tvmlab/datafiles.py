"""Where the data that come with the project are: published numbers, recorded runs and spaces, benchmarks' rows."""

from __future__ import annotations

from pathlib import Path

from tvmlab.core import MissingTool

__all__ = ["data_dir"]


def data_dir(part: str) -> Path:
    """A folder of `data/`: "report", "selective", "recorded_runs", "recorded_spaces" or "benchmarks".

    The data come with the repository, not with an installed package. Raises MissingTool where they are not there.

    >>> data_dir("report").name
    'report'
    """
    folder = Path(__file__).parent.parent / "data" / part
    if not folder.is_dir():
        raise MissingTool(
            f"the data folder {folder} is missing",
            remedy="work in a checkout of tvmlab's repository: its data/ is not part of an installed package",
        )
    return folder
