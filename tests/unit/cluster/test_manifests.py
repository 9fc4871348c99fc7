"""What the API's JSON comes to, in the shapes that Kubernetes gives it."""

import json
from collections.abc import Mapping

import pytest

from services.cluster.manifests import error_message, read_pods, read_workloads
from services.cluster.objects import Exit, Pod
from tests.unit.cluster.fake_api import deployment, labels

READY = [{"type": "Ready", "status": "True"}]
NOT_READY = [{"type": "Ready", "status": "False"}]
RUNNING = {"running": {"startedAt": "2026-11-20T20:00:00Z"}}


def listed(*items: object) -> bytes:
    return json.dumps({"items": items}).encode()


def manifest(
    role: str = "learner",
    *,
    name: str = "demo-learner-0",
    phase: str = "Running",
    conditions: object = None,
    statuses: object = None,
    metadata: Mapping[str, object] | None = None,
    ports: object = None,
    **status: object,
) -> object:
    return {
        "metadata": {"name": name, "labels": labels(role), **(metadata or {})},
        "spec": {"containers": [{"name": role, "ports": ports}]},
        "status": {"phase": phase, "conditions": conditions, "containerStatuses": statuses, **status},
    }


def container(state: object, *, is_ready: bool = False, restarts: int = 0, last: object = None) -> object:
    status = {"name": "learner", "state": state, "ready": is_ready, "restartCount": restarts}
    return {**status, "lastState": last or {}}


def only(item: object) -> Pod:
    [pod] = read_pods(listed(item))
    return pod


def test_a_pod_that_is_well() -> None:
    ports = [{"name": "rollouts", "containerPort": 5555}, {"name": "metrics", "containerPort": 9500}]
    statuses = [container(RUNNING, is_ready=True, restarts=2)]
    pod = only(manifest(conditions=READY, statuses=statuses, ports=ports))
    assert (pod.name, pod.release, pod.role, pod.container) == (
        "demo-learner-0",
        "demo",
        "learner",
        "learner",
    )
    assert (pod.is_ready, pod.is_running, pod.is_backing_off, pod.restarts) == (True, True, False, 2)
    assert (pod.trouble, pod.last_exit, pod.metrics_port) == (None, None, 9500)


