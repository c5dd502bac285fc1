"""The transfer strategy, and whole runs that transfer: real schedules, invented latencies."""

import threading
from collections import Counter
from dataclasses import replace

import pytest
from fake_measurer import FakeMeasurer
from net import Net

from tvmlab import frames, search_process
from tvmlab.core import Candidate, InputError, Roofline, TaskInfo, Trial, TrialStatus, standing
from tvmlab.experiment import Ansor, AutoTVM, Droplet, Experiment, Repeat, TransferTuning
from tvmlab.records import RunFolder
from tvmlab.run import tune
from tvmlab.search.transfer import Transfer
from tvmlab.search_process import search
from tvmlab.sources import Origin
from tvmlab.targets import target
from tvmlab.testing import RecordedSpace, StrategyContract
from tvmlab.transfer_rows import source_scores


def origin(number):
    info = TaskInfo(f"source{number}", f"source{number}", "conv2d", 1, 1.0, 1.0, True)
    return Origin(RunFolder(None), info, Trial(info.key, 0, "evolution", 1, "k", 0, (), TrialStatus.OK, (1.0,)))


def test_origins_are_asked_for_in_order_each_program_once():
    programs = {"source0": "a", "source1": "does not fit", "source2": "a", "source3": "known", "source4": "b"}
    noted = []

    def adapt(found):
        name = programs[found.task.key]
        return name if " " in name else Candidate("task", name, 0, [])

    strategy = Transfer(
        [origin(number) for number in range(5)],
        adapt,
        known=["known"],
        note=lambda fates: noted.extend((found.task.key, key, outcome) for found, key, outcome in fates),
    )
    assert [candidate.key for candidate in strategy.ask(1)] == ["a"]
    assert [candidate.key for candidate in strategy.ask(8)] == ["b"]
    assert strategy.ask(8) == []
    assert noted == [
        ("source0", "a", "tried"),
        ("source1", "", "does not fit"),
        ("source2", "a", "same as a nearer one"),
        ("source3", "known", "measured before"),
        ("source4", "b", "tried"),
    ]


class TestTransfer(StrategyContract):
    """It keeps the rules of every strategy; here each origin's schedule is a point of a recorded space."""

    def space(self):
        answers = (None, TrialStatus.RUN_ERROR, 1e-3, 2e-3, 5e-4)
        return RecordedSpace({"a": range(25), "b": range(8)}, lambda index: answers[index % len(answers)])

    def make(self, space, seed=0, known=()):
        def adapt(found):
            return space.realize(int(found.task.key.removeprefix("source"))) or "it is not valid for this shape"

        return Transfer([origin(number) for number in range(200)], adapt, known=[trial.key for trial in known])


def write_model(folder, size, channels, head="conv"):
    """Two 3x3 convolutions, the second with a residual connection; or a dense layer alone."""
    folder.mkdir()
    net = Net(1, channels, size, size)
    if head == "dense":
        net = Net(1, channels)
        net.model(folder, net.op("Gemm", "x", net.weight(channels, size), net.weight(size)))
    else:
        a = net.op("Relu", net.conv("x", channels, channels, 3, pads=[1] * 4))
        net.model(folder, net.op("Relu", net.op("Add", "x", net.conv(a, channels, channels, 3, pads=[1] * 4))))
    return str(folder / "net.onnx")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "source": write_model(folder / "source", 12, 16),
        "target": write_model(folder / "target", 10, 24),
        "dense": write_model(folder / "dense", 8, 32, head="dense"),
    }


@pytest.fixture(scope="module")
def cpu():
    """A CPU with AVX-512, whatever this machine has: nothing is measured on it."""
    return replace(target("cpu:znver4"), device="cpu", _roofline=Roofline(peak_gflops=1e4, bandwidth_gbs=1e3))


@pytest.fixture
def run(cpu, monkeypatch):
    """`run(runs_dir, model, *steps)` does a whole run, with invented answers, and returns its folder."""
    monkeypatch.setattr(search_process, "named_target", lambda name: cpu)

    def go(runs_dir, model, *steps, measurer=None, stop=None, folder=None):
        folder = folder or RunFolder.create(Experiment(model=model, target="cpu", steps=steps), runs_dir)
        search(folder, stop or threading.Event(), lambda *_: measurer or FakeMeasurer())
        return folder

    return go


ANSOR = Ansor(max_trials=24, population=16, generations=1)
AFRESH = ANSOR.model_copy(update={"reuse": False})


