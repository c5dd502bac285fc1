"""The layout step: what it can choose from, what that costs, what it chooses, and that a run survives it."""

import os
import random
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
from fake_measurer import FakeMeasurer
from net import Net

import tvmlab
from tvmlab import frames, search_process
from tvmlab.core import InputError, Packing, Roofline, TrialStatus
from tvmlab.experiment import Ansor, AutoTVM, Experiment, LayoutTuning, Measure
from tvmlab.layout_costs import Costs, copies_of, needs_of
from tvmlab.layout_graph import is_view, place, read, transforms
from tvmlab.layout_plan import LayoutPlan
from tvmlab.records import RunFolder
from tvmlab.search_process import check_experiment, search
from tvmlab.targets import target
from tvmlab.tasks import extract

NCHW, B8, B16 = Packing(), Packing(8), Packing(16)
WINOGRAD2, WINOGRAD4 = Packing(16, "winograd2"), Packing(16, "winograd4")
STEP = LayoutTuning(blocks=(16,), trials_per_variant=2)
UNIFORM = {"conv0": B16, "conv1": B16, "conv2": B16, "dense0": Packing(32)}
QUICK = Measure(repeats=2, min_repeat_ms=0.1, build_workers=1)


def chain(folder):
    """Three convolutions in a row, 3x3 and 1x1, then a dense layer."""
    net = Net(1, 16, 12, 12)
    a = net.op("Relu", net.conv("x", 16, 32, 3, pads=[1] * 4))
    a = net.op("MaxPool", net.op("Relu", net.conv(a, 32, 32, 1)), kernel_shape=[2, 2], strides=[2, 2])
    a = net.op("GlobalAveragePool", net.conv(a, 32, 32, 3, pads=[1] * 4))
    return net.model(folder, net.op("Gemm", net.op("Flatten", a), net.weight(32, 128), net.weight(128)))


def branches(folder):
    """A residual block and a concatenation."""
    net = Net(1, 16, 8, 8)
    a = net.op("Relu", net.conv("x", 16, 32, 3, pads=[1] * 4))
    b = net.op("Relu", net.op("Add", a, net.conv(a, 32, 32, 3, pads=[1] * 4)))
    return net.model(folder, net.op("Concat", net.conv(b, 32, 16, 1), net.conv(b, 32, 32, 1), axis=1))


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return {make.__name__: make(tmp_path_factory.mktemp(make.__name__)) for make in (chain, branches)}


@pytest.fixture(scope="session")
def cpu():
    """A CPU with AVX-512, whatever this machine has: nothing is measured on it."""
    return replace(target("cpu:znver4"), device="cpu", _roofline=Roofline(peak_gflops=1e4, bandwidth_gbs=1e3))


@pytest.fixture(scope="session")
def plan(models, cpu):
    """The plan of the chain."""
    return LayoutPlan(models["chain"], cpu, STEP)


def seconds(plan, wanted):
    """A latency for each task: `wanted(site, packing)` for those of a site."""
    known = {key: wanted(site, packing) for (site, packing), key in plan._keys.items()}
    return lambda key: known.get(key, 1e-6)


def invented(graph, blocks, seed, scale=1.0):
    """Costs of sites and of layout transforms that follow from a seed."""
    rng = random.Random(seed)
    sites = {
        site.name: {Packing(block): rng.uniform(1, 2) for block in (blocks if site.kind != "dense" else [0])}
        for site in graph.sites
    }
    copies: dict = {}
    return Costs(graph, sites, lambda copy: copies.setdefault(copy, rng.uniform(0, 0.5) * scale)), sites


def every_assignment(sites):
    names = list(sites)
    for chosen in product(*(sites[name] for name in names)):
        yield dict(zip(names, chosen, strict=True))


# What can be chosen


