"""Two tasks, a recurrent network of a user's own, PopArt and replay in one run that is hurt and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.learner.checkpoint import read
from services.ops.scrape import parse_metrics
from tests.integration.conftest import StartPod, StartRun
from tests.integration.networks import ONE_LAYER
from tests.integration.system import Run, field, get, processes_in, scrape
from tests.integration.test_bad_config import train
from tests.unit.learner.waiting import until

pytestmark = pytest.mark.integration

STOP_S = 30.0
TOTAL_STEPS = 10_000_000
T, FRESH, REPLAYED = 20, 2, 6
TASKS = "[catch, {id: recall, name: remember, kwargs: {num_cues: 49, delay: 2}}]"
"""Both show 50 numbers. One has 3 actions and the other 49."""
CAPACITY = 4000
VARIANT = (
    *("--tasks", TASKS, "--network", ONE_LAYER, "--lstm", "--network.lstm_size", "16", "--popart"),
    *("--batch_size", str(FRESH + REPLAYED), "--replay.ratio", "3", "--replay.checkpoint"),
    *("--replay.capacity", str(CAPACITY), "--actor.num_envs", "4"),
)


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]


def restored(run: Run) -> tuple[int, str]:
    """How many rollouts the newest life of the learner took back from disk, and what was damaged."""
    line = run.pod_events("learner", "replay_restored")[-1]
    return int(field(line, "items")), field(line, "damaged")


def both_tasks_have_ended_episodes(run: Run) -> dict[str, Any] | None:
    newest = lines(run)[-1]
    return newest if all(task["episode_return"] is not None for task in newest["tasks"].values()) else None


def test_a_run_of_everything_at_once_trains_survives_its_learner_and_resumes(start_run: StartRun) -> None:
    run = start_run(*VARIANT, "--total_steps", str(TOTAL_STEPS), "--checkpoint.interval_s", "2")
    run.train_until(2 * CAPACITY)
    line = until(lambda: both_tasks_have_ended_episodes(run), "a line with episodes of both tasks")
    assert set(line["tasks"]) == {"catch", "remember"}
    shares = [task["steps"] / line["steps"] for task in line["tasks"].values()]
    assert sum(shares) == pytest.approx(1.0)
    assert min(shares) > 0.4, "served evenly"
    assert line["tasks"]["catch"]["popart_sigma"] != line["tasks"]["remember"]["popart_sigma"]
    assert 0.0 <= line["replay_rejected_ratio"] < 1.0
    seen = scrape(run.ports()["learner"])
    for task in ("catch", "remember"):
        assert -1.0 <= seen[f'impala_episode_return{{task="{task}"}}'] <= 1.0
        assert seen[f'impala_learner_task_steps_total{{task="{task}"}}'] > 0
        assert seen[f'impala_popart_sigma{{task="{task}"}}'] > 0
    assert seen["impala_learner_replay_steps"] == seen["impala_learner_replay_capacity"] == CAPACITY
    assert seen["impala_learner_replay_age_versions"] > 0
    assert 0.0 <= seen["impala_learner_replay_rejected_ratio"] < 1.0
    assert seen["impala_learner_replay_log_lost_total"] == 0
    # The first batch of eight is all fresh, and may be counted already where the other is not yet.
    fresh, replayed = seen["impala_learner_samples_total"], seen["impala_learner_replayed_samples_total"]
    first = (FRESH + REPLAYED) * T
    assert abs((fresh - first) * REPLAYED / FRESH - replayed) <= REPLAYED * T
    assert seen['impala_learner_rollouts_total{result="stale"}'] == 0
    assert seen['impala_learner_rollouts_total{result="invalid"}'] == 0

    # Without a warning: the memory comes back but for what was on its way to the disk; nothing rolls back.
    before = run.steps()
    run.kill("learner")
    run.train_until(before + 20 * FRESH * T)
    num_restored, damaged = restored(run)
    assert damaged == "null"
    assert 0.85 * CAPACITY <= num_restored * T <= CAPACITY, "all but four segments of a 32nd"
    started = run.pod_events("learner", "started")[-1]
    assert field(started, "newer_weights") == "true"
    assert int(field(started, "steps")) > before - 50 * FRESH * T
    newest = until(lambda: both_tasks_have_ended_episodes(run), "a line of its second life")
    assert sum(task["steps"] for task in newest["tasks"].values()) == newest["steps"]

    run.interrupt()
    assert run.exit_code(STOP_S) == 0, run.log()
    stopped = read(run.checkpoints()[-1]).trainer
    statistics = stopped["network"]["baseline.mean_K"].tolist()

    # In order, and with a damaged segment: everything else is there, at the very step.
    num_lines = len(lines(run))
    segments = sorted((run.run_dir / "replay" / "learner").glob("*.replay"))
    segments[-3].write_bytes(b"x" * 100)
    resumed = start_run(resume=True)
    resumed.train_until(stopped["steps"] + 20 * FRESH * T)
    started = resumed.pod_events("learner", "started")[-1]
    assert field(started, "newer_weights") == "false"
    assert (int(field(started, "steps")), int(field(started, "policy_version"))) == (
        stopped["steps"],
        stopped["version"],
    )
    first_line = lines(resumed)[num_lines]
    assert first_line["steps"] == stopped["steps"]
    assert [task["popart_mean"] for task in first_line["tasks"].values()] == statistics
    assert any(mean != 0 for mean in statistics)
    num_restored, damaged = restored(resumed)
    assert CAPACITY // T - 10 <= num_restored < CAPACITY // T
    assert segments[-3].name in damaged
    seen = scrape(resumed.ports()["learner"])
    replayed = seen["impala_learner_replayed_samples_total"]
    assert abs(seen["impala_learner_samples_total"] * REPLAYED / FRESH - replayed) <= REPLAYED * T, (
        "from its first batch on"
    )
    resumed.interrupt()
    assert resumed.exit_code(STOP_S) == 0, resumed.log()


def test_a_learner_without_replay_has_nothing_of_it(start_pod: StartPod, tmp_path: Path) -> None:
    learner = start_pod("learner", "--learner.log_interval_s", "0.2", "--replay.checkpoint")
    until(lambda: learner.lines("started"), "the learner starts", 60.0)
    status, page = until(lambda: get(learner.port, "/metrics"), "it answers")
    assert status == 200
    assert "impala_learner_samples_total" in parse_metrics(page)
    assert "replay" not in page
    learner.terminate()
    assert learner.exit_code(STOP_S) == 0
    assert not learner.lines("replay_restored")
    assert not (tmp_path / "run" / "replay").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tasks", "catch,catsh"], ["catsh", "did you mean catch"]),
        (["--tasks", "catch,catch"], ["tasks", "2 are called 'catch'", "names"]),
        (
            ["--tasks", "dmlab30", "--actor.num_envs", "4", "--actors", "7"],
            ["tasks", "30", "actors x actor.num_envs = 28"],
        ),
        (
            ["--tasks", "catch,recall"],
            ["observation_shape of catch is (50,)", "of recall is (3,)", "one policy plays them all"],
        ),
        (["--env", "catch", "--replay.ratio", "4"], ["replay.ratio = 4", "batch_size = 32", "30 or 35"]),
        (
            ["--env", "catch", "--replay.ratio", "3", "--replay.recurrent_state", "recomputed"],
            ["replay.recurrent_state", "network.lstm"],
        ),
        (["--env", "catch", "--popart.step_size", "0"], ["popart.step_size", "greater than 0"]),
        (["--env", "catch", "--network.lstm_size", "0"], ["network.lstm_size", "greater than or equal to 1"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("-") else "",
)
def test_settings_of_variants_that_cannot_work_are_one_line_and_start_nothing(
    tmp_path: Path, flags: list[str], words: list[str]
) -> None:
    exit_code, told = train(tmp_path, *flags)
    assert (exit_code, len(told)) == (2, 1), told
    assert told[0].startswith("impala: ")
    assert all(word in told[0] for word in words), told[0]
    assert list(tmp_path.iterdir()) == []
    assert not processes_in(tmp_path)
