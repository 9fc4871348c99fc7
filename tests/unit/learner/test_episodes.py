"""What is remembered of each task, also over a restart, and what checkpoints are ranked by."""

from __future__ import annotations

import json

import pytest

from services.learner.episodes import RECENT_EPISODES, Episodes, TaskEpisodes
from services.wire.messages import Episode


def episode(episode_return: float, length: int = 10) -> Episode:
    return Episode(episode_return=episode_return, length=length)


def returns(task: TaskEpisodes) -> list[float]:
    return [e.episode_return for e in task.recent]


def test_only_the_latest_episodes_are_recent() -> None:
    episodes = Episodes(["catch"])
    for number in range(RECENT_EPISODES + 1):
        episodes.add(0, episode(float(number)))
    (task,) = episodes.take()
    assert returns(task) == [float(n) for n in range(1, RECENT_EPISODES + 1)]
    assert (len(task.new), task.total) == (RECENT_EPISODES + 1, RECENT_EPISODES + 1)


def test_a_task_that_ends_many_episodes_pushes_out_none_of_another() -> None:
    episodes = Episodes(["long", "short"])
    episodes.add(0, episode(-3.0))
    for _ in range(2 * RECENT_EPISODES):
        episodes.add(1, episode(1.0))
    long, short = episodes.take()
    assert (returns(long), long.total, len(long.new)) == ([-3.0], 1, 1)
    assert (len(short.recent), short.total, short.mean_return) == (RECENT_EPISODES, 2 * RECENT_EPISODES, 1.0)


def test_an_episode_is_new_once() -> None:
    episodes = Episodes(["a", "b"])
    episodes.add(1, episode(2.0))
    assert [len(task.new) for task in episodes.take()] == [0, 1]
    assert [len(task.new) for task in episodes.take()] == [0, 0]
    assert [task.total for task in episodes.take()] == [0, 1]


def test_a_resumed_run_remembers_every_task() -> None:
    before, after = Episodes(["a", "b"]), Episodes(["a", "b"])
    before.add(0, episode(2.0, length=5))
    before.add(0, episode(4.0, length=7))
    before.add(1, episode(-1.0, length=1))
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    a, b = after.take()
    assert (list(a.recent), list(a.new), a.total) == ([episode(2.0, 5), episode(4.0, 7)], [], 2)
    assert (list(b.recent), list(b.new), b.total) == ([episode(-1.0, 1)], [], 1)


@pytest.mark.parametrize("tasks", [["a"], ["a", "b", "c"]])
def test_a_checkpoint_of_another_number_of_tasks_is_refused(tasks: list[str]) -> None:
    saved = Episodes(["a", "b"]).state_dict()
    with pytest.raises(ValueError, match=f"2 tasks, this run {len(tasks)}"):
        Episodes(tasks).load_state_dict(saved)


# --- what checkpoints are ranked by ------------------------------------------------------------------


def ranked_by(episodes: Episodes) -> float | None:
    value = episodes.state_dict()["mean_return"]
    assert value is None or isinstance(value, float)
    return value


@pytest.mark.parametrize("task_id", ["catch", "ALE/Pong-v5"])
def test_a_single_task_is_ranked_by_its_return(task_id: str) -> None:
    episodes = Episodes([task_id])
    assert ranked_by(episodes) is None
    episodes.add(0, episode(2.0))
    episodes.add(0, episode(4.0))
    assert ranked_by(episodes) == 3.0


def test_games_are_ranked_by_their_mean_human_normalised_score() -> None:
    episodes = Episodes(["ALE/Breakout-v5", "ALE/Pong-v5", "ALE/Skiing-v5"])
    for task, score in enumerate((318.5, -3.05, -29859.3)):  # 1100, 50 and -100 %
        episodes.add(task, episode(score))
    assert ranked_by(episodes) == pytest.approx(350.0)


def test_tasks_of_which_one_has_no_such_score_are_ranked_by_their_returns_each_counting_alike() -> None:
    episodes = Episodes(["ALE/Breakout-v5", "catch"])
    episodes.add(0, episode(318.5))
    for caught in (1.0, 0.0, 0.0, 1.0):
        episodes.add(1, episode(caught))
    assert ranked_by(episodes) == 159.5


@pytest.mark.parametrize("task_ids", [["ALE/Breakout-v5", "ALE/Pong-v5"], ["a", "b"]])
def test_there_is_no_rank_before_every_task_has_ended_an_episode(task_ids: list[str]) -> None:
    episodes = Episodes(task_ids)
    episodes.add(0, episode(318.5))
    assert ranked_by(episodes) is None
    episodes.add(1, episode(0.0))
    assert ranked_by(episodes) is not None


def test_one_environment_may_be_several_tasks_of_a_suite() -> None:
    episodes = Episodes(["ALE/Pong-v5", "ALE/Pong-v5", "ALE/Pong-v5"])  # with other kwargs, say
    for task, score in enumerate((-20.7, -3.05, 14.6)):  # 0, 50 and 100 %
        episodes.add(task, episode(score))
    assert ranked_by(episodes) == pytest.approx(50.0)


def test_a_single_task_has_a_score_and_is_ranked_by_its_return_all_the_same() -> None:
    episodes = Episodes(["ALE/Pong-v5"])
    episodes.add(0, episode(14.6))
    assert episodes.take()[0].human_normalised == pytest.approx(100.0)
    assert ranked_by(episodes) == pytest.approx(14.6)


def test_what_is_loaded_takes_the_place_of_what_there_was() -> None:
    # A learner that comes into a group has its checkpoint's, which are among the others' already.
    own, others = Episodes(["a"]), Episodes(["a"])
    for number in range(10):
        own.add(0, episode(float(number)))
    for number in range(13):
        others.add(0, episode(float(number)))
    own.load_state_dict(others.state_dict())
    assert own.state_dict() == others.state_dict()
