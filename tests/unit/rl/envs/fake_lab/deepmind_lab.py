"""Stands for DeepMind Lab, which takes an hour to build: the same interface, and just as strict about it.

Everything that it was told shows in what it returns, since it runs in processes of its own. An episode lasts
FRAMES frames, each of which is worth 1 if the agent fires. The image is red, as bright as the episode's seed,
but for two rows: the pixels of the first one are the action's values plus 128 and then the number of frames
since the reset; the second one holds the seed's four bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

FRAMES = 160
MAX_ACTIONS = (512, 512, 1, 1, 1, 1, 1)
COLOURS = ("red", "green", "blue", "yellow")

opened: list[dict[str, Any]] = []
"""What each Lab of this process was made of."""


class LevelCache(Protocol):
    def fetch(self, key: str, pk3_path: str) -> bool: ...

    def write(self, key: str, pk3_path: str) -> None: ...


class Lab:
    """One engine."""

    def __init__(
        self,
        level: str,
        observations: list[str],
        config: dict[str, str] | None = None,
        renderer: str = "software",
        level_cache: LevelCache | None = None,
    ) -> None:
        config = config or {}
        if type(observations) is not list or type(config) is not dict:
            raise TypeError("argument 2 must be list, argument 3 must be dict")
        if not all(type(value) is str for value in config.values()):
            raise TypeError("bad argument type for built-in operation")
        if renderer not in ("software", "hardware"):
            raise RuntimeError(
                f'Failed to set renderer must be "hardware" or "software" actual "{renderer}"!'
            )
        if level.startswith("contributed/dmlab30/"):
            if level.endswith("_test") and config.get("allowHoldOutLevels") != "true":
                raise RuntimeError('Failed to init environment - "held out"')
        elif not level.startswith("tests/"):
            raise RuntimeError(f"Invalid levelName flag '{level}' - \"Level not found!\"")
        for name in observations:
            if name not in ("RGB_INTERLEAVED", "INSTR"):
                raise ValueError(f"Unknown observation '{name}'.")
        opened.append({"level": level, "config": config, "renderer": renderer})
        self._level = level
        self._names = observations
        self._size = (int(config.get("height", "240")), int(config.get("width", "320")))
        self._cache = level_cache
        self._running = False
        self._closed = False
        self._seed = 0
        self._frames = 0

    def reset(self, episode: int = -1, seed: int | None = None) -> bool:
        if seed is not None and type(seed) is not int:
            raise ValueError(f"'seed' must be int or None, was '{type(seed).__name__}'.")
        assert seed is not None, "an episode that nobody can repeat"
        assert -(2**31) <= seed < 2**31, "does not fit a C int"
        self._running, self._seed, self._frames = True, seed, 0
        self._action = np.zeros(7, np.intc)
        if self._cache is not None:
            self._build_map(self._cache, Path(f"map-{seed}.pk3"))
        return True

    def _build_map(self, cache: LevelCache, path: Path) -> None:
        if not cache.fetch(path.stem, str(path)):
            path.write_text(f"compiled for {self._seed}", encoding="utf-8")
            cache.write(path.stem, str(path))

    def is_running(self) -> bool:
        return self._running

    def num_steps(self) -> int:
        return self._frames

    def step(self, action: npt.NDArray[np.intc], num_steps: int = 1) -> float:
        if not self._running:
            raise RuntimeError("Environment in wrong status to advance.")
        if action.shape != (7,):
            raise ValueError("action must have shape (7)")
        if action.dtype != np.intc:
            raise ValueError("action must have dtype np.intc")
        assert (np.abs(action) <= MAX_ACTIONS).all(), action
        self._action = action.copy()
        self._frames += num_steps
        self._running = self._frames < FRAMES
        return float(num_steps * action[4])

    def observations(self) -> dict[str, Any]:
        if not self._running:
            raise RuntimeError("Environment in wrong status for call to observations()")
        frame = np.zeros((*self._size, 3), np.uint8)
        frame[..., 0] = self._seed % 256
        frame[0, :7] = self._action[:, np.newaxis] + 128
        frame[0, 7] = self._frames
        frame[1, :4] = np.frombuffer(self._seed.to_bytes(4, "little"), np.uint8)[:, np.newaxis]
        words = f"Pick the {COLOURS[self._seed % 4]} ball." if "language" in self._level else ""
        seen = {"RGB_INTERLEAVED": frame, "INSTR": words}
        return {name: seen[name] for name in self._names}

    def close(self) -> bool:
        closing, self._closed, self._running = not self._closed, True, False
        return closing
