"""`impala metrics`: pods that answer as themselves, as somebody else, late, or not at all."""

import io
from collections.abc import Callable, Iterator

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from services.cluster.check import PAUSE_S, Target, check, read_target
from services.config import ConfigError
from services.ops.health import HealthServer, Heartbeat
from services.ops.metrics import ROLES, LearnerMetrics, ParamserverMetrics
from services.ops.scrape import NoMetricsError
from tests.unit.cluster.fake_cluster import FakeClock, FakePod

Read = Callable[[str, int, float], str]

LEARNER = Target(role="learner", host="a", port=9400)
SERVER = Target(role="paramserver", host="b", port=9401)


def checked(
    targets: list[Target], read: Read, timeout_s: float = 10.0, clock: FakeClock | None = None
) -> tuple[int, str]:
    output, clock = io.StringIO(), clock or FakeClock()
    code = check(targets, timeout_s, read=read, output=output, pause=clock.pause, clock=clock)
    return code, output.getvalue()


def learner_text() -> str:
    pod = FakePod(LearnerMetrics)
    assert isinstance(pod.metrics, LearnerMetrics)
    pod.metrics.policy_version.set(12)
    pod.metrics.steps.set(34_500_000)
    return pod.text()


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("learner=http://a:9400", LEARNER),
        ("learner=http://a", LEARNER),
        ("learner=http://a:9400/metrics", LEARNER),
        ("learner=http://a:9400/", LEARNER),
        ("paramserver=http://b:9401", SERVER),
        ("actor=http://[::1]:9400", Target(role="actor", host="::1", port=9400)),
    ],
)
def test_a_target_is_a_role_and_a_url(text: str, target: Target) -> None:
    assert read_target(text) == target


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("lerner=http://a", "'lerner' is no role; allowed are actor, learner, paramserver, relay, evaluator"),
        ("http://a:9400", "is no role"),
        ("learner", "'' is no URL of a pod; allowed is http://host:9400"),
        ("learner=a:9400", "is no URL of a pod"),
        ("learner=https://a:9400", "is no URL of a pod"),
        ("learner=http://a:9400/healthz", "is no URL of a pod"),
        ("learner=http://a:99999", "has no such port"),
        ("learner=http://a:port", "has no such port"),
    ],
)
def test_what_is_no_target_is_a_mistake(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_target(text)


def test_every_role_that_answers_is_a_line_with_its_figures() -> None:
    texts = {"a": learner_text(), "b": FakePod(ParamserverMetrics).text()}
    code, output = checked([LEARNER, SERVER], lambda host, port, timeout_s: texts[host])
    assert code == 0
    first, second = output.splitlines()
    assert first.startswith("ok      learner at a:9400: version=")
    assert first.endswith(" learner_policy_version=12 learner_steps=34500000 training_complete=0")
    assert second.endswith(" paramserver_version=-1 paramserver_seats=0")


@pytest.mark.parametrize("role", ROLES)
def test_each_role_is_recognised(role: str) -> None:
    registry = CollectorRegistry()
    ROLES[role](registry)
    text = generate_latest(registry).decode()
    assert checked([Target(role=role, host="x", port=1)], lambda *_: text)[0] == 0
    for other in set(ROLES) - {role}:
        code, output = checked([Target(role=other, host="x", port=1)], lambda *_: text)
        assert (code, output) == (1, f"FAILED  {other} at x:1: answers as {role}\n")


def test_a_relay_calls_itself_a_parameter_server() -> None:
    text = FakePod(ParamserverMetrics).text()
    assert checked([Target(role="relay", host="x", port=1)], lambda *_: text)[0] == 0


def test_a_pod_that_is_late_is_asked_again() -> None:
    answers: Iterator[str | None] = iter([None, None, learner_text()])

    def read(host: str, port: int, timeout_s: float) -> str:
        answer = next(answers)
        if answer is None:
            raise NoMetricsError("no answer (Connection refused)")
        return answer

    clock = FakeClock()
    assert checked([LEARNER], read, clock=clock)[0] == 0
    assert clock.pauses == [PAUSE_S] * 2


def test_who_has_not_answered_in_time_is_named_and_the_others_are_still_asked() -> None:
    asked: list[str] = []

    def read(host: str, port: int, timeout_s: float) -> str:
        asked.append(host)
        if host == "a":
            raise NoMetricsError("no answer (Connection refused)")
        return FakePod(ParamserverMetrics).text()

    clock = FakeClock()
    code, output = checked([LEARNER, SERVER], read, timeout_s=5.0, clock=clock)
    first, second = output.splitlines()
    assert code == 1
    assert first == "FAILED  learner at a:9400: no answer (Connection refused)"
    assert second.startswith("ok      paramserver")
    assert sum(clock.pauses) <= 5.0
    assert asked[-1] == "b"


def test_somebody_elses_metrics_are_not_ours() -> None:
    code, output = checked([LEARNER], lambda *_: "go_goroutines 7\n", timeout_s=0.0)
    assert (code, output) == (
        1,
        "FAILED  learner at a:9400: answers, but is no pod of IMPALA: no impala_build_info\n",
    )


def test_a_pod_of_another_version_may_lack_a_figure() -> None:
    text = 'impala_build_info{role="learner",version="0.0.9"} 1.0\n'
    assert checked([LEARNER], lambda *_: text) == (0, "ok      learner at a:9400: version=0.0.9\n")


def test_a_real_pod_answers() -> None:
    registry = CollectorRegistry()
    LearnerMetrics(registry)
    server = HealthServer("127.0.0.1", 0, registry, Heartbeat(), 60.0, lambda: None)
    output = io.StringIO()
    target = Target(role="learner", host="localhost", port=server.port)
    assert check([target], 20.0, output=output) == 0
    server.close()
    assert check([target], 0.0, output=output) == 1
    assert "no answer (Connection refused)" in output.getvalue()
