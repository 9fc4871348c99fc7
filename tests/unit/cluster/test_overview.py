"""From a cluster to the figures of a release."""

import json
import math

import pytest

from services.cluster.objects import ClusterError, UnreachableError
from services.cluster.observer import LARGE, LARGE_INTERVAL_S, PAUSES_PER_LIST, SAMPLE, Observer
from services.cluster.overview import Overview, overview
from services.cluster.picture import as_json, log_fields
from tests.unit.cluster.fake_cluster import FakeClock, Release, pod, workload


class Watched:
    """A release and somebody who looks at it, two seconds apart."""

    def __init__(self, release: Release) -> None:
        self.clock = FakeClock()
        self.observer = Observer(release.cluster, "demo", clock=self.clock, unix_clock=lambda: 5000.0)

    def look(self) -> Overview:
        self.clock.now_s += 2.0
        return overview(self.observer.look())


def test_a_run_that_trains_has_its_figures() -> None:
    release = Release(num_actors=3, evaluator=True)
    watched = Watched(release)
    watched.look()
    trains, serves, evaluates = release.trains, release.serves, release.evaluates
    trains.samples.inc(400)
    trains.frames.inc(1600)
    trains.steps.set(500)
    trains.policy_version.set(20)
    trains.world_size.set(2)
    trains.generation.set(3)
    trains.episode_return.labels("catch").set(0.5)
    trains.human_normalised_score.labels("catch").set(75.0)
    trains.task_steps.labels("catch").inc(400)
    trains.rollouts.labels("ok").inc(40)
    trains.rollouts.labels("stale").inc(4)
    trains.received_bytes.inc(2_000_000)
    trains.checkpoint_timestamp_seconds.set(4970.0)
    serves.version.set(19)
    serves.seats.set(3)
    serves.sent_bytes.inc(500_000)
    for number, version in enumerate((17, 19, 18)):
        release.acts(number).weights_version.set(version)
        release.acts(number).env_steps.inc(100 * (number + 1))
    evaluates.policy_version.set(12)
    evaluates.episode_return.labels("catch", "mean").set(0.9)
    evaluates.human_normalised_score.labels("catch").set(95.0)
    seen = watched.look()

    assert seen.state == "training"
    assert (seen.tasks, seen.world_size, seen.generation, seen.seats) == ("catch", 2, 3, 3)
    assert seen.training is not None
    assert seen.training.steps_per_s == 200
    assert seen.training.frames_per_s == 800
    assert (seen.training.steps, seen.training.run.total_steps, seen.training.eta_s) == (500, 1000, 2.5)
    assert (seen.training.episode_return, seen.training.task_scores) == (0.5, {"catch": 75.0})
    assert (seen.training.policy_version, seen.training.checkpoint_age_s) == (20, 30.0)
    assert (seen.paramserver_version, seen.oldest_version, seen.newest_version) == (19, 17, 19)
    assert (seen.actors_asked, seen.env_steps_per_s) == (3, 300)
    assert (seen.received_bytes_per_s, seen.sent_bytes_per_s) == (1_000_000, 250_000)
    assert seen.rollouts == {"ok": 40, "stale": 4, "invalid": 0}
    assert seen.evaluation is not None
    assert (seen.evaluation.policy_version, seen.evaluation.returns, seen.evaluation.scores) == (
        12,
        {"catch": 0.9},
        {"catch": 95.0},
    )
    assert seen.troubles == ()
    assert seen.is_ready


def test_several_learners_train_as_one_and_each_is_seen_by_itself() -> None:
    release = Release(learners=3)
    watched = Watched(release)
    watched.look()
    for number in range(3):
        learner = release.learns(number)
        learner.samples.inc(100 * (number + 1))
        learner.steps.set(600)
        learner.received_bytes.inc(1000)
        learner.generation.set(4)
        learner.stage_seconds.labels("wait").observe(number)
    release.learns(2).world_size.set(0)
    seen = watched.look()

    assert seen.training is not None
    assert (seen.training.steps, seen.training.steps_per_s, seen.training.leader) == (600, 300, "learner-0")
    assert seen.received_bytes_per_s == 1500
    assert (seen.world_size, seen.generation) == (3, 4)
    assert [(each.name, each.leads, each.world_size, each.steps_per_s) for each in seen.learners] == [
        ("learner-0", True, 3, 50),
        ("learner-1", False, 3, 100),
        ("learner-2", False, 0, 150),
    ]
    assert [each.wait_ratio for each in seen.learners] == [0, 0.5, 1]
    assert log_fields(seen)["leader"] == "learner-0"


