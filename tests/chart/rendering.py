"""The chart as helm renders it: every test of it starts here, and none needs a cluster.

``CASES`` are the values that it is rendered with wherever a rule holds for all of them: each switch on its
own or turned around, everything at once, and each example.
"""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import find_tool

CHART = Path(__file__).parents[2] / "helm"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))

Object = dict[str, Any]
"""A Kubernetes object, or a part of one."""


def as_json(**values: object) -> tuple[str, ...]:
    """The arguments that set ``values``."""
    return tuple(part for key in values for part in ("--set-json", f"{key}={json.dumps(values[key])}"))


ON = {
    "relays": ("--set", "paramserver.relays=2"),
    "evaluator": ("--set", "evaluator.enabled=true"),
    "autoscaling": ("--set", "autoscaling.enabled=true"),
    "disruption": ("--set", "podDisruptionBudget.enabled=true"),
    "egress": ("--set", "networkPolicy.restrictEgress=true"),
    "pod-monitor": ("--set", "monitoring.podMonitor.enabled=true,monitoring.podMonitor.labels.release=mine"),
    "rules": ("--set", "monitoring.rules.enabled=true,monitoring.rules.labels.release=mine"),
    "dashboards": ("--set", "monitoring.dashboards.enabled=true"),
    "paramserver-claim": ("--set", "paramserver.persistence.enabled=true"),
    "labels": ("--set", "commonLabels.team=rl,actor.podLabels.tier=cheap,learner.podAnnotations.note=mine"),
    "image": ("--set", "image.registry=registry.example.com/team,image.pullSecrets[0].name=mine"),
    "scheduling": as_json(
        actor={
            "nodeSelector": {"spot": "true"},
            "tolerations": [{"key": "spot", "operator": "Exists"}],
            "affinity": {"podAntiAffinity": {}},
            "priorityClassName": "low",
            "runtimeClassName": "gvisor",
        }
    ),
    "extras": as_json(
        learner={
            "extraEnv": [{"name": "A", "value": "b"}],
            "extraVolumes": [{"name": "roms", "emptyDir": {}}],
            "extraVolumeMounts": [{"name": "roms", "mountPath": "/roms"}],
        }
    ),
    "extra-objects": as_json(
        extraObjects=[
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-more"}},
            "apiVersion: v1\nkind: Secret\nmetadata: {name: text}",
        ]
    ),
    "metrics-from": as_json(networkPolicy={"metricsFrom": [{"namespaceSelector": {}}]}),
}
"""What is off, turned on."""

CASES: dict[str, Sequence[str]] = {
    "default": (),
    **ON,
    "everything": tuple(argument for arguments in ON.values() for argument in arguments),
    "no-actors": ("--set", "actors=0"),
    "insecure": ("--set", "security.enabled=false,networkPolicy.enabled=false"),
    "seed-of-mine": ("--set", "security.existingSecret=mine"),
    "keys-per-role": ("--set", "security.perRole.existingSecret=mine,evaluator.enabled=true"),
    "no-claim": ("--set", "learner.persistence.enabled=false"),
    "claim-of-mine": ("--set", "learner.persistence.existingClaim=mine"),
    "storage-class": ("--set", "learner.persistence.storageClass=fast,learner.persistence.size=1Ti"),
    "unwatched": ("--set", "monitoring.annotations=false"),
    "three-learners": ("--set", "learners=3,config.learner.min_learners=2"),
    **{f"example-{path.stem}": ("--values", str(path)) for path in EXAMPLES},
}


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run helm, whatever comes of it."""
    command = [str(find_tool("helm")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@functools.cache
def manifest(*arguments: str, release: str = "impala") -> str:
    """What `helm template` prints."""
    done = helm("template", release, str(CHART), "--namespace", "there", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def render(*arguments: str, release: str = "impala") -> list[Object]:
    """All objects, hooks too. They are shared among tests: look, do not touch."""
    documents = yaml.safe_load_all(manifest(*arguments, release=release))
    return [document for document in documents if document]


def refusal(*arguments: str) -> str:
    """What helm says of values that it does not take."""
    done = helm("template", "impala", str(CHART), *arguments)
    assert done.returncode != 0, "helm took them"
    return done.stderr


def find(objects: Sequence[Object], kind: str, name: str) -> Object:
    """The one object of that kind and name."""
    found = [each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    assert len(found) == 1, f"{kind} {name}: {len(found)} of {[each['metadata']['name'] for each in objects]}"
    return found[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """What pods are made from: a template of a workload, or a pod that is a hook."""

    owner: str
    metadata: Object
    spec: Object

    @property
    def component(self) -> str:
        """Its role, as in labels."""
        return str(self.metadata["labels"]["app.kubernetes.io/component"])

    @property
    def container(self) -> Object:
        """The only one."""
        (container,) = self.spec["containers"]
        assert isinstance(container, dict)
        return container


def pods(objects: Sequence[Object]) -> Iterator[Pod]:
    """Every pod that an installation, or `helm test`, may start."""
    for each in objects:
        owner = f"{each['kind']} {each['metadata']['name']}"
        if each["kind"] == "Pod":
            yield Pod(owner=owner, metadata=each["metadata"], spec=each["spec"])
        elif "template" in each.get("spec", {}):
            template = each["spec"]["template"]
            yield Pod(owner=owner, metadata=template["metadata"], spec=template["spec"])


def pod_of(objects: Sequence[Object], component: str) -> Pod:
    """The pod of one role."""
    (found,) = [pod for pod in pods(objects) if pod.component == component]
    return found


def config_json(objects: Sequence[Object], name: str = "impala") -> Object:
    """The configuration in the ConfigMap, as any JSON reader sees it."""
    values = json.loads(find(objects, "ConfigMap", name)["data"]["config.json"])
    assert isinstance(values, dict)
    return values
