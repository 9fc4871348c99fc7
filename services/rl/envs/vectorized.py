"""N environments that speak Gymnasium as one ``VectorEnv``, in this process or in one process each.

The suites gymnasium, vizdoom and dmlab come before this and say how one environment is opened. Its
observations are arrays, or Dicts of `frame` and `instruction`; its actions are numbered from 0.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.spaces import Space
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from services.rl.envs.base import (
    Actions,
    EnvSpec,
    Instructions,
    Observations,
    Transition,
    VectorEnv,
    env_seeds,
)

Env = gymnasium.Env[Any, Any]
SpecOf = Callable[[Space[Any], Space[Any]], EnvSpec]
"""Tells the spec from the spaces of observations and of actions."""

_CLOSE_TIMEOUT_S = 2.0


def vectorize(
    open_env: Callable[[], Env], spec_of: SpecOf, num_envs: int, how: Literal["sync", "async"]
) -> VectorEnv:
    """``num_envs`` environments: `sync` in this process, `async` in one each."""
    return (SyncGym if how == "sync" else AsyncGym)(open_env, spec_of, num_envs)


class SyncGym(VectorEnv):
    """N environments in this process, one after the other, inside ``send``."""

    def __init__(self, open_env: Callable[[], Env], spec_of: SpecOf, num_envs: int) -> None:
        self._envs = SyncVectorEnv([open_env] * num_envs, autoreset_mode=AutoresetMode.NEXT_STEP)
        self.spec = spec_of(self._envs.single_observation_space, self._envs.single_action_space)
        self.num_envs = num_envs
        self._newest: Any = None
        self._stepped: tuple[Any, ...] = ()

    def reset(self, seed: int) -> Observations:
        self._newest, _ = self._envs.reset(seed=list(env_seeds(seed, self.num_envs)))
        return _frames(self._newest)

    def send(self, actions: Actions) -> None:
        self._stepped = self._envs.step(actions)

    def recv(self) -> Transition:
        self._newest, *_ = self._stepped
        return _transition(*self._stepped)

    def instructions(self) -> Instructions | None:
        return _instructions(self._newest)

    def close(self) -> None:
        self._envs.close()


class AsyncGym(VectorEnv):
    """N environments in a process each, which step while the caller does something else."""

    def __init__(self, open_env: Callable[[], Env], spec_of: SpecOf, num_envs: int) -> None:
        # The actor has threads (sockets, weights), so its children must not be forks of it: they are forked
        # from a server that has none and has imported this module once for all of them.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._envs = AsyncVectorEnv(
            [open_env] * num_envs, context="forkserver", autoreset_mode=AutoresetMode.NEXT_STEP
        )
        self.spec = spec_of(self._envs.single_observation_space, self._envs.single_action_space)
        self.num_envs = num_envs
        self._newest: Any = None
        self._pending = False

    def reset(self, seed: int) -> Observations:
        self._newest, _ = self._envs.reset(seed=list(env_seeds(seed, self.num_envs)))
        return _frames(self._newest)

    def send(self, actions: Actions) -> None:
        self._envs.step_async(actions)
        self._pending = True

    def recv(self) -> Transition:
        """No timeout: a dead process ends its pipe and raises; a hung one is for the liveness probe."""
        self._pending = False
        stepped = self._envs.step_wait()
        self._newest, *_ = stepped
        return _transition(*stepped)

    def instructions(self) -> Instructions | None:
        return _instructions(self._newest)

    def close(self) -> None:
        hung = False
        if self._pending:
            try:
                self._envs.step_wait(timeout=_CLOSE_TIMEOUT_S)
            except (multiprocessing.TimeoutError, EOFError, ConnectionError):
                hung = True
        self._envs.close(terminate=hung)


def _transition(
    observation: Any,
    reward: Any,
    terminated: Any,
    truncated: Any,
    info: dict[str, Any],  # noqa: ARG001
) -> Transition:
    return Transition(
        observation=_frames(observation),
        reward=np.asarray(reward, np.float32),
        terminated=np.asarray(terminated),
        truncated=truncated & ~terminated,
        episode_over=terminated | truncated,
    )


def _frames(observation: Any) -> Observations:
    return np.asarray(observation["frame"] if isinstance(observation, dict) else observation)


def _instructions(observation: Any) -> Instructions | None:
    return np.asarray(observation["instruction"]) if isinstance(observation, dict) else None
