"""The launcher, with small fake pods as real processes.

Fake pods serve real metrics and write what they do as lines into a pipe that the test reads. A test therefore
waits for lines, never for time; reading ends (with "") when no pod is left, however it died.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import pytest

from services import config as configuration
from services import local
from services.config import ConfigError, RunConfig
from services.local import Backoff, Command, Launcher, Outcome, Pod, PodSpec
from services.ops.figures import RunInfo, Snapshot
from services.ops.scrape import Scraper

PATIENCE_S = 60.0

StartLauncher = Callable[[], subprocess.Popen[str]]

FAKE_POD = '''
"""usage: fake_pod.py ROLE BEHAVIOUR PIPE --flags"""
import os, signal, sys
from pathlib import Path

role, behaviour, pipe, *flags = sys.argv[1:]
flags = dict(zip(flags[::2], flags[1::2]))
name = flags.get(f"--{role}-id", role)
report = os.open(pipe, os.O_WRONLY)

def say(word):
    os.write(report, f"{name} {word}\\n".encode())

def first_life():
    marker = Path(flags["--run_dir"], f"{name}-has-lived")
    first = not marker.exists()
    marker.touch()
    return first

if behaviour.startswith("exit-"):
    print("2026-11-20T14:02:36.123Z error learner diverged reason=nan")
    print("the very last line", flush=True)
    sys.exit(int(behaviour[5:]))
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if behaviour == "die-once" and first_life():
    sys.exit(1)

from prometheus_client import CollectorRegistry
from services.ops import logging
from services.ops.health import Heartbeat, HealthServer
from services.ops.lifecycle import Lifecycle
from services.ops.metrics import ROLES

logging.setup(role)
life = Lifecycle()
if behaviour != "stubborn":
    life.install_signals()
if behaviour != "orphan":
    life.watch_parent(int(flags["--parent-pid"]))
registry = CollectorRegistry()
metrics = ROLES[role](registry)
if behaviour == "complete":
    metrics.steps.set(1000)
    metrics.training_complete.set(1)
server = HealthServer(flags["--ops.host"], int(flags["--ops.port"]), registry, Heartbeat(), 60, lambda: None)
say("up")
if behaviour == "stubborn":
    signal.pause()
life.stopping.wait()
say("stopped")
sys.exit(int(behaviour[5:]) if behaviour.startswith("fail-") else 0)
'''


class Pods:
    """The command line of fake pods, each role with a behaviour, and what they say."""

    def __init__(self, directory: Path) -> None:
        self.script = directory / "fake_pod.py"
        self.script.write_text(FAKE_POD)
        self.pipe = directory / "pipe"
        os.mkfifo(self.pipe)
        self.reader = os.fdopen(os.open(self.pipe, os.O_RDONLY | os.O_NONBLOCK), "r")
        self.placeholder = os.open(self.pipe, os.O_WRONLY)  # until pods are there, reading shall wait
        os.set_blocking(self.reader.fileno(), True)
        self.behaviours = {"paramserver": "serve", "learner": "serve", "actor": "serve"}

    def command(self, role: str, flags: Sequence[str]) -> list[str]:
        return [sys.executable, str(self.script), role, self.behaviours[role], str(self.pipe), *flags]

    def read(self, lines: int) -> list[str]:
        return [self.reader.readline().strip() for _ in range(lines)]

    def rest(self) -> list[str]:
        """Everything that is still said until the last pod is gone."""
        os.close(self.placeholder)
        return self.reader.read().splitlines()


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[Pods]:
    pods = Pods(tmp_path)
    yield pods
    pods.reader.close()


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return configuration.load(
        flags=[
            "--env",
            "catch",
            "--total_steps",
            "1000",
            "--ops.port",
            "0",
            "--run_dir",
            str(tmp_path / "run"),
        ]
    )


class FakeProgress:
    """Remembers what it is shown, and may act on it."""

    interval_s = 0.0

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []
        self.snapshots: list[Snapshot] = []
        self.on_update: Callable[[Snapshot], None] = lambda snapshot: None
        self.on_event: Callable[[str], None] = lambda name: None

    def update(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)
        self.on_update(snapshot)

    def event(self, name: str, **fields: object) -> None:
        self.events.append((name, fields))
        self.on_event(name)

    trouble = event

    def close(self) -> None:
        pass


def train(config: RunConfig, command: Command, resume: bool = False) -> int:
    return local.train(config, resume=resume, plain=True, command=command, find_frame_skip=lambda config: 1)


def launch(config: RunConfig, pods: Pods, progress: FakeProgress, when_all_up: str = "interrupt") -> Outcome:
    """Launch until all pods are up, then interrupt."""
    with (
        local.open_run_dir(config, resume=False) as lock,
        local.reserved_ports(0, 2 + config.actors) as ports,
    ):
        specs = local.plan_pods(config, ports, Path("/nowhere"), os.environ, pods.command)
        scraper = Scraper({spec.name: spec.port for spec in specs}, 0.05)
        run = RunInfo(env_id="catch", total_steps=1000, frame_skip=1, run_dir=config.run_dir)
        launcher = Launcher([Pod(spec, lock) for spec in specs], run, progress, scraper.latest)
        interrupted = False

        def interrupt_once(snapshot: Snapshot) -> None:
            nonlocal interrupted
            if not interrupted and all(pod.phase == "up" for pod in snapshot.pods):
                interrupted = True
                launcher.interrupt()

        progress.on_update = interrupt_once
        if when_all_up == "interrupt twice":
            progress.on_event = lambda name: launcher.interrupt() if name == "stopping" else None
        outcome = launcher.run()
        scraper.close()
        return outcome


# ------------------------------------------------------------------------------------------- endings


def test_a_run_ends_when_the_learner_says_complete(
    config: RunConfig, pods: Pods, capsys: pytest.CaptureFixture[str]
) -> None:
    pods.behaviours["learner"] = "complete"
    assert train(config, pods.command) == 0
    assert sorted(pods.rest()[:3]) == ["actor-0 up", "learner up", "paramserver up"]
    output = capsys.readouterr().out
    assert "complete at 1,000 of 1,000 steps" in output
    assert f"impala train --resume {config.run_dir} --total_steps 2000" in output


def test_an_interrupt_stops_actors_then_learner_then_parameter_server(config: RunConfig, pods: Pods) -> None:
    config = config.model_copy(update={"actors": 2})
    progress = FakeProgress()
    assert launch(config, pods, progress) == Outcome(exit_code=0, reason="interrupted")
    lines = pods.rest()
    assert sorted(lines[:4]) == ["actor-0 up", "actor-1 up", "learner up", "paramserver up"]
    assert sorted(lines[4:6]) == ["actor-0 stopped", "actor-1 stopped"]
    assert lines[6:] == ["learner stopped", "paramserver stopped"]
    assert [pod.phase for pod in progress.snapshots[-1].pods] == ["stopped"] * 4


def test_a_second_interrupt_kills_pods_that_do_not_stop(config: RunConfig, pods: Pods) -> None:
    pods.behaviours = dict.fromkeys(pods.behaviours, "stubborn")
    outcome = launch(config, pods, FakeProgress(), when_all_up="interrupt twice")
    assert outcome == Outcome(exit_code=130, reason="killed")
    assert sorted(pods.rest()) == ["actor-0 up", "learner up", "paramserver up"]


def test_a_pod_that_does_not_stop_in_time_is_killed_and_a_learner_that_does_not_is_a_failure(
    config: RunConfig, pods: Pods, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "STOP_TIMEOUTS_S", {"actor": 0.1, "learner": 0.1, "paramserver": 60.0})
    pods.behaviours |= {"actor": "stubborn", "learner": "stubborn"}
    progress = FakeProgress()
    outcome = launch(config, pods, progress)
    assert outcome.exit_code == 1
    assert "learner did not stop cleanly" in outcome.reason
    assert [fields["pod"] for name, fields in progress.events if name == "pod_killed"] == [
        "actor-0",
        "learner",
    ]
    assert pods.rest()[-1] == "paramserver stopped"


def test_a_learner_that_fails_to_save_is_a_failure(config: RunConfig, pods: Pods) -> None:
    pods.behaviours["learner"] = "fail-1"
    assert launch(config, pods, FakeProgress()).exit_code == 1


def test_a_bad_configuration_stops_the_run_and_shows_the_line_and_leaves_the_directory_free(
    config: RunConfig, pods: Pods, capsys: pytest.CaptureFixture[str]
) -> None:
    pods.behaviours["learner"] = "exit-2"
    assert train(config, pods.command) == 2
    errors = capsys.readouterr().err
    assert "learner refused its configuration" in errors
    assert "error learner diverged reason=nan" in errors, "the last error, rather than the last line"
    assert str(config.run_dir / "logs" / "learner.log") in errors

    pods.behaviours["learner"] = "complete"
    assert train(config, pods.command) == 0


def test_a_learner_that_gives_up_is_not_restarted(
    config: RunConfig, pods: Pods, capsys: pytest.CaptureFixture[str]
) -> None:
    pods.behaviours["learner"] = "exit-3"
    assert train(config, pods.command) == 1
    captured = capsys.readouterr()
    assert "learner gave up" in captured.err
    assert "diverged reason=nan" in captured.err
    assert f"--resume {config.run_dir}" in captured.out


def test_a_pod_that_died_is_started_again_and_counted(config: RunConfig, pods: Pods) -> None:
    pods.behaviours["actor"] = "die-once"
    progress = FakeProgress()
    assert launch(config, pods, progress).exit_code == 0
    [(name, fields)] = [event for event in progress.events if event[0] == "pod_died"]
    assert (name, fields["pod"], fields["exit_code"], fields["restart_in_s"]) == (
        "pod_died",
        "actor-0",
        1,
        0.2,
    )
    assert {pod.name: pod.restarts for pod in progress.snapshots[-1].pods}["actor-0"] == 1
    assert any(pod.phase == "restarting" for snapshot in progress.snapshots for pod in snapshot.pods)


def test_a_pod_that_dies_again_and_again_ends_the_run_and_the_learner_still_saves(
    config: RunConfig, pods: Pods, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backoff, "FIRST_S", 0.0)
    pods.behaviours["actor"] = "exit-1"
    outcome = launch(config, pods, FakeProgress())
    assert outcome.exit_code == 1
    assert outcome.reason == "actor-0 died 5 times within 60 s"
    assert outcome.details[0].endswith("diverged reason=nan")


# ------------------------------------------------------------------------------------------- signals


@pytest.fixture
def start_launcher(config: RunConfig, pods: Pods, tmp_path: Path) -> Iterator[StartLauncher]:
    """A launcher that is a process of its own, to be sent signals."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        program = f"""
            import sys
            from pathlib import Path
            from services import config, local
            behaviours = {pods.behaviours!r}
            sys.exit(local.train(
                config.load(Path({str(tmp_path / "config.json")!r})),
                plain=True,
                command=lambda role, flags: [
                    sys.executable, {str(pods.script)!r}, role, behaviours[role], {str(pods.pipe)!r}, *flags
                ],
                find_frame_skip=lambda config: 1,
            ))
        """
        (tmp_path / "config.json").write_text(json.dumps(configuration.dump(config)))
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(tmp_path)},  # a killed launcher leaves its sockets behind
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_signal_stops_cleanly_and_says_how_to_go_on(
    config: RunConfig,
    pods: Pods,
    start_launcher: StartLauncher,
    number: signal.Signals,
) -> None:
    launcher = start_launcher()
    assert sorted(pods.read(3)) == ["actor-0 up", "learner up", "paramserver up"]
    launcher.send_signal(number)
    output, _ = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 0
    assert f"continue with: impala train --resume {config.run_dir}\n" in output
    assert pods.rest() == ["actor-0 stopped", "learner stopped", "paramserver stopped"]


def test_two_interrupts_end_everything_with_130(pods: Pods, start_launcher: StartLauncher) -> None:
    pods.behaviours = dict.fromkeys(pods.behaviours, "stubborn")
    launcher = start_launcher()
    pods.read(3)
    launcher.send_signal(signal.SIGINT)
    assert launcher.stdout is not None
    assert any(" stopping " in line for line in iter(launcher.stdout.readline, ""))
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 130
    assert pods.rest() == []


def test_pods_of_a_killed_launcher_stop_by_themselves(pods: Pods, start_launcher: StartLauncher) -> None:
    launcher = start_launcher()
    pods.read(3)
    launcher.kill()
    assert sorted(pods.rest()) == ["actor-0 stopped", "learner stopped", "paramserver stopped"]


def test_a_run_directory_stays_locked_until_the_pods_of_a_killed_launcher_are_gone(
    config: RunConfig, pods: Pods, start_launcher: StartLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    pods.behaviours["learner"] = "orphan"  # does not notice
    launcher = start_launcher()
    pods.read(3)
    launcher.kill()
    launcher.wait()
    with monkeypatch.context() as impatience:
        impatience.setattr(local, "LAST_PODS_S", 0.0)
        with pytest.raises(ConfigError, match=f"in use by another launcher \\(process {launcher.pid}\\)"):
            train(config, pods.command, resume=True)
    [orphan] = find_processes(str(pods.pipe), "learner")
    os.kill(orphan, signal.SIGTERM)
    assert "learner stopped" in pods.rest()
    with local.open_run_dir(config, resume=True):
        pass


def find_processes(*words: str) -> list[int]:
    """Processes with all ``words`` among their arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            arguments = (entry / "cmdline").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if entry.name.isdigit() and all(word in arguments for word in words):
            found.append(int(entry.name))
    return found


