"""Whole runs of fake pods: how they end, what the user reads then, and which signals end them."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services import config as configuration
from services.config import ConfigError, RunConfig
from services.local import run_dir
from services.local import train as training
from services.local.plan import Command
from tests.unit.local.fake_pods import Pods

PATIENCE_S = 60.0

StartLauncher = Callable[..., subprocess.Popen[str]]


def train(config: RunConfig, command: Command, resume: bool = False) -> int:
    """To the end."""
    return training.train(
        config, resume=resume, plain=True, command=command, find_frame_skip=lambda config: 1
    )


def test_a_run_ends_when_the_learner_says_complete(
    config: RunConfig, pods: Pods, capsys: pytest.CaptureFixture[str]
) -> None:
    pods.behaviours["learner"] = "complete"
    assert train(config, pods.command) == 0
    assert sorted(pods.rest()[:3]) == ["actor-0 up", "learner-0 up", "paramserver up"]
    output = capsys.readouterr().out
    assert "complete at 1,000 of 1,000 steps" in output
    assert f"impala train --resume {config.run_dir} --total_steps 2000" in output


def test_a_refused_configuration_is_the_line_of_the_pod_and_leaves_the_directory_free(
    config: RunConfig, pods: Pods, capsys: pytest.CaptureFixture[str]
) -> None:
    pods.behaviours["learner"] = "refuse"
    assert train(config, pods.command) == 2
    assert capsys.readouterr().err == "impala: network.name: a convolutional network cannot see 4 numbers\n"
    assert not config.run_dir.exists(), "nothing ran"

    config.run_dir.mkdir()
    assert train(config, pods.command) == 2
    assert config.run_dir.exists(), "it is the user's"

    pods.behaviours["learner"] = "complete"
    assert train(config, pods.command) == 0


def test_a_pod_that_refuses_without_a_word_to_the_user_is_named_with_its_log(
    config: RunConfig, pods: Pods, capsys: pytest.CaptureFixture[str]
) -> None:
    pods.behaviours["learner"] = "exit-2"
    assert train(config, pods.command) == 2
    line, where = capsys.readouterr().err.splitlines()
    assert line.startswith("impala: learner-0 refused its configuration: ")
    assert "error learner diverged reason=nan" in line, "the last error, rather than the last line"
    log = config.run_dir / "logs" / "learner-0.log"
    assert where == f"impala: all of it: {log}"
    assert log.exists()


def test_a_learner_that_gives_up_is_not_restarted(
    config: RunConfig, pods: Pods, capsys: pytest.CaptureFixture[str]
) -> None:
    pods.behaviours["learner"] = "exit-3"
    assert train(config, pods.command) == 1
    captured = capsys.readouterr()
    assert "learner-0 gave up" in captured.err
    assert "diverged reason=nan" in captured.err
    assert f"--resume {config.run_dir}" in captured.out


def test_a_wrong_environment_is_found_before_anything_starts(config: RunConfig) -> None:
    wrong = config.model_copy(update={"env": config.env.model_copy(update={"id": "ALE/Pnog-v5"})})
    with pytest.raises(ConfigError, match=r"env\.id = 'ALE/Pnog-v5'.*Pong"):
        training.train(wrong, plain=True, command=lambda role, flags: ["/bin/false"])
    assert not wrong.run_dir.exists()


def test_a_run_that_would_wait_for_learners_for_ever_is_refused(config: RunConfig) -> None:
    def asking_for(least: int) -> RunConfig:
        learner = config.learner.model_copy(update={"min_learners": least})
        return config.model_copy(update={"learners": 2, "learner": learner})

    with pytest.raises(ConfigError) as refused:
        train(asking_for(3), lambda role, flags: ["/bin/false"])
    assert str(refused.value) == (
        "learner.min_learners = 3: training would wait for more learners than are started; "
        "allowed is at most learners = 2"
    )
    assert not config.run_dir.exists()
    training.refuse_too_few_learners(asking_for(2))


def test_the_command_to_go_on_can_be_called_as_it_is_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / ".venv" / "bin" / "impala"
    script.parent.mkdir(parents=True)
    script.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "train"])
    monkeypatch.setenv("PATH", "/nowhere")
    assert training.this_program() == ".venv/bin/impala"
    monkeypatch.setenv("PATH", str(script.parent))
    assert training.this_program() == "impala"


# ------------------------------------------------------------------------------------------- signals


@pytest.fixture
def start_launcher(config: RunConfig, pods: Pods, tmp_path: Path) -> Iterator[StartLauncher]:
    """A launcher that is a process of its own, to be sent signals."""
    started: list[subprocess.Popen[str]] = []

    def start(terminal: int | None = None) -> subprocess.Popen[str]:
        program = f"""
            import fcntl, signal, sys, termios
            from pathlib import Path
            from services import config
            from services.local.train import train
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
            if {terminal is not None}:  # so that closing it is also a SIGHUP
                fcntl.ioctl(sys.stdout, termios.TIOCSCTTY, 0)
            behaviours = {pods.behaviours!r}
            sys.exit(train(
                config.load(Path({str(tmp_path / "config.json")!r})),
                plain={terminal is None},
                command=lambda role, flags: [
                    sys.executable, {str(pods.script)!r}, role, behaviours[role], {str(pods.pipe)!r}, *flags
                ],
                find_frame_skip=lambda config: 1,
            ))
        """
        (tmp_path / "config.json").write_text(json.dumps(configuration.dump(config)))
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)],
            stdout=subprocess.PIPE if terminal is None else terminal,
            stderr=subprocess.PIPE if terminal is None else terminal,
            text=True,
            env=os.environ
            | {"TMPDIR": str(tmp_path), "TERM": "xterm"},  # a killed launcher leaves its sockets
            start_new_session=True,
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
    assert sorted(pods.read(3)) == ["actor-0 up", "learner-0 up", "paramserver up"]
    launcher.send_signal(number)
    output, _ = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 0
    assert "continue with: " in output
    assert f"impala train --resume {config.run_dir}\n" in output
    assert pods.rest() == ["actor-0 stopped", "learner-0 stopped", "paramserver stopped"]


def test_what_a_stopped_run_says_of_its_steps_is_what_its_last_checkpoint_holds(
    pods: Pods, start_launcher: StartLauncher
) -> None:
    pods.behaviours["learner"] = "save"
    launcher = start_launcher()
    pods.read(3)
    launcher.send_signal(signal.SIGINT)
    output, _ = launcher.communicate(timeout=PATIENCE_S)
    assert "stopped at 640 of 1,000 steps" in output


def test_a_terminal_that_is_closed_stops_cleanly(
    config: RunConfig, pods: Pods, start_launcher: StartLauncher
) -> None:
    ours, its = os.openpty()
    launcher = start_launcher(terminal=its)
    os.close(its)
    assert sorted(pods.read(3)) == ["actor-0 up", "learner-0 up", "paramserver up"]
    os.close(ours)
    assert pods.rest() == ["actor-0 stopped", "learner-0 stopped", "paramserver stopped"]
    launcher.wait(timeout=PATIENCE_S)


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
    assert sorted(pods.rest()) == ["actor-0 stopped", "learner-0 stopped", "paramserver stopped"]


def test_a_run_directory_stays_locked_until_the_pods_of_a_killed_launcher_are_gone(
    config: RunConfig, pods: Pods, start_launcher: StartLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    pods.behaviours["learner"] = "orphan"  # does not notice
    launcher = start_launcher()
    pods.read(3)
    launcher.kill()
    launcher.wait()
    with monkeypatch.context() as impatience:
        impatience.setattr(run_dir, "LAST_PODS_S", 0.0)
        with pytest.raises(ConfigError, match=f"in use by another launcher \\(process {launcher.pid}\\)"):
            train(config, pods.command, resume=True)
    [orphan] = find_processes(str(pods.pipe), "learner")
    os.kill(orphan, signal.SIGTERM)
    assert "learner-0 stopped" in pods.rest()
    with run_dir.open_run_dir(config, resume=True):
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
