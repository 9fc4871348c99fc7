"""What an upgrade changes: no more than was asked for, and never a field that Kubernetes keeps for good."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

import pytest
import yaml

from tests.chart.fake_api import render_beside
from tests.chart.rendering import CASES, CHART, Object, find, helm, manifest, pods, render

KEPT = ("--set", "security.existingSecret=mine")
"""Without a cluster every rendering draws another seed."""


def changed(before: tuple[str, ...], after: tuple[str, ...]) -> list[str]:
    """The lines that differ."""
    lines = difflib.ndiff(manifest(*KEPT, *before).splitlines(), manifest(*KEPT, *after).splitlines())
    return [line for line in lines if line[0] in "+-"]


@pytest.mark.parametrize("case", ["default", "relays", "evaluator", "labels"])
def test_scaling_actors_changes_the_number_of_replicas_and_nothing_else(case: str) -> None:
    lines = changed((*CASES[case], "--set", "actors=8"), (*CASES[case], "--set", "actors=256"))

    assert lines == ["-   replicas: 8", "+   replicas: 256"]


@pytest.mark.parametrize("case", ["default", "relays", "evaluator", "egress"])
def test_scaling_learners_changes_the_number_of_replicas_and_nothing_else(case: str) -> None:
    lines = changed((*CASES[case],), (*CASES[case], "--set", "learners=3"))

    assert lines == ["-   replicas: 1", "+   replicas: 3"]


@pytest.mark.parametrize("value", ["actors=256", "learners=3"])
def test_scaling_restarts_no_pod_whatever_else_is_on(value: str) -> None:
    def templates(*arguments: str) -> dict[str, Object]:
        return {
            each["metadata"]["name"]: each["spec"]["template"]
            for each in render(*KEPT, *CASES["everything"], *arguments)
            if "template" in each.get("spec", {})
        }

    assert templates("--set", value) == templates()
    assert {f"impala-{role}" for role in ("actor", "learner", "paramserver", "relay")} < templates().keys()


def test_with_autoscaling_nobody_but_keda_sets_the_number_of_actors() -> None:
    assert (
        changed((*CASES["autoscaling"], "--set", "actors=8"), (*CASES["autoscaling"], "--set", "actors=9"))
        == []
    )
    assert "replicas" not in find(render(*CASES["autoscaling"]), "Deployment", "impala-actor")["spec"]


@pytest.mark.parametrize("live", [0, 1, 256])
def test_turning_autoscaling_on_keeps_the_actors_that_there_are(live: int) -> None:
    metadata = {"name": "impala-actor"}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata,
        "spec": {"replicas": live},
    }

    scaled = render_beside(deployment, arguments=CASES["autoscaling"])
    fixed = render_beside(deployment, arguments=("--set", "actors=8"))

    assert find(scaled, "Deployment", "impala-actor")["spec"]["replicas"] == live
    assert find(fixed, "Deployment", "impala-actor")["spec"]["replicas"] == 8


def test_another_configuration_restarts_every_pod() -> None:
    def checksums(*arguments: str) -> set[str]:
        long_lived = [pod for pod in pods(render(*arguments)) if pod.component != "test"]
        return {pod.metadata["annotations"]["checksum/config"] for pod in long_lived}

    (before,), (after,) = checksums(), checksums("--set", "config.seed=2")

    assert before != after


@pytest.fixture
def next_version(tmp_path: Path) -> Path:
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart, ignore=shutil.ignore_patterns("__pycache__"))
    text = (chart / "Chart.yaml").read_text()
    (chart / "Chart.yaml").write_text(text.replace("ersion: 0.1.0", "ersion: 9.8.7"))
    return chart


def immutable(each: Object) -> object:
    """The fields that an upgrade can not change."""
    spec = each.get("spec", {})
    fields = ("selector", "serviceName", "podManagementPolicy", "volumeClaimTemplates", "clusterIP")
    return {field: spec.get(field) for field in fields}


@pytest.mark.parametrize("case", ["default", "everything"])
def test_a_new_version_changes_no_immutable_field(case: str, next_version: Path) -> None:
    done = helm("template", "impala", str(next_version), "--namespace", "there", *CASES[case])
    assert "helm.sh/chart: impala-9.8.7" in done.stdout, done.stderr
    upgraded = [each for each in yaml.safe_load_all(done.stdout) if each]

    for each in render(*CASES[case]):
        same = find(upgraded, each["kind"], each["metadata"]["name"])
        assert immutable(same) == immutable(each)
        assert "9.8.7" not in str(immutable(same))


def test_a_new_version_alone_changes_the_image_of_a_pod_and_nothing_else(next_version: Path) -> None:
    done = helm("template", "impala", str(next_version), "--namespace", "there", *KEPT)
    before = {pod.owner: pod for pod in pods(render(*KEPT))}
    after = {pod.owner: pod for pod in pods([each for each in yaml.safe_load_all(done.stdout) if each])}

    assert before.keys() == after.keys()
    for owner, pod in after.items():
        if pod.component != "test":
            assert pod.metadata == before[owner].metadata, owner
        assert {**pod.container, "image": ""} == {**before[owner].container, "image": ""}
        assert pod.container["image"].endswith(":9.8.7")


def test_common_labels_never_reach_selectors_or_claims() -> None:
    labelled = {
        each["metadata"]["name"]: each
        for each in render(*CASES["labels"])
        if "selector" in each.get("spec", {})
    }

    for name, each in labelled.items():
        assert immutable(each) == immutable(find(render(), each["kind"], name))
