"""The learners' group: who trains together, and how their gradients become one.

Today a group has one member, and averaging is nothing to do. The trainer calls it where many would meet,
between the backward pass and the clipping, and only the leader publishes and writes checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """A view of the membership: fixed for one generation."""

    rank: int = 0
    world_size: int = 1
    generation: int = 0

    @property
    def is_leader(self) -> bool:
        """Publishes weights and writes checkpoints."""
        return self.rank == 0

    def sum(self, totals: Tensor) -> None:
        """In place, over all members."""
        assert self.world_size == 1, f"{self.world_size} members, {tuple(totals.shape)} totals"

    def sum_counts(self, counts: Sequence[int]) -> list[int]:
        """Over all members; on the host, so that no device is waited for."""
        assert self.world_size == 1, f"{self.world_size} members, {len(counts)} counts"
        return list(counts)

    def average(self, gradients: Sequence[Tensor]) -> None:
        """In place, over all members, so that a change of the world's size does not change the scale."""
        assert self.world_size == 1, f"{self.world_size} members, {len(gradients)} gradients"
