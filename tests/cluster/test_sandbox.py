"""What a process in one of our pods could do if it wanted to: looked at from inside, in each role's pod."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from tests.cluster.release import Release

pytestmark = pytest.mark.cluster

LOOK = """
import json, os, pathlib, sys, services

MOUNTED = ["/etc/impala", "/etc/impala-keys"]
CODE = os.path.dirname(services.__file__)

def can_write(directory):
    try:
        path = pathlib.Path(directory, "written-by-a-test")
        path.write_text("x")
        path.unlink()
        return True
    except OSError as error:
        return error.strerror

status = dict(line.split(":", 1) for line in open("/proc/1/status").read().splitlines())
environment = pathlib.Path("/proc/1/environ").read_bytes().decode().split("\\0")
print(json.dumps({
    "uids": status["Uid"].split(),
    "gids": status["Gid"].split(),
    "capabilities": [status[each].strip() for each in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")],
    "no_new_privs": status["NoNewPrivs"].strip(),
    "seccomp": status["Seccomp"].strip(),
    "can_write": {where: can_write(where) for where in ("/", "/etc", "/tmp", *MOUNTED, CODE)},
    "has_token": os.path.exists("/var/run/secrets/kubernetes.io"),
    # where the API server is, Kubernetes tells everybody
    "services": [each for each in environment if "_PORT" in each and not each.startswith("KUBERNETES_")],
}))
"""
SECCOMP_FILTER = "2"
ROLES = ["actor", "paramserver", "learner"]


@dataclass(frozen=True, kw_only=True)
class Inside:
    """What LOOK finds."""

    uids: list[str]
    gids: list[str]
    capabilities: list[str]
    no_new_privs: str
    seccomp: str
    can_write: dict[str, bool | str]
    """True, or why not."""
    has_token: bool
    services: list[str]


@pytest.fixture(scope="module")
def _found() -> dict[str, Inside]:
    return {}


@pytest.fixture(params=ROLES)
def inside(request: pytest.FixtureRequest, release: Release, _found: dict[str, Inside]) -> Inside:
    """A pod of each role."""
    role = request.param
    if role not in _found:
        _found[role] = Inside(**json.loads(release.namespace.python(release.pod(role).name, LOOK)))
    return _found[role]


def test_a_pod_runs_as_nobody_special(inside: Inside) -> None:
    assert inside.uids == ["10001"] * 4
    assert inside.gids == ["10001"] * 4


def test_a_pod_has_no_capabilities_and_cannot_gain_any(inside: Inside) -> None:
    assert {int(mask, 16) for mask in inside.capabilities} == {0}
    assert inside.no_new_privs == "1"
    assert inside.seccomp == SECCOMP_FILTER


def test_a_pod_writes_to_its_own_scratch_space_only(inside: Inside) -> None:
    writable = {where for where, answer in inside.can_write.items() if answer is True}
    assert writable == {"/tmp"}
    assert {inside.can_write[where] for where in inside.can_write.keys() - writable} == {
        "Read-only file system"
    }


def test_a_pod_knows_nothing_of_the_cluster(inside: Inside) -> None:
    assert not inside.has_token
    assert inside.services == []