@pytest.fixture(scope="module")
def tuned(models, cpu, tmp_path_factory):
    """A run of the source model, searched as Ansor does. Shared: it is only read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_process, "named_target", lambda name: cpu)
        folder = RunFolder.create(
            Experiment(model=models["source"], target="cpu", steps=[ANSOR]), tmp_path_factory.mktemp("runs")
        )
        search(folder, threading.Event(), lambda *_: FakeMeasurer())
    return folder


def test_every_kernel_of_the_class_is_transferred(run, models, tuned):
    folder = run(tuned.path.parent, models["target"], TransferTuning(models["source"]))
    trials = [trial for trial in folder.trials() if trial.trial > 0]
    assert folder.state.status == "done" and trials
    assert {trial.strategy for trial in trials} == {"transfer"} and all(trial.ok for trial in trials)
    table = frames.transfers(folder)
    assert set(table["source_run"]) == {tuned.id} and set(table["source_model"]) == {models["source"]}
    # Both convolutions of the source serve both of the target, those of the same class first.
    assert len(table) == 4 == len(set(zip(table["task_key"], table["source_key"], strict=True)))
    assert (table["outcome"] == "tried").sum() == len(trials)
    measured = table[table["outcome"] == "tried"]
    assert measured["latency_us"].notna().all() and measured["untuned_us"].notna().all()
    assert set(measured["key"]) == {trial.key for trial in trials}
    best = {key: min(t.latency_s for t in folder.trials() if t.task_key == key) for key in set(table["task_key"])}
    for row in table[table["is_best"]].itertuples():
        assert row.latency_us == pytest.approx(best[row.task_key] * 1e6)
    assert f"transferred from {tuned.id}" in folder.state.message


def test_the_schedules_are_in_the_database_for_the_steps_that_follow(run, models, tuned, cpu):
    from tvmlab.compat import read_database
    from tvmlab.models import load_model
    from tvmlab.strategies import warm_records
    from tvmlab.tasks import extract

    folder = run(tuned.path.parent, models["target"], TransferTuning(tuned.id))
    database = read_database(folder.path, "llvm")
    for task in extract(load_model(models["target"]), cpu):
        wanted = sorted(t.latency_s for t in folder.trials() if t.task_key == task.key and t.trial > 0)
        assert [latency for _, latency in sorted(warm_records(database, task), key=lambda r: r[1])] == pytest.approx(
            wanted
        )


def test_a_stopped_transfer_goes_on_where_it_was(run, models, tuned):
    stop = threading.Event()
    step = TransferTuning(tuned.id, batch_size=2)
    measurer = FakeMeasurer(on_measure=lambda number: stop.set())
    folder = run(tuned.path.parent, models["target"], step, measurer=measurer, stop=stop)
    before = list(folder.trials())
    assert folder.state.status == "stopped"
    run(tuned.path.parent, models["target"], folder=folder)
    after = list(folder.trials())
    assert folder.state.status == "done" and after[: len(before)] == before
    assert len({(trial.task_key, trial.key) for trial in after}) == len(after)
    table = frames.transfers(folder)
    assert len(table) == 4 and "measured before" not in set(table["outcome"])


def test_the_cap_keeps_the_nearest(run, models, tuned):
    folder = run(tuned.path.parent, models["target"], TransferTuning(tuned.id, trials_per_kernel=1))
    table = frames.transfers(folder)
    assert len(table) == 2
    classes = {info.key: info.kernel_class for info in tuned.tasks}
    assert [classes[key] for key in table["source_key"]] == table["kernel_class"].tolist()


def test_a_kernel_without_kin_tries_what_fits_it(run, models, tuned, tmp_path):
    """A pooling beside the convolution: no source kernel begins like it, but how far to unroll says any of them."""
    net = Net(1, 16, 12, 12)
    a = net.op("Relu", net.conv("x", 16, 16, 3, pads=[1] * 4))
    net.model(tmp_path, net.op("MaxPool", a, kernel_shape=[2, 2], strides=[2, 2]))
    folder = run(tuned.path.parent, str(tmp_path / "net.onnx"), TransferTuning(tuned.id))
    outcomes = frames.transfers(folder).groupby("kernel_class")["outcome"].agg(list)
    assert "tried" in outcomes["conv2d+add+relu"]
    assert outcomes["max_pool2d"][0] == "tried" and len(outcomes["max_pool2d"]) == 2


def test_no_common_class_is_said_and_leaves_the_default_schedules(run, models, tuned):
    folder = run(tuned.path.parent, models["dense"], TransferTuning(tuned.id))
    state = folder.state
    assert state.status == "done" and "nothing to transfer" in state.message and tuned.id in state.message
    assert [trial.trial for trial in folder.trials()] == [0]
    assert state.estimate_s == state.untuned_s
    assert len(frames.transfers(folder)) == 0


def test_the_heuristic_chooses_the_source(run, models, tuned, tmp_path):
    import shutil

    runs = tmp_path / "runs"
    shutil.copytree(tuned.path, runs / tuned.id)
    run(runs, models["dense"], Ansor(max_trials=4, population=16, generations=1))
    folder = run(runs, models["target"], TransferTuning())
    noted = folder.read_json("transfer.json")["steps"]["0"]
    assert noted["sources"] == [tuned.id] and len(noted["scores"]) == 2
    assert noted["scores"][tuned.id] == pytest.approx(1.0)  # one kernel of each class of the target
    assert min(noted["scores"].values()) == 0.0


def test_a_run_of_the_same_model_may_be_the_source_and_is_said(run, models, tuned):
    folder = run(tuned.path.parent, models["source"], TransferTuning(tuned.id))
    assert "a run of the same model" in folder.state.message
    best = {t.task_key: t.key for t in sorted(tuned.trials(), key=lambda t: t.latency_s, reverse=True) if t.trial > 0}
    table = frames.transfers(folder)
    own = table[table["task_key"] == table["source_key"]]
    assert dict(zip(own["task_key"], own["key"], strict=True)) == best


def test_a_packed_source_packs_the_target_and_its_points_fit(run, models, tmp_path):
    source = run(tmp_path, models["source"], AutoTVM(kernel_trials=4))
    folder = run(tmp_path, models["target"], TransferTuning(source.id))
    assert {packing.block for packing in folder.assignment.values()} == {16}
    table = frames.transfers(folder)
    convolutions = table[table["kernel_class"].str.startswith("conv2d")]
    assert len(convolutions) and set(convolutions["outcome"]) <= {"tried", "same as a nearer one"}
    for trial in folder.trials():
        assert trial.trial == 0 or trial.strategy == "transfer"


def test_a_run_with_trials_keeps_its_layout(run, models, tmp_path):
    """A fork of a search in NCHW goes on in NCHW, whatever its source is packed like."""
    source = run(tmp_path, models["source"], AutoTVM(kernel_trials=2))
    plain = run(tmp_path, models["target"], ANSOR)
    experiment = plain.experiment.model_copy(update={"steps": (ANSOR, TransferTuning(source.id))})
    plain.write_json("experiment.json", {"format": 1, "experiment": experiment.model_dump(mode="json")})
    tasks = {info.key for info in plain.tasks}
    run(tmp_path, models["target"], folder=plain)
    assert plain.assignment is None and {info.key for info in plain.tasks} == tasks


def test_a_source_without_records_is_refused_before_a_folder_is_written(models, tmp_path):
    experiment = Experiment(model=models["target"], target="cpu", steps=[TransferTuning("alexnet")])
    with pytest.raises(InputError, match=r"'alexnet' has no finished run.*tune it first"):
        tune(experiment, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_steps_compose(run, models, tuned):
    """A descent, a transfer into the same run, and a descent from what the transfer found: the report's future work."""
    droplet, transfer = Droplet(trials=12), TransferTuning(models["source"])
    folder = run(tuned.path.parent, models["target"], AFRESH, droplet, transfer, droplet)
    trials = [trial for trial in folder.trials() if trial.trial > 0]
    steps = [{trial.strategy for trial in trials if trial.step == number} for number in range(4)]
    assert steps == [{"evolution"}, {"droplet"}, {"transfer"}, {"droplet"}] and folder.state.status == "done"
    for key in {trial.task_key for trial in trials}:
        before = [trial for trial in standing(trials) if trial.task_key == key and trial.step < 3 and trial.ok]
        first = next(trial for trial in trials if trial.task_key == key and trial.step == 3)
        assert first.rival == min(before, key=lambda trial: trial.latency_s).key


