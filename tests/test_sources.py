"""Names of sources to runs, the paper's heuristic, similarity: on run folders that nothing was measured for."""

import pytest
from conftest import ENVIRONMENT

from tvmlab.core import InputError, Packing, RecordError, TaskInfo, TrialStatus
from tvmlab.experiment import (
    Ansor,
    AutoTVM,
    Droplet,
    Experiment,
    LayoutTuning,
    Repeat,
    Selective,
    TransferTuning,
    afresh,
)
from tvmlab.records import State
from tvmlab.sources import block_of, check_sources, distance, origins, packing_like, pools, resolve, score, warm_run
from tvmlab.targets import Target

ATTRS = {"kind": "llvm", "mcpu": "test"}
OTHER = {"kind": "llvm", "mcpu": "another"}
LABEL = ENVIRONMENT["target"]["label"]
HERE = Target("cpu", LABEL, "llvm", ATTRS, "cpu")


def environment(attrs, label=LABEL):
    return {**ENVIRONMENT, "target": {**ENVIRONMENT["target"], "attrs": attrs, "label": label}}


@pytest.fixture
def tuned(make_run):
    """`tuned("alexnet", ...)` writes a finished run; later calls make newer runs."""
    clock = iter(range(1, 1000))

    def make(model="alexnet", attrs=ATTRS, status="done", label=LABEL, **options):
        folder = make_run(model=model, environment=environment(attrs, label), status=status, **options)
        folder.write_state(State(**{**folder.read_json("state.json"), "started_s": float(next(clock))}))
        return folder

    return make


def ids(folders):
    return [folder.id for folder in folders]


def test_a_model_stands_for_its_newest_finished_run_on_this_target(tuned, tmp_path):
    tuned()
    newest = tuned()
    tuned(attrs=OTHER)
    tuned(status="stopped")
    tuned(trials=[("conv2d_relu", TrialStatus.RUN_ERROR)])
    for name in ("alexnet", "bvlc_alexnet"):
        assert ids(resolve([name], "resnet50", HERE, tmp_path / "runs")) == [newest.id]


def test_a_run_is_named_by_id_or_folder_and_a_pool_has_each_once(tuned, tmp_path):
    one, other = tuned(), tuned("googlenet", status="stopped")
    found = resolve([one.id, str(other.path), "alexnet"], "resnet50", HERE, tmp_path / "runs")
    assert ids(found) == [one.id, other.id]


def test_auto_offers_the_newest_run_of_every_other_model(tuned, tmp_path):
    tuned("alexnet")
    alexnet, googlenet = tuned("alexnet"), tuned("googlenet")
    tuned("vgg19", attrs=OTHER)
    tuned("resnet50")
    assert ids(resolve(["auto"], "resnet50", HERE, tmp_path / "runs")) == [googlenet.id, alexnet.id]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("vgg19", "source 'vgg19' has no finished run.*tune it first; there are .*alexnet.* \\(done\\)"),
        ("no-such-run", "source 'no-such-run' has no finished run.*there are"),
        ("squeezenet", "was tuned for .*another.*, this one is for .*test.*name a run of this target"),
        ("googlenet", "'googlenet' has no finished run.*googlenet.* \\(stopped\\)"),
        ("mobilenet_v2", "'mobilenet_v2' has no finished run"),
    ],
)
def test_a_source_that_has_nothing_is_refused_before_a_run_begins(tuned, tmp_path, source, message):
    tuned("googlenet", status="stopped")
    tuned("mobilenet_v2", trials=())
    tuned("squeezenet", attrs=OTHER)
    tuned("alexnet")
    experiment = Experiment(model="resnet50", target="cpu", steps=[Ansor(), TransferTuning(source)])
    with pytest.raises(InputError, match=message):
        check_sources(experiment, HERE, tmp_path / "runs")


def test_a_named_run_without_records_or_of_another_target_is_refused(tuned, tmp_path):
    empty, foreign = tuned(trials=()), tuned(attrs=OTHER)
    with pytest.raises(InputError, match=f"run {empty.id} has no tuned kernel.*tune it first"):
        resolve([empty.id], "resnet50", HERE, tmp_path / "runs")
    with pytest.raises(InputError, match=f"run {foreign.id} was tuned for"):
        resolve([foreign.id], "resnet50", HERE, tmp_path / "runs")


def test_another_device_with_the_same_attributes_is_taken_from_only_if_its_run_is_named(tuned, tmp_path):
    twin = tuned("alexnet", label="its twin")
    with pytest.raises(InputError, match=f"run {twin.id} was made on its twin, this is .*: tune alexnet here first"):
        resolve(["alexnet"], "resnet50", HERE, tmp_path / "runs")
    with pytest.raises(InputError, match="no finished run of another model on this target"):
        resolve(["auto"], "resnet50", HERE, tmp_path / "runs")
    assert ids(resolve([twin.id], "resnet50", HERE, tmp_path / "runs")) == [twin.id]
    assert warm_run(twin.id, HERE, tmp_path / "runs").id == twin.id


