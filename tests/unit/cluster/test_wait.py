"""Waiting: until it is done, the time is over, or there is no hope."""

from collections.abc import Callable

import pytest

from services.cluster.objects import ClusterError, Exit, UnreachableError
from services.cluster.observer import PAUSES_PER_LIST
from services.cluster.wait import (
    FORBIDDEN_LOOKS,
    INTERVAL_S,
    LOOP_RESTARTS,
    TELL_INTERVAL_S,
    TOGETHER_S,
    Goal,
    Options,
    wait,
)
from services.ops.logging import get_logger
from tests.unit.cluster.fake_cluster import FakeClock, Release, pod, workload


class Waiting:
    """One wait, and what it logged."""

    def __init__(self, release: Release, caplog: pytest.LogCaptureFixture) -> None:
        self.release = release
        self.clock = FakeClock()
        self._caplog = caplog

    def run(self, goal: Goal = "complete", timeout_s: float | None = 600.0) -> int:
        with self._caplog.at_level("INFO"):
            return wait(
                self.release.cluster,
                Options(goal=goal, timeout_s=timeout_s),
                get_logger("wait"),
                pause=self.clock.pause,
                clock=self.clock,
            )

    @property
    def lines(self) -> list[tuple[str, dict[str, object]]]:
        return [(record.getMessage(), record.__dict__["fields"]) for record in self._caplog.records]


@pytest.fixture
def waiting(caplog: pytest.LogCaptureFixture) -> Waiting:
    return Waiting(Release(), caplog)


def test_a_run_that_is_complete_is_not_waited_for(waiting: Waiting) -> None:
    waiting.release.trains.training_complete.set(1)
    assert waiting.run() == 0
    assert waiting.clock.pauses == []
    [(event, fields)] = waiting.lines
    assert (event, fields["release"]) == ("complete", "demo")


def test_a_run_is_waited_for_until_it_is_complete_and_progress_is_told_now_and_then(waiting: Waiting) -> None:
    trains = waiting.release.trains

    def one_step() -> None:
        trains.samples.inc(10)
        trains.steps.inc(10)

    waiting.clock.on_pause = [one_step] * 40 + [lambda: trains.training_complete.set(1)]
    assert waiting.run() == 0
    events = [event for event, _ in waiting.lines]
    told = events.count("waiting")
    assert 2 <= told <= sum(waiting.clock.pauses) / TELL_INTERVAL_S + 1
    last = [fields for event, fields in waiting.lines if event == "waiting"][-1]
    assert (last["total_steps"], last["steps_per_s"]) == (1000, 5)
    assert last["eta_s"] == (1000 - float(str(last["steps"]))) / 5
    assert events[-1] == "complete"


def test_the_time_is_over_and_what_was_missing_is_said(waiting: Waiting) -> None:
    waiting.release.trains.steps.set(250)
    assert waiting.run(timeout_s=5.0) == 1
    assert sum(waiting.clock.pauses) == 5.0
    event, fields = waiting.lines[-1]
    assert (event, fields["missing"]) == ("timeout", "750 of 1,000 steps")
    assert (fields["release"], fields["steps"]) == ("demo", 250)


def test_pods_that_are_not_ready_are_part_of_what_was_missing(waiting: Waiting) -> None:
    waiting.release.cluster.workloads_now = [workload("learner"), workload("actor", 2, 1)]
    assert waiting.run(timeout_s=0.0) == 1
    assert waiting.lines[-1][1]["missing"] == "1,000 of 1,000 steps; actor 1 of 2 ready"


def test_why_a_pod_is_not_ready_is_part_of_what_was_missing(waiting: Waiting) -> None:
    cluster = waiting.release.cluster
    cluster.workloads_now = [workload("learner"), workload("actor", 2, 1)]
    cluster.change("actor-0001", is_ready=False, is_running=False, trouble="cannot be scheduled")
    assert waiting.run("ready", timeout_s=0.0) == 1
    assert waiting.lines[-1][1]["missing"] == "actor 1 of 2 ready; 1 actor: cannot be scheduled"


def test_a_timeout_of_nothing_looks_once(waiting: Waiting) -> None:
    assert waiting.run(timeout_s=0.0) == 1
    assert waiting.clock.pauses == []


def test_without_a_timeout_there_is_none(waiting: Waiting) -> None:
    never = [lambda: None] * 100
    waiting.clock.on_pause = [*never, lambda: waiting.release.trains.training_complete.set(1)]
    assert waiting.run(timeout_s=None) == 0
    assert sum(waiting.clock.pauses) >= 200


