"""What a step measures again: the later reading counts, in the run's result, its estimate, frames and database."""

import json
from dataclasses import replace

import pytest
from fake_measurer import FakeMeasurer
from test_frames import TRIALS
from test_loop_droplet import SMALL, of_step

from tvmlab import frames
from tvmlab.compat import latest_records, read_database
from tvmlab.core import Trial, TrialStatus, standing
from tvmlab.experiment import Ansor, Droplet


def trial(number, key, step=0, task="task", status=TrialStatus.OK):
    return Trial(task, step, "droplet", number, key, 0, [], status, [1e-3] if status is TrialStatus.OK else [])


def test_the_later_reading_of_a_step_counts():
    again, failed = trial(3, "a"), trial(4, "b", status=TrialStatus.RUN_ERROR)
    others = [trial(2, "b"), trial(5, "a", step=1), trial(6, "a", task="other")]
    assert standing([trial(1, "a"), others[0], again, failed, *others[1:]]) == [others[0], again, failed, *others[1:]]


def test_of_the_records_of_one_schedule_the_last_is_left():
    lines = [
        json.dumps([workload, [[trace, []], [seconds], {}, []]]).encode()
        for workload, trace, seconds in [(0, "x", 1.0), (1, "x", 2.0), (0, "y", 3.0), (0, "x", 4.0)]
    ]
    assert latest_records(lines) == [1, 2, 3]


def test_a_curve_and_a_task_know_no_refuted_reading(make_run):
    folder = make_run(TRIALS)
    lines = (folder.path / "trials.jsonl").read_text().splitlines()
    rows = list(map(json.loads, lines))
    lucky, again = (next(row for row in rows if row["trial"] == number) for number in (5, 6))  # 250 us, 300 us
    again["key"] = lucky["key"]
    (folder.path / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert frames.curve(folder)["estimate_ms"].tolist() == pytest.approx([2.4, 1.4, 1.4, 1.4, 1.1, 1.1, 0.7])
    conv = frames.tasks(folder).set_index("task").loc["conv2d_relu"]
    assert (conv["best_us"], conv["best_trial"], conv["trials"]) == (pytest.approx(300.0), 6, 4)
    assert frames.trials(folder)["latency_us"].min() == pytest.approx(100.0)
    assert 250.0 in frames.trials(folder)["latency_us"].round(6).tolist()


class Lucky(FakeMeasurer):
    """Of each task the first with a rival looks faster, by too few of its pairs to show it; timed again it is not."""

    def __init__(self):
        super().__init__()
        self.first = {}

    def measure(self, candidates):
        for candidate, measured in zip(candidates, super().measure(candidates), strict=True):
            if candidate.rival is None:
                yield measured
                continue
            is_first = candidate.task_key not in self.first
            self.first.setdefault(candidate.task_key, candidate.key)
            rival_s = measured.rival_latencies_s[1]
            ratios = [0.7] * 11 + [1.3] * 9 if is_first else [1.1] * 20
            ours = [ratio * rival_s for ratio in ratios]
            yield replace(measured, latencies_s=ours, rival_latencies_s=[rival_s] * 20)


def test_a_run_does_not_end_with_a_reading_that_was_luck(make_folder, run, tiny_tasks):
    folder = make_folder(steps=[Ansor(max_trials=60, **SMALL), Droplet(trials=12, p_value=0.001)])
    trials = run(folder, Lucky())
    refuted = [found for found in of_step(trials, 1).values() if found and found[0] not in standing(found)]
    database = read_database(folder.path, "llvm").get_all_tuning_records()
    in_database = [min(map(float, record.run_secs)) for record in database]
    assert refuted
    for lucky, *_ in refuted:
        trials_of_task = [trial for trial in trials if trial.task_key == lucky.task_key]
        start_s = next(trial.latency_s for trial in trials_of_task if trial.key == lucky.rival)
        assert min(lucky.latencies_s) == pytest.approx(0.7 * start_s) and not lucky.shown
        assert start_s == min(trial.latency_s for trial in trials_of_task if trial.ok) < lucky.latency_s
        assert lucky.latency_s == pytest.approx(start_s, rel=1e-5)  # also before it was timed again
        assert not any(second == pytest.approx(0.7 * start_s) for second in in_database)
        frame = frames.trials(folder).query("trial == @lucky.trial")
        assert frame["latency_us"].tolist() == pytest.approx([lucky.latency_s * 1e6])
    best = {}
    for trial in standing(trials):
        best[trial.task_key] = min(trial.latency_s, best.get(trial.task_key, trial.latency_s))
    weights = {task.info.key: task.info.weight for task in tiny_tasks.values() if task.info.tunable}
    assert folder.state.estimate_s == pytest.approx(sum(weight * best[key] for key, weight in weights.items()))