# ------------------------------------------------------------------------------------- run directory


def test_a_new_run_gets_a_directory_of_its_own(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    moment = datetime(2026, 11, 20, 14, 2, 36)
    pong = config.model_copy(update={"env": config.env.model_copy(update={"id": "ALE/Pong-v5"})})
    assert local.with_new_run_dir(pong, moment).run_dir == Path("runs/20261120-140236-Pong-v5")
    Path("runs/20261120-140236-Pong-v5").mkdir(parents=True)
    assert local.with_new_run_dir(pong, moment).run_dir == Path("runs/20261120-140236-Pong-v5-2")


@pytest.mark.parametrize("env_id", ["my.module:factory", "../../etc", "a b/ü", "::"])
def test_no_environment_id_leads_out_of_the_runs(config: RunConfig, env_id: str) -> None:
    odd = config.model_copy(update={"env": config.env.model_copy(update={"id": env_id})})
    run_dir = local.with_new_run_dir(odd, datetime(2026, 11, 20, 14, 2, 36)).run_dir
    assert run_dir.parent == Path("runs")


def test_a_new_run_refuses_the_directory_of_another(config: RunConfig) -> None:
    with local.open_run_dir(config, resume=False):
        pass
    with (
        pytest.raises(ConfigError, match=f"already holds a run; continue it with --resume {config.run_dir}"),
        local.open_run_dir(config, resume=False),
    ):
        pass


def test_a_new_run_refuses_a_directory_with_other_things_in_it(config: RunConfig) -> None:
    config.run_dir.mkdir()
    (config.run_dir / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty"), local.open_run_dir(config, resume=False):
        pass
    assert [path.name for path in config.run_dir.iterdir()] == ["thesis.tex"]


def test_a_run_directory_that_cannot_be_made_is_a_clear_error(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    impossible = config.model_copy(update={"run_dir": tmp_path / "file" / "run"})
    with (
        pytest.raises(ConfigError, match=r"run_dir = .*cannot be written \(Not a directory\)"),
        local.open_run_dir(impossible, resume=False),
    ):
        pass


def test_two_launchers_never_share_a_run_directory(config: RunConfig) -> None:
    with (
        local.open_run_dir(config, resume=False),
        pytest.raises(ConfigError, match=f"in use by another launcher \\(process {os.getpid()}\\)"),
        local.open_run_dir(config, resume=True),
    ):
        pass


def test_a_resumed_run_has_its_configuration_with_flags_over_it(config: RunConfig) -> None:
    with local.open_run_dir(config, resume=False):
        pass
    resumed = local.resumed_config(config.run_dir, {"IMPALA__SEED": "7"}, ["--total_steps", "2000"])
    assert resumed == config.model_copy(update={"seed": 7, "total_steps": 2000})
    with local.open_run_dir(resumed, resume=True):
        pass
    assert local.resumed_config(config.run_dir, {}, []) == resumed


def test_a_run_directory_that_was_moved_is_resumed_where_it_is(config: RunConfig, tmp_path: Path) -> None:
    with local.open_run_dir(config, resume=False):
        pass
    moved = config.run_dir.rename(tmp_path / "moved")
    assert local.resumed_config(moved, {}, []).run_dir == moved


def test_a_resumed_run_keeps_its_preset(config: RunConfig) -> None:
    with local.open_run_dir(config, resume=False):
        pass
    with pytest.raises(ConfigError, match="preset = 'torchbeast'"):
        local.resumed_config(config.run_dir, {}, ["--preset", "torchbeast"])


def test_resuming_what_is_no_run_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--resume {tmp_path}: holds no run"):
        local.resumed_config(tmp_path, {}, [])


def test_resuming_forgets_the_snapshot_of_the_parameter_server_and_keeps_checkpoints(
    config: RunConfig,
) -> None:
    with local.open_run_dir(config, resume=False):
        (config.run_dir / "paramserver").mkdir()
        (config.run_dir / "paramserver" / "snapshot").touch()
        (config.run_dir / "checkpoints" / "7").touch()
    with local.open_run_dir(config, resume=True):
        pass
    assert not (config.run_dir / "paramserver").exists()
    assert (config.run_dir / "checkpoints" / "7").exists()


# ---------------------------------------------------------------------------------------------- plan


def plan(config: RunConfig, environment: dict[str, str]) -> dict[str, PodSpec]:
    def command(role: str, flags: Sequence[str]) -> list[str]:
        return [role, *flags]

    ports = range(9400, 9402 + config.actors)
    pods = local.plan_pods(config, ports, Path("/tmp/x"), environment, command)
    return {pod.name: pod for pod in pods}


def test_every_pod_gets_flags_that_the_configuration_understands(config: RunConfig) -> None:
    config = config.model_copy(update={"actors": 2})
    with local.open_run_dir(config, resume=False):
        pods = plan(config, {})
    assert list(pods) == ["paramserver", "learner", "actor-0", "actor-1"]
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
        assert understood.wire.learner_endpoints == ("ipc:///tmp/x/learner",)
        assert understood.wire.learner_bind == "ipc:///tmp/x/learner"
        assert understood.wire.paramserver_endpoint == understood.wire.paramserver_bind
        assert understood.total_steps == config.total_steps


def test_threads_are_set_for_each_role_and_configuration_variables_are_not_inherited() -> None:
    config = configuration.load(flags=["--learner.num_threads", "4", "--actor.inference_threads", "2"])
    pods = plan(config, {"PATH": "/bin", "IMPALA__SEED": "3", "OMP_NUM_THREADS": "64"})
    threads = {name: pod.environment["OMP_NUM_THREADS"] for name, pod in pods.items()}
    assert threads == {"paramserver": "1", "learner": "4", "actor-0": "2"}
    assert pods["learner"].environment["MKL_NUM_THREADS"] == "4"
    assert pods["learner"].environment["PATH"] == "/bin"
    assert "IMPALA__SEED" not in pods["learner"].environment


def test_prometheus_finds_every_pod(config: RunConfig, tmp_path: Path) -> None:
    local.write_targets(tmp_path / "targets.json", plan(config, {}).values())
    assert json.loads((tmp_path / "targets.json").read_text()) == [
        {"targets": ["127.0.0.1:9400"], "labels": {"role": "paramserver", "pod": "paramserver"}},
        {"targets": ["127.0.0.1:9401"], "labels": {"role": "learner", "pod": "learner"}},
        {"targets": ["127.0.0.1:9402"], "labels": {"role": "actor", "pod": "actor-0"}},
    ]


def test_reserved_ports_skip_those_in_use_and_let_a_pod_listen() -> None:
    with local.reserved_ports(0, 1) as [first], local.reserved_ports(first, 3) as others:
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
    with local.private_socket_dir() as path:
        assert len(str(path / "paramserver")) < 100
        assert path.stat().st_mode & 0o077 == 0
    assert not path.exists()


# ------------------------------------------------------------------------------------------- backoff


def test_backoff_doubles_up_to_its_longest() -> None:
    backoff = Backoff()
    delays = [backoff.after_death(alive_s=20.0, now_s=20.0 * death) for death in range(10)]
    assert delays == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0, 10.0]


def test_backoff_starts_anew_after_a_good_minute() -> None:
    backoff = Backoff()
    backoff.after_death(alive_s=1.0, now_s=0.0)
    assert backoff.after_death(alive_s=59.9, now_s=100.0) == 0.4
    assert backoff.after_death(alive_s=60.0, now_s=200.0) == 0.2


@pytest.mark.parametrize(("fifth_s", "gives_up"), [(60.0, True), (60.1, False)])
def test_five_deaths_within_a_minute_are_too_many(fifth_s: float, gives_up: bool) -> None:
    backoff = Backoff()
    for now_s in (0.0, 1.0, 2.0, 3.0):
        assert backoff.after_death(alive_s=1.0, now_s=now_s) is not None
    assert (backoff.after_death(alive_s=1.0, now_s=fifth_s) is None) == gives_up


def test_a_wrong_environment_is_found_before_anything_starts(config: RunConfig) -> None:
    wrong = config.model_copy(update={"env": config.env.model_copy(update={"id": "ALE/Pnog-v5"})})
    with pytest.raises(ConfigError, match=r"env\.id = 'ALE/Pnog-v5'.*Pong"):
        local.train(wrong, plain=True, command=lambda role, flags: ["/bin/false"])
    assert not wrong.run_dir.exists()
