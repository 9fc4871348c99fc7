"""Who plays which episode is fixed beforehand, and nothing but whole episodes counts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from services.evaluator.play import Played, play
from services.rl.envs import EnvSpec, Transition
from services.rl.envs.base import VectorEnv
from services.rl.player import Player
from services.rl.policy import Policy
from services.wire.messages import Episode

SPEC = EnvSpec(
    id="clockwork",
    observation_shape=(1,),
    observation_dtype="float32",
    frame_stack=1,
    num_actions=2,
    frame_skip=1,
)

Rewards = Sequence[float]


class Clockwork(VectorEnv):
    """Environment n plays the episodes of ``scripts[n]`` again and again: the rewards of one step each.

    A reward of None is a lost life: terminated, and the game goes on.
    """

    def __init__(self, scripts: Sequence[Sequence[Sequence[float | None]]]) -> None:
        self.spec = SPEC
        self.num_envs = len(scripts)
        self.steps = 0
        self.seeds: list[int] = []
        self._scripts = scripts

    @staticmethod
    def _life(script: Sequence[Sequence[float | None]]) -> Any:
        while True:
            for rewards in script:
                for step, reward in enumerate(rewards, start=1):
                    over = step == len(rewards)
                    yield (reward or 0.0, over or reward is None, over)
                yield (0.0, False, False)  # the reset, which nobody acts

    def reset(self, seed: int) -> NDArray[Any]:
        self.seeds.append(seed)
        self._lives = [self._life(script) for script in self._scripts]
        return np.zeros((self.num_envs, 1), np.float32)

    def send(self, actions: NDArray[np.int64]) -> None:
        self.steps += 1

    def recv(self) -> Transition:
        reward, terminated, over = zip(*(next(life) for life in self._lives), strict=True)
        return Transition(
            observation=np.zeros((self.num_envs, 1), np.float32),
            reward=np.array(reward, np.float32),
            terminated=np.array(terminated),
            truncated=np.zeros(self.num_envs, np.bool_),
            episode_over=np.array(over),
        )

    def close(self) -> None:
        pass


class Idler:
    """Always action 0."""

    reads_instructions = False

    def new_memory(self, num_envs: int) -> None:
        return None

    def act(self, frames: NDArray[Any], *_: object) -> tuple[NDArray[np.int64], None]:
        return np.zeros(len(frames), np.int64), None


def play_all(
    scripts: Sequence[Sequence[Sequence[float | None]]],
    num_episodes: int,
    *,
    stopping: threading.Event | None = None,
    on_step: Callable[[], None] = lambda: None,
    heard: list[Episode] | None = None,
) -> tuple[Episode, ...] | None:
    played = play_capped(Clockwork(scripts), num_episodes, 1000, stopping, on_step, heard)
    assert played is None or played.num_capped == 0
    return played.episodes if played else None


def play_capped(
    env: Clockwork,
    num_episodes: int,
    max_steps: int,
    stopping: threading.Event | None = None,
    on_step: Callable[[], None] = lambda: None,
    heard: list[Episode] | None = None,
) -> Played | None:
    return play(
        Player(env, cast(Policy, Idler()), seed=1),
        num_episodes,
        max_steps,
        stopping=stopping or threading.Event(),
        on_step=on_step,
        on_episode=(heard if heard is not None else []).append,
    )


def episode(episode_return: float, length: int) -> Episode:
    return Episode(episode_return=episode_return, length=length)


def test_an_episode_is_the_sum_of_its_rewards_and_as_long_as_it_was_acted() -> None:
    played = play_all([[[1.5, 0.0, -4.0], [2.0]]], 3)
    assert played == (episode(-2.5, 3), episode(2.0, 1), episode(-2.5, 3))


def test_every_environment_plays_its_share_in_turn() -> None:
    scripts = [[[100.0 * n + k] for k in range(3)] for n in range(3)]
    played = play_all(scripts, 7)
    assert played is not None
    assert [each.episode_return for each in played] == [0, 100, 200, 1, 101, 201, 2]


def test_long_episodes_count_as_much_as_short_ones() -> None:
    """Whoever took the first four to end would take three or four of the short ones."""
    short, long = [[0.0]], [[1.0] * 10]
    played = play_all([short, long], 4)
    assert played == (episode(0, 1), episode(10, 10), episode(0, 1), episode(10, 10))


def test_an_environment_that_has_played_its_share_counts_for_nothing() -> None:
    heard: list[Episode] = []
    played = play_all([[[1.0]], [[0.0] * 30]], 2, heard=heard)
    assert played == (episode(1, 1), episode(0, 30))
    assert heard == [episode(1, 1), episode(0, 30)]


def test_more_environments_than_episodes_leave_the_others_out() -> None:
    assert play_all([[[1.0, 1.0]], [[5.0]], [[7.0]]], 2) == (episode(2, 2), episode(5, 1))


def test_a_lost_life_ends_nothing() -> None:
    assert play_all([[[1.0, None, 1.0, None, 3.0]]], 1) == (episode(5, 5),)


def test_all_that_ended_are_heard_of_in_the_order_of_their_ends() -> None:
    heard: list[Episode] = []
    play_all([[[1.0, 2.0, 3.0]], [[4.0]]], 4, heard=heard)
    assert [each.episode_return for each in heard] == [4, 6, 4, 6]


@pytest.mark.parametrize("after", [1, 4])
def test_a_stop_in_the_middle_of_a_game_ends_it_at_the_next_step(after: int) -> None:
    stopping, steps = threading.Event(), 0

    def on_step() -> None:
        nonlocal steps
        steps += 1
        if steps == after:
            stopping.set()

    assert play_all([[[1.0] * 1000]], 1, stopping=stopping, on_step=on_step) is None
    assert steps == after


# ------------------------------------------------------------------------------- episodes without an end


ENDLESS = [[1.0] * 1_000_000]


def test_an_episode_without_an_end_is_cut_off_and_counted() -> None:
    heard: list[Episode] = []
    played = play_capped(Clockwork([ENDLESS]), 1, 50, heard=heard)
    assert played == Played(episodes=(episode(50, 50),), num_capped=1)
    assert heard == [episode(50, 50)]


def test_an_episode_that_ends_with_its_last_allowed_step_is_whole() -> None:
    assert play_capped(Clockwork([[[1.0] * 5]]), 2, 5) == Played(episodes=(episode(5, 5),) * 2, num_capped=0)
    assert play_capped(Clockwork([[[1.0] * 6]]), 2, 5) == Played(episodes=(episode(5, 5),) * 2, num_capped=2)


def test_after_a_cut_a_new_episode_begins_with_another_seed() -> None:
    """Its first rewards tell that it is a new one."""
    env = Clockwork([[[7.0] + [1.0] * 1000]])
    played = play_capped(env, 3, 4)
    assert played == Played(episodes=(episode(10, 4),) * 3, num_capped=3)
    assert env.seeds == [1, 2, 3]


def test_a_cut_in_one_environment_does_not_touch_the_games_of_the_others() -> None:
    """The second environment ends all of its three before the first one, cut off at once, goes on."""
    env = Clockwork([[[0.5] * 1000], [[1.0] * 3, [2.0] * 4]])
    played = play_capped(env, 6, 4)
    assert played is not None
    assert played.episodes == (
        *(episode(2, 4), episode(3, 3)),
        *(episode(2, 4), episode(8, 4)),
        *(episode(2, 4), episode(3, 3)),
    )
    assert played.num_capped == 3
    assert env.seeds == [1, 2, 3]


def test_an_environment_without_a_share_may_go_on_for_ever() -> None:
    assert play_all([[[1.0]], ENDLESS], 1) == (episode(1, 1),)
