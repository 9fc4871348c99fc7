"""Reward clipping. It happens at the learner only, so that reported returns are those of the game."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def abs_one(rewards: Tensor) -> Tensor:
    """To [-1, 1]."""
    return rewards.clamp(-1.0, 1.0)


def soft_asymmetric(rewards: Tensor) -> Tensor:
    """5 tanh(r / 5), and 0.3 of that for negative rewards (the DMLab-30 choice of Espeholt et al. 2018)."""
    squeezed = torch.tanh(rewards / 5.0)
    return 5.0 * torch.where(rewards < 0, 0.3 * squeezed, squeezed)


def unclipped(rewards: Tensor) -> Tensor:
    """As they are."""
    return rewards


REWARD_CLIPPING: Mapping[str, Callable[[Tensor], Tensor]] = {
    "auto": abs_one,
    "abs_one": abs_one,
    "soft_asymmetric": soft_asymmetric,
    "none": unclipped,
}
