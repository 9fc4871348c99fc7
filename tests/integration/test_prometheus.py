"""A Prometheus finds all pods of a run through its targets.json, and sees them work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import RequireTool
from tests.integration.conftest import StartRun
from tests.integration.prometheus import running
from tests.integration.system import START_S, STEPS_PER_UPDATE
from tests.unit.learner.waiting import until

pytestmark = pytest.mark.integration

EVERYBODY = {("actor", "actor-0"): 1.0, ("learner", "learner-0"): 1.0, ("paramserver", "paramserver"): 1.0}
MOVING = {
    "actor": ("actor_env_steps_total", "actor_rollouts_sent_total", "actor_weights_version"),
    "learner": ("learner_samples_total", "learner_received_bytes_total", "learner_steps"),
    "paramserver": ("paramserver_publishes_total", "paramserver_sent_bytes_total", "paramserver_version"),
}


def test_a_prometheus_sees_all_roles_of_a_run_and_their_counters_move(
    start_run: StartRun, require_tool: RequireTool, tmp_path: Path
) -> None:
    prometheus = require_tool("prometheus")
    run = start_run("--total_steps", "1000000000")
    until((run.run_dir / "targets.json").exists, "targets.json", START_S)
    targets = {"files": [str(run.run_dir / "targets.json")], "refresh_interval": "1s"}
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"},
        "scrape_configs": [{"job_name": "impala", "file_sd_configs": [targets]}],
    }
    with running(prometheus, config, tmp_path) as server:

        def query(expression: str) -> dict[tuple[str, str], float]:
            """(role, pod) -> value."""
            return {(labels["role"], labels["pod"]): value for labels, value in server.query(expression)}

        until(lambda: query("up") == EVERYBODY, "all are up", START_S)
        run.train_until(10 * STEPS_PER_UPDATE)
        for role, metrics in MOVING.items():
            (pod,) = (key for key in EVERYBODY if key[0] == role)
            for metric in (f"impala_{name}" for name in metrics):
                first = until(lambda: query(metric).get(pod), metric)  # noqa: B023
                until(
                    lambda: query(metric).get(pod, first) > first,  # noqa: B023
                    f"{metric} moves on from {first}",
                )
        # A scrape that takes too long hides a pod until the next.
        until(lambda: query("count by (role, pod) (impala_build_info)") == EVERYBODY, "one of each")
