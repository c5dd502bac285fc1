"""The RFC's table of selective tuning and ours beside it: loaded as they are, and drawn."""

import json
import re
import shutil

import numpy as np
import pytest
from matplotlib.figure import Figure

from tvmlab import datafiles, published_selective, zoo
from tvmlab.plots_published import selective_beside

ROW = {
    "model": "resnet50", "seed": 0, "tasks": 29, "representatives": 9, "poor": 2, "full_s": 200.0, "selective_s": 60.0,
    "time": 0.3, "full_trials": 1300, "selective_trials": 400, "full_ms": 33.0, "selective_ms": 30.0,
    "onnxruntime_ms": 38.0, "performance": 1.1, "performance_low": 1.05, "performance_high": 1.15,
}  # fmt: skip


@pytest.fixture
def rows(monkeypatch, tmp_path):
    """`rows(row, ...)` puts rows beside a copy of the RFC's table, and has them read from there."""
    shutil.copy(datafiles.data_dir("selective") / "rfc4188.csv", tmp_path)
    monkeypatch.setattr(published_selective, "data_dir", lambda part: tmp_path)
    return lambda *found: (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def test_the_table_is_the_rfcs_and_its_ratios_are_those_it_states():
    table = published_selective.rfc()
    assert len(table) == 7 and set(table["zoo"]) <= set(zoo.ZOO)
    assert (100 * table["time"] - table["stated_time_percent"]).abs().max() < 1
    assert (100 * table["performance"] - table["stated_performance_percent"]).abs().max() < 1


def test_what_is_said_of_it_follows_from_it():
    performance = 100 * published_selective.rfc()["performance"]
    said = published_selective.findings()
    assert f"Mean performance {performance.mean():.0f} %" in said and "as stated" in said and "not as" not in said
    assert f"{(performance < 100).sum()} of 7 models are slower" in said


def test_every_column_is_explained():
    readme = (datafiles.data_dir("selective") / "README.md").read_text()
    explained = set(re.findall(r"`(\w+)`", readme))
    table = published_selective.rfc().drop(columns=["zoo", "time", "performance"])
    assert {*table.columns, *published_selective.ours().columns} <= explained


def test_ours_are_empty_until_they_are_measured(rows):
    assert published_selective.ours().empty
    beside = published_selective.beside()
    assert len(beside) == 7 and beside["time"].isna().all() and not beside["seeds"].any()


def test_ours_stand_beside_the_rfcs_with_the_median_over_the_seeds(rows):
    rows(*(ROW | {"seed": seed, "time": time} for seed, time in enumerate((0.2, 0.3, 0.7))), ROW | {"model": "alexnet"})
    assert len(published_selective.ours()) == 4
    beside = published_selective.beside().set_index("zoo")
    assert beside.loc["resnet50", ["time", "performance", "seeds"]].tolist() == [0.3, 1.1, 3]
    assert "alexnet" not in beside.index and beside["time"].notna().sum() == 1


def test_each_pair_of_points_is_drawn(rows):
    rows(ROW)
    table = published_selective.beside()
    ax = selective_beside(table, ax=Figure().subplots())
    theirs, ours = (next(line for line in ax.lines if line.get_marker() == mark) for mark in "os")
    assert np.array_equal(theirs.get_xdata(), table["rfc_time"])
    assert np.array_equal(theirs.get_ydata(), table["rfc_performance"])
    assert (list(ours.get_xdata()), list(ours.get_ydata())) == ([0.3], [1.1])
    assert {text.get_text() for text in ax.texts} == set(table["model"])
