"""Doom: the scenarios of ViZDoom, seen through their screens alone.

Ids are those that ViZDoom registers with Gymnasium (`VizdoomBasic-v1`, `VizdoomFreedoom1E1M1-S3-v0`), and
short names for the scenarios (`doom_basic`). An action presses one button, or none; buttons that turn by an
amount (Deathmatch has some) are never touched. ``env.kwargs``: `max_buttons_pressed`, how many may be pressed
at once. Games are rendered at the smallest of ViZDoom's resolutions that covers the frame.

ViZDoom shows nothing once an episode is over, so the final observation is the one before it. What it calls
both over and out of time is a truncation.

Every game runs in a process of ViZDoom's own; with env.vectorization `sync` they take turns. It keeps a
folder `_vizdoom` in the working directory, which must be writable.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, Space

from services.config import EnvConfig
from services.rl.envs.base import EnvSpec, Observations, VectorEnv, read_kwargs
from services.rl.envs.images import frame_shape, to_frame
from services.rl.envs.vectorized import Env, vectorize

EXAMPLES: tuple[EnvConfig, ...] = (
    EnvConfig(id="VizdoomBasic-v1"),
    EnvConfig(id="doom_take_cover", vectorization="async", frame_skip=8, color=True, frame_width=96),
)

SCENARIOS = {
    "doom_basic": "VizdoomBasic-v1",
    "doom_deadly_corridor": "VizdoomDeadlyCorridor-v1",
    "doom_deathmatch": "VizdoomDeathmatch-v1",
    "doom_defend_the_center": "VizdoomDefendCenter-v1",
    "doom_defend_the_line": "VizdoomDefendLine-v1",
    "doom_health_gathering": "VizdoomHealthGathering-v1",
    "doom_health_gathering_supreme": "VizdoomHealthGatheringSupreme-v1",
    "doom_my_way_home": "VizdoomMyWayHome-v1",
    "doom_predict_position": "VizdoomPredictPosition-v1",
    "doom_take_cover": "VizdoomTakeCover-v1",
}
"""Short names."""

_RESOLUTIONS = ((160, 120), (320, 240), (640, 480), (800, 600))
"""(width, height), the last of which covers every frame that the configuration allows."""


@dataclass(frozen=True)
class VizdoomSettings:
    """env.kwargs."""

    max_buttons_pressed: int = 1

    def __post_init__(self) -> None:
        if self.max_buttons_pressed < 1:
            raise ValueError(
                f"env.kwargs.max_buttons_pressed = {self.max_buttons_pressed}: allowed is at least 1"
            )


def plays(env_id: str) -> bool:
    return env_id.startswith("Vizdoom") or env_id in SCENARIOS


def known_ids() -> list[str]:
    return [*SCENARIOS, *SCENARIOS.values()]


def spec(config: EnvConfig) -> EnvSpec:
    env = _open(config)
    try:
        return _spec(config, env.observation_space, env.action_space)
    finally:
        env.close()


def make(config: EnvConfig, num_envs: int, num_threads: int) -> VectorEnv:  # noqa: ARG001  (see module)
    _load(config)
    try:
        Path("_vizdoom").mkdir(exist_ok=True)  # else ViZDoom tries, and dies of a segmentation fault
    except OSError as error:
        raise ValueError(
            f"env.id = {config.id!r}: ViZDoom keeps a folder in the working directory, and cannot: {error}"
        ) from error
    return vectorize(partial(_open, config), partial(_spec, config), num_envs, config.vectorization)


def _spec(config: EnvConfig, observation_space: Space[Any], action_space: Space[Any]) -> EnvSpec:
    assert isinstance(observation_space, Box) and isinstance(action_space, Discrete)
    return EnvSpec(
        id=config.id,
        observation_shape=observation_space.shape,
        observation_dtype="uint8",
        frame_stack=config.frame_stack,
        num_actions=int(action_space.n),
        frame_skip=config.frame_skip,
    )


class Doom(gymnasium.Wrapper[Any, Any, Any, Any]):
    """One game: the screen as a frame, also when the episode is over, and discrete actions."""

    def __init__(self, env: Env, config: EnvConfig) -> None:
        super().__init__(env)
        self._config = config
        self._frame: Observations = np.zeros(frame_shape(config), np.uint8)
        self.observation_space = Box(0, 255, self._frame.shape, np.uint8)
        self._turning: Observations | None = None
        if isinstance(env.action_space, Dict):
            self._turning = np.zeros(env.action_space["continuous"].shape or (), np.float32)
            self.action_space = env.action_space["binary"]

    def reset(self, **seed_and_options: Any) -> tuple[Observations, dict[str, Any]]:
        observation, info = self.env.reset(**seed_and_options)
        return self._film(observation), info

    def step(self, action: Any) -> tuple[Observations, float, bool, bool, dict[str, Any]]:
        if self._turning is not None:
            action = {"binary": action, "continuous": self._turning}
        observation, reward, over, out_of_time, info = self.env.step(action)
        frame = self._frame if over else self._film(observation)
        return frame, float(reward), over and not out_of_time, out_of_time, info

    def _film(self, observation: Any) -> Observations:
        self._frame = to_frame(observation["screen"], self._config)
        return self._frame


def _open(config: EnvConfig) -> Env:
    settings = read_kwargs(VizdoomSettings, config.kwargs)
    _load(config)
    try:
        env: Env = gymnasium.make(
            SCENARIOS.get(config.id, config.id),
            disable_env_checker=True,
            frame_skip=config.frame_skip,
            max_buttons_pressed=settings.max_buttons_pressed,
            screen_resolution=_resolution(config),
            doom_config_path=os.devnull,  # where it would write down its settings
        )
    except gymnasium.error.Error as error:
        raise ValueError(f"env.id = {config.id!r}: unknown; {error}") from error
    return Doom(env, config)


def _load(config: EnvConfig) -> None:
    """Makes Gymnasium know the ids."""
    if importlib.util.find_spec("vizdoom") is None:
        raise ValueError(
            f"env.id = {config.id!r}: needs the package vizdoom, which is not installed; "
            "pip install 'vizdoom>=1.3'"
        )
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    importlib.import_module("vizdoom.gymnasium_wrapper")


def _resolution(config: EnvConfig) -> str:
    width, height = next(
        (width, height)
        for width, height in _RESOLUTIONS
        if width >= config.frame_width and height >= config.frame_height
    )
    return f"RES_{width}X{height}"
