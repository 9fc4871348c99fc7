"""Runs and pods for tests, and their end however a test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from services.local.plan import private_socket_dir, reserved_ports
from tests.integration.system import CATCH, QUICK, Pod, Run

StartRun = Callable[..., Run]
StartPod = Callable[..., Pod]


@pytest.fixture
def start_run(tmp_path: Path) -> Iterator[StartRun]:
    """``start_run("--total_steps", "1000")``: a run in ``tmp_path/run``, or resumed from there.

    It is of Catch, unless ``--tasks`` says otherwise.
    """
    runs: list[Run] = []

    def start(*flags: str, resume: bool = False) -> Run:
        run_dir = tmp_path / "run"
        played = QUICK if "--tasks" in flags else CATCH
        begin = ["--resume", str(run_dir)] if resume else [*played, "--run_dir", str(run_dir)]
        log = tmp_path / f"launcher-{len(runs)}.log"
        runs.append(Run(run_dir, log, [*begin, "--ops.port", "0", *flags]))
        return runs[-1]

    yield start
    for run in runs:
        run.end()


@pytest.fixture
def start_pod(tmp_path: Path) -> Iterator[StartPod]:
    """``start_pod("learner", *flags)``: pods that find each other over sockets of their own."""
    pods: list[Pod] = []
    with ExitStack() as held:
        sockets = held.enter_context(private_socket_dir())
        ports = held.enter_context(reserved_ports(0, 10))
        wire = ["--run_dir", str(tmp_path / "run")]
        for key, name in {
            "learner_bind": "learner",
            "paramserver_bind": "paramserver",
            "paramserver_endpoint": "paramserver",
        }.items():
            wire += [f"--wire.{key}", f"ipc://{sockets}/{name}"]

        def start(role: str, *flags: str) -> Pod:
            log = tmp_path / f"{role}-{len(pods)}.log"
            pods.append(Pod(role, ports[len(pods)], [*CATCH, *wire, *flags], log))
            return pods[-1]

        yield start
        for pod in pods:
            pod.end()
