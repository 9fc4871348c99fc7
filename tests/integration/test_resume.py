"""A stopped run continues exactly where it stopped, and a finished one can be trained longer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from services.learner.checkpoint import Checkpoint, read
from tests.integration.conftest import StartPod, StartRun
from tests.integration.system import CATCH, STEPS_PER_UPDATE, Run, events, field
from tests.unit.learner.waiting import until

pytestmark = pytest.mark.integration

LEARNER = "learner-0"
LEARNERS = (LEARNER, "learner-1")
STOP_S = 30.0
LEARNING_RATE = 6e-4
FINISHED_STEPS = 40 * STEPS_PER_UPDATE
MORE_UPDATES = 300
"""Of two learners after a resume, who compare their weights every hundred."""


def same(a: Any, b: Any) -> bool:
    """To the bit."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def newest(run: Run) -> Checkpoint:
    return read(run.checkpoints()[-1])


def report_lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def check_schedule(lines: list[dict[str, Any]], total_steps: int) -> None:
    """That of a run of so many steps, in every report."""
    for line in lines:
        expected = LEARNING_RATE * (1 - line["steps"] / total_steps)
        assert line["learning_rate"] == pytest.approx(expected, rel=1e-9)


def continued_from(run: Run, learner: str = LEARNER) -> tuple[int, int, str]:
    """(steps, version, checkpoint) with which a learner of a run has begun, as it says itself."""
    started = run.pod_events(learner, "started")[-1]
    assert not run.pod_events(learner, "newer_weights")
    return (
        int(field(started, "steps")),
        int(field(started, "policy_version")),
        field(started, "checkpoint"),
    )


def test_a_run_that_is_interrupted_continues_from_the_very_step_where_it_stopped(start_run: StartRun) -> None:
    total_steps = 100_000_000
    first = start_run("--total_steps", str(total_steps), "--checkpoint.interval_s", "1")
    first.train_until(50 * STEPS_PER_UPDATE)
    until(lambda: len(first.checkpoints()) >= 2, "two checkpoints")
    first.interrupt()
    assert first.exit_code(STOP_S) == 0, first.log()
    stopped = newest(first)
    steps, version = stopped.trainer["steps"], stopped.trainer["version"]
    assert steps == version * STEPS_PER_UPDATE > 50 * STEPS_PER_UPDATE
    assert stopped.complete is False
    assert f"stopped at {steps:,} of {total_steps:,} steps" in first.log()
    assert f"--resume {first.run_dir}" in first.log()
    assert first.pids() == []

    # With nothing left to train, what is restored is written again: the whole state is there.
    restored = start_run("--total_steps", str(steps), resume=True)
    assert restored.exit_code(2 * STOP_S) == 0, restored.log()
    assert continued_from(restored) == (steps, version, str(stopped.path))
    assert newest(restored).path == stopped.path
    assert same(dict(newest(restored).trainer), dict(stopped.trainer))
    assert newest(restored).complete is True

    # A truncated newest checkpoint is refused by its name, and the one before it is used.
    before = read(restored.checkpoints()[-2])
    stopped.path.write_bytes(stopped.path.read_bytes()[:-1000])
    resumed = start_run("--total_steps", str(total_steps), resume=True)
    resumed.train_until(steps + 20 * STEPS_PER_UPDATE)  # or the truncated one would still be the newest
    (refused,) = resumed.pod_events(LEARNER, "checkpoint_refused")
    assert str(stopped.path) in field(refused, "reason")
    before_steps, before_version = before.trainer["steps"], before.trainer["version"]
    assert continued_from(resumed) == (before_steps, before_version, str(before.path))
    resumed.interrupt()
    assert resumed.exit_code(STOP_S) == 0, resumed.log()
    last = newest(resumed).trainer
    assert last["version"] * STEPS_PER_UPDATE == last["steps"] > steps

    # Its schedule is that of the whole run, before and after each of the stops.
    lines = [line for line in report_lines(first.run_dir) if line["steps"] != steps]
    assert before_steps in {line["steps"] for line in lines}
    check_schedule(lines, total_steps)


