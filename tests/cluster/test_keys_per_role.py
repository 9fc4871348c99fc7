"""A key pair for each role, made by `impala keygen`: it trains, and no pod holds another role's secret."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.cluster.kube import Namespace, run
from tests.cluster.release import Release

pytestmark = pytest.mark.cluster

SECRET = "impala-pairs-of-keys"
MOUNTED = {
    "actor": {"actor.secret", "learner.public", "paramserver.public"},
    "learner": {"learner.secret", "actor.public", "paramserver.public"},
    "paramserver": {"paramserver.secret", "actor.public", "learner.public", "evaluator.public"},
    "evaluator": {"evaluator.secret", "paramserver.public"},
}


@pytest.fixture(scope="module")
def release(namespace: Namespace) -> Iterator[Release]:
    made = run([sys.executable, "-m", "services.cli", "keygen", "--secret", SECRET])
    assert made.returncode == 0, made.stderr
    namespace.kubectl("apply", "--filename=-", stdin=made.stdout)
    release = Release(namespace, "impala-pairs")
    release.install("actors=1", "evaluator.enabled=true", f"security.perRole.existingSecret={SECRET}")
    release.await_ready(actor=1, evaluator=1)
    yield release
    release.uninstall()
    release.await_gone()


def test_a_release_with_a_key_pair_for_each_role_trains(release: Release) -> None:
    release.await_seats(1)
    release.await_steps(above=release.await_steps(above=0))


@pytest.mark.parametrize("role", list(MOUNTED))
def test_a_pod_holds_its_own_secret_and_nobody_elses(release: Release, role: str) -> None:
    listing = "import os; print(*(name for name in os.listdir('/etc/impala-keys') if name[0] != '.'))"

    files = set(release.namespace.python(release.pod(role).name, listing).split())

    assert files == MOUNTED[role]
    assert {name for name in files if name.endswith(".secret")} == {f"{role}.secret"}
