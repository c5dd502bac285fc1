"""Is nChw16c in the space, and why was it not picked? The answers, from an assignment written by hand."""

import pytest

import tvmlab
from tvmlab.core import InputError, TaskInfo
from tvmlab.experiment import Ansor, AutoTVM, LayoutTuning

KEYS = {"NCHW16c": "b" * 16, "NCHW32c": "a" * 16, "NCHW64c": "c" * 16, "NCHW16c winograd2": "d" * 16}
STEP = LayoutTuning(blocks=(16, 32))
TASKS = [TaskInfo(key, f"conv ({name})", "conv2d", 1, 1e6, 1e4, True) for name, key in KEYS.items()]


def alternative(name, cost_s=None, instead_s=None, why_not=""):
    found = {"packing": name, "why_not": why_not, "task_key": KEYS.get(name, ""), "cost_s": cost_s}
    return found | ({} if instead_s is None else {"instead_s": instead_s})


@pytest.fixture
def choose(make_run):
    """A run whose conv3 has NCHW32c, with these alternatives beside it."""

    def make(*others, own=(2e-4, 1e-3), step=STEP, finished=True, trials=()):
        folder = make_run(
            trials or [(f"conv ({name})", 300.0) for name in KEYS for _ in range(2)],
            tasks=TASKS,
            defaults={info.name: 5000.0 for info in TASKS},
            steps=[step],
        )
        site = {"site": "conv3", "about": "conv2d 1x64x56x56 64x64x3x3", "packing": "NCHW32c", "task_key": "a" * 16}
        alternatives = [alternative("NCHW32c", *own), *others] if others else []
        folder.write_json("assignment.json", {"finished": finished, "sites": [site | {"alternatives": alternatives}]})
        return folder

    return make


def test_a_layout_that_lost_says_what_it_would_cost(choose):
    run = choose(alternative("NCHW16c", 2.5e-4, 1.07e-3))
    found = tvmlab.why_layout(run, "conv3", "nChw16c")
    assert found.sentence == (
        "NCHW16c was in the space of conv3 and was measured (2 trials, best 250.0 us); with it the model would take "
        "70.0 us more, its layout transforms included. conv3 is NCHW32c, the fastest by itself: 200.0 us; NCHW16c has "
        "250.0 us."
    )
    assert str(found) == found.sentence and found.chosen == "NCHW32c" and found.about.startswith("conv2d")
    assert found.frame["packing"].tolist() == ["NCHW32c", "NCHW16c"]
    assert found.frame["trials"].tolist() == [2, 2]
    assert found.frame["instead_us"].tolist() == pytest.approx([1000, 1070])
    assert "250.0 us" in found._repr_html_() and "<table" in found._repr_html_()


def test_the_neighbours_may_decide(choose):
    run = choose(alternative("NCHW16c", 1.5e-4, 1.02e-3), alternative("NCHW64c", 3e-4, 2e-3))
    assert tvmlab.why_layout(run, "conv3").sentence == (
        "conv3 is NCHW32c (200.0 us) although NCHW16c has 150.0 us, because its neighbours' layouts decide too; with "
        "it the model would take 20.0 us more, its layout transforms included."
    )


def test_what_was_not_in_the_space_says_why(choose):
    reason = "Winograd needs stride 1, this convolution has 2x2"
    run = choose(alternative("NCHW16c", 2.5e-4), alternative("NCHW16c winograd2", why_not=reason))
    winograd = tvmlab.why_layout(run, "conv3", "NCHW16c winograd2").sentence
    assert winograd.startswith(f"NCHW16c winograd2 was not in the space of conv3: {reason}. conv3 is NCHW32c")
    wider = tvmlab.why_layout(run, "conv3", "NCHW64c").sentence
    assert "this run tried blocks of 16, 32; name others in LayoutTuning(blocks=...)" in wider


def test_a_run_made_before_the_cost_of_others_was_kept(choose):
    run = choose(alternative("NCHW16c", 2.5e-4), own=(2e-4,))
    assert "would take" not in tvmlab.why_layout(run, "conv3", "NCHW16c").sentence


def test_what_was_never_measured(choose):
    failed = choose(alternative("NCHW16c"), alternative("NCHW64c"), trials=[("conv (NCHW16c)", 1.0)])
    assert "but none of its trials ran" in tvmlab.why_layout(failed, "conv3", "NCHW16c").sentence
    assert "the run ended before it was measured" in tvmlab.why_layout(failed, "conv3", "NCHW64c").sentence
    assert "the only one that was measured" in tvmlab.why_layout(failed, "conv3").sentence
    undone = choose(alternative("NCHW16c"), own=(), finished=False)
    assert tvmlab.why_layout(undone, "conv3").sentence == "conv3 is NCHW32c for now: the layout step is not done."


def test_a_run_without_a_layout_step(choose, make_run):
    packed = choose(step=AutoTVM(kernel_trials=2))
    assert "which no measurement chose" in tvmlab.why_layout(packed, "conv3").sentence
    assert "AutoTVM alone packs by the CPU's vectors" in tvmlab.why_layout(packed, "conv3", "NCHW16c").sentence
    with pytest.raises(InputError, match="computes every convolution in NCHW"):
        tvmlab.why_layout(make_run(steps=[Ansor()]), "conv3")


def test_a_site_may_be_named_by_its_task(choose):
    run = choose(alternative("NCHW16c", 2.5e-4))
    assert tvmlab.why_layout(run, "conv (NCHW32c)").site == "conv3"


def test_what_cannot_be_asked(choose):
    run = choose(alternative("NCHW16c", 2.5e-4))
    with pytest.raises(InputError, match="no convolution or dense layer 'conv9': it has conv3"):
        tvmlab.why_layout(run, "conv9")
    with pytest.raises(InputError, match="'NHWC' is not a packing"):
        tvmlab.why_layout(run, "conv3", "NHWC")
    with pytest.raises(InputError, match="several runs"):
        tvmlab.why_layout([run, choose()], "conv3")