def test_ready_is_when_all_pods_are(waiting: Waiting) -> None:
    cluster = waiting.release.cluster
    cluster.workloads_now = [workload("learner"), workload("actor", 8, 3)]

    def scaled() -> None:
        cluster.workloads_now = [workload("learner"), workload("actor", 8, 8)]

    waiting.clock.on_pause = [lambda: None, scaled]
    assert waiting.run("ready") == 0
    assert len(waiting.clock.pauses) == 2
    assert waiting.lines[0][1]["missing"] == "actor 3 of 8 ready"
    assert waiting.lines[-1][0] == "ready"


def test_ready_is_not_complete(waiting: Waiting) -> None:
    assert waiting.run("ready") == 0
    assert waiting.run("complete", timeout_s=0.0) == 1


def test_a_learner_that_restarts_and_a_cluster_that_is_away_are_waited_for(waiting: Waiting) -> None:
    cluster, release = waiting.release.cluster, waiting.release
    answer = cluster.answers["learner-0"]

    def goes() -> None:
        del cluster.answers["learner-0"]
        cluster.change("learner-0", is_ready=False, is_running=False, trouble="containercreating")

    def away() -> None:
        cluster.failures = [UnreachableError("no answer"), UnreachableError("no answer")]

    def comes_back() -> None:
        release.learner.restart()
        release.trains.training_complete.set(1)
        cluster.answers["learner-0"] = answer
        cluster.change("learner-0", is_ready=True, is_running=True, trouble=None, restarts=1)

    waiting.clock.on_pause = [goes, lambda: None, away, lambda: None, comes_back]
    assert waiting.run() == 0


def test_a_cluster_that_is_away_is_what_was_missing(waiting: Waiting) -> None:
    waiting.release.cluster.failures = [UnreachableError("cluster x does not answer")] * 10
    assert waiting.run(timeout_s=4.0) == 1
    assert waiting.lines[-1][1]["missing"] == "cluster x does not answer"


def test_a_cluster_that_is_away_from_the_beginning_is_waited_for(waiting: Waiting) -> None:
    waiting.release.trains.training_complete.set(1)
    waiting.release.cluster.workload_failures = [UnreachableError("cluster x does not answer")] * 3
    assert waiting.run() == 0
    assert len(waiting.clock.pauses) == 3
    assert waiting.lines[0] == ("waiting", {"missing": "cluster x does not answer"})
    assert (waiting.lines[-1][0], waiting.lines[-1][1]["release"]) == ("complete", "demo")


def test_a_cluster_that_never_answers_is_the_end_of_the_time(waiting: Waiting) -> None:
    waiting.release.cluster.workload_failures = [UnreachableError("cluster x does not answer")] * 10
    assert waiting.run(timeout_s=5.0) == 1
    assert sum(waiting.clock.pauses) == 5.0
    assert waiting.lines[-1] == ("timeout", {"timeout_s": 5.0, "missing": "cluster x does not answer"})


def test_a_release_that_is_not_there_is_not_waited_for(waiting: Waiting) -> None:
    waiting.release.cluster.workloads_now = []
    with pytest.raises(ClusterError, match="no release in namespace lab"):
        waiting.run()
    assert waiting.clock.pauses == []


def test_a_ready_learner_whose_metrics_cannot_be_read_may_stand_behind_a_network_policy(
    waiting: Waiting,
) -> None:
    del waiting.release.cluster.answers["learner-0"]
    hint = "networkPolicy.metricsFrom"
    assert waiting.run(timeout_s=0.0) == 1
    assert hint in str(waiting.lines[-1][1]["missing"])
    waiting.release.cluster.change("learner-0", is_ready=False)
    assert waiting.run(timeout_s=0.0) == 1
    assert hint not in str(waiting.lines[-1][1]["missing"])


def test_a_permission_that_is_missing_is_not_waited_for(waiting: Waiting) -> None:
    waiting.release.cluster.failures = [ClusterError("no permission")]
    with pytest.raises(ClusterError, match="no permission"):
        waiting.run()


def test_a_learner_that_nobody_may_ask_is_an_error_if_that_does_not_change(waiting: Waiting) -> None:
    waiting.release.cluster.may_ask = False
    with pytest.raises(ClusterError, match=r"no learner of demo tells .*: no permission for pods/proxy"):
        waiting.run()
    assert len(waiting.clock.pauses) == FORBIDDEN_LOOKS - 1
    missing = str(waiting.lines[-1][1]["missing"])
    assert "no permission for pods/proxy" in missing
    assert "networkPolicy" not in missing