UNSCHEDULABLE = [
    {"type": "PodScheduled", "status": "False", "message": "0/1 nodes are available: no memory."}
]
KILLED = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
REFUSED = {
    "terminated": {"exitCode": 2, "reason": "Error", "message": "loading\nbatch_size = 0: allowed is 1\n"}
}
BACK_OFF = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s restarting failed container"}}
NO_IMAGE = {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "impala-actor:9"'}}


@pytest.mark.parametrize(
    ("item", "trouble"),
    [
        (
            manifest(phase="Pending", conditions=UNSCHEDULABLE),
            "cannot be scheduled: 0/1 nodes are available: no memory.",
        ),
        (manifest(phase="Pending"), "pending"),
        (
            manifest(phase="Pending", conditions=NOT_READY, statuses=[container(NO_IMAGE)]),
            'ImagePullBackOff: Back-off pulling image "impala-actor:9"',
        ),
        (
            manifest(phase="Pending", statuses=[container({"waiting": {"reason": "ContainerCreating"}})]),
            "ContainerCreating",
        ),
        (
            manifest(conditions=NOT_READY, statuses=[container(BACK_OFF, restarts=4, last=REFUSED)]),
            "crash loop: exit code 2 (wrong configuration): batch_size = 0: allowed is 1",
        ),
        (
            manifest(conditions=NOT_READY, statuses=[container(RUNNING, restarts=1, last=KILLED)]),
            "restarted: exit code 137 (OOMKilled)",
        ),
        (manifest(conditions=NOT_READY, statuses=[container(KILLED)]), "ended: exit code 137 (OOMKilled)"),
        (manifest(conditions=NOT_READY, statuses=[container(RUNNING)]), "runs, and is not ready yet"),
        (
            manifest(phase="Failed", reason="Evicted", message="The node was low on\nmemory."),
            "Evicted: The node was low on memory.",
        ),
        (
            manifest(conditions=READY, metadata={"deletionTimestamp": "2026-11-20T20:00:00Z"}),
            "is being deleted",
        ),
        (
            manifest(
                conditions=NOT_READY,
                statuses=[container({"waiting": {"reason": "PodInitializing"}})],
                initContainerStatuses=[
                    {"name": "init", "ready": False, "state": {"terminated": {"exitCode": 1}}}
                ],
            ),
            "ended: exit code 1",
        ),
        (
            manifest(
                conditions=NOT_READY,
                statuses=[container(RUNNING)],
                initContainerStatuses=[
                    {"name": "init", "ready": True, "state": {"terminated": {"exitCode": 0}}}
                ],
            ),
            "runs, and is not ready yet",
        ),
    ],
)
def test_why_a_pod_is_not_ready(item: object, trouble: str) -> None:
    pod = only(item)
    assert pod.trouble == trouble
    assert not pod.is_ready


def test_a_pod_that_loops_knows_how_its_last_life_ended() -> None:
    pod = only(manifest(conditions=NOT_READY, statuses=[container(BACK_OFF, restarts=4, last=REFUSED)]))
    assert pod.is_backing_off
    assert not pod.is_running
    assert pod.last_exit == Exit(code=2, reason="Error", message="batch_size = 0: allowed is 1")


def test_pods_come_by_role_and_name_without_tests_and_without_those_that_are_done() -> None:
    pods = read_pods(
        listed(
            manifest("actor", name="b"),
            manifest("actor", name="a"),
            manifest("test", name="t"),
            manifest("learner", name="z"),
            manifest("actor", name="done", phase="Succeeded"),
        )
    )
    assert [pod.name for pod in pods] == ["z", "a", "b"]


def test_a_sidecar_is_not_the_container_of_the_role() -> None:
    pod = only(
        {
            "metadata": {"name": "p", "labels": labels("learner")},
            "spec": {"containers": [{"name": "proxy"}, {"name": "learner"}]},
            "status": {
                "phase": "Running",
                "containerStatuses": [
                    {
                        "name": "proxy",
                        "ready": True,
                        "state": RUNNING,
                        "lastState": KILLED,
                        "restartCount": 1,
                    },
                    {
                        "name": "learner",
                        "ready": False,
                        "state": BACK_OFF,
                        "lastState": REFUSED,
                        "restartCount": 2,
                    },
                ],
            },
        }
    )
    assert (pod.container, pod.restarts, pod.is_running) == ("learner", 3, False)
    assert pod.last_exit is not None
    assert pod.last_exit.code == 2


@pytest.mark.parametrize("body", [listed(), b'{"items": null}', b"{}"])
def test_no_items_are_no_pods_and_no_workloads(body: bytes) -> None:
    assert read_pods(body) == []
    assert read_workloads(body) == []


@pytest.mark.parametrize(
    ("status", "is_settled"),
    [({}, True), ({"updatedReplicas": 7}, False), ({"observedGeneration": 2}, False)],
    ids=["as it should be", "some are old", "not seen yet"],
)
def test_a_workload_is_settled_when_all_its_pods_are_of_the_newest_template(
    status: dict[str, object], is_settled: bool
) -> None:
    [actors] = read_workloads(listed(deployment("actor", 8, 5, status)))
    assert (actors.release, actors.role, actors.desired, actors.ready) == ("demo", "actor", 8, 5)
    assert actors.is_settled == is_settled


def test_a_workload_that_was_just_made_has_nothing_ready() -> None:
    item = {"metadata": {"generation": 1, "labels": labels("actor")}, "spec": {}, "status": {}}
    [actors] = read_workloads(listed(item))
    assert (actors.desired, actors.ready, actors.is_settled, actors.trouble) == (1, 0, False, None)


def test_a_workload_that_cannot_make_its_pods_says_why() -> None:
    conditions = [
        {"type": "Available", "status": "False", "message": "too few"},
        {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota: pods=4"},
    ]
    [actors] = read_workloads(listed(deployment("actor", 8, 4, {"conditions": conditions})))
    assert actors.trouble == "exceeded quota: pods=4"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"message": "pods is\\nforbidden"}', "pods is forbidden"),
        ('{"message": "text"}', "text"),
        (b"<html>bad gateway</html>", "<html>bad gateway</html>"),
        (b"[1]", "[1]"),
        (None, ""),
        (b"x" * 1000, "x" * 300),
    ],
)
def test_an_error_is_one_line_whoever_sent_it(body: bytes | str | None, message: str) -> None:
    assert error_message(body) == message
