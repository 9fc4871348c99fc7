"""Replay memory: past experience, drawn from uniformly (Schmitt et al. 2019, sec. 3).

First in, first out. What an item is, is the business of whoever adds it: ``learner/replay.py`` adds whole
rollouts, compressed, each as one ``bytes`` object, and nothing else is held per item. Never copies one.

One thread owns it; there is no lock.
"""

from __future__ import annotations

import numpy as np


class ReplayMemory:
    """A ring of ``capacity`` items. Adding takes constant time, drawing time in proportion to the draw."""

    def __init__(self, capacity: int, rng: np.random.Generator) -> None:
        assert capacity >= 1
        self.capacity = capacity
        self.size_bytes = 0
        """Of all items together, without Python's 33 bytes for each."""
        self._items: list[bytes] = []
        self._oldest = 0
        self._rng = rng

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: bytes) -> bytes | None:
        """Hold ``item``; returns the oldest one if that had to make room."""
        self.size_bytes += len(item)
        if len(self._items) < self.capacity:
            self._items.append(item)
            return None
        fallen_out = self._items[self._oldest]
        self._items[self._oldest] = item
        self._oldest = (self._oldest + 1) % self.capacity
        self.size_bytes -= len(fallen_out)
        return fallen_out

    def sample(self, count: int) -> list[bytes]:
        """``count`` different items, every choice of them and every order equally likely."""
        assert 0 <= count <= len(self._items)
        # Without replacement numpy shuffles a whole range only where the draw is a good part of it.
        chosen = self._rng.choice(len(self._items), count, replace=False)
        return [self._items[index] for index in chosen.tolist()]
