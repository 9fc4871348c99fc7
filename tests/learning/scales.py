"""Two tasks with nothing in common but the policy, and rewards that differ a thousandfold.

An observation is a cue, one-hot, in the half of the vector that belongs to the task. The small task wants the
cue's own number, the large one the next. Ten cues make an episode; each right answer is rewarded.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

NUM_CUES = 4
EPISODE_LENGTH = 10

Observation = NDArray[np.float32]


class Cues(gymnasium.Env[Observation, np.int64]):
    """Task number ``task``."""

    def __init__(self, task: int, reward: float) -> None:
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (2 * NUM_CUES,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(NUM_CUES)
        self._task = task
        self._reward = reward
        self._cue = 0
        self._left = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self._left = EPISODE_LENGTH
        return self._show(), {}

    def step(self, action: np.int64) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        right = int(action) == (self._cue + self._task) % NUM_CUES
        self._left -= 1
        return self._show(), self._reward * right, self._left == 0, False, {}

    def _show(self) -> Observation:
        self._cue = int(self.np_random.integers(NUM_CUES))
        observation = np.zeros(2 * NUM_CUES, np.float32)
        observation[self._task * NUM_CUES + self._cue] = 1.0
        return observation


def small() -> Cues:
    return Cues(task=0, reward=1.0)


def large() -> Cues:
    return Cues(task=1, reward=1000.0)
