"""Whole runs of selective tuning, with real schedules and invented latencies."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from fake_measurer import FakeMeasurer, latency_of
from matplotlib.figure import Figure
from net import Net

import tvmlab
from tvmlab import frames, layouts, plots, search_process
from tvmlab.core import InputError, Roofline, TrialStatus
from tvmlab.experiment import Experiment, Selective
from tvmlab.layout_plan import lanes_of
from tvmlab.models import load_model
from tvmlab.records import RunFolder
from tvmlab.search_process import search
from tvmlab.spaces.template import TemplateSpace, template_for
from tvmlab.steps_selective import OWN_POINTS
from tvmlab.targets import target
from tvmlab.tasks import extract


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Three convolutions of other shapes and epilogues, and a pool."""
    folder = tmp_path_factory.mktemp("model")
    net = Net(1, 16, 12, 12)
    a = net.op("Relu", net.conv("x", 16, 16, 3, pads=[1] * 4))
    b = net.op("Relu", net.op("Add", "x", net.conv(a, 16, 16, 3, pads=[1] * 4)))
    c = net.op("Relu", net.conv(b, 16, 32, 3, pads=[1] * 4))
    net.model(folder, net.op("MaxPool", c, kernel_shape=[2, 2], strides=[2, 2]))
    return str(folder / "net.onnx")


@pytest.fixture(scope="module")
def cpu():
    """A CPU with AVX-512, whatever this machine has: nothing is measured on it."""
    return replace(target("cpu:znver4"), device="cpu", _roofline=Roofline(peak_gflops=100, bandwidth_gbs=10))


@pytest.fixture
def run(cpu, model, monkeypatch, tmp_path):
    """`run(step, ...)` does a whole run, with invented answers, and returns its folder; `folder=` goes on with one."""
    monkeypatch.setattr(search_process, "named_target", lambda name: cpu)

    def go(*steps, folder=None, measurer=None, stop=None, **options):
        folder = folder or RunFolder.create(Experiment(model=model, target="cpu", steps=steps, **options), tmp_path)
        search(folder, stop or threading.Event(), lambda *_: measurer or FakeMeasurer())
        return folder

    return go


TEMPLATES = Selective(top=3, trials_per_kernel=8, fall_back=0.0)
SKETCHES = Selective(top="50%", trials_per_kernel=8, engine="ansor", population=16, generations=1, fall_back=0.0,
                     similarity=0.3)  # fmt: skip


@pytest.mark.parametrize("step", [TEMPLATES, SKETCHES], ids=["templates", "sketches"])
def test_representatives_are_searched_and_the_others_take_their_schedules(run, step):
    folder = run(step)
    assert folder.state.status == "done"
    table = frames.selective(folder)
    convolutions = table[table["kernel_class"].str.startswith("conv2d")]
    assert len(table) == len([info for info in folder.tasks if info.tunable and info.weight])
    assert convolutions["depend"].nunique() == 1 and (convolutions["role"] == "shared").sum() == len(convolutions) - 1
    for row in table.itertuples():
        trials = [trial for trial in folder.trials() if trial.trial and trial.task_key == row.task_key]
        if row.task == row.depend:
            assert row.role == "searched" and row.rate == 1.0
            assert row.searched == len(trials) <= 8 * len(table) and row.tried == 0
        else:
            own = [t.strategy for t in trials]
            assert set(own) == {"transfer"} and 1 <= len(own) == row.tried and row.searched == 0
            assert row.shared_us == row.best_us == pytest.approx(min(t.latency_s for t in trials) * 1e6)
    assert (
        f"searched {(table['role'] == 'searched').sum()} representatives of {len(table)} tasks" in folder.state.message
    )
    depends = frames.tasks(folder).set_index("task")["depend"]
    assert depends[table["task"]].tolist() == table["depend"].tolist()


