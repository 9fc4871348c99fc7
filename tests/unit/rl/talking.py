"""An environment in which everything depends on everything, for tests of what a policy is shown."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from services.rl.envs import EnvSpec, Transition, VectorEnv
from services.rl.networks.torso import Torso

LENGTHS = (3, 7, 1, 4, 11)
"""Of the episodes of each environment, one after the other, beginning elsewhere for each."""
SPEC = EnvSpec(
    id="talking",
    observation_shape=(2, 3),
    observation_dtype="uint8",
    frame_stack=3,
    num_actions=4,
    frame_skip=1,
    instruction_length=5,
)


class Talking(VectorEnv):
    """What it shows, says and pays depends on all that was done. Ends are terminations and time limits."""

    spec = SPEC

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self._history = np.zeros(num_envs, np.int64)
        self._episode = np.zeros(num_envs, np.int64)
        self._step = np.zeros(num_envs, np.int64)
        self._over = np.zeros(num_envs, np.bool_)
        self._actions = np.zeros(num_envs, np.int64)

    def reset(self, seed: int) -> NDArray[Any]:
        self._history = 17 * seed + 5 * np.arange(self.num_envs)
        self._episode = seed + np.arange(self.num_envs)
        return self._show()

    def send(self, actions: NDArray[np.int64]) -> None:
        self._actions = actions.copy()

    def recv(self) -> Transition:
        resetting, actions = self._over, self._actions
        self._history = (31 * self._history + np.where(resetting, 3, 7 * actions + 1)) % 251
        self._step = np.where(resetting, 0, self._step + 1)
        self._over = ~resetting & (self._step == np.array(LENGTHS)[self._episode % len(LENGTHS)])
        self._episode += self._over
        lost_life = ~resetting & ~self._over & (self._history % 5 == 0)
        by_clock = self._episode % 2 == 0
        return Transition(
            observation=self._show(),
            reward=np.where(resetting, 0, self._history / 50 - 2).astype(np.float32),
            terminated=(self._over & ~by_clock) | lost_life,
            truncated=self._over & by_clock,
            episode_over=self._over.copy(),
        )

    def instructions(self) -> NDArray[np.int32]:
        words: NDArray[np.int64] = self._history[:, None] // np.arange(1, 6) % 90 + 1
        words[:, 2 + self._history.min() % 3 :] = 0
        return words.astype(np.int32)

    def close(self) -> None:
        pass

    def _show(self) -> NDArray[np.uint8]:
        return (self._history[:, None, None] + np.arange(6).reshape(2, 3)).astype(np.uint8)


class Flat(Torso):
    """All pixels as they are."""

    num_features = 2 * 3 * 3

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() / 255