def test_figures_follow_the_lead_when_the_first_learner_dies() -> None:
    release = Release(learners=2)
    watched = Watched(release)
    release.learns(0).steps.set(500)
    release.learns(1).steps.set(500)
    assert watched.look().training is not None
    del release.cluster.answers["learner-0"]
    release.learns(1).steps.set(540)
    release.learns(1).leads.set(1)
    release.learns(1).world_size.set(1)
    seen = watched.look()
    assert seen.training is not None
    assert (seen.training.leader, seen.training.steps, seen.world_size) == ("learner-1", 540, 1)
    assert [each.name for each in seen.learners] == ["learner-1"]


def test_complete_is_what_the_learner_that_leads_says() -> None:
    release = Release(learners=2)
    release.learns(1).training_complete.set(1)  # a moment before the last checkpoint is written
    assert Watched(release).look().state != "complete"
    release.learns(0).training_complete.set(1)
    assert Watched(release).look().state == "complete"


def test_all_learners_are_asked_and_shown_in_the_order_of_their_numbers() -> None:
    seen = Watched(Release(learners=SAMPLE + 3)).look()
    assert [each.name for each in seen.learners] == [f"learner-{number}" for number in range(SAMPLE + 3)]


def test_a_learner_that_stands_still_waits_for_rollouts() -> None:
    release = Release()
    watched = Watched(release)
    assert watched.look().state == "waiting"
    release.trains.samples.inc(100)
    assert watched.look().state == "training"
    later = Watched(release)  # one look tells no rate, but that it has trained
    assert later.look().state == "training"
    assert later.look().state == "waiting"


def test_complete_is_what_the_learner_says() -> None:
    release = Release()
    release.trains.training_complete.set(1)
    assert Watched(release).look().state == "complete"


def test_a_learner_that_restarts_between_looks_has_no_rate_rather_than_a_negative_one() -> None:
    release = Release()
    watched = Watched(release)
    release.trains.samples.inc(1000)
    release.trains.received_bytes.inc(1000)
    watched.look()
    release.learner.restart()
    release.trains.samples.inc(10)
    seen = watched.look()
    assert seen.training is not None
    assert seen.training.steps_per_s is None
    assert seen.received_bytes_per_s is None
    assert seen.state == "training"
    release.trains.samples.inc(10)
    again = watched.look().training
    assert again is not None
    assert again.steps_per_s == 5


def test_a_learner_that_is_gone_leaves_its_last_figures_and_a_row_that_says_so() -> None:
    release = Release()
    watched = Watched(release)
    release.trains.steps.set(300)
    watched.look()
    del release.cluster.answers["learner-0"]
    seen = watched.look()
    assert seen.state == "unknown"
    assert seen.training is not None
    assert seen.training.steps == 300
    assert seen.rollouts == {}
    [trouble] = seen.troubles
    assert (trouble.role, trouble.example) == ("learner", "learner-0")
    assert trouble.reason == "metrics cannot be read: connection refused"


def test_before_anything_answers_nothing_is_known_and_nothing_fails() -> None:
    release = Release(num_actors=2)
    release.cluster.answers.clear()
    release.cluster.pods_now = [
        pod(each.name, is_ready=False, is_running=False) for each in release.cluster.pods_now
    ]
    release.cluster.workloads_now = [workload("learner", 1, 0), workload("actor", 2, 0)]
    seen = Watched(release).look()
    assert (seen.state, seen.training, seen.env_steps_per_s, seen.oldest_version) == (
        "unknown",
        None,
        None,
        None,
    )
    assert [(role.role, role.ready, role.desired) for role in seen.roles] == [
        ("learner", 0, 1),
        ("actor", 0, 2),
    ]
    assert not seen.is_ready
    assert release.cluster.asked == []


def test_without_an_evaluator_nothing_is_said_of_one() -> None:
    assert Watched(Release()).look().evaluation is None


def test_of_a_thousand_actors_only_a_few_are_asked_and_always_the_same() -> None:
    release = Release(num_actors=1000)
    watched = Watched(release)
    watched.look()
    first = sorted(release.cluster.asked)
    assert len(first) == SAMPLE + 2
    release.cluster.asked.clear()
    for number in range(1000):
        release.acts(number).env_steps.inc(20)
    seen = watched.look()
    assert sorted(release.cluster.asked) == first
    assert (seen.actors_asked, seen.env_steps_per_s) == (SAMPLE, 10 * 1000)


def test_who_looks_leaves_a_small_release_alone_for_as_long_as_he_wants() -> None:
    watched = Watched(Release(num_actors=LARGE - 2))
    watched.look()
    assert watched.observer.pause_s(2.0) == 2.0


def test_a_large_release_is_left_alone_for_longer() -> None:
    watched = Watched(Release(num_actors=LARGE - 1))
    watched.look()
    assert watched.observer.pause_s(2.0) == LARGE_INTERVAL_S
    assert watched.observer.pause_s(30.0) == 30.0


