"""`helm install impala ./helm --set actors=8` and nothing else: from the first pod to a policy that plays.

The tests build on each other in their order: they look at one installation at ever later times.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.cluster.conftest import Figures
from tests.cluster.kube import Namespace
from tests.cluster.release import CATCH_RETURN, HELM_TEST_S, MEMORY, READY_S, STEPS, UPDATES, Release

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ACTORS = 8
SOLVED = 0.9
SOLVED_S = 240.0


@dataclass(frozen=True)
class Installed:
    """A release, and when it was asked for."""

    release: Release
    began_s: float

    def age_s(self) -> str:
        return f"{time.monotonic() - self.began_s:.1f} s"


@pytest.fixture(scope="module")
def installed(namespace: Namespace) -> Iterator[Installed]:
    began_s = time.monotonic()
    release = Release(namespace, "impala-default")
    release.install(f"actors={ACTORS}")
    yield Installed(release, began_s)
    release.uninstall()
    release.await_gone()


def test_every_pod_becomes_ready_and_training_begins(installed: Installed, figures: Figures) -> None:
    release = installed.release
    ages: dict[str, str] = {}

    def ready_and_training() -> bool:
        if release.ready(actor=ACTORS):
            ages.setdefault("all pods are ready", installed.age_s())
        if release.metrics("learner").get(UPDATES, 0) > 0:
            ages.setdefault("the first update", installed.age_s())
        return len(ages) == 2

    release.namespace.until(ready_and_training, f"{ACTORS} actors are ready, and trained with", READY_S)

    for what, age in ages.items():
        figures.note(f"helm install of {ACTORS} actors until {what}", age)
    release.await_seats(ACTORS)
    release.await_steps(above=release.steps() or 0)


def test_catch_is_solved(installed: Installed, figures: Figures) -> None:
    release = installed.release

    def solved() -> bool:
        return release.metrics("learner").get(CATCH_RETURN, -1.0) >= SOLVED

    release.namespace.until(solved, f"a mean return of {SOLVED} on catch", SOLVED_S)

    figures.note(f"helm install until a mean return of {SOLVED} on catch", installed.age_s())
    figures.note("... after so many agent steps, at most", f"{release.answer('learner')[STEPS]:,.0f}")


def test_helm_test_passes(installed: Installed) -> None:
    output = installed.release.helm("test", "--logs", timeout_s=HELM_TEST_S)

    assert output.count("Phase:          Succeeded") >= 2, output


def test_a_checkpoint_lies_on_the_claim(installed: Installed) -> None:
    release = installed.release
    directory = f"/data/{release.name}/checkpoints"

    def checkpoints() -> list[str]:
        listing = "import os, sys; print(*os.listdir(sys.argv[1]) if os.path.isdir(sys.argv[1]) else [])"
        return release.namespace.kubectl(
            "exec", f"{release.name}-learner-0", "--", "python", "-c", listing, directory
        ).split()

    release.namespace.until(
        lambda: [name for name in checkpoints() if name.endswith(".pt")], "a checkpoint", timeout_s=90
    )
    [claim] = release.namespace.get("pvc", f"--selector=app.kubernetes.io/instance={release.name}")
    assert claim["status"]["phase"] == "Bound"
    used_by = "--output=jsonpath={.spec.volumes[*].persistentVolumeClaim.claimName}"
    mounted = release.namespace.kubectl("get", "pod", f"{release.name}-learner-0", used_by)
    assert mounted == claim["metadata"]["name"]


def test_memory_of_every_role_is_below_its_request(installed: Installed, figures: Figures) -> None:
    release = installed.release
    for role in ("learner", "paramserver", "actor"):
        pods = release.pods(role)
        used = max(release.namespace.answer(pod.name)[MEMORY] for pod in pods) / 2**20
        figures.note(f"resident memory of the {role} (of all of them, the most)", f"{used:.0f} MiB")

        requested = release.namespace.kubectl(
            "get", "pod", pods[0].name, "--output=jsonpath={.spec.containers[0].resources.requests.memory}"
        )
        assert used < float(requested.removesuffix("Mi"))


def test_all_this_went_without_a_restart(installed: Installed) -> None:
    assert all(pod.restarts == 0 for pod in installed.release.pods())
