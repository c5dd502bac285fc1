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
    "engine": "autotvm", "steps": ["AutoTVM(kernel_trials=48)", "Selective(top=3)"], "time_limit_s": None,
    "device": "Some CPU, 2 cores", "machine": {"system": "Linux-6", "python": "3.11.7", "cores": 2},
    "versions": {"tvmlab": "0.1.0", "apache-tvm": "0.27.0", "onnxruntime": "1.31.1", "numpy": "2.4.6"},
}  # fmt: skip
BEFORE = {name: value for name, value in ROW.items() if name != "device"}  # as rows were written at first


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
    assert published_selective.ours().empty and published_selective.experiments().empty
    beside = published_selective.beside()
    assert len(beside) == 7 and beside["time"].isna().all() and not beside["seeds"].any()
    assert published_selective.source() == "ours: none"
    (said,) = published_selective.our_findings()
    assert said.startswith("None of these models is measured here yet: python benchmarks/selective.py --rows")


def test_ours_stand_beside_the_rfcs_with_the_median_over_the_seeds(rows):
    rows(*(ROW | {"seed": seed, "time": time} for seed, time in enumerate((0.2, 0.3, 0.7))), ROW | {"model": "alexnet"})
    assert len(published_selective.ours()) == 4
    beside = published_selective.beside().set_index("zoo")
    assert beside.loc["resnet50", ["time", "performance", "seeds"]].tolist() == [0.3, 1.1, 3]
    assert "alexnet" not in beside.index and beside["time"].notna().sum() == 1


def test_ours_say_what_was_searched_on_what_with_what(rows):
    rows(ROW)
    (row,) = published_selective.ours().to_dict("records")
    assert row["steps"] == "AutoTVM(kernel_trials=48) / Selective(top=3)" and row["experiment"] == 1
    assert (row["machine"], row["versions"]) == ("Some CPU, 2 cores", "tvmlab 0.1.0, TVM 0.27.0, onnxruntime 1.31.1")
    for shown in (published_selective.beside().dropna(subset="time"), published_selective.experiments()):
        assert (shown["steps"] == row["steps"]).all() and (shown["machine"] == row["machine"]).all()
    assert published_selective.source() == f"ours: {row['steps']}; {row['machine']}; {row['versions']}"


def test_a_row_without_its_device_says_what_it_has_of_the_machine(rows):
    rows(BEFORE)
    assert published_selective.ours()["machine"].tolist() == ["2 cores of an unnamed processor, Linux-6"]


@pytest.mark.parametrize(
    "other",
    [
        {"steps": ["AutoTVM(kernel_trials=8)", "Selective(top=3)"]},
        {"time_limit_s": 60.0},
        {"device": "Another CPU, 4 cores"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_no_median_is_over_different_experiments(rows, other):
    seeds = [ROW | {"seed": seed, "time": 0.2} for seed in (0, 1)]
    rows(*seeds, ROW | other | {"time": 0.8}, ROW | other | {"model": "squeezenet", "time": 0.6})
    assert published_selective.ours()["experiment"].tolist() == [1, 1, 2, 2]
    table = published_selective.experiments()
    assert table.index.tolist() == [1, 2] and table[["models", "seeds", "rows"]].values.tolist() == [
        [1, 2, 2],
        [2, 1, 2],
    ]
    beside = published_selective.beside().dropna(subset="time").set_index(["zoo", "experiment"])
    assert beside["time"].to_dict() == {("resnet50", 1): 0.2, ("resnet50", 2): 0.8, ("squeezenet", 2): 0.6}
    assert beside["seeds"].to_dict() == {("resnet50", 1): 2, ("resnet50", 2): 1, ("squeezenet", 2): 1}
    assert len(published_selective.beside()) == 8  # five models that neither has
    first, second = published_selective.our_findings()
    assert "1 of 7 models, 2 seeds each" in first and "110% of full tuning's performance in 20% of its time" in first
    assert "2 of 7 models, 1 seed each" in second and "in 70% of its time" in second
    assert ". experiment 2: " in published_selective.source()
    assert ("at most 60 s each" in published_selective.source()) == ("time_limit_s" in other)


def test_versions_that_differ_within_an_experiment_are_all_named(rows):
    rows(ROW, ROW | {"seed": 1, "versions": {"apache-tvm": "0.28.0"}})
    (found,) = published_selective.experiments()["versions"]
    assert found == "tvmlab 0.1.0, TVM 0.27.0, onnxruntime 1.31.1 or TVM 0.28.0"


def test_each_pair_of_points_is_drawn(rows):
    rows(ROW)
    table = published_selective.beside()
    ax = selective_beside(table, ax=Figure().subplots())
    theirs, ours = (next(line for line in ax.lines if line.get_marker() == mark) for mark in "os")
    assert np.array_equal(theirs.get_xdata(), table["rfc_time"])
    assert np.array_equal(theirs.get_ydata(), table["rfc_performance"])
    assert (list(ours.get_xdata()), list(ours.get_ydata())) == ([0.3], [1.1])
    assert {text.get_text() for text in ax.texts} == set(table["model"])


def test_each_experiment_has_its_own_points(rows):
    rows(ROW, ROW | {"device": "Another CPU", "time": 0.8})
    ax = selective_beside(published_selective.beside(), ax=Figure().subplots())
    shown = {line.get_label(): list(line.get_xdata()) for line in ax.lines if line.get_marker() in "sD"}
    assert shown == {"tvmlab, experiment 1": [0.3], "tvmlab, experiment 2": [0.8]}
    assert len(ax.texts) == 7  # a model is named once
