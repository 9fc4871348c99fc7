"""Environments of a user's own, as `package.module:factory` finds them. Every step can be told by hand."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, Space


class Ladder(gymnasium.Env[Any, Any]):
    """Rungs 1 to 4; action -1 climbs down, 0 stays, 1 climbs up, which pays the new rung. Over on rung 4."""

    observation_space: Space[Any] = Discrete(4, start=1)
    action_space: Space[Any] = Discrete(3, start=-1)

    def __init__(self, first: int = 1) -> None:
        self._first = first
        self._rung = first

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self._rung = self._first
        return self._rung, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        assert action in (-1, 0, 1)
        self._rung = max(1, self._rung + action)
        reward = float(self._rung) if action == 1 else 0.0
        return self._rung, reward, self._rung == 4, self._rung == 4, {}


class Camera(gymnasium.Env[Any, Any]):
    """Films in whatever format it is told: the left half is red (or white), the right half black."""

    def __init__(self, shape: str = "60x80x3", dtype: str = "uint8") -> None:
        self._shape = tuple(int(side) for side in shape.split("x"))
        self.observation_space = Box(0, 255, self._shape, np.dtype(dtype).type)
        self.action_space = Discrete(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._film(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._film(), 0.0, False, False, {}

    def _film(self) -> Any:
        image = np.zeros(self._shape, np.uint8)
        image[:, : self._shape[1] // 2, ...] = 255
        if image.ndim == 3 and self._shape[2] == 3:
            image[..., 1:] = 0
        return image


def ladder(first: int = 1) -> gymnasium.Env[Any, Any]:
    return Ladder(first)


def steering() -> gymnasium.Env[Any, Any]:
    """Actions that are not discrete."""
    env = Camera()
    env.action_space = Box(-1, 1, (2,), np.float32)
    return env


def dictionary() -> gymnasium.Env[Any, Any]:
    """Observations that are neither vector nor image."""
    env = Camera()
    env.observation_space = Dict({"image": env.observation_space})
    return env


def nothing() -> None:
    """Not an environment."""


NUMBER = 3