def test_a_right_that_is_given_in_time_is_waited_for(waiting: Waiting) -> None:
    cluster = waiting.release.cluster
    cluster.may_ask = False

    def may_ask(*, now: bool) -> Callable[[], None]:
        return lambda: setattr(cluster, "may_ask", now)

    still = [may_ask(now=False)] * (FORBIDDEN_LOOKS - 2)
    waiting.clock.on_pause = [*still, may_ask(now=True), may_ask(now=False), *still, may_ask(now=True)]
    waiting.clock.on_pause.append(lambda: waiting.release.trains.training_complete.set(1))
    assert waiting.run() == 0


def test_being_ready_is_waited_for_without_metrics(waiting: Waiting) -> None:
    waiting.release.cluster.may_ask = False
    assert waiting.run("ready") == 0
    assert waiting.release.cluster.asked == []


@pytest.mark.parametrize(("code", "what"), [(2, "wrong configuration"), (3, "training diverged")])
def test_a_learner_whose_next_start_changes_nothing_is_given_up(
    waiting: Waiting, code: int, what: str
) -> None:
    waiting.release.cluster.change(
        "learner-0",
        is_ready=False,
        is_running=False,
        is_backing_off=True,
        last_exit=Exit(code=code, reason="Error", message="impala learner: batch_size = 0"),
    )
    assert waiting.run() == 1
    event, fields = waiting.lines[-1]
    assert event == "given_up"
    assert (
        fields["reason"]
        == f"learner-0, after 0 restarts: exit code {code} ({what}): impala learner: batch_size = 0"
    )


def test_a_learner_without_a_last_message_has_its_last_log_line(waiting: Waiting) -> None:
    waiting.release.cluster.log_lines["learner-0"] = "out of words"
    ended = Exit(code=3, reason="Error", message="")
    waiting.release.cluster.change("learner-0", is_ready=False, is_running=False, last_exit=ended)
    assert waiting.run() == 1
    assert (
        waiting.lines[-1][1]["reason"]
        == "learner-0, after 0 restarts: exit code 3 (training diverged): out of words"
    )


def crashed(
    restarts: int, *, is_backing_off: bool = True, is_running: bool = False
) -> Callable[[Release], None]:
    def change(release: Release) -> None:
        release.cluster.change(
            "learner-0",
            is_ready=False,
            is_running=is_running,
            is_backing_off=is_backing_off,
            restarts=restarts,
            last_exit=Exit(code=137, reason="OOMKilled", message=""),
        )

    return change


def test_a_learner_in_a_crash_loop_is_given_up(waiting: Waiting) -> None:
    crashed(LOOP_RESTARTS)(waiting.release)
    assert waiting.run() == 1
    reason = waiting.lines[-1][1]["reason"]
    assert reason == f"learner-0, after {LOOP_RESTARTS} restarts: exit code 137 (OOMKilled)"


@pytest.mark.parametrize(
    "change",
    [
        crashed(LOOP_RESTARTS - 1),
        crashed(LOOP_RESTARTS, is_backing_off=False),
        crashed(LOOP_RESTARTS, is_backing_off=False, is_running=True),
    ],
    ids=["too few", "starts at once", "runs again"],
)
def test_a_learner_that_may_recover_is_waited_for(
    waiting: Waiting, change: Callable[[Release], None]
) -> None:
    change(waiting.release)

    def recovers() -> None:
        waiting.release.cluster.change("learner-0", is_ready=True, is_running=True, is_backing_off=False)
        waiting.release.trains.training_complete.set(1)

    waiting.clock.on_pause = [recovers]
    assert waiting.run() == 0


def test_a_learner_in_a_crash_loop_is_waited_for_while_another_one_trains(waiting: Waiting) -> None:
    crashed(LOOP_RESTARTS)(waiting.release)
    cluster = waiting.release.cluster
    cluster.pods_now.append(pod("learner-1"))
    waiting.clock.on_pause = [lambda: cluster.change("learner-1", is_running=False, is_ready=False)]
    assert waiting.run() == 1
    assert len(waiting.clock.pauses) == 1, "given up once both are gone"


