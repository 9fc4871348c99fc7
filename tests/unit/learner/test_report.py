"""The lines, gauges and events that a run leaves behind, also when there is no room for them."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from services.learner.episodes import Episodes
from services.learner.report import Reporter
from services.learner.trainer import Figures
from services.ops.metrics import ReplayMetrics
from services.wire.messages import Episode
from tests.unit.learner.disk import full_disk
from tests.unit.learner.rollouts import Counts

NAN = float("nan")


def figures(**changes: Any) -> Figures:
    values: dict[str, Any] = {
        "updates": 2,
        "loss_total": 4.0,
        "loss_policy": 1.0,
        "loss_baseline": 3.5,
        "loss_entropy": -0.5,
        "entropy": 1.1,
        "rho_clipped_ratio": 0.25,
        "grad_norm": 7.0,
        "nonfinite_updates": 0,
        "replay_rejected_ratio": NAN,
        "popart_mean": (),
        "popart_sigma": (),
        "task_steps": (640,),
        "total_task_steps": (640,),
    }
    return Figures(**values | changes)


NO_UPDATES = figures(
    updates=0,
    loss_total=NAN,
    loss_policy=NAN,
    loss_baseline=NAN,
    loss_entropy=NAN,
    entropy=NAN,
    rho_clipped_ratio=NAN,
    grad_norm=NAN,
    task_steps=(0,),
)


class Scene:
    """A reporter whose clock only moves when it is told to."""

    def __init__(
        self, run_dir: Path, task_ids: Mapping[str, str] = {"catch": "catch"}, *, replay: bool = False
    ) -> None:
        self.now_s = 100.0
        self.run_dir = run_dir
        self.counts = Counts()
        self.episodes = Episodes(list(task_ids.values()))
        self.reporter = Reporter(
            run_dir=run_dir,
            tasks=list(task_ids),
            frame_skip=4,
            metrics=self.counts.metrics,
            replay_metrics=ReplayMetrics(self.counts.registry) if replay else None,
            clock=lambda: self.now_s,
        )

    def report(self, steps: int, after_s: float = 5.0, **changes: Any) -> dict[str, Any]:
        """Report ``after_s`` later; the line that was written."""
        self.now_s += after_s
        arguments: dict[str, Any] = {
            "figures": figures(),
            "episodes": self.episodes,
            "version": steps // 640,
            "steps": steps,
            "learning_rate": 0.5,
        }
        self.reporter.report(**arguments | changes)
        return self.lines()[-1]

    def lines(self) -> list[dict[str, Any]]:
        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        text = (self.run_dir / "metrics.jsonl").read_text(encoding="utf-8")
        assert text.endswith("\n")
        return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]

    def events(self) -> list[Any]:
        """What TensorBoard would read, its checksums checked."""
        (path,) = (self.run_dir / "tensorboard").glob("events.out.tfevents.*")
        data = path.read_bytes()
        events, at = [], 0
        while at < len(data):
            length, length_crc = struct.unpack_from("<QI", data, at)
            assert masked_crc32c(data[at : at + 8]) == length_crc
            body = data[at + 12 : at + 12 + length]
            assert struct.unpack_from("<I", data, at + 12 + length) == (masked_crc32c(body),)
            events.append(Event.FromString(body))
            at += 16 + length
        return events

    def gauge(self, name: str, **labels: str) -> float | None:
        return self.counts.registry.get_sample_value(f"impala_{name}", labels)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "run")


def episode(episode_return: float, length: int = 10) -> Episode:
    return Episode(episode_return=episode_return, length=length)


# --- a line ----------------------------------------------------------------------------------------


def test_a_line_says_where_the_run_is(scene: Scene) -> None:
    line = scene.report(6400)
    assert (line["steps"], line["frames"], line["version"], line["learning_rate"]) == (6400, 25600, 10, 0.5)
    assert (line["loss_total"], line["loss_entropy"], line["grad_norm"]) == (4.0, -0.5, 7.0)
    assert line["time"] > 1.6e9


def test_steps_per_second_are_those_of_the_interval(scene: Scene) -> None:
    assert scene.report(64_000)["steps_per_second"] == 0  # a resumed run has not trained these just now
    assert scene.report(65_000, after_s=5.0)["steps_per_second"] == 200
    assert scene.report(65_000, after_s=5.0)["steps_per_second"] == 0
    assert scene.report(66_000, after_s=0.5)["steps_per_second"] == 2000


def test_two_reports_at_the_same_moment_are_no_error(scene: Scene) -> None:
    scene.report(640)
    assert math.isfinite(scene.report(640, after_s=0.0)["steps_per_second"])


def test_lag_and_waiting_are_those_of_the_interval(scene: Scene) -> None:
    scene.reporter.batch([0, 1, 5], 1.0)
    scene.reporter.waited(0.5)
    scene.reporter.batch([2], 1.0)
    line = scene.report(640, after_s=5.0)
    assert (line["policy_lag_mean"], line["policy_lag_max"], line["wait_ratio"]) == (2.0, 5, 0.5)
    line = scene.report(640, after_s=5.0)
    assert (line["policy_lag_mean"], line["policy_lag_max"], line["wait_ratio"]) == (None, None, 0.0)


def test_returns_are_recent_and_of_the_interval(scene: Scene) -> None:
    for episode_return in (1.0, 3.0):
        scene.episodes.add(0, episode(episode_return))
    line = scene.report(640)
    assert (line["episodes"], line["episode_return"], line["interval_episodes"]) == (2, 2.0, 2)
    scene.episodes.add(0, episode(8.0, length=40))
    line = scene.report(1280)
    assert (line["episodes"], line["episode_return"], line["episode_length"]) == (3, 4.0, 20.0)
    assert (line["interval_episodes"], line["interval_return"], line["interval_return_max"]) == (1, 8.0, 8.0)


def test_a_line_without_updates_or_episodes_holds_nulls_and_no_nan(scene: Scene) -> None:
    line = scene.report(0, figures=NO_UPDATES)
    absent = {key for key, value in line.items() if value is None}
    assert absent == {
        *("episode_return", "episode_length", "interval_return", "interval_return_max"),
        *("policy_lag_mean", "policy_lag_max"),
        *("loss_total", "loss_policy", "loss_baseline", "loss_entropy", "entropy"),
        *("rho_clipped_ratio", "grad_norm"),
    }


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_no_figure_is_written_that_json_cannot_hold(scene: Scene, value: float) -> None:
    assert scene.report(640, figures=figures(loss_total=value))["loss_total"] is None


def test_returns_whose_sum_overflows_are_no_figure(scene: Scene) -> None:
    scene.episodes.add(0, episode(1.7e308))
    scene.episodes.add(0, episode(1.7e308))
    assert scene.report(640)["episode_return"] is None


# --- what Prometheus and TensorBoard see -------------------------------------------------------------


def test_gauges_are_set(scene: Scene) -> None:
    scene.episodes.add(0, episode(3.0, length=12))
    scene.report(640, figures=figures(nonfinite_updates=2))
    assert {term: scene.gauge("learner_loss", term=term) for term in ("total", "policy", "baseline")} == {
        "total": 4.0,
        "policy": 1.0,
        "baseline": 3.5,
    }
    assert scene.gauge("learner_loss", term="entropy") == -0.5
    assert scene.gauge("learner_entropy") == 1.1
    assert scene.gauge("learner_grad_norm") == 7.0
    assert scene.gauge("learner_rho_clipped_ratio") == 0.25
    assert scene.gauge("learner_learning_rate") == 0.5
    assert scene.gauge("episode_return", task="catch") == 3.0
    assert scene.gauge("episode_length", task="catch") == 12.0
    assert scene.gauge("learner_nonfinite_updates_total") == 2


def test_gauges_keep_their_last_value_where_there_is_none(scene: Scene) -> None:
    scene.report(640)
    scene.report(640, figures=NO_UPDATES)
    assert scene.gauge("learner_loss", term="total") == 4.0
    assert scene.gauge("learner_grad_norm") == 7.0


def test_there_is_no_return_before_the_first_episode(scene: Scene) -> None:
    scene.report(640)
    assert scene.gauge("episode_return", task="catch") is None


def test_tensorboard_finds_every_figure_at_its_step(scene: Scene) -> None:
    lines = [scene.report(640), scene.report(1280, figures=NO_UPDATES)]
    version, *events = scene.events()
    assert version.file_version == "brain.Event:2"
    for line, event in zip(lines, events, strict=True):
        shown = {value.tag: value.simple_value for value in event.summary.value}
        expected = {key: value for key, value in line.items() if value is not None}
        assert event.step == expected.pop("steps")
        assert event.wall_time == expected.pop("time")
        assert shown == pytest.approx(expected, rel=1e-6)


# --- several tasks -----------------------------------------------------------------------------------

GAMES = {"breakout": "ALE/Breakout-v5", "pong": "PongNoFrameskip-v4", "skiing": "ALE/Skiing-v5"}
BY_TASK = {"task_steps": (100, 20, 0), "total_task_steps": (1200, 1040, 0)}


def several(run_dir: Path, task_ids: Mapping[str, str] = GAMES) -> Scene:
    return Scene(run_dir, task_ids)


def test_a_task_counts_alike_however_many_episodes_it_ends(tmp_path: Path) -> None:
    scene = several(tmp_path)
    scene.episodes.add(0, episode(30.0, length=50))
    for _ in range(9):
        scene.episodes.add(1, episode(-10.0, length=20))
    line = scene.report(640, figures=figures(**BY_TASK))
    assert (line["episode_return"], line["episode_length"], line["interval_return"]) == (10.0, 35.0, 10.0)
    assert (line["episodes"], line["interval_episodes"], line["interval_return_max"]) == (10, 10, 30.0)
    scene.episodes.add(1, episode(-10.0, length=20))
    line = scene.report(640, figures=figures(**BY_TASK))
    assert (line["episode_return"], line["interval_return"], line["interval_episodes"]) == (10.0, -10.0, 1)


def test_a_line_says_how_each_task_goes(tmp_path: Path) -> None:
    scene = several(tmp_path)
    scene.episodes.add(0, episode(318.5, length=50))
    scene.episodes.add(1, episode(-4.05, length=20))
    scene.episodes.add(1, episode(-2.05, length=40))
    scene.report(640, figures=figures(**BY_TASK))
    line = scene.report(1280, figures=figures(**BY_TASK))
    assert line["tasks"] == {
        "breakout": {
            "episode_return": 318.5,
            "episode_length": 50.0,
            "episodes": 1,
            "steps": 1200,
            "human_normalised": pytest.approx(1100.0),
        },
        "pong": {
            "episode_return": pytest.approx(-3.05),
            "episode_length": 30.0,
            "episodes": 2,
            "steps": 1040,
            "human_normalised": pytest.approx(50.0),
        },
        "skiing": {
            "episode_return": None,
            "episode_length": None,
            "episodes": 0,
            "steps": 0,
            "human_normalised": None,
        },
    }


SUITE = ("mean", "median", "mean_capped", "median_capped")


def suite(line: Mapping[str, Any]) -> list[float | None]:
    return [line[f"human_normalised_{statistic}"] for statistic in SUITE]


def test_a_suite_has_scores_once_all_of_its_tasks_have_one(tmp_path: Path) -> None:
    scene = several(tmp_path)
    scene.episodes.add(0, episode(318.5))  # 1100 %
    scene.episodes.add(1, episode(-3.05))  # 50 %
    assert suite(scene.report(640, figures=figures(**BY_TASK))) == [None] * 4
    assert scene.gauge("suite_human_normalised_score", statistic="mean", capped="false") is None
    scene.episodes.add(2, episode(-29859.3))  # -100 %
    assert suite(scene.report(640, figures=figures(**BY_TASK))) == pytest.approx([350.0, 50.0, 50 / 3, 50.0])
    assert {
        (statistic, capped): scene.gauge("suite_human_normalised_score", statistic=statistic, capped=capped)
        for statistic in ("mean", "median")
        for capped in ("false", "true")
    } == {
        ("mean", "false"): pytest.approx(350.0),
        ("median", "false"): pytest.approx(50.0),
        ("mean", "true"): pytest.approx(50 / 3),
        ("median", "true"): pytest.approx(50.0),
    }


def test_of_tasks_that_the_table_does_not_know_nothing_is_normalised(tmp_path: Path) -> None:
    scene = several(tmp_path, {"catch": "catch", "pong": "pong"})
    scene.episodes.add(0, episode(1.0))
    scene.episodes.add(1, episode(14.6))
    line = scene.report(640, figures=figures(task_steps=(1, 1), total_task_steps=(1, 1)))
    assert not [key for key in line if key.startswith("human_normalised")]
    assert "human_normalised" not in line["tasks"]["catch"]
    assert line["tasks"]["pong"]["human_normalised"] == pytest.approx(100.0)
    assert scene.gauge("human_normalised_score", task="catch") is None
    assert scene.gauge("human_normalised_score", task="pong") == pytest.approx(100.0)


def test_every_task_has_its_gauges_and_its_counter(tmp_path: Path) -> None:
    scene = several(tmp_path)
    assert [scene.gauge("learner_task_steps_total", task=task) for task in GAMES] == [0, 0, 0]
    scene.episodes.add(0, episode(318.5, length=50))
    statistics = {"popart_mean": (1.0, 2.0, 3.0), "popart_sigma": (4.0, 5.0, 6.0)}
    for _ in range(2):
        scene.report(640, figures=figures(**BY_TASK, **statistics))
    assert [scene.gauge("learner_task_steps_total", task=task) for task in GAMES] == [200, 40, 0]
    assert [scene.gauge("popart_mean", task=task) for task in GAMES] == [1.0, 2.0, 3.0]
    assert [scene.gauge("popart_sigma", task=task) for task in GAMES] == [4.0, 5.0, 6.0]
    assert [scene.gauge("episode_return", task=task) for task in GAMES] == [318.5, None, None]
    assert [scene.gauge("episode_length", task=task) for task in GAMES] == [50.0, None, None]
    assert scene.gauge("human_normalised_score", task="breakout") == pytest.approx(1100.0)
    assert scene.lines()[-1]["tasks"]["pong"]["popart_mean"] == 2.0
    assert scene.lines()[-1]["tasks"]["skiing"]["popart_sigma"] == 6.0


def test_tensorboard_finds_every_task(tmp_path: Path) -> None:
    scene = several(tmp_path)
    scene.episodes.add(1, episode(-3.05, length=30))
    scene.report(640, figures=figures(**BY_TASK))
    shown = {value.tag: value.simple_value for value in scene.events()[-1].summary.value}
    assert shown["task/pong/episode_return"] == pytest.approx(-3.05)
    assert shown["task/pong/human_normalised"] == pytest.approx(50.0, rel=1e-6)
    assert shown["task/breakout/steps"] == 1200
    assert "task/breakout/episode_return" not in shown
    assert "tasks" not in shown


# --- what only some runs have ------------------------------------------------------------------------


def test_a_single_game_has_a_score_beside_its_return(tmp_path: Path) -> None:
    scene = Scene(tmp_path, {"my pong": "pong"})
    assert scene.report(640)["human_normalised"] is None
    scene.episodes.add(0, episode(-3.05))
    line = scene.report(640, figures=figures(popart_mean=(1.5,), popart_sigma=(2.5,)))
    assert line["human_normalised"] == pytest.approx(50.0)
    assert (line["popart_mean"], line["popart_sigma"]) == (1.5, 2.5)
    assert not {"tasks", "human_normalised_mean"} & set(line)
    assert scene.gauge("human_normalised_score", task="my pong") == pytest.approx(50.0)


def test_a_plain_run_has_neither_keys_nor_series_of_what_it_does_not_use(scene: Scene) -> None:
    scene.episodes.add(0, episode(1.0))
    line = scene.report(640)
    assert not [key for key in line if key.startswith(("human", "popart", "replay", "task"))]
    series = {sample.name for family in scene.counts.registry.collect() for sample in family.samples}
    assert not [name for name in series if "popart" in name or "replay" in name or "normalised" in name]
    assert scene.gauge("learner_task_steps_total", task="catch") == 640


def test_the_share_that_the_trust_region_rejects_is_reported(tmp_path: Path) -> None:
    scene = Scene(tmp_path, replay=True)
    assert scene.report(0, figures=NO_UPDATES)["replay_rejected_ratio"] is None
    assert scene.report(640, figures=figures(replay_rejected_ratio=0.25))["replay_rejected_ratio"] == 0.25
    assert scene.gauge("learner_replay_rejected_ratio") == 0.25


# --- a disk without room -----------------------------------------------------------------------------


def test_a_full_disk_costs_its_lines_and_no_others(scene: Scene) -> None:
    scene.report(640)
    room_bytes = (scene.run_dir / "metrics.jsonl").stat().st_size + 50  # for some of the next line
    with full_disk(room_bytes):
        for steps in range(1280, 12_800, 640):
            scene.report(steps)
            assert [line["steps"] for line in scene.lines()] == [640]
    scene.report(12_800)
    assert [line["steps"] for line in scene.lines()] == [640, 12_800]
    assert [event.step for event in scene.events()][-1] == 12_800


def test_a_disk_that_is_full_from_the_start_costs_nothing_later(scene: Scene) -> None:
    with full_disk(10):
        for steps in range(0, 12_800, 640):
            scene.reporter.report(
                figures=figures(), episodes=scene.episodes, version=0, steps=steps, learning_rate=0.5
            )
    scene.report(12_800)
    assert [line["steps"] for line in scene.lines()] == [12_800]
    assert [event.step for event in scene.events()] == [0, 12_800]  # the file's version, and the event


def test_a_full_disk_keeps_no_event_from_prometheus(scene: Scene) -> None:
    with full_disk(0):
        scene.reporter.report(
            figures=figures(), episodes=scene.episodes, version=1, steps=640, learning_rate=0.5
        )
    assert scene.gauge("learner_loss", term="total") == 4.0


def test_a_restarted_learner_appends_to_the_lines(tmp_path: Path) -> None:
    Scene(tmp_path).report(640)
    Scene(tmp_path).report(1280)
    assert [line["steps"] for line in Scene(tmp_path).lines()] == [640, 1280]
