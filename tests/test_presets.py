"""Presets: three budgets of one search; and how long an experiment takes, from past runs where there are some."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_models import net, save

import tvmlab
from tvmlab import rates
from tvmlab.core import InputError
from tvmlab.experiment import Ansor, AutoTVM, Droplet, Experiment, LayoutTuning, Measure, Selective, TransferTuning
from tvmlab.layout_step import packed_at_first
from tvmlab.overview import pack
from tvmlab.presets import PRESETS, estimate_time, preset, presets
from tvmlab.rates import TRIALS_PER_S
from tvmlab.records import RunFolder
from tvmlab.study_length import START_S


def test_each_preset_searches_what_the_one_before_it_searches_and_more():
    fast, default, most = (preset(name, "squeezenet", "cpu", seed=2).steps for name in PRESETS)
    assert fast == tvmlab.best("squeezenet", "cpu").steps
    assert default == (LayoutTuning(), AutoTVM())
    assert most == (
        LayoutTuning(),
        AutoTVM(kernel_trials=3000, early_stopping_threshold="100 %", exploration_trials=3000, random_trials=500),
        Ansor(trials_per_kernel=3000, early_stopping_threshold="100 %"),
    )
    assert fast[1].kernel_trials < default[1].kernel_trials < most[1].kernel_trials


def test_on_a_gpu_templates_come_first_and_sketches_after_them(monkeypatch):
    def best(model, target):
        return Experiment(model=model, steps=(AutoTVM(kernel_trials=64), Ansor(trials_per_kernel=64)))

    monkeypatch.setattr(sys.modules["tvmlab.presets"], "best", best)
    assert preset("default", "alexnet", "cuda").steps == (AutoTVM(), Ansor())
    assert [step.kind for step in preset("max", "alexnet", "cuda").steps] == ["autotvm", "ansor"]


def test_a_preset_takes_the_knobs_of_an_experiment():
    found = preset("fast", "alexnet", "cpu", seed=7, time_limit_s=60.0)
    assert (found.seed, found.time_limit_s, found.target) == (7, 60.0, "cpu")
    assert found.measure == tvmlab.best("alexnet", "cpu").measure
    with pytest.raises(InputError, match="there is no preset 'slow': there are fast, default, max"):
        preset("slow", "alexnet")
    with pytest.raises(InputError, match="unknown model 'alexnit'"):
        preset("fast", "alexnit", "cpu")


def test_a_file_with_symbolic_dimensions(tmp_path):
    path = str(save(net("g (float[N,T,4] x) => (float[N,T,8] z) { z = MatMul (x, w) }"), tmp_path))
    found = preset("default", path, "cpu", batch=2, dims={"T": 6})
    assert (found.batch, found.dims) == (2, {"T": 6})
    assert found.measure == tvmlab.best(path, "cpu", batch=2, dims={"T": 6}).measure
    assert presets(path, "cpu", tmp_path, dims={"T": 6}).loc["fast", "trials"] > 0
    with pytest.raises(InputError, match=r"without a size: T.*dims=\{'T': 128\}"):
        presets(path, "cpu", tmp_path)


@pytest.fixture
def cores(monkeypatch):
    """`cores(16)` makes this a machine of so many."""
    return lambda count: monkeypatch.setattr(rates, "read_cpu", lambda: SimpleNamespace(cores=count))


def test_without_past_runs_guessed_rates_say_how_long(tiny_onnx, tmp_path, cores):
    cores(2)
    asked = Experiment(model=tiny_onnx, target="cpu", steps=[Ansor(trials_per_kernel=30), AutoTVM(kernel_trials=50)])
    found = estimate_time(asked, tmp_path)
    tasks = int(tvmlab.tasks(tiny_onnx, "cpu", layout="auto")["tunable"].sum())  # AutoTVM packs the model
    templates = found.trials - 30 * tasks
    assert found.reused == 0 and tasks > 2
    searches_s = 30 * tasks / TRIALS_PER_S["ansor"] + templates / TRIALS_PER_S["autotvm"]
    assert found.seconds == pytest.approx(START_S + tasks / TRIALS_PER_S["default"] + searches_s)
    assert "ansor 3 trials/s (guessed for 2 cores), autotvm 5 trials/s (guessed for 2 cores)" in str(found)
    limited = asked.model_copy(update={"time_limit_s": 9.0})
    assert estimate_time(limited, tmp_path).seconds == 9.0


def test_what_is_guessed_is_for_the_cores_that_build(tiny_onnx, tmp_path, cores):
    asked = Experiment(model=tiny_onnx, target="cpu", steps=[Ansor(trials_per_kernel=300)])

    def of(count, workers=None):
        cores(count)
        return estimate_time(asked.model_copy(update={"measure": Measure(build_workers=workers)}), tmp_path)

    one, two, four, many = (of(count).seconds - START_S for count in (1, 2, 4, 128))
    assert two == pytest.approx(60 * 10 / TRIALS_PER_S["ansor"] + 2 / TRIALS_PER_S["default"])
    assert one == pytest.approx(two * 5 / 3) and four == pytest.approx(two * 2 / 3)  # two thirds of a trial are built
    assert two / 3 < many < two / 2.8  # candidates run one after another, whatever the cores
    assert of(16).basis == "ansor 7.2 trials/s (guessed for 16 cores)"
    assert of(1).basis.endswith("(guessed for 1 core)") and of(16, workers=1) == of(1)
    assert of(2, workers=64) == of(2)


@pytest.fixture
def past_run(make_run, cpu):
    """`past_run(model, seconds per trial)`: a run of 40 trials of Ansor on this machine, its tasks other ones."""

    def make(model, seconds):
        environment = {"target": cpu.as_record()}
        trials = [("conv2d_relu", 9.0 + number) for number in range(40)]
        return make_run(trials, model=model, environment=environment, seconds_per_trial=seconds)

    return make


def test_past_runs_on_this_machine_say_how_fast_trials_are(tiny_onnx, past_run, cpu):
    runs_dir = past_run("alexnet", 0.5).path.parent
    asked = Experiment(model=tiny_onnx, target="cpu", steps=[Ansor(trials_per_kernel=30)])
    found = estimate_time(asked, runs_dir)
    assert found.seconds == pytest.approx(START_S + 2 / TRIALS_PER_S["default"] + 60 / 2.0, rel=0.01)
    assert found.basis == "ansor 2 trials/s (1 past run here)"
    foreign = past_run("alexnet", 0.01)
    foreign.write_json("environment.json", {"target": {"attrs": {**cpu.attrs, "mcpu": "znver1"}}})
    assert estimate_time(asked, runs_dir) == found
    past_run(tiny_onnx, 2.0)  # the same model's runs say more
    assert estimate_time(asked, runs_dir).basis == "ansor 0.5 trials/s (1 past run here)"


def test_what_is_reused_takes_no_time(tiny_onnx, tiny_tasks, make_run, cpu):
    infos = [replace(task.info, name=name) for name, task in tiny_tasks.items()]
    trials = [(name, 9.0 + number) for number in range(30) for name in ("conv2d+relu", "matmul+add")]
    run = make_run(trials, tasks=infos, defaults={}, model=tiny_onnx, environment={"target": cpu.as_record()})
    assert json.loads((run.path / "tasks.json").read_bytes())[0]["key"] == infos[0].key
    asked = Experiment(model=tiny_onnx, target="cpu", steps=[Ansor(trials_per_kernel=40, early_stopping_threshold=99)])
    found = estimate_time(asked, run.path.parent)
    assert (found.trials, found.reused) == (20 + 2, 60)
    assert "beside 60 of earlier runs" in str(found)
    assert found.past["ansor"].tolist() == [30, 30] and set(found.past["runs"]) == {run.id}
    afresh = estimate_time(asked.afresh(), run.path.parent)
    assert (afresh.trials, afresh.reused) == (80, 0)
    assert [path.name for path in run.path.parent.iterdir()] == [run.id]  # nothing was written
    assert not (run.path / "reuse.json").exists()


@pytest.fixture
def ansor_run(tiny_onnx, tiny_model, make_run, cpu):
    """`ansor_run(*steps)`: a past run of four trials of Ansor of each task that a run of these steps would have."""

    def make(*steps):
        tasks = pack(tiny_model, cpu, packed_at_first(tiny_model, cpu, steps, [])).tasks
        infos = [task.info for task in tasks if task.info.tunable]
        trials = [(info.name, 9.0 + number) for number in range(4) for info in infos]
        return make_run(trials, tasks=infos, defaults={}, model=tiny_onnx, environment={"target": cpu.as_record()})

    return make


@pytest.mark.parametrize(
    "steps", [[Ansor(reuse=False)], [Droplet()], [Selective(engine="ansor")], [Ansor(reuse=False), Droplet()]]
)
def test_where_no_stage_reuses_records_there_is_no_past(tiny_onnx, ansor_run, steps):
    asked = Experiment(model=tiny_onnx, target="cpu", steps=steps)
    runs_dir = ansor_run(*asked.stages).path.parent
    found = estimate_time(asked, runs_dir)
    assert found.reused == 0 and found.past.empty
    assert len(estimate_time(asked.model_copy(update={"steps": (Ansor(),)}), runs_dir).past) == 2


def test_trials_count_for_the_engine_that_made_them_alone(tiny_onnx, ansor_run):
    asked = Experiment(model=tiny_onnx, target="cpu", steps=[AutoTVM(), Ansor()])
    runs_dir = ansor_run(*asked.stages).path.parent
    both = estimate_time(asked, runs_dir)
    tasks = len(both.past)
    assert both.past["ansor"].tolist() == [4] * tasks and both.reused == 4 * tasks > 0
    for steps in ((AutoTVM(),), (AutoTVM(), Ansor(reuse=False))):
        other = estimate_time(asked.model_copy(update={"steps": steps}), runs_dir)
        assert other.past[["ansor", "autotvm"]].to_numpy().sum() == other.reused == 0
        assert other.past["best_trial"].tolist() == both.past["best_trial"].tolist()  # which are measured again first


def of_templates(model, trials):
    """The trials that a model's tasks can have of so many each, packed as AutoTVM does: small templates have fewer."""
    packed = tvmlab.tasks(model, "cpu", layout="auto")
    spaces = [tvmlab.space(model, name, "cpu") for name in packed.index[packed["tunable"]]]
    return sum(min(trials, len(space)) if space.kind == "template" else trials for space in spaces)