@pytest.fixture
def deserted(waiting: Waiting) -> Waiting:
    """One learner's configuration is wrong, so it ends again and again; the other one runs, in no group."""
    waiting.release.cluster.pods_now.append(pod("learner-1"))
    waiting.release.cluster.change("learner-0", is_ready=False)
    ended = Exit(code=2, reason="Error", message="batch_size = 0")
    waiting.release.cluster.change(
        "learner-1", is_ready=False, is_running=False, is_backing_off=True, last_exit=ended
    )
    return waiting


def becomes(waiting: Waiting, name: str, **fields: bool) -> Callable[[], None]:
    return lambda: waiting.release.cluster.change(name, **fields)


def test_a_hopeless_learner_is_given_up_though_another_one_runs_and_waits_for_it(deserted: Waiting) -> None:
    """As one does for ever with min_learners = 2."""
    assert deserted.run() == 1
    event, fields = deserted.lines[-1]
    assert event == "given_up"
    assert str(fields["reason"]).startswith("learner-1, after 0 restarts: exit code 2")
    assert sum(deserted.clock.pauses) == TOGETHER_S


def test_a_hopeless_learner_that_runs_once_more_meanwhile_changes_nothing(deserted: Waiting) -> None:
    starts = becomes(deserted, "learner-1", is_running=True, is_backing_off=False)
    ends = becomes(deserted, "learner-1", is_running=False, is_backing_off=True)
    deserted.clock.on_pause = [starts, ends] * round(TOGETHER_S / INTERVAL_S / 2)
    assert deserted.run() == 1
    assert sum(deserted.clock.pauses) == TOGETHER_S


def test_another_learner_is_given_the_time_to_train_on_each_time_anew(deserted: Waiting) -> None:
    almost = [lambda: None] * (round(TOGETHER_S / INTERVAL_S) - 2)
    for is_ready in (True, False, True):
        deserted.clock.on_pause += [*almost, becomes(deserted, "learner-0", is_ready=is_ready)]
    deserted.clock.on_pause.append(lambda: deserted.release.trains.training_complete.set(1))
    assert deserted.run() == 0


def test_learners_that_all_wait_are_waited_for_as_long_as_none_is_hopeless(waiting: Waiting) -> None:
    cluster = waiting.release.cluster
    cluster.change("learner-0", is_ready=False)
    assert waiting.run(timeout_s=3 * TOGETHER_S) == 1
    assert waiting.lines[-1][0] == "timeout"


def test_an_actor_that_crashes_is_no_reason_to_give_up(waiting: Waiting) -> None:
    ended = Exit(code=2, reason="Error", message="")
    waiting.release.cluster.change(
        "actor-0000", is_ready=False, is_running=False, restarts=9, last_exit=ended
    )
    waiting.clock.on_pause = [lambda: waiting.release.trains.training_complete.set(1)]
    assert waiting.run() == 0


def test_a_release_that_is_uninstalled_meanwhile_is_given_up(waiting: Waiting) -> None:
    def uninstalled() -> None:
        waiting.release.cluster.workloads_now = []
        waiting.release.cluster.pods_now = []

    waiting.clock.on_pause = [uninstalled]
    assert waiting.run() == 1
    assert waiting.lines[-1][1]["reason"] == "the release is gone"


def test_pods_that_outlive_their_release_are_not_waited_for(waiting: Waiting) -> None:
    waiting.clock.on_pause = [lambda: setattr(waiting.release.cluster, "workloads_now", [])]
    assert waiting.run() == 1
    assert waiting.lines[-1][1]["reason"] == "the release is gone"
    assert len(waiting.clock.pauses) == 1


def test_the_end_of_training_takes_the_learner_only(waiting: Waiting) -> None:
    waiting.release.trains.training_complete.set(1)
    waiting.run()
    assert waiting.release.cluster.listed == [("learner",)]
    assert waiting.release.cluster.asked == ["learner-0"]


def test_a_cluster_that_is_slow_is_asked_less_often(waiting: Waiting) -> None:
    clock = waiting.clock
    waiting.release.cluster.on_list = lambda: setattr(clock, "now_s", clock.now_s + 4.0)
    clock.on_pause = [lambda: waiting.release.trains.training_complete.set(1)]
    assert waiting.run() == 0
    assert clock.pauses == [4.0 * PAUSES_PER_LIST]
    waiting.release.trains.training_complete.set(0)
    clock.pauses.clear()
    assert waiting.run(timeout_s=15.0) == 1
    assert clock.pauses == [11.0], "no longer than there is time"