def test_bursts_with_a_transfer(run, models, tuned):
    parts = [AFRESH.model_copy(update={"max_trials": 8}), TransferTuning(models["source"]), Droplet(max_trials=8)]
    folder = run(tuned.path.parent, models["target"], Repeat(2, parts))
    trials = [trial for trial in folder.trials() if trial.trial > 0]
    taken = Counter((trial.step, trial.strategy) for trial in trials)
    assert folder.state.status == "done" and folder.state.steps_done == 6
    assert taken[0, "evolution"] == taken[3, "evolution"] == 8 and taken[2, "droplet"] == taken[5, "droplet"] == 8
    assert taken[1, "transfer"] > 0 and taken[4, "transfer"] == 0  # what was tried is not measured again


def test_what_each_source_promises(run, models, tuned):
    """The convolutions of the source have the target's classes, one kernel each; the dense layer has not."""
    small = ANSOR.model_copy(update={"max_trials": 8, "reuse": False})
    target, dense = (run(tuned.path.parent, models[name], small) for name in ("target", "dense"))
    found = source_scores([tuned, target, dense]).set_index(["model", "source"])
    assert found.loc[(models["target"], models["source"]), "score"] == pytest.approx(1.0)
    assert found.loc[(models["target"], models["dense"]), "score"] == 0.0
    assert found["chosen"].groupby("model").sum().tolist() == [1, 1, 1]
    assert found.loc[(models["target"], models["source"]), "chosen"]
