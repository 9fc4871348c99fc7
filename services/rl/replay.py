"""Replay memory: past experience, drawn from uniformly (Schmitt et al. 2019, sec. 3).

First in, first out. What an item is, is the business of whoever adds it: ``learner/replay.py`` adds whole
rollouts, compressed, each as one ``bytes`` object, and nothing else is held per item. Never copies one.

What is drawn follows from what is held, in its order of age, and from the state of the draws: a memory that
is filled again and given that state draws what the one before it would have drawn. One thread owns it; there
is no lock.
"""

from __future__ import annotations

import json

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
        ages = self._rng.choice(len(self._items), count, replace=False)
        return [self._items[(self._oldest + age) % len(self._items)] for age in ages.tolist()]

    def draws(self) -> bytes:
        """The state of the draws."""
        return json.dumps(self._rng.bit_generator.state).encode()

    def continue_draws(self, state: bytes) -> None:
        """Draw on from ``state``; ValueError, and nothing is changed, if it is none of this generator's."""
        try:
            self._rng.bit_generator.state = json.loads(state)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"no state of {type(self._rng.bit_generator).__name__}: {error!r}") from None
