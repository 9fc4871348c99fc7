"""The chart's own keys: strangers inside the cluster are refused and counted, and upgrades keep the keys."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import zmq

from services.wire.keys import Role, public_of, secret_of
from tests.cluster import strangers
from tests.cluster.release import Progress, Release

pytestmark = pytest.mark.cluster

UNKNOWN_KEY = 'impala_auth_failures_total{reason="unknown_key"}'
HANDSHAKE = 'impala_auth_failures_total{reason="handshake"}'
SERVERS: dict[Role, str] = {"learner": "5555", "paramserver": "5556"}
LONGEST_PAUSE_S = 10.0


def literally(argument: str) -> str:
    """For a container's command, in which Kubernetes replaces ``$(NAME)`` and makes one dollar of two."""
    return argument.replace("$", "$$")


def attempt_all(release: Release, attempts: list[dict[str, str]]) -> dict[str, str]:
    """Runs strangers.py in a pod that network policies let through, as they do `helm test`."""
    name = f"{release.name}-strangers"
    container = {
        "name": "strangers",
        "image": release.pod("actor").image,
        "resources": {"requests": {"cpu": "100m"}},
        "command": [
            "python",
            "-c",
            literally(Path(strangers.__file__).read_text()),
            literally(json.dumps(attempts)),
        ],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "labels": {
                "app.kubernetes.io/name": "impala",
                "app.kubernetes.io/instance": release.name,
                "app.kubernetes.io/component": "test",
            },
        },
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
        },
    }
    namespace = release.namespace
    namespace.kubectl("create", "--filename=-", stdin=json.dumps(pod))
    try:

        def ended() -> str | None:
            [phase] = [pod.phase for pod in namespace.pods() if pod.name == name]
            return phase if phase in ("Succeeded", "Failed") else None

        assert namespace.until(ended, "the strangers have tried", 120) == "Succeeded", namespace.kubectl(
            "logs", name
        )
        results: dict[str, str] = json.loads(namespace.kubectl("logs", name))
        return results
    finally:
        namespace.kubectl("delete", "pod", name, "--grace-period=0", "--force")


def stranger_keys() -> dict[str, str]:
    """A pair that holds what Kubernetes would change: a key may have any of 85 characters."""
    while True:
        public, secret = (key.decode() for key in zmq.curve_keypair())
        if "$$" in secret:
            return {"public": public, "secret": secret}


def seed_of(release: Release) -> bytes:
    secret = release.namespace.kubectl(
        "get", "secret", f"{release.name}-keys", "--output=jsonpath={.data.seed}"
    )
    return base64.b64decode(secret)


def counts(release: Release, series: str) -> dict[str, float]:
    return {role: release.answer(role)[series] for role in SERVERS}


def counts_rose(before: dict[str, float], now: dict[str, float], by: int) -> bool:
    return all(now[role] >= before[role] + by for role in SERVERS)


def test_strangers_are_refused_and_counted_and_training_does_not_notice(release: Release) -> None:
    seed = seed_of(release)
    stranger = stranger_keys()
    attempts, expected = [], {}
    for role, port in SERVERS.items():
        server = public_of(secret_of(seed, role)).decode()
        endpoint = f"tcp://{release.name}-{role}:{port}"
        member = {
            "public": public_of(secret_of(seed, "actor")).decode(),
            "secret": secret_of(seed, "actor").decode(),
        }
        for name, attempt, outcome in (
            ("no key", {}, "refused"),
            ("a key that nobody knows", {"server": server, **stranger}, "refused"),
            ("keys of another installation", {"server": stranger["public"], **stranger}, "refused"),
            ("HTTP", {"raw": b"GET / HTTP/1.1\r\nHost: impala\r\n\r\n".hex()}, "refused"),
            ("noise", {"raw": bytes(range(200, 256)).hex()}, "refused"),
            ("an actor's key", {"server": server, **member}, "let in"),
        ):
            attempts.append({"name": f"{name}, at {role}", "endpoint": endpoint, **attempt})
            expected[f"{name}, at {role}"] = outcome
    unknown_keys, handshakes = counts(release, UNKNOWN_KEY), counts(release, HANDSHAKE)

    with Progress(release) as progress:
        results = attempt_all(release, attempts)

    assert results == expected
    release.namespace.until(
        lambda: counts_rose(unknown_keys, counts(release, UNKNOWN_KEY), by=1), "unknown keys are counted", 30
    )
    release.namespace.until(
        lambda: counts_rose(handshakes, counts(release, HANDSHAKE), by=4), "failed handshakes are counted", 30
    )
    assert progress.longest_standstill_s() < LONGEST_PAUSE_S
    assert release.answer("learner")['impala_learner_rollouts_total{result="invalid"}'] == 0
    assert all(pod.restarts == 0 for pod in release.pods())


def test_an_upgrade_keeps_the_seed_and_restarts_nobody(release: Release) -> None:
    seed, before = seed_of(release), {(pod.uid, pod.restarts) for pod in release.pods()}
    assert len(seed) >= 32

    release.upgrade()

    assert seed_of(release) == seed
    for kind in ("deployment", "statefulset"):
        for workload in release.namespace.get(kind, f"--selector=app.kubernetes.io/instance={release.name}"):
            release.namespace.kubectl(
                "rollout", "status", kind, workload["metadata"]["name"], "--timeout=60s"
            )
    assert {(pod.uid, pod.restarts) for pod in release.pods()} == before
