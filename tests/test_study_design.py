"""Studies as they are asked: what runs they take, what is refused, and how long they are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tvmlab import Ansor, AutoTVM, Droplet, LayoutTuning, Measure, Repeat, Study, Timed, TransferTuning, rates
from tvmlab.core import InputError
from tvmlab.study_design import plan, study_of_the_report
from tvmlab.study_length import remaining_s

SHORT, LONG = Ansor(max_trials=4), Ansor(max_trials=8)
TRANSFER = TransferTuning("$source:search", max_trials=4)
ARMS = {
    "search": [SHORT],
    "search+droplet": [SHORT, Droplet(max_trials=4)],
    "transfer": [TRANSFER],
    "transfer+droplet": [TRANSFER, Droplet(max_trials=4)],
}


def design(**knobs):
    return Study(**{"models": ["alexnet", "squeezenet"], "arms": ARMS, "target": "cpu", "repeats": 3, **knobs})


def test_arms_share_the_runs_that_they_begin_with():
    cells = {cell.name: cell for cell in plan(design())}
    assert list(cells) == [
        "alexnet-s0-search", "squeezenet-s0-search", "alexnet-s0-search+droplet", "squeezenet-s0-search+droplet",
        "alexnet-s0-transfer-from-squeezenet", "squeezenet-s0-transfer-from-alexnet",
        "alexnet-s0-transfer+droplet-from-squeezenet", "squeezenet-s0-transfer+droplet-from-alexnet",
    ]  # fmt: skip
    assert cells["alexnet-s0-search+droplet"].parent == "alexnet-s0-search"
    transfer = cells["alexnet-s0-transfer-from-squeezenet"]
    assert transfer.parent is None and transfer.last_step.source == ("squeezenet-s0-search",)
    assert cells["alexnet-s0-transfer+droplet-from-squeezenet"].parent == transfer.name


def test_every_run_comes_after_those_it_needs_whatever_the_order_of_the_arms():
    arms = dict(reversed(ARMS.items())) | {"bursts": [Repeat(2, [SHORT, TransferTuning("$source:search+droplet")])]}
    cells = plan(design(arms=arms, seeds=[3, 1], models=["alexnet", "squeezenet", "vgg19"]))
    seen = set()
    for cell in cells:
        assert {name for name in (cell.parent, *sum(cell.sources.values(), ())) if name} <= seen
        seen.add(cell.name)
    assert len(seen) == len(cells) == 2 * (3 + 3 + 6 + 6 + 6)
    assert [cell.seed for cell in cells] == sorted((cell.seed for cell in cells), reverse=True)  # 3 first, as asked


def test_a_run_that_is_no_arm_is_made_where_arms_need_it():
    arms = {"a": [SHORT, Droplet()], "b": [SHORT, LONG], "c": [LONG, TransferTuning("$others"), Droplet()]}
    cells = {cell.name: cell for cell in plan(design(arms=arms))}
    assert cells["alexnet-s0-a"].parent == cells["alexnet-s0-b"].parent == "alexnet-s0-a.1"
    assert cells["alexnet-s0-a.1"].arm == ""
    # "$others" without an arm: what the steps before make of the other models; no source, so one cell a model.
    assert cells["alexnet-s0-c.2"].last_step.source == ("squeezenet-s0-c.1",)
    assert cells["alexnet-s0-c"].source == "" and sum(cell.arm == "c" for cell in cells.values()) == 2


def test_sources_limit_what_is_transferred_from():
    cells = plan(design(sources=["alexnet"]))
    assert {(cell.model, cell.source) for cell in cells if cell.source} == {("squeezenet", "alexnet")}


def test_a_repetition_reads_the_source_in_each_of_its_steps():
    arms = {"search": [SHORT], "bursts": [Timed(Repeat(3, [LONG, TRANSFER]), 60.0)]}
    bursts = next(cell for cell in plan(design(arms=arms)) if cell.arm == "bursts")
    assert bursts.last_step == Repeat(3, [LONG, TransferTuning("squeezenet-s0-search", max_trials=4)])


def test_the_reports_study_has_every_pair_and_branches_droplet_from_one_search():
    asked = study_of_the_report()
    cells = plan(asked)
    pairs = {(cell.model, cell.source) for cell in cells if cell.arm == "transfer"}
    assert len(pairs) == 6
    parents = {cell.arm: {c.parent for c in cells if c.arm == cell.arm} for cell in cells}
    searches = {cell.name for cell in cells if cell.arm == "ansor"}
    assert parents["ansor+droplet"] == parents["ansor, longer"] == searches
    longer = {arm: sum(stage.time_limit_s for stage in stages) for arm, stages in asked.arms.items()}
    assert longer["ansor+droplet"] == longer["ansor, longer"]
    assert remaining_s(asked, {}) < 30 * 60  # the limits say it: no model is lowered


def test_a_definition_survives_json_and_its_own_code():
    asked = design(arms={**ARMS, "t": [Timed(SHORT, 5.0)]}, seeds=[1, 2], time_limit_s=9.0, measure=Measure(repeats=3))
    assert Study.from_json(asked.model_dump_json()) == asked
    names = {"Study": Study, "Ansor": Ansor, "Droplet": Droplet, "TransferTuning": TransferTuning, "Timed": Timed}
    assert eval(asked.code(), names | {"Measure": Measure}) == asked


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"arms": {"t": [TransferTuning("$source:search")]}}, "transfers from an arm 'search', which there is not"),
        ({"arms": {"t": [TransferTuning("auto")]}}, r"transfers from 'auto': in a study write '\$source'"),
        ({"arms": {"t": [TransferTuning("$source")]}}, "or from none"),
        ({"arms": {**ARMS, "u": [TransferTuning("$source:transfer")]}}, "a run that itself transfers"),
        ({"models": ["alexnet"]}, "transfers, but there is one model"),
        ({"models": ["alexnet", "nets/alexnet.onnx"]}, "models names 'alexnet' twice"),
        ({"seeds": [1, 1]}, "seeds names 1 twice"),
        ({"sources": ["vgg19"]}, "source 'vgg19' is none of the models"),
        ({"arms": {"untuned": [SHORT]}}, "cannot be named 'untuned'"),
        ({"arms": {"a b": [SHORT], "A-b": [LONG]}}, "cannot be named 'a b'"),
        ({"arms": {"a": [SHORT], "b": [SHORT]}}, "arms 'a' and 'b' have the same steps"),
        ({"arms": {"a": [SHORT, LayoutTuning()]}}, "LayoutTuning is not the first step"),
        ({"arms": {"a": []}}, "arms.a"),
        ({"repeats": 2}, "repeats=2"),
        ({"steps": [SHORT]}, "Study has no knob 'steps'"),
    ],
)
def test_an_impossible_study_is_refused(knobs, said):
    with pytest.raises(InputError, match=said):
        design(**knobs)


@pytest.mark.parametrize(("cores", "factor"), [(2, 1.0), (8, 0.5)])
def test_its_length_follows_from_limits_and_budgets(monkeypatch, cores, factor):
    monkeypatch.setattr(rates, "read_cpu", lambda: SimpleNamespace(cores=cores))
    tasks = {"alexnet": 10, "squeezenet": 20}

    def only(*steps, **knobs):
        return remaining_s(design(arms={"a": list(steps)}, **knobs), tasks)

    rest = only(Timed(Ansor(), 1.0)) - 2 * 1.0
    assert only(Ansor(), time_limit_s=50.0) == rest + 2 * 50
    assert only(Ansor(max_trials=30)) == pytest.approx(rest + 2 * 10 * factor)  # 3 a second on two cores
    assert only(AutoTVM(kernel_trials=5)) == pytest.approx(rest + (10 + 20) * factor)  # 5 a second on two cores
    assert only(Ansor(max_trials=30), time_limit_s=4.0) == pytest.approx(rest + 2 * 4)
    assert only(Repeat(2, [Ansor(max_trials=3), Ansor(max_trials=6)])) == pytest.approx(rest + 2 * 6 * factor)
