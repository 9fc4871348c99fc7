"""Statistics worked out by hand, and JSON that any reader takes."""

from __future__ import annotations

import json
import math

import pytest

from services.config import EnvConfig
from services.evaluator.results import Results, TaskResult
from services.wire.messages import Episode


def result(name: str, *returns: float, env_id: str | None = None) -> TaskResult:
    """Episode k is k + 1 steps long."""
    episodes = tuple(Episode(episode_return=r, length=k) for k, r in enumerate(returns, start=1))
    return TaskResult(name=name, env=EnvConfig(id=env_id or name), episodes=episodes)


def results(*tasks: TaskResult) -> Results:
    return Results(version=7, steps=4480, tasks=tasks)


def test_the_statistics_of_a_task() -> None:
    task = result("catch", 6.0, 1.0, 2.0)
    assert task.returns == [6, 1, 2]
    assert (task.mean, task.median, task.mean_length) == (3, 2, 2)
    assert task.std == pytest.approx(math.sqrt(14 / 3))
    assert result("catch", 1.0, 4.0, 3.0, 10.0).median == 3.5
    assert result("catch", 5.0).std == 0


def test_the_human_normalised_score_is_that_of_the_mean() -> None:
    """Pong: random -20.7, human 14.6. Halfway is -3.05."""
    assert result("ALE/Pong-v5", -20.7, 14.6).human_normalised == pytest.approx(50)
    assert result("mine", 20.0, env_id="PongNoFrameskip-v4").human_normalised == pytest.approx(
        100 * 40.7 / 35.3
    )
    assert result("catch", 1.0).human_normalised is None


def test_tasks_count_alike_however_they_are_called() -> None:
    """Pong at 200 %, Breakout (1.7 and 30.5) at 50 %, and again Pong, with other settings, at 0 %."""
    played = results(
        result("pong", 49.9, env_id="pong"),
        result("ALE/Breakout-v5", 1.7, 30.5),
        result("sticky pong", -20.7, env_id="pong"),
    )
    assert played.mean == pytest.approx((49.9 + 16.1 - 20.7) / 3)
    suite = played.human_normalised
    assert suite is not None
    assert [suite.mean, suite.median] == pytest.approx([250 / 3, 50])
    assert [suite.mean_capped, suite.median_capped] == pytest.approx([50, 50])


def test_there_is_no_score_over_tasks_of_one_or_of_some() -> None:
    assert results(result("pong", 1.0)).human_normalised is None
    assert results(result("pong", 1.0), result("catch", 1.0)).human_normalised is None


def test_the_plain_form_says_all_of_it() -> None:
    plain = results(result("easy", 1.0, 3.0, env_id="catch")).plain()
    assert plain == {
        "version": 7,
        "steps": 4480,
        "mean": 2.0,
        "human_normalised": None,
        "tasks": {
            "easy": {
                "env": EnvConfig(id="catch").model_dump(mode="json"),
                "episodes": 2,
                "capped": 0,
                "mean": 2.0,
                "median": 2.0,
                "std": 1.0,
                "min": 1.0,
                "max": 3.0,
                "mean_length": 1.5,
                "human_normalised": None,
                "returns": [1.0, 3.0],
                "lengths": [1, 2],
            }
        },
    }
    assert json.loads(json.dumps(plain)) == plain


def test_the_plain_form_of_a_suite_has_its_scores() -> None:
    plain = results(result("pong", 49.9), result("breakout", 1.7)).plain()
    assert plain["human_normalised"] == {
        "mean": pytest.approx(100),
        "median": pytest.approx(100),
        "mean_capped": pytest.approx(50),
        "median_capped": pytest.approx(50),
    }
    tasks = plain["tasks"]
    assert isinstance(tasks, dict)
    assert [task["human_normalised"] for task in tasks.values()] == [pytest.approx(200), 0]


def test_returns_that_are_not_finite_are_null_in_json() -> None:
    plain = results(result("wild", math.inf, 1.0, math.nan)).plain()
    text = json.dumps(plain, allow_nan=False)
    assert json.loads(text)["tasks"]["wild"]["returns"] == [None, 1.0, None]
    assert json.loads(text)["mean"] is None