def test_every_packing_of_every_site_is_a_task(plan):
    tried = {site: [str(p) for p, why in found.items() if why is None] for site, found in plan.choices.items()}
    winograd = ["NCHW16c", "NCHW16c winograd2", "NCHW16c winograd4"]
    assert tried == {"conv0": winograd, "conv1": ["NCHW16c"], "conv2": winograd, "dense0": ["NCHW32c", "NCHW128c"]}
    assert len(plan.variants) == 9 and all(task.info.weight == 1 for task in plan.variants)
    assert {task.info.name.partition("(")[2] for task in plan.variants} == {
        "NCHW16c)", "NCHW16c winograd2)", "NCHW16c winograd4)", "NCHW32c)", "NCHW128c)",
    }  # fmt: skip
    assert plan.choices["conv0"][NCHW] == "NCHW is not among the blocks to try"
    assert "3x3" in plan.choices["conv1"][WINOGRAD2]


def test_tasks_of_no_weight_are_those_only_tried(plan, models, cpu):
    provisional = {row["site"]: Packing.parse(row["packing"]) for row in plan.provisional["sites"]}
    assert provisional == {"conv0": B16, "conv1": B16, "conv2": B16, "dense0": Packing(32)}
    expected = Counter({task.key: task.info.weight for task in extract(models["chain"], cpu, provisional)})
    assert Counter({task.key: task.info.weight for task in plan.tasks if task.info.weight}) == expected
    assert {task.info.weight for task in plan.tasks if task.key not in expected} == {0}


def test_a_variant_is_what_the_packed_model_consists_of(plan, models, cpu):
    """The site of each task is told by its weights: the operators may be called in another order."""
    chosen = {"conv0": WINOGRAD4, "conv1": B16, "conv2": B16, "dense0": Packing(32)}
    keys = {task.key for task in extract(models["chain"], cpu, chosen)}
    assert {plan._keys[site, packing] for site, packing in chosen.items()} <= keys
    assert plan._keys["conv2", WINOGRAD2] not in keys


def test_nchw_is_tried_where_it_is_asked_for(models, cpu):
    plan = LayoutPlan(models["branches"], cpu, LayoutTuning(blocks=(0, 16), algorithms=("direct",)))
    assert {packing for found in plan.choices.values() for packing, why in found.items() if why is None} == {NCHW, B16}
    assert {copy[1:] for copy in plan._copy_keys} == {(0, 16), (16, 0)}
    assert plan.choices["conv0"][WINOGRAD4] == "winograd4 is not among the algorithms to try"


# What it costs


@pytest.mark.parametrize("name", ["chain", "branches"])
def test_neighbours_need_the_transforms_that_placement_makes(models, name):
    graph = read(models[name].module)
    sites = [site for site in graph.sites if site.kind != "dense"]
    for chosen in product([0, 8, 16], repeat=len(sites)):
        blocks = dict(zip(sites, chosen, strict=True))
        made = transforms(graph, place(graph, {site.name: Packing(block) for site, block in blocks.items()}))
        expected = Counter(
            (item.shape, item.source, item.target)
            for item in made
            if not (is_view(item.shape, item.source) and is_view(item.shape, item.target))
        )
        needs = needs_of(graph)
        found = Counter(need.copy(blocks.get(need.source, 0), blocks.get(need.target, 0)) for need in needs)
        del found[None]
        assert set(found) == set(expected)
        assert found.total() >= expected.total(), "one that two readers share may count twice"
        if name == "chain":
            assert found == expected
        assert set(expected) <= set(copies_of(needs, {site.name: [NCHW, B8, B16] for site in sites}))


