"""Every notebook runs top to bottom with no click, and is committed without outputs.

The first one measures, with a small budget; the others show what is in data/ and measure nothing.
"""

from pathlib import Path

import nbformat
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from tvmlab.datafiles import data_dir
from tvmlab.records import RunFolder

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
FIRST, *SHOWN = NOTEBOOKS
RECORDED = [path for path in SHOWN if not path.stem.startswith("07")]  # that one shows rows of data/selective
SMALL = {"model": "squeezenet", "max_trials": 8, "time_limit_s": 60.0}


def stem(path):
    return path.stem


def recordings_of(path):
    """Those that a notebook opens."""
    lines = [line for cell in code_of(path) for line in cell.splitlines() if "tvmlab.recorded(" in line]
    return [line.split('"')[1] for line in lines]


def code_of(path):
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_they_are_there():
    assert [stem(path)[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06", "07", "08"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stem)
def test_is_committed_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.parametrize("path", SHOWN, ids=stem)
def test_measures_nothing_unless_asked(path):
    assert "LIVE = False" in "".join(code_of(path)[:1])
    assert papermill.inspect_notebook(path)["LIVE"]["default"] == "False"


@pytest.mark.parametrize("path", RECORDED, ids=stem)
def test_opens_recordings_that_the_readme_explains(path):
    opened = recordings_of(path)
    readme = (data_dir("recorded_runs") / "README.md").read_text()
    assert opened
    for name in opened:
        (row,) = [line for line in readme.splitlines() if line.startswith(f"| `{name}` |")]
        assert stem(path)[:2] in row.split("|")[-2]


def executed(path, tmp_path, monkeypatch, parameters):
    """The outputs of a notebook, with its runs and recordings under tmp_path; papermill raises for a cell that does.

    conftest's MPLBACKEND is for this process; the kernel draws inline.
    """
    monkeypatch.setenv("TVMLAB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    done = papermill.execute_notebook(path, tmp_path / path.name, parameters, cwd=tmp_path, progress_bar=False)
    outputs = [out for cell in done.cells for out in cell.get("outputs", [])]
    kinds = [kind for out in outputs for kind in out.get("data", {})]
    assert "image/png" in kinds and "text/html" in kinds
    assert not [out for out in outputs if out.get("name") == "stderr" and "Warning" in out["text"]]
    return outputs


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_one_tunes(tmp_path, monkeypatch):
    """Every run that was started has ended well."""
    small = {name: SMALL[name] for name in papermill.inspect_notebook(FIRST) if name in SMALL}
    executed(FIRST, tmp_path, monkeypatch, small)
    runs = [RunFolder.open(run) for run in (tmp_path / "runs").iterdir()]
    assert runs
    for run in runs:
        assert run.status == "done" and run.state.trials > 0


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("path", SHOWN, ids=stem)
def test_shows_what_was_recorded_or_says_what_was_not(path, tmp_path, monkeypatch):
    there = {archive.name.removesuffix(".tar.xz") for archive in data_dir("recorded_runs").glob("*.tar.xz")}
    missing = [name for name in recordings_of(path) if name not in there]
    if missing:
        with pytest.raises(PapermillExecutionError, match=f"no recording '{missing[0]}'.*record_runs.py makes"):
            executed(path, tmp_path, monkeypatch, {})
        return
    outputs = executed(path, tmp_path, monkeypatch, {})
    said = "".join(out["text"] for out in outputs if out.get("name") == "stdout")
    said += "".join(out["data"].get("text/markdown", "") for out in outputs if "data" in out)
    assert len(said) > 200 and "nan" not in said
    assert not (tmp_path / "runs").exists() and not (tmp_path / "studies").exists()
