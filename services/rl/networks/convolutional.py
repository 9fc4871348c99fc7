"""Plain convolutional torsos for stacked frames: `shallow` (Espeholt et al. 2018, figure 3 left, without the
LSTM; the net of Mnih et al. 2016) and `nature` (Mnih et al. 2015).

Orthogonal initialisation with gain sqrt(2): it keeps the scale of activations through ReLU layers, and Atari
learns faster with it than with torch's default (Andrychowicz et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.config import NetworkConfig
from services.rl.envs import EnvSpec
from services.rl.networks.torso import Torso


class PixelConv2d(nn.Conv2d):
    """A convolution over bytes 0..255 read as 0..1: the factor is in the weights, not a pass over pixels."""

    def forward(self, pixels: Tensor) -> Tensor:
        weight = self.weight * (1.0 / 255.0)
        return F.conv2d(pixels, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class PixelTorso(Torso):
    """What torsos over images share: how bytes become the channels of a convolution."""

    def __init__(self, spec: EnvSpec, num_features: int) -> None:
        super().__init__()
        shape = spec.observation_shape
        if len(shape) not in (2, 3) or spec.observation_dtype != "uint8":
            raise ValueError(
                f"network.name: a convolutional network cannot see the observations of env.id = {spec.id!r}, "
                f"{spec.observation_dtype} of shape {list(shape)}; allowed is mlp"
            )
        self.num_channels = (shape[2] if len(shape) == 3 else 1) * spec.frame_stack
        self.num_features = num_features

    def to_channels(self, frames: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 [N, H, W, (color,) stack] viewed as a channels-last [N, channels, H, W] in ``dtype``."""
        device = frames.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return frames.flatten(3).permute(0, 3, 1, 2).to(dtype)  # 0..255 is exact in bfloat16

    def to_channels_last(self) -> None:
        """Lay the weights out as the frames are."""
        torch.nn.Module.to(self, memory_format=torch.channels_last)  # type: ignore[call-overload]


class ConvTorso(PixelTorso):
    """Convolutions (channels, kernel, stride) and one linear layer, each followed by ReLU."""

    def __init__(self, spec: EnvSpec, layers: Sequence[tuple[int, int, int]], num_features: int) -> None:
        super().__init__(spec, num_features)
        channels, (height, width) = self.num_channels, spec.observation_shape[:2]
        self.convolutions = nn.ModuleList()
        for out_channels, kernel, stride in layers:
            convolution = nn.Conv2d if self.convolutions else PixelConv2d
            self.convolutions.append(convolution(channels, out_channels, kernel, stride))
            channels, height, width = (
                out_channels,
                (height - kernel) // stride + 1,
                (width - kernel) // stride + 1,
            )
            if min(height, width) < 1:
                raise ValueError(
                    f"network.name: frames of {list(spec.observation_shape)} are too small for this network; "
                    f"make env.frame_height and env.frame_width larger"
                )
        self.linear = nn.Linear(channels * height * width, num_features)
        for module in (*self.convolutions, self.linear):
            nn.init.orthogonal_(module.weight, gain=math.sqrt(2.0))
            nn.init.zeros_(module.bias)
        self.to_channels_last()

    def forward(self, frames: Tensor) -> Tensor:
        x = self.to_channels(frames, self.linear.weight.dtype)
        for convolution in self.convolutions:
            x = torch.relu(convolution(x))
        return torch.relu(self.linear(x.flatten(1)))


def shallow(spec: EnvSpec, _config: NetworkConfig) -> Torso:
    """Two convolutions and 256 features."""
    return ConvTorso(spec, [(16, 8, 4), (32, 4, 2)], 256)


def nature(spec: EnvSpec, _config: NetworkConfig) -> Torso:
    """Three convolutions and 512 features."""
    return ConvTorso(spec, [(32, 8, 4), (64, 4, 2), (64, 3, 1)], 512)
