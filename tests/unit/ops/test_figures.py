"""From scrapes to figures, with scrapes written by hand or taken from real metrics."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from services.ops.figures import (
    RATE_WINDOW_S,
    History,
    PodStatus,
    Replay,
    RunInfo,
    Snapshot,
    plain_fields,
    take_snapshot,
)
from services.ops.metrics import LearnerMetrics, ReplayMetrics
from services.ops.scrape import Scrape, parse_metrics

RUN = RunInfo(env_id="ALE/Pong-v5", total_steps=10_000, frame_skip=4, run_dir=Path("runs/x"))


class FakeLearner:
    """A learner's metrics, scraped at whatever time the test wants."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = LearnerMetrics(self.registry)

    def scrape(self, time_s: float) -> Scrape:
        return Scrape(time_s=time_s, samples=parse_metrics(generate_latest(self.registry).decode()))


@pytest.fixture
def learner() -> FakeLearner:
    return FakeLearner()


def figures(learner: FakeLearner, change: Callable[[LearnerMetrics], None]) -> Snapshot:
    """The snapshot of ten seconds in which ``change`` happened."""
    before = learner.scrape(100.0)
    change(learner.metrics)
    return take_snapshot(RUN, before, learner.scrape(110.0), unix_time_s=1_000_000.0)


def test_without_a_scrape_nothing_is_known_and_nothing_fails() -> None:
    snapshot = take_snapshot(RUN, None, None)
    assert snapshot.steps is None
    assert snapshot.done_ratio == 0.0
    assert set(plain_fields(snapshot)) == {"total_steps", "pods_up", "memory_mb"}


def test_speed_and_the_time_that_is_left(learner: FakeLearner) -> None:
    learner.metrics.steps.set(1000)  # from an earlier life: it counts as progress, not as speed

    def change(metrics: LearnerMetrics) -> None:
        metrics.samples.inc(3000)
        metrics.steps.set(4000)

    snapshot = figures(learner, change)
    assert snapshot.steps == 4000
    assert snapshot.steps_per_s == 300
    assert snapshot.frames_per_s == 1200
    assert snapshot.eta_s == 20
    assert snapshot.done_ratio == 0.4


def test_a_learner_that_stands_still_has_no_time_left_to_show(learner: FakeLearner) -> None:
    snapshot = figures(learner, lambda metrics: None)
    assert snapshot.steps_per_s == 0
    assert snapshot.eta_s is None


def test_the_return_is_the_mean_over_tasks(learner: FakeLearner) -> None:
    assert figures(learner, lambda metrics: None).episode_return is None
    learner.metrics.episode_return.labels(task="0").set(10)
    learner.metrics.episode_return.labels(task="1").set(-4)
    assert figures(learner, lambda metrics: None).episode_return == 3


def test_lag_is_that_of_the_interval_only(learner: FakeLearner) -> None:
    learner.metrics.policy_lag_versions.observe(50)  # long ago

    def change(metrics: LearnerMetrics) -> None:
        for lag in (0, 0, 1, 7):
            metrics.policy_lag_versions.observe(lag)

    snapshot = figures(learner, change)
    assert snapshot.lag_mean == 2
    assert snapshot.lag_max == 7


def test_lag_beyond_the_last_bucket_is_infinite_rather_than_wrong(learner: FakeLearner) -> None:
    snapshot = figures(learner, lambda metrics: metrics.policy_lag_versions.observe(1000))
    assert snapshot.lag_max == math.inf


def test_lag_without_a_rollout_is_unknown(learner: FakeLearner) -> None:
    snapshot = figures(learner, lambda metrics: None)
    assert (snapshot.lag_mean, snapshot.lag_max) == (None, None)


@pytest.mark.parametrize(("waited_s", "ratio"), [(0.0, 0.0), (2.5, 0.25), (11.0, 1.0)])
def test_waiting_is_a_share_of_the_interval(learner: FakeLearner, waited_s: float, ratio: float) -> None:
    snapshot = figures(learner, lambda metrics: metrics.stage_seconds.labels(stage="wait").observe(waited_s))
    assert snapshot.wait_ratio == ratio


def test_a_checkpoint_has_an_age_once_there_is_one(learner: FakeLearner) -> None:
    assert figures(learner, lambda metrics: None).checkpoint_age_s is None
    assert (
        figures(
            learner, lambda metrics: metrics.checkpoint_timestamp_seconds.set(1_000_000.0 - 42)
        ).checkpoint_age_s
        == 42
    )


def test_only_what_was_lost_is_shown_as_lost(learner: FakeLearner) -> None:
    assert figures(learner, lambda metrics: None).troubles == {}
    snapshot = figures(learner, lambda metrics: metrics.rollouts.labels(result="stale").inc(13))
    assert snapshot.troubles == {"stale rollouts": 13}
    assert plain_fields(snapshot)["stale_rollouts"] == 13


def test_values_that_are_not_finite_fail_nothing(learner: FakeLearner) -> None:
    def change(metrics: LearnerMetrics) -> None:
        metrics.loss.labels(term="total").set(math.nan)
        metrics.grad_norm.set(math.inf)
        metrics.queue_depth.set(math.nan)

    snapshot = figures(learner, change)
    assert "total" not in snapshot.losses
    assert snapshot.queue_depth is None
    assert plain_fields(snapshot)["grad_norm"] == math.inf


def test_plain_fields_count_pods_restarts_and_memory() -> None:
    pods = (
        PodStatus(name="learner", role="learner", phase="up", restarts=1, memory_bytes=400e6),
        PodStatus(name="actor-0", role="actor", phase="silent", restarts=0),
    )
    fields = plain_fields(take_snapshot(RUN, None, None, pods=pods))
    assert fields["pods_up"] == "1/2"
    assert fields["restarts"] == 1
    assert fields["memory_mb"] == 400


