"""The two engines and their budgets: one is chosen by its knobs, limits are named, early stopping, past records."""

import math

import pytest

import tvmlab
from tvmlab.core import InputError
from tvmlab.engines import engine
from tvmlab.experiment import Ansor, AutoTVM, Droplet, Experiment, LayoutTuning, Measure, Repeat, Selective, afresh


@pytest.mark.parametrize("engine", [Ansor, AutoTVM])
@pytest.mark.parametrize(
    "value", [0, -1, 100_001, 40.0, True, None, "40", "0 %", "-5 %", "101 %", "100.1%", "%", "x %"]
)
def test_an_early_stopping_threshold_out_of_range_names_the_range(engine, value):
    with pytest.raises(
        InputError, match="1 to 100,000 trials, or a percentage of the budget above 0 % and up to 100 %"
    ):
        engine(early_stopping_threshold=value)


def test_an_early_stopping_threshold_is_a_number_or_a_share_of_a_tasks_trials():
    assert Ansor().patience(9) == 250 and AutoTVM(max_trials=8).patience(9) == 500
    assert Ansor(trials_per_kernel=30, early_stopping_threshold="40%").patience(9) == 12
    assert AutoTVM(kernel_trials=3, exploration_trials=9, early_stopping_threshold="12.5 %").patience(9) == 2
    for step in (Ansor(early_stopping_threshold="100 %"), AutoTVM(early_stopping_threshold="100%", max_trials=8)):
        assert step.patience(9) == math.inf
    assert Ansor(early_stopping_threshold=" 40% ").code() == "Ansor(early_stopping_threshold='40 %')"


@pytest.mark.parametrize("engine", [Ansor, AutoTVM])
def test_a_percentage_is_of_what_a_cap_leaves_to_a_task(engine):
    """40 % of the 1,000 or 2,000 trials that a task could have without the cap would never be reached."""
    plain = engine(early_stopping_threshold="40 %")
    assert plain.model_copy(update={"max_trials": 64}).patience(2) == 13
    assert plain.model_copy(update={"max_trials": 10**6}).patience(2) == plain.patience(2) > 300


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: AutoTVM(kernel_trials=-3), "=-3) is not usable: kernel_trials should be 1 to 100,000 trials"),
        (lambda: AutoTVM(kernel_trials=10**9), "kernel_trials should be 1 to 100,000 trials"),
        (lambda: AutoTVM(kernel_trials="many"), "kernel_trials should be a valid integer, 1 to 100,000 trials"),
        (lambda: Ansor(max_trials=0), "max_trials should be 1 to 100,000,000 trials"),
        (lambda: Droplet(p_value=1.0), "p_value should be at least 0.0001 and below 1"),
        (lambda: Droplet(p_value=1e-6), "p_value should be at least 0.0001 and below 1"),
        (lambda: Selective(similarity=0.0), "similarity should be above 0 and up to 1"),
        (lambda: Measure(build_timeout_s=0.0), "build_timeout_s should be above 0 and up to 3,600 s"),
        (lambda: Measure(build_timeout_s=3601.0), "build_timeout_s should be above 0 and up to 3,600 s"),
        (lambda: Measure(run_timeout_s=-1.0), "run_timeout_s should be above 0 and up to 3,600 s"),
        (lambda: Measure(run_timeout_s=1e9), "run_timeout_s should be above 0 and up to 3,600 s"),
        (lambda: Experiment(model="m", seed=-1), "seed should be 0 to 2,147,483,647"),
        (lambda: Experiment(model=""), "model string should have at least 1 character"),
    ],
)  # fmt: skip
def test_a_number_out_of_range_names_the_whole_range(make, said):
    with pytest.raises(InputError) as caught:
        make()
    assert str(caught.value).endswith(said)


def test_what_is_searched_afresh_starts_no_trial_from_past_records():
    step = AutoTVM(exploration_trials=9, random_trials=3)
    assert afresh([step])[0] == AutoTVM(exploration_trials=9, reuse=False)
    (repeated,) = afresh([Repeat(2, [step])])
    assert repeated.steps == afresh([step])
    warm = step.model_copy(update={"warm_start": ("a-run",)})
    assert afresh([warm])[0].random_trials == 3  # it has records to start from