def test_no_more_trials_are_counted_than_a_template_has_points(tiny_onnx, tmp_path):
    for trials in (1, 50, 2000):
        asked = Experiment(model=tiny_onnx, target="cpu", steps=[AutoTVM(kernel_trials=trials)])
        assert estimate_time(asked, tmp_path).trials == of_templates(tiny_onnx, trials)
    tasks = of_templates(tiny_onnx, 1)
    assert of_templates(tiny_onnx, 2000) < 2000 * tasks
    capped = AutoTVM(max_trials=of_templates(tiny_onnx, 2000) + 7)  # more than there are
    found = estimate_time(Experiment(model=tiny_onnx, target="cpu", steps=[capped]), tmp_path)
    assert found.trials == of_templates(tiny_onnx, 2000)


@pytest.mark.parametrize("engine", ["autotvm", "ansor"])
def test_selective_is_estimated_for_the_model_packed_as_its_engine_packs_it(tiny_onnx, tmp_path, engine):
    step = Selective(engine=engine, trials_per_kernel=40)
    found = estimate_time(Experiment(model=tiny_onnx, target="cpu", steps=[step]), tmp_path)
    plain = int(tvmlab.tasks(tiny_onnx, "cpu")["tunable"].sum())
    clusters = tvmlab.similarity(tiny_onnx, "cpu", engine=engine).attrs["clusters"]
    assert max(map(len, clusters)) == 1  # each is searched
    assert found.trials == (of_templates(tiny_onnx, 40) if engine == "autotvm" else 40 * plain)
    assert found.basis.endswith("without what is searched after all because shared schedules are poor")


