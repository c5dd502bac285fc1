"""The report: its sentences by hand, its code by running it, and the exported page as a browser would see
it."""

from __future__ import annotations

import html.parser
import re

import pytest

import tvmlab
from tvmlab import Study, StudyFolder, TransferTuning
from tvmlab import report as reporting  # the public function, by its lazy name
from tvmlab.core import InputError, TrialStatus
from tvmlab.experiment import Ansor, Experiment, Measure
from tvmlab.report import code, facts_html, findings, ratio_sentence, report, table_html

COMPARISON = {
    "threads": 2,
    "repeats": 6,
    "subjects": {
        "tvmlab": {"samples_ms": [0.7, 0.71, 0.72, 0.7, 0.7, 0.7]},
        "untuned": {"samples_ms": [2.5, 2.6, 2.5, 2.5, 2.5, 2.5]},
        "onnxruntime": {"samples_ms": [0.5, 0.6, 0.5, 0.5, 0.5, 0.5]},
    },
    "ratios": [
        {"subject": "tvmlab", "baseline": "untuned", "ratio": 0.28, "low": 0.27, "high": 0.29},
        {"subject": "tvmlab", "baseline": "onnxruntime", "ratio": 1.4, "low": 1.2, "high": 1.5},
    ],
    "numerics": {"max_error_over_max_output": 2e-6, "bound": 1e-4, "ok": True},
}
TRIALS = [("conv2d_relu", 250.0), ("dense", TrialStatus.WRONG_RESULT), ("dense", 100.0)]


def test_findings_keep_the_estimate_and_the_end_to_end_latency_apart(make_run):
    said = findings(make_run(TRIALS, comparison=COMPARISON))
    assert said[0] == "The run finished after 3 trials, 1 of which failed, in 4 s of tuning."
    assert "fell from 2.4 ms untuned to 0.6 ms, 4 times less; 2 of 3 tasks became faster." in said[1]
    assert said[1].startswith("The model estimate") and "end" not in said[1].split("fell")[1]
    assert said[2] == "End to end, the compiled model takes 0.7 ms on 2 threads."
    assert said[3].endswith("it is faster.") and said[4].endswith("it is slower.")
    assert "within the bound of 0.0001" in said[5]


def test_findings_admit_that_nothing_better_was_found(make_run):
    said = findings(make_run([("dense", 500.0), ("conv2d_relu", 2000.0)]))
    assert "found nothing better than the untuned kernels" in said[1]
    assert said[1].endswith("is still 2.4 ms.")
    assert said[2] == "The compiled model was not timed end to end; tvmlab compare does that."


def test_findings_admit_what_is_not_known(make_run):
    unknown = {"conv2d_relu": 1000.0, "dense": TrialStatus.CRASHED}
    assert "is not known: some task" in findings(make_run([], defaults=unknown))[1]
    assert "that of the untuned model is not known" in findings(make_run([("dense", 1.0)], defaults=unknown))[1]
    wrong = {**COMPARISON, "numerics": {"max_error_over_max_output": 0.5, "bound": 1e-4, "ok": False}}
    assert "NOT within the bound" in findings(make_run(TRIALS, comparison=wrong))[-1]
    assert findings(make_run(TRIALS, status="stopped"))[0].startswith("The run ended as stopped")


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.5, 0.9, "faster"),
        (0.9, 1.1, "no difference is shown"),
        (1.1, 2.0, "slower"),
        (float("nan"), float("nan"), "too few turns for an interval): no difference is shown"),
    ],
)
def test_a_difference_is_claimed_only_outside_the_interval(low, high, said):
    pair = {"subject": "tvmlab", "baseline": "untuned", "ratio": (low + high) / 2, "low": low, "high": high}
    assert ratio_sentence(pair).endswith(f"{said}.")


def test_the_code_makes_the_same_experiment_again(make_run, monkeypatch):
    experiment = Experiment(
        model="alexnet", steps=(Ansor(max_trials=8),), seed=4, measure=Measure(repeats=3), dims={"n": 2}
    )
    asked = []

    class Started:
        def wait(self):
            asked.append("waited")

    monkeypatch.setattr(tvmlab, "tune", lambda given: asked.append(given) or Started(), raising=False)
    folder = make_run(experiment=experiment)
    exec(code(folder), {})
    assert asked == [experiment.afresh(), "waited"]  # as this run did, whatever runs there are now
    past = {"task": {"runs": ["earlier"], "ansor": {"trials": 12, "share": 12.0, "since": 0}}}
    folder.write_json("reuse.json", {"runs": {"earlier": 12}, "tasks": past, "layouts": ""})
    exec(code(folder), {})
    assert asked[2:] == [experiment, "waited"]
    assert "# This run reused 12 trials of 1 earlier run; reuse=False searches afresh.\n" in code(folder)
    assert "It reused 12 trials of 1 earlier run: without them it is another search." in findings(folder)


