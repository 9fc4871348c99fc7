"""Environments of several tasks as one ``VectorEnv``, part after part.

All parts step at the same time: everything is sent before anything is received. One policy plays them all,
and where a part has fewer actions than the policy, the surplus ones act as action 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from services.rl.envs.base import (
    Actions,
    EnvSpec,
    Instructions,
    Observations,
    Transition,
    VectorEnv,
    env_seeds,
)


class Mixed(VectorEnv):
    """``parts`` in order. They agree with ``spec``, but for the number of actions."""

    def __init__(self, spec: EnvSpec, parts: Sequence[VectorEnv]) -> None:
        self.spec = spec
        self.num_envs = sum(part.num_envs for part in parts)
        self._parts = parts
        self._ends = np.cumsum([part.num_envs for part in parts])[:-1]

    def reset(self, seed: int) -> Observations:
        seeds = env_seeds(seed, len(self._parts))
        return np.concatenate([part.reset(s) for part, s in zip(self._parts, seeds, strict=True)])

    def send(self, actions: Actions) -> None:
        for part, chosen in zip(self._parts, np.split(actions, self._ends), strict=True):
            part.send(np.where(chosen < part.spec.num_actions, chosen, 0))

    def recv(self) -> Transition:
        seen = [part.recv() for part in self._parts]
        return Transition(
            observation=np.concatenate([part.observation for part in seen]),
            reward=np.concatenate([part.reward for part in seen]),
            terminated=np.concatenate([part.terminated for part in seen]),
            truncated=np.concatenate([part.truncated for part in seen]),
            episode_over=np.concatenate([part.episode_over for part in seen]),
        )

    def instructions(self) -> Instructions | None:
        said = [words for part in self._parts if (words := part.instructions()) is not None]
        return np.concatenate(said) if said else None

    def close(self) -> None:
        for part in self._parts:
            part.close()
