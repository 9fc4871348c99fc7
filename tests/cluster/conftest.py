"""A namespace of its own for each run of these tests, and in it one release that most of them share.

They skip without KUBECONFIG, in CI too, and need nothing else of the cluster than that it can run the images
of `make image`. What they measure is printed at the end. Files with a release of their own come first in
alphabetical order, so that the shared one, which trains all the time, does not take the processor from them.
"""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Generator, Iterator

import pytest

from tests.cluster.kube import KubectlError, Namespace, kubectl, run
from tests.cluster.release import Release
from tests.conftest import find_tool

ACTORS = 4
"""Of the shared release."""
LONG = "config.total_steps=2000000000"
"""Not complete before these tests are."""
SMALL = "actor.resources.requests.cpu=50m"
"""So that a dozen actors find room on two cores beside whatever else is there."""

FIGURES = pytest.StashKey[list[tuple[str, str]]]()


class Figures:
    """What was measured, in words: for the table at the end, and from there for helm/README.md."""

    def __init__(self, lines: list[tuple[str, str]]) -> None:
        self._lines = lines

    def note(self, what: str, value: str) -> None:
        self._lines.append((what, value))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash[FIGURES]
    if lines:
        terminalreporter.section("measured on this cluster")
    for what, value in lines:
        terminalreporter.write_line(f"{what:<70} {value:>12}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Of what failed: what the pods, their logs and the cluster's events have to say, before all is gone."""
    report = yield
    namespace = item.funcargs.get("namespace")
    if report.failed and isinstance(namespace, Namespace):
        try:
            found = namespace.diagnosis()
        except (KubectlError, subprocess.TimeoutExpired) as error:
            found = f"no diagnosis: {error}"
        report.sections.append((f"namespace {namespace.name}", found))
    return report


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Figures:
    return Figures(request.config.stash[FIGURES])


@pytest.fixture(scope="session")
def namespace() -> Iterator[Namespace]:
    """Fresh, and deleted with all that is in it at the end."""
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("KUBECONFIG names no cluster")
    find_tool("kubectl")
    find_tool("helm")
    namespace = Namespace(f"impala-test-{secrets.token_hex(3)}")
    kubectl("create", "namespace", namespace.name)
    yield namespace
    for name in run(["helm", "list", "--short", "--namespace", namespace.name]).stdout.split():
        run(["helm", "uninstall", name, "--namespace", namespace.name])
    kubectl("delete", "namespace", namespace.name, "--wait=false")


@pytest.fixture(scope="session")
def _shared(namespace: Namespace) -> Release:
    release = Release(namespace, "impala")
    release.install(f"actors={ACTORS}", LONG, SMALL)
    return release


@pytest.fixture
def release(_shared: Release) -> Release:
    """The shared one, which trains with ACTORS actors, all of them ready and seated, whatever came before."""
    if len(_shared.pods("actor")) != ACTORS:
        _shared.upgrade(f"actors={ACTORS}")
    _shared.await_ready(actor=ACTORS)
    _shared.await_seats(ACTORS)
    _shared.await_steps(above=_shared.steps() or 0)
    return _shared
