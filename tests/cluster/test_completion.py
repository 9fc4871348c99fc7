"""A release that has trained enough says so, idles ready, and is still complete when it is installed anew."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.cluster.kube import Namespace, run
from tests.cluster.release import STEPS, Release

pytestmark = pytest.mark.cluster

TOTAL_STEPS = 100_000
ACTORS = 2
WAIT_S = 180


@pytest.fixture(scope="module")
def release(namespace: Namespace) -> Iterator[Release]:
    release = Release(namespace, "impala-short")
    release.install(f"actors={ACTORS}", f"config.total_steps={TOTAL_STEPS}")
    yield release
    release.uninstall()
    release.await_gone()


def wait(release: Release, timeout_s: float = WAIT_S) -> int:
    """The exit code of `impala wait`."""
    impala = [sys.executable, "-m", "services.cli", "wait", release.name]
    flags = ["--namespace", release.namespace.name, "--timeout", str(timeout_s)]
    return run([*impala, *flags], timeout_s=timeout_s + 30).returncode


def expect_complete(release: Release, steps: float) -> None:
    metrics = release.answer("learner")
    assert metrics["impala_training_complete"] == 1
    assert metrics[STEPS] >= steps
    assert all(pod.restarts == 0 for pod in release.await_ready(actor=ACTORS))


def test_wait_does_not_return_before_training_is_complete(release: Release) -> None:
    assert wait(release, timeout_s=0) == 1


def test_wait_returns_when_training_is_complete_and_all_pods_stay_ready(release: Release) -> None:
    assert wait(release) == 0

    expect_complete(release, TOTAL_STEPS)


def test_an_installation_on_the_kept_claim_is_complete_at_once(release: Release) -> None:
    trained = release.answer("learner")[STEPS]
    release.uninstall()
    release.await_gone()
    release.install(f"actors={ACTORS}", f"config.total_steps={TOTAL_STEPS}")

    assert wait(release) == 0

    expect_complete(release, TOTAL_STEPS)
    learner = release.answer("learner")
    assert learner[STEPS] == trained
    assert learner["impala_learner_updates_total"] == 0


def test_more_steps_are_trained_on_top_of_those_of_the_claim(release: Release) -> None:
    trained = release.answer("learner")[STEPS]
    release.upgrade(f"config.total_steps={2 * TOTAL_STEPS}")
    release.await_steps(above=trained, timeout_s=WAIT_S)

    assert wait(release) == 0

    learner = release.answer("learner")
    expect_complete(release, 2 * TOTAL_STEPS)
    assert learner["impala_learner_samples_total"] == learner[STEPS] - trained
