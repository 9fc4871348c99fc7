"""Any Gymnasium environment with discrete actions: a registered id, or the user's `package.module:factory`.

``env.kwargs`` go to ``gymnasium.make`` (so `max_episode_steps` is allowed) or to the factory. `sync` steps
the environments one after the other in this process, `async` in one process each. Observations become

- float32 vectors from one-dimensional boxes, and one-hot float32 vectors from Discrete;
- uint8 images (H, W), (H, W, 1) or (H, W, 3), made gray and resized to env.frame_height x env.frame_width,
  stacked env.frame_stack deep by whoever acts or learns.

Everything else is refused with its name. The conversion runs beside the environment, hence in its process.
"""

from __future__ import annotations

import importlib
import multiprocessing
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, Space
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TransformObservation

from services.config import EnvConfig
from services.rl.envs.base import Actions, EnvSpec, Observations, Transition, env_seeds

EXAMPLES: tuple[EnvConfig, ...] = (
    EnvConfig(id="CartPole-v1"),
    EnvConfig(id="CartPole-v1", vectorization="async", kwargs={"max_episode_steps": 12}),
    EnvConfig(id="FrozenLake-v1"),
    EnvConfig(id="gymnasium.envs.classic_control.cartpole:CartPoleEnv"),
)

_FACTORY = re.compile(r"(?P<module>[\w.]+):(?P<attribute>[A-Za-z_]\w*)")
_CLOSE_TIMEOUT_S = 2.0

Env = gymnasium.Env[Any, Any]


def plays(env_id: str) -> bool:
    return ":" in env_id or env_id in gymnasium.registry


def known_ids() -> list[str]:
    return [
        env_id
        for env_id, spec in gymnasium.registry.items()
        if not str(spec.entry_point).startswith("ale_py")  # those have their own suite
    ]


def spec(config: EnvConfig) -> EnvSpec:
    env = _open(config)
    try:
        return _spec(config, env.observation_space, env.action_space)
    finally:
        env.close()


def make(config: EnvConfig, num_envs: int, num_threads: int) -> SyncGym | AsyncGym:  # noqa: ARG001  (see module)
    return SyncGym(config, num_envs) if config.vectorization == "sync" else AsyncGym(config, num_envs)


class SyncGym:
    """N environments in this process, one after the other, inside ``send``."""

    def __init__(self, config: EnvConfig, num_envs: int) -> None:
        self._envs = SyncVectorEnv(
            [partial(_open, config)] * num_envs, autoreset_mode=AutoresetMode.NEXT_STEP
        )
        self.spec = _spec(config, self._envs.single_observation_space, self._envs.single_action_space)
        self.num_envs = num_envs
        self._first_action = _first_action(self._envs.single_action_space)
        self._stepped: tuple[Any, ...] = ()

    def reset(self, seed: int) -> Observations:
        observation, _ = self._envs.reset(seed=list(env_seeds(seed, self.num_envs)))
        return np.asarray(observation)

    def send(self, actions: Actions) -> None:
        self._stepped = self._envs.step(actions + self._first_action)

    def recv(self) -> Transition:
        return _transition(*self._stepped)

    def close(self) -> None:
        self._envs.close()


class AsyncGym:
    """N environments in a process each, which step while the caller does something else."""

    def __init__(self, config: EnvConfig, num_envs: int) -> None:
        # The actor has threads (sockets, weights), so its children must not be forks of it: they are forked
        # from a server that has none and has imported this module once for all of them.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._envs = AsyncVectorEnv(
            [partial(_open, config)] * num_envs,
            context="forkserver",
            autoreset_mode=AutoresetMode.NEXT_STEP,
        )
        self.spec = _spec(config, self._envs.single_observation_space, self._envs.single_action_space)
        self.num_envs = num_envs
        self._first_action = _first_action(self._envs.single_action_space)
        self._pending = False

    def reset(self, seed: int) -> Observations:
        observation, _ = self._envs.reset(seed=list(env_seeds(seed, self.num_envs)))
        return np.asarray(observation)

    def send(self, actions: Actions) -> None:
        self._envs.step_async(actions + self._first_action)
        self._pending = True

    def recv(self) -> Transition:
        """No timeout: a dead process ends its pipe and raises; a hung one is for the liveness probe."""
        self._pending = False
        return _transition(*self._envs.step_wait())

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
        observation=np.asarray(observation),
        reward=np.asarray(reward, np.float32),
        terminated=np.asarray(terminated),
        truncated=truncated & ~terminated,
        episode_over=terminated | truncated,
    )


