"""Recall, played by hand: what is shown when, and which action counts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from services.config import EnvConfig
from services.rl.envs import VectorEnv, env_spec, make_vector_env

NUM_ENVS = 64


def test_a_cue_a_silence_a_query_and_then_the_reward() -> None:
    env = make_vector_env(EnvConfig(id="recall", kwargs={"num_cues": 3, "delay": 2}), NUM_ENVS)
    first = env.reset(1)
    cue = first.argmax(axis=1)
    assert set(cue) == {0, 1, 2}
    np.testing.assert_array_equal(first, np.eye(4)[cue])
    seen = []
    for _ in range(4):
        env.send(cue)
        seen.append(env.recv())
    blank, query = [0, 0, 0, 0], [0, 0, 0, 1]
    for transition, observation in zip(seen, [blank, blank, query, blank], strict=True):
        np.testing.assert_array_equal(transition.observation, [observation] * NUM_ENVS)
    for early in seen[:-1]:
        assert not early.reward.any()
        assert not early.episode_over.any()
    np.testing.assert_array_equal(seen[-1].reward, 1)
    assert seen[-1].terminated.all()


def rewards_of_an_episode(env: VectorEnv, *actions: npt.NDArray[np.int64]) -> list[float]:
    """The sum over all environments after each of the actions."""
    rewards = []
    for action in actions:
        env.send(action)
        rewards.append(float(env.recv().reward.sum()))
    return rewards


def test_only_the_action_at_the_query_counts_and_a_wrong_one_costs_one() -> None:
    env = make_vector_env(EnvConfig(id="recall", kwargs={"delay": 1}), NUM_ENVS)
    cue = env.reset(1).argmax(axis=1)
    assert rewards_of_an_episode(env, 1 - cue, 1 - cue, cue) == [0, 0, NUM_ENVS]
    env.send(cue)
    cue = env.recv().observation.argmax(axis=1)
    assert rewards_of_an_episode(env, cue, cue, 1 - cue) == [0, 0, -NUM_ENVS]


def test_without_memory_no_action_is_better_than_a_guess() -> None:
    env = make_vector_env(EnvConfig(id="recall", kwargs={"delay": 0}), 4000)
    env.reset(1)
    always_0 = np.zeros(4000, np.int64)
    assert abs(rewards_of_an_episode(env, always_0, always_0)[1]) < 200  # a mean return of .05


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cues": 3}, "env.kwargs.cues: unknown; allowed are num_cues, delay"),
        ({"num_cues": 1}, "env.kwargs.num_cues = 1: allowed is 2 to 64"),
        ({"delay": -1}, "env.kwargs.delay = -1: allowed is 0 to 1000"),
        ({"delay": 1.5}, "env.kwargs.delay = 1.5: allowed is int"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    kwargs: dict[str, str | int | float | bool | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        env_spec(EnvConfig(id="recall", kwargs=kwargs))
