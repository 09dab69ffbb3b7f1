"""Order, retries and failures, with neither processes nor files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from normfree.runner import Configuration, Study, load_preset
from normfree.runner.run_order import PlannedRun, planned_runs
from normfree.runner.run_queue import RunQueue
from normfree.studies.distillation import STUDY as DISTILLATION
from normfree.studies.relu_revival import STUDY

PRESET = load_preset("smoke")
RUN = planned_runs(STUDY, PRESET, [0], tune_lr=False)[0].run


def plan(requires: Mapping[str, Sequence[str]]) -> list[PlannedRun]:
    return [PlannedRun(place, RUN, tuple(before)) for place, before in requires.items()]


def places(queue: RunQueue) -> list[str]:
    return [planned.place for planned in queue.ready()]


def test_a_study_has_every_configuration_with_every_seed_seed_by_seed() -> None:
    runs = planned_runs(STUDY, PRESET, [0, 3], tune_lr=False)
    labels = [each.label for each in STUDY.configurations(PRESET)]
    assert [(each.run.seed, each.run.configuration) for each in runs] == [(s, name) for s in (0, 3) for name in labels]
    assert all(each.requires == () for each in runs)
    assert runs[1].place == "runs/sm-ln-r/seed-0"


def test_tuned_runs_wait_for_the_whole_sweep_of_their_configuration_and_students_for_their_teacher() -> None:
    runs = {each.place: each for each in planned_runs(DISTILLATION, PRESET, [0, 1], tune_lr=True)}
    rates = ("0.00025", "0.0005", "0.001", "0.002", "0.004")
    sweep = {f"sweep/sm-r-distilled/learning-rate-{rate}" for rate in rates}
    assert sweep < runs.keys()
    assert runs["runs/sm-r-distilled/seed-1"].requires == ("runs/sm-ln-g/seed-1",)
    assert all(runs[place].requires == ("runs/sm-ln-g/seed-0",) for place in sweep)
    assert set(runs["tuned/sm-r-distilled/seed-1"].requires) == {"runs/sm-ln-g/seed-1", *sweep}
    assert runs["tuned/sm-r-distilled/seed-1"].label == "SM+R, distilled seed 1, tuned"
    order = list(runs)
    assert all(order.index(before) < order.index(place) for place in order for before in runs[place].requires)


def test_only_some_configurations_come_with_the_baseline_and_their_teachers() -> None:
    def labels(study: Study, *only: str) -> list[str]:
        return [each.run.configuration for each in planned_runs(study, PRESET, [0], tune_lr=False, only=only)]

    assert labels(STUDY, "SM+R") == ["SM+LN+G", "SM+R"]
    assert labels(STUDY) == ["SM+LN+G"]
    assert labels(DISTILLATION, "SM+R, distilled", "SM+G") == ["SM+LN+G", "SM+G", "SM+R, distilled"]
    student, grandchild = (
        Configuration(label, {}, objective={"kind": "distillation", "teacher": teacher})
        for label, teacher in (("student", "SM+R"), ("grandchild", "student"))
    )
    chain = replace(STUDY, configurations=lambda preset: (*STUDY.configurations(preset), student, grandchild))
    assert labels(chain, "grandchild") == ["SM+LN+G", "SM+R", "student", "grandchild"]


def test_a_run_is_ready_when_all_that_it_requires_is_finished() -> None:
    queue = RunQueue(plan({"a": [], "b": ["a"], "c": [], "d": ["b", "c"]}), retries=0)
    assert places(queue) == ["a", "c"]
    for place in ("a", "c"):
        queue.begin(place)
    assert places(queue) == []
    queue.finish("c")
    queue.put_back("a")
    assert places(queue) == ["a"]
    queue.finish("a")
    assert places(queue) == ["b"]
    queue.finish("b")
    queue.finish("d")
    assert queue.is_over


def test_a_run_that_gets_on_between_its_failures_is_tried_on_and_on() -> None:
    queue = RunQueue(plan({"a": []}), retries=2)
    assert all(queue.fail("a", "killed", step=step) for step in (0, 0, 5, 10, 10, 15))
    assert queue.fail("a", "killed", step=15)
    assert not queue.fail("a", "killed once more", step=15)
    assert queue.failures == {"a": "killed once more"}
    assert queue.is_over


def test_a_worker_at_the_end_of_its_time_is_no_failure_if_its_run_got_on() -> None:
    queue = RunQueue(plan({"a": []}), retries=0)
    assert queue.fail("a", "stopped", step=5, was_stopped=True)
    assert queue.fail("a", "stopped", step=9, was_stopped=True)
    assert not queue.fail("a", "stopped", step=9, was_stopped=True)


def test_what_is_refused_is_not_tried_again_and_takes_what_waits_for_it_with_it() -> None:
    queue = RunQueue(plan({"a": [], "b": ["a"], "c": ["b"], "d": []}), retries=5)
    assert not queue.fail("a", "no such option", for_good=True)
    assert list(queue.failures) == ["a", "b", "c"]
    assert queue.failures["a"] == "no such option"
    assert queue.failures["c"].startswith("not trained, because ")
    assert places(queue) == ["d"]
    assert not queue.is_over


@given(
    requires=st.lists(st.sets(st.integers(0, 11), max_size=3), min_size=1, max_size=12),
    broken=st.sets(st.integers(0, 11)),
    retries=st.integers(0, 3),
    choose=st.randoms(use_true_random=False),
)
def test_any_order_of_events_ends_with_exactly_what_broke_and_what_needed_it(
    requires: list[set[int]], broken: set[int], retries: int, choose: object
) -> None:
    before = {str(n): [str(each) for each in earlier if each < n] for n, earlier in enumerate(requires)}
    queue = RunQueue(plan(before), retries=retries)
    at_work: list[str] = []
    tries = dict.fromkeys(before, 0)
    while not queue.is_over:
        ready = places(queue)
        assert ready or at_work
        if ready and (not at_work or choose.random() < 0.5):  # type: ignore[attr-defined]
            place = choose.choice(ready)  # type: ignore[attr-defined]
            assert queue.finished.issuperset(before[place])
            queue.begin(place)
            at_work.append(place)
            tries[place] += 1
            continue
        place = at_work.pop(choose.randrange(len(at_work)))  # type: ignore[attr-defined]
        if int(place) in broken:
            queue.fail(place, "broken")
        else:
            queue.finish(place)
    lost: set[str] = set()
    for place, earlier in before.items():
        if int(place) in broken or lost.intersection(earlier):
            lost.add(place)
    assert queue.failures.keys() == lost
    assert queue.finished == before.keys() - lost
    assert all(n == (retries + 1 if int(place) in broken else 1) for place, n in tries.items() if n)
