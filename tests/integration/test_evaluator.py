"""Evaluation from outside: the command on checkpoints of real runs, and the pod beside a running system."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import StartPod, StartRun
from tests.integration.system import START_S, STEPS_PER_UPDATE, Pod, Process, Run, field, get
from tests.integration.test_stop import catches_sigterm
from tests.unit.learner.waiting import until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

STOP_S = 10.0
TRAINING_S = 240.0


# ---------------------------------------------------------------------------------------------- the command


def evaluate(log: Path, *flags: str) -> str:
    """What `impala evaluate` writes, once it has ended well."""
    process = Process([sys.executable, "-m", "services.cli", "evaluate", *flags], log)
    try:
        assert process.exit_code(START_S) == 0, process.log()
    finally:
        process.end()
    return process.log()


def trained(run: Run) -> dict[str, Any]:
    """The last line of the training's own reports, once it is complete."""
    assert run.exit_code(TRAINING_S) == 0, run.log()
    line: dict[str, Any] = json.loads((run.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    return line


def test_an_evaluation_agrees_with_the_end_of_the_training_curve(start_run: StartRun, tmp_path: Path) -> None:
    """Of 200 sampled episodes and of the curve's last 100: three deviations of their difference, at a mean
    of 0.9, where it is larger than beyond."""
    schedule = ("--optimiser.schedule", "constant", "--learning-rate", "0.001")
    run = start_run("--total_steps", "300000", "--network.hidden_size", "128", *schedule)
    curve = trained(run)["episode_return"]
    assert curve >= 0.9, "Catch is not solved"
    shown = evaluate(tmp_path / "evaluate.log", str(run.run_dir), "--episodes", "200")
    steps = int(run.checkpoints()[-1].stem.removeprefix("step-"))
    output = run.run_dir / "evaluations" / f"step-{steps}-sampled.json"
    assert f"every return is in {output}" in shown
    task = json.loads(output.read_text())["tasks"]["catch"]
    assert task["episodes"] == len(task["returns"]) == 200
    assert set(task["returns"]) <= {-1.0, 1.0}
    assert set(task["lengths"]) == {9}
    deviation = math.sqrt((1 - 0.9**2) * (1 / 200 + 1 / 100))
    assert abs(task["mean"] - curve) <= 3 * deviation


def test_an_untrained_policy_is_worth_what_chance_is(start_run: StartRun, tmp_path: Path) -> None:
    """The paddle meets the ball in about one of five columns: the mean is far below that of a trained one."""
    run = start_run("--total_steps", "640", "--learning-rate", "1e-9")
    trained(run)
    evaluate(tmp_path / "evaluate.log", str(run.run_dir), "--episodes", "200")
    output = run.run_dir / "evaluations" / "step-640-sampled.json"
    assert json.loads(output.read_text())["mean"] < -0.2


def test_both_tasks_of_a_recurrent_run_with_popart_are_reported(start_run: StartRun, tmp_path: Path) -> None:
    tasks = [{"id": "catch", "name": "fair"}, {"id": "catch", "name": "again", "kwargs": {"rows": 10}}]
    run = start_run("--tasks", json.dumps(tasks), "--lstm", "--popart", "--total_steps", "6400")
    trained(run)
    output = tmp_path / "results.json"
    shown = evaluate(
        tmp_path / "evaluate.log",
        *(str(run.run_dir), "--greedy", "--episodes", "20", "--workers", "2", "--json", str(output)),
    )
    assert re.search(r"^fair +20 ", shown, re.M)
    assert re.search(r"^again +20 ", shown, re.M)
    results = json.loads(output.read_text())
    assert list(results["tasks"]) == ["fair", "again"]
    assert results["mean"] == sum(task["mean"] for task in results["tasks"].values()) / 2
    assert results["actions"] == "greedy"


# ------------------------------------------------------------------------------------------------ the pod


def stops(pod: Pod) -> None:
    """SIGTERM ends it in time and without complaint."""
    pod.terminate()
    assert pod.exit_code(STOP_S) == 0, pod.log()
    assert not [line for line in pod.log().splitlines() if " error " in line], pod.log()


def test_an_evaluator_beside_a_running_system_plays_newer_and_newer_versions_and_takes_no_seat(
    start_pod: StartPod, tmp_path: Path
) -> None:
    flags = ("--evaluator.interval_s", "0", "--evaluator.episodes", "5")
    evaluator = start_pod("evaluator", *flags)
    until(lambda: evaluator.lines("no_news"), "it misses the parameter server", START_S)
    assert get(evaluator.port, "/healthz")[0] == 200
    assert get(evaluator.port, "/readyz") == (503, "parameter server not reachable\n")

    paramserver, _, _ = (start_pod(role) for role in ("paramserver", "learner", "actor"))
    until(lambda: evaluator.value("evaluator_rounds_total") >= 2, "two rounds", START_S)
    assert evaluator.ready()
    version = evaluator.value("evaluator_policy_version")
    assert version > 0
    assert -1 <= evaluator.value("evaluator_return", task="catch", statistic="mean") <= 1
    assert evaluator.value("evaluator_episodes_total") >= 10
    assert 0 < evaluator.value("evaluator_weights_age_seconds") < START_S
    assert paramserver.value("paramserver_seats") == 1, "the actor's"

    stops(evaluator)
    assert paramserver.value("paramserver_seats") == 1
    lines = reported(tmp_path / "run")
    versions = [line["version"] for line in lines]
    assert len(versions) >= 2
    assert versions == sorted(set(versions)), "each is newer than the one before"
    assert all(len(line["tasks"]["catch"]["returns"]) == 5 for line in lines)


def reported(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]


def test_an_evaluator_plays_the_last_weights_of_a_run_without_waiting(
    start_pod: StartPod, tmp_path: Path
) -> None:
    for role in ("paramserver", "learner", "actor"):
        start_pod(role, "--total_steps", str(200 * STEPS_PER_UPDATE))
    evaluator = start_pod("evaluator", "--evaluator.interval_s", "3600", "--evaluator.episodes", "2")
    until(
        lambda: any(field(line, "policy_version") == "200" for line in evaluator.lines("round")),
        "a round with the last version",
        2 * START_S,
    )
    last = reported(tmp_path / "run")[-1]
    assert (last["version"], last["steps"]) == (200, 200 * STEPS_PER_UPDATE)
    stops(evaluator)


def test_an_evaluator_stops_in_the_middle_of_a_round(start_pod: StartPod, tmp_path: Path) -> None:
    for role in ("paramserver", "learner"):
        start_pod(role)
    evaluator = start_pod("evaluator", "--evaluator.episodes", "100000000")
    until(lambda: evaluator.value("evaluator_episodes_total") > 0, "it plays", START_S)
    stops(evaluator)
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()


def test_an_environment_that_does_not_open_ends_the_evaluator_with_what_there_is_to_mend(
    start_pod: StartPod,
) -> None:
    refusing = ("--env", "tests.unit.evaluator.homemade:refusing")
    for role in ("paramserver", "learner"):
        start_pod(role, *refusing)
    evaluator = start_pod("evaluator", *refusing)
    assert evaluator.exit_code(START_S) == 2
    assert "\nimpala evaluator: env.kwargs.dataset_path = '': the images are missing\n" in evaluator.log()
    assert "Traceback" not in evaluator.log()


def test_an_evaluator_that_is_stopped_while_it_still_starts_ends_cleanly(start_pod: StartPod) -> None:
    evaluator = start_pod("evaluator")
    until(lambda: catches_sigterm(evaluator.pid), "it has a handler", START_S)
    evaluator.terminate()
    assert evaluator.exit_code(START_S) == 0, evaluator.log()
