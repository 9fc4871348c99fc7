"""The evaluator's rounds: which weights they play and when, and what they leave behind. Time is made up."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
from prometheus_client import CollectorRegistry

from services.config import EnvConfig
from services.evaluator.games import Games
from services.evaluator.loop import EvaluatorLoop, Weights
from services.evaluator.results import TaskResult
from services.ops.health import Heartbeat
from services.ops.metrics import EvaluatorMetrics
from services.rl.tasks import Task
from services.wire.messages import Episode, RunState
from services.wire.subscriber import Snapshot, Subscriber
from tests.unit.learner.disk import full_disk

ROUND_S = 7.0
INTERVAL_S = 60.0
TASKS = ("ALE/Pong-v5", "ALE/Breakout-v5")


def snapshot(version: int) -> Snapshot[Weights]:
    return Snapshot(version=version, steps=640 * version, weights={}, received_s=0.0)


@dataclass
class Scene:
    """Stands for the weights' subscriber, the games, the clock and the pod's end at once."""

    report: Path
    tasks: tuple[str, ...] = TASKS
    interval_s: float = INTERVAL_S
    now_s: float = 100.0
    newest: Snapshot[Weights] | None = None
    state: RunState = "waiting"
    played: list[tuple[float, int, int]] = field(default_factory=list)
    """(time, task, version)"""
    events: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    in_game: Callable[[], None] = lambda: None
    stopped: bool = False
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def at(self, time_s: float, event: Callable[[], None]) -> None:
        self.events.append((time_s, event))

    def publish_at(self, time_s: float, version: int, state: RunState = "training") -> None:
        def publish() -> None:
            self.newest, self.state = snapshot(version), state

        self.at(time_s, publish)

    def run(self, until_s: float) -> None:
        """From 100 s on; fails if the loop does not end at ``until_s``."""

        def stop() -> None:
            self.stopped = True

        self.at(until_s, stop)
        games = Table(self)
        EvaluatorLoop(
            weights=cast(Subscriber[Weights], self),
            games=cast(Games, games),
            interval_s=self.interval_s,
            report=self.report,
            metrics=EvaluatorMetrics(self.registry),
            heartbeat=Heartbeat(),
            stopping=cast(threading.Event, self),
            clock=lambda: self.now_s,
        ).run()
        assert self.stopped

    def age_s(self) -> float:
        return 12.5

    # what ``stopping`` is asked
    def is_set(self) -> bool:
        return self.stopped

    def wait(self, timeout_s: float) -> bool:
        self.advance(timeout_s)
        return self.stopped

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        due = [event for time_s, event in self.events if time_s <= self.now_s]
        self.events = [(time_s, event) for time_s, event in self.events if time_s > self.now_s]
        for event in due:
            event()

    def versions(self) -> list[int]:
        """Of the rounds that were played to their end."""
        lines = self.report.read_text().splitlines() if self.report.exists() else []
        return [json.loads(line)["version"] for line in lines]

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"impala_evaluator_{name}", labels)


@dataclass
class Table:
    """Stands for ``Games``: each task takes half a round, and its returns are its version and ten more."""

    scene: Scene

    @property
    def tasks(self) -> tuple[Task, ...]:
        return tuple(Task(name=f"my {name}", env=EnvConfig(id=name)) for name in self.scene.tasks)

    def play(
        self,
        number: int,
        version: int,
        weights: Weights,
        *,
        stopping: threading.Event,
        on_step: Callable[[], None],
        on_episode: Callable[[Episode], None],
    ) -> TaskResult | None:
        self.scene.played.append((self.scene.now_s, number, version))
        self.scene.in_game()
        self.scene.advance(ROUND_S / len(self.scene.tasks))
        if stopping.is_set():
            return None
        episodes = tuple(Episode(episode_return=r, length=3) for r in (float(version), version + 10.0))
        for episode in episodes:
            on_episode(episode)
        task = self.tasks[number]
        return TaskResult(name=task.name, env=task.env, episodes=episodes)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(report=tmp_path / "run" / "evaluations.jsonl")


# ---------------------------------------------------------------------------------------------- when, what


def test_the_first_round_waits_for_weights_and_for_nothing_else(scene: Scene) -> None:
    scene.publish_at(110.0, 3)
    scene.run(until_s=150.0)
    assert scene.played == [(110.0, 0, 3), (110.0 + ROUND_S / 2, 1, 3)]


def test_rounds_begin_an_interval_apart_with_the_newest_weights(scene: Scene) -> None:
    for version in range(1, 100):
        scene.publish_at(100.0 + 2 * version, version)
    scene.run(until_s=230.0)
    begun = [(time_s, version) for time_s, task, version in scene.played if task == 0]
    assert begun == [(102.0, 1), (162.0, 31), (222.0, 61)]


def test_a_round_plays_one_version_from_beginning_to_end(scene: Scene) -> None:
    scene.publish_at(101.0, 1)
    scene.publish_at(102.0, 2)  # in the first task
    scene.run(until_s=150.0)
    assert [(task, version) for _, task, version in scene.played] == [(0, 1), (1, 1)]
    assert scene.versions() == [1]


def test_without_an_interval_rounds_follow_one_another(scene: Scene) -> None:
    scene.interval_s = 0.0
    scene.publish_at(101.0, 1)
    scene.publish_at(102.0, 2)
    scene.run(until_s=150.0)
    begun = [(time_s, version) for time_s, task, version in scene.played if task == 0]
    assert begun == [(101.0, 1), (101.0 + ROUND_S, 2)]


def test_a_version_is_played_once_and_an_older_one_of_a_run_that_went_back_again(scene: Scene) -> None:
    scene.publish_at(101.0, 5)
    scene.publish_at(300.0, 4)
    scene.run(until_s=500.0)
    assert scene.versions() == [5, 4]


def test_the_last_weights_of_a_run_are_played_at_once_and_only_once(scene: Scene) -> None:
    scene.publish_at(101.0, 1)
    scene.publish_at(103.0, 8, state="complete")
    scene.run(until_s=1000.0)
    begun = [(time_s, version) for time_s, task, version in scene.played if task == 0]
    assert begun == [(101.0, 1), (101.0 + ROUND_S, 8)]


def test_a_run_that_goes_on_after_its_end_is_played_again(scene: Scene) -> None:
    scene.publish_at(101.0, 8, state="complete")
    scene.publish_at(300.0, 9, state="training")
    scene.run(until_s=400.0)
    assert scene.versions() == [8, 9]


def test_a_stop_in_the_middle_of_a_round_reports_the_tasks_that_were_played_and_no_round(
    scene: Scene,
) -> None:
    """A round may take hours, and gauges of tasks need not wait for it."""
    scene.publish_at(101.0, 1)
    scene.run(until_s=101.0 + 0.75 * ROUND_S)
    assert [task for _, task, _ in scene.played] == [0, 1]
    assert scene.value("return", task="my ALE/Pong-v5", statistic="mean") == 6
    assert scene.value("human_normalised_score", task="my ALE/Pong-v5") == pytest.approx(100 * 26.7 / 35.3)
    assert scene.value("return", task="my ALE/Breakout-v5", statistic="mean") is None
    assert scene.value("suite_human_normalised_score", statistic="mean", capped="false") is None
    assert scene.versions() == []
    assert scene.value("rounds_total") == 0
    assert scene.value("policy_version") == -1


# ------------------------------------------------------------------------------------------ what is reported


def test_a_round_is_a_line_with_all_its_results(scene: Scene) -> None:
    scene.publish_at(101.0, 6)
    scene.run(until_s=150.0)
    [text] = scene.report.read_text().splitlines()
    line = json.loads(text)
    assert (line["version"], line["steps"], line["seconds"], line["mean"]) == (6, 3840, 7.0, 11.0)
    assert line["tasks"]["my ALE/Pong-v5"]["returns"] == [6.0, 16.0]
    assert line["tasks"]["my ALE/Breakout-v5"]["std"] == 5.0


def test_a_round_is_exported(scene: Scene) -> None:
    """Mean 11: of Pong (-20.7, 14.6) 89.8 %, of Breakout (1.7, 30.5) 32.3 %."""
    scene.publish_at(101.0, 6)
    scene.run(until_s=150.0)
    for statistic, value in (("mean", 11.0), ("median", 11.0), ("std", 5.0)):
        assert scene.value("return", task="my ALE/Pong-v5", statistic=statistic) == value
    pong, breakout = 100 * 31.7 / 35.3, 100 * 9.3 / 28.8
    score = "human_normalised_score"
    assert scene.value(score, task="my ALE/Pong-v5") == pytest.approx(pong)
    assert scene.value(score, task="my ALE/Breakout-v5") == pytest.approx(breakout)
    for statistic in ("mean", "median"):
        for capped in ("true", "false"):
            over_tasks = scene.value(f"suite_{score}", statistic=statistic, capped=capped)
            assert over_tasks == pytest.approx((pong + breakout) / 2)
    assert scene.value("policy_version") == 6
    assert scene.value("steps") == 3840
    assert scene.value("round_seconds") == ROUND_S
    assert scene.value("rounds_total") == 1
    assert scene.value("episodes_total") == 4


def test_caps_are_told_apart(scene: Scene) -> None:
    """Version 300: mean 305, over 900 % of both."""
    scene.publish_at(101.0, 300)
    scene.run(until_s=150.0)
    suite = "suite_human_normalised_score"
    assert scene.value(suite, statistic="mean", capped="true") == 100
    assert (scene.value(suite, statistic="mean", capped="false") or 0) > 900


def test_a_task_without_a_human_has_no_score(scene: Scene) -> None:
    scene.tasks = ("catch",)
    scene.publish_at(101.0, 1)
    scene.run(until_s=150.0)
    assert scene.value("return", task="my catch", statistic="mean") == 6
    assert scene.value("human_normalised_score", task="my catch") is None
    assert scene.value("suite_human_normalised_score", statistic="mean", capped="true") is None


def test_how_old_the_newest_weights_are_is_told_with_every_scrape(scene: Scene) -> None:
    scene.run(until_s=105.0)
    assert scene.value("weights_age_seconds") == 12.5


def test_before_the_first_round_nothing_is_claimed(scene: Scene) -> None:
    scene.run(until_s=105.0)
    assert scene.value("policy_version") == -1
    assert math.isnan(scene.value("round_seconds") or 0.0)
    assert not scene.report.exists()


def test_a_full_disk_costs_lines_and_no_rounds(scene: Scene) -> None:
    scene.interval_s = 0.0
    scene.publish_at(101.0, 1)
    scene.run(until_s=150.0)
    (whole,) = scene.versions()
    again = Scene(report=scene.report, interval_s=0.0)
    again.publish_at(101.0, 2)
    with full_disk(scene.report.stat().st_size + 10):
        again.run(until_s=150.0)
    assert again.value("rounds_total") == 1
    assert scene.versions() == [whole], "half a line would spoil the next one"
    last = Scene(report=scene.report)
    last.publish_at(101.0, 3)
    last.run(until_s=150.0)
    assert scene.versions() == [1, 3]
