"""Every pod, hooks and examples too, is what the Pod Security Standard calls restricted, and more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chart.rendering import CASES, CHART, Object, Pod, as_json, pod_of, pods, render

VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
"""The kinds that the restricted standard allows."""


def violations(pod: Pod) -> Iterator[str]:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/, restricted; and our own rules."""
    spec = pod.spec
    of_pod = spec.get("securityContext", {})
    yield from (name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name))
    for volume in spec.get("volumes", ()):
        yield from (f"volume {kind}" for kind in volume.keys() - {"name"} if kind not in VOLUMES)
    if "sysctls" in of_pod or "seLinuxOptions" in of_pod or "windowsOptions" in of_pod:
        yield "kernel settings"
    for container in [*spec["containers"], *spec.get("initContainers", ())]:
        yield from _of_container(container, of_pod)
    if spec.get("automountServiceAccountToken") is not False:
        yield "token"
    if spec.get("enableServiceLinks") is not False:
        yield "service links"


def _of_container(container: Object, of_pod: Object) -> Iterator[str]:
    own = container.get("securityContext", {})
    both = {**of_pod, **own}
    if own.get("privileged") or "procMount" in own or own.get("allowPrivilegeEscalation") is not False:
        yield "privileges"
    if own.get("capabilities", {}).get("drop") != ["ALL"] or own["capabilities"].get("add"):
        yield "capabilities"
    if both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0:
        yield "root"
    if both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "seccomp"
    if any("hostPort" in port for port in container.get("ports", ())):
        yield "host port"
    if own.get("readOnlyRootFilesystem") is not True:
        yield "root file system"


@pytest.mark.parametrize("case", CASES)
def test_every_pod_is_restricted(case: str) -> None:
    rendered = list(pods(render(*CASES[case])))

    assert len(rendered) >= 5  # actor, learner, parameter server and the two of helm test
    for pod in rendered:
        assert not list(violations(pod)), pod.owner


@pytest.mark.parametrize(
    ("value", "violation"),
    [
        ("containerSecurityContext.readOnlyRootFilesystem=false", "root file system"),
        ("containerSecurityContext.allowPrivilegeEscalation=true", "privileges"),
        ("containerSecurityContext.capabilities.drop={CHOWN}", "capabilities"),
        ("podSecurityContext.runAsNonRoot=false", "root"),
        ("podSecurityContext.seccompProfile.type=Unconfined", "seccomp"),
    ],
)
def test_a_laxer_value_would_be_found_in_every_pod(value: str, violation: str) -> None:
    for pod in pods(render("--set", value)):
        assert violation in list(violations(pod)), pod.owner


def test_a_volume_of_the_host_would_be_found() -> None:
    values = as_json(actor={"extraVolumes": [{"name": "host", "hostPath": {"path": "/"}}]})

    assert "volume hostPath" in list(violations(pod_of(render(*values), "actor")))


@pytest.mark.parametrize("case", CASES)
def test_every_mount_has_its_volume_and_tmp_can_be_written(case: str) -> None:
    for pod in pods(render(*CASES[case])):
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        claims = {"data"} if pod.owner.startswith("StatefulSet") else set()
        mounts = {mount["mountPath"]: mount["name"] for mount in pod.container["volumeMounts"]}

        assert set(mounts.values()) <= volumes.keys() | claims, pod.owner
        assert "emptyDir" in volumes[mounts["/tmp"]]
        assert {"name": "HOME", "value": "/tmp"} in pod.container["env"]
        assert pod.container["workingDir"] == "/tmp"


@pytest.mark.parametrize("case", CASES)
def test_memory_is_limited_and_the_cpu_of_actors_is_not(case: str) -> None:
    for pod in pods(render(*CASES[case])):
        resources = pod.container["resources"]
        assert "memory" in resources["limits"], pod.owner
        assert {"cpu", "memory"} <= resources["requests"].keys(), pod.owner
        assert "cpu" not in resources["limits"], pod.owner


@pytest.mark.parametrize("case", CASES)
def test_the_kubelet_asks_the_process_itself_and_is_patient_with_its_start(case: str) -> None:
    for pod in pods(render(*CASES[case])):
        if pod.owner.startswith("Pod "):
            continue  # hooks end by themselves
        probes = {name: pod.container[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}
        paths = {name: probe["httpGet"] for name, probe in probes.items()}
        assert paths == {
            "startup": {"path": "/healthz", "port": "metrics"},
            "liveness": {"path": "/healthz", "port": "metrics"},
            "readiness": {"path": "/readyz", "port": "metrics"},
        }
        assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] == 300


def test_hooks_have_a_deadline_and_stay_for_their_logs() -> None:
    hooks = [pod for pod in pods(render()) if pod.component == "test"]

    assert len(hooks) == len([each for each in render() if "annotations" in each["metadata"]]) == 2
    for hook in hooks:
        assert hook.metadata["annotations"] == {
            "helm.sh/hook": "test",
            "helm.sh/hook-delete-policy": "before-hook-creation",
        }
        assert hook.spec["restartPolicy"] == "Never"
        assert hook.spec["activeDeadlineSeconds"] == 300