def test_a_transfer_is_estimated_for_the_model_packed_as_its_source_is(tiny_onnx, tmp_path, make_run, cpu, monkeypatch):
    source = make_run([("conv2d_relu", 9.0)], model="alexnet", environment={"target": cpu.as_record()})
    asked = Experiment(model=tiny_onnx, target="cpu", steps=[TransferTuning(source.id, trials_per_kernel=1)])
    plain = estimate_time(asked, source.path.parent)
    about = "conv2d 1x8x14x14 16x8x3x3"
    source.write_json("assignment.json", {"sites": [{"site": "conv0", "about": about, "packing": "NCHW8c"}]})
    packed = estimate_time(asked, source.path.parent)
    tasks = [tvmlab.tasks(tiny_onnx, "cpu", layout=layout)["tunable"].sum() for layout in ("NCHW", "NCHW8c")]
    assert [plain.trials, packed.trials] == tasks and tasks[0] < tasks[1]
    with pytest.raises(InputError, match="'vgg19' has no finished run"):
        estimate_time(asked.model_copy(update={"steps": (TransferTuning("vgg19"),)}), source.path.parent)


@pytest.mark.parametrize("knobs", [{"measure": None}, {"steps": ()}, {"steps": (), "measure": None}])
def test_what_a_preset_decides_cannot_be_given(knobs):
    with pytest.raises(InputError, match=r"a preset decides .* itself: leave them out"):
        preset("fast", "alexnet", "cpu", **knobs)


