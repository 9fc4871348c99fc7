"""What the built-in suites share: N episodes of one length, computed together, that end at the same step.

A task gives ``begin`` and ``advance``; autoreset and flags are here. A reward ends the episode.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import numpy.typing as npt

from services.rl.envs.base import Actions, EnvSpec, Observations, Transition, VectorEnv

Rewards = npt.NDArray[np.float32]


class Lockstep(VectorEnv):
    """N episodes of one task."""

    def __init__(self, spec: EnvSpec, num_envs: int) -> None:
        self.spec = spec
        self.num_envs = num_envs
        self.envs = np.arange(num_envs)
        self.rng = np.random.default_rng()
        self._actions = np.zeros(num_envs, np.int64)
        self._over = False

    @abstractmethod
    def begin(self) -> Observations:
        """Start N new episodes, drawn from ``rng``."""

    @abstractmethod
    def advance(self, actions: Actions) -> tuple[Observations, Rewards]:
        """One step of all N. The last one rewards every environment, +1 or -1; the others none."""

    def reset(self, seed: int) -> Observations:
        """Start anew, from ``seed``."""
        self.rng = np.random.default_rng(seed)
        self._over = False
        return self.begin()

    def send(self, actions: Actions) -> None:
        """Nothing runs in the background: ``recv`` does the work."""
        self._actions = actions

    def recv(self) -> Transition:
        """What followed the actions."""
        observation, reward = (self.begin(), self.no_reward()) if self._over else self.advance(self._actions)
        over = reward != 0
        self._over = bool(over.any())
        return Transition(
            observation=observation,
            reward=reward,
            terminated=over,
            truncated=np.zeros(self.num_envs, np.bool_),
            episode_over=over.copy(),
        )

    def close(self) -> None:
        """Nothing is held."""

    def no_reward(self) -> Rewards:
        """Of a step that is not the last."""
        return np.zeros(self.num_envs, np.float32)
