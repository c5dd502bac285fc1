"""The allocation of trials to tasks, with invented latencies."""

from collections import Counter

import pytest

from tvmlab.core import Roofline, TaskInfo
from tvmlab.search.allocate import Allocator, fit_batch_size, fit_descent_batches, fit_template_batches

ROOFLINE = Roofline(peak_gflops=100.0, bandwidth_gbs=100.0)


def task(key, *, weight=1, flops=1e8, kernel_class=None):
    return TaskInfo(key, key, kernel_class or key, weight, flops, 1e3, True)


def spend(allocator, total, batch, measure):
    """Spend a budget as the loop does; returns the tasks in the order in which they were chosen."""
    order, trials = [], Counter()
    while total > 0 and (key := allocator.next_task()) is not None:
        count = min(batch, total)
        allocator.begin(key, count)
        allocator.record(key, [measure(key, trials[key] + number) for number in range(1, count + 1)])
        trials[key] += count
        total -= count
        order.append(key)
    return order


def falling(defaults, factor=0.1):
    """A task comes down to a tenth of its default, by the usual curve of diminishing returns."""
    return lambda key, number: defaults[key] * (factor + (1 - factor) / (1 + number))


def make(tasks, defaults, roofline=None, early_stopping=1000):
    return Allocator(tasks, defaults, roofline, early_stopping)


def test_a_small_budget_goes_to_the_largest_weight_times_default():
    tasks = [task(f"t{n}", weight=1 + n % 2) for n in range(10)]
    defaults = {f"t{n}": 1e-3 * (n + 1) for n in range(10)}
    order = spend(make(tasks, defaults), 40, 8, falling(defaults))
    cost = {info.key: info.weight * defaults[info.key] for info in tasks}
    largest = sorted(cost, key=cost.get, reverse=True)
    assert order[0] == largest[0] == "t9"
    assert set(order) <= set(largest[:5])


def test_a_task_that_costs_nothing_comes_last():
    tasks = [task("free"), task("dear")]
    defaults = {"free": 0.0, "dear": 1e-2}
    assert set(spend(make(tasks, defaults), 64, 8, falling(defaults))) == {"dear"}


def test_a_large_budget_reaches_every_task():
    tasks = [task(f"t{n}") for n in range(8)]
    defaults = {f"t{n}": 1e-3 * 2**n for n in range(8)}
    counts = Counter(spend(make(tasks, defaults), 4000, 8, falling(defaults)))
    assert set(counts) == set(defaults)
    assert counts["t7"] > counts["t4"] > counts["t0"]


def test_a_task_at_its_roofline_gets_nothing_more():
    tasks = [task("limit", flops=1e8), task("other", flops=1e6)]
    allocator = make(tasks, {"limit": 1.0, "other": 1e-4}, ROOFLINE)
    assert allocator.next_task() == "limit"
    allocator.begin("limit", 8)
    allocator.record("limit", [ROOFLINE.latency_s(1e8, 1e3)] * 8)
    order = spend(allocator, 160, 8, falling({"other": 1e-4}))
    assert set(order[2:]) == {"other"}  # the past slope may speak for it once


def test_a_task_that_stopped_improving_is_finished_early():
    tasks = [task("flat"), task("other")]
    allocator = make(tasks, {"flat": 1.0, "other": 1e-6}, early_stopping=20)
    measured = Counter()

    def measure(key, number):
        measured[key] += 1
        return 0.5

    spend(allocator, 1000, 4, measure)
    # The first trial improves; twenty more do not. The rest of the budget is not spent.
    assert 21 <= measured["flat"] <= 24 and 21 <= measured["other"] <= 24
    assert allocator.next_task() is None


def test_an_improvement_starts_the_count_anew_but_noise_does_not():
    allocator = make([task("a")], {"a": 1.0}, early_stopping=4)
    allocator.record("a", [0.5, 0.6, 0.6, 0.6, 0.4, 0.6, 0.6, 0.6])
    assert allocator.next_task() == "a"
    allocator.record("a", [0.39999])  # a fortieth of a thousandth better: the fourth without an improvement
    assert allocator.next_task() is None


def test_failed_trials_count_as_no_improvement():
    allocator = make([task("a")], {"a": 1.0}, early_stopping=5)
    allocator.record("a", [None] * 4)
    assert allocator.next_task() == "a"
    allocator.record("a", [None])
    assert allocator.next_task() is None


