"""Every panel of the dashboard shows something of a real run, and every rule can be evaluated.

A real Prometheus with the recording rules and alerts scrapes parameter server, learners, actors and
evaluator. The run is of two Atari games, because only where a human's score is known is there a
human-normalised one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.dashboard import Panel, ask, expanded, panels
from services.local.plan import reserved_ports
from tests.conftest import RequireTool
from tests.integration.conftest import StartRun
from tests.integration.prometheus import Prometheus, running
from tests.integration.system import REPOSITORY, START_S, Pod, Run
from tests.unit.learner.waiting import until

pytestmark = pytest.mark.integration

DOCS = REPOSITORY / "docs"
SCRAPE_S = 1.0
WINDOW_S = 60.0
FIRST_RETURNS_S = 200.0
"""Until whole games of both tasks have ended, for the learner and the evaluator; a quiet machine takes 30."""

RUN = (
    *("--tasks", "breakout,space_invaders", "--actors", "2", "--learners", "2", "--actor.num_envs", "8"),
    *("--total_steps", "1000000000", "--checkpoint.interval_s", "5"),
)
EVALUATION = (
    *("--evaluator.interval_s", "0", "--evaluator.episodes", "1"),
    *("--evaluator.max_episode_steps", "200"),
)


def documented(name: str) -> Any:
    """A configuration of the documentation that may be used from anywhere."""
    config = yaml.safe_load((DOCS / name).read_text())
    config["rule_files"] = [str((DOCS / each).resolve()) for each in config["rule_files"]]
    intervals = ("scrape_interval", "scrape_timeout", "evaluation_interval")
    config["global"] = dict.fromkeys(intervals, f"{SCRAPE_S:g}s")
    return config


@pytest.fixture
def evaluated_run(start_run: StartRun, tmp_path: Path) -> Iterator[tuple[Run, Pod]]:
    """A run, and beside it an evaluator of it."""
    run = start_run(*RUN)
    actor = until(lambda: run.pod("actor-0"), "an actor lives", START_S)
    config = ["--config", str(run.run_dir / "config.json"), "--run_dir", str(tmp_path / "evaluated")]
    endpoint = ["--wire.paramserver_endpoint", actor.flag("--wire.paramserver_endpoint")]
    with reserved_ports(0, 1) as (port,):
        pod = Pod("evaluator", port, [*config, *endpoint, *EVALUATION], tmp_path / "evaluator.log")
        try:
            yield run, pod
        finally:
            pod.end()


def unanswered(prometheus: Prometheus, panel: Panel, release: str = "") -> list[str]:
    """The queries of a panel that show nothing, or nothing that is a number."""
    end_s = time.time()
    missing = []
    for expression, legend in panel.queries:
        query = expanded(expression, scrape_s=SCRAPE_S, step_s=5.0, release=release)
        if not ask(prometheus.url, query, legend, end_s - WINDOW_S, end_s, 5.0):
            missing.append(f"{panel.title}: {query}")
    return missing


@pytest.mark.timeout(600)
def test_every_panel_shows_something_of_a_real_run_and_every_rule_can_be_evaluated(
    evaluated_run: tuple[Run, Pod], require_tool: RequireTool, tmp_path: Path
) -> None:
    run, pod = evaluated_run
    until((run.run_dir / "targets.json").exists, "targets.json", START_S)
    other = tmp_path / "evaluator.json"
    labels = {"role": "evaluator", "pod": "evaluator"}
    other.write_text(json.dumps([{"targets": [f"127.0.0.1:{pod.port}"], "labels": labels}]))
    config = documented("prometheus.yml")
    (job,) = config["scrape_configs"]
    job["file_sd_configs"] = [{"files": [str(run.run_dir / "targets.json"), str(other)]}]

    with running(require_tool("prometheus"), config, tmp_path) as prometheus:

        def all_shown() -> bool:
            assert run.alive, run.log()
            assert pod.alive, pod.log()
            assert time.monotonic() < deadline_s, [
                each for panel in panels() for each in unanswered(prometheus, panel)
            ]
            return not any(unanswered(prometheus, panel) for panel in panels())

        deadline_s = time.monotonic() + FIRST_RETURNS_S
        until(all_shown, "all panels", 2 * FIRST_RETURNS_S)

        for series in (
            *("release:impala_actors_desired:count", "release:impala_learners_desired:count"),
            *("impala_learner_world_size", "sum(impala_learner_world_size * impala_learner_leads)"),
        ):
            until(lambda: {value for _, value in prometheus.query(series)} == {2}, series)  # noqa: B023
        rules = prometheus.rules()
        assert len(rules) >= 24
        assert {(rule["name"], rule["health"], rule.get("lastError", "")) for rule in rules} == {
            (rule["name"], "ok", "") for rule in rules
        }
        firing = prometheus.query('ALERTS{alertstate="firing"}')
        assert not firing

        # The checker sees what is not there: a name that is misspelt, what is no number, another release's.
        some = next(panel for panel in panels() if panel.title == "Entropy")
        ((expression, legend),) = some.queries
        assert not unanswered(prometheus, some)
        for broken in (expression.replace("entropy", "entrpy"), f"{expression} * NaN"):
            assert unanswered(prometheus, replace(some, queries=[(broken, legend)]))
        for panel in panels():
            assert len(unanswered(prometheus, panel, release="another")) == len(panel.queries), panel.title


def test_pods_that_kubernetes_tells_of_get_the_labels_that_everything_goes_by(
    require_tool: RequireTool, tmp_path: Path
) -> None:
    """As Kubernetes would tell of them: Debian's Prometheus cannot ask it."""
    meta = "__meta_kubernetes_"
    labels = {
        f"{meta}namespace": "ml",
        f"{meta}pod_name": "pong-impala-actor-7f-x",
        f"{meta}pod_phase": "Running",
        f"{meta}pod_container_port_name": "metrics",
        f"{meta}pod_label_app_kubernetes_io_instance": "pong",
        f"{meta}pod_label_app_kubernetes_io_component": "actor",
    }
    config = documented("prometheus-kubernetes.yml")
    (job,) = config["scrape_configs"]
    assert job.pop("kubernetes_sd_configs")[0]["role"] == "pod"
    job["static_configs"] = [
        {"targets": ["127.0.0.1:1"], "labels": labels},
        {"targets": ["127.0.0.1:2"], "labels": {**labels, f"{meta}pod_container_port_name": "rollouts"}},
        {"targets": ["127.0.0.1:3"], "labels": {**labels, f"{meta}pod_phase": "Succeeded"}},
    ]
    with running(require_tool("prometheus"), config, tmp_path) as prometheus:
        (target,) = until(lambda: prometheus.get("targets", state="active")["activeTargets"], "a target")
    assert target["labels"] == {
        "namespace": "ml",
        "release": "pong",
        "role": "actor",
        "pod": "pong-impala-actor-7f-x",
        "instance": "127.0.0.1:1",
        "job": "impala",
    }
