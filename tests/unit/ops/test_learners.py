"""Several learners as one run: who leads, what is added up, and what is not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from services.ops.figures import PodStatus, RunInfo, Snapshot, plain_fields, take_snapshot
from services.ops.learners import Learners, Reading, leading, snapshot_of
from services.ops.metrics import LearnerMetrics, ReplayMetrics
from services.ops.scrape import Scrape, parse_metrics

RUN = RunInfo(env_id="catch", total_steps=10_000, frame_skip=1, run_dir=Path("runs/x"))
STARTED = "process_start_time_seconds"


class FakeLearner:
    """A learner's metrics, scraped at whatever time the test wants."""

    def __init__(self, started_s: float = 1.0) -> None:
        self.registry = CollectorRegistry()
        self.metrics = LearnerMetrics(self.registry)
        self.replay = ReplayMetrics(self.registry)
        self.started_s = started_s

    def scrape(self, time_s: float) -> Scrape:
        samples = parse_metrics(generate_latest(self.registry).decode())
        return Scrape(time_s=time_s, samples={**samples, STARTED: self.started_s})


def said(**samples: float) -> Reading:
    """One that says only this of itself."""
    named = {f"impala_learner_{name}": value for name, value in samples.items()}
    return Reading(before=None, now=Scrape(time_s=1.0, samples=named))


def together(change: Callable[[LearnerMetrics, LearnerMetrics], None]) -> Snapshot:
    """Of two learners, the second of which leads, after ten seconds in which ``change`` happened."""
    one, two = FakeLearner(), FakeLearner()
    two.metrics.leads.set(1)
    before = {"learner-0": one.scrape(100.0), "learner-1": two.scrape(100.0)}
    change(one.metrics, two.metrics)
    now = {"learner-0": one.scrape(110.0), "learner-1": two.scrape(110.0)}
    readings = {name: Reading(before=before[name], now=now[name]) for name in now}
    return snapshot_of(RUN, readings, unix_time_s=1_000_000.0)


# --- who leads ---------------------------------------------------------------------------------------


def test_the_learner_that_says_so_leads() -> None:
    assert leading({"a": said(leads=0, steps=9.0), "b": said(leads=1, steps=5.0)}) == "b"


def test_of_two_that_say_so_the_one_of_the_newer_group_leads() -> None:
    frozen = said(leads=1, generation=3, steps=900)
    assert leading({"a": frozen, "b": said(leads=1, generation=4, steps=900)}) == "b"


def test_between_two_groups_the_one_that_has_trained_most_speaks_for_the_run() -> None:
    assert leading({"a": said(leads=0, steps=640), "b": said(leads=0, steps=1280)}) == "b"
    assert leading({"a": said(leads=0), "b": said(leads=0, steps=float("nan"))}) == "a"


# --- what is added up --------------------------------------------------------------------------------


def test_without_a_learner_nothing_is_known_and_nothing_fails() -> None:
    assert snapshot_of(RUN, {}) == take_snapshot(RUN, None, None)


def test_one_learner_is_what_it_says_of_itself() -> None:
    learner = FakeLearner()
    learner.metrics.steps.set(640)
    reading = Reading(before=None, now=learner.scrape(1.0))
    alone = take_snapshot(RUN, None, reading.now)
    assert snapshot_of(RUN, {"learner-0": reading}) == replace(alone, leader="learner-0")


def test_all_learners_count_the_same_steps_and_each_its_own_samples() -> None:
    def change(one: LearnerMetrics, two: LearnerMetrics) -> None:
        for metrics, steps in ((one, 3000), (two, 3640)):
            metrics.steps.set(steps)
            metrics.samples.inc(1500)
            metrics.world_size.set(2)
            metrics.generation.set(7)

    snapshot = together(change)
    assert (snapshot.steps, snapshot.steps_per_s, snapshot.eta_s) == (3640, 300, 21.2)
    assert (snapshot.leader, snapshot.world_size, snapshot.generation) == ("learner-1", 2, 7)


def test_what_every_learner_has_of_its_own_is_added_up_or_averaged() -> None:
    def change(one: LearnerMetrics, two: LearnerMetrics) -> None:
        for metrics, waited_s, lag in ((one, 2.0, 3), (two, 6.0, 5)):
            metrics.stage_seconds.labels("wait").observe(waited_s)
            metrics.policy_lag_versions.observe(lag)
            metrics.queue_depth.set(lag)
            metrics.queue_capacity.set(64)
            metrics.rollouts.labels("stale").inc(lag)

    snapshot = together(change)
    assert snapshot.wait_ratio == 0.4
    assert (snapshot.lag_mean, snapshot.lag_max) == (4, 5)
    assert (snapshot.queue_depth, snapshot.queue_capacity) == (8, 128)
    assert snapshot.troubles == {"stale rollouts": 8}


