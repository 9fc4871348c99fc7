"""A policy at N environments, step after step: it sees what it sees in an actor, and nothing is recorded.

The evaluator comes after this. ``actor/loop.py`` has the same window of frames, starts and memory inside the
unrolls that it sends, without a copy; a test holds that both show a policy the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.rl.envs import Transition, VectorEnv
from services.rl.policy import Policy


class Player:
    """Begins with new episodes. Shapes: N environments, F the newest frames, as many as are stacked."""

    def __init__(self, env: VectorEnv, policy: Policy, seed: int) -> None:
        spec, N = env.spec, env.num_envs
        self.env = env
        self._policy = policy
        self._seed = seed
        self._frames_NF: NDArray[Any] = np.zeros(
            (N, spec.frame_stack, *spec.observation_shape), spec.observation_dtype
        )
        self._episode_start_NF = np.zeros((N, spec.frame_stack), np.bool_)
        self.restart()

    def restart(self) -> None:
        """Leave all episodes as they are, and begin others."""
        N = self.env.num_envs
        self._memory = self._policy.new_memory(N)
        self._frames_NF[:] = 0
        self._episode_start_NF[:] = False
        self._episode_over = np.zeros(N, np.bool_)
        self._frames_NF[:, -1] = self.env.reset(self._seed)
        self._episode_start_NF[:, -1] = True
        self._seed += 1  # environments hash it: the next one has nothing in common with it

    def step(self) -> Transition:
        """Act in all environments; what followed. After an episode's end that is a reset, acted by nobody."""
        instruction = self.env.instructions() if self._policy.reads_instructions else None
        actions, _ = self._policy.act(self._frames_NF, self._episode_start_NF, self._memory, instruction)
        self.env.send(actions)
        transition = self.env.recv()
        for window in (self._frames_NF, self._episode_start_NF):
            window[:, :-1] = window[:, 1:]
        self._frames_NF[:, -1] = transition.observation
        self._episode_start_NF[:, -1] = self._episode_over
        self._episode_over = transition.episode_over
        if self._memory is not None:
            self._memory.last_reward_N = transition.reward
        return transition
