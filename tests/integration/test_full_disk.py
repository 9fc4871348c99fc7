"""A disk without room costs checkpoints and reports, never the training; with room again, all is well."""

from __future__ import annotations

import json
import resource

import pytest

from services.learner.checkpoint import read
from tests.integration.conftest import StartRun
from tests.integration.system import START_S, STEPS_PER_UPDATE
from tests.unit.learner.waiting import until

pytestmark = pytest.mark.integration


def test_a_full_disk_never_stops_the_training(start_run: StartRun) -> None:
    run = start_run("--total_steps", "1000000000", "--checkpoint.interval_s", "0.5")
    run.train_until(10 * STEPS_PER_UPDATE)
    until(run.checkpoints, "a checkpoint")
    learner = until(lambda: run.pod("learner"))
    no_limit = resource.prlimit(learner.pid, resource.RLIMIT_FSIZE)

    # From now on the learner can write to no file: checkpoints, reports, its log.
    resource.prlimit(learner.pid, resource.RLIMIT_FSIZE, (1, no_limit[1]))
    until(lambda: (run.value("learner", "checkpoint_failures_total") or 0) >= 3, "failures", START_S)
    saved = run.checkpoints()
    lines = (run.run_dir / "metrics.jsonl").read_text()
    run.train_until(run.train_until(0) + 50 * STEPS_PER_UPDATE)
    assert run.checkpoints() == saved
    assert (run.run_dir / "metrics.jsonl").read_text() == lines

    resource.prlimit(learner.pid, resource.RLIMIT_FSIZE, no_limit)
    until(lambda: run.checkpoints()[-1] > saved[-1], "a new checkpoint", START_S)
    until(lambda: (run.run_dir / "metrics.jsonl").read_text() != lines, "a new report")
    assert run.pod("learner") == learner
    run.interrupt()
    assert run.exit_code(30.0) == 0, run.log()
    assert not list((run.run_dir / "checkpoints").glob("*.tmp"))
    for path in run.checkpoints():
        read(path)
    for line in (run.run_dir / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
