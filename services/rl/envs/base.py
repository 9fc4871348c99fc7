"""What every suite of environments offers: the words that the actor's loop and the suites share.

A suite is a module with the members of ``Suite``; what it builds is a ``VectorEnv`` of N environments
that step together. Autoreset is NEXT_STEP everywhere: the transition that ends an episode brings the true
final observation, the next one ignores its action and brings the reset observation, reward 0, all flags
False. Observations are single frames: whoever acts or learns stacks them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from services.config import EnvConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Observations = npt.NDArray[Any]
"""[N, *observation_shape] of the dtype that the spec names."""
Actions = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Instructions = npt.NDArray[np.int32]
"""[N, instruction_length] word ids, as ``instructions.hash_words`` makes them."""


@dataclass(frozen=True, kw_only=True)
class EnvSpec:
    """What a network and a rollout must know about an environment."""

    id: str
    """As the configuration spells it."""
    observation_shape: tuple[int, ...]
    """Of one observation of one environment, not stacked: (84, 84) for Atari, (84, 84, 3) with env.color,
    (4,) for CartPole."""
    observation_dtype: str
    """`uint8` for images, `float32` for vectors."""
    frame_stack: int
    """Frames that the network sees at once; 1 for vectors."""
    num_actions: int
    """Actions are 0 ... num_actions - 1."""
    frame_skip: int
    """Frames per agent step; 1 where the notion does not exist."""
    instruction_length: int = 0
    """Word ids that come with each observation; 0 where nothing is said."""


@dataclass(frozen=True, kw_only=True)
class Transition:
    """What followed the actions of the last ``send``. The arrays are the caller's to keep."""

    observation: Observations
    """[N, *observation_shape]; at an episode's end the true final observation."""
    reward: npt.NDArray[np.float32]
    """[N] raw, never clipped."""
    terminated: Flags
    """[N] the value of ``observation`` must not be bootstrapped (also at a lost life, if configured)."""
    truncated: Flags
    """[N] a time limit: bootstrap from ``observation``. Never together with ``terminated``."""
    episode_over: Flags
    """[N] the whole episode is over, so the next transition is the reset. False at a mere lost life."""


class VectorEnv(Protocol):
    """N environments. Calls go reset, send, recv, send, recv, ...; reset is free after a recv.

    Suites inherit from this, for the sake of ``instructions``, which few of them have."""

    spec: EnvSpec
    num_envs: int

    def reset(self, seed: int) -> Observations:
        """Start N new episodes, each environment seeded from ``seed`` and its index."""
        ...

    def send(self, actions: Actions) -> None:
        """Act. Returns at once where the suite steps in the background."""
        ...

    def recv(self) -> Transition:
        """Wait for what followed."""
        ...

    def instructions(self) -> Instructions | None:
        """[N, instruction_length] what the newest observation asks for, which ``reset`` or ``recv`` has just
        returned; None where nothing is ever said. The array is the caller's to keep."""
        return None

    def close(self) -> None:
        """Give everything back, even between ``send`` and ``recv``."""
        ...


class Suite(Protocol):
    """A family of environments: a module with these members, and one line in ``SUITES``."""

    EXAMPLES: tuple[EnvConfig, ...]
    """Small configurations that the contract tests play; every episode ends within 300 random steps (of
    DeepMind Lab in the tests' stand-in for it)."""

    def plays(self, env_id: str) -> bool:
        """Whether the id belongs to this suite (it may still be misspelt, which ``spec`` says)."""
        ...

    def known_ids(self) -> list[str]:
        """Ids to suggest to whoever misspells one."""
        ...

    def spec(self, config: EnvConfig) -> EnvSpec:
        """The spec of ``config``'s environment; may open one and close it."""
        ...

    def make(self, config: EnvConfig, num_envs: int, num_threads: int) -> VectorEnv:
        """``num_envs`` environments that step on at most ``num_threads`` threads."""
        ...


def env_seeds(seed: int, num_envs: int) -> list[int]:
    """One seed for each environment. Hashed, so that seed 1 does not share environments with seed 2."""
    return [int(np.random.SeedSequence([seed, index]).generate_state(1)[0] >> 1) for index in range(num_envs)]


SettingsT = TypeVar("SettingsT", bound="DataclassInstance")


def read_kwargs(
    settings: type[SettingsT], kwargs: Mapping[str, str | int | float | bool | None]
) -> SettingsT:
    """``env.kwargs`` as the dataclass ``settings``, whose defaults tell the allowed names and types."""
    defaults = {field.name: field.default for field in fields(settings)}
    for name, value in kwargs.items():
        if name not in defaults:
            raise ValueError(f"env.kwargs.{name}: unknown; allowed are {', '.join(defaults)}")
        allowed = type(defaults[name])
        if type(value) is not allowed:  # exact: True is not a number of rows
            raise ValueError(f"env.kwargs.{name} = {value!r}: allowed is {allowed.__name__}")
    return settings(**kwargs)
