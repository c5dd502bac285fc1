"""Experiments: validated with a readable error, frozen, and the same after JSON and after their own code."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvmlab.core import InputError
from tvmlab.experiment import (
    STEPS,
    Ansor,
    AutoTVM,
    Droplet,
    Experiment,
    LayoutTuning,
    Measure,
    Repeat,
    Selective,
    TransferTuning,
    unit_of,
)

NAMES = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=12)
THRESHOLDS = st.integers(1, 100_000) | st.sampled_from(["1 %", "12.5 %", "100 %"])
ANSOR = st.builds(
    Ansor,
    trials_per_kernel=st.integers(1, 100_000),
    early_stopping_threshold=THRESHOLDS,
    reuse=st.booleans(),
    max_trials=st.none() | st.integers(1, 100_000_000),
    batch_size=st.none() | st.integers(1, 1024),
    population=st.integers(8, 65536),
    generations=st.integers(1, 100),
    warm_start=st.lists(NAMES, max_size=2),
)
AUTOTVM = st.builds(
    AutoTVM,
    kernel_trials=st.integers(1, 100_000),
    early_stopping_threshold=THRESHOLDS,
    reuse=st.booleans(),
    tuner=st.sampled_from(["xgb", "genetic", "random", "grid"]),
    max_trials=st.none() | st.integers(1, 100_000_000),
    batch_size=st.none() | st.integers(1, 1024),
    warm_start=st.lists(NAMES, max_size=2),
)
LAYOUT = st.builds(
    LayoutTuning,
    trials_per_variant=st.integers(1, 1000),
    blocks=st.none() | st.lists(st.integers(0, 1024), min_size=1, max_size=3),
    algorithms=st.sampled_from([("direct",), ("direct", "winograd4"), ("winograd2", "direct")]),
    warm_start=st.lists(NAMES, max_size=2),
)
DROPLET = st.builds(
    Droplet,
    trials=st.integers(1, 100_000),
    p_value=st.floats(1e-4, 1, exclude_max=True),
    start=st.sampled_from(["best", "default"]),
)
TRANSFER = st.builds(
    TransferTuning,
    source=NAMES | st.lists(NAMES.filter(lambda name: name != "auto"), min_size=1, max_size=3),
    refine=st.integers(0, 9),
)
SELECTIVE = st.builds(
    Selective,
    top=st.integers(1, 100_000) | st.integers(1, 100).map("{}%".format),
    similarity=st.floats(0, 1, exclude_min=True),
    fall_back=st.floats(0, 1),
    trials_per_kernel=st.integers(1, 100_000),
    warm_start=st.lists(NAMES, max_size=2),
)
SEARCHES = ANSOR | AUTOTVM | DROPLET | TRANSFER | SELECTIVE
REPEAT = st.builds(Repeat, times=st.integers(1, 9), steps=st.lists(SEARCHES, min_size=1, max_size=2))
MEASURE = st.builds(
    Measure,
    repeats=st.integers(1, 1000),
    min_repeat_ms=st.floats(1e-3, 10_000),
    slow_factor=st.floats(1, 1e6),
    build_timeout_s=st.floats(1e-3, 3600),
    check=st.booleans(),
    build_workers=st.none() | st.integers(1, 256),
)
EXPERIMENT = st.builds(
    Experiment,
    model=NAMES,
    target=NAMES,
    batch=st.integers(1, 65536),
    dims=st.dictionaries(NAMES, st.integers(1, 10**6), max_size=2),
    steps=st.lists(SEARCHES | REPEAT, min_size=1, max_size=3) | st.tuples(LAYOUT) | st.tuples(LAYOUT, SEARCHES),
    seed=st.integers(0, 2**31 - 1),
    time_limit_s=st.none() | st.floats(1e-3, 1e9),
    measure=MEASURE,
)


@given(EXPERIMENT)
def test_json_round_trip(experiment):
    assert Experiment.from_json(experiment.model_dump_json()) == experiment
    assert Experiment.from_json(json.dumps(experiment.model_dump(mode="json"))) == experiment


@given(EXPERIMENT)
def test_code_makes_the_same_object(experiment):
    assert (
        eval(experiment.code(), {known.__name__: known for known in (Experiment, *STEPS, Repeat, Measure)})
        == experiment
    )


def test_code_leaves_defaults_out():
    assert Experiment(model="alexnet").code() == "Experiment(model='alexnet')"
    assert Experiment(model="alexnet", measure=Measure(repeats=3)).code() == (
        "Experiment(model='alexnet', measure=Measure(repeats=3))"
    )


def test_options_are_frozen():
    experiment = Experiment(model="alexnet")
    with pytest.raises(ValueError, match="frozen"):
        experiment.seed = 1
    with pytest.raises(ValueError, match="frozen"):
        experiment.steps[0].population = 9


@pytest.mark.parametrize(
    ("make", "knob", "value", "limit"),
    [
        (lambda: Ansor(trials_per_kernel=0), "trials_per_kernel", "0", "1"),
        (lambda: Ansor(trials_per_kernel=100_001), "trials_per_kernel", "100001", "100,000"),
        (lambda: Ansor(population=7), "population", "7", "8"),
        (lambda: Ansor(max_trials=0), "max_trials", "0", "1"),
        (lambda: AutoTVM(kernel_trials=0), "kernel_trials", "0", "1"),
        (lambda: AutoTVM(tuner="annealing"), "tuner", "'annealing'", "'xgb', 'genetic', 'random', 'grid' or 'droplet'"),
        (lambda: Measure(min_repeat_ms=0.0), "min_repeat_ms", "0.0", "should be above 0 and up to 10,000 ms"),
        (lambda: Measure(slow_factor=0.5), "slow_factor", "0.5", "1"),
        (lambda: Experiment(model="m", batch=0), "batch", "0", "1"),
        (lambda: Experiment(model="m", seed=-1), "seed", "-1", "0"),
        (
            lambda: Experiment(model="m", time_limit_s=0),
            "time_limit_s",
            "0",
            "should be above 0 and up to 1,000,000,000 s",
        ),
        (lambda: Experiment(model="m", dims={"n": 0}), "dims", "'n': 0", "at least 1"),
        (lambda: Experiment(model="m", measure={"repeats": 0}), "repeats", "0", "1"),
        (lambda: Experiment(model="m", steps=[{"kind": "ansor", "population": 7}]), "population", "7", "8"),
    ],
)
def test_out_of_range_names_knob_value_and_limit(make, knob, value, limit):
    with pytest.raises(InputError) as caught:
        make()
    message = str(caught.value)
    assert knob in message and f"={value}" in message.replace("={'n': 0}", "='n': 0") and limit in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("values", "knob"),
    [
        ({"batch": "1"}, "batch"),
        ({"batch": True}, "batch"),
        ({"batch": 1.0}, "batch"),
        ({"seed": "0"}, "seed"),
        ({"seed": False}, "seed"),
        ({"model": 3}, "model"),
        ({"model": ""}, "model"),
        ({"time_limit_s": "10"}, "time_limit_s"),
        ({"time_limit_s": True}, "time_limit_s"),
        ({"time_limit_s": float("nan")}, "time_limit_s"),
        ({"time_limit_s": float("inf")}, "time_limit_s"),
        ({"dims": {"n": "3"}}, "dims.n"),
        ({"dims": {"n": True}}, "dims.n"),
        ({"steps": []}, "steps"),
        ({"steps": "ansor"}, "steps"),
        ({"steps": [3]}, "steps.0"),
        ({"measure": {"check": 1}}, "check"),
        ({"measure": {"repeats": True}}, "repeats"),
        ({"steps": [{"kind": "ansor", "warm_start": "a-run"}]}, "warm_start"),
        ({"steps": [{"kind": "autotvm", "max_trials": "64"}]}, "max_trials"),
        ({"steps": [{"kind": "autotvm", "tuner": "annealing"}]}, "tuner"),
    ],
)
def test_wrong_types_are_refused_and_named(values, knob):
    with pytest.raises(InputError) as caught:
        Experiment(**{"model": "alexnet", **values})
    assert knob in str(caught.value)


def test_unknown_knob_lists_the_known_ones():
    with pytest.raises(InputError, match=r"Ansor has no knob 'trials'.*max_trials"):
        Ansor(trials=3)
    with pytest.raises(InputError, match=r"^AutoTVM has no knob 'trials': its knobs are kernel_trials"):
        Experiment(model="alexnet", steps=[{"kind": "autotvm", "trials": 3}])
    with pytest.raises(InputError, match="'modle'"):
        Experiment(modle="alexnet")


def test_missing_model():
    with pytest.raises(InputError, match="Experiment needs 'model'"):
        Experiment()


@pytest.mark.parametrize("step", [{"kind": "annealing"}, {"population": 16}, {}])
def test_unknown_step(step):
    with pytest.raises(InputError, match=r"^steps\.1: unknown step") as caught:
        Experiment(model="alexnet", steps=[Ansor(), step])
    assert repr(step) in str(caught.value)
    assert all(f"{known.__name__}(...)" in str(caught.value) for known in STEPS)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": "m", "seed": 1.5}', '{"model": "m", "color": 1}'])
def test_damaged_json_is_an_input_error(text):
    with pytest.raises(InputError):
        Experiment.from_json(text)


def test_total_trials():
    assert Ansor().total_trials(20) == 20_000
    assert Ansor(trials_per_kernel=8).total_trials(3) == 24
    assert Ansor(trials_per_kernel=8, max_trials=10).total_trials(3) == 10
    assert Ansor(trials_per_kernel=8, max_trials=100).total_trials(3) == 24

    assert (AutoTVM().total_trials(3), AutoTVM().task_trials) == (6000, 2000)
    assert AutoTVM(kernel_trials=8, max_trials=10).total_trials(3) == 10
    assert Ansor(trials_per_kernel=8).task_trials is None


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"blocks": []}, "blocks should name a block"),
        ({"blocks": [-1]}, "greater than or equal to 0"),
        ({"algorithms": ["fft"]}, "algorithms has no 'fft': it may hold direct, winograd2, winograd4"),
        ({"algorithms": ["winograd2"]}, "should hold 'direct'"),
    ],
)
def test_a_layout_step_names_the_knob_that_is_wrong(knobs, said):
    with pytest.raises(InputError, match=r"LayoutTuning\(") as caught:
        LayoutTuning(**knobs)
    assert said in str(caught.value)


@pytest.mark.parametrize("steps", [[Ansor(), LayoutTuning()], [LayoutTuning(), LayoutTuning()]])
def test_the_layout_step_comes_first(steps):
    with pytest.raises(InputError, match="LayoutTuning is not the first step"):
        Experiment(model="alexnet", steps=steps)


def test_a_variant_gets_its_trials_and_a_transform_a_quarter():
    step = LayoutTuning(trials_per_variant=12)
    assert (step.total_trials(3), step.task_trials, step.batch_size, step.transform_trials) == (36, 12, 12, 3)
    assert LayoutTuning(trials_per_variant=1).transform_trials == 2


@pytest.mark.parametrize("options", [*STEPS, Measure, Experiment])
def test_every_knob_carries_its_help_and_shows_it(options):
    shown = (options(model="alexnet") if options is Experiment else options())._repr_html_()
    for name, field in options.model_fields.items():
        if name != "kind":
            assert field.description and name in shown
            if name.endswith("_s"):
                assert unit_of(field) == "s"
            if name.endswith("_ms"):
                assert unit_of(field) == "ms"


def test_html_escapes_what_the_user_typed():
    assert "<script>" not in Experiment(model="<script>")._repr_html_()


def test_repetitions_are_written_out_in_order():
    steps = [Repeat(2, [Ansor(max_trials=5), Droplet()]), TransferTuning("alexnet")]
    assert [stage.kind for stage in Experiment(model="m", steps=steps).stages] == [
        *("ansor", "droplet") * 2,
        "transfertuning",
    ]
    with pytest.raises(InputError, match="LayoutTuning is not the first"):
        Experiment(model="m", steps=[Repeat(2, [LayoutTuning()])])


@pytest.mark.parametrize("source", [(), "", ("auto", "alexnet")])
def test_a_source_is_named_or_chosen(source):
    with pytest.raises(InputError, match="source"):
        TransferTuning(source)
