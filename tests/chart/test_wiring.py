"""Who finds whom: selectors, ports, endpoints, claims, and the policies that let them through."""

from __future__ import annotations

import re
from typing import Any

import pytest

from services import config
from services.cluster.check import read_target
from tests.chart.rendering import CASES, Object, config_json, find, pod_of, pods, render

COMPONENTS = ("actor", "learner", "paramserver", "relay", "evaluator")


def selected(objects: list[Object], labels: dict[str, str]) -> list[str]:
    """The components of the pods that have all of ``labels``."""
    return [pod.component for pod in pods(objects) if labels.items() <= pod.metadata["labels"].items()]


@pytest.mark.parametrize("case", CASES)
def test_every_selector_finds_the_pods_of_its_role_and_no_others(case: str) -> None:
    objects = render(*CASES[case])

    for each in objects:
        spec = each.get("spec", {})
        selector = spec.get("selector", spec.get("podSelector", {}))
        labels = selector.get("matchLabels", selector if each["kind"] == "Service" else None)
        if labels is not None and each["kind"] != "PodMonitor":
            assert set(selected(objects, labels)) == {
                each["metadata"]["labels"]["app.kubernetes.io/component"]
            }


def test_services_of_two_releases_never_select_each_others_pods() -> None:
    ours, theirs = render(), render(release="other-impala")
    labels = find(ours, "Service", "impala-learner")["spec"]["selector"]

    assert selected(ours, labels) == ["learner"]
    assert selected(theirs, labels) == []


@pytest.mark.parametrize("case", CASES)
def test_service_ports_lead_to_ports_that_the_container_and_the_configuration_have(case: str) -> None:
    objects = render(*CASES[case])
    run = config.validate(config_json(objects))
    listens = {
        "metrics": run.ops.port,
        "rollouts": int(run.wire.learner_bind.rpartition(":")[2]),
        "weights": int(run.wire.paramserver_bind.rpartition(":")[2]),
    }

    for service in (each for each in objects if each["kind"] == "Service"):
        component = service["metadata"]["labels"]["app.kubernetes.io/component"]
        container = pod_of(objects, component).container
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} == ports.keys()
        for port in service["spec"]["ports"]:
            assert port["port"] == ports[port["targetPort"]] == listens[port["name"]]


@pytest.mark.parametrize("case", CASES)
def test_every_address_that_a_pod_is_told_is_a_service_or_a_pod_behind_one(case: str) -> None:
    objects = render(*CASES[case])
    services = {each["metadata"]["name"]: each["spec"] for each in objects if each["kind"] == "Service"}
    told = str(config_json(objects)["wire"]) + "".join(
        str(pod.container.get("env")) + str(pod.container.get("args")) for pod in pods(objects)
    )
    addresses = re.findall(r"(?:tcp|http)://([a-z0-9.-]+):(\d+)", told)

    assert len(addresses) >= 3
    for host, port in addresses:
        assert int(port) in {each["port"] for each in services[host]["ports"]}, host


def test_no_address_of_a_learner_is_in_the_configuration_that_all_pods_share() -> None:
    assert "learner-" not in str(config_json(render(*CASES["three-learners"])))


@pytest.mark.parametrize("case", CASES)
def test_every_learner_has_a_claim_and_a_name_of_its_own(case: str) -> None:
    learners = find(render(*CASES[case]), "StatefulSet", "impala-learner")["spec"]
    data = {volume["name"]: volume for volume in learners["template"]["spec"]["volumes"]}.get("data")

    assert learners["serviceName"] == "impala-learner"
    assert "--learner-id" not in learners["template"]["spec"]["containers"][0]["args"]  # the host's name
    assert ("volumeClaimTemplates" in learners) == (data is None)


def test_a_pod_that_is_never_ready_does_not_stand_in_the_way_of_the_upgrade_that_mends_it() -> None:
    sets = [each for each in render() if each["kind"] == "StatefulSet"]

    assert {each["metadata"]["name"] for each in sets} == {"impala-learner", "impala-paramserver"}
    assert {each["spec"].get("podManagementPolicy") for each in sets} == {"Parallel"}


