"""Hundreds of actors on nodes that only pretend to run them: what the control plane makes of the chart.

Skips where no node is labelled node-role=hollow. IMPALA_HOLLOW_ACTORS is how many actors, 256 without it.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.cluster.conftest import Figures
from tests.cluster.kube import Namespace, kubectl
from tests.cluster.release import Release

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

ACTORS = int(os.environ.get("IMPALA_HOLLOW_ACTORS", "256"))
RUNNING_S = 60 + ACTORS
"""An API server on two cores makes some ten pods a second."""
ON_HOLLOW_NODES = {
    "actor": {
        "nodeSelector": {"node-role": "hollow"},
        "tolerations": [{"key": "kubemark", "value": "hollow", "effect": "NoSchedule"}],
    }
}


@pytest.fixture(scope="module")
def release(namespace: Namespace) -> Iterator[Release]:
    release = Release(namespace, "impala-large")
    yield release
    release.uninstall()
    release.await_gone()


def test_all_actors_of_a_large_release_are_scheduled_and_run(release: Release, figures: Figures) -> None:
    nodes = json.loads(kubectl("get", "nodes", "--selector=node-role=hollow", "--output=json"))["items"]
    if not nodes:
        pytest.skip("this cluster has no hollow nodes (label node-role=hollow)")
    hollow = {node["metadata"]["name"] for node in nodes}

    began_s = time.monotonic()
    release.install(f"actors={ACTORS}", values=json.dumps(ON_HOLLOW_NODES))

    def running() -> bool:
        phases = Counter((pod.role, pod.phase) for pod in release.pods())
        return phases == Counter(
            {("actor", "Running"): ACTORS, ("learner", "Running"): 1, ("paramserver", "Running"): 1}
        )

    release.namespace.until(running, f"{ACTORS} actors run", RUNNING_S)
    figures.note(
        f"helm install of {ACTORS} actors on hollow nodes until all run",
        f"{time.monotonic() - began_s:.1f} s",
    )
    for pod in release.await_ready(actor=ACTORS):
        assert (pod.node in hollow) == (pod.role == "actor"), pod
