"""Two tanh layers for vectors, the usual net of the classic control tasks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from services.config import NetworkConfig
from services.rl.envs import EnvSpec
from services.rl.networks.torso import Torso


class Mlp(Torso):
    """Flattens whatever comes; bytes are read as 0..1."""

    def __init__(self, num_inputs: int, hidden_size: int) -> None:
        super().__init__()
        self.first = nn.Linear(num_inputs, hidden_size)
        self.second = nn.Linear(hidden_size, hidden_size)
        self.num_features = hidden_size
        for layer in (self.first, self.second):
            nn.init.orthogonal_(layer.weight, gain=math.sqrt(2.0))
            nn.init.zeros_(layer.bias)

    def forward(self, observations: Tensor) -> Tensor:
        x = observations.flatten(1)
        if x.dtype == torch.uint8:
            x = x * (1.0 / 255.0)
        x = torch.tanh(self.first(x.to(self.first.weight.dtype)))
        return torch.tanh(self.second(x))


def mlp(spec: EnvSpec, config: NetworkConfig) -> Torso:
    """For vectors, and for anything small enough to be flattened."""
    return Mlp(math.prod(spec.observation_shape) * spec.frame_stack, config.hidden_size)