@pytest.mark.parametrize("seed", range(5))
def test_a_chain_is_solved_exactly(models, seed):
    costs, sites = invented(read(models["chain"].module), [0, 8, 16], seed)
    best, least = costs.cheapest()
    assert least == pytest.approx(min(costs.of(found) for found in every_assignment(sites)))
    assert costs.of(best) == pytest.approx(least)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_a_branching_model_is_never_dearer_than_any_uniform_one(models, scale):
    graph = read(models["branches"].module)
    gaps = []
    for seed in range(6):
        costs, sites = invented(graph, [0, 8, 16], seed, scale)
        uniform = [{site: Packing(block) for site in sites} for block in (0, 8, 16)]
        best, least = costs.cheapest(uniform)
        assert least == pytest.approx(costs.of(best))
        assert least <= min(costs.of(found) for found in uniform) + 1e-12
        gaps.append(least / min(costs.of(found) for found in every_assignment(sites)))
    assert min(gaps) >= 1 - 1e-9 and sum(gaps) / len(gaps) < 1.02


def test_dear_transforms_make_it_uniform_and_free_ones_do_not(models):
    graph = read(models["branches"].module)
    free, sites = invented(graph, [8, 16], 3, scale=0.0)
    assert free.cheapest()[0] == {site: min(found, key=found.get) for site, found in sites.items()}
    dear, _ = invented(graph, [8, 16], 3, scale=1e6)
    assert len(set(dear.cheapest()[0].values())) == 1


# What it chooses


def test_the_fastest_packing_of_each_site_is_chosen(plan):
    fast = {("conv0", WINOGRAD4): 1e-5, ("conv2", WINOGRAD2): 2e-5, ("dense0", Packing(32)): 3e-6}
    latency = seconds(plan, lambda site, packing: fast.get((site, packing), 1e-4))
    decision, packed = plan.decide(latency)
    assert packed.assignment == {"conv0": WINOGRAD4, "conv1": B16, "conv2": WINOGRAD2, "dense0": Packing(32)}
    assert decision["finished"] and {row["site"]: row["packing"] for row in decision["sites"]}["conv0"] == str(
        WINOGRAD4
    )
    assert decision["uniform"].keys() == {"NCHW16c", "NCHW16c winograd2", "NCHW16c winograd4"}
    paid = sum(row["cost_s"] for row in decision["transforms"])
    assert decision["cost_s"] == pytest.approx(1e-5 + 1e-4 + 2e-5 + 3e-6 + paid)
    assert decision["uniform"]["NCHW16c winograd4"] == pytest.approx(1e-5 + 1e-4 + 1e-4 + 3e-6 + paid)
    assert [row["source"] + ">" + row["target"] for row in decision["transforms"]] == ["NCHW>NCHW16c"]


def test_only_what_was_measured_is_chosen(plan):
    known = seconds(plan, lambda site, packing: 1e-5 if packing == WINOGRAD2 and site == "conv0" else None)
    _, packed = plan.decide(known)
    assert packed.assignment == {"conv0": WINOGRAD2, "conv1": B16, "conv2": B16, "dense0": Packing(32)}
    nothing, packed = plan.decide(lambda key: None)
    assert packed.assignment == UNIFORM and nothing["uniform"]


# Runs, with invented answers


def make_folder(models, tmp_path, *steps, name="chain", **options):
    experiment = Experiment(model=models[name].source, target="cpu", steps=steps, measure=QUICK, **options)
    return RunFolder.create(experiment, tmp_path)


@pytest.fixture
def answer(cpu, monkeypatch):
    """`answer(folder, measurer, stop)` does one session on the test's target and returns the trials."""
    monkeypatch.setattr(search_process, "named_target", lambda name: cpu)

    def go(folder, measurer=None, stop=None):
        search(folder, stop or threading.Event(), lambda *_: measurer or FakeMeasurer())
        return [trial for trial in folder.trials() if trial.trial > 0]

    return go


def wins(plan, winner):
    """A measurer for which one packing is a hundred times faster than the others, wherever it is possible."""
    return FakeMeasurer({key: 1e-5 for (_, packing), key in plan._keys.items() if packing == winner})


