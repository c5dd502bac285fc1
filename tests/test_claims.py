"""Claims: on timings whose truth is known, what is said is true, and what cannot be known is not said."""

from __future__ import annotations

import numpy as np
import pytest

from tvmlab import Ansor, Droplet, Study, StudyFolder, Timed, TransferTuning
from tvmlab.claims import arm_pairs, compare_arms, repeats_needed, study_claims
from tvmlab.core import InputError

ARMS = {
    "search": [Ansor()],
    "search+droplet": [Ansor(), Droplet()],
    "longer": [Ansor(), Timed(Ansor(), 9.0)],
    "transfer": [TransferTuning("$source:search")],
}


@pytest.fixture
def make_study(tmp_path):
    """`make_study(true latency of a cell in ms, ...)` writes a study whose timings scatter around it."""

    def make(truth, *, models=("alexnet", "squeezenet"), seeds=8, noise=0.01, repeats=9, skip=()):
        design = Study(models=models, arms=ARMS, seeds=range(seeds), repeats=repeats)
        study = StudyFolder.create(tmp_path / "study", design, {"label": "here", "attrs": {}})
        random = np.random.default_rng(0)
        for seed in range(seeds):
            for model in models:
                names = {cell.name: cell for cell in study.cells_of(model, seed) if (cell.arm, seed) not in skip}
                medians = {name: truth(cell) * random.lognormal(sigma=noise) for name, cell in names.items()}
                medians |= {"untuned": 1000.0, "onnxruntime": 10.0}
                study.write_comparison(model, seed, {"subjects": {
                    name: {"samples_ms": list(median * random.lognormal(sigma=0.002, size=repeats))}
                    for name, median in medians.items()
                }})  # fmt: skip
        return study

    return make


def row_of(claims, model, source=""):
    found = claims[(claims["model"] == model) & (claims["source"] == source)]
    assert len(found) == 1
    return found.iloc[0]


def test_a_real_difference_is_claimed_with_its_interval(make_study):
    study = make_study(lambda cell: 8.0 if cell.arm == "search+droplet" else 10.0)
    found = compare_arms(study, "search+droplet", "search")
    assert list(found["model"]) == ["alexnet", "squeezenet", "all"]
    for row in found.itertuples():
        assert row.low < 0.8 < row.high and row.ratio == pytest.approx(0.8, rel=0.02)
        assert row.p_holm <= 0.05 and row.sentence.endswith("it is faster.")
    assert row_of(found, "all")["seeds"] == 16 and row_of(found, "alexnet")["seeds"] == 8
    assert row_of(found, "alexnet")["p_holm"] == pytest.approx(2 * 2 / 2**8)  # Holm over two cells
    turned = compare_arms(study, "search", "search+droplet")
    assert row_of(turned, "all")["sentence"].endswith("it is slower.")
    assert row_of(turned, "all")["ratio"] == pytest.approx(1 / row_of(found, "all")["ratio"])


def test_equals_are_said_to_differ_by_no_more_than_the_interval_allows(make_study):
    row = row_of(compare_arms(make_study(lambda cell: 10.0), "search+droplet", "search"), "all")
    assert row["low"] <= 1 <= row["high"] and row["p_value"] > 0.05
    largest = 100 * max(row["high"] - 1, 1 - row["low"])
    assert 0 < largest < 3
    assert f"no difference larger than {largest:.2g} % at 95%, so none that matters (3 %)" in row["sentence"]


def test_noise_that_hides_a_difference_is_admitted_with_what_would_be_needed(make_study):
    study = make_study(lambda cell: 10.0, noise=0.2)
    row = row_of(compare_arms(study, "search+droplet", "search"), "alexnet")
    assert "no difference is shown" in row["sentence"] and "none that matters" not in row["sentence"]
    # z = 2.24 (two cells) + 0.84, s = 0.2 sqrt(2), d = log 1.03: some 870 seeds, known from 8 only roughly.
    assert 250 < row["seeds_needed"] < 2500
    assert f"about {row['seeds_needed']:.0f} seeds would be needed" in row["sentence"]