def test_random_trials_are_a_part_of_the_exploration():
    assert AutoTVM(kernel_trials=5, exploration_trials=9, random_trials=9).total_trials(2) == 18
    with pytest.raises(InputError, match=r"random_trials=10 are more than exploration_trials=9: .*raise exploration"):
        AutoTVM(exploration_trials=9, random_trials=10)
    for knob in ("exploration_trials", "random_trials"):
        said = rf"AutoTVM\({knob}=-1\) is not usable: {knob} should be 0 to 100,000 trials"
        with pytest.raises(InputError, match=said):
            AutoTVM(**{knob: -1})


def test_the_engines_convert_at_the_ratio_of_their_defaults():
    ansor = Ansor(trials_per_kernel=300, early_stopping_threshold=75, max_trials=7, batch_size=4, warm_start=["a"],
                  reuse=False)  # fmt: skip
    assert ansor.as_autotvm() == AutoTVM(
        kernel_trials=600, early_stopping_threshold=150, max_trials=14, batch_size=4, warm_start=["a"], reuse=False
    )
    assert ansor.as_autotvm().as_autoscheduler() == ansor
    assert Ansor(early_stopping_threshold="40 %").as_autotvm() == AutoTVM(early_stopping_threshold="40 %")
    assert AutoTVM(kernel_trials=1).as_autoscheduler().trials_per_kernel == 1
    with pytest.raises(InputError, match=r"kernel_trials=150000.*1 to 100,000"):
        Ansor(trials_per_kernel=75_000).as_autotvm()


def test_the_platforms_names_are_the_same_classes():
    assert tvmlab.AutoschedulerOptions is Ansor and tvmlab.AutoTVMOptions is AutoTVM
    assert "`AutoschedulerOptions`" in Ansor.__doc__ and "`AutoTVMOptions`" in AutoTVM.__doc__


@pytest.mark.parametrize(
    ("name", "knobs", "step"),
    [
        ("", {}, Ansor()),
        ("", {"early_stopping_threshold": 9}, Ansor(early_stopping_threshold=9)),
        ("", {"kernel_trials": 9, "early_stopping_threshold": 3}, AutoTVM(kernel_trials=9, early_stopping_threshold=3)),
        ("", {"random_trials": 0}, AutoTVM()),
        ("autoscheduler", {"population": 9}, Ansor(population=9)),
        ("AutoTVM", {"max_trials": 9}, AutoTVM(max_trials=9)),
    ],
)
def test_an_engine_is_named_or_chosen_by_its_knobs(name, knobs, step):
    assert engine(name, **knobs) == step


@pytest.mark.parametrize(
    ("name", "knobs", "said"),
    [
        (
            "",
            {"kernel_trials": 9, "trials_per_kernel": 9},
            "trials_per_kernel is a knob of Ansor and kernel_trials one",
        ),
        (
            "ansor",
            {"kernel_trials": 9},
            "kernel_trials is a knob of AutoTVM, not of Ansor: Ansor has trials_per_kernel",
        ),
        ("autotvm", {"generations": 9}, "generations is a knob of Ansor, not of AutoTVM: AutoTVM has kernel_trials"),
        ("xgboost", {}, "there is no engine 'xgboost': there are ansor, autoscheduler, autotvm"),
        ("", {"trials": 9}, "Ansor has no knob 'trials'"),
        ("", {"kernel_trials": 0}, "AutoTVM(kernel_trials=0) is not usable"),
    ],
)
def test_knobs_of_the_other_engine_are_refused(name, knobs, said):
    with pytest.raises(InputError) as caught:
        engine(name, **knobs)
    assert said in str(caught.value)


def test_afresh_reuses_nothing():
    steps = [LayoutTuning(), Repeat(2, [Ansor(max_trials=5), Droplet()]), AutoTVM()]
    experiment = Experiment(model="m", steps=steps)
    assert [stage.reuse for stage in experiment.stages if hasattr(stage, "reuse")] == [True] * 4
    changed = experiment.afresh()
    assert [stage.reuse for stage in changed.stages if hasattr(stage, "reuse")] == [False] * 4
    assert Experiment.from_json(changed.model_dump_json()) == changed and changed.stages[1].max_trials == 5


def test_knobs_are_named_where_their_order_says_nothing():
    with pytest.raises(InputError, match=r"AutoTVM takes knobs by name, not 500.*max_trials"):
        AutoTVM(500)
    assert Ansor(500) == Ansor(max_trials=500)
    with pytest.raises(InputError, match="Repeat has no knob 'time'"):
        Repeat(time=3)