def test_there_is_exactly_one_parameter_server_whatever_is_asked_for() -> None:
    for case in CASES.values():
        assert find(render(*case), "StatefulSet", "impala-paramserver")["spec"]["replicas"] == 1


def test_helm_test_asks_every_role_but_the_actors_for_its_own_metrics() -> None:
    def asked(case: str) -> set[str]:
        pod = find(render(*CASES[case]), "Pod", "impala-test-metrics")
        return {argument for argument in pod["spec"]["containers"][0]["args"] if "=http" in argument}

    learner = "learner=http://impala-learner:9400/metrics"
    paramserver = "paramserver=http://impala-paramserver:9400/metrics"
    assert asked("default") == {learner, paramserver}
    assert asked("everything") - asked("default") == {
        "relay=http://impala-relay:9400/metrics",
        "evaluator=http://impala-evaluator:9400/metrics",
    }
    targets = [read_target(each) for each in asked("everything")]  # as `impala metrics` reads them
    assert {target.role for target in targets} == set(COMPONENTS) - {"actor"}


def test_helm_test_plays_with_few_environments_and_sends_to_the_running_learners() -> None:
    (container,) = find(render(*CASES["relays"]), "Pod", "impala-test-rollout")["spec"]["containers"]

    ours = ["actor", "--config", "/etc/impala/config.json", "--rollouts", "1", "--actor.num-envs", "2"]
    assert container["args"] == ours
    assert {"name": "IMPALA__WIRE__PARAMSERVER_ENDPOINT", "value": "tcp://impala-relay:5556"} in container[
        "env"
    ]


def data_of(case: str, component: str = "learner") -> tuple[Any, Any]:
    """(volume, claim template) behind /data."""
    objects = render(*CASES[case])
    volumes = {volume["name"]: volume for volume in pod_of(objects, component).spec["volumes"]}
    templates = find(objects, "StatefulSet", f"impala-{component}")["spec"].get("volumeClaimTemplates")
    return volumes.get("data"), templates


def test_checkpoints_are_on_a_claim_of_the_chart_or_of_the_user_or_on_none() -> None:
    _, (template,) = data_of("default")
    _, (named,) = data_of("storage-class")

    assert data_of("default")[0] is None
    assert template["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "5Gi"}},
    }
    assert named["spec"]["storageClassName"] == "fast"
    assert named["spec"]["resources"]["requests"]["storage"] == "1Ti"
    assert data_of("no-claim") == ({"name": "data", "emptyDir": {}}, None)
    assert data_of("claim-of-mine") == (
        {"name": "data", "persistentVolumeClaim": {"claimName": "mine"}},
        None,
    )
    assert data_of("default", "paramserver") == ({"name": "data", "emptyDir": {}}, None)
    assert data_of("paramserver-claim", "paramserver")[1] is not None


def test_the_run_is_kept_below_the_data_that_outlives_the_pod() -> None:
    objects = render()
    mounts = {
        mount["mountPath"]: mount["name"] for mount in pod_of(objects, "learner").container["volumeMounts"]
    }

    assert str(config.validate(config_json(objects)).run_dir).startswith("/data/")
    assert mounts["/data"] == "data"


ALLOWED = {
    ("actor", "learner", 5555),
    ("test", "learner", 5555),
    ("learner", "learner", None),
    ("actor", "paramserver", 5556),
    ("learner", "paramserver", 5556),
    ("evaluator", "paramserver", 5556),
    ("relay", "paramserver", 5556),
    ("test", "paramserver", 5556),
    ("actor", "relay", 5556),
    ("test", "relay", 5556),
    *(("*", component, 9400) for component in COMPONENTS),
}
"""(from, to, port): all that policies let in. None is every port, * everybody."""


def allowed(objects: list[Object]) -> set[tuple[str, str, int | None]]:
    found = set()
    for policy in (each for each in objects if each["kind"] == "NetworkPolicy"):
        (to,) = set(selected(objects, policy["spec"]["podSelector"]["matchLabels"]))
        for rule in policy["spec"].get("ingress", ()):
            for peer in rule.get("from", [None]):
                labels = peer and peer.get("podSelector", {}).get("matchLabels", {})
                who = (
                    labels["app.kubernetes.io/component"] if labels else ("*" if peer is None else str(peer))
                )
                found |= {(who, to, port["port"]) for port in rule.get("ports", [{"port": None}])}
    return found


