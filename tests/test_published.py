"""The published numbers: loaded as they are, and what is said of them follows from them."""

import pandas as pd
import pytest

from tvmlab import datafiles, published
from tvmlab.core import InputError, MissingTool


def changed(monkeypatch, name, change):
    """Have one table read differently."""
    real = published.table

    def table(asked):
        found = real(asked)
        return change(found) if asked == name else found

    monkeypatch.setattr(published, "table", table)


@pytest.mark.parametrize("name", published.tables())
def test_every_table_loads_and_is_explained(name):
    found = published.table(name)
    assert len(found) and len(set(found.columns)) == len(found.columns)
    readme = (datafiles.data_dir("report") / "README.md").read_text()
    assert f"`{name}.csv" in readme


def test_an_unknown_table_names_the_others():
    with pytest.raises(InputError, match=r"no published table 'trails': there are .*trials"):
        published.table("trails")


def test_without_the_data_folder_it_says_where_they_are(monkeypatch, tmp_path):
    monkeypatch.setattr(datafiles, "__file__", str(tmp_path / "tvmlab" / "datafiles.py"))
    with pytest.raises(MissingTool, match=r"data/report is missing: work in a checkout"):
        published.tables()


def test_the_cells_are_the_published_pairs_beside_their_targets_own_numbers():
    cells, pairs = published.cells(), published.table("transfer_pairs")
    assert cells["transferred_ms"].tolist() == pairs["tt_ms"].tolist()
    row = cells.query("arm == 'ansor' and model == 'alexnet' and source == 'googlenet'").iloc[0]
    own = published.table("tuning_info").query("run == 'ansor' and model == 'alexnet'").iloc[0]
    assert (row["untuned_ms"], row["tuned_ms"]) == (own["untuned_ms"], own["tuned_ms"])
    assert row["ratio"] == row["transferred_ms"] / row["untuned_ms"]


@pytest.mark.parametrize("name", published.FINDINGS)
def test_every_finding_has_rows_and_one_sentence(name):
    found = published.FINDINGS[name]()
    assert len(found.frame) and found.sentence.endswith(".") and "nan" not in found.sentence
    assert published.findings().loc[name, "sentence"] == found.sentence


def test_all_transferred_models_are_slower():
    found = published.slower_than_untuned()
    assert (found.frame["ratio"] > 1).all() and found.sentence.startswith(f"All {len(found.frame)} ")


def test_the_sentences_follow_the_numbers(monkeypatch):
    """Were the data different, so would be what is said."""
    changed(monkeypatch, "transfer_pairs", lambda table: table.assign(tt_ms=table["tt_ms"].where(table.index > 0, 1.0)))
    count = len(published.cells())
    assert published.slower_than_untuned().sentence.startswith(f"{count - 1} of {count} ")


def test_a_second_measurement_is_not_called_one(monkeypatch):
    changed(monkeypatch, "transfer_pairs", lambda table: pd.concat([table, table.assign(repeat=1)]))
    assert "2 times" in published.one_measurement().sentence


def test_the_arms_are_told_apart_by_their_time_stamps():
    frame = published.independent_searches().frame
    ends = frame[frame["run"] == "ansor"]["last_record"].max()
    assert set(frame["model"]) == {"resnet50", "alexnet", "googlenet"}
    assert frame[frame["run"] == "ansor+droplet"]["first_record"].min() > ends


def test_the_winning_pair_used_no_droplet_schedule():
    frame = published.winning_pair().frame
    assert frame["change"].is_monotonic_increasing and frame.iloc[0]["change"] < 0
    assert frame.iloc[0]["droplet_schedules"] == 0
    assert "no schedules that droplet had changed" in published.winning_pair().sentence


def test_a_droplet_schedule_in_the_winning_pair_would_be_counted(monkeypatch):
    column = "transferred_from_droplet_record"
    changed(monkeypatch, "transfer_pairs", lambda table: table.assign(**{column: 1}))
    assert "with 1 schedule that droplet had changed" in published.winning_pair().sentence


def test_placeholders_and_error_marks_are_no_measurements():
    frame = published.measured_kernels().frame.set_index("status")
    assert (frame.drop("valid")["different_values"] == 1).all()
    assert frame.loc["valid", "different_values"] == frame.loc["valid", "rows"]
    assert frame["rows"].sum() == len(published.table("kernels"))


def test_failed_trials_are_those_without_a_latency():
    trials = published.table("trials")
    assert published.failed_trials().frame["failed"].sum() == trials["latency_s"].isna().sum()
