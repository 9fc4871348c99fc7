"""`deep`: the residual network of Espeholt et al. 2018 (figure 3, right), without its LSTM.

Three sections of 16, 32 and 32 channels, each a 3x3 convolution, a 3x3 max-pool with stride 2 and two
residual blocks; then a linear layer of 256 features. Torch's own initialisation (uniform in fan-in), which is
close to that of the authors' code: with orthogonal weights of gain sqrt(2) the activations would grow from
block to block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from services.config import NetworkConfig
from services.rl.envs import EnvSpec
from services.rl.networks.convolutional import PixelConv2d, PixelTorso

SECTIONS = (16, 32, 32)
NUM_FEATURES = 256


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(torch.relu(x))
        output: Tensor = x + self.second(torch.relu_(y))
        return output


class ResidualTorso(PixelTorso):
    """Sections of convolution, max-pool and residual blocks."""

    def __init__(self, spec: EnvSpec) -> None:
        super().__init__(spec, NUM_FEATURES)
        channels, (height, width) = self.num_channels, spec.observation_shape[:2]
        self.sections = nn.ModuleList()
        for out_channels in SECTIONS:
            convolution = nn.Conv2d if self.sections else PixelConv2d
            self.sections.append(
                nn.Sequential(
                    convolution(channels, out_channels, 3, padding=1),
                    nn.MaxPool2d(3, stride=2, padding=1),
                    ResidualBlock(out_channels),
                    ResidualBlock(out_channels),
                )
            )
            channels, height, width = out_channels, (height + 1) // 2, (width + 1) // 2
        self.linear = nn.Linear(channels * height * width, NUM_FEATURES)
        self.to_channels_last()

    def forward(self, frames: Tensor) -> Tensor:
        x = self.to_channels(frames, self.linear.weight.dtype)
        for section in self.sections:
            x = section(x)
        return torch.relu(self.linear(torch.relu(x).flatten(1)))


def deep(spec: EnvSpec, _config: NetworkConfig) -> ResidualTorso:
    """15 convolutions and 256 features."""
    return ResidualTorso(spec)