def test_a_run_goes_on_with_the_tasks_of_its_choice(models, tmp_path, answer, plan, cpu):
    folder = make_folder(models, tmp_path, STEP, AutoTVM(kernel_trials=3))
    measurer = wins(plan, WINOGRAD2)
    trials = answer(folder, measurer)
    assert folder.assignment == {"conv0": WINOGRAD2, "conv1": B16, "conv2": WINOGRAD2} | {
        "dense0": folder.assignment["dense0"]
    }
    final = extract(models["chain"], cpu, folder.assignment)
    assert {info.key: info.weight for info in folder.tasks if info.weight} == {t.key: t.info.weight for t in final}
    assert set(measurer.added) == {task.key for task in final}
    layout, templates = ([trial for trial in trials if trial.step == step] for step in (0, 1))
    spent = Counter(trial.task_key for trial in layout)
    assert {spent[task.key] for task in plan.variants} == {2}
    assert {trial.task_key for trial in templates} <= {task.key for task in final if task.info.tunable}
    assert len({(trial.task_key, trial.key) for trial in trials}) == len(trials)
    state = folder.state
    assert state.status == "done" and state.estimate_s > 0 and state.trials == len(trials)
    found = {info.key for info in folder.tasks}
    assert {trial.task_key for trial in folder.trials()} <= found


def test_frames_leave_out_what_was_only_tried(models, tmp_path, answer, plan):
    folder = make_folder(models, tmp_path, STEP)
    answer(folder, wins(plan, WINOGRAD4))
    summary = frames.summary(folder).iloc[0]
    assert summary["best_estimate_ms"] == pytest.approx(folder.state.estimate_s * 1e3)
    assert frames.curve(folder)["estimate_ms"].iloc[-1] == pytest.approx(summary["best_estimate_ms"])
    table = frames.layouts(folder)
    chosen = table[table["chosen"]].set_index("site")["packing"]
    assert chosen[["conv0", "conv1", "conv2"]].tolist() == [str(WINOGRAD4), "NCHW16c", str(WINOGRAD4)]
    assert table.groupby("site")["chosen"].sum().eq(1).all()
    direct = table[(table["site"] == "conv0") & (table["packing"] == "NCHW16c")].iloc[0]
    assert direct["best_us"] > 0 and direct["decided_us"] == pytest.approx(direct["best_us"])
    refused = table[(table["site"] == "conv1") & (table["packing"] == str(WINOGRAD2))].iloc[0]
    assert "3x3" in refused["why_not"] and refused["best_us"] != refused["best_us"]
    assert table.attrs["best_uniform"] == str(WINOGRAD4) and 0 <= table.attrs["gain"] < 1
    assert frames.layout_transforms(folder)["target"].tolist() == ["NCHW16c"]


@pytest.mark.parametrize("count", [1, 7, 17])
def test_a_stopped_layout_step_is_finished_later(models, tmp_path, answer, plan, count):
    folder = make_folder(models, tmp_path, STEP, AutoTVM(kernel_trials=2))
    stop = threading.Event()
    measurer = FakeMeasurer(on_measure=lambda number: stop.set() if number == count else None)
    before = answer(folder, measurer, stop)
    # The measurer is told of a trial when the next one is asked for.
    assert len(before) == count + 1 and folder.state.status == "stopped"
    assert not folder.layouts["finished"] and folder.assignment == UNIFORM
    again = FakeMeasurer()
    after = answer(folder, again)
    assert after[: len(before)] == before
    assert folder.state.status == "done" and folder.layouts["finished"]
    assert len({(trial.task_key, trial.key) for trial in after}) == len(after)
    assert Counter(t.task_key for t in after if t.step == 0)[plan.variants[0].key] == 2


