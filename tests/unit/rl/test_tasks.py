"""Which tasks a run has, and that every number of actors serves them evenly."""

from __future__ import annotations

from collections import Counter

import pytest

from services import config as configuration
from services.config import RunConfig
from services.rl.tasks import deal, tasks_of, tasks_spec


def config(*flags: str) -> RunConfig:
    return configuration.load(flags=flags)


def test_without_a_list_the_environment_is_the_only_task_and_stays_as_it_is() -> None:
    [task] = tasks_of(config("--env", "ALE/Pong-v5"))
    assert (task.name, task.env) == ("ALE/Pong-v5", config("--env", "ALE/Pong-v5").env)
    assert not task.env.full_action_set
    assert tasks_spec((task,)).num_actions == 6


def test_several_atari_games_share_one_policy_over_all_actions() -> None:
    tasks = tasks_of(config("--tasks", "pong,breakout"))
    assert [task.name for task in tasks] == ["pong", "breakout"]
    assert tasks_spec(tasks).num_actions == 18
    [alone] = tasks_of(config("--tasks", "pong"))
    assert tasks_spec((alone,)).num_actions == 6


def test_the_policy_over_other_tasks_has_as_many_actions_as_the_richest_of_them() -> None:
    kwargs = "[{id: recall, name: two}, {id: recall, name: five, kwargs: {num_cues: 5}}]"
    with pytest.raises(ValueError, match=r"two.*five"):  # a cue is shown as a one-hot vector
        tasks_spec(tasks_of(config("--tasks", kwargs)))


def test_the_suite_of_57_games_is_played_whole() -> None:
    tasks = tasks_of(config("--tasks", "atari57", "--actors", "2"))
    assert len(tasks) == 57
    spec = tasks_spec(tasks)
    assert (spec.num_actions, spec.observation_shape) == (18, (84, 84))


def test_arguments_of_a_task_stand_over_those_of_the_environment() -> None:
    tasks = tasks_of(
        config(
            *("--env.kwargs", "{rows: 8, columns: 4}"),
            *("--tasks", "[catch, {id: catch, name: wide, kwargs: {columns: 8}}]"),
        )
    )
    assert [task.env.kwargs for task in tasks] == [{"rows": 8, "columns": 4}, {"rows": 8, "columns": 8}]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["--tasks", "[{id: atari57, name: all}]", "--actors", "2"],
            "tasks: name = 'all' for the 57 tasks of atari57; allowed is none",
        ),
        (["--tasks", "catch,catch"], "tasks: 2 are called 'catch'; allowed are different ids, or names"),
        (
            ["--tasks", "atari57"],
            "tasks: 57 of them, but actors x actor.num_envs = 32 environments play no more than 32",
        ),
    ],
)
def test_tasks_that_nobody_could_tell_apart_or_play_are_refused(flags: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=r"^tasks: ") as refusal:
        tasks_of(config(*flags))
    assert told in str(refusal.value)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 30, 57])
@pytest.mark.parametrize("num_envs", [2, 6, 32])
def test_however_many_actors_no_task_has_more_than_one_environment_more_than_another(
    num_tasks: int, num_envs: int
) -> None:
    played: Counter[int] = Counter(dict.fromkeys(range(num_tasks), 0))
    for seat in range(60):
        halves = deal(seat, num_envs, num_tasks)
        assert [len(half.tasks) for half in halves] == [num_envs // 2] * 2
        for half in halves:
            assert list(half.tasks) == sorted(half.tasks)
            played.update(half.tasks)
        assert max(played.values()) - min(played.values()) <= 1


def test_each_environment_of_a_deal_plays_the_task_that_is_said_of_it() -> None:
    tasks = tasks_of(
        config("--tasks", "[{id: catch, name: a}, {id: catch, name: b}]", "--actor.num_envs", "6")
    )
    first, second = deal(0, 6, 2)
    assert (first.tasks, second.tasks) == ((0, 0, 1), (0, 1, 1))
    env = first.make(tasks, num_actions=3, num_threads=1)
    assert env.num_envs == 3
    env.close()
