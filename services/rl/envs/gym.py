"""Any Gymnasium environment with discrete actions: a registered id, or the user's `package.module:factory`.

``env.kwargs`` go to ``gymnasium.make`` (so `max_episode_steps` is allowed) or to the factory. `sync` steps
the environments one after the other in this process, `async` in one process each. Observations become

- float32 vectors from one-dimensional boxes, and one-hot float32 vectors from Discrete;
- uint8 images (H, W), (H, W, 1) or (H, W, 3), made gray (or, with env.color, RGB) and resized to
  env.frame_height x env.frame_width, stacked env.frame_stack deep by whoever acts or learns.

Everything else is refused with its name. The conversion runs beside the environment, hence in its process.
"""

from __future__ import annotations

import importlib
import operator
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, Space
from gymnasium.wrappers import TransformAction, TransformObservation

from services.config import EnvConfig
from services.rl.envs.base import EnvSpec, Observations, VectorEnv
from services.rl.envs.images import frame_shape, to_frame
from services.rl.envs.vectorized import Env, vectorize

EXAMPLES: tuple[EnvConfig, ...] = (
    EnvConfig(id="CartPole-v1"),
    EnvConfig(id="CartPole-v1", vectorization="async", kwargs={"max_episode_steps": 12}),
    EnvConfig(id="FrozenLake-v1"),
    EnvConfig(id="gymnasium.envs.classic_control.cartpole:CartPoleEnv"),
)

_FACTORY = re.compile(r"(?P<module>[\w.]+):(?P<attribute>[A-Za-z_]\w*)")


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


def make(config: EnvConfig, num_envs: int, num_threads: int) -> VectorEnv:  # noqa: ARG001  (see module)
    return vectorize(partial(_open, config), partial(_spec, config), num_envs, config.vectorization)


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
    return _numbered(_converted(config, env))


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
        frames = Box(0, 255, frame_shape(config), np.uint8)
        return TransformObservation(env, partial(to_frame, config=config), frames)
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


def _numbered(env: Env) -> Env:
    """Actions are numbered from 0."""
    space = env.action_space
    if not isinstance(space, Discrete) or space.start == 0:
        return env
    return TransformAction(env, partial(operator.add, int(space.start)), Discrete(space.n))


def _spec(config: EnvConfig, observation_space: Space[Any], action_space: Space[Any]) -> EnvSpec:
    if not isinstance(action_space, Discrete):
        raise ValueError(  # noqa: TRY004  (as above)
            f"env.id = {config.id!r}: actions are {action_space}; allowed is Discrete"
        )
    assert isinstance(observation_space, Box)
    image = observation_space.dtype == np.uint8
    return EnvSpec(
        id=config.id,
        observation_shape=observation_space.shape,
        observation_dtype=str(observation_space.dtype),
        frame_stack=config.frame_stack if image else 1,
        num_actions=int(action_space.n),
        frame_skip=1,
    )