def test_the_presets_of_a_model_as_a_frame(tiny_onnx, tmp_path):
    found = presets(tiny_onnx, "cpu", tmp_path)
    assert found.index.tolist() == list(PRESETS)
    assert found["trials"].is_monotonic_increasing and found["seconds"].is_monotonic_increasing
    assert found.loc["max", "steps"].startswith("LayoutTuning() > AutoTVM(kernel_trials=3000")
    # The layout step's trials are the same in all; then each of the tunable tasks gets its budget.
    asked = Experiment(model=tiny_onnx, target="cpu", steps=[LayoutTuning(), Ansor(max_trials=1)])
    layouts = estimate_time(asked, tmp_path).trials - 1
    ansor = estimate_time(asked.model_copy(update={"steps": (LayoutTuning(), Ansor(trials_per_kernel=1))}), tmp_path)
    tasks = ansor.trials - layouts
    fast, default, most = (found.loc[name, "trials"] - layouts for name in ("fast", "default", "max"))
    assert tasks < fast <= 48 * tasks and fast <= default <= 2000 * tasks
    assert 3000 * tasks + default <= most <= 6000 * tasks


def test_layouts_that_are_reused_take_no_time(tiny_onnx, tiny_model, tmp_path, cpu):
    from tvmlab.layout_plan import LayoutPlan

    asked = Experiment(model=tiny_onnx, target="cpu", steps=[LayoutTuning(), AutoTVM(kernel_trials=10)])
    folder = RunFolder.create(asked, tmp_path)
    folder.write_json("environment.json", {"target": cpu.as_record()})
    chosen = LayoutPlan(tiny_model, cpu, LayoutTuning()).provisional
    folder.write_json("assignment.json", {**chosen, "finished": True})
    default = {"step": -1, "trial": 0, "elapsed_s": 1.0}
    (folder.path / "trials.jsonl").write_text(json.dumps(default) + "\n")
    folder.write_state(replace(folder.state, status="done"))
    found, plain = (estimate_time(each, tmp_path) for each in (asked, asked.afresh()))
    layouts = estimate_time(asked.model_copy(update={"steps": (LayoutTuning(reuse=False),)}), tmp_path)
    assert 0 < found.trials < 10 * layouts.trials and found.trials <= plain.trials - layouts.trials
    assert (found.layouts, plain.layouts) == (folder.id, "")


# benchmarks/presets.py


@pytest.fixture
def concluded(monkeypatch, capsys):
    """`concluded(rows)` is what the benchmark prints of these at the end."""
    monkeypatch.syspath_prepend(str(Path(tvmlab.__file__).parents[1] / "benchmarks"))
    spec = importlib.util.spec_from_file_location("presets_benchmark", sys.path[0] + "/presets.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def said(rows):
        script.conclude(rows)
        return capsys.readouterr().out.splitlines()

    return said


def ratio_row(model, seed, ratio, slower=False):
    return {"model": model, "seed": seed, "ratio": ratio, "low": ratio - 0.01, "high": ratio + 0.01, "slower": slower}


def test_the_benchmark_ends_with_the_largest_of_the_models_medians(concluded):
    """Not with the largest row, which the noise of one seed decides."""
    rows = [ratio_row("squeezenet", seed, ratio) for seed, ratio in enumerate((0.90, 1.20, 0.95))]
    rows[1]["slower"] = True
    rows += [ratio_row("resnet18", seed, ratio) for seed, ratio in enumerate((0.97, 0.99, 0.98))]
    *said, last = concluded(rows)
    assert said == [
        "slower beyond noise: 1 of 6",
        "squeezenet: median 0.950 [0.900, 1.200] of 3 seeds",
        "resnet18: median 0.980 [0.970, 0.990] of 3 seeds",
    ]
    found = json.loads(last)
    assert (found["benchmark"], found["ratio"], found["low"], found["high"]) == ("presets", 0.98, 0.97, 0.99)
    assert (found["goal"], found["better"]) == (1.0, "lower")


def test_of_one_seed_the_benchmark_has_the_rows_own_interval(concluded):
    found = json.loads(concluded([ratio_row("squeezenet", 0, 0.9)])[-1])
    assert (found["ratio"], found["low"], found["high"]) == (0.9, 0.89, 0.91)
