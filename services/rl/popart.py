"""PopArt: a baseline per task that regresses normalised targets (Hessel et al. 2018, section 3).

Before it come the network's features, after it ``losses`` and, once the optimiser has stepped, ``update``.
The statistics live beside the weights that they belong to, so that whoever copies one copies the other. Until
the first update mean is 0 and sigma 1: a baseline that is never updated is a plain linear one.
Shapes: T time, B batch, F features, K tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from services.config import PopArtConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Of each column's task: value = sigma x normalised + mean."""

    mean_B: Tensor
    sigma_B: Tensor


class PopArt(nn.Module):
    """A linear layer with an output per task, on that task's own scale."""

    mean_K: Tensor
    second_moment_K: Tensor

    def __init__(self, num_features: int, num_tasks: int, config: PopArtConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, num_tasks)
        # float64, because their difference is small where the mean is far from 0.
        self.register_buffer("mean_K", torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("second_moment_K", torch.ones(num_tasks, dtype=torch.float64))
        self._config = config

    def forward(self, features: Tensor) -> Tensor:
        """[..., F] -> normalised baselines [..., K]."""
        output: Tensor = self.linear(features)
        return output

    @property
    def sigmas(self) -> Tensor:
        """clip(sqrt(nu - mu^2), min_sigma, max_sigma)."""
        return self._sigma(self.mean_K, self.second_moment_K)

    def scale_of(self, task_B: Tensor) -> Scale:
        """The scale of each column."""
        return Scale(mean_B=self.mean_K[task_B].float(), sigma_B=self.sigmas[task_B].float())

    @torch.no_grad()
    def update(self, moments_3K: Tensor, finite: Tensor) -> None:
        """Move the statistics towards the targets of a batch, and the layer so that no value changes.

        ``moments_3K`` are count, sum and sum of squares of each task's targets over the batches of all
        learners (``moments``), so that all of them hold the same statistics. It belongs after the optimiser's
        step: the gradient was taken on the old scale. Where ``finite`` is false nothing moves.
        """
        count_K, sum_K, square_K = moments_3K
        # A task that is absent keeps its statistics.
        step_K = ((count_K > 0) & finite).double() * self._config.step_size
        # Its 0 / 0 and sums that are not finite are weighed by 0, which does not make NaN go away.
        mean_K = self.mean_K.lerp(torch.nan_to_num(sum_K / count_K), step_K)
        second_moment_K = self.second_moment_K.lerp(torch.nan_to_num(square_K / count_K), step_K)
        old_K, new_K = self.sigmas, self._sigma(mean_K, second_moment_K)
        # sigma' n' + mu' = sigma n + mu for every input. The brackets keep a small bias from drowning in mu.
        self.linear.weight.mul_((old_K / new_K).unsqueeze(-1))
        self.linear.bias.copy_((old_K * self.linear.bias + (self.mean_K - mean_K)) / new_K)
        self.mean_K.copy_(mean_K)
        self.second_moment_K.copy_(second_moment_K)

    def _sigma(self, mean_K: Tensor, second_moment_K: Tensor) -> Tensor:
        variance_K = second_moment_K - mean_K.square()
        return variance_K.clamp(min=0.0).sqrt().clamp(self._config.min_sigma, self._config.max_sigma)


def moments(targets_TB: Tensor, counts_TB: Tensor, task_B: Tensor, num_tasks: int) -> Tensor:
    """[3, K]: how many targets count, their sum and the sum of their squares, for each task. In float64."""
    targets_TB = targets_TB.double()
    sums_3B = torch.stack(
        [counts_TB.sum(0), (targets_TB * counts_TB).sum(0), (targets_TB.square() * counts_TB).sum(0)]
    )
    return sums_3B.new_zeros(3, num_tasks).index_add_(1, task_B, sums_3B)
