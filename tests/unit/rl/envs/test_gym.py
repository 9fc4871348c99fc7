"""Gymnasium ids and factories, compared with Gymnasium itself and with homemade environments."""

from __future__ import annotations

from typing import Literal

import gymnasium
import numpy as np
import pytest

from services.config import EnvConfig
from services.rl.envs import env_spec, make_vector_env
from services.rl.envs.base import env_seeds

HOMEMADE = "tests.unit.rl.envs.homemade"
DOWN, STAY, UP = 0, 1, 2
vectorizations = pytest.mark.parametrize("vectorization", ["sync", "async"])


@vectorizations
def test_cartpole_plays_exactly_as_gymnasium_plays_it(vectorization: Literal["sync", "async"]) -> None:
    env = make_vector_env(EnvConfig(id="CartPole-v1", vectorization=vectorization), 2)
    alone = gymnasium.make("CartPole-v1")
    reference, _ = alone.reset(seed=env_seeds(5, 2)[1])
    np.testing.assert_array_equal(env.reset(5)[1], reference)
    over = False
    num_ends = 0
    for step in range(60):
        env.send(np.array([step % 2, 1]))  # environment 1 always pushes to the right and soon falls
        seen = env.recv()
        if over:
            reference, over = alone.reset()[0], False
            assert not seen.terminated[1]
        else:
            reference, reward, over, _, _ = alone.step(1)
            assert seen.reward[1] == reward
            assert seen.terminated[1] == seen.episode_over[1] == over
            num_ends += over
        np.testing.assert_array_equal(seen.observation[1], reference)
    env.close()
    assert num_ends >= 4


@vectorizations
def test_a_time_limit_truncates_and_does_not_terminate(vectorization: Literal["sync", "async"]) -> None:
    config = EnvConfig(id="CartPole-v1", vectorization=vectorization, kwargs={"max_episode_steps": 5})
    env = make_vector_env(config, 2)
    env.reset(1)
    truncated = []
    for step in range(12):
        env.send(np.full(2, step % 2))
        seen = env.recv()
        assert not seen.terminated.any()
        np.testing.assert_array_equal(seen.truncated, seen.episode_over)
        truncated.append(bool(seen.truncated.all()))
    env.close()
    assert [step for step, flag in enumerate(truncated) if flag] == [4, 10]  # step 5 was the reset


def test_numbers_that_start_elsewhere_than_at_zero_are_shifted() -> None:
    env = make_vector_env(EnvConfig(id=f"{HOMEMADE}:ladder", kwargs={"first": 2}), 1)
    assert env.spec.num_actions == 3
    assert env.spec.observation_shape == (4,)
    np.testing.assert_array_equal(env.reset(1), [[0, 1, 0, 0]])
    seen = []
    for action in (STAY, UP, DOWN, UP, UP):
        env.send(np.array([action]))
        seen.append(env.recv())
    np.testing.assert_array_equal([t.observation[0].argmax() + 1 for t in seen], [2, 3, 2, 3, 4])
    np.testing.assert_array_equal([t.reward[0] for t in seen], [0, 3, 0, 3, 4])


def test_an_end_that_is_also_a_time_limit_counts_as_a_termination() -> None:
    env = make_vector_env(EnvConfig(id=f"{HOMEMADE}:Ladder", kwargs={"first": 3}), 1)
    env.reset(1)
    env.send(np.array([UP]))
    seen = env.recv()
    assert (seen.terminated[0], seen.truncated[0], seen.episode_over[0]) == (True, False, True)


@pytest.mark.parametrize(("shape", "white"), [("60x80", 255), ("60x80x1", 255), ("60x80x3", 76)])
def test_images_become_gray_and_are_resized(shape: str, white: int) -> None:
    config = EnvConfig(id=f"{HOMEMADE}:Camera", kwargs={"shape": shape}, frame_height=24, frame_width=32)
    env = make_vector_env(config, 2)
    assert (env.spec.frame_stack, env.spec.observation_dtype) == (4, "uint8")
    (image, _) = env.reset(1)
    assert image.shape == (24, 32)
    np.testing.assert_array_equal(image[:, :16], white)  # red is 0.299 x 255 gray
    np.testing.assert_array_equal(image[:, 16:], 0)


@pytest.mark.parametrize(
    ("shape", "white"), [("60x80", [255] * 3), ("60x80x1", [255] * 3), ("60x80x3", [255, 0, 0])]
)
def test_with_color_images_have_three_channels_red_first(shape: str, white: list[int]) -> None:
    config = EnvConfig(
        id=f"{HOMEMADE}:Camera", kwargs={"shape": shape}, frame_height=24, frame_width=32, color=True
    )
    env = make_vector_env(config, 2)
    assert (env.spec.observation_shape, env.spec.frame_stack) == ((24, 32, 3), 4)
    (image, _) = env.reset(1)
    assert (image[:, :16] == white).all()
    assert not image[:, 16:].any()


def test_an_id_may_name_the_module_that_registers_it() -> None:
    assert env_spec(EnvConfig(id="gymnasium.envs.classic_control:CartPole-v1")).observation_shape == (4,)


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("Pendulum-v1", r"actions are Box\(.*\); allowed is Discrete"),
        (f"{HOMEMADE}:steering", r"actions are Box\(.*\); allowed is Discrete"),
        (f"{HOMEMADE}:dictionary", r"observations are Dict\(.*\); allowed are"),
        (f"{HOMEMADE}:nothing", "returned NoneType; allowed is a gymnasium.Env"),
        (f"{HOMEMADE}:missing", f"{HOMEMADE} has no attribute missing"),
        (f"{HOMEMADE}:NUMBER", "TypeError: 'int' object is not callable"),
        ("no_such_module:make", "cannot import no_such_module: No module named 'no_such_module'"),
        ("no_such_module:Game-v0", "ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_played_is_refused_with_its_reason(env_id: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^env.id = '{env_id}'.*{message}"):
        env_spec(EnvConfig(id=env_id))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [("3x60x80", "uint8"), ("60x80x4", "uint8"), ("60x80", "float32"), ("2x60x80x3", "uint8")],
)
def test_boxes_that_are_neither_vectors_nor_images_are_refused(shape: str, dtype: str) -> None:
    with pytest.raises(ValueError, match=r"observations are Box\(.*\); allowed are"):
        env_spec(EnvConfig(id=f"{HOMEMADE}:Camera", kwargs={"shape": shape, "dtype": dtype}))


@pytest.mark.parametrize("env_id", ["CartPole-v1", f"{HOMEMADE}:ladder"])
def test_arguments_that_the_environment_does_not_take_are_refused(env_id: str) -> None:
    with pytest.raises(ValueError, match=r"with env.kwargs = \{'colour': 'red'\}: TypeError: .*colour"):
        env_spec(EnvConfig(id=env_id, kwargs={"colour": "red"}))


def test_neighbouring_seeds_share_no_environment() -> None:
    assert not set(env_seeds(1, 64)) & set(env_seeds(2, 64))