def test_a_finished_task_is_not_named_again():
    allocator = make([task("a"), task("b")], {"a": 1.0, "b": 0.1})
    allocator.finish("a")
    assert allocator.next_task() == "b"
    allocator.finish("b")
    assert allocator.next_task() is None


def test_a_task_that_waits_is_passed_over_for_now():
    allocator = make([task("a"), task("b")], {"a": 1.0, "b": 0.1})
    assert allocator.next_task({"a"}) == "b"
    assert allocator.next_task({"a", "b"}) is None
    assert allocator.next_task() == "a"


@pytest.mark.parametrize(("total", "tasks"), [(1, 1), (100, 20), (2000, 20), (10**6, 3)])
def test_a_descents_batches_are_4_to_16(total, tasks):
    first, later = fit_descent_batches(total, tasks)
    assert first == later and 4 <= first <= 16
    assert fit_descent_batches(10 * total, tasks) >= (first, later)


def test_trials_under_way_count_as_spent():
    allocator = make([task("a"), task("b")], {"a": 1.0, "b": 0.9})
    assert allocator.is_fresh("a")
    assert allocator.next_task() == "a"
    allocator.begin("a", 8)
    assert allocator.is_fresh("a")  # until a trial has ended
    assert allocator.next_task() == "b"


def test_a_task_without_any_latency_is_still_tried():
    tasks = [task("broken", flops=1e9), task("cheap", flops=1e3)]
    allocator = make(tasks, {"broken": None, "cheap": 1e-6})
    assert allocator.next_task() == "broken"


def test_the_best_of_a_class_tells_what_the_others_can_reach():
    """One of two equal convolutions is as fast as the other may become, so an unrelated task comes first."""
    tasks = [task("a", kernel_class="conv"), task("b", kernel_class="conv"), task("c", kernel_class="pool")]
    allocator = make(tasks, {"a": 1.0, "b": 1.0, "c": 0.9})
    allocator.begin("a", 8)
    allocator.record("a", [0.9] * 8)  # the class reaches 0.45 at best, so b can gain 0.55 and c 0.9
    assert allocator.next_task() == "c"


def test_equal_tasks_are_chosen_in_their_order_every_time():
    tasks = [task(f"t{n}") for n in range(6)]
    defaults = {info.key: 1e-3 for info in tasks}
    first, second = (spend(make(tasks, defaults), 200, 8, falling(defaults)) for _ in range(2))
    assert first == second
    assert first[:6] == [f"t{n}" for n in range(6)]


@pytest.mark.parametrize(
    ("total", "tasks"), [(1, 1), (1, 50), (16, 20), (256, 13), (1000, 10), (20_000, 26), (10**8, 1)]
)
def test_batch_sizes_fit_the_budget(total, tasks):
    first, later = fit_batch_size(total, tasks)
    assert 2 <= first <= 16 and 8 <= later <= 64 and later % 8 == 0
    if total >= 48 * tasks:
        assert later <= total // tasks / 5


def test_a_task_gets_no_more_than_its_share():
    tasks = [task("a"), task("b")]
    allocator = Allocator(tasks, {"a": 1.0, "b": 1e-3}, None, 1000, {"a": 20, "b": 20})
    assert allocator.room("a") == 20
    allocator.record("a", [0.9, None])
    allocator.begin("a", 8)
    assert allocator.room("a") == 10 and allocator.next_task() == "a"
    allocator.begin("a", 10)
    assert allocator.room("a") == 0 and allocator.next_task() == "b"
    allocator.record("b", [1e-3] * 20)
    assert allocator.next_task() is None


def test_without_a_limit_there_is_always_room():
    allocator = make([task("a")], {"a": 1.0})
    allocator.record("a", [1.0] * 900)
    assert allocator.room("a") > 10**9


@pytest.mark.parametrize(("total", "tasks"), [(1, 1), (100, 20), (900, 20), (20_000, 10), (10**8, 1)])
def test_a_templates_batches_begin_with_its_starting_points(total, tasks):
    first, later = fit_template_batches(total, tasks)
    assert 8 <= first <= 16 and 8 <= later <= 32 and later % 8 == 0
    assert fit_template_batches(10 * total, tasks) >= (first, later)