def test_history_measures_rates_over_its_window(learner: FakeLearner) -> None:
    history = History()
    for second in range(60):
        history.add(learner.scrape(float(second)))
        history.add(history.now)  # the same scrape again changes nothing
    assert history.now is not None
    assert history.before is not None
    assert history.now.time_s - history.before.time_s == RATE_WINDOW_S


def test_history_keeps_the_last_two_scrapes_however_old(learner: FakeLearner) -> None:
    history = History()
    assert (history.before, history.now) == (None, None)
    history.add(None)
    first, second = learner.scrape(0.0), learner.scrape(1000.0)
    history.add(first)
    assert (history.before, history.now) == (None, first)
    history.add(second)
    assert (history.before, history.now) == (first, second)


def test_history_of_a_restarted_learner_begins_anew() -> None:
    def scrape(time_s: float, started_s: float) -> Scrape:
        return Scrape(time_s=time_s, samples={"process_start_time_seconds": started_s})

    history = History()
    history.add(scrape(0.0, started_s=100.0))
    history.add(scrape(1.0, started_s=100.0))
    history.add(scrape(2.0, started_s=200.0))
    assert history.before is None
    history.add(scrape(3.0, started_s=200.0))
    assert history.before == scrape(2.0, started_s=200.0)


def test_history_of_the_return_is_bounded_and_covers_the_whole_run() -> None:
    history = History()
    for second in range(5000):
        samples = {'impala_episode_return{task="0"}': float(second)}
        history.add(Scrape(time_s=float(second), samples=samples))
    returns = history.returns
    assert History.LONGEST / 2 <= len(returns) <= History.LONGEST
    assert returns[0] < 50
    assert returns[-1] > 4900
    steps = {b - a for a, b in itertools.pairwise(returns)}
    assert len(steps) == 1, "points are evenly spread"


def test_figures_that_the_learner_has_not_reported_yet_are_unknown(learner: FakeLearner) -> None:
    snapshot = take_snapshot(RUN, None, learner.scrape(100.0))
    assert dict(snapshot.losses) == {}
    assert (snapshot.entropy, snapshot.grad_norm, snapshot.learning_rate) == (None, None, None)
    assert not {"loss_total", "entropy", "grad_norm"} & set(plain_fields(snapshot))


# --- several tasks, and replay -----------------------------------------------------------------------


def test_every_task_is_known_before_it_has_a_return(learner: FakeLearner) -> None:
    for task in ("ALE/Pong-v5", "catch"):
        learner.metrics.task_steps.labels(task)
    learner.metrics.episode_return.labels("catch").set(0.5)
    snapshot = take_snapshot(RUN, None, learner.scrape(100.0))
    assert list(snapshot.task_returns.items()) == [("ALE/Pong-v5", None), ("catch", 0.5)]
    assert snapshot.episode_return == 0.5
    assert (snapshot.task_scores, snapshot.suite_scores) == ({}, {})


def test_scores_of_tasks_and_of_their_suite_are_read(learner: FakeLearner) -> None:
    for task, score in (("pong", 50.0), ("breakout", 1100.0)):
        learner.metrics.task_steps.labels(task)
        learner.metrics.human_normalised_score.labels(task).set(score)
    suite = learner.metrics.suite_human_normalised_score
    for number, (statistic, capped) in enumerate(
        [("mean", "false"), ("median", "false"), ("mean", "true"), ("median", "true")]
    ):
        suite.labels(statistic, capped).set(number)
    snapshot = take_snapshot(RUN, None, learner.scrape(100.0))
    assert snapshot.task_scores == {"pong": 50.0, "breakout": 1100.0}
    assert snapshot.suite_scores == {"mean": 0, "median": 1, "mean_capped": 2}
    fields = plain_fields(snapshot)
    assert (fields["human_normalised_mean"], fields["human_normalised_median"]) == (0, 1)
    assert fields["human_normalised_mean_capped"] == 2
    assert "human_normalised" not in fields


def test_a_single_task_has_its_score_in_the_log_line(learner: FakeLearner) -> None:
    learner.metrics.task_steps.labels("pong")
    assert "human_normalised" not in plain_fields(take_snapshot(RUN, None, learner.scrape(100.0)))
    learner.metrics.human_normalised_score.labels("pong").set(50.0)
    fields = plain_fields(take_snapshot(RUN, None, learner.scrape(101.0)))
    assert fields["human_normalised"] == 50.0


def test_replay_is_read_where_there_is_any(learner: FakeLearner) -> None:
    assert take_snapshot(RUN, None, learner.scrape(100.0)).replay is None
    metrics = ReplayMetrics(learner.registry)
    begun = take_snapshot(RUN, None, learner.scrape(101.0))
    assert begun.replay == Replay(
        steps=0, capacity=None, size_bytes=0, age_versions=None, rejected_ratio=None
    )
    assert {key for key in plain_fields(begun) if "replay" in key} == {"replay_steps", "replay_mb"}
    metrics.steps.set(150_000)
    metrics.capacity.set(200_000)
    metrics.size_bytes.set(12.4e6)
    metrics.age_versions.set(321.5)
    metrics.rejected_ratio.set(0.25)
    snapshot = take_snapshot(RUN, None, learner.scrape(102.0))
    assert snapshot.replay == Replay(
        steps=150_000, capacity=200_000, size_bytes=12.4e6, age_versions=321.5, rejected_ratio=0.25
    )
    fields = plain_fields(snapshot)
    assert {key: fields[key] for key in fields if "replay" in key} == {
        "replay_steps": 150_000,
        "replay_age_versions": 321.5,
        "replay_rejected_ratio": 0.25,
        "replay_mb": 12,
    }
