"""What a user gets wrong is one clear line, exit code 2, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.system import environment, processes_in

pytestmark = pytest.mark.integration


def train(cwd: Path, *flags: str, **variables: str) -> tuple[int, list[str]]:
    """(exit code, lines on stderr) of `impala train` in an empty directory."""
    command = [sys.executable, "-m", "services.cli", "train", "--plain", *flags]
    finished = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment() | variables,
        timeout=60,
        check=False,
    )
    assert finished.stdout == ""
    return finished.returncode, finished.stderr.splitlines()


def test_what_is_started_in_a_directory_is_found(tmp_path: Path) -> None:
    """The other tests here look for processes that must not be there."""
    with subprocess.Popen([sys.executable, "-c", "input()"], cwd=tmp_path, stdin=subprocess.PIPE) as process:
        assert processes_in(tmp_path) == [process.pid]
        process.kill()


@pytest.mark.parametrize("run_dir", [[], ["--run_dir", "here"]], ids=["own run dir", "given run dir"])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--learner.queue_capacty", "64"], ["learner.queue_capacty", "unknown", "learner.queue_capacity"]),
        (["--batch_size", "-4"], ["batch_size", "-4", "greater than or equal to 1"]),
        (["--batch_size", "many"], ["batch_size", "many", "integer"]),
        (["--unroll_length", "2.5"], ["unroll_length", "2.5", "integer"]),
        (["--env", "pomg"], ["env.id", "pomg", "ALE/Pong-v5"]),
        (["--env", "catch", "--env.kwargs", '{"rows": 1}'], ["env.kwargs.rows", "1", "2 to 64"]),
        (
            ["--env", "catch", "--learner.queue_capacity", "31"],
            ["learner.queue_capacity", "31", "batch_size", "32", "never fill"],
        ),
        (["--env", "catch", "--total_steps", "639"], ["total_steps", "639", "640"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("-") else "",
)
def test_a_wrong_configuration_is_one_line_and_starts_nothing(
    tmp_path: Path, flags: list[str], words: list[str], run_dir: list[str]
) -> None:
    exit_code, lines = train(tmp_path, *flags, *run_dir)
    assert exit_code == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("impala: ")
    assert all(word in lines[0] for word in words), lines[0]
    assert list(tmp_path.iterdir()) == []
    assert not processes_in(tmp_path)


def test_a_wrong_environment_variable_is_one_line_that_names_it(tmp_path: Path) -> None:
    exit_code, lines = train(tmp_path, "--env", "catch", IMPALA__BATCH_SIZE="0")
    assert (exit_code, len(lines)) == (2, 1)
    assert "IMPALA__BATCH_SIZE" in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_is_one_line_for_each_of_its_problems(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("env: {id: catch}\nbatch_size: '32'\nlerner: {device: cpu}\n")
    exit_code, lines = train(tmp_path, "--config", "run.yaml")
    assert (exit_code, len(lines)) == (2, 2)
    assert "batch_size = '32'" in "\n".join(lines)
    assert "lerner" in "\n".join(lines)
    assert list(tmp_path.iterdir()) == [file]