def test_a_finished_layout_step_is_not_repeated(models, tmp_path, answer):
    folder = make_folder(models, tmp_path, STEP, AutoTVM(kernel_trials=6))
    stop = threading.Event()
    # 18 trials of variants and 2 of the transform: the stop comes in the second step.
    answer(folder, FakeMeasurer(on_measure=lambda number: stop.set() if number == 24 else None), stop)
    assert folder.layouts["finished"]
    chosen, layout = folder.layouts, [trial for trial in folder.trials() if trial.step == 0]
    answer(folder)
    assert folder.layouts == chosen
    assert [trial for trial in folder.trials() if trial.step == 0] == layout
    assert folder.state.status == "done"


def test_without_time_it_chooses_what_it_had_for_now(models, tmp_path, answer):
    folder = make_folder(models, tmp_path, STEP, AutoTVM(), time_limit_s=1e-3)
    assert answer(folder) == []
    assert folder.layouts["finished"] and folder.assignment == UNIFORM
    assert folder.state.status == "done" and folder.state.estimate_s > 0


def test_failing_variants_are_not_chosen(models, tmp_path, answer, plan):
    winograd = {key for (_, packing), key in plan._keys.items() if packing.algorithm != "direct"}
    folder = make_folder(models, tmp_path, STEP)
    measurer = wins(plan, WINOGRAD4)
    measurer.fails = lambda candidate: TrialStatus.RUN_ERROR if candidate.task_key in winograd else None
    answer(folder, measurer)
    assert {packing.algorithm for packing in folder.assignment.values()} == {"direct"}


def test_autotvm_alone_packs_by_the_vectors(models, tmp_path, answer, cpu):
    folder = make_folder(models, tmp_path, AutoTVM(kernel_trials=2, max_trials=4))
    answer(folder)
    lanes = cpu.vector_bits // 32
    assert folder.assignment == {name: Packing(lanes) for name in ("conv0", "conv1", "conv2")} | {
        "dense0": folder.assignment["dense0"]
    }
    assert all(info.weight for info in folder.tasks)
    table = frames.layouts(folder)
    assert table["chosen"].all() and len(table) == 4 and table.attrs == {}


def test_ansor_alone_stays_in_nchw(models, tmp_path, answer):
    folder = make_folder(models, tmp_path, Ansor(max_trials=2, population=16, generations=1))
    answer(folder)
    assert folder.layouts is None and folder.assignment is None and frames.layouts(folder).empty


def test_a_gpu_is_refused_before_there_is_a_run(models, cpu, monkeypatch):
    card = replace(cpu, name="cuda:0", label="A card", kind="cuda", device="cuda:0")
    monkeypatch.setattr(search_process, "named_target", lambda name: card)
    with pytest.raises(InputError, match=r"LayoutTuning does not work on A card.*leave it out"):
        check_experiment(Experiment(model=models["chain"].source, target="cuda:0", steps=[LayoutTuning()]))


# Real kernels


@pytest.mark.slow
def test_killed_resumed_compared(models, tmp_path):
    steps = [LayoutTuning(trials_per_variant=2), AutoTVM(kernel_trials=2, max_trials=6)]
    experiment = Experiment(model=models["chain"].source, target="cpu", steps=steps, measure=QUICK)
    run = tvmlab.tune(experiment, tmp_path)
    deadline = time.monotonic() + 100
    while len(before := [t for t in run.folder.trials() if t.trial > 0]) < 5 and run.status == "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(run.folder.state.pid, signal.SIGKILL)
    while run.status == "running":
        time.sleep(0.05)
    assert not run.folder.layouts["finished"]
    tvmlab.resume(run).wait()
    trials = [trial for trial in run.folder.trials() if trial.trial > 0]
    assert trials[: len(before)] == before and run.folder.layouts["finished"]
    assert len({(trial.task_key, trial.key) for trial in trials}) == len(trials)
    result = tvmlab.compare(run, ["onnxruntime"], repeats=3)
    assert result.numerics["ok"]
    assert set(run.folder.assignment) == {"conv0", "conv1", "conv2", "dense0"}
    best = frames.layouts(run)
    assert best[best["chosen"]]["best_us"].notna().all()
