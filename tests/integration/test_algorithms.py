"""The agents of the papers, as a user asks for them: deep and recurrent, of all games, with a full replay."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from services.learner.checkpoint import read
from tests.integration.conftest import StartRun
from tests.integration.system import START_S, Run, rss_bytes, scrape
from tests.unit.learner.waiting import until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

STOP_S = 60.0
FIGURES = ("loss_total", "loss_policy", "loss_baseline", "loss_entropy", "entropy", "grad_norm")


def lines(run: Run) -> list[dict[str, Any]]:
    """The reports so far; the last one may still be on its way to the disk."""
    path = run.run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def stop(run: Run) -> None:
    run.interrupt()
    assert run.exit_code(STOP_S) == 0, run.log()


def test_the_large_agent_trains_on_pong_and_is_saved(start_run: StartRun) -> None:
    small = ("--actor.num_envs", "4", "--batch_size", "4", "--unroll_length", "5")
    run = start_run("--preset", "impala", "--env", "ALE/Pong-v5", "--network", "deep", "--lstm", *small)
    run.train_until(10 * 4 * 5)
    trained = until(lambda: [line for line in lines(run) if line["loss_total"] is not None], "figures")
    assert all(math.isfinite(trained[-1][name]) for name in FIGURES)
    assert 0 < trained[-1]["entropy"] < math.log(6) + 1e-6, "six actions, in float32"
    stop(run)
    saved = read(run.checkpoints()[-1])
    assert saved.trainer["version"] * 20 == saved.trainer["steps"] > 200
    weights = saved.trainer["network"]
    assert weights["core.lstm.weight_hh_l0"].shape == (4 * 256, 256)
    assert sum(tensor.ndim == 4 for tensor in weights.values()) == 15, "convolutions of the deep network"


def test_all_57_games_are_trained_and_reported_by_two_actors(start_run: StartRun) -> None:
    """64 emulators on one policy. Games are cut short, so that all of them end."""
    short = ("--unroll_length", "5", "--env.max_episode_frames", "200")
    run = start_run("--tasks", "atari57", "--actors", "2", *short)

    def every_game_has_ended_once() -> dict[str, Any] | None:
        assert run.alive, run.log()
        newest = lines(run)[-1:]
        return next((line for line in newest if all(t["episodes"] for t in line["tasks"].values())), None)

    line = until(every_game_has_ended_once, "episodes of all games", 2 * START_S)
    tasks = line["tasks"]
    assert len(tasks) == 57
    assert {"ALE/Alien-v5", "ALE/Pong-v5", "ALE/Zaxxon-v5"} <= set(tasks)
    assert all(task["steps"] > 0 for task in tasks.values())
    assert sum(task["steps"] for task in tasks.values()) == line["steps"]
    assert all(math.isfinite(task["episode_return"]) for task in tasks.values())
    assert len({task["episode_return"] for task in tasks.values()}) > 5, "each has its own"
    # A game of 200 frames is 50 steps, less those that the no-ops at its beginning took.
    assert all(0 < task["episode_length"] <= 50 for task in tasks.values())
    scores = sorted(task["human_normalised"] for task in tasks.values())
    assert line["human_normalised_median"] == pytest.approx(scores[28])
    seen = scrape(run.ports()["learner-0"])
    assert sum(name.startswith("impala_episode_return{") for name in seen) == 57
    playing = [field for actor in ("actor-0", "actor-1") for field in run.pod_events(actor, "playing")]
    assert len(playing) == 2
    assert all("num_envs=32 tasks=32" in line for line in playing)
    stop(run)


CAPACITY = 200_000
FRAMES_OF_CATCH_BYTES = 21 * 50 * 4
"""Of one rollout. Floats are not compressed, so that these take more room than those of an Atari game."""


def test_the_learner_holds_200_000_steps_of_replay_and_grows_by_nothing_else(start_run: StartRun) -> None:
    flags = ("--replay.ratio", "7", "--replay.capacity", str(CAPACITY), "--total_steps", "10_000_000")
    run = start_run(*flags)

    def held(name: str) -> float:
        assert run.alive, run.log()
        return run.value("learner-0", f"learner_replay_{name}") or 0.0

    until(lambda: held("steps") > 10_000, "replay begins", START_S)
    pod = run.pod("learner-0")
    assert pod is not None
    before, held_before = rss_bytes(pod.pid), held("bytes")
    until(lambda: held("steps") == CAPACITY, "it is full", 3 * START_S)
    run.train_until(run.steps() + 20_000)
    after, held_after = rss_bytes(pod.pid), held("bytes")
    assert held("steps") == held("capacity") == CAPACITY
    num_rollouts = CAPACITY / 20
    assert num_rollouts * FRAMES_OF_CATCH_BYTES < held_after < num_rollouts * (FRAMES_OF_CATCH_BYTES + 1000)
    grown = after - before
    assert grown < 1.25 * (held_after - held_before) + 10e6, (
        f"{grown / 1e6:.1f} MB, {held_after / 1e6:.1f} held"
    )
    stop(run)