def test_the_fastest_schedules_are_those_that_are_shared(run):
    folder = run(TEMPLATES)
    table = frames.selective(folder).set_index("task_key")
    depends = folder.read_json("selective.json")["steps"]["0"]
    by_number = {trial.trial: trial for trial in folder.trials()}
    for key, on in depends["depends"].items():
        if key != on:
            numbers = [row["source_trial"] for row in depends["shared"] if row["task_key"] == key]
            fastest = sorted((t for t in by_number.values() if t.task_key == on and t.trial and t.ok),
                             key=lambda t: t.latency_s)  # fmt: skip
            assert numbers == [trial.trial for trial in fastest[:3]]
            assert table.loc[key, "tried"] <= 3 + OWN_POINTS


@pytest.mark.parametrize("rising", [True, False])
def test_points_of_the_own_template_are_those_that_the_representative_speaks_for(run, model, cpu, rising):
    """Convolutions whose knob `ow_tile` is high are fast (or slow), all of them: such points are tried."""
    loaded, device = load_model(model), cpu.to_tvm()
    spaces = {
        task.key: TemplateSpace(task.key, task.module, device)
        for task in extract(loaded, cpu, layouts.uniform(loaded, lanes_of(cpu)))
        if task.info.kernel_class.startswith("conv2d") and template_for(task.module, device)
    }

    class Measurer(FakeMeasurer):
        def latencies(self, candidate):
            if candidate.key == candidate.task_key or candidate.task_key not in spaces:
                return super().latencies(candidate)
            tile = spaces[candidate.task_key][candidate.decisions[0]]["ow_tile"]
            return (1e-4 / tile if rising else 1e-4 * tile,) * 3

    folder = run(TEMPLATES.model_copy(update={"top": 1, "trials_per_kernel": 32}), measurer=Measurer())
    noted = folder.read_json("selective.json")["steps"]["0"]
    given = {row["key"] for row in noted["shared"]}
    others = [key for key, on in noted["depends"].items() if key != on and key in spaces]
    assert len(others) >= 2
    for key in others:
        space = spaces[key]
        own = [t for t in folder.trials() if t.task_key == key and t.strategy == "transfer" and t.key not in given]
        tiles = sorted(space[index]["ow_tile"] for index in space.starts())
        wanted = tiles[-OWN_POINTS:] if rising else tiles[:OWN_POINTS]
        assert sorted(space[trial.decisions[0]]["ow_tile"] for trial in own) == wanted


def test_the_engine_decides_the_layout(run):
    packed, plain = run(TEMPLATES), run(SKETCHES)
    assert {packing.block for packing in packed.assignment.values()} == {16} and plain.assignment is None


class Slow(FakeMeasurer):
    """Every kernel takes its default latency or a tenth more, but one task's transfers take long."""

    def __init__(self, slow, **options):
        super().__init__(**options)
        self.slow = slow

    def latencies(self, candidate):
        seconds = 1e-4 * (1 + 0.1 * latency_of(candidate.key)) * (50 if candidate.task_key in self.slow else 1)
        return (seconds,) * 3


def other_of(folder):
    """A convolution that takes schedules."""
    table = frames.selective(folder)
    return table[(table["role"] != "searched") & table["kernel_class"].str.startswith("conv2d")].iloc[0]


def test_a_task_that_comes_out_poor_is_searched_after_all(run):
    slow = other_of(run(TEMPLATES)).task_key
    step = TEMPLATES.model_copy(update={"fall_back": 0.5})
    folder = run(step, measurer=Slow({slow}))
    table = frames.selective(folder).set_index("task_key")
    assert table.index[table["role"] == "searched after all"].tolist() == [slow]
    assert table.loc[slow, "searched"] > 0 and "share of the roofline" in table.loc[slow, "poor"]
    assert table.loc[slow, "searched"] == 8 and table.loc[slow, "tried"] == 3 + OWN_POINTS
    assert "1 came out poor and were searched too" in folder.state.message
    never = frames.selective(run(TEMPLATES, measurer=Slow({slow}))).set_index("task_key")
    assert never.loc[slow, "role"] == "shared"