def test_network_policies_let_in_who_has_business_there_and_nobody_else() -> None:
    objects = render("--set", "paramserver.relays=1,evaluator.enabled=true")

    assert allowed(objects) == ALLOWED


def test_every_pod_but_the_hooks_stands_behind_a_policy() -> None:
    objects = render(*CASES["everything"])
    guarded = {to for _, to, _ in allowed(objects)}

    assert guarded == {pod.component for pod in pods(objects)} - {"test"} == set(COMPONENTS)


def test_metrics_can_be_kept_to_some_who_always_include_helm_test() -> None:
    readers = {who for who, _, port in allowed(render(*CASES["metrics-from"])) if port == 9400}

    assert readers == {"test", str({"namespaceSelector": {}})}


def test_egress_is_open_unless_it_is_to_be_the_release_and_dns_only() -> None:
    policy = find(render(), "NetworkPolicy", "impala-actor")["spec"]
    strict = find(render(*CASES["egress"]), "NetworkPolicy", "impala-actor")["spec"]

    assert policy["policyTypes"] == ["Ingress"]
    assert strict["policyTypes"] == ["Ingress", "Egress"]
    assert [(port["protocol"], port["port"]) for port in strict["egress"][1]["ports"]] == [
        ("UDP", 53),
        ("TCP", 53),
        ("UDP", 5353),  # of OpenShift's DNS pods
        ("TCP", 5353),
    ]
    assert (
        strict["egress"][0]["to"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/instance"] == "impala"
    )


def test_where_egress_is_restricted_helm_test_has_a_way_out_of_a_namespace_that_forbids_it() -> None:
    strict = render(*CASES["egress"])
    of_test = find(strict, "NetworkPolicy", "impala-test")["spec"]

    assert of_test["policyTypes"] == ["Egress"]
    assert of_test["egress"] == find(strict, "NetworkPolicy", "impala-actor")["spec"]["egress"]
    assert "impala-test" not in [each["metadata"]["name"] for each in render()]


def test_no_service_is_a_list_of_all_actors() -> None:
    services = {each["metadata"]["name"] for each in render() if each["kind"] == "Service"}

    assert services == {"impala-learner", "impala-paramserver"}


def test_annotations_name_the_port_of_the_metrics_and_can_be_left_out() -> None:
    annotations = pod_of(render(), "actor").metadata["annotations"]

    assert annotations["prometheus.io/scrape"] == "true"
    assert annotations["prometheus.io/port"] == str(config.validate(config_json(render())).ops.port)
    assert annotations["prometheus.io/path"] == "/metrics"
    assert not any(
        name.startswith("prometheus.io/")
        for pod in pods(render(*CASES["unwatched"]))
        for name in pod.metadata["annotations"]
    )


def test_the_pod_monitor_sets_the_labels_that_rules_and_dashboards_go_by() -> None:
    objects = render(*CASES["pod-monitor"])
    monitor = find(objects, "PodMonitor", "impala")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]

    assert monitor["metadata"]["labels"]["release"] == "mine"
    assert {each["targetLabel"]: each["sourceLabels"] for each in endpoint["relabelings"]} == {
        "release": ["__meta_kubernetes_pod_label_app_kubernetes_io_instance"],
        "role": ["__meta_kubernetes_pod_label_app_kubernetes_io_component"],
    }
    scraped = {
        pod.component
        for pod in pods(objects)
        if monitor["spec"]["selector"]["matchLabels"].items() <= pod.metadata["labels"].items()
        and endpoint["port"] in {port["name"] for port in pod.container.get("ports", ())}
    }
    assert scraped == {"actor", "learner", "paramserver"}


def test_disruption_budgets_bound_what_a_drain_takes() -> None:
    budgets = {
        each["metadata"]["name"]: each["spec"]["maxUnavailable"]
        for each in render(*CASES["everything"])
        if each["kind"] == "PodDisruptionBudget"
    }

    assert budgets == {"impala-actor": "10%", "impala-learner": 1, "impala-relay": 1}
    assert not [each for each in render() if each["kind"] == "PodDisruptionBudget"]
