"""SIGTERM, as the kubelet sends it: a pod of any role, in any state, ends soon and with exit code 0."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.conftest import ACTORS, Figures
from tests.cluster.kube import End, Pod
from tests.cluster.release import READY_S, Release

pytestmark = pytest.mark.cluster

STOP_S = 10.0


def expect_a_clean(end: End) -> None:
    assert end.exit_code == 0
    assert end.seconds < STOP_S


@pytest.mark.parametrize("role", ["actor", "paramserver", "learner"])
def test_a_pod_at_work_ends_soon_and_well(release: Release, figures: Figures, role: str) -> None:
    end = release.namespace.terminate(release.pod(role))

    figures.note(f"{role}: from SIGTERM to the end", f"{end.seconds:.0f} s")
    expect_a_clean(end)


def new_actor(release: Release) -> Pod:
    """Replaces an actor; the new one as soon as its container runs."""
    known = {pod.uid for pod in release.pods("actor")}
    release.namespace.kubectl("delete", "pod", release.pod("actor").name, "--wait=false")

    def running() -> Pod | None:
        fresh = [pod for pod in release.pods("actor") if pod.uid not in known and pod.is_running]
        return fresh[0] if fresh else None

    return release.namespace.until(running, "a new actor runs", READY_S)


def test_an_actor_that_has_just_begun_ends_as_soon(release: Release, figures: Figures) -> None:
    end = release.namespace.terminate(new_actor(release))

    figures.note("an actor that has just begun: from SIGTERM to the end", f"{end.seconds:.0f} s")
    expect_a_clean(end)


@pytest.fixture
def nobody_has_weights(release: Release) -> Iterator[None]:
    """No parameter server, as after a node's loss."""
    paramserver = f"statefulset/{release.name}-paramserver"
    release.namespace.kubectl("scale", paramserver, "--replicas=0")
    release.namespace.until(lambda: not release.pods("paramserver"), "no parameter server", 60)
    yield
    release.namespace.kubectl("scale", paramserver, "--replicas=1")
    release.await_ready(actor=ACTORS)


@pytest.mark.usefixtures("nobody_has_weights")
def test_an_actor_that_waits_for_its_first_weights_ends_as_soon(release: Release) -> None:
    actor = new_actor(release)
    release.namespace.until(
        lambda: release.namespace.metrics(actor.name).get("impala_actor_weights_version") == -1,
        "an actor without weights",
        READY_S,
    )

    expect_a_clean(release.namespace.terminate(actor))