def test_what_a_poor_task_was_lent_does_not_end_its_own_search_early(run):
    """Three schedules that bring nothing, and a search that ends after three trials that bring nothing."""
    slow = other_of(run(TEMPLATES)).task_key
    step = TEMPLATES.model_copy(update={"early_stopping_threshold": 3})

    measurer = FakeMeasurer()

    def lent_fails(candidate):
        tried = [key for key, _ in measurer.asked].count(slow)
        return TrialStatus.RUN_ERROR if candidate.task_key == slow and tried <= 3 + OWN_POINTS else None

    measurer.fails = lent_fails
    folder = run(step, measurer=measurer)
    table = frames.selective(folder).set_index("task_key")
    assert table.loc[slow, "poor"] == "no shared schedule runs" and table.loc[slow, "tried"] == 5
    assert table.loc[slow, "role"] == "searched after all" and table.loc[slow, "searched"] >= 3


def test_a_cluster_whose_representative_has_no_schedule_is_searched(run):
    first = run(TEMPLATES)
    representative = other_of(first).depend
    (key,) = (info.key for info in first.tasks if info.name == representative)
    broken = FakeMeasurer(fails=lambda candidate: TrialStatus.RUN_ERROR if candidate.task_key == key else None)
    table = frames.selective(run(TEMPLATES, measurer=broken))
    others = table[(table["depend"] == representative) & (table["task"] != representative)]
    assert len(others) and set(others["role"]) == {"searched after all"}
    assert set(others["poor"]) == {"its representative has no valid schedule"}
    assert (others["searched"] > 0).all() and (others["tried"] == 0).all()


def test_one_task_alone_is_searched(run, tmp_path):
    net = Net(1, 16)
    net.model(tmp_path, net.op("Gemm", "x", net.weight(16, 8), net.weight(8)))
    folder = RunFolder.create(Experiment(model=str(tmp_path / "net.onnx"), target="cpu", steps=[TEMPLATES]), tmp_path)
    run(folder=folder)
    table = frames.selective(folder)
    assert table["role"].tolist() == ["searched"] * len(table) and folder.state.trials > 0


@pytest.mark.parametrize("count", [3, 19, 21, 26])
def test_a_stopped_run_goes_on_where_it_was(run, count):
    step = TEMPLATES.model_copy(update={"fall_back": 1.0, "batch_size": 2})
    whole = run(step)
    stop = threading.Event()
    measurer = FakeMeasurer(on_measure=lambda number: stop.set() if number >= count else None)
    folder = run(step, measurer=measurer, stop=stop)
    assert folder.state.status == "stopped"
    before, decided = list(folder.trials()), folder.read_json("selective.json")["steps"]["0"]
    run(folder=folder)
    after, noted = list(folder.trials()), folder.read_json("selective.json")["steps"]["0"]
    assert folder.state.status == "done" and after[: len(before)] == before
    programs = [(trial.task_key, trial.key) for trial in after if trial.trial]
    assert len(set(programs)) == len(programs)
    assert noted["depends"] == decided["depends"] and {**noted, "shared": decided["shared"]}.keys() == decided.keys()
    if decided["poor"] is not None:
        assert noted["poor"] == decided["poor"]
    mine, theirs = (frames.selective(each)[["task", "depend", "cluster"]] for each in (folder, whole))
    assert mine.equals(theirs)
    assert "measured before" not in {row["outcome"] for row in noted["shared"]}


def test_the_cap_is_of_the_whole_step(run):
    folder = run(TEMPLATES.model_copy(update={"max_trials": 9, "fall_back": 1.0}))
    assert len([trial for trial in folder.trials() if trial.trial]) <= 9