@pytest.mark.parametrize(("seeds", "least", "all_said"), [(1, 7, "at least 6 are needed"), (5, 7, "it is faster")])
def test_too_few_seeds_conclude_nothing_however_large_the_difference(make_study, seeds, least, all_said):
    study = make_study(lambda cell: 1.0 if cell.arm == "search+droplet" else 10.0, seeds=seeds)
    found = compare_arms(study, "search+droplet", "search")
    row = row_of(found, "alexnet")
    assert np.isnan(row["low"]) and row["p_holm"] > 0.05
    assert f"{seeds} seed{'s' * (seeds > 1)} cannot show a difference at 95% over 2 cells" in row["sentence"]
    assert f"at least {least} are needed" in row["sentence"]
    assert row["timed_low"] < row["ratio"] < row["timed_high"] and "for these very models" in row["sentence"]
    assert all_said in row_of(found, "all")["sentence"]  # 2 or 10 pairs of model and seed


def test_too_few_repeats_have_no_interval_of_their_own(make_study):
    study = make_study(lambda cell: 1.0 if cell.arm == "search+droplet" else 10.0, seeds=1, repeats=5)
    row = row_of(compare_arms(study, "search+droplet", "search"), "alexnet")
    assert row["ratio"] == pytest.approx(0.1, rel=0.1) and np.isnan([row["timed_low"], row["timed_high"]]).all()
    assert "(too few timed repeats for an interval). Nothing can be said of other seeds" in row["sentence"]


def test_the_differences_of_one_model_do_not_stand_for_all(make_study):
    """Half as fast on one model, twice on the other: no claim over all, one on each."""
    speed = {"alexnet": 5.0, "squeezenet": 20.0}
    study = make_study(lambda cell: speed[cell.model] if cell.arm == "search+droplet" else 10.0)
    found = compare_arms(study, "search+droplet", "search")
    assert row_of(found, "alexnet")["sentence"].endswith("faster.")
    assert row_of(found, "squeezenet")["sentence"].endswith("slower.")
    assert row_of(found, "all")["p_value"] > 0.05


def test_an_arm_with_sources_is_paired_with_the_only_run_of_the_other(make_study):
    study = make_study(
        lambda cell: {"alexnet": 30.0, "vgg19": 20.0}.get(cell.source, 10.0), models=("alexnet", "squeezenet", "vgg19")
    )
    found = compare_arms(study, "transfer", "search")
    assert len(found) == 6 + 1
    assert row_of(found, "squeezenet", "alexnet")["ratio"] == pytest.approx(3, rel=0.03)
    assert row_of(found, "squeezenet", "vgg19")["ratio"] == pytest.approx(2, rel=0.03)
    assert "transfer against search, squeezenet from vgg19" in row_of(found, "squeezenet", "vgg19")["sentence"]
    overall = row_of(found, "all")  # two sources of a model and seed count once
    assert overall["seeds"] == 3 * 8


def test_a_slow_arm_is_paired_by_the_turns_that_both_took(make_study):
    """The machine becomes slower with each turn, and the untuned model takes only every fourth."""
    study = make_study(lambda cell: 10.0, seeds=1)
    found = study.comparison("alexnet", 0)
    base = {"untuned": 1000.0, "onnxruntime": 5.0}
    for name, subject in found["subjects"].items():
        subject["turns"] = list(range(0, 24, 4 if name == "untuned" else 1))
        subject["samples_ms"] = [base.get(name, 10.0) * (1 + turn) for turn in subject["turns"]]

    def told():
        study.write_comparison("alexnet", 0, found)
        row = row_of(compare_arms(study, "untuned", "search"), "alexnet")
        frame = study.frame().query("model == 'alexnet' and arm == 'search'").iloc[0]
        return [row["ratio"], frame["speedup"], frame["vs_onnxruntime"]]

    assert told() == [pytest.approx(100), pytest.approx(100), 2]
    samples = study.samples().query("model == 'alexnet' and arm == 'untuned'")
    assert samples["turn"].tolist() == list(range(0, 24, 4))
    for subject in found["subjects"].values():  # as it was written before the turns were
        del subject["turns"]
    medians = 1000 * 11 / (10 * 12.5)
    assert told() == [pytest.approx(medians), pytest.approx(medians), 2] and study.samples()["turn"].isna().all()


def test_the_interval_of_the_timed_repeats_is_of_the_ratio_beside_it(make_study):
    """One transfer was not timed, so one model and seed has one cell, the others two: each counts once all the same."""
    study = make_study(
        lambda cell: 5.0 if (cell.model, cell.arm) == ("alexnet", "transfer") else 10.0,
        models=("alexnet", "squeezenet", "vgg19"), seeds=1, noise=1e-6,
    )  # fmt: skip
    found = study.comparison("alexnet", 0)
    del found["subjects"][next(cell.name for cell in study.cells_of("alexnet", 0) if cell.arm == "transfer")]
    study.write_comparison("alexnet", 0, found)
    row = row_of(compare_arms(study, "transfer", "search"), "all")
    assert row["seeds"] == 3 and row["ratio"] == pytest.approx(0.5 ** (1 / 3), rel=0.01)
    assert row["timed_low"] <= row["ratio"] <= row["timed_high"]


