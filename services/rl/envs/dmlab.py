"""DeepMind Lab: first-person levels, some of which say in words what they want.

Ids are `dmlab/<level>` and the bare names of the levels of DMLab-30, which live in `contributed/dmlab30`. The
nine actions are those of Espeholt et al. 2018. Every environment is a process of its own, whatever
env.vectorization says, because Lab is one engine per process. Lab has no observation once an episode is over,
so the final one is the one before it; the end is a termination, as it is for the paper's agents.

``env.kwargs``: `dataset_path` (images for two of the psychlab levels), `renderer`, `level_cache` (a directory
for compiled maps, which may be shared) and `test` (mazes that training never draws; always on for levels
whose names end in `_test`).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete

from services.config import EnvConfig
from services.rl import scores
from services.rl.envs.base import EnvSpec, VectorEnv, read_kwargs
from services.rl.envs.images import frame_shape, to_frame
from services.rl.envs.instructions import INSTRUCTION_LENGTH, NUM_WORDS, hash_words
from services.rl.envs.vectorized import vectorize

EXAMPLES: tuple[EnvConfig, ...] = (
    EnvConfig(id="rooms_watermaze"),
    EnvConfig(id="dmlab/language_select_described_object", frame_height=72, frame_width=96, color=True),
)

ACTIONS = np.array(
    [  # look left or right, look down or up, strafe left or right, move back or forward, fire, jump, crouch
        (0, 0, 0, 1, 0, 0, 0),
        (0, 0, 0, -1, 0, 0, 0),
        (0, 0, -1, 0, 0, 0, 0),
        (0, 0, 1, 0, 0, 0, 0),
        (-20, 0, 0, 0, 0, 0, 0),
        (20, 0, 0, 0, 0, 0, 0),
        (-20, 0, 0, 1, 0, 0, 0),
        (20, 0, 0, 1, 0, 0, 0),
        (0, 0, 0, 0, 1, 0, 0),
    ],
    np.intc,
)
"""Forward, backward, strafe left, strafe right, look left, look right, look left and forward, look right and
forward, fire."""

_TRAINING = tuple(task.removeprefix("dmlab/") for task in scores.SCORE_TABLES["dmlab30"])
LEVELS = tuple(dict.fromkeys((*_TRAINING, *map(scores.evaluation_task, _TRAINING))))
"""Of DMLab-30: 30 to train on, and the two that are tested on a level of their own."""

_TEST_MIXER_SEED = 0x600D5EED  # the one that Lab's documentation reserves for evaluation


@dataclass(frozen=True)
class DmlabSettings:
    """env.kwargs."""

    dataset_path: str = ""
    renderer: str = "software"
    level_cache: str = ""
    test: bool = False

    def __post_init__(self) -> None:
        if self.renderer not in ("software", "hardware"):
            raise ValueError(f"env.kwargs.renderer = {self.renderer!r}: allowed is software or hardware")


def plays(env_id: str) -> bool:
    return env_id.startswith("dmlab/") or env_id in LEVELS


def known_ids() -> list[str]:
    return [f"dmlab/{level}" for level in LEVELS]


def spec(config: EnvConfig) -> EnvSpec:
    read_kwargs(DmlabSettings, config.kwargs)
    if importlib.util.find_spec("deepmind_lab") is None:
        raise ValueError(
            f"env.id = {config.id!r}: needs the package deepmind_lab, which is not installed, nor on PyPI: "
            "build it with bazel from github.com/google-deepmind/lab, as its python/pip_package says"
        )
    return EnvSpec(
        id=config.id,
        observation_shape=frame_shape(config),
        observation_dtype="uint8",
        frame_stack=config.frame_stack,
        num_actions=len(ACTIONS),
        frame_skip=config.frame_skip,
        instruction_length=INSTRUCTION_LENGTH,
    )


def make(config: EnvConfig, num_envs: int, num_threads: int) -> VectorEnv:  # noqa: ARG001  (see module)
    lab = spec(config)
    return vectorize(partial(Level, config), lambda *_: lab, num_envs, "async")


class Level(gymnasium.Env[Any, Any]):
    """One level. Lab is loaded at the first reset, so that only the process that plays ever holds it."""

    def __init__(self, config: EnvConfig) -> None:
        self._config = config
        self.observation_space = Dict(
            frame=Box(0, 255, frame_shape(config), np.uint8),
            instruction=Box(0, NUM_WORDS - 1, (INSTRUCTION_LENGTH,), np.int32),
        )
        self.action_space = Discrete(len(ACTIONS))
        self._lab: Any = None
        self._newest: dict[str, Any] = {}

    def reset(
        self,
        *,
        seed: int | None = None,
        options: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        if self._lab is None:
            self._lab = _load(self._config)
        self._lab.reset(seed=int(self.np_random.integers(2**31)))
        return self._observe(), {}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        reward = self._lab.step(ACTIONS[action], num_steps=self._config.frame_skip)
        running = self._lab.is_running()
        return self._observe() if running else self._newest, reward, not running, False, {}

    def close(self) -> None:
        if self._lab is not None:
            self._lab.close()

    def _observe(self) -> dict[str, Any]:
        seen = self._lab.observations()
        self._newest = {
            "frame": to_frame(seen["RGB_INTERLEAVED"], self._config),
            "instruction": hash_words(seen["INSTR"]),
        }
        return self._newest


class LevelCache:
    """Maps that were compiled before. Lab asks here first; the directory may be shared by many processes.

    Without a word when it is of no use: a cache must not end an episode.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def fetch(self, key: str, pk3_path: str) -> bool:
        """Copy the map to where Lab wants it; False if it is not here, or cannot be read: Lab compiles it."""
        try:
            shutil.copyfile(self._directory / key, pk3_path)
        except OSError:
            return False
        return True

    def write(self, key: str, pk3_path: str) -> None:
        """Keep a map, if the disk takes it; whoever looks meanwhile sees all of it or nothing."""
        with contextlib.suppress(OSError):
            handle, name = tempfile.mkstemp(dir=self._directory)
            os.close(handle)
            copy = Path(name)
            try:
                shutil.copyfile(pk3_path, copy)
                copy.chmod(0o644)  # the directory may be shared with other users
                copy.replace(self._directory / key)
            except OSError:
                copy.unlink()


def _load(config: EnvConfig) -> Any:
    settings = read_kwargs(DmlabSettings, config.kwargs)
    level = config.id.removeprefix("dmlab/")
    options = {"width": str(config.frame_width), "height": str(config.frame_height), "logLevel": "WARN"}
    if settings.dataset_path:
        options["datasetPath"] = settings.dataset_path
    if settings.test or level.endswith("_test"):
        options |= {"allowHoldOutLevels": "true", "mixerSeed": str(_TEST_MIXER_SEED)}
    lab = importlib.import_module("deepmind_lab")
    try:
        return lab.Lab(
            level=f"contributed/dmlab30/{level}" if level in LEVELS else level,
            observations=["RGB_INTERLEAVED", "INSTR"],
            config=options,
            renderer=settings.renderer,
            level_cache=LevelCache(Path(settings.level_cache)) if settings.level_cache else None,
        )
    except RuntimeError as error:
        raise ValueError(f"env.id = {config.id!r} with env.kwargs = {config.kwargs}: {error}") from error