def test_tables_are_escaped_and_say_dashes_for_nan():
    import pandas as pd

    page = table_html(pd.DataFrame({"task": ["<b>"], "best_us": [float("nan")], "trials": [3]}))
    assert "<td class='text short'>&lt;b&gt;</td>" in page and "<td>–</td>" in page and "<td>3</td>" in page
    facts = facts_html({"machine": {"cpu": "<x>", "cores": 2}, "nothing": None, "changed": False})
    assert "<th>machine.cpu</th><td>&lt;x&gt;</td>" in facts and "nothing" not in facts
    assert "<th>changed</th><td>False</td>" in facts


class Page(html.parser.HTMLParser):
    """Collects a page's text, tags and whatever it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href") and not (value or "").startswith(("data:", "#")):
                self.fetched.append(value)

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_whole_without_network_code_or_scripts(make_run, tmp_path):
    folder = make_run(TRIALS, comparison=COMPARISON)
    output = tmp_path / "page.html"
    assert report(folder, output, top=2) == output
    text = output.read_text()
    page = Page(text)
    assert page.fetched == [] and "script" not in page.tags and "link" not in page.tags
    assert not re.search(r"@import|url\(", text)
    assert page.tags.count("img") == 2 and text.count("data:image/png;base64,") == 2
    words = " ".join(page.words)
    for expected in ("squeezenet on test-cpu", folder.id, "fell from 2.4 ms", "onnxruntime", "wrong_result",
                     "Ansor(max_trials=16)", "machine.cpu", "Test CPU", "squeezenet.onnx"):  # fmt: skip
        assert expected in words, expected
    for private in (str(folder.path), "/home/somebody"):  # a report is for others too
        assert private not in text
    assert "Traceback" not in words and "plots.latency_vs_trials" not in words  # the notebook's code is left out


@pytest.mark.slow
def test_a_run_without_trials_has_a_report_beside_it(make_run):
    folder = make_run([], tasks=(), environment=None, status="stopped")
    assert report(str(folder.path)) == folder.path / "report.html"
    assert "waiting" not in (folder.path / "report.html").read_text().split("base64")[0]


def test_what_the_report_does_not_have_is_refused(make_run, tmp_path):
    folder = make_run(TRIALS)
    with pytest.raises(InputError, match="no parameter 'topp': it has top"):
        report(folder, topp=3)
    with pytest.raises(InputError, match="one run, 2 were given"):
        report([folder, make_run(TRIALS)])
    assert reporting is report


@pytest.fixture
def study(make_run, tmp_path):
    """Two models transferred to each other, one seed, tuned and timed; one run failed."""
    arms = {"search": [Ansor(max_trials=8)], "transfer": [TransferTuning("$source:search")]}
    design = Study(models=["alexnet", "squeezenet"], arms=arms, repeats=6)
    folder = StudyFolder.create(tmp_path / "study", design, {"label": "test-cpu", "attrs": {}})
    for cell in folder.plan[:-1]:
        make_run(TRIALS, model=cell.model).path.rename(folder.path / "runs" / cell.name)
    folder.refuse(folder.plan[-1], "no schedule <fits>")
    for model in design.models:
        latencies = {cell.name: [0.7, 0.71, 0.72, 0.7, 0.7, 0.7] for cell in folder.cells_of(model, 0)}
        latencies |= {"untuned": [2.5, 2.6, 2.5], "onnxruntime": [0.5] * 6}
        subjects = {name: {"samples_ms": samples} for name, samples in latencies.items()}
        folder.write_comparison(model, 0, {"subjects": subjects, "numerics": dict.fromkeys(latencies, 1e-6)})
    return folder


@pytest.mark.slow
def test_the_report_of_a_study_is_whole_too(study, tmp_path):
    output = tmp_path / "page.html"
    assert report(str(study.path), output, margin=0.05) == output
    page = Page(output.read_text())
    assert page.fetched == [] and "script" not in page.tags and "link" not in page.tags
    assert page.tags.count("img") == 1 + 2 + 1  # costs, a model's curves each, one arm that transfers
    words = " ".join(page.words)
    for expected in ("alexnet, squeezenet on test-cpu", "3 of 4 cells are done", "no schedule <fits>", "timed repeats",
                     "transfer against search, over all models: 1 times its latency, 2 pairs of model and seed",
                     "at least 6 are needed", "tvmlab.study", "$source:search", "Test CPU"):  # fmt: skip
        assert expected in words, expected
    assert "Traceback" not in words and "arm_costs" not in words
    assert str(tmp_path) not in output.read_text() and "/home/somebody" not in output.read_text()


@pytest.mark.slow
def test_a_study_that_has_just_begun_has_a_report_beside_it(tmp_path):
    design = Study(models=["alexnet"], arms={"search": [Ansor(max_trials=8)]})
    folder = StudyFolder.create(tmp_path / "study", design, {"label": "test-cpu", "attrs": {}})
    assert report(folder) == folder.path / "report.html"
    assert "No whole model was timed yet." in (folder.path / "report.html").read_text()


def test_what_a_studys_report_does_not_have_is_refused(study):
    with pytest.raises(InputError, match="no parameter 'top': it has margin, confidence"):
        report(study, top=3)
