"""A network of a user's own, as `--network package.module:factory` finds it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from services.config import NetworkConfig
from services.rl.envs import EnvSpec
from services.rl.networks.torso import Torso

ONE_LAYER = f"{__name__}:one_layer"


class OneLayer(Torso):
    """Vectors through one layer."""

    def __init__(self, num_inputs: int, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.layer = nn.Linear(num_inputs, num_features)

    def forward(self, observations: Tensor) -> Tensor:
        return torch.tanh(self.layer(observations.flatten(1)))


def one_layer(spec: EnvSpec, config: NetworkConfig) -> OneLayer:
    return OneLayer(spec.observation_shape[0], config.hidden_size)