def test_of_the_cap_the_representatives_leave_the_others_their_part(run):
    whole = frames.selective(run(TEMPLATES))
    others = int((whole["role"] == "shared").sum())
    assert others >= 2 and (whole["role"] != "not reached").all()
    cap = 2 * (3 + OWN_POINTS) * others  # what the others try is half of it
    folder = run(TEMPLATES.model_copy(update={"max_trials": cap, "trials_per_kernel": 500}))
    table = frames.selective(folder)
    shared = table[table["role"] == "shared"]
    assert len(shared) == others and (shared["tried"] == 3 + OWN_POINTS).all()
    assert folder.state.trials <= cap and table["searched"].sum() <= cap // 2
    few = run(TEMPLATES.model_copy(update={"max_trials": 2, "fall_back": 1.0}))
    assert "poor" not in few.state.message
    assert sorted(frames.selective(few)["role"].unique()) == ["not reached", "searched", "shared"]


def test_a_time_limit_leaves_time_to_share(run, monkeypatch):
    """A clock that only trials move: the representatives alone could use up all of it."""
    from tvmlab.session import Session

    monkeypatch.setattr(Session, "elapsed_s", property(lambda self: float(self.trials)))
    step = Selective(top=4, trials_per_kernel=500, fall_back=0.0, batch_size=2)
    folder = run(step, time_limit_s=24.0)
    table = frames.selective(folder)
    shared = table[table["role"] == "shared"]
    assert folder.state.trials <= 25 and len(shared) and (shared["tried"] > 0).any()


def test_the_matrix_of_a_run_is_that_of_its_model(run, model, cpu):
    found, recorded = tvmlab.similarity(model, cpu), frames.similarity(run(TEMPLATES))
    assert found.attrs == recorded.attrs and list(found.index) == list(recorded.index)
    assert np.allclose(found, recorded, atol=1e-4) and np.allclose(found, found.T) and (np.diag(found) == 1).all()
    assert [task for cluster in found.attrs["clusters"] for task in cluster] == list(found.index)
    for cluster in found.attrs["clusters"]:
        assert {found.attrs["depend"][task] for task in cluster} == {cluster[0]}
        assert (found.loc[cluster, cluster] >= 0.5).all(axis=None)
    shown = tvmlab.tasks(model, cpu, layout="auto", depend=True)
    assert shown.loc[shown["tunable"], "depend"].to_dict() == found.attrs["depend"]
    assert set(shown.loc[~shown["tunable"], "depend"]) <= {""} and "depend" not in tvmlab.tasks(model, cpu)
    assert (shown["depend"] != shown.index)[shown["tunable"]].any()  # some task would take another's schedules
    apart = tvmlab.similarity(model, cpu, least=1.0).attrs["clusters"]
    assert len(apart) > len(found.attrs["clusters"])


def test_similarity_refuses_what_is_out_of_range(model, cpu):
    for least in (0, "x", 1.5):
        with pytest.raises(InputError, match=rf"similarity='?{least}.*similarity should be"):
            tvmlab.similarity(model, cpu, least=least)
    with pytest.raises(InputError, match="engine='autotwm'"):
        tvmlab.similarity(model, cpu, engine="autotwm")


def test_the_figure_frames_the_clusters_and_names_their_representatives(model, cpu):
    matrix = tvmlab.similarity(model, cpu)
    ax = plots.similarity(matrix, ax=Figure().subplots())
    sizes = [len(cluster) for cluster in matrix.attrs["clusters"]]
    assert [patch.get_width() for patch in ax.patches] == sizes
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert [label.partition(" ")[0] for label in labels] == [cluster[0] for cluster in matrix.attrs["clusters"]]
    assert labels[0].endswith(f"+ {sizes[0] - 1}")
    assert f"{len(matrix)} tasks in {len(sizes)} clusters" in ax.get_title(loc="left")
    with pytest.raises(InputError, match="no similarity matrix"):
        plots.similarity(matrix.iloc[::-1])


def test_a_run_without_the_step_has_no_clusters(make_run):
    folder = make_run()
    assert frames.selective(folder).empty and set(frames.tasks(folder)["depend"]) == {""}
    with pytest.raises(InputError, match="has no clusters"):
        frames.similarity(folder)
