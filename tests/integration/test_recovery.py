"""Any pod may be killed at any time: the run goes on, and nothing that was learnt is lost."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.integration.conftest import StartRun
from tests.integration.system import START_S, STEPS_PER_UPDATE, Run, environment, field, scrape
from tests.unit.learner.waiting import until

pytestmark = pytest.mark.integration

RECOVERY_S = 10.0
BEHIND_UPDATES = 10
"""What may be on its way to the parameter server. Since the last checkpoint there were many more."""
LOST_S = 1.0
"""Of training, at most."""
IMPORT_S = 2.5
"""What importing torch may take for these bounds to be fair. Where it takes longer, they are wider."""


def slowness() -> float:
    """How much slower this machine starts a pod just now than an idle one; at most three times counts."""
    began_s = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], env=environment(), check=True)
    return min(3.0, max(1.0, (time.monotonic() - began_s) / IMPORT_S))


def steps_behind(run: Run) -> float:
    """What is trained and not yet with the parameter server."""
    return run.steps() - (run.value("paramserver", "paramserver_version") or 0) * STEPS_PER_UPDATE


@contextmanager
def watched_versions(run: Run) -> Iterator[list[tuple[float, float]]]:
    """(start of the process, version) as the parameter server reports them, many times a second."""
    seen: list[tuple[float, float]] = []
    done = threading.Event()

    def watch() -> None:
        port = run.ports()["paramserver"]
        while not done.wait(0.05):
            samples = scrape(port)
            if samples:
                seen.append((samples["process_start_time_seconds"], samples["impala_paramserver_version"]))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def test_a_run_survives_kill_9_of_each_of_its_pods(
    start_run: StartRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start_run("--total_steps", "1000000000", "--checkpoint.interval_s", "2")
    run.train_until(30 * STEPS_PER_UPDATE)
    until(run.checkpoints, "a checkpoint")
    report = []
    with watched_versions(run) as versions:
        for victim in ("actor-0", "paramserver", "learner-0"):
            measured_from = (run.train_until(0), time.monotonic())
            slow = slowness()
            until(lambda: steps_behind(run) < BEHIND_UPDATES * STEPS_PER_UPDATE, "the server keeps up")
            version_before = run.value("paramserver", "paramserver_version") or 0
            steps_before = run.train_until(0)
            killed_s = time.monotonic()
            run.kill(victim)
            until(lambda: run.pod(victim), f"{victim} is started again", START_S)  # noqa: B023
            # More than can have been under way, so that it is the new pod that trains, or is trained from.
            run.train_until(steps_before + 30 * STEPS_PER_UPDATE)
            until(
                lambda: (run.value("paramserver", "paramserver_version") or 0) > version_before,  # noqa: B023
                "newer weights are served",
            )
            recovered_s = time.monotonic() - killed_s
            allowed_s = RECOVERY_S * max(slow, slowness())
            report.append(f"{victim} {recovered_s:.1f} s (allowed {allowed_s:.0f} s)")
            assert recovered_s < allowed_s, report
            if victim == "learner-0":
                began_at = int(field(run.pod_events("learner-0", "group_formed")[-1], "steps"))
                assert began_at >= version_before * STEPS_PER_UPDATE, "lost what the server held"
                steps_per_s = (steps_before - measured_from[0]) / (killed_s - measured_from[1])
                assert steps_before - began_at < LOST_S * slow * steps_per_s
    with capsys.disabled():
        sys.stdout.write(f"\n  kill -9 to training again: {', '.join(report)}\n")

    lives = {start for start, _ in versions}
    assert len(lives) == 2  # the parameter server was killed once, and never died otherwise
    for life in lives:
        during = [version for start, version in versions if start == life]
        assert during == sorted(during), "the version went back"
    died = run.lines("pod_died")
    assert [field(line, "pod") for line in died] == ["actor-0", "paramserver", "learner-0"]
    assert {field(line, "exit_code") for line in died} == {"-9"}
    assert {field(line, "restart") for line in died} == {"1"}
