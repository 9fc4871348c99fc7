"""A disk that takes nothing costs checkpoints, snapshots and reports, and never the training."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.learner import checkpoint
from services.paramserver import store
from services.paramserver.store import Snapshot
from tests.integration import disks
from tests.integration.conftest import StartRun
from tests.integration.system import START_S, STEPS_PER_UPDATE, Run
from tests.unit.learner.waiting import until

pytestmark = pytest.mark.integration

LEARNER, PARAMSERVER = "learner-0", "paramserver"
DISK_BYTES = 8 << 20
FLAGS = (
    *("--total_steps", "1000000000"),
    *("--checkpoint.interval_s", "0.5", "--paramserver.snapshot_interval_s", "0.5"),
)
FAILURES = {LEARNER: "checkpoint_failures_total", PARAMSERVER: "paramserver_snapshot_failures_total"}


@dataclass(frozen=True)
class Saved:
    """What the disk has of a run."""

    checkpoints: dict[Path, bytes]
    snapshot: bytes


def snapshot_path(run: Run) -> Path:
    return run.run_dir / "paramserver" / "snapshot"


def saved(run: Run) -> Saved:
    return Saved({path: path.read_bytes() for path in run.checkpoints()}, snapshot_path(run).read_bytes())


def snapshot(run: Run) -> Snapshot:
    """Whole, or SnapshotError."""
    return store.read(snapshot_path(run), "local", 1 << 25)


def value(run: Run, pod: str, name: str) -> float:
    """Of a pod that may be between two lives."""
    return run.value(pod, name) or 0.0


def failures(run: Run) -> dict[str, float]:
    return {pod: value(run, pod, name) for pod, name in FAILURES.items()}


def await_failures(run: Run, count: int = 2) -> None:
    """So many more of each kind."""
    before = failures(run)
    until(
        lambda: all(now >= before[pod] + count for pod, now in failures(run).items()),
        "failed checkpoints and snapshots",
        START_S,
    )


def await_saved(run: Run, than: Saved) -> None:
    """Something newer of both kinds."""
    newest, version = max(than.checkpoints), snapshot(run).version
    timestamp = value(run, LEARNER, "checkpoint_timestamp_seconds")
    until(lambda: max(run.checkpoints()) > newest, "a new checkpoint", START_S)
    until(lambda: snapshot(run).version > version, "a new snapshot", START_S)
    until(lambda: value(run, LEARNER, "checkpoint_timestamp_seconds") > timestamp, "the alert's metric")


def pids(run: Run) -> dict[str, int]:
    pods = {name: run.pod(name) for name in run.ports()}
    return {name: pod.pid for name, pod in pods.items() if pod is not None}


def stop(run: Run) -> None:
    """In order, with a last checkpoint; whatever is on the disk then is whole."""
    run.interrupt()
    assert run.exit_code(30.0) == 0, run.log()
    assert not list((run.run_dir / "checkpoints").glob("*.tmp"))
    for path in run.checkpoints():
        checkpoint.read(path)
    snapshot(run)
    for line in (run.run_dir / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


@pytest.fixture
def held() -> Iterator[ExitStack]:
    """Mounts, which outlive the run of the test."""
    with ExitStack() as stack:
        yield stack


def test_a_full_disk_never_stops_the_training(held: ExitStack, tmp_path: Path, start_run: StartRun) -> None:
    """All that a run writes is on it: checkpoints, snapshots, reports and logs."""
    held.enter_context(disks.small_disk(tmp_path / "run", DISK_BYTES))
    run = start_run(*FLAGS)
    run.train_until(10 * STEPS_PER_UPDATE)
    until(lambda: run.checkpoints() and snapshot_path(run).exists(), "a checkpoint and a snapshot")
    pods = pids(run)
    assert failures(run) == {LEARNER: 0, PARAMSERVER: 0}

    def full() -> bool:
        disks.fill(run.run_dir)  # again, because a checkpoint that fails leaves room behind
        return min(failures(run).values()) >= 3

    until(full, "failures", START_S)
    before, timestamp = saved(run), value(run, LEARNER, "checkpoint_timestamp_seconds")
    run.train_until(run.train_until(0) + 50 * STEPS_PER_UPDATE)
    await_failures(run)
    assert saved(run) == before
    assert value(run, LEARNER, "checkpoint_timestamp_seconds") == timestamp
    checkpoint.read(max(before.checkpoints))
    snapshot(run)

    (run.run_dir / disks.FILLER).unlink()
    await_saved(run, before)
    now = failures(run)
    run.train_until(run.train_until(0) + 50 * STEPS_PER_UPDATE)
    assert failures(run) == now
    assert pids(run) == pods, "nobody has been started again"
    stop(run)


def test_a_learner_that_may_write_no_file_goes_on_training(start_run: StartRun) -> None:
    """The same for whoever is not root, of the learner alone."""
    run = start_run(*FLAGS)
    run.train_until(10 * STEPS_PER_UPDATE)
    until(run.checkpoints, "a checkpoint")
    learner = until(lambda: run.pod(LEARNER))
    no_limit = resource.prlimit(learner.pid, resource.RLIMIT_FSIZE)

    # From now on the learner can write to no file: checkpoints, reports, its log.
    resource.prlimit(learner.pid, resource.RLIMIT_FSIZE, (1, no_limit[1]))
    until(lambda: failures(run)[LEARNER] >= 3, "failures", START_S)
    before, lines = run.checkpoints(), (run.run_dir / "metrics.jsonl").read_text()
    run.train_until(run.train_until(0) + 50 * STEPS_PER_UPDATE)
    assert run.checkpoints() == before
    assert (run.run_dir / "metrics.jsonl").read_text() == lines

    resource.prlimit(learner.pid, resource.RLIMIT_FSIZE, no_limit)
    until(lambda: run.checkpoints()[-1] > before[-1], "a new checkpoint", START_S)
    until(lambda: (run.run_dir / "metrics.jsonl").read_text() != lines, "a new report")
    assert run.pod(LEARNER) == learner
    stop(run)


def test_where_nothing_can_be_written_learners_and_servers_train_die_and_begin_again(
    held: ExitStack, start_run: StartRun
) -> None:
    run = start_run(*FLAGS)
    run.train_until(10 * STEPS_PER_UPDATE)
    until(lambda: run.checkpoints() and snapshot_path(run).exists(), "a checkpoint and a snapshot")
    with ExitStack() as frozen:
        for directory in (run.run_dir / "checkpoints", run.run_dir / "paramserver"):
            frozen.enter_context(disks.read_only(directory))
        await_failures(run)
        before = saved(run)
        leftover = sorted((run.run_dir / "checkpoints").glob("*.tmp"))
        steps = run.train_until(run.train_until(0) + 50 * STEPS_PER_UPDATE)

        # Whoever dies begins with what is there, and the other one has what is newer.
        run.kill(LEARNER)
        steps = run.train_until(steps)
        run.kill(PARAMSERVER)
        steps = run.train_until(steps + 50 * STEPS_PER_UPDATE)
        await_failures(run)
        assert saved(run) == before
        assert sorted((run.run_dir / "checkpoints").glob("*.tmp")) == leftover
        assert value(run, LEARNER, "checkpoint_timestamp_seconds") == pytest.approx(
            max(before.checkpoints).stat().st_mtime
        )
    await_saved(run, before)
    assert run.train_until(0) >= steps
    stop(run)
