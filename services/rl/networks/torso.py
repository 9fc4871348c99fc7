"""What every torso is."""

from __future__ import annotations

from torch import nn


class Torso(nn.Module):
    """Maps [N, *observation] to [N, num_features]."""

    num_features: int
