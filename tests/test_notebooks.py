"""Every notebook runs top to bottom with no click, with a small budget, and is committed without outputs."""

import os
from pathlib import Path

import nbformat
import papermill
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SMALL = {"model": "squeezenet", "max_trials": 8, "time_limit_s": 60.0}


def ids(path):
    return path.stem


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_is_committed_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_runs_headless(path, tmp_path, monkeypatch):
    monkeypatch.setenv("TVMLAB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    known = papermill.inspect_notebook(path)
    small = {name: value for name, value in SMALL.items() if name in known}
    done = papermill.execute_notebook(
        path, tmp_path / path.name, parameters=small, cwd=tmp_path, progress_bar=False
    )
    shown = [
        kind
        for cell in done.cells
        for output in cell.get("outputs", [])
        for kind in output.get("data", {})
    ]
    assert "image/png" in shown
    runs = os.listdir(tmp_path / "runs")
    assert all(
        '"status": "done"' in (tmp_path / "runs" / run / "state.json").read_text() for run in runs
    )


def test_notebook_01_shows_a_live_view_a_form_and_the_comparison(): ...
