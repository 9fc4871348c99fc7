"""The optimiser: how a gradient becomes a step, and what of it a checkpoint holds.

Before it comes the trainer's backward pass. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from services.config import OptimiserConfig
from services.rl.rmsprop_tf import RMSpropTF


def make_optimiser(config: OptimiserConfig, network: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimiser of the run."""
    parameters = network.parameters()
    if config.name == "adam":
        betas = (config.adam_beta1, config.adam_beta2)
        return torch.optim.Adam(parameters, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon)
    rmsprop = RMSpropTF if config.name == "rmsprop_tf" else torch.optim.RMSprop
    return rmsprop(
        parameters,
        lr=config.learning_rate,
        alpha=config.rmsprop_alpha,
        eps=config.rmsprop_epsilon,
        momentum=config.rmsprop_momentum,
    )


def clip_or_zero(gradients: list[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """Scale in place to the global norm ``max_norm``, or to zero: (norm before, whether it was finite).

    Without a round trip to the device there is no branch, so a bad update is one with a zero gradient.
    """
    norm = torch.nn.utils.get_total_norm(gradients)
    finite = torch.isfinite(norm)
    scale = torch.where(finite, (max_norm / (norm + 1e-6)).clamp(max=1.0), 0.0)
    for gradient in gradients:
        torch.nan_to_num_(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        gradient.mul_(scale)
    return norm, finite


def settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """What one of an optimiser's groups was configured with. The learning rate is its schedule's."""
    return {key: value for key, value in group.items() if key not in ("params", "lr")}


def statistics(group: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    """Which kinds of averages an optimiser with these settings keeps: (Adam's, TensorFlow's, momentum)."""
    return "betas" in group, "tensorflow" in group, bool(group.get("momentum"))
