"""Every way to be stopped, asked for or not: what is left behind is whole, and nobody lives on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.learner.checkpoint import read
from tests.conftest import RequireTool
from tests.integration.conftest import StartPod, StartRun
from tests.integration.system import START_S, STEPS_PER_UPDATE, Pod, get
from tests.unit.learner.waiting import until

pytestmark = pytest.mark.integration

STOP_S = 10.0
GOODBYE_S = 15.0
"""Half of a lease, with which the seat would come back without a goodbye."""


def stops(pod: Pod) -> None:
    """SIGTERM ends it in time and without complaint."""
    pod.terminate()
    assert pod.exit_code(STOP_S) == 0, pod.log()
    assert not [line for line in pod.log().splitlines() if " error " in line], pod.log()


def test_each_pod_of_a_running_system_stops_alone_and_only_learners_load_torch(start_pod: StartPod) -> None:
    paramserver, learner, actor = (start_pod(role) for role in ("paramserver", "learner", "actor"))
    until(lambda: learner.value("learner_updates_total") > 10, "training", START_S)
    assert all(pod.ready() for pod in (paramserver, learner, actor))
    torch_free, with_torch = (Path(f"/proc/{pod.pid}/maps").read_text() for pod in (paramserver, learner))
    assert "libtorch" not in torch_free
    assert "libtorch" in with_torch

    stops(actor)  # in the middle of an unroll
    until(lambda: paramserver.value("paramserver_seats") == 0, "it has given its seat back", GOODBYE_S)
    stops(learner)  # with nobody left to send it anything
    assert read_newest(learner, paramserver) > 0
    stops(paramserver)


def read_newest(learner: Pod, paramserver: Pod) -> int:
    """Steps of the learner's last checkpoint; the parameter server may be a little behind."""
    saved = learner.lines("checkpoint_written")[-1]
    path = Path(saved.partition("path=")[2].partition(" ")[0])
    trainer = read(path).trainer
    assert trainer["version"] >= paramserver.value("paramserver_version") > 0
    return int(trainer["steps"])


def test_an_actor_that_waits_for_its_first_weights_is_alive_and_unready_and_stops(
    start_pod: StartPod,
) -> None:
    alone = start_pod("actor", "--actor-id", "alone")
    until(lambda: alone.lines("no_news"), "it misses the parameter server", START_S)
    assert get(alone.port, "/healthz")[0] == 200
    assert get(alone.port, "/readyz") == (503, "parameter server not reachable\n")

    paramserver = start_pod("paramserver")
    until(lambda: paramserver.value("paramserver_seats") == 1, "it has a seat", START_S)
    until(lambda: "no weights" in get(alone.port, "/readyz")[1], "it misses the weights")
    assert get(alone.port, "/readyz") == (503, "no weights have been published yet\n")
    stops(alone)
    until(lambda: paramserver.value("paramserver_seats") == 0, "it has given its seat back", GOODBYE_S)


def test_an_actor_that_waits_for_a_learner_stops(start_pod: StartPod) -> None:
    start_pod("paramserver")
    learner = start_pod("learner")
    actor = start_pod("actor")
    until(lambda: actor.value("actor_rollouts_sent_total") > 0, "rollouts", START_S)
    learner.popen.kill()
    learner.popen.wait()
    sent, since_s = -1.0, time.monotonic()

    def blocked() -> bool:
        nonlocal sent, since_s
        now = actor.value("actor_rollouts_sent_total")
        if now != sent:
            sent, since_s = now, time.monotonic()
        return time.monotonic() - since_s > 0.5

    until(blocked, "the actor is held back")
    assert actor.ready()
    stops(actor)


def test_a_learner_that_waits_for_rollouts_stops_and_saves_its_state(start_pod: StartPod) -> None:
    start_pod("paramserver")
    learner = start_pod("learner")
    until(learner.ready, "it is in a group", START_S)
    assert learner.value("learner_world_size") == 1
    stops(learner)
    assert learner.lines("checkpoint_written")


def test_a_learner_that_waits_for_the_parameter_server_is_alive_and_unready_and_stops(
    start_pod: StartPod,
) -> None:
    learner = start_pod("learner")
    until(lambda: learner.value("learner_policy_version") == 0, "it is up", START_S)
    unready = (503, "parameter server not reachable\n")
    until(lambda: get(learner.port, "/readyz") == unready, "it misses the parameter server", START_S)
    until(lambda: get(learner.port, "/healthz")[0] == 200, "it is alive", START_S)
    stops(learner)
    assert not learner.lines("checkpoint_written"), "it has done nothing that is worth saving"


def test_pods_whose_launcher_is_killed_go_away_by_themselves_and_leave_a_run_that_resumes(
    start_run: StartRun,
) -> None:
    run = start_run("--total_steps", "1000000000")
    steps = run.train_until(10 * STEPS_PER_UPDATE)
    pods = run.pids()
    assert len(pods) == 3
    killed_s = time.monotonic()
    os.kill(run.pid, signal.SIGKILL)
    run.popen.wait()
    until(lambda: not run.pids(), "no pod is left", STOP_S)
    assert time.monotonic() - killed_s < STOP_S
    assert read(run.checkpoints()[-1]).trainer["steps"] >= steps
    resumed = start_run(resume=True)
    resumed.train_until(steps + 10 * STEPS_PER_UPDATE)
    resumed.interrupt()
    assert resumed.exit_code(3 * STOP_S) == 0, "of all pods, one role after the other"


def catches_sigterm(pid: int) -> bool:
    """Whether a process has a handler for it by now, as the kernel knows."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("role", ["paramserver", "learner", "actor"])
def test_a_pod_that_is_stopped_while_it_still_starts_ends_cleanly(start_pod: StartPod, role: str) -> None:
    pod = start_pod(role)
    until(lambda: catches_sigterm(pod.pid), "it has a handler", START_S)
    pod.terminate()  # torch is being imported, nothing is built yet
    assert pod.exit_code(STOP_S) == 0, pod.log()
    assert not [line for line in pod.log().splitlines() if " error " in line], pod.log()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root, for a process 1 of its own")
def test_a_containers_first_process_obeys_before_it_knows_its_configuration(
    tmp_path: Path, require_tool: RequireTool
) -> None:
    fifo = tmp_path / "config.json"
    os.mkfifo(fifo)
    words = [str(require_tool("unshare")), "--pid", "--fork", "--kill-child", sys.executable]
    container = subprocess.Popen([*words, "-m", "services.cli", "actor", "--config", str(fifo)])
    try:
        with fifo.open("wb"):  # once it reads there, and waits for more
            (first,) = Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split()
            os.kill(int(first), signal.SIGTERM)
            assert container.wait(10) == 0
    finally:
        container.kill()
