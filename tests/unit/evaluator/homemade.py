"""Games whose returns can be worked out, as `tests.unit.evaluator.homemade:factory` finds them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, Space
from torch import Tensor

from services.config import NetworkConfig
from services.rl.envs import EnvSpec
from services.rl.networks.torso import Torso

NUM_STEPS = 8


class Diary(gymnasium.Env[Any, Any]):
    """Shows nothing, and writes down what is done: step t pays 2^t for action 1, nothing for action 0.

    So the return of an episode, read as a binary number, is the sequence of its actions.
    """

    observation_space: Space[Any] = Box(0, 1, (1,), np.float32)

    def __init__(self, num_actions: int = 2) -> None:
        self.action_space = Discrete(num_actions)
        self._step = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._step = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = float(2**self._step) if action == 1 else 0.0
        self._step += 1
        return np.zeros(1, np.float32), reward, self._step == NUM_STEPS, False, {}


def diary(num_actions: int = 2) -> gymnasium.Env[Any, Any]:
    return Diary(num_actions)


class Beacon(Diary):
    """Leaves a file with its process's id when it is played."""

    def __init__(self, directory: str) -> None:
        super().__init__()
        self._directory = Path(directory)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        (self._directory / str(os.getpid())).touch()
        return super().step(action)


class Refusing(Diary):
    """Lacks something that only its user can bring."""

    num_open = 0
    """In this process."""

    def __init__(self) -> None:
        super().__init__()
        Refusing.num_open += 1

    def close(self) -> None:
        Refusing.num_open -= 1

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        raise ValueError("env.kwargs.dataset_path = '':\n    the images are missing")


class Broken(Diary):
    """Has a bug that shows in the middle of its first episode."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self._error = error

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self._step == NUM_STEPS // 2:
            raise self._error("array of the wrong size")
        return super().step(action)


class Endless(Diary):
    """Never ends."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(1, np.float32), 1.0, False, False, {}


def broken() -> gymnasium.Env[Any, Any]:
    return Broken(ValueError)


def cut_off() -> gymnasium.Env[Any, Any]:
    """As if what it talks to had died."""
    return Broken(BrokenPipeError)


def endless() -> gymnasium.Env[Any, Any]:
    return Endless()


def refusing() -> gymnasium.Env[Any, Any]:
    return Refusing()


def beacon(directory: str) -> gymnasium.Env[Any, Any]:
    return Beacon(directory)


def wide() -> gymnasium.Env[Any, Any]:
    """The same with another shape of what is shown."""
    env = Diary()
    env.observation_space = Box(0, 1, (2,), np.float32)
    return env


class Constant(Torso):
    """Sees nothing: what the policy does follows from its biases and its memory."""

    num_features = 1

    def forward(self, observation: Tensor) -> Tensor:
        return observation.flatten(1)[:, :1] * 0


def constant(spec: EnvSpec, config: NetworkConfig) -> Constant:
    return Constant()
