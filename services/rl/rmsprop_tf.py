"""RMSProp as TensorFlow computes it, for comparisons with published runs (``optimiser.name: rmsprop_tf``).

Against torch's: epsilon stands inside the root, the average of squares begins at 1 instead of 0 (so the first
steps are small instead of large), and the learning rate is part of what momentum remembers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class RMSpropTF(torch.optim.Optimizer):
    """ms <- a ms + (1 - a) g^2; mom <- momentum mom + lr g / sqrt(ms + eps); w <- w - mom."""

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, alpha: float, eps: float, momentum: float
    ) -> None:
        defaults = {"lr": lr, "alpha": alpha, "eps": eps, "momentum": momentum, "tensorflow": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of everything that has a gradient."""
        assert closure is None, "evaluating the model again is not supported"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self._state_of(parameter, group["momentum"])
                square = state["square_avg"].lerp_(parameter.grad.square(), 1 - group["alpha"])
                step = group["lr"] * parameter.grad / (square + group["eps"]).sqrt()
                if group["momentum"]:
                    step = state["momentum_buffer"].mul_(group["momentum"]).add_(step)
                parameter.sub_(step)

    def _state_of(self, parameter: Tensor, momentum: float) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["square_avg"] = torch.ones_like(parameter)
            if momentum:
                state["momentum_buffer"] = torch.zeros_like(parameter)
        return state
