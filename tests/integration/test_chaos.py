"""Every pod of a system in training is killed, frozen and cut off, twice each, and every promise is kept."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos_faults import KINDS
from benchmarks.chaos_network import privileged
from tests.conftest import not_permitted
from tests.integration.system import REPOSITORY, Process, environment, processes
from tests.unit.learner.waiting import until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

ROUNDS = 2
HOLD_S = 6.0
"""Longer than the learners' lease: a frozen or cut off one is given up."""
NOT_PERMITTED = 2

Chaos = dict[str, Any]


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    """All that was found, of one system."""
    directory = tmp_path_factory.mktemp("chaos")
    command = [sys.executable, "-m", "benchmarks.chaos", "--rounds", str(ROUNDS), "--hold", str(HOLD_S)]
    command += ["--directory", str(directory / "run"), "--json", str(directory / "found.json")]
    process = Process(command, directory / "chaos.log", cwd=REPOSITORY)
    try:
        code = process.exit_code(timeout_s=800)
    finally:
        if process.alive:
            process.popen.terminate()
            process.popen.wait(60)
    sys.stdout.write(process.log())  # with its seed; shown if a test fails
    if code == NOT_PERMITTED:
        not_permitted(process.log())
    assert (directory / "found.json").exists(), process.log()
    found: Chaos = json.loads((directory / "found.json").read_text())
    return found


@pytest.mark.parametrize(("fault", "target"), KINDS)
def test_every_promise_is_kept_through_every_fault(chaos: Chaos, fault: str, target: str) -> None:
    found = [each for each in chaos["findings"] if (each["fault"], each["target"]) == (fault, target)]
    assert len(found) == ROUNDS
    for each in found:
        assert each["violations"] == []
        assert each["whole_s"] is not None


def test_training_goes_on_within_seconds(chaos: Chaos, capsys: pytest.CaptureFixture[str]) -> None:
    training = [each["training_s"] for each in chaos["findings"]]
    with capsys.disabled():
        sys.stdout.write(f"\n  {len(training)} faults: median {statistics.median(training):.1f} s, ")
        sys.stdout.write(f"longest {max(training):.1f} s without a step\n")
    assert chaos["slow"] == []  # the median of every kind


def test_all_stop_with_exit_code_0_and_all_learners_hold_the_same_parameters_at_the_end(chaos: Chaos) -> None:
    assert chaos["end"] == []


def test_a_cut_cable_is_silence_and_a_mended_one_goes_on_where_it_was() -> None:
    command = privileged([sys.executable, "-m", "tests.integration.cables"])
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    refused = done.returncode == 1 and done.stderr.startswith("unshare:")
    if refused or done.returncode == NOT_PERMITTED:
        not_permitted(done.stderr)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "before": "a",
        "cut": "TimeoutError",
        "new connection": "TimeoutError",
        "others": "c",
        "addresses stay": True,
        "mended": "b",
        "after": "d",
    }


def test_where_networks_cannot_be_made_it_says_so_in_one_line() -> None:
    command = [sys.executable, "-m", "benchmarks.chaos", "--rounds", "1"]
    without_tools = environment() | {"PATH": "/nonexistent"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=without_tools, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == NOT_PERMITTED
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("make chaos: needs network namespaces, and ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_when_it_is_broken_off_no_process_is_left(tmp_path: Path, number: signal.Signals) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.chaos",
        "--rounds",
        "1",
        "--directory",
        str(tmp_path / "run"),
    ]
    process = Process(command, tmp_path / "chaos.log", cwd=REPOSITORY)

    def pods() -> dict[int, list[str]]:
        return processes(str(tmp_path / "run"), "--parent-pid")

    try:
        until(lambda: not process.alive or len(pods()) == 6, "the pods have been started")
        if not process.alive and process.popen.returncode == NOT_PERMITTED:
            not_permitted(process.log())
        os.kill(process.pid, number)
        assert process.exit_code(timeout_s=60) == 128 + number, process.log()
        assert not pods()
    finally:
        process.end()