def test_a_cluster_whose_lists_take_long_is_left_alone_several_times_as_long() -> None:
    release = Release()
    watched = Watched(release)
    clock = watched.clock
    release.cluster.on_list = lambda: setattr(clock, "now_s", clock.now_s + 3.0)
    watched.look()
    assert watched.observer.pause_s(2.0) == 3.0 * PAUSES_PER_LIST
    release.cluster.on_list = lambda: None
    slow_pod = release.cluster.answers["learner-0"]

    def answer() -> str:
        clock.now_s += 3.0
        return slow_pod()

    release.cluster.answers["learner-0"] = answer
    watched.look()
    assert watched.observer.pause_s(2.0) == 2.0, "a pod that is slow is no burden to others"


def test_actors_that_are_ready_are_asked_before_others() -> None:
    release = Release(num_actors=SAMPLE + 2)
    for number in (0, 1):
        release.cluster.change(f"actor-{number:04}", is_ready=False)
    Watched(release).look()
    assert not {"actor-0000", "actor-0001"} & set(release.cluster.asked)


def test_pods_with_the_same_trouble_are_one_row_and_the_most_frequent_is_first() -> None:
    release = Release(num_actors=12)
    release.cluster.change("learner-0", is_ready=False, trouble="crash loop: exit code 1")
    for number in range(1, 12):
        release.cluster.change(
            f"actor-{number:04}", is_ready=False, is_running=False, trouble="cannot be scheduled"
        )
    troubles = Watched(release).look().troubles
    assert [(each.role, each.reason, each.count, each.example) for each in troubles] == [
        ("actor", "cannot be scheduled", 11, "actor-0001"),
        ("learner", "crash loop: exit code 1", 1, "learner-0"),
    ]


def test_a_workload_that_cannot_make_its_pods_is_a_trouble() -> None:
    release = Release()
    release.cluster.workloads_now = [workload("actor", 8, 2, trouble="exceeded quota")]
    [trouble] = Watched(release).look().troubles
    assert (trouble.role, trouble.reason, trouble.example) == ("actor", "exceeded quota", "")


def test_refused_keys_are_summed_over_who_listens() -> None:
    release = Release()
    name = "impala_auth_failures_total"
    refused = f'{name}{{reason="unknown_key"}} 2.0\n{name}{{reason="handshake"}} 1.0\n'
    for pod_name in ("learner-0", "paramserver-0"):
        text = release.cluster.answers[pod_name]()
        lines = [line for line in text.splitlines() if "auth_failures" not in line]
        answer = "\n".join(lines) + "\n" + refused
        release.cluster.answers[pod_name] = lambda answer=answer: answer  # type: ignore[misc]
    assert Watched(release).look().auth_failures == 6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gauges_without_a_value_are_unknown_and_json_stays_json(value: float) -> None:
    release = Release(evaluator=True)
    watched = Watched(release)
    watched.look()
    trains = release.trains
    for gauge in (trains.world_size, trains.generation, trains.policy_version, trains.total_steps):
        gauge.set(value)
    release.serves.version.set(value)
    release.acts(0).weights_version.set(value)
    trains.episode_return.labels("catch").set(value)
    seen = watched.look()
    assert (seen.world_size, seen.generation, seen.paramserver_version) == (None, None, None)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(as_json(seen), parse_constant=refuse)
    assert read["training"]["policy_version"] is None
    assert read["release"] == "demo"
    assert log_fields(seen)["state"] == "waiting"


def test_versions_before_the_first_are_not_minus_one() -> None:
    seen = Watched(Release()).look()
    assert (seen.paramserver_version, seen.oldest_version) == (None, None)


def test_a_release_is_ready_when_every_workload_is_and_no_pod_is_being_replaced() -> None:
    release = Release(num_actors=0)
    watched = Watched(release)
    assert watched.look().is_ready
    release.cluster.workloads_now = [workload("learner"), workload("actor", 3, 2)]
    assert not watched.look().is_ready
    release.cluster.workloads_now = [workload("learner", is_settled=False), workload("actor", 3)]
    assert not watched.look().is_ready


def test_what_the_cluster_does_not_tell_is_an_error_of_the_look() -> None:
    release = Release()
    release.cluster.failures = [UnreachableError("gone"), ClusterError("no permission")]
    watched = Watched(release)
    with pytest.raises(UnreachableError, match="gone"):
        watched.look()
    with pytest.raises(ClusterError, match="no permission"):
        watched.look()


def test_a_log_line_says_what_is_ready_and_leaves_out_what_is_not_known() -> None:
    release = Release(num_actors=2)
    fields = log_fields(Watched(release).look())
    assert fields["ready"] == "learner=1/1 paramserver=1/1 actor=2/2"
    assert "env_steps_per_s" not in fields
    assert "memory_mb" not in fields