def _open(config: EnvConfig) -> Env:
    """One environment whose observations are float32 vectors or uint8 images."""
    create = _creator(config.id)
    try:
        env = create(**config.kwargs)
    except (TypeError, ValueError, AttributeError, ImportError, gymnasium.error.Error) as error:
        raise ValueError(
            f"env.id = {config.id!r} with env.kwargs = {config.kwargs}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(env, gymnasium.Env):
        raise ValueError(  # noqa: TRY004  (the user's to mend, like the rest of the configuration)
            f"env.id = {config.id!r}: returned {type(env).__name__}; allowed is a gymnasium.Env"
        )
    return _converted(config, env)


def _creator(env_id: str) -> Callable[..., Any]:
    factory = _FACTORY.fullmatch(env_id)
    if factory is None:  # also `package.module:Name-v0`, for which Gymnasium imports the module itself
        return partial(gymnasium.make, env_id, disable_env_checker=True)
    try:
        module = importlib.import_module(factory["module"])
    except ImportError as error:
        raise ValueError(f"env.id = {env_id!r}: cannot import {factory['module']}: {error}") from error
    create: Callable[..., Any] | None = getattr(module, factory["attribute"], None)
    if create is None:
        raise ValueError(f"env.id = {env_id!r}: {factory['module']} has no attribute {factory['attribute']}")
    return create


def _converted(config: EnvConfig, env: Env) -> Env:
    space = env.observation_space
    if isinstance(space, Discrete):
        one_hot = partial(_one_hot, first=int(space.start), size=int(space.n))
        return TransformObservation(env, one_hot, Box(0, 1, (int(space.n),), np.float32))
    if isinstance(space, Box) and len(space.shape) == 1:
        return TransformObservation(env, _floats, Box(-np.inf, np.inf, space.shape, np.float32))
    if _is_image(space):
        shape = (config.frame_height, config.frame_width)
        return TransformObservation(env, partial(_gray, shape=shape), Box(0, 255, shape, np.uint8))
    raise ValueError(
        f"env.id = {config.id!r}: observations are {space}; allowed are Discrete, one-dimensional Box, "
        "and Box of uint8 images (H, W), (H, W, 1) or (H, W, 3)"
    )


def _is_image(space: Space[Any]) -> bool:
    if not isinstance(space, Box) or space.dtype != np.uint8:
        return False
    return len(space.shape) == 2 or (len(space.shape) == 3 and space.shape[2] in (1, 3))


def _one_hot(observation: Any, first: int, size: int) -> Observations:
    vector = np.zeros(size, np.float32)
    vector[int(observation) - first] = 1
    return vector


def _floats(observation: Any) -> Observations:
    return np.asarray(observation, np.float32)


def _gray(observation: Any, shape: tuple[int, int]) -> Observations:
    import cv2  # takes longer to import than everything else here, and only images need it

    cv2.setNumThreads(1)  # the actor's processors are spoken for
    image = np.asarray(observation)
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if image.shape[2] == 3 else image[:, :, 0]
    height, width = shape
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA))


def _spec(config: EnvConfig, observation_space: Space[Any], action_space: Space[Any]) -> EnvSpec:
    if not isinstance(action_space, Discrete):
        raise ValueError(  # noqa: TRY004  (as above)
            f"env.id = {config.id!r}: actions are {action_space}; allowed is Discrete"
        )
    assert isinstance(observation_space, Box)
    image = len(observation_space.shape) == 2
    return EnvSpec(
        id=config.id,
        observation_shape=observation_space.shape,
        observation_dtype=str(observation_space.dtype),
        frame_stack=config.frame_stack if image else 1,
        num_actions=int(action_space.n),
        frame_skip=1,
    )


def _first_action(action_space: Space[Any]) -> int:
    assert isinstance(action_space, Discrete)
    return int(action_space.start)
