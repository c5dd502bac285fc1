"""Every notebook runs top to bottom with no click, with a small budget, and is committed without outputs."""

from pathlib import Path

import nbformat
import papermill
import pytest

from tvmlab.records import RunFolder

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SMALL = {"model": "squeezenet", "max_trials": 8, "time_limit_s": 60.0}


def stem(path):
    return path.stem


def test_the_first_notebook_is_there():
    assert "01_tune_a_model" in map(stem, NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stem)
def test_is_committed_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=stem)
def test_runs_headless(path, tmp_path, monkeypatch):
    """papermill raises for a cell that does; every run that was started has ended well."""
    monkeypatch.setenv("TVMLAB_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # conftest's is for this process; the kernel draws inline
    small = {name: SMALL[name] for name in papermill.inspect_notebook(path) if name in SMALL}
    done = papermill.execute_notebook(path, tmp_path / path.name, parameters=small, cwd=tmp_path, progress_bar=False)
    kinds = [kind for cell in done.cells for out in cell.get("outputs", []) for kind in out.get("data", {})]
    assert "image/png" in kinds and "text/html" in kinds
    runs = [RunFolder.open(run) for run in (tmp_path / "runs").iterdir()]
    assert runs
    for run in runs:
        assert run.status == "done" and run.state.trials > 0
