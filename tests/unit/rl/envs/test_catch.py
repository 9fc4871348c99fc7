"""Catch, played by hand: every expected board and reward is written out or follows from the rules."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from services.config import EnvConfig
from services.rl.envs import Transition, env_spec, make_vector_env

LEFT, STAY, RIGHT = 0, 1, 2
NUM_ENVS = 16


def columns(
    boards: npt.NDArray[np.float32], rows: int = 10
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of the ball and of the paddle, while the ball is above the bottom row."""
    boards = boards.reshape(NUM_ENVS, rows, -1)
    return boards[:, :-1].sum(axis=1).argmax(axis=1), boards[:, -1].argmax(axis=1)


def play_one_episode(towards_the_ball: bool) -> list[Transition]:
    env = make_vector_env(EnvConfig(id="catch"), NUM_ENVS)
    boards = env.reset(1)
    transitions = []
    for _ in range(9):
        ball, paddle = columns(boards)
        towards = 1 + np.sign(ball - paddle)
        env.send(towards if towards_the_ball else np.where(ball > 2, LEFT, RIGHT))
        transitions.append(env.recv())
        boards = transitions[-1].observation
    return transitions


def test_following_the_ball_earns_one_and_only_at_the_bottom_row() -> None:
    *falling, landed = play_one_episode(towards_the_ball=True)
    assert all(not t.reward.any() and not t.episode_over.any() for t in falling)
    np.testing.assert_array_equal(landed.reward, 1)
    assert landed.terminated.all()
    assert landed.episode_over.all()


def test_fleeing_from_the_ball_costs_one() -> None:
    *_, landed = play_one_episode(towards_the_ball=False)
    np.testing.assert_array_equal(landed.reward, -1)
    assert landed.terminated.all()


def test_the_board_shows_ball_and_paddle_from_top_to_bottom() -> None:
    env = make_vector_env(EnvConfig(id="catch", kwargs={"rows": 3, "columns": 3}), 64)
    boards = env.reset(1).reshape(64, 3, 3)
    i = int(np.flatnonzero(boards[:, 0, 0])[0])  # some ball starts in the leftmost column
    np.testing.assert_array_equal(boards[i], [[1, 0, 0], [0, 0, 0], [0, 1, 0]])
    env.send(np.full(64, RIGHT))
    np.testing.assert_array_equal(env.recv().observation[i].reshape(3, 3), [[0, 0, 0], [1, 0, 0], [0, 0, 1]])
    env.send(np.full(64, RIGHT))  # against the wall
    last = env.recv()
    np.testing.assert_array_equal(last.observation[i].reshape(3, 3), [[0, 0, 0], [0, 0, 0], [1, 0, 1]])
    assert last.reward[i] == -1
    env.send(np.full(64, RIGHT))
    np.testing.assert_array_equal(env.recv().observation[i].reshape(3, 3)[2], [0, 1, 0])


def test_balls_fall_in_all_columns_about_equally_often() -> None:
    env = make_vector_env(EnvConfig(id="catch"), 5000)
    counts = env.reset(1).reshape(5000, 10, 5)[:, 0].sum(axis=0)
    assert counts.min() > 900
    assert counts.max() < 1100


def test_the_drawn_board_is_the_board_with_every_cell_a_block_of_pixels() -> None:
    plain = make_vector_env(EnvConfig(id="catch"), NUM_ENVS)
    drawn = make_vector_env(EnvConfig(id="catch", kwargs={"pixels": True}), NUM_ENVS)
    boards, images = plain.reset(3).reshape(NUM_ENVS, 10, 5), drawn.reset(3)
    row_of_pixel = np.digitize(
        np.arange(84), [8, 16, 25, 33, 42, 50, 58, 67, 75]
    )  # 84 / 10 = 8.4 pixels a row
    column_of_pixel = np.digitize(np.arange(84), [16, 33, 50, 67])
    np.testing.assert_array_equal(images, 255 * boards[:, row_of_pixel][:, :, column_of_pixel])


def test_with_color_the_drawn_board_is_the_gray_one_in_all_three_channels() -> None:
    gray = make_vector_env(EnvConfig(id="catch", kwargs={"pixels": True}), NUM_ENVS)
    color = make_vector_env(EnvConfig(id="catch", kwargs={"pixels": True}, color=True), NUM_ENVS)
    assert color.spec.observation_shape == (84, 84, 3)
    images = color.reset(3)
    for channel in range(3):
        np.testing.assert_array_equal(images[..., channel], gray.reset(3))


def test_the_drawn_board_is_stacked_like_any_image_and_the_plain_one_is_not() -> None:
    drawn = env_spec(
        EnvConfig(id="catch", kwargs={"pixels": True}, frame_stack=2, frame_height=40, frame_width=36)
    )
    assert (drawn.observation_shape, drawn.observation_dtype, drawn.frame_stack) == ((40, 36), "uint8", 2)
    plain = env_spec(EnvConfig(id="catch"))
    assert (plain.observation_shape, plain.observation_dtype, plain.frame_stack) == ((50,), "float32", 1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"row": 3}, "env.kwargs.row: unknown; allowed are rows, columns, pixels"),
        ({"rows": True}, "env.kwargs.rows = True: allowed is int"),
        ({"pixels": 1}, "env.kwargs.pixels = 1: allowed is bool"),
        ({"rows": 1}, "env.kwargs.rows = 1: allowed is 2 to 64"),
        ({"rows": 3, "columns": 6}, "env.kwargs.columns = 6: allowed is 2 to 5 with 3 rows"),
        ({"rows": 20, "pixels": True}, "env.frame_height = 16: allowed is at least 20"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    kwargs: dict[str, str | int | float | bool | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        env_spec(EnvConfig(id="catch", kwargs=kwargs, frame_height=16))
