"""Two tasks, a recurrent network of a user's own, PopArt and replay in one run that is hurt and resumed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from services.learner.checkpoint import read
from services.ops.scrape import parse_metrics
from tests.integration.conftest import StartPod, StartRun
from tests.integration.networks import ONE_LAYER
from tests.integration.system import START_S, Run, field, get, processes_in, scrape
from tests.integration.test_bad_config import train
from tests.unit.learner.waiting import until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

STOP_S = 30.0
TOTAL_STEPS = 10_000_000
T, FRESH, REPLAYED = 20, 2, 6
TASKS = "[catch, {id: recall, name: remember, kwargs: {num_cues: 49, delay: 2}}]"
"""Both show 50 numbers. One has 3 actions and the other 49."""
FIRST = (FRESH + REPLAYED) * T
"""Steps of the first batch, which is fresh altogether."""
CAPACITY = 4000
PER_SEGMENT = CAPACITY // T // 32 + 1
VARIANT = (
    *("--tasks", TASKS, "--network", ONE_LAYER, "--lstm", "--network.lstm_size", "16"),
    *("--popart", "--loss.reward_clipping", "none"),
    *("--batch_size", str(FRESH + REPLAYED), "--replay.ratio", "3", "--replay.checkpoint"),
    *("--replay.capacity", str(CAPACITY), "--actor.num_envs", "4"),
)


def lines(run: Run) -> list[dict[str, Any]]:
    """The reports so far; the last one may still be on its way to the disk."""
    path = run.run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def restored(run: Run) -> tuple[int, str]:
    """How many rollouts the newest life of the learner took back from disk, and what was damaged."""
    line = run.pod_events("learner-0", "replay_restored")[-1]
    return int(field(line, "items")), field(line, "damaged")


def full_line(run: Run, steps: int) -> dict[str, Any]:
    """A report of more than ``steps`` and of an interval with updates, after episodes of both tasks."""

    def newest() -> dict[str, Any] | None:
        assert run.alive, run.log()
        for line in lines(run)[-1:]:
            episodes = all(task["episode_return"] is not None for task in line["tasks"].values())
            if line["steps"] > steps and line["replay_rejected_ratio"] is not None and episodes:
                return line
        return None

    return until(newest, f"a full line of more than {steps} steps", START_S)


def assert_ratio(run: Run, first: int) -> None:
    """Of what is counted after ``first`` fresh steps, three parts are replayed for one that is fresh.

    The two counters are not read at the same instant: a scrape before and one after tell how far one of them
    has moved meanwhile. One update is allowed, of which one is counted already and the other not yet.
    """
    port = run.ports()["learner-0"]
    fresh, replayed = "impala_learner_samples_total", "impala_learner_replayed_samples_total"

    def close_together() -> tuple[float, float, float] | None:
        before, now, after = (scrape(port) for _ in range(3))
        if not (before and now and after):
            return None
        least, most = ((each[fresh] - first) * REPLAYED / FRESH for each in (before, after))
        return (least, now[replayed], most) if most - least < 0.2 * least else None

    least, found, most = until(close_together, "scrapes close enough to tell")
    assert least - REPLAYED * T <= found <= most + REPLAYED * T


def await_more_than_the_disk_holds(run: Run) -> None:
    """Until the server has newer weights than a checkpoint that is just written: the next is seconds away."""
    old = run.checkpoints()[-1:]
    (path,) = until(lambda: new if (new := run.checkpoints()[-1:]) != old else None, "a checkpoint", START_S)
    version = (int(path.stem.removeprefix("step-")) - FIRST) // (FRESH * T) + 1
    until(lambda: (run.value("paramserver", "paramserver_version") or 0) > version, "newer weights", START_S)


def test_a_run_of_everything_at_once_trains_survives_its_learner_and_resumes(start_run: StartRun) -> None:
    run = start_run(*VARIANT, "--total_steps", str(TOTAL_STEPS), "--checkpoint.interval_s", "2")
    run.train_until(2 * CAPACITY)
    line = full_line(run, 2 * CAPACITY)
    assert set(line["tasks"]) == {"catch", "remember"}
    shares = [task["steps"] / line["steps"] for task in line["tasks"].values()]
    assert sum(shares) == pytest.approx(1.0)
    assert min(shares) > 0.4, "served evenly"
    assert line["tasks"]["catch"]["popart_sigma"] != line["tasks"]["remember"]["popart_sigma"]
    assert 0.0 <= line["replay_rejected_ratio"] < 1.0
    seen = scrape(run.ports()["learner-0"])
    for task in ("catch", "remember"):
        assert -1.0 <= seen[f'impala_episode_return{{task="{task}"}}'] <= 1.0
        assert seen[f'impala_learner_task_steps_total{{task="{task}"}}'] > 0
        assert seen[f'impala_popart_sigma{{task="{task}"}}'] > 0
    assert seen["impala_learner_replay_steps"] == seen["impala_learner_replay_capacity"] == CAPACITY
    assert seen["impala_learner_replay_age_versions"] > 0
    assert 0.0 <= seen["impala_learner_replay_rejected_ratio"] < 1.0
    assert "impala_learner_replay_log_lost_total" in seen
    assert_ratio(run, FIRST)
    assert seen['impala_learner_rollouts_total{result="stale"}'] == 0
    assert seen['impala_learner_rollouts_total{result="invalid"}'] == 0

    # Without a warning: what the disk held comes back, and nothing of what the parameter server held is lost.
    await_more_than_the_disk_holds(run)
    groups = len(run.pod_events("learner-0", "group_formed"))
    run.kill("learner-0")
    held = until(lambda: run.value("paramserver", "paramserver_version"), "the parameter server answers")
    formed = partial(run.pod_events, "learner-0", "group_formed")
    started = until(lambda: formed()[groups:], "it trains again", START_S)[0]
    assert run.pod_events("learner-0", "newer_weights")
    version, steps = int(field(started, "policy_version")), int(field(started, "steps"))
    assert version >= held > CAPACITY / (FRESH * T)
    assert steps == FIRST + (version - 1) * FRESH * T
    run.train_until(steps + 20 * FRESH * T)
    num_restored, damaged = restored(run)
    assert damaged == "null"
    assert CAPACITY // T - PER_SEGMENT <= num_restored <= CAPACITY // T, "but one that was being written"
    newest = full_line(run, steps)
    assert sum(task["steps"] for task in newest["tasks"].values()) == newest["steps"]

    run.interrupt()
    assert run.exit_code(STOP_S) == 0, run.log()
    stopped = read(run.checkpoints()[-1]).trainer
    statistics = stopped["network"]["baseline.mean_K"].tolist()

    # In order, and with a damaged segment: everything else is there, at the very step.
    num_lines = len(lines(run))
    segments = sorted((run.run_dir / "replay" / "learner-0").glob("*.replay"))
    segments[-3].write_bytes(b"x" * 100)
    resumed = start_run(resume=True)
    resumed.train_until(stopped["steps"] + 20 * FRESH * T)
    started = resumed.pod_events("learner-0", "started")[-1]
    assert len(resumed.pod_events("learner-0", "newer_weights")) == 1, "that of the life before"
    assert (int(field(started, "steps")), int(field(started, "policy_version"))) == (
        stopped["steps"],
        stopped["version"],
    )
    first_line = until(lambda: lines(resumed)[num_lines:], "a line of its own")[0]
    assert first_line["steps"] == stopped["steps"]
    assert [task["popart_mean"] for task in first_line["tasks"].values()] == statistics
    assert any(mean != 0 for mean in statistics)
    num_restored, damaged = restored(resumed)
    assert CAPACITY // T - PER_SEGMENT <= num_restored < CAPACITY // T
    assert segments[-3].name in damaged
    assert_ratio(resumed, 0)  # from its first batch on
    resumed.interrupt()
    assert resumed.exit_code(STOP_S) == 0, resumed.log()


def test_a_learner_without_replay_has_nothing_of_it(start_pod: StartPod, tmp_path: Path) -> None:
    learner = start_pod("learner", "--learner.log_interval_s", "0.2", "--replay.checkpoint")
    until(lambda: learner.lines("started"), "the learner starts", 60.0)
    page = until(lambda: get(learner.port, "/metrics")[1], "it answers")
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
