"""Recall: a cue is shown once, and many blank steps later the action must name it. Tells memory from none.

An observation is the one-hot cue (first step of an episode only) followed by the query flag (last step only);
in between are `delay` blank steps whose actions count for nothing. At the query the action with the cue's
number earns +1, any other -1, and the episode terminates. With memory the return is 1; without, the
cue can only be guessed, so no policy expects more than 2 / num_cues - 1: 0 with the default two cues.
Every episode lasts delay + 2 steps, so all environments are in lockstep.

``env.kwargs``: `num_cues` and `delay`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from services.config import EnvConfig
from services.rl.envs.base import Actions, EnvSpec, Observations, read_kwargs
from services.rl.envs.lockstep import Lockstep, Rewards

EXAMPLES: tuple[EnvConfig, ...] = (
    EnvConfig(id="recall"),
    EnvConfig(id="recall", kwargs={"num_cues": 4, "delay": 0}),
)


@dataclass(frozen=True)
class RecallSettings:
    """env.kwargs."""

    num_cues: int = 2
    delay: int = 8

    def __post_init__(self) -> None:
        if not 2 <= self.num_cues <= 64:
            raise ValueError(f"env.kwargs.num_cues = {self.num_cues}: allowed is 2 to 64")
        if not 0 <= self.delay <= 1000:
            raise ValueError(f"env.kwargs.delay = {self.delay}: allowed is 0 to 1000")


def plays(env_id: str) -> bool:
    return env_id == "recall"


def known_ids() -> list[str]:
    return ["recall"]


def spec(config: EnvConfig) -> EnvSpec:
    settings = read_kwargs(RecallSettings, config.kwargs)
    return EnvSpec(
        id=config.id,
        observation_shape=(settings.num_cues + 1,),
        observation_dtype="float32",
        frame_stack=1,
        num_actions=settings.num_cues,
        frame_skip=1,
    )


def make(config: EnvConfig, num_envs: int, num_threads: int) -> Recall:  # noqa: ARG001  (too light for threads)
    return Recall(config, num_envs)


class Recall(Lockstep):
    """N recalls."""

    def __init__(self, config: EnvConfig, num_envs: int) -> None:
        super().__init__(spec(config), num_envs)
        self._settings = read_kwargs(RecallSettings, config.kwargs)
        self._cue = np.zeros(num_envs, np.int64)
        self._step = 0

    def begin(self) -> Observations:
        self._step = 0
        self._cue = self.rng.integers(self._settings.num_cues, size=self.num_envs)
        observation = np.zeros((self.num_envs, *self.spec.observation_shape), np.float32)
        observation[self.envs, self._cue] = 1
        return observation

    def advance(self, actions: Actions) -> tuple[Observations, Rewards]:
        query = self._settings.delay + 1
        answered = self._step == query
        self._step += 1
        observation = np.zeros((self.num_envs, *self.spec.observation_shape), np.float32)
        observation[:, -1] = self._step == query
        if not answered:
            return observation, self.no_reward()
        return observation, np.where(actions == self._cue, 1, -1).astype(np.float32)