@pytest.mark.parametrize("engine", [Ansor, AutoTVM, Droplet, LayoutTuning, Selective])
def test_a_foreign_warm_start_is_refused_before_a_run_begins(tuned, tmp_path, engine):
    ours, foreign, waiting = tuned(), tuned(attrs=OTHER), tuned()
    (waiting.path / "environment.json").unlink()

    def check(*runs):
        steps = [engine(warm_start=runs)] if engine is LayoutTuning else [Ansor(), Repeat(2, [engine(warm_start=runs)])]
        check_sources(Experiment(model="resnet50", target="cpu", steps=steps), HERE, tmp_path / "runs")

    check(ours.id, str(ours.path))
    with pytest.raises(InputError, match=f"run {foreign.id} was tuned for .*another.*: leave it out of warm_start"):
        check(ours.id, foreign.id)
    with pytest.raises(InputError, match=f"run {waiting.id} has not begun"):
        check(waiting.id)
    with pytest.raises(RecordError, match="no run 'nowhere'"):
        check("nowhere")


def test_random_trials_without_anything_to_start_from_are_refused(tuned, tmp_path):
    ours = tuned()
    knobs = {"exploration_trials": 9, "random_trials": 3}

    def check(step):
        check_sources(Experiment(model="resnet50", target="cpu", steps=[step]), HERE, tmp_path / "runs")

    with pytest.raises(InputError, match="random_trials=3 have no past records to start from, with reuse=False"):
        check(AutoTVM(**knobs, reuse=False))
    for step in (AutoTVM(**knobs), AutoTVM(**knobs, reuse=False, warm_start=[ours.id]), *afresh([AutoTVM(**knobs)])):
        check(step)


def test_auto_without_a_run_says_what_to_do(tuned, tmp_path):
    tuned("resnet50")
    with pytest.raises(InputError, match=r"no finished run of another model on this target.*tune one first"):
        resolve(["auto"], "resnet50", HERE, tmp_path / "runs")
    with pytest.raises(InputError, match="there are no other runs"):
        resolve(["auto"], "resnet50", HERE, tmp_path / "nowhere")


def test_a_run_keeps_to_the_sources_it_began_with(tuned):
    alexnet = tuned("alexnet")
    steps = [Ansor(), TransferTuning("alexnet")]
    folder = tuned("resnet50", status="stopped", experiment=Experiment(model="resnet50", target="cpu", steps=steps))
    assert ids(pools(folder, HERE)[1]) == [alexnet.id]
    tuned("alexnet")
    assert ids(pools(folder, HERE)[1]) == [alexnet.id]
    assert pools(alexnet, HERE) == {} and not (alexnet.path / "transfer.json").exists()


def test_a_run_is_no_source_of_its_own(tuned):
    before = tuned("resnet50")
    experiment = Experiment(model="resnet50", target="cpu", steps=[Ansor(), TransferTuning("resnet50")])
    folder = tuned("resnet50", experiment=experiment)
    assert ids(pools(folder, HERE)[1]) == [before.id]


def test_the_origin_of_a_kernel_is_its_fastest_trial(tuned):
    folder = tuned(trials=[("conv2d_relu", 500.0), ("conv2d_relu", 90.0), ("conv2d_relu", TrialStatus.RUN_ERROR)])
    (origin,) = origins(folder)  # the dense task has a default schedule only
    assert (origin.task.name, origin.trial.latency_s) == ("conv2d_relu", pytest.approx(90e-6))


def info(kernel_class, key="", weight=1):
    return TaskInfo(key, key, kernel_class, weight, 1.0, 1.0, True)


def test_the_heuristic_weighs_classes_by_untuned_time_and_roots_of_counts():
    tasks = [info("conv2d", "a", weight=2), info("conv2d", "b"), info("dense", "c")]
    untuned = {"a": 1.0, "b": 1.0, "c": 1.0}  # 3 of 4 seconds are convolutions
    source = [info("conv2d")] * 9 + [info("dense")] * 4 + [info("softmax")] * 100
    assert score(source, tasks, untuned) == pytest.approx(0.75 * 3 + 0.25 * 2)
    assert score([info("softmax")], tasks, untuned) == 0.0
    assert score(source, tasks, {}) == 0.0


def test_distance_counts_doublings_and_other_epilogues_by_what_they_share():
    same = "1x64x56x56 64x64x3x3 1x64x1x1 1x64x56x56"
    assert distance(same, same) == 0.0
    assert distance(same, same.replace("56", "28")) == 4.0  # rows and columns of data and result
    assert distance(same, "1x64x56x56 64x64x3x3 1x64x56x56 1x64x1x1 1x64x56x56") == 0.0
    assert distance(same, "64x64 64") == 64.0
    assert distance("scalar 1x8", "scalar 1x16") == 1.0


def test_packings_are_those_of_the_most_similar_convolution(tuned):
    folder = tuned()
    rows = [
        ("conv0", "conv2d 1x3x224x224 64x3x7x7 stride 2x2 relu", "NCHW16c"),
        ("conv1", "conv2d 1x64x56x56 64x64x3x3 relu", "NCHW16c winograd4"),
        ("conv2", "conv2d 1x512x7x7 512x512x3x3 relu", "NCHW16c"),
        ("conv3", "conv2d 1x512x14x14 512x512x3x3 stride 2x2", "NCHW32c"),
        ("dense0", "dense 1x2048 2048x1000", "NCHW128c"),
    ]
    sites = [{"site": site, "about": about, "packing": packing} for site, about, packing in rows]
    folder.write_json("assignment.json", {"finished": True, "sites": sites})
    assert block_of([folder]) == 16 and block_of([]) == 0
    assert packing_like("conv2d 1x128x28x28 128x128x3x3 add2 relu", [folder]) == Packing(16, "winograd4")
    assert packing_like("conv2d 1x512x14x14 512x512x3x3", [folder]) == Packing(16)
    assert packing_like("conv2d 1x512x14x14 512x512x1x1", [folder]) is None
