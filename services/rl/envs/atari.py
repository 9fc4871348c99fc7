"""Atari 2600 games, stepped by the C++ threads of ``ale_py.vector_env.AtariVectorEnv``.

Ids name a game: `ALE/Pong-v5`, and also `PongNoFrameskip-v4`, `Pong-v4` or `pong`. The suffix only spells:
frame skip, sticky actions and so on come from the configuration, whatever Gymnasium binds to the id.
ALE makes the frames (maximum of the last two, gray or RGB, resized by area); stacking is left to others,
rewards are raw. At the start of a game FIRE is pressed once where the game has it; after a lost life the
policy must.

A lost life is detected here, from the number of lives: ALE's own flag for it (``life_loss_info``) cannot be
told from the end of a game that ends with lives left (Adventure), and hides a truncation in the same step.
A truncation stops ALE before it has filmed the last frame of the step, so that final observation shows the
game a frame earlier, with traces of the previous observation; all others are exact.

An emulator takes about 0.15 s to start (its ROM is loaded at construction and again to be seeded).
"""

from __future__ import annotations

import difflib
import re

import ale_py
import numpy as np
import numpy.typing as npt
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode

from services.config import EnvConfig
from services.rl.envs.base import Actions, EnvSpec, Observations, Transition, VectorEnv, env_seeds
from services.rl.envs.images import frame_shape

EXAMPLES: tuple[EnvConfig, ...] = (
    EnvConfig(id="ALE/Breakout-v5", max_episode_frames=600),
    EnvConfig(
        id="pong",
        frame_skip=1,
        sticky_actions=0.25,
        full_action_set=True,
        max_episode_frames=30,
        frame_width=72,
        color=True,
    ),
)

_MULTIPLAYER = {"combat", "joust", "maze_craze", "warlords"}  # ALE ends the process when it loads them
_SPELLING = re.compile(
    r"(?P<ale>ALE/)?(?P<game>\w+?)(?P<variant>NoFrameskip|Deterministic)?(?P<version>-v[045])?"
)


def plays(env_id: str) -> bool:
    spelling = _SPELLING.fullmatch(env_id)
    if env_id.startswith("ALE/") or (spelling and spelling["variant"]):
        return True
    return spelling is not None and _plain(spelling["game"]) in _games()


def known_ids() -> list[str]:
    return [f"ALE/{rom.title().replace('_', '')}-v5" for rom in _games().values()]


def spec(config: EnvConfig) -> EnvSpec:
    return EnvSpec(
        id=config.id,
        observation_shape=frame_shape(config),
        observation_dtype="uint8",
        frame_stack=config.frame_stack,
        num_actions=len(_actions(config)),
        frame_skip=config.frame_skip,
    )


def make(config: EnvConfig, num_envs: int, num_threads: int) -> Atari:
    return Atari(config, num_envs, num_threads)


class Atari(VectorEnv):
    """N emulators of one game. ALE hands every ``recv`` fresh arrays, so none are copied."""

    def __init__(self, config: EnvConfig, num_envs: int, num_threads: int) -> None:
        self.spec = spec(config)
        self.num_envs = num_envs
        self._life_loss_terminates = config.life_loss_ends_episode
        self._actions = _actions(config)
        self._emulators = AtariVectorEnv(
            _rom(config),
            num_envs,
            num_threads=num_threads,
            max_num_frames_per_episode=config.max_episode_frames,
            repeat_action_probability=config.sticky_actions,
            full_action_space=config.full_action_set,
            autoreset_mode=AutoresetMode.NEXT_STEP,
            img_height=config.frame_height,
            img_width=config.frame_width,
            grayscale=not config.color,
            stack_num=1,
            frameskip=config.frame_skip,
            noop_max=config.noop_max,
            episodic_life=False,  # it would reset the whole game, and later lives would never be played
            life_loss_info=False,
            reward_clipping=False,
        )
        self._lives = np.zeros(num_envs, np.int32)
        self._resetting = np.zeros(num_envs, np.bool_)

    def reset(self, seed: int) -> Observations:
        observation, info = self._emulators.reset(seed=np.array(env_seeds(seed, self.num_envs)))
        self._lives = info["lives"]
        self._resetting = np.zeros(self.num_envs, np.bool_)
        return self._frames(observation)

    def send(self, actions: Actions) -> None:
        self._emulators.send(self._actions[actions])

    def recv(self) -> Transition:
        observation, reward, game_over, out_of_time, info = self._emulators.recv()
        lives = info["lives"]
        terminated = game_over
        if self._life_loss_terminates:
            # Some games show 0 lives for a while before they are over: that is one end, not two.
            life_lost = (lives < self._lives) & (lives > 0) & ~self._resetting
            terminated = game_over | life_lost
        self._lives = lives
        self._resetting = game_over | out_of_time
        return Transition(
            observation=self._frames(observation),
            reward=reward.astype(np.float32),
            terminated=terminated,
            truncated=out_of_time & ~terminated,
            episode_over=self._resetting.copy(),
        )

    def close(self) -> None:
        del self._emulators  # joins its threads

    def _frames(self, stacks_of_one: Observations) -> Observations:
        return stacks_of_one[:, 0]


def _rom(config: EnvConfig) -> str:
    if config.kwargs:
        raise ValueError(
            f"env.kwargs.{next(iter(config.kwargs))}: unknown; Atari games take none, "
            "they are set up by env.frame_skip, env.sticky_actions and the like"
        )
    spelling = _SPELLING.fullmatch(config.id)
    rom = _games().get(_plain(spelling["game"])) if spelling else None
    if rom is None:
        known = {_plain(rom): env_id for rom, env_id in zip(_games().values(), known_ids(), strict=True)}
        wrong = _plain(spelling["game"] if spelling else config.id.removeprefix("ALE/"))
        close = difflib.get_close_matches(wrong, known, n=3, cutoff=0.5) or ["pong", "breakout"]
        suggestion = " or ".join(known[game] for game in close)
        raise ValueError(f"env.id = {config.id!r}: unknown Atari game; did you mean {suggestion}?")
    return rom


def _games() -> dict[str, str]:
    """Rom ids by their name without case and underscores."""
    return {_plain(rom): rom for rom in sorted(roms.get_all_rom_ids()) if rom not in _MULTIPLAYER}


def _plain(game: str) -> str:
    return game.replace("_", "").lower()


def _actions(config: EnvConfig) -> npt.NDArray[np.int64]:
    """For each of our actions, its place in the emulator's own list of the game's actions.

    All 18 are those of the joystick. Two games know no fire button and have only nine; an action that presses
    it does without there, because the same number has to mean the same in every game. (ALE's threads die of
    an action that is not in their list, and then ``recv`` waits for ever.)
    """
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # it greets on stderr otherwise
    emulator = ale_py.ALEInterface()
    path = roms.get_rom_path(_rom(config))
    assert path is not None, config.id
    emulator.loadROM(path)
    if not config.full_action_set:
        return np.arange(len(emulator.getMinimalActionSet()))
    places = {action.name: place for place, action in enumerate(emulator.getLegalActionSet())}
    return np.array(
        [places.get(name, places[name.removesuffix("FIRE") or "NOOP"]) for name in ale_py.Action.__members__]
    )
