"""Everything that is rendered is what a Kubernetes API takes, from 1.20 on and up to the newest."""

from __future__ import annotations

import copy
from pathlib import Path

import kubernetes_validate
import pytest

from tests.chart.rendering import CASES, CHART, Object, helm, render

SCHEMAS = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
VERSIONS = sorted(
    {path.name.removeprefix("v").removesuffix(".0-local") for path in SCHEMAS.glob("v*-local")},
    key=lambda version: int(version.partition(".")[2]),
)
CUSTOM = {"keda.sh/v1alpha1", "monitoring.coreos.com/v1"}
"""Resources of operators, whose schemas no Kubernetes has."""

IN_1_20 = {
    ("v1", "ConfigMap"),
    ("v1", "Secret"),
    ("v1", "Service"),
    ("v1", "Pod"),
    ("apps/v1", "Deployment"),
    ("apps/v1", "StatefulSet"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
}


def test_the_versions_tried_reach_from_1_25_to_the_newest_known() -> None:
    assert VERSIONS[0] == "1.25"
    assert int(VERSIONS[-1].partition(".")[2]) >= 36


@pytest.mark.parametrize("case", CASES)
def test_helm_lint_has_no_complaint(case: str) -> None:
    done = helm("lint", "--strict", str(CHART), *CASES[case])

    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout


@pytest.mark.parametrize("case", CASES)
def test_every_object_is_valid_for_the_newest_kubernetes(case: str) -> None:
    for each in render(*CASES[case], "--kube-version", VERSIONS[-1]):
        if each["apiVersion"] not in CUSTOM:
            kubernetes_validate.validate(each, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_everything_at_once_is_valid_for_every_version(version: str) -> None:
    for each in render(*CASES["everything"], "--kube-version", version):
        if each["apiVersion"] not in CUSTOM:
            kubernetes_validate.validate(each, version, strict=True)


def test_a_misspelt_field_would_be_found() -> None:
    deployment = copy.deepcopy(next(each for each in render() if each["kind"] == "Deployment"))
    deployment["spec"]["template"]["spec"]["containers"][0]["redinessProbe"] = {}

    with pytest.raises(kubernetes_validate.ValidationError, match="redinessProbe"):
        kubernetes_validate.validate(deployment, VERSIONS[-1], strict=True)


def test_default_values_need_nothing_newer_than_kubernetes_1_20() -> None:
    rendered = {(each["apiVersion"], each["kind"]) for each in render("--kube-version", "1.20.0")}

    assert rendered <= IN_1_20


def test_an_older_kubernetes_is_refused_with_the_version_that_is_needed() -> None:
    done = helm("template", "impala", str(CHART), "--kube-version", "1.19.0")

    assert done.returncode != 0
    assert "chart requires kubeVersion: >=1.20.0-0" in done.stderr


@pytest.mark.parametrize("case", CASES)
def test_names_are_unique_and_every_object_belongs_to_the_release(case: str) -> None:
    objects = [each for each in render(*CASES[case]) if "labels" in each["metadata"]]  # not the extra objects
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]

    assert len(names) == len(set(names))
    for each in objects:
        assert_labelled(each)


def assert_labelled(each: Object) -> None:
    labels = each["metadata"]["labels"]
    assert labels["app.kubernetes.io/name"] == "impala"
    assert labels["app.kubernetes.io/instance"] == "impala"
    assert labels["app.kubernetes.io/managed-by"] == "Helm"


def test_common_labels_are_on_every_object_and_pod() -> None:
    for each in render(*CASES["everything"]):
        if "labels" in each["metadata"]:
            assert each["metadata"]["labels"]["team"] == "rl", each["metadata"]["name"]
            template = each.get("spec", {}).get("template", {"metadata": {"labels": {"team": "rl"}}})
            assert template["metadata"]["labels"]["team"] == "rl", each["metadata"]["name"]


def test_templates_in_extra_objects_are_rendered() -> None:
    names = {each["metadata"]["name"] for each in render(*CASES["extra-objects"])}

    assert {"impala-more", "text"} <= names


def test_a_long_release_name_still_gives_legal_names_and_labels() -> None:
    for each in render(*CASES["everything"], release="a" * 53):
        name = each["metadata"]["name"]
        if each["kind"] == "StatefulSet":
            name += "-0123456789"  # the hash that becomes a label of its pods
        assert len(name) <= 63, name
