"""Catch: a ball falls down a board, and the paddle on the bottom row must be below it (bsuite, 2019).

The ball starts in a random column of the top row and falls one row a step; actions are left, stay and
right. When it reaches the bottom row the episode terminates with reward +1 (caught) or -1. The paddle starts
in the middle. Every episode lasts rows - 1 steps, so all environments are always in the same row and one
step of all of them is a few numpy calls.

``env.kwargs``: `rows`, `columns`, and `pixels`. By default an observation is the flattened board. With
`pixels` the board is drawn onto an image of env.frame_height x env.frame_width (with env.color in three
channels) and stacked env.frame_stack deep, exactly like Atari, so that one small game tries out the whole
road of images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from services.config import EnvConfig
from services.rl.envs.base import Actions, EnvSpec, Observations, read_kwargs
from services.rl.envs.images import frame_shape
from services.rl.envs.lockstep import Lockstep, Rewards

EXAMPLES: tuple[EnvConfig, ...] = (
    EnvConfig(id="catch"),
    EnvConfig(id="catch", kwargs={"rows": 4, "columns": 7}),
    EnvConfig(id="catch", kwargs={"pixels": True}),
    EnvConfig(id="catch", kwargs={"pixels": True}, color=True),
)


@dataclass(frozen=True)
class CatchSettings:
    """env.kwargs."""

    rows: int = 10
    columns: int = 5
    pixels: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.rows <= 64:
            raise ValueError(f"env.kwargs.rows = {self.rows}: allowed is 2 to 64")
        widest = min(2 * self.rows - 1, 64)
        if not 2 <= self.columns <= widest:
            raise ValueError(
                f"env.kwargs.columns = {self.columns}: allowed is 2 to {widest} with {self.rows} rows, "
                "so that the paddle can reach every ball"
            )


def plays(env_id: str) -> bool:
    return env_id == "catch"


def known_ids() -> list[str]:
    return ["catch"]


def spec(config: EnvConfig) -> EnvSpec:
    settings = read_kwargs(CatchSettings, config.kwargs)
    if settings.pixels:
        for side, cells in (("height", settings.rows), ("width", settings.columns)):
            if (pixels := getattr(config, f"frame_{side}")) < cells:
                raise ValueError(
                    f"env.frame_{side} = {pixels}: allowed is at least {cells}, one pixel per cell"
                )
    return EnvSpec(
        id=config.id,
        observation_shape=(frame_shape(config) if settings.pixels else (settings.rows * settings.columns,)),
        observation_dtype="uint8" if settings.pixels else "float32",
        frame_stack=config.frame_stack if settings.pixels else 1,
        num_actions=3,
        frame_skip=1,
    )


def make(config: EnvConfig, num_envs: int, num_threads: int) -> Catch:  # noqa: ARG001  (too light for threads)
    return Catch(config, num_envs)


class Catch(Lockstep):
    """N boards."""

    def __init__(self, config: EnvConfig, num_envs: int) -> None:
        super().__init__(spec(config), num_envs)
        self._settings = read_kwargs(CatchSettings, config.kwargs)
        self._ball_row = 0
        self._ball_column = np.zeros(num_envs, np.int64)
        self._paddle = np.zeros(num_envs, np.int64)
        # Rows and columns of the board as heights and widths in pixels that add up to the image.
        self._cell_heights = _shares(config.frame_height, self._settings.rows)
        self._cell_widths = _shares(config.frame_width, self._settings.columns)
        self._color = config.color

    def begin(self) -> Observations:
        self._ball_row = 0
        self._ball_column = self.rng.integers(self._settings.columns, size=self.num_envs)
        self._paddle = np.full(self.num_envs, self._settings.columns // 2)
        return self._draw()

    def advance(self, actions: Actions) -> tuple[Observations, Rewards]:
        self._paddle = np.clip(self._paddle + actions - 1, 0, self._settings.columns - 1)
        self._ball_row += 1
        if self._ball_row < self._settings.rows - 1:
            return self._draw(), self.no_reward()
        return self._draw(), np.where(self._paddle == self._ball_column, 1, -1).astype(np.float32)

    def _draw(self) -> Observations:
        rows, columns, pixels = self._settings.rows, self._settings.columns, self._settings.pixels
        board = np.zeros((self.num_envs, rows, columns), np.uint8 if pixels else np.float32)
        ink = 255 if pixels else 1
        board[self.envs, self._ball_row, self._ball_column] = ink
        board[self.envs, -1, self._paddle] = ink
        if not pixels:
            return board.reshape(self.num_envs, rows * columns)
        image = board.repeat(self._cell_widths, axis=2).repeat(self._cell_heights, axis=1)
        return image[..., np.newaxis].repeat(3, axis=3) if self._color else image


def _shares(total: int, parts: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.diff(np.arange(parts + 1) * total // parts)