def test_only_seeds_with_both_arms_count(make_study):
    study = make_study(lambda cell: 10.0, skip={("search", 0), ("search+droplet", 1)})
    assert row_of(compare_arms(study, "search+droplet", "search"), "alexnet")["seeds"] == 6


def test_the_baselines_are_arms_too(make_study):
    found = compare_arms(make_study(lambda cell: 10.0), "search", "untuned")
    assert row_of(found, "all")["ratio"] == pytest.approx(0.01, rel=0.02)


def test_the_pairs_of_a_study_are_those_it_was_made_for(make_study):
    study = make_study(lambda cell: 10.0)
    assert arm_pairs(study) == [
        ("search+droplet", "search"), ("longer", "search"), ("longer", "search+droplet"), ("transfer", "search"),
        ("search", "onnxruntime"),
    ]  # fmt: skip
    found = study_claims(study)
    assert list(dict.fromkeys(zip(found["a"], found["b"], strict=True))) == arm_pairs(study)
    assert found["sentence"].str.len().min() > 50


def test_chance_is_seldom_claimed(make_study):
    """Over many claims of equals, wrong ones are about as rare as stated."""
    study = make_study(lambda cell: 10.0, models=[f"m{number}.onnx" for number in range(12)], seeds=7)
    found = compare_arms(study, "search+droplet", "search")
    cells = found[found["model"] != "all"]
    assert (cells["p_value"] <= 0.05).sum() <= 2 and (cells["p_holm"] <= 0.05).sum() == 0


def test_repeats_needed_follow_from_the_scatter(make_study):
    study = make_study(lambda cell: 10.0, seeds=1)
    found = repeats_needed(study, relative_width=0.02)
    assert set(found["arm"]) == {*list(ARMS)[1:], "onnxruntime"} and (found["repeats"] == 9).all()
    assert found["enough"].all() and (found["needed"] <= 9).all()  # 0.2 % of scatter
    tight = repeats_needed(study, relative_width=0.0005)
    assert not tight["enough"].any() and (tight["needed"] > 9).all()


def test_what_drifts_for_both_needs_no_more_repeats(make_study):
    """Half of the turns are twice as slow, for every subject: no median is known, and every ratio is."""
    study = make_study(lambda cell: 10.0, models=["alexnet", "squeezenet"], seeds=1, repeats=12)
    for model in study.definition.models:
        kept = study.comparison(model, 0)
        for subject in kept["subjects"].values():
            subject["samples_ms"] = [ms * (1 + n % 2) for n, ms in enumerate(subject["samples_ms"])]
            subject["turns"] = list(range(12))
        study.write_comparison(model, 0, kept)
    assert repeats_needed(study, relative_width=0.02)["enough"].all()


def test_repeats_needed_of_arms_with_sources_and_without(tmp_path):
    """The first arm has a source, the other and onnxruntime have none."""
    arms = {"transfer": [TransferTuning("$source:search")], "search": [Ansor(max_trials=8)]}
    study = StudyFolder.create(
        tmp_path / "study", Study(models=["alexnet", "squeezenet"], arms=arms), {"label": "here", "attrs": {}}
    )
    for model in study.definition.models:
        names = [*(cell.name for cell in study.cells_of(model, 0)), "onnxruntime"]
        study.write_comparison(model, 0, {"subjects": {name: {"samples_ms": [10.0] * 9} for name in names}})
    found = repeats_needed(study)
    assert set(found["arm"]) == {"search", "onnxruntime"} and found["enough"].all() and found["source"].all()


def test_too_few_repeats_say_nothing_of_how_many_are_needed(make_study):
    found = repeats_needed(make_study(lambda cell: 10.0, seeds=1, repeats=5))
    assert found["needed"].isna().all() and not found["enough"].any()


def test_an_empty_study_claims_nothing(tmp_path):
    design = Study(models=["alexnet", "squeezenet"], arms=ARMS)
    study = StudyFolder.create(tmp_path / "s", design, {"label": "here", "attrs": {}})
    assert study_claims(study).empty and repeats_needed(study).empty
    with pytest.raises(InputError, match="no arm 'serach': it has search"):
        compare_arms(study, "serach", "search")
