"""Which metrics and recorded series a query names, found without a PromQL parser: Prometheus ships none."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from services.ops.metrics import ROLES, metric_names

HELM = Path(__file__).parents[2] / "helm"
ALERTS = HELM / "alerts"

PROMETHEUS_ITSELF = {"up"}
KUBERNETES = {"kube_deployment_spec_replicas", "kube_statefulset_replicas"}
"""Of kube-state-metrics, which not every cluster has: each stands in front of an ``or``."""

CHART = {"release:impala_actors_configured:count", "release:impala_learners_configured:count"}
"""Recorded by the chart's template, which alone knows how many are asked for."""

KEYWORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan", "atan2"}
_LABELS = r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)"
_NOISE = rf"\"(?:\\.|[^\"])*\"|'(?:\\.|[^'])*'|\{{[^}}]*\}}|\[[^\]]*\]|{_LABELS}"


def names_in(query: str) -> set[str]:
    """Every metric name in ``query``."""
    without_strings = re.sub(r"\"(?:\\.|[^\"])*\"|'(?:\\.|[^'])*'", "", query)
    bare = re.sub(_NOISE, " ", re.sub(r"#.*", "", without_strings))
    words = re.findall(r"(?<![\w:.])[A-Za-z_:][\w:]*(?![\w:])(?!\s*\()", bare)
    return {word for word in words if word.lower() not in KEYWORDS}


def rules() -> list[dict[str, Any]]:
    """All rules of the chart, recording rules too."""
    return [rule for path in sorted(ALERTS.glob("*.yaml")) for rule in rules_in(path)]


def rules_in(path: Path) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = yaml.safe_load(path.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def known_names() -> set[str]:
    """What a query may name."""
    ours = {name for role in ROLES for name in metric_names(role)}
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    return ours | recorded | CHART | PROMETHEUS_ITSELF | KUBERNETES


def unknown_names(queries: Iterable[str]) -> set[str]:
    """What is misspelt, or was renamed."""
    return {name for query in queries for name in names_in(query)} - known_names()
