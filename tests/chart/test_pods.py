"""Every pod, hooks and examples too, is what the Pod Security Standard calls restricted, and more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chart.rendering import CASES, Object, Pod, as_json, pod_of, pods, render

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

    assert len(hooks) == 2
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