def test_what_belongs_to_the_run_is_the_leaders() -> None:
    def change(one: LearnerMetrics, two: LearnerMetrics) -> None:
        for metrics, value in ((one, 1.0), (two, 2.0)):
            metrics.loss.labels("total").set(value)
            metrics.episode_return.labels("catch").set(value)
            metrics.policy_version.set(value)

    snapshot = together(change)
    assert snapshot.losses == {"total": 2.0}
    assert (snapshot.episode_return, snapshot.policy_version) == (2.0, 2)


def test_an_update_that_was_skipped_was_skipped_once_by_all() -> None:
    def change(one: LearnerMetrics, two: LearnerMetrics) -> None:
        for metrics in (one, two):
            metrics.nonfinite_updates.inc(3)

    assert together(change).troubles == {"skipped updates": 3}


def test_the_newest_checkpoint_counts_whoever_wrote_it() -> None:
    def change(one: LearnerMetrics, two: LearnerMetrics) -> None:
        one.checkpoint_timestamp_seconds.set(1_000_000.0 - 10)  # and has lost the lead since

    assert together(change).checkpoint_age_s == 10


def test_each_learner_has_a_replay_memory_of_its_own() -> None:
    learners = FakeLearner(), FakeLearner()
    for number, learner in enumerate(learners):
        learner.replay.steps.set(1000)
        learner.replay.capacity.set(4000)
        learner.replay.size_bytes.set(5e6)
        learner.replay.age_versions.set(100 * number)
    readings = {f"{at}": Reading(before=None, now=each.scrape(1.0)) for at, each in enumerate(learners)}
    replay = snapshot_of(RUN, readings).replay
    assert replay is not None
    assert (replay.steps, replay.capacity, replay.size_bytes, replay.age_versions) == (2000, 8000, 10e6, 50)
    assert replay.rejected_ratio is None


# --- over time ---------------------------------------------------------------------------------------


def test_a_learner_that_restarts_takes_only_its_own_rate_away() -> None:
    one, two, learners = FakeLearner(), FakeLearner(), Learners()
    for second in range(3):
        one.metrics.samples.inc(100)
        two.metrics.samples.inc(100)
        learners.add({"a": one.scrape(float(second)), "b": two.scrape(float(second))})
    assert snapshot_of(RUN, learners.readings).steps_per_s == 200
    two = FakeLearner(started_s=2.0)
    learners.add({"a": one.scrape(3.0), "b": two.scrape(3.0)})
    rate = snapshot_of(RUN, learners.readings).steps_per_s
    assert rate is not None
    assert 0 < rate < 100


def test_one_that_no_longer_answers_counts_no_more_unless_nobody_does() -> None:
    one, two, learners = FakeLearner(), FakeLearner(), Learners()
    one.metrics.queue_depth.set(3)
    two.metrics.queue_depth.set(4)
    learners.add({"a": one.scrape(0.0), "b": two.scrape(0.0)})
    learners.add({"a": one.scrape(1.0)})
    assert snapshot_of(RUN, learners.readings).queue_depth == 3
    learners.add({})
    assert snapshot_of(RUN, learners.readings).queue_depth == 3
    assert learners.leader is not None


def test_the_course_of_the_return_goes_on_under_the_next_leader() -> None:
    one, two, learners = FakeLearner(), FakeLearner(), Learners()
    assert (learners.leader, learners.returns) == (None, ())
    one.metrics.leads.set(1)
    one.metrics.episode_return.labels("catch").set(0.25)
    learners.add({"a": one.scrape(0.0), "b": two.scrape(0.0)})
    two.metrics.leads.set(1)
    two.metrics.episode_return.labels("catch").set(0.5)
    learners.add({"b": two.scrape(1.0)})
    assert learners.returns == (0.25, 0.5)


@pytest.mark.parametrize(("count", "shown"), [(1, None), (2, 2)])
def test_a_log_line_says_how_many_train_together_where_there_are_several(
    count: int, shown: int | None
) -> None:
    pods = tuple(
        PodStatus(name=f"learner-{number}", role="learner", phase="up", restarts=0) for number in range(count)
    )
    learners = {pod.name: said(world_size=count) for pod in pods}
    assert plain_fields(snapshot_of(RUN, learners, pods=pods)).get("world_size") == shown