def test_shared_memory_of_the_learner_is_memory_of_the_size_asked_for() -> None:
    pod = pod_of(render("--set", "learner.sharedMemory=1Gi"), "learner")

    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}} in pod.spec["volumes"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in pod.container["volumeMounts"]


def test_actors_are_spread_over_nodes_among_themselves() -> None:
    (constraint,) = pod_of(render(), "actor").spec["topologySpreadConstraints"]

    assert constraint["topologyKey"] == "kubernetes.io/hostname"
    assert constraint["whenUnsatisfiable"] == "ScheduleAnyway"
    assert constraint["labelSelector"]["matchLabels"]["app.kubernetes.io/component"] == "actor"


def test_each_role_takes_its_own_scheduling_and_extras() -> None:
    actor = pod_of(render(*CASES["scheduling"]), "actor").spec
    learner = pod_of(render(*CASES["extras"]), "learner")

    assert actor["nodeSelector"] == {"spot": "true"}
    assert actor["tolerations"] == [{"key": "spot", "operator": "Exists"}]
    assert (actor["priorityClassName"], actor["runtimeClassName"]) == ("low", "gvisor")
    assert actor["affinity"] == {"podAntiAffinity": {}}
    assert "nodeSelector" not in pod_of(render(*CASES["scheduling"]), "learner").spec
    assert {"name": "A", "value": "b"} in learner.container["env"]
    assert {"name": "roms", "mountPath": "/roms"} in learner.container["volumeMounts"]
    assert {"name": "roms", "emptyDir": {}} in learner.spec["volumes"]
    assert pod_of(render(*CASES["labels"]), "actor").metadata["labels"]["tier"] == "cheap"
    assert pod_of(render(*CASES["labels"]), "learner").metadata["annotations"]["note"] == "mine"


@pytest.mark.parametrize(
    ("value", "image"),
    [
        ("actors=1", "impala-actor:0.1.0"),
        ("image.actor.tag=1.2", "impala-actor:1.2"),
        ("image.registry=registry.example.com/team/", "registry.example.com/team/impala-actor:0.1.0"),
        (f"image.actor.digest=sha256:{'a' * 64}", f"impala-actor@sha256:{'a' * 64}"),
    ],
)
def test_the_image_is_put_together_from_registry_repository_and_tag_or_digest(value: str, image: str) -> None:
    objects = render("--set", value, "--set", "evaluator.enabled=true,paramserver.relays=1")

    for pod in pods(objects):
        if pod.component != "learner":
            assert pod.container["image"] == image, pod.owner
    assert "impala-learner:0.1.0" in pod_of(objects, "learner").container["image"]


@pytest.mark.parametrize(
    ("resources", "is_set"),
    [
        ({}, True),
        ({"requests": {"cpu": None}}, False),
        ({"requests": {"cpu": None}, "limits": {"cpu": "2"}}, True),
        ({"requests": None, "limits": None}, False),
    ],
)
def test_the_learner_goes_by_the_cpus_it_asks_for_and_by_the_nodes_where_it_asks_for_none(
    resources: Object, is_set: bool
) -> None:
    env = pod_of(render(*as_json(learner={"resources": resources})), "learner").container["env"]

    found = {each["name"]: each.get("valueFrom") for each in env}
    assert ("IMPALA__LEARNER__NUM_THREADS" in found) is is_set
    if is_set:
        asked = {"resourceFieldRef": {"resource": "requests.cpu", "divisor": "1"}}
        assert found["IMPALA__LEARNER__NUM_THREADS"] == asked


def test_threads_of_the_configuration_are_not_overridden() -> None:
    env = pod_of(render("--set", "config.learner.num_threads=3"), "learner").container["env"]

    assert [each["name"] for each in env] == ["IMPALA__WIRE__LEARNER_HOST", "HOME"]


def test_the_last_words_of_a_pod_that_fails_are_those_of_its_log() -> None:
    for pod in pods(render(*CASES["everything"])):
        assert pod.container["terminationMessagePolicy"] == "FallbackToLogsOnError", pod.owner


def test_service_account_and_time_to_end_hold_for_all_pods() -> None:
    given = render("--set", "serviceAccountName=reader,terminationGracePeriodSeconds=120")

    assert {pod.spec["serviceAccountName"] for pod in pods(given)} == {"reader"}
    assert {pod.spec["automountServiceAccountToken"] for pod in pods(given)} == {False}
    assert {pod.spec["terminationGracePeriodSeconds"] for pod in pods(given)} == {120}
    assert {pod.spec["terminationGracePeriodSeconds"] for pod in pods(render())} == {30}
    assert not [pod for pod in pods(render()) if "serviceAccountName" in pod.spec]


def test_the_users_of_an_openshift_namespace_are_left_to_openshift() -> None:
    ids = ("runAsUser", "runAsGroup", "fsGroup")
    recipe = ",".join(f"podSecurityContext.{name}=null" for name in ids)
    assert recipe in " ".join((CHART / "README.md").read_text().split())

    for pod in pods(render("--set", recipe)):
        assert not set(ids) & pod.spec["securityContext"].keys()
        assert not list(violations(pod)), pod.owner


def test_a_label_of_a_role_takes_the_place_of_the_common_one() -> None:
    objects = render("--set", "commonLabels.team=rl,actor.podLabels.team=games")

    assert pod_of(objects, "actor").metadata["labels"]["team"] == "games"
    assert pod_of(objects, "learner").metadata["labels"]["team"] == "rl"


def test_texts_that_look_like_something_else_stay_texts(tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text("learner: {persistence: {existingClaim: '123'}}\nsecurity: {existingSecret: '1e3'}\n")
    objects = render("--values", str(file), release="no")

    volumes = {volume["name"]: volume for volume in pod_of(objects, "learner").spec["volumes"]}
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == "123"
    assert volumes["keys"]["secret"]["secretName"] == "1e3"
    for each in objects:
        assert each["metadata"]["labels"]["app.kubernetes.io/instance"] == "no"
