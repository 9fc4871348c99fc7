"""Two tasks that tell themselves apart: by what they show, pay and allow, and by how long they take."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray

HERE = __name__


class Errand(gymnasium.Env[Any, Any]):
    """Shows its mark and the step, pays its mark at every step, and refuses actions that it does not have."""

    def __init__(self, mark: int, num_actions: int, length: int) -> None:
        self.observation_space = Box(0, 100, (2,), np.float32)
        self.action_space = Discrete(num_actions)
        self._mark = mark
        self._length = length
        self._step = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self._step = 0
        return self._show(), {}

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), f"{action = } of {self.action_space}"
        self._step += 1
        return self._show(), float(self._mark), self._step == self._length, False, {}

    def _show(self) -> NDArray[np.float32]:
        return np.array([self._mark, self._step], np.float32)


def short() -> Errand:
    """2 actions; 3 steps that pay 1 each."""
    return Errand(mark=1, num_actions=2, length=3)


def long() -> Errand:
    """4 actions; 5 steps that pay 10 each."""
    return Errand(mark=10, num_actions=4, length=5)