def test_two_learners_that_are_interrupted_continue_from_the_very_step_where_they_stopped(
    start_run: StartRun,
) -> None:
    total_steps = 100_000_000
    first = start_run("--learners", "2", "--total_steps", str(total_steps), "--checkpoint.interval_s", "1")
    first.train_until(50 * STEPS_PER_UPDATE)
    until(lambda: len(first.checkpoints()) >= 2, "two checkpoints")
    first.interrupt()
    assert first.exit_code(STOP_S) == 0, first.log()
    stopped = newest(first)
    steps, version = stopped.trainer["steps"], stopped.trainer["version"]
    assert not list((first.run_dir / "checkpoints").glob("*.tmp"))

    together = ("--learner.min_learners", "2")
    restored = start_run("--total_steps", str(steps), *together, resume=True)
    assert restored.exit_code(2 * STOP_S) == 0, restored.log()
    for learner in LEARNERS:
        assert continued_from(restored, learner) == (steps, version, str(stopped.path))
        assert len(restored.pod_events(learner, "started")) == 2, "once in each of the two runs"
    assert newest(restored).path == stopped.path
    assert same(dict(newest(restored).trainer), dict(stopped.trainer))
    assert newest(restored).complete is True

    # From there on both train together, none of them alone, and stay the same.
    longer = steps + MORE_UPDATES * len(LEARNERS) * STEPS_PER_UPDATE
    resumed = start_run("--total_steps", str(longer), *together, resume=True)
    assert resumed.exit_code(120) == 0, resumed.log()
    for learner in LEARNERS:
        assert continued_from(resumed, learner) == (steps, version, str(stopped.path))
        assert not resumed.pod_events(learner, "weights_differ")
    ends = [resumed.pod_events(learner, "stopped")[-1] for learner in LEARNERS]
    assert {field(end, "policy_version") for end in ends} == {str(version + MORE_UPDATES)}
    assert {field(end, "steps") for end in ends} == {str(longer)}
    assert len({field(end, "parameters") for end in ends}) == 1
    assert newest(resumed).trainer["steps"] == longer

    lines = report_lines(resumed.run_dir)
    before = [line for line in lines if line["steps"] < steps]
    after = [line for line in lines if line["steps"] > steps]
    assert before and len(after) >= 2
    check_schedule(before, total_steps)
    check_schedule(after, longer)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that is complete, and what its launcher said."""
    directory = tmp_path_factory.mktemp("finished")
    flags = [*CATCH, "--run_dir", str(directory / "run"), "--ops.port", "0"]
    run = Run(directory / "run", directory / "launcher.log", [*flags, "--total_steps", str(FINISHED_STEPS)])
    try:
        assert run.exit_code(120) == 0, run.log()
        assert run.pids() == []
    finally:
        run.end()
    return directory


@pytest.fixture
def finished_run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, where ``start_run`` and ``start_pod`` look for it."""
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


def test_a_run_whose_steps_are_all_trained_is_complete(finished: Path, finished_run_dir: Path) -> None:
    (path,) = (finished_run_dir / "checkpoints").glob("step-*.pt")
    checkpoint = read(path)
    assert (checkpoint.trainer["steps"], checkpoint.complete) == (FINISHED_STEPS, True)
    assert f"complete at {FINISHED_STEPS:,} of {FINISHED_STEPS:,}" in (finished / "launcher.log").read_text()
    assert events(finished_run_dir / "logs" / f"{LEARNER}.log", "training_complete")


def test_a_finished_run_may_be_trained_longer(finished_run_dir: Path, start_run: StartRun) -> None:
    longer = start_run("--total_steps", str(2 * FINISHED_STEPS), resume=True)
    (checkpoint,) = longer.checkpoints()
    assert longer.exit_code(120) == 0, longer.log()
    assert continued_from(longer) == (FINISHED_STEPS, 40, str(checkpoint))
    assert (newest(longer).trainer["steps"], newest(longer).complete) == (2 * FINISHED_STEPS, True)
    assert newest(longer).trainer["version"] == 80


def test_a_run_cannot_be_resumed_with_another_network_or_optimiser_and_says_so(
    finished_run_dir: Path, start_run: StartRun, start_pod: StartPod
) -> None:
    (checkpoint,) = (finished_run_dir / "checkpoints").glob("step-*.pt")
    config = (finished_run_dir / "config.json").read_text()
    changes = {"network.hidden_size": "48", "optimiser.name": "adam"}
    learners = {key: start_pod("learner", f"--{key}", value) for key, value in changes.items()}
    for key, learner in learners.items():
        assert learner.exit_code(120) == 2, learner.log()
        (complaint,) = [line for line in learner.log().splitlines() if line.startswith("impala learner: ")]
        assert f"{checkpoint}: does not fit this run" in complaint
        assert {"network.hidden_size": "size mismatch"}.get(key, key) in complaint
    for key, value in changes.items():
        resumed = start_run(f"--{key}", value, resume=True)
        assert resumed.exit_code(120) == 2, resumed.log()
        assert f"{key} = " in resumed.log()
        assert not resumed.lines("progress")  # nothing was started
    assert (finished_run_dir / "config.json").read_text() == config
    assert [*(finished_run_dir / "checkpoints").glob("step-*.pt")] == [checkpoint]
