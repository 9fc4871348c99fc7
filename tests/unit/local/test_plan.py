"""What is started: command lines that the pods understand, ports, targets, sockets."""

import json
import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from services import config as configuration
from services.config import RunConfig
from services.local.plan import (
    PodSpec,
    plan_pods,
    pod_command,
    pod_names,
    private_socket_dir,
    reserved_ports,
    write_targets,
)
from services.local.run_dir import open_run_dir
from services.ops.cores import num_cores


def plan(config: RunConfig, environment: dict[str, str]) -> dict[str, PodSpec]:
    def command(role: str, flags: Sequence[str]) -> list[str]:
        return [role, *flags]

    ports = range(9400, 9400 + len(pod_names(config)))
    pods = plan_pods(config, ports, Path("/tmp/x"), environment, command)
    return {pod.name: pod for pod in pods}


def test_every_pod_gets_flags_that_the_configuration_understands(config: RunConfig) -> None:
    config = config.model_copy(update={"actors": 2, "learners": 2})
    with open_run_dir(config, resume=False):
        pods = plan(config, {})
    assert list(pods) == ["paramserver", "learner-0", "learner-1", "actor-0", "actor-1"]
    for name, pod in pods.items():
        role, *flags = pod.command
        assert role == pod.role
        given = dict(zip(flags[::2], flags[1::2], strict=True))
        assert given.pop("--parent-pid") == str(os.getpid())
        file = Path(given.pop("--config"))
        if role != "paramserver":
            assert given.pop(f"--{role}-id") == name
        understood = configuration.load(file, {}, [word for pair in given.items() for word in pair])
        assert understood.ops.port == pod.port
        assert understood.ops.host == "127.0.0.1"
        if role == "learner":
            assert understood.wire.learner_bind == f"ipc:///tmp/x/{name}"
            assert understood.wire.learner_host == "127.0.0.1"
        assert understood.wire.paramserver_endpoint == understood.wire.paramserver_bind
        assert understood.wire.paramserver_bind == "ipc:///tmp/x/paramserver"
        assert understood.total_steps == config.total_steps


def test_threads_are_set_for_each_role_and_configuration_variables_are_not_inherited() -> None:
    config = configuration.load(flags=["--learner.num_threads", "4", "--actor.inference_threads", "2"])
    pods = plan(config, {"PATH": "/bin", "IMPALA__SEED": "3", "OMP_NUM_THREADS": "64"})
    threads = {name: pod.environment["OMP_NUM_THREADS"] for name, pod in pods.items()}
    assert threads == {"paramserver": "1", "learner-0": "4", "actor-0": "2"}
    assert pods["learner-0"].environment["MKL_NUM_THREADS"] == "4"
    assert pods["learner-0"].environment["PATH"] == "/bin"
    assert "IMPALA__SEED" not in pods["learner-0"].environment


@pytest.mark.parametrize(("network", "threads"), [("nature", "1"), ("deep", str(num_cores(4)))])
def test_a_learner_of_the_deep_network_takes_more_cores_unless_it_is_told_how_many(
    network: str, threads: str
) -> None:
    for flags, expected in (([], threads), (["--learner.num_threads", "3"], "3")):
        pods = plan(configuration.load(flags=["--network", network, *flags]), {})
        assert pods["learner-0"].environment["OMP_NUM_THREADS"] == expected


@pytest.mark.parametrize(("cores", "learners", "threads"), [(16, 2, 4), (4, 2, 2), (3, 2, 1), (2, 3, 1)])
def test_several_learners_of_the_deep_network_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, learners: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    pods = plan(configuration.load(flags=["--network", "deep", "--learners", str(learners)]), {})
    assert [pods[f"learner-{number}"].environment["OMP_NUM_THREADS"] for number in range(learners)] == [
        str(threads)
    ] * learners


def test_prometheus_finds_every_pod(config: RunConfig, tmp_path: Path) -> None:
    write_targets(tmp_path / "targets.json", plan(config, {}).values())
    assert json.loads((tmp_path / "targets.json").read_text()) == [
        {"targets": ["127.0.0.1:9400"], "labels": {"role": "paramserver", "pod": "paramserver"}},
        {"targets": ["127.0.0.1:9401"], "labels": {"role": "learner", "pod": "learner-0"}},
        {"targets": ["127.0.0.1:9402"], "labels": {"role": "actor", "pod": "actor-0"}},
    ]


def test_reserved_ports_skip_those_in_use_and_let_a_pod_listen() -> None:
    with reserved_ports(0, 1) as [first], reserved_ports(first, 3) as others:
        assert first not in others
        assert len(set(others)) == 3
        with socket.socket() as pod:
            pod.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as http.server does
            pod.bind(("127.0.0.1", first))
            pod.listen()


def test_sockets_live_in_a_private_directory_with_a_short_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with private_socket_dir() as path:
        assert len(str(path / "paramserver")) < 100
        assert path.stat().st_mode & 0o077 == 0
    assert not path.exists()


def test_a_folder_called_services_where_the_user_is_does_not_pass_for_ours(tmp_path: Path) -> None:
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    pod = subprocess.run(
        pod_command("paramserver", ["--help"]),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(configuration.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (pod.returncode, pod.stderr) == (0, "")
    assert pod.stdout.startswith("usage: impala paramserver")
